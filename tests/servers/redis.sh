#!/usr/bin/env bash
# redis.sh start DIR PORT [plain|tls|cluster] | stop DIR | kill DIR: Redis on 127.0.0.1, nothing written to disk.
#   plain:   PORT and the unix socket DIR/redis.sock
#   tls:     TLS 1.3 only on PORT; users below; certificates from TLS_DIR (ca.crt, server.crt, server.key) or made new in
#            DIR/tls (with client.crt, client.key too). CLIENT_CERT=yes refuses clients that show none (default: optional)
#   cluster: three masters on PORT, PORT+1, PORT+2, in DIR/PORT and so on; PORT below 22000, since each also takes PORT+10000
# Environment: MAXMEMORY=64mb, REDIS_EXTRA = more redis-server options.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
(($# >= 2)) || fail "usage: start DIR PORT [plain|tls|cluster] | stop DIR | kill DIR"
dir=$(absolute "$2")

# server FOLDER OPTION...
server() {
  local folder=$1; shift
  mkdir -p "$folder"
  # shellcheck disable=SC2086
  spawn "$folder" redis redis-server --bind 127.0.0.1 --dir "$folder" --save "" --appendonly no \
    --maxmemory "${MAXMEMORY:-64mb}" --maxmemory-policy allkeys-lfu "$@" ${REDIS_EXTRA:-}
}

pong() { [ "$(timeout 2 redis-cli "$@" ping)" = PONG ]; }

users() {
  # default off: a client that names nobody gets NOAUTH. `reader` may touch one prefix only, to see NOPERM.
  # Redis 7.0 knows no `client|setinfo`; naming it here stops the start.
  cat <<'A'
user default off
user admin on >admin-password ~* &* +@all
user spillway on >spillway-password ~* &* +@all -@admin -@dangerous +info
user reader on >reader-password ~readable:* -@all +@read +@connection
A
}

joined() {
  local state; state=$(timeout 2 redis-cli -p "$1" cluster info)
  [[ $state == *cluster_state:ok* && $state == *cluster_known_nodes:3* ]]
}

# Every folder that holds a server of ours: DIR itself, or one a cluster node.
folders() { find "$dir" -maxdepth 2 -name redis.pid -printf '%h\n'; }

case $1 in
  start)
    need redis-server redis
    port=${3:?PORT}
    case ${4:-plain} in
      plain)
        server "$dir" --port "$port" --unixsocket "$dir/redis.sock" --unixsocketperm 700
        await 10 "$dir" redis "$port" pong -p "$port"
        ;;
      tls)
        tls=${TLS_DIR:-$dir/tls}
        [ -e "$tls/server.crt" ] || certificates "$tls"
        users >"$dir/users.acl"
        server "$dir" --port 0 --tls-port "$port" --tls-protocols TLSv1.3 --aclfile "$dir/users.acl" --tls-auth-clients "${CLIENT_CERT:-optional}" \
          --tls-ca-cert-file "$tls/ca.crt" --tls-cert-file "$tls/server.crt" --tls-key-file "$tls/server.key"
        # The certificate is shown even where it is optional: the one test then holds for both settings.
        login=(-p "$port" --tls --cacert "$tls/ca.crt" --user admin --pass admin-password --no-auth-warning)
        [ ! -e "$tls/client.crt" ] || login+=(--cert "$tls/client.crt" --key "$tls/client.key")
        await 10 "$dir" redis "$port" pong "${login[@]}"
        ;;
      cluster)
        ((port < 22000)) || fail "a cluster's ports must be below 22000"
        ports=("$port" $((port + 1)) $((port + 2)))
        for p in "${ports[@]}"; do
          rm -f "$dir/$p/nodes.conf"   # the members of an earlier run, on ports that may be another's now
          server "$dir/$p" --port "$p" --cluster-enabled yes --cluster-config-file nodes.conf --cluster-node-timeout 2000
        done
        for p in "${ports[@]}"; do await 10 "$dir/$p" redis "$p" pong -p "$p"; done
        redis-cli --cluster create "${ports[@]/#/127.0.0.1:}" --cluster-yes >"$dir/create.log" || { cat "$dir/create.log" >&2; fail "no cluster"; }
        for p in "${ports[@]}"; do await 20 "$dir/$p" redis "$p" joined "$p"; done
        ;;
      *) fail "unknown mode $4" ;;
    esac
    ;;
  stop) for folder in $(folders); do end_process "$folder" redis TERM 5; done ;;
  kill) for folder in $(folders); do end_process "$folder" redis KILL 5; done ;;
  *) fail "unknown command $1" ;;
esac
