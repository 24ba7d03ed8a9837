#!/usr/bin/env bash
# cassandra.sh start DIR [CQL_PORT [STORAGE_PORT]] | stop DIR | kill DIR: one Cassandra node, no JMX port.
#   start: back when the node answers CQL; defaults 9042 and 7000. stop: SIGTERM (6 s). kill: SIGKILL, data stay (a crash).
# Environment of start:
#   ADDRESS=127.0.0.1            both ports are opened on it; nodes of one ring: 127.0.0.1, 127.0.0.2, ... on the same ports
#   SYNC=batch|periodic          periodic loses acknowledged writes on SIGKILL, as a production default would
#   SEEDS TOKEN DC=dc1 RACK=rack1 for a ring: every node in its own SEEDS, one fixed TOKEN each; then also wait for the ring
#   HEAP=512m                    JAVA_EXTRA: more JVM options
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
(($# >= 2)) || fail "usage: start DIR [CQL_PORT [STORAGE_PORT]] | stop DIR | kill DIR"
dir=$(absolute "$2") cql=${3:-9042} storage=${4:-7000} address=${ADDRESS:-127.0.0.1}

configure() {
  local sync
  case ${SYNC:-batch} in
    batch) sync='commitlog_sync: batch' ;;
    periodic) sync=$'commitlog_sync: periodic\ncommitlog_sync_period: 10000ms' ;;
    *) fail "SYNC is batch or periodic" ;;
  esac
  mkdir -p "$dir/conf" "$dir/data" "$dir/tmp"
  # Small pools: several nodes share a small machine. No bootstrap: fresh nodes of a ring have nothing to copy.
  cat >"$dir/conf/cassandra.yaml" <<Y
cluster_name: spillway-tests
partitioner: org.apache.cassandra.dht.Murmur3Partitioner
num_tokens: 1
${TOKEN:+initial_token: "$TOKEN"}
auto_bootstrap: false
listen_address: $address
rpc_address: $address
storage_port: $storage
native_transport_port: $cql
endpoint_snitch: GossipingPropertyFileSnitch
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
    parameters: [{seeds: "${SEEDS:-$address:$storage}"}]
$sync
commitlog_segment_size: 16MiB
commitlog_total_space: 128MiB
memtable_heap_space: 64MiB
memtable_offheap_space: 64MiB
file_cache_size: 32MiB
key_cache_size: 8MiB
concurrent_reads: 8
concurrent_writes: 8
concurrent_compactors: 1
authenticator: AllowAllAuthenticator
authorizer: AllowAllAuthorizer
Y
  printf 'dc=%s\nrack=%s\n' "${DC:-dc1}" "${RACK:-rack1}" >"$dir/conf/rackdc.properties"
  cat >"$dir/conf/logback.xml" <<'X'
<configuration>
  <appender name="out" class="ch.qos.logback.core.ConsoleAppender">
    <encoder><pattern>%d %-5level %logger{0} %msg%n</pattern></encoder>
  </appender>
  <root level="INFO"><appender-ref ref="out"/></root>
</configuration>
X
}

# What Cassandra 5.0 opens of the JDK's inside on Java 17 (its own conf/jvm17-server.options).
java_modules() {
  local package
  for package in java.base/jdk.internal.misc java.base/java.lang.ref java.management.rmi/com.sun.jmx.remote.internal.rmi \
    java.rmi/sun.rmi.registry java.rmi/sun.rmi.server java.sql/java.sql jdk.unsupported/sun.misc jdk.attach/sun.tools.attach; do
    printf -- '--add-exports=%s=ALL-UNNAMED\n' "$package"
  done
  for package in java.base/java.{lang,lang.module,lang.reflect,io,util} java.base/jdk.internal.{loader,ref,reflect,math,module,util.jar} \
    java.base/sun.nio.ch jdk.management/com.sun.management.internal; do
    printf -- '--add-opens=%s=ALL-UNNAMED\n' "$package"
  done
}

# A CQL OPTIONS frame, answered by SUPPORTED (opcode 6): an open port alone may still refuse every client.
answers() {
  timeout 1 bash -c 'exec 3<>"/dev/tcp/$0/$1"; printf "\4\0\0\0\5\0\0\0\0" >&3
    [ "$(head -c 5 <&3 | od -An -tx1 | tr -d " ")" = 8400000006 ]' "$address" "$cql"
}

case $1 in
  start)
    need "$TOOLS/cassandra/lib" cassandra
    need java cassandra
    configure
    mapfile -t modules < <(java_modules)
    # The archive ties to the class path as written, so configuration is named by -D, never by a folder on the class path.
    archive=(); [ ! -s "$TOOLS/cassandra/classes.jsa" ] || archive=(-XX:SharedArchiveFile="$TOOLS/cassandra/classes.jsa" -Xshare:auto)
    # As root Cassandra would lock its whole heap into memory (860 instead of 250 MiB): take that right away.
    ulimit -l 64
    launch=(); ((EUID)) || launch=(setpriv --bounding-set=-ipc_lock)
    # Serial collector, first compiler only: half the CPU until ready. row_overhead_size: the value that a boot
    # otherwise measures for seconds. ring_delay 1 s also shortens a gossip quarantine, which is set back.
    # shellcheck disable=SC2086
    spawn "$dir" cassandra "${launch[@]}" java -Xms64m -Xmx"${HEAP:-512m}" -Xss512k -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
      -XX:MaxDirectMemorySize=256m -XX:+ExitOnOutOfMemoryError -XX:+PerfDisableSharedMem "${modules[@]}" "${archive[@]}" ${JAVA_EXTRA:-} \
      -Djava.net.preferIPv4Stack=true -Djdk.attach.allowAttachSelf=true -Dio.netty.tryReflectionSetAccessible=true \
      -Djna.tmpdir="$dir/tmp" -Djava.io.tmpdir="$dir/tmp" -Dlogback.configurationFile="$dir/conf/logback.xml" \
      -Dcassandra.config="file://$dir/conf/cassandra.yaml" -Dcassandra-rackdc.properties="file://$dir/conf/rackdc.properties" \
      -Dcassandra.storagedir="$dir/data" -Dcassandra.logdir="$dir" -Dcassandra-foreground=yes \
      -Dcassandra.ring_delay_ms=1000 -Dcassandra.gossip_quarantine_delay_ms=20000 -Dcassandra.skip_wait_for_gossip_to_settle=0 \
      -Dcassandra.memtable.row_overhead_size=181 \
      -cp "$TOOLS/cassandra/lib/*" org.apache.cassandra.service.CassandraDaemon
    await 120 "$dir" cassandra "$cql" answers
    ;;
  stop) end_process "$dir" cassandra TERM 30 ;;
  kill) end_process "$dir" cassandra KILL 10 ;;
  *) fail "unknown command $1" ;;
esac
