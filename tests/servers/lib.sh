# Sourced by the scripts beside it: where tools lie, and how one process is started, awaited and ended.
# A run folder DIR holds NAME.pid (the process id, for kill -STOP and the like), NAME.born and NAME.log.
set -euo pipefail
SERVERS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$SERVERS/../.." && pwd)
TOOLS=${SPILLWAY_TOOLS:-$REPO/.tools}

fail() { echo "${0##*/}: $*" >&2; exit 1; }

# need FILE GROUP: a clear word instead of "not found" when a group was never installed.
need() { [ -e "$1" ] || command -v "$1" >/dev/null || fail "$1 is missing; run tests/servers/install.sh $2"; }

# Kernel start time of a process; empty when it is gone or only waits to be reaped.
born() { sed -n 's/.*) \([^Z]\) /\1 /p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# spawn DIR NAME COMMAND...
# A session of its own, so that Ctrl-C on a test run lets the test stop it in order; no descriptor of the
# caller is kept, so that a caller who reads our output to its end does not wait for the server's end.
spawn() {
  local dir=$1 name=$2; shift 2
  alive "$dir" "$name" && fail "$name already runs in $dir"
  setsid "$@" >>"$dir/$name.log" 2>&1 </dev/null 3>&- 4>&- &
  echo $! >"$dir/$name.pid"; born $! >"$dir/$name.born"
}

# The recorded process still runs: same id and same start time, since ids are used again.
alive() {
  [ -s "$1/$2.pid" ] || return 1
  local now; now=$(born "$(<"$1/$2.pid")")
  [ -n "$now" ] && [ "$now" = "$(<"$1/$2.born")" ]
}

# The recorded process itself listens on PORT: with only a probe, a stranger on the same port would answer for it.
listens() {
  local sockets
  sockets=$(awk -v port="$(printf '%04X' "$3")" '$4 == "0A" && $2 ~ port"$" { print "socket:[" $10 "]" }' /proc/net/tcp /proc/net/tcp6 2>/dev/null)
  [ -n "$sockets" ] && find "/proc/$(<"$1/$2.pid")/fd" -lname 'socket:*' -printf '%l\n' 2>/dev/null | grep -qxF "$sockets"
}

# await SECONDS DIR NAME PORT COMMAND...: until it listens on PORT (- for no such check) and COMMAND succeeds.
# A process that died, or that is late, is an error with its last words.
await() {
  local end=$((SECONDS + $1 + 1)) dir=$2 name=$3 port=$4; shift 4
  until { [ "$port" = - ] || listens "$dir" "$name" "$port"; } && "$@" >/dev/null 2>&1; do
    alive "$dir" "$name" || give_up "$dir" "$name" "ended while starting; is a port taken?"
    ((SECONDS < end)) || give_up "$dir" "$name" "was not ready in time"
    sleep 0.05
  done
}

give_up() {
  tail -n 30 "$1/$2.log" >&2
  end_process "$1" "$2" KILL 5
  fail "$2 $3"
}

# end_process DIR NAME SIGNAL SECONDS: the signal, SIGKILL when it is not enough, and only back when the process is gone.
end_process() {
  local dir=$1 name=$2 end=$((SECONDS + $4 + 1)) pid
  if alive "$dir" "$name"; then
    pid=$(<"$dir/$name.pid")
    kill -CONT "$pid" 2>/dev/null || true   # a stopped process handles no SIGTERM
    kill "-$3" "$pid" 2>/dev/null || true
    while alive "$dir" "$name"; do
      ((SECONDS < end)) || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.02
    done
  fi
  rm -f "$dir/$name.pid" "$dir/$name.born"
}

# absolute DIR: made, and as an absolute path.
absolute() { mkdir -p "$1" && (cd "$1" && pwd); }

# certificates DIR: ca, server and client, each .crt and .key, for localhost and 127.0.0.1.
certificates() {
  mkdir -p "$1"
  (
    cd "$1"
    # Members of an etcd cluster are each other's clients.
    declare -A usage=([server]=serverAuth,clientAuth [client]=clientAuth)
    ec=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
    openssl req -x509 "${ec[@]}" -days 30 -subj "/CN=test CA" -keyout ca.key -out ca.crt \
      -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign"
    for name in server client; do
      openssl req "${ec[@]}" -subj "/CN=$name" -keyout $name.key -out $name.csr
      # rustls demands version 3 and a subject alternative name; CA:FALSE because the root must not serve as a leaf.
      printf '%s\n' "basicConstraints=CA:FALSE" "subjectAltName=DNS:localhost,IP:127.0.0.1" "extendedKeyUsage=${usage[$name]}" >$name.ext
      openssl x509 -req -days 30 -in $name.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile $name.ext -out $name.crt
      rm $name.csr $name.ext
    done
  ) 2>"$1/openssl.log" || { cat "$1/openssl.log" >&2; fail "no certificates"; }
}
