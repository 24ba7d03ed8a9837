//! `spillway explain`: what it asks of the admin port, and what it prints.

use crate::support::{Asked, asking, spillway};
use serde_json::{Value, json};

const WHO: &[&str] = &["--tenant", "acme", "--client", "web", "--model", "eta"];

fn told() -> Value {
    json!({
        "region": "eu", "gateway": "gw-0", "snapshot": 3,
        "outcome": { "from": "pod", "status": 200, "why": "pod 'pod-1' is asked" },
        "caller": { "id": "spiffe://td/tenant/acme/client/web", "tenant": "acme", "client": "web" },
        "access": { "allowed": true, "by": ["all"], "others": [], "leftOut": 0 },
        "model": { "name": "eta", "version": "2" },
        "request": { "entities": 1, "inputBytes": 8 },
        "class": { "class": "normal", "from": "tenant", "highest": "critical" },
        "limits": [
            { "limit": "all", "per": "tenant", "cost": 1, "passes": true, "remaining": 4 },
            { "limit": "rows", "per": "model", "cost": 3, "passes": false, "remaining": 1, "retryAfterMs": 58_000,
              "share": { "rate": 2.5, "demand": 1.0, "standing": "local" } },
            { "limit": "each", "per": "entity", "cost": 9, "passes": false, "remaining": 1 },
        ],
        "deadline": { "us": 50_000, "from": "x-request-timeout-ms" },
        "cache": { "finds": "miss", "key": "3fab", "waits": false, "asksRegion": true, "ignoresCacheControl": false },
        "degradation": { "level": 0, "allowed": [1, 4] },
        "gate": { "would": "wait", "letIn": 0.5, "pool": "p", "inFlight": 8, "mostInFlight": 8, "waiting": 2, "mostWaiting": 64,
                  "usualUs": 0, "ofPool": { "inFlight": 9, "room": 20, "waiting": 0, "letsIn": 2.5 } },
        "pod": { "pool": "p", "policy": "ring", "placedBy": "entity", "pod": "pod-1", "address": "10.0.0.1:1",
                 "reason": "owner", "byChance": false, "then": ["pod-0"] },
        "peers": { "mayLeave": ["us", "ap"], "to": ["us"], "regions": [
            { "region": "ap", "unfit": "full", "cost": 2.5, "headroom": -3.0, "gateways": 2, "reachable": 1 },
            { "region": "us", "cost": 1.0, "roundTripUs": 80_500, "headroom": 120.4, "gateways": 1, "reachable": 1 },
        ] },
    })
}

fn explain(arguments: &[&str], status: &str, body: &str) -> (Asked, String, bool) {
    let (mut asked, text, ok) = asking(&["explain"], arguments, "{\"inputs\":[]}", &[(status, body)]);
    (asked.remove(0), text, ok)
}

#[test]
fn the_request_goes_as_it_is_and_each_step_is_a_line() {
    let more = &["--version", "2", "--address", "192.0.2.7", "-H", "X-Request-Timeout-Ms: 50"];
    let (asked, text, ok) = explain(&[WHO, more].concat(), "200 OK", &told().to_string());
    let line = "POST /explain?tenant=acme&client=web&model=eta&version=2&address=192.0.2.7 HTTP/1.1";
    assert_eq!((asked.head[0].as_str(), asked.body.as_slice()), (line, &b"{\"inputs\":[]}"[..]));
    for header in ["x-spillway-admin: explain", "x-request-timeout-ms: 50"] {
        assert!(asked.head.iter().any(|line| line == header), "{asked:?}");
    }
    let expected = "\
outcome      sent: pod 'pod-1' is asked
gateway      gw-0 of region eu, snapshot 3
caller       client web of tenant acme, spiffe://td/tenant/acme/client/web
access       allowed by policy all
model        eta, version 2
request      about 1 entity, 8 bytes of inputs
class        normal: the tenant's default; the tenant may have up to critical
limit        all (per tenant): passes at 1, 4 left then
limit        rows (per model): refuses 3, 1 left; again in 58 s; this gateway's share of the region's quota: 2.5/s (local)
limit        each (per entity): refuses 9: more than it ever holds
deadline     50 ms: the header x-request-timeout-ms
cache        miss here; the region's Redis is asked next; key 3fab
degradation  level 0; allowed: 1, 4
gate         waits; 8 of 8 places of the model taken, 2 wait; 9 of 20 of pool p taken, 0 wait; lets in 50 % of such requests
pod          pod-1 at 10.0.0.1:1, by ring: the first on the ring for its entity; then pod-0
spill-over   would go to us, one hop over mTLS with the client's identity signed; the tenant's mayLeaveRegion: us, ap
peer         ap: not: it has no room; cost 2.5, unknown way, room for 0/s, 1 of 2 gateways to be reached
peer         us: may have it; cost 1.0, 80.5 ms away, room for 120/s, 1 of 1 gateways to be reached
";
    assert!(ok && text == expected, "{text}");
}

