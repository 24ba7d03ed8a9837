//! Requests that a region cannot serve are answered by another one; and nobody gets more by that than by asking there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::support::*;
use prost::Message;
use spillway_core::failover::{Passage, Plan, Region, Standing, Traffic};
use spillway_core::identity::Serial;
use spillway_core::limit::Class;
use spillway_core::units::Name;
use spillway_proto::inference::*;
use spillway_runtime::forwarding::issue;
use spillway_runtime::plan::Published;
use tonic::Code;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const SECOND: Duration = Duration::from_secs(1);

const MORE: &str = "---
apiVersion: spillway/v1
kind: Model
metadata: { name: double }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  entityInput: site
  tier: 1
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
---
apiVersion: spillway/v1
kind: Model
metadata: { name: kept }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
  cache: { ttl: 1m }
  degradation: { levels: [3, 4], static: { y: [7] } }
---
apiVersion: spillway/v1
kind: Model
metadata: { name: small }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
---
apiVersion: spillway/v1
kind: Model
metadata: { name: laddered }
spec:
  pools: [POOLS]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
  degradation: { levels: [2], fallback: small, enterAfter: 500ms }
---
apiVersion: spillway/v1
kind: Model
metadata: { name: abroad }
spec:
  pools: [scorers-us]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{ name: x, datatype: FP32, shape: [-1] }]
  outputs: [{ name: y, datatype: FP32, shape: [-1] }]
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: acme}, spec: {mayLeaveRegion: true, limits: [{name: all, per: tenant, rate: 1000/s, burst: 1000}]}}
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
  actions: [infer, metadata]
";

async fn call(http2: &Http2, model: &str, entity: &str) -> Grpc {
    Grpc::call(http2, INFER, &[], request(model, "7", entity)).await
}

