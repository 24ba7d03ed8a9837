#!/usr/bin/env bash
# Runs a command of tests and appends what it took to target/figures.jsonl: minutes, tests run, peak memory.
# Usage: tests/measured.sh FIGURE COMMAND [ARGUMENT...], e.g. tests/measured.sh path.make_test make lint unit scenarios
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

used_kib() { awk '/^MemTotal/ { total = $2 } /^MemAvailable/ { free = $2 } END { print total - free }' /proc/meminfo; }
figure() { # NAME VALUE UNIT [LIMIT]
    awk -v name="$name.$1" -v value="$2" -v unit="$3" -v limit="${4:-}" 'BEGIN {
        goal = limit == "" ? "-" : "<= " limit
        holds = limit == "" || value + 0 <= limit + 0 ? "true" : "false"
        printf "{\"figure\":\"%s\",\"value\":%s,\"unit\":\"%s\",\"goal\":\"%s\",\"holds\":%s}\n", name, value, unit, goal, holds
    }' | tee -a target/figures.jsonl
}

before=$(used_kib)
echo "$before" >"$folder/peak"
(
    peak=$before
    while sleep 1; do
        now=$(used_kib)
        if ((now > peak)); then
            peak=$now
            echo "$peak" >"$folder/peak"
        fi
    done
) &
watch=$!
begun=$(date +%s)
status=0
"$@" 2>&1 | tee "$folder/log" || status=$?
kill "$watch"
minutes=$(awk -v seconds="$(($(date +%s) - begun))" 'BEGIN { printf "%.1f", seconds / 60 }')
tests=$(sed -E 's/\x1b\[[0-9;]*m//g' "$folder/log" | awk '/Summary \[.*tests? run:/ { sub(/.*\] */, ""); sum += $1 } END { print sum + 0 }')
mkdir -p target
figure minutes "$minutes" min 40
figure tests "$tests" tests
figure peak_memory "$(awk -v kib="$(($(cat "$folder/peak") - before))" 'BEGIN { printf "%.2f", kib / 1048576 }')" GiB
exit "$status"