#[test]
fn a_request_that_leaves_or_may_not_is_told_why() {
    let told = |outcome: Value, peers: Value| {
        let told = json!({ "region": "eu", "gateway": "gw-0", "snapshot": 3, "outcome": outcome, "peers": peers });
        explain(WHO, "200 OK", &told.to_string()).1
    };
    let text = told(
        json!({ "from": "peer", "status": 200, "why": "region 'us' is asked: here it is stranded (unusable)" }),
        json!({ "mayLeave": true, "cause": "unusable", "to": ["us", "ap"], "regions": [] }),
    );
    assert!(
        text.starts_with("outcome      sent to another region: region 'us' is asked: here it is stranded (unusable)\n"),
        "{text}"
    );
    assert!(text.contains("spill-over   goes now (unusable) to us, then ap, one hop over mTLS"), "{text}");
    let text = told(
        json!({ "from": "refused", "status": 503, "code": "no-pod", "why": "no pod" }),
        json!({ "mayLeave": false, "to": [], "none": "residence", "regions": [] }),
    );
    let expected =
        "spill-over   to none: the tenant may leave to none of the others; the tenant's mayLeaveRegion: false\n";
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn a_refusal_is_an_explanation() {
    let told = json!({
        "region": "eu", "gateway": "gw-0", "snapshot": 3,
        "outcome": { "from": "refused", "status": 403, "code": "not-allowed", "why": "no policy allows it" },
        "access": { "allowed": false, "by": [], "leftOut": 2,
                    "others": [{ "policy": "all", "unfit": ["client", "action"] }] },
    });
    let id = "spiffe://td/tenant/acme/client/web";
    let (asked, text, ok) = explain(&["--as", id, "--model", "eta"], "200 OK", &told.to_string());
    assert!(asked.head[0].contains("?as=spiffe%3a%2f%2ftd%2ftenant%2facme%2fclient%2fweb&model=eta "), "{asked:?}");
    let expected = "\
outcome      refused: 403 not-allowed: no policy allows it
gateway      gw-0 of region eu, snapshot 3
access       denied: none that names the tenant fits: all (not for this client, action); and 2 more
";
    assert!(ok && text == expected, "{text}");
    let (_, text, ok) = explain(&[WHO, &["-o", "json"]].concat(), "200 OK", &told.to_string());
    assert!(ok && serde_json::from_str::<Value>(&text).unwrap() == told, "{text}");
}

#[test]
fn what_goes_wrong_is_told() {
    let (asked, text, ok) = explain(WHO, "413 Payload Too Large", "the body has more than 9 bytes\n");
    assert!(!ok && text.contains("the gateway says 413: the body has more than 9 bytes"), "{text}");
    assert!(asked.body.is_empty() && asked.head.iter().any(|line| line == "expect: 100-continue"));
    let (_, text, ok) = explain(WHO, "400 Bad Request", r#"{"error":"for which model?"}"#);
    assert!(!ok && text.contains("the gateway says 400: for which model?"), "{text}");
    let (_, text, ok) = explain(WHO, "200 OK", "<html>");
    assert!(!ok && text.contains("no gateway of this version"), "{text}");
    let (_, text, ok) = explain(WHO, "404 Not Found", "not found\n");
    assert!(!ok && text.contains("it is no gateway, or an older one"), "{text}");
    // Nobody listens at a port that was just free.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (text, ok) = spillway(&[&["explain", "--admin", &free], WHO].concat(), "{}");
    assert!(!ok && text.contains(&format!("the gateway's admin port {free}: Connection refused")), "{text}");
    let (text, ok) = spillway(&[&["explain", "--admin", &free, "no-such-file"], WHO].concat(), "");
    assert!(!ok && text.contains("no-such-file: No such file"), "{text}");
    for arguments in [&["--model", "eta"][..], &["--tenant", "a", "--model", "eta"], &[WHO, &["--as", "x"]].concat()] {
        let (text, ok) = spillway(&[&["explain", "--admin", &free], arguments].concat(), "");
        assert!(!ok && text.contains("Usage"), "{text}");
    }
}