/// The regions `eu` and `us`, with a gateway each.
async fn two() -> Regions {
    Regions::start(&["eu", "us"], 1, MORE).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_whose_pods_die_is_answered_by_its_peer() {
    let mut regions = two().await;
    let (eu, counts) =
        (Arc::new(regions.client("eu", "acme").await), Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]));
    let mut clients = tokio::task::JoinSet::new();
    let until_when = Instant::now() + SECOND * 6;
    for client in 0..4 {
        let (eu, counts) = (eu.clone(), counts.clone());
        clients.spawn(async move {
            for number in 0.. {
                if Instant::now() >= until_when {
                    return;
                }
                let answer = call(&eu, "double", &format!("e{client}-{number}")).await;
                counts[usize::from(answer.status != 0)].fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(8)).await;
            }
        });
    }
    tokio::time::sleep(SECOND).await;
    regions.kill_pods("eu");
    while clients.join_next().await.is_some() {}
    let [good, bad] = [0, 1].map(|at| counts[at].load(Ordering::SeqCst));
    println!("{good} answered, {bad} failed");
    assert!(good > 200 && bad * 100 <= good + bad, "{good} answered, {bad} failed");

    let answer = call(&eu, "double", "plain").await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    let message: ModelInferResponse = answer.decode();
    assert_eq!(message.id, "7");
    let seen = regions.place("us").seen();
    assert!(seen.len() > 200 && seen.iter().all(|seen| seen.metadata["x-spillway-tenant"] == "acme"));
    assert!(seen.iter().all(|seen| !seen.metadata.contains_key("spillway-forwarded")));

    let body = br#"{"id":"r","inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1.5,-2]}],"parameters":{"entity_id":"plain"}}"#;
    let mut rest = Http1::to(
        &regions.place("eu").id(0),
        regions.place("eu").gateways[0].https,
        &regions.workload("tenant/acme/client/web"),
    )
    .await
    .unwrap();
    let headers = ["content-type: application/json", "x-request-id: told-apart"];
    let answer = rest.exchange(&h1_request("POST", "/v2/models/double/infer", &headers, body)).await;
    assert_eq!((answer.status, answer.header("spillway-region")), (200, "us"), "{answer:?}");
    assert_eq!(answer.json()["outputs"][0]["data"], serde_json::json!([3.0, -4.0]));
    assert!(answer.header("server-timing").contains("model;dur="), "{answer:?}");
    // The tenant's limits were asked here, and not there again.
    assert!(!answer.header("ratelimit").is_empty());

    let (eu, us) = (regions.place("eu"), regions.place("us"));
    let line = eu.logged("told-apart").await;
    assert_eq!(
        (&line["spilled"], &line["tenant"], &line["pod"]),
        (&"us".into(), &"acme".into(), &serde_json::Value::Null)
    );
    let line = us.logged("told-apart").await;
    assert_eq!((&line["forwarded"], &line["tenant"], &line["client"]), (&"eu".into(), &"acme".into(), &"web".into()));
    assert_eq!(
        (&line["method"], &line["limit"], &line["class"]),
        (&"forwarded".into(), &serde_json::Value::Null, &"normal".into())
    );
    assert!(eu.metric("spillway_gateway_spilled_total", &["region=\"us\"", "outcome=\"answered\""]).await > 100);
    assert!(us.metric("spillway_gateway_forwarded_total", &["region=\"eu\"", "outcome=\"answered\""]).await > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn residence_is_a_promise() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let globex = regions.client("eu", "globex").await;
    until("its pods are known to be gone", async || call(&globex, "double", "a").await.code == "no-pod").await;
    assert!(regions.place("us").seen().is_empty());
    let eu = regions.place("eu");
    assert!(eu.metric("spillway_gateway_no_peer_total", &["reason=\"residence\""]).await > 0);

    // Those of initech may leave for us, and for no other region.
    let initech = regions.client("eu", "initech").await;
    assert_eq!(call(&initech, "double", "a").await.answer.header("spillway-region"), "us");
    regions.publish_and_wait(3, &[("mayLeaveRegion: [us]", "mayLeaveRegion: [eu]")]).await;
    assert_eq!(call(&initech, "double", "a").await.code, "no-pod");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_is_served_elsewhere_alone_is_answered_from_there() {
    let regions = two().await;
    let eu = regions.client("eu", "acme").await;
    let answer = call(&eu, "abroad", "a").await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    let globex = regions.client("eu", "globex").await;
    assert_eq!(call(&globex, "abroad", "a").await.code, "no-pod");
    let labels = ["reason=\"no-pool\"", "outcome=\"answered\""];
    assert_eq!(regions.place("eu").metric("spillway_gateway_spilled_total", &labels).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_border_is_the_most() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    regions.kill_pods("us");
    let eu = regions.client("eu", "acme").await;
    let began = Instant::now();
    let answer = call(&eu, "double", "a").await;
    assert_eq!(answer.code, "no-pod", "{answer:?}");
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    until("the peer's refusal is counted", async || {
        let us = regions.place("us");
        us.metric("spillway_gateway_no_peer_total", &["reason=\"forwarded\""]).await == 1
    })
    .await;
    assert_eq!(regions.place("us").metric("spillway_gateway_spilled_total", &[]).await, 0);
    assert_eq!(regions.place("eu").metric("spillway_gateway_forwarded_total", &[]).await, 0);
    // What it said is remembered: the next request is not sent there.
    assert_eq!(call(&eu, "double", "a").await.code, "no-pod");
    let eu = regions.place("eu");
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &["outcome=\"overloaded\""]).await, 1);
    assert_eq!(eu.metric("spillway_gateway_no_peer_total", &["reason=\"full\""]).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_a_peer_come_before_degraded_ones_and_are_not_kept() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    for _ in 0..2 {
        let answer = call(&eu, "kept", "plain").await;
        assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
        assert_eq!(answer.answer.header("spillway-degraded"), "");
        assert_eq!(answer.answer.header("cache-status"), "spillway; fwd=miss");
    }
    // The peer keeps it in its own cache, where its own feature changes are heard.
    assert_eq!(regions.place("us").seen().len(), 1);
    assert_eq!(call(&eu, "kept", "plain").await.answer.header("age"), "0");

    regions.kill_pods("us");
    let answer = call(&eu, "kept", "plain-2").await;
    assert_eq!(answer.answer.header("spillway-degraded"), "4 static-answer", "{answer:?}");
    assert_eq!(answer.answer.header("spillway-region"), "eu");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_level_2_the_whole_answer_of_a_peer_comes_before_the_fallback_models() {
    let mut regions = two().await;
    let (globex, acme) = (regions.client("eu", "globex").await, regions.client("eu", "acme").await);
    // Those of globex stay, so that only this region hears how slow its model is.
    let level = || async { regions.place("eu").metric("spillway_gateway_degradation_level", &["laddered"]).await };
    let began = Instant::now();
    while level().await != 2 {
        for _ in 0..10 {
            assert_eq!(call(&globex, "laddered", "slow").await.answer.header("spillway-region"), "eu");
        }
        assert!(began.elapsed() < SECOND * 30, "level 2 never came");
    }
    let degraded = |answer: &Grpc| answer.answer.header("spillway-degraded").to_owned();
    until("the level is served", async || degraded(&call(&globex, "laddered", "plain").await) == "2 fallback-model")
        .await;
    // 2 % find out whether the model has healed.
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(call(&acme, "laddered", "plain").await);
    }
    assert!(answers.iter().all(|answer| degraded(answer).is_empty()), "{answers:?}");
    assert!(answers.iter().filter(|answer| answer.answer.header("spillway-region") == "us").count() >= 18);

    regions.kill_pods("us");
    until("it is as good as here, or worse", async || {
        degraded(&call(&acme, "laddered", "plain").await) == "2 fallback-model"
    })
    .await;
    let labels = ["reason=\"degraded\"", "outcome=\"overloaded\""];
    assert_eq!(regions.place("eu").metric("spillway_gateway_spilled_total", &labels).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_overloaded_or_refuses_leaves_the_answer_to_the_origin() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    for (status, code, outcome) in [
        (Code::ResourceExhausted, "model-overloaded", "overloaded"),
        (Code::Unavailable, "model-unavailable", "overloaded"),
        (Code::Internal, "model-failed", "failed"),
    ] {
        regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Refuses(status, code)));
        let sent = || async { regions.place("eu").metric("spillway_gateway_spilled_total", &[outcome]).await };
        let before = sent().await;
        until("it is asked again", async || {
            assert_eq!(call(&eu, "double", "a").await.code, "no-pod");
            let answer = call(&eu, "kept", "plain").await;
            assert_eq!(answer.answer.header("spillway-degraded"), "4 static-answer", "{answer:?}");
            sent().await > before
        })
        .await;
    }
    // What is wrong with a request is told as the peer tells it.
    regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Well));
    until("it is asked again", async || call(&eu, "double", "a").await.status == 0).await;
    assert_eq!(call(&eu, "double", "missing").await.code, "missing-feature");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deadline_holds_across_regions() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    until("it goes on", async || call(&eu, "double", "a").await.status == 0).await;
    regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Hangs));
    let began = Instant::now();
    let answer = Grpc::call(&eu, INFER, &[("grpc-timeout", "300m")], request("double", "7", "a")).await;
    let took = began.elapsed();
    assert!(answer.status == Code::DeadlineExceeded as i32 || answer.code == "no-pod", "{answer:?}");
    assert!(took >= Duration::from_millis(250) && took < Duration::from_millis(600), "{took:?}");
    until("the peer's pod was let go", async || {
        regions.place("us").sidecars.iter().map(Sidecar::cancelled).sum::<usize>() > 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_of_the_peer_that_is_gone_is_passed_over() {
    let mut regions = Regions::start(&["eu", "us"], 2, MORE).await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    until("both are asked", async || {
        call(&eu, "double", "a").await;
        let mut asked = 0;
        for gateway in &regions.place("us").gateways {
            let line = "spillway_gateway_forwarded_total{region=\"eu\",outcome=\"answered\"}";
            asked += usize::from(metric_of(gateway.admin, line).await > 0);
        }
        asked == 2
    })
    .await;
    let us = regions.places.iter_mut().find(|place| place.name == "us").unwrap();
    let gone = us.gateways.remove(0);
    us.drains[0].start();
    let ended = tokio::spawn(gone.finish());
    for _ in 0..100 {
        let answer = call(&eu, "double", "a").await;
        assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    ended.await.unwrap();
    for _ in 0..20 {
        assert_eq!(call(&eu, "double", "a").await.status, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_plan_has_no_room_for_is_refused_and_who_is_out_is_not_asked() {
    let mut regions = two().await;
    let name = |text| Name::parse(text).unwrap();
    // us is lost; eu carries what it can, and a quarter of all fits nowhere: the lowest of four equal classes.
    let region = |share| Region { planned: 100.0, share, capacity: Some(150.0), load: Some(100.0), overridden: None };
    let of = BTreeMap::from([(name("eu"), region(1.0)), (name("us"), region(0.0))]);
    let plan = Plan::of(5, &of, &Traffic { demand: None, classes: [1.0; 4] }, Duration::ZERO).unwrap();
    let standings = BTreeMap::from([(name("us"), (Standing::Out, "gone".to_owned()))]);
    let (gateway, drain) = regions.resumed("eu", &Published { epoch: 1, plan, standings }).await;
    let as_whom = regions.workload("tenant/acme/client/web");
    let http2 = Http2::to("spiffe://spillway.test/region/eu/gateway/gw-7", gateway.https, &as_whom).await.unwrap();
    let of_priority = async |priority: i64| {
        let mut message: ModelInferRequest = Message::decode(request("double", "7", "plain").slice(5..)).unwrap();
        let choice = Some(infer_parameter::ParameterChoice::Int64Param(priority));
        message.parameters.insert("priority".to_owned(), InferParameter { parameter_choice: choice });
        Grpc::call(&http2, INFER, &[], frame(&message)).await
    };
    for _ in 0..10 {
        assert_eq!(of_priority(3).await.status, 0);
        let low = of_priority(4).await;
        assert_eq!((&*low.code, low.status), ("overloaded", Code::Unavailable as i32), "{low:?}");
        assert!(!low.answer.header("grpc-retry-pushback-ms").is_empty());
    }
    let metric = async |line: &str| metric_of(gateway.admin, line).await;
    assert_eq!(metric("spillway_gateway_gate_refused_total{reason=\"planned\"}").await, 10);
    let text = ask_admin(gateway.admin, "GET", "/metrics", "").await;
    assert!(text.contains("spillway_capacity_factor{region=\"eu\"} 1.5"), "{text}");
    assert!(!text.contains("spillway_gateway_spilled_total{"), "what is shed by plan is not sent on: {text}");

    // It could be reached, but the plan says that it is out.
    regions.kill_pods("eu");
    until("its pods are known to be gone", async || of_priority(3).await.code == "no-pod").await;
    let text = ask_admin(gateway.admin, "GET", "/metrics", "").await;
    let stayed = text.lines().filter(|line| line.starts_with("spillway_gateway_no_peer_total{"));
    assert!(stayed.clone().count() > 0 && stayed.clone().all(|line| line.contains("reason=\"unhealthy\"")), "{text}");
    assert!(regions.place("us").seen().is_empty());
    drain.start();
    gateway.finish().await;
}

/// What a gateway of `eu` says of a client's request to `us`.
fn passage() -> Passage {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let now = Duration::from_millis(u64::try_from(now.as_millis()).unwrap());
    let name = |text| Name::parse(text).unwrap();
    Passage {
        client: id("spiffe://spillway.test/tenant/acme/client/web"),
        serial: Serial::parse("0a").unwrap(),
        not_after: now + SECOND * 60,
        class: Class::Normal,
        from: name("eu"),
        to: name("us"),
        path: INFER.to_owned(),
        request_id: "forged".to_owned(),
        issued: now,
        expires: now + SECOND * 5,
        hops: 1,
    }
}

async fn forward(http2: &Http2, token: &str) -> Grpc {
    Grpc::call(http2, INFER, &[("spillway-forwarded", token)], request("double", "7", "plain")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t21_only_another_regions_gateway_speaks_for_a_client() {
    let revoked = "---\n{apiVersion: spillway/v1, kind: Revocation, metadata: {name: lost}, spec: {serials: ['0b']}}\n";
    let regions = Regions::start(&["eu", "us"], 1, &(MORE.to_owned() + revoked)).await;
    let gateway = regions.workload("region/eu/gateway/gw-9");
    let from_eu = regions.connect("us", 0, &gateway).await;
    let token = |passage: Passage| issue(&gateway, &passage).unwrap();

    let answer = forward(&from_eu, &token(passage())).await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    assert_eq!(answer.answer.header("x-request-id"), "forged");

    let good = passage();
    let other = regions.workload("region/eu/gateway/gw-8");
    for (token, code) in [
        (issue(&other, &good).unwrap(), "forwarded-unsigned"),
        (token(good.clone()).replace(" normal ", " critical "), "forwarded-unsigned"),
        ("1 nonsense".to_owned(), "forwarded-unreadable"),
        (token(Passage { from: Name::parse("us").unwrap(), ..good.clone() }), "forwarded-by-stranger"),
        (token(Passage { to: Name::parse("eu").unwrap(), ..good.clone() }), "forwarded-elsewhere"),
        (token(Passage { path: "/v2/models/double/infer".into(), ..good.clone() }), "forwarded-elsewhere"),
        (token(Passage { hops: 2, ..good.clone() }), "forwarded-twice"),
        (
            token(Passage { issued: good.issued - SECOND * 60, expires: good.expires - SECOND * 60, ..good.clone() }),
            "forwarded-stale",
        ),
        (token(Passage { expires: good.expires + SECOND * 60, ..good.clone() }), "forwarded-stale"),
        (token(Passage { serial: Serial::parse("0b").unwrap(), ..good.clone() }), "forwarded-untrusted"),
        (token(Passage { not_after: good.issued - SECOND, ..good.clone() }), "forwarded-untrusted"),
        (
            token(Passage { client: id("spiffe://spillway.test/tenant/globex/client/web"), ..good.clone() }),
            "forwarded-residence",
        ),
        (
            token(Passage { client: id("spiffe://spillway.test/tenant/nobody/client/web"), ..good.clone() }),
            "unknown-tenant",
        ),
        (token(Passage { client: gateway.id(), ..good.clone() }), "not-a-client"),
    ] {
        let answer = forward(&from_eu, &token).await;
        assert_eq!((answer.status, &*answer.code), (Code::PermissionDenied as i32, code), "{token}");
    }
    assert_eq!(regions.place("us").seen().len(), 1, "only the good one reached a pod");
    let us = regions.place("us");
    let line = us.audited("forwarded-unsigned").await.to_string();
    assert!(line.contains("region/eu/gateway/gw-9"), "{line}");
    assert_eq!(us.metric("spillway_gateway_rejected_total", &["forwarded-unsigned"]).await, 2);

    // The same words over other connections: of a client they mean nothing, of others nobody is let through.
    let token = token(passage());
    let client = regions.client("us", "globex").await;
    let answer = forward(&client, &token).await;
    assert_eq!(answer.status, 0, "{answer:?}");
    assert_eq!(us.seen().last().unwrap().metadata["x-spillway-tenant"], "globex");
    for path in [
        "region/us/gateway/gw-9",
        "region/mars/gateway/gw-9",
        "region/eu/control/c-0",
        "region/eu/sidecar/scorers-eu/pod-0",
    ] {
        let stranger = regions.workload(path);
        let http2 = regions.connect("us", 0, &stranger).await;
        let answer = forward(&http2, &issue(&stranger, &passage()).unwrap()).await;
        assert!(["forwarded-by-stranger", "not-a-client"].contains(&&*answer.code), "{path}: {answer:?}");
    }
    // A gateway's own requests are refused as ever, whatever it asks for.
    let answer = call(&from_eu, "double", "plain").await;
    assert_eq!(answer.code, "not-a-client");
    for (method, path) in [("GET", "/v2"), ("GET", "/v2/models/double"), ("POST", "/v2/models/double/infer")] {
        let answer =
            from_eu.exchange(Http2::request(method, path, &[("spillway-forwarded", &token)]), bytes::Bytes::new());
        assert_eq!(answer.await.unwrap().status, 403, "{path}");
    }
    // A stream has a passage of its own, and its client is judged for as long as it lasts.
    let streamed = async |token: &str| {
        Grpc::call(&from_eu, STREAM, &[("spillway-forwarded", token)], request("double", "7", "plain")).await
    };
    assert_eq!(streamed(&token).await.code, "forwarded-elsewhere");
    let own = issue(&gateway, &Passage { path: STREAM.to_owned(), ..passage() }).unwrap();
    assert_eq!(streamed(&own).await.status, 0);
    assert_eq!(forward(&from_eu, &own).await.code, "forwarded-elsewhere");
    let answer = Grpc::call(&from_eu, STREAM, &[("spillway-probe", "1")], request("double", "7", "plain")).await;
    assert_eq!(answer.code, "not-a-client");
    let (mut stream, mut answers) =
        open(&from_eu, &[("spillway-forwarded", &own)], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    regions.publish_and_wait(3, &[("serials: ['0b']", "serials: ['0a']")]).await;
    until("its thread has the snapshot", async || forward(&from_eu, &token).await.code == "forwarded-untrusted").await;
    let seen = regions.place("us").seen().len();
    stream.send_data(request("double", "1", "plain"), false).unwrap();
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("7".into(), "forwarded-untrusted".into()));
    assert_eq!(regions.place("us").seen().len(), seen);
}

const READY: &str = "/inference.GRPCInferenceService/ServerReady";

async fn probe(http2: &Http2, model: &str) -> Grpc {
    Grpc::call(http2, INFER, &[("spillway-probe", "1")], request(model, "asked", "plain")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_ask_the_region_itself_and_are_nobodys_traffic() {
    let mut regions = two().await;
    let (gateway, control) = (regions.workload("region/us/gateway/gw-9"), regions.workload("region/us/control/c-0"));
    for prober in [&gateway, &control] {
        let http2 = regions.connect("eu", 0, prober).await;
        let answer = probe(&http2, "double").await;
        assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "eu"), "{answer:?}");
        assert_eq!(answer.answer.header("ratelimit"), "");
        // Of tier 2, and not there at all.
        assert_eq!(probe(&http2, "kept").await.code, "unknown-model");
        assert_eq!(probe(&http2, "gone").await.code, "unknown-model");
        let empty = || bytes::Bytes::from_static(&[0; 5]);
        let ready = Grpc::call(&http2, READY, &[("spillway-probe", "1")], empty()).await;
        assert_eq!((ready.status, &ready.answer.body[5..]), (0, &[8, 1][..]), "ready: true");
        assert_eq!(Grpc::call(&http2, READY, &[], empty()).await.code, "not-a-client");
        for (name, value) in [("spillway-probe", "0"), ("spillway-probe", "yes"), ("x-spillway-probe", "1")] {
            let answer = Grpc::call(&http2, INFER, &[(name, value)], request("double", "7", "plain")).await;
            assert_eq!(answer.code, "not-a-client", "{name}: {value}");
        }
    }
    let eu = regions.place("eu");
    let requests = eu.metric("spillway_gateway_requests_total", &["code=\"0\""]).await;
    assert_eq!(requests, 0, "no client asked");
    assert_eq!(eu.metric("spillway_gateway_probes_total", &["outcome=\"answered\""]).await, 4);
    assert_eq!(eu.metric("spillway_gateway_probes_total", &["outcome=\"unknown-model\""]).await, 4);
    assert!(eu.seen().iter().all(|seen| !seen.metadata.contains_key("x-spillway-tenant")));

    // A client that says so is no prober: its limits count.
    let client = regions.client("eu", "acme").await;
    let answer = probe(&client, "double").await;
    assert!(answer.status == 0 && !answer.answer.header("ratelimit").is_empty(), "{answer:?}");

    regions.kill_pods("eu");
    let http2 = regions.connect("eu", 0, &gateway).await;
    until("clients are answered by the peer", async || {
        call(&client, "double", "a").await.answer.header("spillway-region") == "us"
    })
    .await;
    let before = regions.place("us").seen().len();
    assert_eq!(probe(&http2, "double").await.code, "no-pod", "the region itself cannot");
    assert_eq!(regions.place("us").seen().len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_pods_is_ready_while_another_region_can_answer_and_down_for_those_who_probe_it() {
    let mut regions = two().await;
    let client = regions.client("eu", "acme").await;
    let prober = regions.connect("eu", 0, &regions.workload("region/us/gateway/gw-9")).await;
    regions.kill_pods("eu");
    let eu = regions.place("eu");
    until("its pods are known to be gone", async || eu.metric("spillway_gateway_pods_unhealthy", &[]).await == 2).await;
    let page = async || ask_admin(eu.gateways[0].admin, "GET", "/readyz", "").await;
    assert!(page().await.starts_with("HTTP/1.1 200"), "{}", page().await);
    let health = async || client.exchange(Http2::request("GET", "/v2/health/ready", &[]), bytes::Bytes::new()).await;
    assert_eq!(health().await.unwrap().status, 200);
    let ready = async |http2: &Http2, headers: &[(&str, &str)]| {
        let answer = Grpc::call(http2, READY, headers, bytes::Bytes::from_static(&[0; 5])).await;
        assert_eq!(answer.status, 0, "{answer:?}");
        ServerReadyResponse::decode(&answer.answer.body[5..]).unwrap().ready
    };
    assert!(ready(&client, &[]).await);
    assert!(!ready(&prober, &[("spillway-probe", "1")]).await, "the region itself is not");
    assert_eq!(probe(&prober, "double").await.code, "no-pod");
    assert!(regions.place("us").seen().is_empty(), "no probe was sent on");
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &[]).await, 0);

    // Nobody's requests may leave: then there is nobody to answer.
    regions
        .publish_and_wait(
            3,
            &[("mayLeaveRegion: true", "mayLeaveRegion: false"), ("mayLeaveRegion: [us]", "mayLeaveRegion: false")],
        )
        .await;
    until("it is not ready", async || page().await.starts_with("HTTP/1.1 503")).await;
    assert!(page().await.contains("no other region can be asked"), "{}", page().await);
    assert_eq!(health().await.unwrap().status, 503);
    regions.publish_and_wait(4, &[]).await;
    until("it is ready again", async || page().await.starts_with("HTTP/1.1 200")).await;
    // The other region's gateway is gone.
    let place = regions.places.iter_mut().find(|place| place.name == "us").unwrap();
    let gone = place.gateways.remove(0);
    place.drains[0].start();
    gone.finish().await;
    let eu = regions.place("eu");
    until("it is not ready", async || {
        ask_admin(eu.gateways[0].admin, "GET", "/readyz", "").await.starts_with("HTTP/1.1 503")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_no_pod_can_take_goes_to_another_region_and_stays_there() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let acme = regions.client("eu", "acme").await;
    let (mut stream, mut answers) =
        open(&acme, &[("x-request-id", "streamed-1")], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    for index in 1..30 {
        stream.send_data(request("double", &index.to_string(), "plain"), false).unwrap();
    }
    for index in 1..30 {
        assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, index.to_string());
    }
    // What is wrong with one of them is told of here as ever.
    stream.send_data(request("nothing", "bad", "plain"), false).unwrap();
    let told = answers.next().await.unwrap();
    assert!(told.error_message.contains("no model 'nothing'"), "{}", told.error_message);
    stream.send_data(request("double", "last", "plain"), true).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "last");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("0".into(), String::new()));

    let (eu, us) = (regions.place("eu"), regions.place("us"));
    let seen = us.seen();
    assert_eq!(seen.len(), 31);
    let metadata =
        |seen: &Seen| (seen.metadata["x-spillway-tenant"] == "acme", seen.metadata.contains_key("spillway-forwarded"));
    assert!(seen.iter().all(|seen| metadata(seen) == (true, false)));
    let line = eu.logged("streamed-1").await;
    assert_eq!((&line["spilled"], &line["pod"]), (&"us".into(), &serde_json::Value::Null), "{line}");
    let line = us.logged("streamed-1").await;
    assert_eq!((&line["forwarded"], &line["method"]), (&"eu".into(), &"forwarded-stream".into()), "{line}");
    assert_eq!((&line["tenant"], &line["limit"]), (&"acme".into(), &serde_json::Value::Null));
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &["outcome=\"answered\""]).await, 1);
    assert_eq!(us.metric("spillway_gateway_forwarded_total", &["outcome=\"answered\""]).await, 1);

    // A model that only the other region serves.
    assert_eq!(Grpc::call(&acme, STREAM, &[], request("abroad", "0", "plain")).await.status, 0);
    let labels = ["reason=\"no-pool\"", "outcome=\"answered\""];
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &labels).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_stays_where_its_first_answer_came_from() {
    let mut regions = two().await;
    let acme = regions.client("eu", "acme").await;
    let (mut stream, mut answers) = open(&acme, &[], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    assert_eq!(regions.place("eu").seen().len(), 1);
    regions.kill_pods("eu");
    let _ = stream.send_data(request("double", "1", "plain"), false);
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("14".into(), "pod-lost".into()));
    assert!(regions.place("us").seen().is_empty());
    // Opened anew, it goes there.
    let (_stream, mut answers) = open(&acme, &[], request("double", "2", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "2");
    assert_eq!(regions.place("us").seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn residence_holds_for_streams_for_as_long_as_they_last() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let (globex, initech) = (regions.client("eu", "globex").await, regions.client("eu", "initech").await);
    let answer = Grpc::call(&globex, STREAM, &[], request("double", "0", "plain")).await;
    assert_eq!((answer.status, &*answer.code), (Code::Unavailable as i32, "no-pod"));
    assert!(regions.place("us").seen().is_empty());
    let (mut stream, mut answers) = open(&initech, &[], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    regions.publish_and_wait(3, &[("mayLeaveRegion: [us]", "mayLeaveRegion: [eu]")]).await;
    until("its thread has the snapshot", async || call(&initech, "double", "a").await.code == "no-pod").await;
    let seen = regions.place("us").seen().len();
    stream.send_data(request("double", "1", "plain"), false).unwrap();
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("14".into(), "pod-lost".into()));
    assert_eq!(regions.place("us").seen().len(), seen);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_the_peer_does_not_take_is_refused_in_time_and_goes_no_further() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let acme = regions.client("eu", "acme").await;
    let us = regions.place("us");
    let behave = |manner| us.sidecars.iter().for_each(|pod| pod.behave(manner));
    let streamed = async |http2: &Http2, headers: &[(&str, &str)]| {
        Grpc::call(http2, STREAM, headers, request("double", "0", "plain")).await
    };
    // What is wrong with a request is told on the stream, which goes on with the next.
    behave(Manner::Refuses(Code::InvalidArgument, "model-rejected"));
    let (mut stream, mut answers) = open(&acme, &[], request("double", "bad", "plain")).await;
    let told = answers.next().await.unwrap().infer_response.unwrap();
    let code = told.parameters["spillway-error"].parameter_choice.clone();
    assert_eq!(code, Some(infer_parameter::ParameterChoice::StringParam("model-rejected".into())));
    behave(Manner::Well);
    stream.send_data(request("double", "good", "plain"), true).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "good");
    assert_eq!(answers.status().await, ("0".into(), String::new()));

    behave(Manner::Hangs);
    let began = Instant::now();
    let answer = streamed(&acme, &[("grpc-timeout", "300m")]).await;
    assert!(answer.status == Code::DeadlineExceeded as i32 || answer.code == "no-pod", "{answer:?}");
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(250) && took < SECOND, "{took:?}");
    behave(Manner::Refuses(Code::ResourceExhausted, "model-overloaded"));
    until("it is asked again", async || {
        assert_eq!(streamed(&acme, &[]).await.code, "no-pod");
        regions.place("eu").metric("spillway_gateway_spilled_total", &["outcome=\"overloaded\""]).await > 0
    })
    .await;

    regions.kill_pods("us");
    let (eu, us) = (regions.place("eu"), regions.place("us"));
    until("its refusal is counted", async || {
        assert_eq!(streamed(&acme, &[]).await.code, "no-pod");
        us.metric("spillway_gateway_no_peer_total", &["reason=\"forwarded\""]).await > 0
    })
    .await;
    assert_eq!(us.metric("spillway_gateway_spilled_total", &[]).await, 0);
    assert_eq!(eu.metric("spillway_gateway_forwarded_total", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forward_that_is_lost_has_its_region_probed_at_once() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let acme = regions.client("eu", "acme").await;
    until("it goes on", async || call(&acme, "double", "a").await.status == 0).await;
    // After a probe that failed no connection of probes is watched.
    let calls = |regions: &Regions| regions.place("us").sidecars.iter().map(Sidecar::calls).sum::<usize>();
    regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Hangs));
    let eu = regions.place("eu");
    let labels = ["region=\"us\"", "outcome=\"failed\""];
    until("a probe failed", async || eu.metric("spillway_vantage_probes_total", &labels).await > 0).await;
    let nudges = eu.metric("spillway_vantage_nudges_total", &[]).await;
    let before = calls(&regions);
    let asking = tokio::spawn(async move { call(&acme, "double", "a").await });
    until("it is there", async || calls(&regions) > before).await;
    regions.place("us").drains[0].stop();
    assert_eq!(asking.await.unwrap().code, "no-pod");
    let eu = regions.place("eu");
    until("its probe is hurried", async || eu.metric("spillway_vantage_nudges_total", &[]).await > nudges).await;
    let labels = ["region=\"us\"", "outcome=\"refused\""];
    until("it is probed", async || eu.metric("spillway_vantage_probes_total", &labels).await > 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_class_is_shed_here_goes_to_another_region() {
    let regions = two().await;
    let eu = regions.place("eu");
    eu.sidecars.iter().for_each(|pod| pod.slow_down(1, Duration::from_millis(60)));
    // Those of globex stay.
    let (globex, acme) = (Arc::new(regions.client("eu", "globex").await), regions.client("eu", "acme").await);
    let mut load = tokio::task::JoinSet::new();
    for caller in 0..90 {
        let globex = globex.clone();
        load.spawn(async move {
            loop {
                call(&globex, "double", &format!("e{caller}")).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    let mut low: ModelInferRequest = Message::decode(request("double", "7", "plain").slice(5..)).unwrap();
    let priority = InferParameter { parameter_choice: Some(infer_parameter::ParameterChoice::Int64Param(9)) };
    low.parameters.insert("priority".to_owned(), priority);
    let labels = ["region=\"us\"", "reason=\"shed\"", "outcome=\"answered\""];
    until("one goes on", async || {
        let answer = Grpc::call(&acme, STREAM, &[], frame(&low)).await;
        assert_eq!((answer.status, &*answer.code), (0, ""), "{answer:?}");
        eu.metric("spillway_gateway_spilled_total", &labels).await > 0
    })
    .await;
    load.abort_all();
    assert!(regions.place("us").seen().iter().all(|seen| seen.metadata["x-spillway-tenant"] == "acme"));
}
