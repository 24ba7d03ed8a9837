#!/usr/bin/env bash
# envoy.sh start DIR CONFIG | stop DIR | kill DIR: Envoy with the static configuration file CONFIG.
#   Its hot restart is off: with it, Envoys of one machine need base ids that differ, leave shared memory behind, and end
#   as soon as the process that started them does (it asks the kernel for SIGTERM then), which this script is.
#   Ready when Envoy says so at its admin address, which CONFIG may give as port 0: DIR/admin holds ADDRESS:PORT.
# Environment: CONCURRENCY=1 worker threads, ENVOY_EXTRA = more options.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
(($# >= 2)) || fail "usage: start DIR CONFIG | stop DIR | kill DIR"
dir=$(absolute "$2")

# The admin file is there before the listeners are open; /ready answers 200 only with all of them.
ready() { [ -s "$dir/admin" ] && curl -fsS --max-time 1 "http://$(<"$dir/admin")/ready"; }

case $1 in
  start)
    config=${3:?CONFIG}
    need "$TOOLS/bin/envoy" envoy; need curl curl
    rm -f "$dir/admin"
    # shellcheck disable=SC2086
    spawn "$dir" envoy "$TOOLS/bin/envoy" -c "$config" --disable-hot-restart --concurrency "${CONCURRENCY:-1}" \
      --admin-address-path "$dir/admin" --log-level warning ${ENVOY_EXTRA:-}
    await 20 "$dir" envoy - ready
    ;;
  stop) end_process "$dir" envoy TERM 10 ;;
  kill) end_process "$dir" envoy KILL 5 ;;
  *) fail "unknown command $1" ;;
esac
