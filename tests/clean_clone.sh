#!/usr/bin/env bash
# What a new user meets: clones what is committed, runs `make dev` with nothing built until the printed curl line gives
# the right prediction, then again when built. Appends both times to target/figures.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p target
figures=$PWD/target/figures.jsonl
folder=$(mktemp -d "${TMPDIR:-/tmp}/spillway-clone-XXXXXX")
make_pid=
stop() {
    if [[ -n $make_pid ]]; then
        pkill -INT -P "$make_pid" || true
        wait "$make_pid" || true
        make_pid=
    fi
}
trap 'stop; rm -rf "$folder"' EXIT
git clone --quiet . "$folder/spillway"
cd "$folder/spillway"
unset CARGO_TARGET_DIR

# The seconds from `make dev` to the first right prediction.
first_prediction() { # LOG
    local begun now score
    begun=$(date +%s.%N)
    make dev DEV_ARGS="--port 0" >"$1" 2>&1 &
    make_pid=$!
    until grep -q Ctrl-C "$1"; do
        kill -0 "$make_pid" || { cat "$1"; exit 1; }
        sleep 0.1
    done
    score=$(sh -c "$(sed -n '/^ *curl /,/[^\\]$/p' "$1")" | python3 -c 'import json, sys; print(json.load(sys.stdin)["outputs"][0]["data"][0])')
    now=$(date +%s.%N)
    python3 - "$score" <<'PYTHON'
import json, sys
expected = json.load(open("cli/dev/model/expected.json"))["cases"][0]["score"]
assert abs(float(sys.argv[1]) - expected) <= 1e-5, (sys.argv[1], expected)
PYTHON
    seconds=$(awk -v a="$begun" -v b="$now" 'BEGIN { printf "%.1f", b - a }')
    stop
}
figure() { # NAME VALUE UNIT LIMIT
    awk -v name="$1" -v value="$2" -v unit="$3" -v limit="$4" 'BEGIN {
        printf "{\"figure\":\"%s\",\"value\":%s,\"unit\":\"%s\",\"goal\":\"<= %s\",\"holds\":%s}\n", name, value, unit, limit, value + 0 <= limit + 0 ? "true" : "false"
    }' | tee -a "$figures"
}

first_prediction "$folder/cold.log"
figure path.make_dev.cold_minutes "$(awk -v s="$seconds" 'BEGIN { printf "%.1f", s / 60 }')" min 10
first_prediction "$folder/warm.log"
figure path.make_dev.warm_seconds "$seconds" s 5
