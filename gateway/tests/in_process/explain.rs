//! What `POST /explain` of the admin port tells is what the request then meets, and telling it changes nothing.

use std::time::Duration;

use crate::support::*;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const INFER: &str = "/v2/models/double/infer";
const CACHE: (&str, &str) = ("deadline: 2s", "deadline: 2s\n  cache: {ttl: 1m}");
const ACME: &str = "tenant=acme&client=web&model=double";
const MEANT: &str = "x-spillway-admin: explain";

fn body(entity: &str, more: &str) -> String {
    let tensor = r#"{"name":"x","datatype":"FP32","shape":[2],"data":[1.5,-2]}"#;
    format!(r#"{{"parameters":{{"entity_id":"{entity}"{more}}},"inputs":[{tensor}]}}"#)
}

/// The status and the body of the admin port's answer.
async fn post(world: &World, query: &str, headers: &[&str], body: &[u8]) -> (u16, String) {
    post_at(world.gateway.admin, query, headers, body).await
}

async fn post_at(admin: std::net::SocketAddr, query: &str, headers: &[&str], body: &[u8]) -> (u16, String) {
    let mut tcp = tokio::net::TcpStream::connect(admin).await.unwrap();
    let headers = [headers, &["connection: close"]].concat();
    tcp.write_all(&h1_request("POST", &format!("/explain?{query}"), &headers, body)).await.unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

/// The explanation of a request with these headers.
async fn explain_with(world: &World, query: &str, headers: &[&str], body: &[u8]) -> Value {
    let (status, answer) = post(world, query, &[headers, &[MEANT]].concat(), body).await;
    assert_eq!(status, 200, "{answer}");
    serde_json::from_str(&answer).unwrap()
}

async fn explain(world: &World, query: &str, body: &str) -> Value {
    explain_with(world, query, &[], body.as_bytes()).await
}

async fn infer(world: &World, body: &str) -> Answer {
    world.http1().await.exchange(&h1_request("POST", INFER, &[], body.as_bytes())).await
}

/// Serves other resources, once every worker thread has them.
async fn publish(world: &World, version: u64, replaced: &[(&str, &str)]) {
    world.publish(version, replaced).await;
    until("the snapshot decides", async || world.config("/snapshotVersion").await == version).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
}

/// What must not change: counters, and what holds requests, tokens and results.
async fn counted(world: &World) -> Vec<String> {
    // Health checks and time go on.
    let of_itself = ["health", "_age_seconds", "expiry", "process_", "bucket", "_sum", "uptime"];
    let text = world.admin("/metrics").await;
    let lines = text.lines().filter(|line| line.starts_with("spillway_gateway") || line.starts_with("spillway_cache"));
    lines.filter(|line| !of_itself.iter().any(|own| line.contains(own))).map(str::to_owned).collect()
}

#[tokio::test]
async fn the_pod_that_is_named_is_the_one_that_gets_it() {
    let world = World::of(4, "", "").await;
    for number in 0..20 {
        let body = body(&format!("plain-{number}"), "");
        let told = explain(&world, ACME, &body).await;
        let (pod, outcome) = (&told["pod"], &told["outcome"]);
        assert_eq!((outcome["from"].as_str(), outcome["status"].as_u64()), (Some("pod"), Some(200)), "{told}");
        assert_eq!((pod["policy"].as_str(), pod["placedBy"].as_str()), (Some("ring"), Some("entity")));
        assert_eq!((pod["reason"].as_str(), pod["byChance"].as_bool()), (Some("owner"), Some(false)));
        assert_eq!(pod["then"].as_array().unwrap().len(), 2);
        assert_eq!(infer(&world, &body).await.status, 200);
        let seen: Vec<_> = world.sidecars.iter().flat_map(Sidecar::seen).collect();
        assert_eq!(seen.len(), 1, "an explanation is not sent");
        assert_eq!(pod["pod"].as_str(), Some(seen[0].pod.as_str()), "{told}");
        world.sidecars.iter().for_each(Sidecar::forget);
    }
    // Without an entity chance decides, and that is told.
    let none = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#;
    let told = explain(&world, &ACME.replace("double", "brief"), none).await;
    assert_eq!((told["pod"]["reason"].as_str(), told["pod"]["byChance"].as_bool()), (Some("less_loaded"), Some(true)));
    world.stop().await;
}

#[tokio::test]
async fn by_the_clients_address_it_is_the_pod_of_that_address() {
    let world = World::of(4, "", &model("near", "  routing: { policy: source_address }")).await;
    let (query, body) =
        (ACME.replace("double", "near"), r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#);
    let told = explain(&world, &format!("{query}&address=127.0.0.1"), body).await;
    let path = "/v2/models/near/infer";
    assert_eq!(world.http1().await.exchange(&h1_request("POST", path, &[], body.as_bytes())).await.status, 200);
    assert_eq!(told["pod"]["pod"].as_str(), Some(world.seen()[0].pod.as_str()), "{told}");
    assert_eq!((&told["pod"]["placedBy"], &told["pod"]["byChance"]), (&"address".into(), &false.into()));
    let told = explain(&world, &query, body).await;
    assert_eq!((&told["pod"]["placedBy"], &told["pod"]["byChance"]), (&Value::Null, &true.into()), "{told}");
    world.stop().await;
}

#[tokio::test]
async fn a_call_under_way_is_told_to_who_would_share_it() {
    let world = World::start().await;
    publish(&world, 2, &[CACHE]).await;
    let body = body("hangs", "");
    let mut http1 = world.http1().await;
    http1.send(&h1_request("POST", INFER, &[], body.as_bytes())).await;
    until("the call is under way", async || explain(&world, ACME, &body).await["outcome"]["from"] == "call").await;
    world.stop().await;
}

#[tokio::test]
async fn who_is_denied_is_told_what_of_each_policy_does_not_fit() {
    let world = World::start().await;
    let told = explain(&world, ACME, &body("a", "")).await;
    assert_eq!(told["access"].to_string(), r#"{"allowed":true,"by":["acme"],"leftOut":0,"others":[]}"#);
    let id = "as=spiffe%3A%2F%2Fspillway.test%2Ftenant%2Fglobex%2Fclient%2Fweb";
    let told = explain(&world, &format!("{id}&model=double"), &body("a", "")).await;
    let outcome = &told["outcome"];
    assert_eq!((outcome["from"].as_str(), outcome["status"].as_u64()), (Some("refused"), Some(403)), "{told}");
    assert_eq!(outcome["code"], "not-allowed");
    assert_eq!(told["access"]["others"].to_string(), r#"[{"policy":"globex","unfit":["action"]}]"#);
    assert!(told.get("model").is_none() && told.get("pod").is_none(), "what follows is not reached: {told}");
    for (query, status, code) in [
        ("tenant=initech&client=web&model=double", 403, "unknown-tenant"),
        ("as=spiffe%3A%2F%2Fspillway.test%2Fregion%2Feu%2Fgateway%2Fgw-0&model=double", 403, "not-a-client"),
        ("tenant=acme&client=web&model=triple", 404, "unknown-model"),
        ("tenant=acme&client=web&model=double&version=9", 404, "unknown-version"),
    ] {
        let told = explain(&world, query, &body("a", "")).await;
        assert_eq!((&told["outcome"]["status"], &told["outcome"]["code"]), (&status.into(), &code.into()), "{told}");
    }
    let text = world.admin("/metrics").await;
    assert!(!text.contains("rejected_total{reason=\"not-allowed\"} 1"), "nobody was refused");

    let more = "---\napiVersion: spillway/v1\nkind: Revocation\nmetadata: { name: gone }\nspec:\n  \
                ids: ['spiffe://spillway.test/tenant/acme/client/web']\n";
    let revoked = World::of(1, "", more).await;
    let told = explain(&revoked, ACME, &body("a", "")).await;
    assert_eq!(told["outcome"]["code"], "untrusted-certificate", "{told}");
    assert_eq!(told["outcome"]["why"], "the certificate or its identity is revoked");
    revoked.stop().await;
    world.stop().await;
}

#[tokio::test]
async fn a_hit_is_told_with_its_key_and_a_miss_before_it() {
    let world = World::start().await;
    publish(&world, 2, &[CACHE]).await;
    let body = body("plain-1", "");
    let miss = explain(&world, ACME, &body).await;
    assert_eq!((&miss["cache"]["finds"], &miss["outcome"]["from"]), (&"miss".into(), &"pod".into()), "{miss}");
    let key = miss["cache"]["key"].as_str().unwrap();
    assert_eq!(key.len(), 64);
    assert_eq!(infer(&world, &body).await.header("cache-status"), "spillway; fwd=miss; stored");
    let hit = explain(&world, ACME, &body).await;
    assert_eq!((&hit["cache"]["finds"], &hit["outcome"]["from"]), (&"fresh".into(), &"cache".into()), "{hit}");
    assert_eq!(hit["cache"]["key"].as_str(), Some(key));
    assert!((1..=60).contains(&hit["cache"]["ttl"].as_i64().unwrap()), "{hit}");
    assert!(infer(&world, &body).await.header("cache-status").starts_with("spillway; hit"));

    // A wish counts only of a tenant that may have one.
    let wish = explain_with(&world, ACME, &["cache-control: no-cache"], body.as_bytes()).await;
    assert_eq!((&wish["cache"]["finds"], &wish["cache"]["ignoresCacheControl"]), (&"fresh".into(), &true.into()));
    let tenant = "kind: Tenant\nmetadata: { name: acme }\n";
    publish(&world, 3, &[CACHE, (tenant, &format!("{tenant}spec: {{ cacheControl: honour }}\n"))]).await;
    infer(&world, &body).await;
    let wish = explain_with(&world, ACME, &["cache-control: no-cache"], body.as_bytes()).await;
    assert_eq!((&wish["cache"]["finds"], &wish["outcome"]["from"]), (&"refused".into(), &"pod".into()), "{wish}");
    let only = explain_with(&world, ACME, &["cache-control: only-if-cached"], unasked().as_bytes()).await;
    assert_eq!((&only["outcome"]["status"], &only["outcome"]["code"]), (&504.into(), &"not-cached".into()), "{only}");
    let headers = &["cache-control: only-if-cached"][..];
    let answer = world.http1().await.exchange(&h1_request("POST", INFER, headers, unasked().as_bytes())).await;
    assert_eq!((answer.status, answer.header("spillway-error")), (504, "not-cached"));
    world.stop().await;
}

/// One that nobody has asked.
fn unasked() -> String {
    body("plain-new", "")
}

#[tokio::test]
async fn limits_say_what_they_then_do_and_lose_nothing_by_it() {
    let tenant = "kind: Tenant\nmetadata: { name: acme }\n";
    let limits = "spec:\n  priority: { highest: high }\n  limits:\n    \
                  - { name: all, per: tenant, rate: 60/h, burst: 3 }\n    \
                  - { name: each, per: entity, rate: 60/h, burst: 2 }\n";
    let world = World::serving(2, &[(tenant, &format!("{tenant}{limits}"))], "", "").await;
    let says = |told: &Value| -> Vec<(String, bool, u64)> {
        let limits = told["limits"].as_array().unwrap().iter();
        let say = |limit: &Value| {
            let (name, passes) = (limit["limit"].as_str().unwrap().to_owned(), limit["passes"].as_bool().unwrap());
            (name, passes, limit["remaining"].as_u64().unwrap())
        };
        limits.map(say).collect()
    };
    let high = body("a", r#","priority":2"#);
    for left in [(2, 1), (1, 0)] {
        for _ in 0..5 {
            let told = explain(&world, ACME, &high).await;
            assert_eq!(says(&told), [("all".to_owned(), true, left.0), ("each".to_owned(), true, left.1)], "{told}");
            assert_eq!(told["class"].to_string(), r#"{"class":"high","from":"priority","highest":"high"}"#);
            assert_eq!((&told["gate"]["would"], &told["gate"]["letIn"]), (&"enter".into(), &1.0.into()), "{told}");
        }
        assert_eq!(infer(&world, &high).await.status, 200);
    }
    let told = explain(&world, ACME, &high).await;
    assert_eq!(says(&told), [("all".to_owned(), true, 0), ("each".to_owned(), false, 0)], "{told}");
    assert_eq!((&told["outcome"]["status"], &told["outcome"]["code"]), (&429.into(), &"rate-limited".into()), "{told}");
    assert!(told["outcome"]["why"].as_str().unwrap().starts_with("the limit 'each' is reached; again in "));
    assert_eq!(told["pod"]["reason"], "owner", "what follows is told all the same: {told}");
    assert_eq!(infer(&world, &high).await.header("spillway-error"), "rate-limited");
    assert_eq!(world.config("/admission/tenants/acme/limits/0/buckets/0/remaining").await, 1);
    world.stop().await;
}

#[tokio::test]
async fn the_deadline_is_told_with_what_decided_it() {
    let world = World::start().await;
    for (more, headers, us, from) in [
        ("", &[][..], 2_000_000, "deadline"),
        (r#","timeout":30000"#, &["x-request-timeout-ms: 50"], 30_000, "timeout"),
        (r#","timeout":30000"#, &["grpc-timeout: 20m"], 20_000, "grpc-timeout"),
        ("", &["x-request-timeout-ms: 50"], 50_000, "x-request-timeout-ms"),
        ("", &["x-request-timeout-ms: 60000"], 10_000_000, "maxDeadline"),
        ("", &["x-request-timeout-ms: soon"], 2_000_000, "deadline"),
    ] {
        let told = explain_with(&world, ACME, headers, body("a", more).as_bytes()).await;
        assert_eq!((&told["deadline"]["us"], &told["deadline"]["from"]), (&us.into(), &from.into()), "{told}");
    }
    let told = explain(&world, ACME, &body("a", r#","priority":1"#)).await;
    assert_eq!(told["class"].to_string(), r#"{"class":"normal","from":"priority","highest":"normal"}"#);
    world.stop().await;
}

#[tokio::test]
async fn a_request_that_is_not_valid_is_told_as_it_would_be() {
    let world = World::with("limits: { body: 4KiB }").await;
    for (headers, body, status, code) in [
        (&[][..], "{", 400, "invalid-json"),
        (&[], r#"{"inputs":[]}"#, 400, "missing-input"),
        (&[], r#"{"inputs":[{"name":"z","datatype":"FP32","shape":[1],"data":[1]}]}"#, 400, "unknown-tensor"),
        (&["content-encoding: gzip"], "{}", 400, "invalid-encoding"),
        (&["x-request-timeout-ms: 5", "x-request-timeout-ms: 6"], "{}", 400, "duplicate-header"),
    ] {
        let told = explain_with(&world, ACME, headers, body.as_bytes()).await;
        assert_eq!((&told["outcome"]["status"], &told["outcome"]["code"]), (&status.into(), &code.into()), "{told}");
        let answer = world.http1().await.exchange(&h1_request("POST", INFER, headers, body.as_bytes())).await;
        assert_eq!((answer.status, answer.header("spillway-error")), (status, code));
    }
    // What is wrong with the question is not an explanation.
    for (query, headers, size, status, text) in [
        (ACME, &[][..], 2, 403, "send the header x-spillway-admin: explain"),
        (ACME, &[MEANT], 4_097, 413, "the body has more than 4096 bytes"),
        ("model=double", &[MEANT], 2, 400, "who asks?"),
        ("tenant=acme&client=web", &[MEANT], 2, 400, "for which model?"),
    ] {
        let (found, answer) = post(&world, query, headers, "x".repeat(size).as_bytes()).await;
        assert!(found == status && answer.contains(text), "{found} {answer}");
    }
    assert_eq!(world.seen().len(), 0);
    world.stop().await;
}

#[tokio::test]
async fn a_model_in_trouble_is_told_with_its_level() {
    let ladder = "  maxDeadline: 10s\n  entityInput: site\n";
    let levels = format!("{ladder}  degradation: {{levels: [4], static: {{y: [7]}}, enterAfter: 200ms}}\n");
    let world = World::start().await;
    publish(&world, 2, &[(ladder, &levels)]).await;
    let told = explain(&world, ACME, &body("a", "")).await;
    assert_eq!(told["degradation"].to_string(), r#"{"allowed":[4],"level":0}"#);
    assert_eq!(told["outcome"]["from"], "pod");
    until("the model is at level 4", async || {
        infer(&world, &body("fails", "")).await;
        world.config("/degradation/double/level").await == 4
    })
    .await;
    let told = explain(&world, ACME, &body("a", "")).await;
    assert_eq!(told["degradation"].to_string(), r#"{"allowed":[4],"level":4,"reason":"errors"}"#);
    assert_eq!((&told["outcome"]["from"], &told["outcome"]["level"]), (&"gateway".into(), &4.into()), "{told}");
    world.stop().await;
}

#[tokio::test]
async fn telling_changes_nothing() {
    let world = World::start().await;
    publish(&world, 2, &[CACHE]).await;
    infer(&world, &body("plain-1", "")).await;
    until("the request is over", async || world.metric("spillway_gateway_connections").await == 0).await;
    let bodies = [body("plain-1", ""), body("plain-2", ""), "{".to_owned()];
    let queries = [ACME, "tenant=globex&client=web&model=double", "tenant=acme&client=web&model=brief"];
    let (before, kept) = (counted(&world).await, (world.config("/results").await, world.config("/admission").await));
    assert!(before.iter().any(|line| line == "spillway_cache_misses_total 1"), "{before:?}");
    let mut first = Vec::new();
    for round in 0..3 {
        for (query, body) in queries.iter().flat_map(|query| bodies.iter().map(move |body| (query, body))) {
            let mut told = explain(&world, query, body).await;
            if let Some(cache) = told.get_mut("cache").and_then(Value::as_object_mut) {
                // Time goes on.
                cache.remove("ageMs");
                cache.remove("ttl");
            }
            if round == 0 {
                first.push(told);
            } else {
                assert!(first.contains(&told), "{told}");
            }
        }
    }
    assert_eq!(before, counted(&world).await);
    assert_eq!(kept, (world.config("/results").await, world.config("/admission").await));
    assert_eq!(world.seen().len(), 1);
    world.stop().await;
}

/// Models `double` in both regions and `abroad` in one; `acme` may go anywhere, `initech` to `us`, `globex` nowhere.
const REGIONS: &str = "---
{apiVersion: spillway/v1, kind: Model, metadata: {name: double}, spec: {pools: [POOLS], versions: [1], backend: onnx, deadline: 2s, inputs: [{name: x, datatype: FP32, shape: [-1]}], outputs: [{name: y, datatype: FP32, shape: [-1]}]}}
---
{apiVersion: spillway/v1, kind: Model, metadata: {name: abroad}, spec: {pools: [scorers-us], versions: [1], backend: onnx, deadline: 2s, inputs: [{name: x, datatype: FP32, shape: [-1]}], outputs: [{name: y, datatype: FP32, shape: [-1]}]}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: acme}, spec: {mayLeaveRegion: true}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: globex}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: initech}, spec: {mayLeaveRegion: [us]}}
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: { name: all }
spec:
  subjects: [{ tenant: acme }, { tenant: globex }, { tenant: initech }]
  models: ['*']
  actions: [infer]
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranded_request_is_told_where_it_goes_or_why_it_stays() {
    let mut regions = Regions::start(&["eu", "us", "ap"], 1, REGIONS).await;
    let admin = regions.place("eu").gateways[0].admin;
    let body = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#;
    let explain = async |tenant: &str, model: &str| -> Value {
        let query = format!("tenant={tenant}&client=web&model={model}");
        let (status, answer) = post_at(admin, &query, &[MEANT], body.as_bytes()).await;
        assert_eq!(status, 200, "{answer}");
        serde_json::from_str(&answer).unwrap()
    };
    // Nothing is wrong: it stays, and it is told where it would go.
    let told = explain("initech", "double").await;
    let peers = &told["peers"];
    assert_eq!((&told["outcome"]["from"], &peers["cause"]), (&"pod".into(), &Value::Null), "{told}");
    assert_eq!((peers["to"].to_string(), peers["mayLeave"].to_string()), (r#"["us"]"#.into(), r#"["us"]"#.into()));
    let (ap, us) = (&peers["regions"][0], &peers["regions"][1]);
    assert_eq!((&ap["region"], &ap["unfit"]), (&"ap".into(), &"residence".into()), "{told}");
    assert_eq!((&us["region"], &us["unfit"], &us["reachable"]), (&"us".into(), &Value::Null, &1.into()), "{told}");
    assert!(us["roundTripUs"].as_u64().is_some_and(|time| time > 0), "its way was tried: {told}");

    // No pool of the region serves it.
    let told = explain("acme", "abroad").await;
    assert_eq!((&told["outcome"]["from"], &told["peers"]["cause"]), (&"peer".into(), &"no-pool".into()), "{told}");
    assert_eq!(told["peers"]["to"].to_string(), r#"["us"]"#);
    assert_eq!(told["peers"]["regions"][0]["unfit"], "not-served", "{told}");

    // Its pods are gone.
    regions.kill_pods("eu");
    until("it is stranded", async || explain("initech", "double").await["outcome"]["from"] == "peer").await;
    let told = explain("initech", "double").await;
    assert_eq!(told["peers"]["cause"], "unusable", "{told}");
    let client = regions.client("eu", "initech").await;
    let request = Http2::request("POST", INFER, &[("content-type", "application/json")]);
    let answer = client.exchange(request, body.as_bytes().to_vec().into()).await.unwrap();
    assert_eq!((answer.status, answer.header("spillway-region")), (200, "us"), "so it is");
    let told = explain("globex", "double").await;
    assert_eq!((&told["peers"]["none"], &told["peers"]["mayLeave"]), (&"residence".into(), &false.into()), "{told}");
    assert!(told["outcome"]["from"] != "peer" && told["peers"]["cause"].is_null(), "{told}");

    // So is the only region that it may go to.
    let us = &mut regions.places[1];
    us.drains[0].start();
    us.gateways.remove(0).finish().await;
    until("it is noticed", async || explain("initech", "double").await["peers"]["regions"][1]["unfit"] == "unhealthy")
        .await;
    let told = explain("initech", "double").await;
    assert_eq!((&told["peers"]["none"], &told["peers"]["regions"][1]["reachable"]), (&"unhealthy".into(), &0.into()));
    assert!(told["outcome"]["from"] != "peer", "{told}");
}
