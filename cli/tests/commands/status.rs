//! `spillway status`: the tables that it makes of `/config`.

use crate::support::asking;
use serde_json::{Value, json};

fn config() -> Value {
    let pod = json!({ "address": "10.0.0.1:1", "standing": "usable", "health": "serving", "failing": 0.0, "inFlight": 3,
                      "limit": 20, "load": { "utilisation": 0.25, "ageMs": 3 } });
    let bad = json!({ "address": "10.0.0.2:1", "standing": "ejected", "why": "consecutive_failures", "forMs": 4_000,
                      "health": "serving", "failing": 0.5, "inFlight": 0, "limit": 4,
                      "breakers": { "eta": { "state": "open", "forMs": 9_000 } } });
    let eta = json!({ "policy": "ring", "budgetLeft": 10.0, "hotEntities": 1, "answers": 50, "p50Us": 1_500,
                      "p95Us": 2_000, "p99Us": 30_000 });
    json!({
        "region": "eu", "name": "gw-0", "snapshotVersion": 3,
        "pods": { "p": { "ringPods": 2, "panic": true, "capacity": 24, "pods": { "a": pod, "b": bad }, "models": { "eta": eta } } },
        "admission": {
            "tenants": { "acme": { "inFlight": 1, "limits": [
                { "name": "all", "per": "tenant", "of": "requests", "rate": 5.0, "burst": 10, "bucketsLeftOut": 0,
                  "buckets": [{ "remaining": 4, "burst": 5, "share": { "rate": 2.5, "demand": 1.0, "standing": "leased" } }] },
                { "name": "each", "per": "entity", "of": "cost", "rate": 1.0, "burst": 3, "bucketsLeftOut": 0, "buckets": [] },
            ] } },
            "entityKeys": 7,
            "models": { "eta": { "pool": "p", "inFlight": 3, "mostInFlight": 24, "waiting": 0, "mostWaiting": 64, "usualUs": 1_500 } },
            "pools": { "p": { "inFlight": 3, "room": 20, "waiting": 1, "letsIn": 2.5 } },
        },
        "degradation": { "eta": { "level": 2, "reason": "slow-predictions" } },
        "results": {
            "entries": 9, "bytes": 700, "capacity": 1_000, "flights": 1, "lastPurge": 0,
            "tenants": [{ "tenant": "acme", "bytes": 700 }],
            "models": [{ "model": "eta", "tenants": 2, "off": 1, "callUs": 1_500 }],
            "region": { "connected": true, "rests": false },
            "features": { "channel": true, "hears": true, "number": 4 },
        },
    })
}

const READY: &str = r#"{"ready":true,"failing":{}}"#;

#[test]
fn what_a_gateway_is_doing_is_a_few_tables() {
    let answers = [
        ("200 OK", config().to_string()),
        ("503 Service Unavailable", r#"{"ready":false,"failing":{"drain":"no new work is taken"}}"#.to_owned()),
    ];
    let answers: Vec<(&str, &str)> = answers.iter().map(|(status, body)| (*status, body.as_str())).collect();
    let (asked, text, ok) = asking(&["status"], &[], "", &answers);
    assert_eq!(
        (asked[0].head[0].as_str(), asked[1].head[0].as_str()),
        ("GET /config HTTP/1.1", "GET /readyz HTTP/1.1")
    );
    let expected = "\
gateway gw-0 of region eu, snapshot 3: not ready (drain: no new work is taken)

POD  ADDRESS     STANDING                                 CHECKS   IN FLIGHT  FAILING  LOAD  BREAKERS
p/a  10.0.0.1:1  usable                                   serving  3 of 20    0 %      25 %  closed
p/b  10.0.0.2:1  ejected (consecutive_failures, 4000 ms)  serving  0 of 4     50 %     -     eta open 9000 ms
pool p is in panic: too many of its pods are out

MODEL  POOL  ROUTING    HOT  RETRIES LEFT  ANSWERS  P50 MS  P95 MS  P99 MS
eta    p     ring of 2  1    10            50       1.5     2.0     30.0

TENANT  LIMIT  PER     MODEL  LEFT    RATE            SHARE
acme    all    tenant  -      4 of 5  5.0/s requests  2.5/s leased
acme    each   entity  -      of 3    1.0/s cost      -
7 entities have a bucket of their own

GATE OF MODEL  PLACES   WAITING  USUALLY MS
eta            3 of 24  0 of 64  1.5
GATE OF POOL  PLACES   WAITING  CLASSES LET IN
p             3 of 20  1        2.5 of 4

DEGRADATION  LEVEL  REASON
eta          2      slow-predictions

cache: 9 results, 700 of 1000 bytes, calls under way: 1; Redis connected; feature changes are heard
CACHED MODEL  OFF FOR TENANTS  CALL MS
eta           1 of 2           1.5
CACHE OF TENANT  BYTES
acme             700
";
    assert!(ok && text == expected, "{text}");
}

#[test]
fn json_is_what_the_gateway_says() {
    let (_, text, ok) =
        asking(&["status"], &["-o", "json"], "", &[("200 OK", &config().to_string()), ("200 OK", READY)]);
    let told: Value = serde_json::from_str(&text).unwrap();
    assert!(ok && told == json!({ "ready": true, "failing": {}, "config": config() }), "{text}");
}

#[test]
fn a_gateway_that_tells_less_is_shown_as_far_as_it_goes() {
    let least = r#"{"region":"eu","name":"gw-0"}"#;
    let (_, text, ok) = asking(&["status"], &[], "", &[("200 OK", least), ("200 OK", READY)]);
    assert!(ok && text == "gateway gw-0 of region eu, snapshot ?: ready\n", "{text}");
    let (_, text, ok) = asking(&["status"], &[], "", &[("200 OK", r#"{"region":"eu","pod":"a"}"#)]);
    assert!(!ok && text.contains("is no gateway"), "{text}");
    let (_, text, ok) = asking(&["status"], &[], "", &[("403 Forbidden", "forbidden\n")]);
    assert!(!ok && text.contains("the gateway says 403: forbidden"), "{text}");
}
