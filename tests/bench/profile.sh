#!/usr/bin/env bash
# Writes cli/dist.profdata: how often each branch of `spillway` is taken, seen while the bench's works and a `spillway dev`
# run through a binary that counts. `make dist` has the compiler lay out the code by it, and builds what never ran here as
# without it. To be run anew when much of the data path has changed. About half an hour on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
counting=$PWD/target/profile

# The names of functions hold cargo's hash of the profile, the packages and their features: all have to be those of `make dist`. Build scripts and
# macros count, too, which nobody wants to know.
rustup component add llvm-tools
CARGO_TARGET_DIR=$counting LLVM_PROFILE_FILE=$counting/building/%m.profraw \
    RUSTFLAGS="-Cprofile-generate -Cllvm-args=-runtime-counter-relocation -Cllvm-args=-disable-vp" \
    cargo build --locked --profile dist -p spillway --features spillway/route53
cp target/dist/bench "$counting/dist/"
rm -rf "$counting/counts" "$counting/dev"
bench=$counting/dist/bench
export LLVM_PROFILE_FILE=$counting/counts/%m%c.profraw # %c: in a mapped file, so that processes which are killed have counted, too
export SPILLWAY_FIGURES=$counting/figures.jsonl # times of a binary that counts are no figures

"$bench" unary --only spillway
for work in constant cache handshakes sidecar-cpu; do "$bench" "$work"; done

# What the bench does not send: JSON, streams, DNS; and the control plane's own work.
"$counting/dist/spillway" dev --port 0 --dir "$counting/dev" >"$counting/dev.log" 2>&1 &
dev=$!
trap 'kill -INT $dev && wait $dev || true' EXIT
until grep -q Ctrl-C "$counting/dev.log"; do
    kill -0 $dev || { cat "$counting/dev.log"; exit 1; }
    sleep 0.1
done
address=$(grep -o 'https://127.0.0.1:[0-9]*' "$counting/dev.log" | head -1)
clients=(--cacert "$counting/dev/pki/trust-bundle.pem" --cert "$counting/dev/pki/acme.pem" --key "$counting/dev/pki/acme.key")
for version in --http1.1 --http2; do
    for site in site-0001 site-0007 nobody; do
        # What follows the # is not sent; it makes two thousand requests of one.
        curl --fail --no-progress-meter --parallel --parallel-max 32 "$version" "${clients[@]}" --data "{\"parameters\":{\"entity_id\":\"$site\"},\"inputs\":[]}" \
            "$address/v2/models/phishing/infer#[1-2000]" >/dev/null
    done
    curl --fail --no-progress-meter --parallel --parallel-max 32 "$version" "${clients[@]}" \
        --data '{"inputs":[{"name":"site_id","datatype":"BYTES","shape":[2],"data":["site-0001","site-0002"]}]}' "$address/v2/models/phishing/infer#[1-2000]" >/dev/null
done
for _ in {1..5000}; do echo '{"model_name":"phishing","parameters":{"entity_id":{"string_param":"site-0001"}}}'; done |
    "${SPILLWAY_TOOLS:-.tools}/bin/grpcurl" "${clients[@]/#--/-}" -import-path proto/proto -proto inference.proto -d @ "${address#https://}" inference.GRPCInferenceService/ModelStreamInfer >/dev/null
echo "infer.spillway.test A" >"$counting/names"
dnsperf -s 127.0.0.1 -p "$(grep -o -- '-p [0-9]*' "$counting/dev.log" | head -1 | cut -c4-)" -d "$counting/names" -l 3 >/dev/null
"$counting/dist/spillway" status "--dev=$counting/dev" >/dev/null
kill -INT $dev
wait $dev || true
trap - EXIT

"$(rustc --print sysroot)"/lib/rustlib/*/bin/llvm-profdata merge --sparse --output cli/dist.profdata "$counting"/counts/*.profraw
rm -rf target/dist # cargo would not see that the profile is another
echo "cli/dist.profdata is new: make dist"
