#!/usr/bin/env bash
# triton.sh start DIR HTTP_PORT GRPC_PORT METRICS_PORT [MODEL...] | stop DIR | kill DIR: the real Triton server on 127.0.0.1.
#   The model repository is copied to DIR/models; named models are loaded, none named = all. More can be loaded later
#   over its repository API. Ready when every one of them is.
# Environment: MODELS=tests/servers/triton-models (another repository), TRITON_EXTRA = more tritonserver options.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
(($# >= 2)) || fail "usage: start DIR HTTP_PORT GRPC_PORT METRICS_PORT [MODEL...] | stop DIR | kill DIR"
dir=$(absolute "$2")

case $1 in
  start)
    (($# >= 5)) || fail "start needs HTTP_PORT GRPC_PORT METRICS_PORT"
    http=$3 grpc=$4 metrics=$5; shift 5
    venv=$TOOLS/triton
    need "$venv/bin/python" triton; need curl curl
    { read -r site; read -r version; read -r libraries; } < <("$venv/bin/python" -c \
      'import sys, sysconfig as s; print(s.get_path("purelib"), "%d.%d" % sys.version_info[:2], s.get_config_var("LIBDIR"), sep="\n")')
    server=$site/pytriton/tritonserver
    # The process that runs a model must be built for this Python and lie beside the backend. Moved into place
    # whole, as another test run may start at this moment.
    stub=$server/backends/python/triton_python_backend_stub
    [ -x "$stub" ] || { install -m 755 "$server/python_backend_stubs/$version/triton_python_backend_stub" "$stub.$$" && mv -f "$stub.$$" "$stub"; }
    # A copy: Python writes caches beside the models, and `phishing` gets the one model file that everything else serves too.
    rm -rf "$dir/models"; cp -r "${MODELS:-$SERVERS/triton-models}" "$dir/models"
    [ ! -d "$dir/models/phishing/1" ] || cp "$REPO/cli/dev/model/1/model.onnx" "$dir/models/phishing/1/"
    if (($#)); then load=("${@/#/--load-model=}"); else load=('--load-model=*'); fi
    # shellcheck disable=SC2086
    # PATH: the stub imports the numpy of the first python3 on it. shm prefix: two servers must not share segments.
    PATH=$venv/bin:$PATH LD_LIBRARY_PATH=$site/nvidia_pytriton.libs:$libraries PYTHONDONTWRITEBYTECODE=1 \
      spawn "$dir" triton "$server/bin/tritonserver" --model-repository "$dir/models" --backend-directory "$server/backends" \
      --model-control-mode explicit "${load[@]}" --backend-config "python,shm-region-prefix-name=spillway$http" \
      --http-address 127.0.0.1 --http-port "$http" --grpc-address 127.0.0.1 --grpc-port "$grpc" \
      --metrics-address 127.0.0.1 --metrics-port "$metrics" --allow-gpu-metrics false --exit-timeout-secs 5 ${TRITON_EXTRA:-}
    await 60 "$dir" triton "$http" curl -fsS --max-time 1 "http://127.0.0.1:$http/v2/health/ready"
    ;;
  stop) end_process "$dir" triton TERM 15 ;;
  kill) end_process "$dir" triton KILL 10 ;;
  *) fail "unknown command $1" ;;
esac
