#!/usr/bin/env bash
# etcd.sh start DIR BASEPORT [NODES=3] | stop DIR | kill DIR: an etcd cluster on 127.0.0.1, TLS with client certificates only.
#   Member I lies in DIR/nI and serves clients on BASEPORT+2I, members on BASEPORT+2I+1. Certificates lie in DIR/tls:
#   ca.crt, server.*, and client.{crt,key} for who asks. Data stay in DIR: `start` again starts the members that are gone.
# Environment: ONLY=I stops, kills or starts one member alone.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
(($# >= 2)) || fail "usage: start DIR BASEPORT [NODES] | stop DIR | kill DIR"
dir=$(absolute "$2")
tls=$dir/tls

# Of the members: all, or the one that is meant.
folders() { find "$dir" -maxdepth 2 -path "$dir/n${ONLY:-*}/etcd.pid" -printf '%h\n'; }

healthy() {
  ETCDCTL_API=3 "$bin/etcdctl" --endpoints "https://127.0.0.1:$1" --cacert "$tls/ca.crt" --cert "$tls/client.crt" \
    --key "$tls/client.key" --command-timeout 1s endpoint health
}

case $1 in
  start)
    base=${3:?BASEPORT} nodes=${4:-3} bin=$TOOLS/etcd/bin
    need "$bin/etcd" etcd
    [ -e "$tls/server.crt" ] || certificates "$tls"
    cluster=
    for ((i = 0; i < nodes; i++)); do cluster+=,n$i=https://127.0.0.1:$((base + 2 * i + 1)); done
    for ((i = 0; i < nodes; i++)); do
      [ "${ONLY:-$i}" = "$i" ] || continue
      mkdir -p "$dir/n$i"; alive "$dir/n$i" etcd && continue
      client=https://127.0.0.1:$((base + 2 * i)) peer=https://127.0.0.1:$((base + 2 * i + 1))
      # Quicker than the defaults, as between machines in one rack. Data outlive the process, not the machine.
      spawn "$dir/n$i" etcd "$bin/etcd" --name "n$i" --data-dir "$dir/n$i/data" --listen-client-urls "$client" --advertise-client-urls "$client" \
        --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "${cluster#,}" --initial-cluster-state new \
        --initial-cluster-token "t-$base" --heartbeat-interval 50 --election-timeout 500 --unsafe-no-fsync --logger zap --log-level warn \
        --client-cert-auth --trusted-ca-file "$tls/ca.crt" --cert-file "$tls/server.crt" --key-file "$tls/server.key" \
        --peer-client-cert-auth --peer-trusted-ca-file "$tls/ca.crt" --peer-cert-file "$tls/server.crt" --peer-key-file "$tls/server.key"
    done
    for ((i = 0; i < nodes; i++)); do
      [ "${ONLY:-$i}" = "$i" ] || continue
      await 20 "$dir/n$i" etcd $((base + 2 * i)) healthy $((base + 2 * i))
    done
    ;;
  stop) for folder in $(folders); do end_process "$folder" etcd TERM 15; done ;;
  kill) for folder in $(folders); do end_process "$folder" etcd KILL 5; done ;;
  *) fail "unknown command $1" ;;
esac
