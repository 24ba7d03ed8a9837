#!/usr/bin/env bash
# server.sh start DIR PORT | stop DIR | kill DIR: Feast's Python feature server on 127.0.0.1, one worker, over the repository in
#   DIR (feature_store.yaml, definitions.py; lookups.py has registered it). As `feast serve` comes, but with its access log off, and
#   without its new worker after each 1,000 requests, who would drop the bench's connection.
. "$(dirname "${BASH_SOURCE[0]}")/../../servers/lib.sh"
(($# >= 2)) || fail "usage: start DIR PORT | stop DIR | kill DIR"
dir=$(absolute "$2")

case $1 in
  start)
    feast=$TOOLS/feast/bin/feast
    need "$feast" feast
    port=${3:?PORT}
    # Its gunicorn keeps a control socket in the home folder.
    HOME=$dir spawn "$dir" feast "$feast" --chdir "$dir" serve --host 127.0.0.1 --port "$port" --workers 1 --no-access-log \
      --max-requests 0 --max-requests-jitter 0
    await 60 "$dir" feast "$port" bash -c ": </dev/tcp/127.0.0.1/$port"
    ;;
  stop) end_process "$dir" feast TERM 10 ;;
  kill)
    # Its worker would outlive a killed master.
    worker=
    ! alive "$dir" feast || worker=$(pgrep -P "$(<"$dir/feast.pid")" || true)
    end_process "$dir" feast KILL 5
    # shellcheck disable=SC2086
    [ -z "$worker" ] || kill -KILL $worker 2>/dev/null || true
    ;;
  *) fail "unknown command $1" ;;
esac
