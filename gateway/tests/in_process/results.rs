//! The result cache of real gateways: over REST and gRPC, with a real Redis between them.

use crate::support::*;
use bytes::Bytes;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::*;
use std::net::SocketAddr;
use std::time::Duration;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const REST: &str = "/v2/models/double/infer";
const CACHE: (&str, &str) = ("deadline: 2s", "deadline: 2s\n  cache: {ttl: 1m}");
const MISS: &str = "spillway; fwd=miss; stored";

fn request(entity: &str, id: &str, version: &str) -> ModelInferRequest {
    let value = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(entity.to_owned())) };
    ModelInferRequest {
        model_name: "double".into(),
        model_version: version.into(),
        id: id.into(),
        parameters: [("entity_id".to_owned(), value)].into(),
        inputs: vec![InferInputTensor {
            name: "x".into(),
            datatype: "FP32".into(),
            shape: vec![2],
            ..Default::default()
        }],
        raw_input_contents: vec![
            [1.5_f32, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into(),
        ],
        ..Default::default()
    }
}

fn json(entity: &str, id: &str) -> Bytes {
    let text = format!(
        r#"{{"id":"{id}","parameters":{{"entity_id":"{entity}"}},"inputs":[{{"name":"x","datatype":"FP32","shape":[2],"data":[1.5,-2.0]}}]}}"#
    );
    text.into()
}

async fn grpc(http2: &Http2, entity: &str, id: &str) -> Grpc {
    Grpc::call(http2, INFER, &[], frame(&request(entity, id, ""))).await
}

async fn rest(http2: &Http2, entity: &str, id: &str, headers: &[(&str, &str)]) -> Answer {
    http2.exchange(Http2::request("POST", REST, headers), json(entity, id)).await.unwrap()
}

fn is_hit(status: &str, tier: &str) -> bool {
    status.starts_with("spillway; hit; ttl=") && status.ends_with(&format!("; detail={tier}"))
}

/// A world whose model `double` is cached for a minute.
async fn world(extra: &str) -> World {
    let world = World::with(extra).await;
    publish(&world, 2, &[CACHE]).await;
    world
}

/// Serves other resources, once every worker thread has them: each takes them up by itself, moments after
/// the process said that they were read, and nothing tells when.
async fn publish(world: &World, version: u64, replaced: &[(&str, &str)]) {
    world.publish(version, replaced).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn what_rest_stored_grpc_is_given_and_the_reverse() {
    let world = world("").await;
    let http2 = world.http2().await;
    let stored = rest(&http2, "plain-1", "a", &[]).await;
    assert_eq!((stored.status, stored.header("cache-status"), stored.header("age")), (200, MISS, ""));
    let hit = grpc(&http2, "plain-1", "b").await;
    assert_eq!(hit.status, 0, "{hit:?}");
    assert!(is_hit(hit.answer.header("cache-status"), "l1"), "{hit:?}");
    let response: ModelInferResponse = hit.decode();
    assert_eq!(
        (response.id.as_str(), response.model_name.as_str(), response.model_version.as_str()),
        ("b", "double", "1")
    );
    let doubled: Vec<u8> = [3.0_f32, -4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(response.raw_output_contents[0], doubled);
    assert!(response.parameters.contains_key("pod"));

    grpc(&http2, "plain-2", "c").await;
    let hit = rest(&http2, "plain-2", "d", &[("x-request-id", "hit-1")]).await;
    assert!(is_hit(hit.header("cache-status"), "l1"), "{hit:?}");
    let body = hit.json();
    assert_eq!((body["id"].as_str(), body["outputs"][0]["data"].to_string().as_str()), (Some("d"), "[3.0,-4.0]"));
    assert_eq!((hit.header("age"), hit.header("spillway-model-version")), ("0", "1"));
    let timing = hit.header("server-timing");
    assert!(timing.contains("cache;dur=") && !timing.contains("queue;dur="), "{timing}");
    // No id is no id, also where the one who stored it had one.
    let none: ModelInferResponse = grpc(&http2, "plain-2", "").await.decode();
    assert_eq!(none.id, "");
    assert_eq!(world.seen().len(), 2);
    let line = world.logged("\"request_id\":\"hit-1\"").await;
    assert_eq!((line["cache"].as_str(), line["pod"].is_null()), (Some("l1"), true));
    assert_eq!(world.metric("spillway_cache_hits_total{tier=\"l1\"}").await, 3);
    assert_eq!(world.metric("spillway_cache_misses_total").await, 2);
    assert_eq!(world.metric("spillway_cache_entries").await, 2);
    let config = world.admin("/config").await;
    assert!(config.contains("\"tenants\":[{\"bytes\":") && config.contains("\"tenant\":\"acme\""), "{config}");
    world.stop().await;
}

#[tokio::test]
async fn t01_t10_tenants_have_their_own_and_a_revoked_one_has_none() {
    let world = world("").await;
    let globex_may = ("actions: [metadata]", "actions: [infer, metadata]");
    publish(&world, 3, &[CACHE, globex_may]).await;
    let acme = world.http2().await;
    let globex = Http2::connect(world.gateway.https, &world.client("globex")).await.unwrap();
    for http2 in [&acme, &globex] {
        assert_eq!(rest(http2, "plain", "a", &[]).await.header("cache-status"), MISS);
        assert!(is_hit(rest(http2, "plain", "a", &[]).await.header("cache-status"), "l1"));
    }
    let tenants: Vec<_> = world.seen().iter().map(|seen| seen.metadata["x-spillway-tenant"].clone()).collect();
    assert_eq!(tenants, ["acme", "globex"]);
    // Its policy is taken away: what lies in the cache is not for it any more.
    publish(&world, 4, &[CACHE]).await;
    let refused = rest(&globex, "plain", "a", &[]).await;
    assert_eq!(
        (refused.status, refused.header("spillway-error"), refused.header("cache-status")),
        (403, "not-allowed", "")
    );
    assert!(
        is_hit(rest(&acme, "plain", "a", &[]).await.header("cache-status"), "l1"),
        "another's policy is not its own"
    );
    // Given back under another policy text: a new epoch.
    publish(&world, 5, &[CACHE, ("actions: [metadata]", "actions: [infer, metadata, admin]")]).await;
    assert_eq!(rest(&globex, "plain", "a", &[]).await.header("cache-status"), MISS);
    world.stop().await;
}

#[tokio::test]
async fn t09_degraded_answers_and_errors_are_not_stored() {
    let world = world("").await;
    let http2 = world.http2().await;
    for _ in 0..2 {
        let degraded = rest(&http2, "other", "a", &[]).await;
        assert_eq!(
            (degraded.header("spillway-degraded"), degraded.header("cache-status")),
            ("1 stale-feature", "spillway; fwd=miss")
        );
        assert_eq!(grpc(&http2, "missing", "a").await.code, "missing-feature");
        assert_eq!(grpc(&http2, "lies", "a").await.code, "bad-model-answer");
    }
    // An answer that cannot be read is asked of the other pod, too.
    assert_eq!(world.seen().len(), 8);
    assert_eq!(world.metric("spillway_cache_not_stored_total{reason=\"degraded\"}").await, 2);
    assert_eq!(world.metric("spillway_cache_entries").await, 0);
    world.stop().await;
}

#[tokio::test]
async fn t12_a_model_that_was_swapped_is_not_answered_for_by_the_old_one() {
    let world = world("").await;
    let http2 = world.http2().await;
    rest(&http2, "plain", "a", &[]).await;
    assert!(is_hit(grpc(&http2, "plain", "a").await.answer.header("cache-status"), "l1"));
    // The version asked for by name is the one that is the default.
    let named = Grpc::call(&http2, INFER, &[], frame(&request("plain", "a", "1"))).await;
    assert!(is_hit(named.answer.header("cache-status"), "l1"));
    let swapped = ("versions: [1, 2]", "versions: [2, 1]");
    publish(&world, 3, &[CACHE, swapped]).await;
    // The stand-in says that version 1 answered: of what is asked for as 2, nothing is stored.
    for _ in 0..2 {
        assert_eq!(rest(&http2, "plain", "a", &[]).await.header("cache-status"), "spillway; fwd=miss");
    }
    assert_eq!(world.metric("spillway_cache_not_stored_total{reason=\"other-version\"}").await, 2);
    let edited = (
        "shape: [-1] }\n---\napiVersion: spillway/v1\nkind: Model\nmetadata: { name: wide }",
        "shape: [2] }\n---\napiVersion: spillway/v1\nkind: Model\nmetadata: { name: wide }",
    );
    publish(&world, 4, &[CACHE, edited]).await;
    assert_eq!(rest(&http2, "plain", "a", &[]).await.header("cache-status"), MISS, "the manifest is in the key");
    world.stop().await;
}

#[tokio::test]
async fn t11_identical_misses_of_many_connections_are_one_call() {
    let world = World::start().await;
    // On a busy machine the one call is overdue, or late, or finds no time to connect: none of it the cache's doing.
    let patient = "deadline: 10s\n  retries: {most: 0}\n  cache: {ttl: 1m}";
    publish(&world, 2, &[("deadline: 2s\n  maxDeadline: 10s", &format!("{patient}\n  maxDeadline: 10s"))]).await;
    let mut connections = Vec::new();
    for _ in 0..10 {
        connections.push(world.http2().await);
    }
    for (number, http2) in connections.iter().enumerate() {
        for entity in 0..4 {
            assert_eq!(grpc(http2, &format!("plain-{number}-{entity}"), "a").await.status, 0);
        }
    }
    world.sidecars.iter().for_each(Sidecar::forget);
    let misses = async || world.metric("spillway_cache_misses_total").await;
    let before = misses().await;
    let calls = (0..1_000).map(|number| {
        let http2 = &connections[number % 10];
        async move {
            let id = number.to_string();
            if number % 2 == 0 {
                let grpc = grpc(http2, "plain-slow", &id).await;
                assert_eq!(grpc.status, 0, "{grpc:?}");
                assert_eq!(grpc.decode::<ModelInferResponse>().id, id);
                grpc.answer.header("cache-status").to_owned()
            } else {
                let answer = rest(http2, "plain-slow", &id, &[]).await;
                assert_eq!((answer.status, answer.json()["id"].as_str()), (200, Some(&*id)), "{answer:?}");
                answer.header("cache-status").to_owned()
            }
        }
    });
    let answers = futures_util::future::join_all(calls).await;
    assert_eq!((world.seen().len(), misses().await - before), (1, 1));
    let collapsed = answers.iter().filter(|status| *status == "spillway; fwd=miss; collapsed; stored").count();
    assert!(collapsed > 100, "{collapsed}");
    world.stop().await;
}

#[tokio::test]
async fn t11_a_client_that_leaves_hands_its_call_to_one_that_waits() {
    let world = world("").await;
    let (leaves, stays) = (world.http2().await, world.http2().await);
    let headers = [("content-type", "application/grpc"), ("te", "trailers")];
    let mut send = leaves.send.clone().ready().await.unwrap();
    let (response, mut stream) = send.send_request(Http2::request("POST", INFER, &headers), false).unwrap();
    stream.send_data(frame(&request("plain-slow", "a", "")), true).unwrap();
    until("the pod has it", async || world.seen().len() == 1).await;
    let waits = grpc(&stays, "plain-slow", "b");
    let leave = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stream.send_reset(h2::Reason::CANCEL);
        drop(response);
    };
    let (answer, ()) = tokio::join!(waits, leave);
    assert_eq!((answer.status, answer.answer.header("cache-status")), (0, MISS), "{answer:?}");
    assert_eq!(world.seen().len(), 2);
    assert_eq!(world.metric("spillway_cache_handed_over_total").await, 1);
    world.stop().await;
}

#[tokio::test]
async fn stale_answers_are_refreshed_in_the_background_and_stand_in_for_dead_pods() {
    let mut world = World::start().await;
    let cache = "deadline: 2s\n  cache: {ttl: 200ms, staleWhileRevalidate: 500ms, staleIfError: 1m}";
    publish(&world, 2, &[("deadline: 2s", cache)]).await;
    let http2 = world.http2().await;
    rest(&http2, "plain-slow", "a", &[]).await;
    tokio::time::sleep(Duration::from_millis(250)).await;
    for _ in 0..20 {
        let stale = rest(&http2, "plain-slow", "b", &[("x-request-id", "stale-1")]).await;
        assert!(stale.header("cache-status").starts_with("spillway; hit; ttl=-"), "{stale:?}");
        assert_eq!(stale.json()["id"], "b");
    }
    until("it is refreshed", async || world.metric("spillway_cache_refreshes_total{reason=\"ok\"}").await == 1).await;
    assert_eq!(world.seen().len(), 2);
    assert!(is_hit(rest(&http2, "plain-slow", "c", &[]).await.header("cache-status"), "l1"));
    let line = world.logged("\"method\":\"refresh\"").await;
    assert_eq!((line["tenant"].as_str(), line["status"].as_u64()), (Some("acme"), Some(200)));
    world.sidecars.iter_mut().for_each(Sidecar::kill);
    tokio::time::sleep(Duration::from_millis(800)).await;
    let kept = rest(&http2, "plain-slow", "d", &[]).await;
    assert_eq!((kept.status, kept.header("cache-status")), (200, "spillway; fwd=stale; detail=stale-if-error"));
    assert_eq!((kept.json()["id"].as_str(), kept.header("spillway-model-version")), (Some("d"), "1"));
    assert_eq!(grpc(&http2, "plain-other", "e").await.status, 14, "there is nothing to stand in");
    world.stop().await;
}

#[tokio::test]
async fn cache_control_is_honoured_where_the_tenant_may() {
    let world = world("").await;
    let http2 = world.http2().await;
    rest(&http2, "plain", "a", &[]).await;
    assert!(is_hit(rest(&http2, "plain", "a", &[("cache-control", "no-cache")]).await.header("cache-status"), "l1"));
    let honour = ("metadata: { name: acme }\n---", "metadata: { name: acme }\nspec: { cacheControl: honour }\n---");
    publish(&world, 3, &[CACHE, honour]).await;
    let nothing = rest(&http2, "plain", "a", &[("cache-control", "only-if-cached")]).await;
    assert_eq!((nothing.status, nothing.header("spillway-error")), (504, "not-cached"));
    assert_eq!(nothing.header("cache-status"), "spillway; detail=only-if-cached");
    for directive in ["no-store", "no-cache, no-store"] {
        let answer = rest(&http2, "plain", "a", &[("cache-control", directive)]).await;
        assert!(!answer.header("cache-status").contains("stored"), "{answer:?}");
    }
    assert_eq!(
        rest(&http2, "plain", "a", &[("cache-control", "no-cache")]).await.header("cache-status"),
        "spillway; fwd=request; stored"
    );
    assert!(is_hit(
        rest(&http2, "plain", "a", &[("cache-control", "max-age=60, only-if-cached")]).await.header("cache-status"),
        "l1"
    ));
    let metadata = [("cache-control", "no-cache")];
    let grpc = Grpc::call(&http2, INFER, &metadata, frame(&request("plain", "a", ""))).await;
    assert_eq!(grpc.answer.header("cache-status"), "spillway; fwd=request; stored");
    world.stop().await;
}

fn redis_settings(redis: &RedisServer) -> String {
    format!("redis: {{servers: ['{}'], timeout: 200ms}}", redis.address())
}

/// A client's connection, once this gateway shares with others.
async fn sharing(world: &World, https: SocketAddr, admin: SocketAddr) -> Http2 {
    until("it has the snapshot", async || metric_of(admin, "spillway_snapshot_version").await == 2).await;
    until("it is connected", async || {
        ask_admin(admin, "GET", "/config", "").await.contains("\"region\":{\"connected\":true")
    })
    .await;
    // The region's purges are read at once when it is.
    tokio::time::sleep(Duration::from_millis(200)).await;
    Http2::connect(https, &world.client("acme")).await.unwrap()
}

#[tokio::test]
async fn gateways_share_by_redis_and_purge_together() {
    let redis = RedisServer::start();
    let world = world(&redis_settings(&redis)).await;
    let another = world.another(&redis_settings(&redis)).await;
    let one = sharing(&world, world.gateway.https, world.gateway.admin).await;
    let other = sharing(&world, another.https, another.admin).await;
    grpc(&one, "plain", "a").await;
    until("it is in Redis", async || redis.results().len() == 1).await;
    let shared = rest(&other, "plain", "b", &[]).await;
    assert!(is_hit(shared.header("cache-status"), "l2"), "{shared:?}");
    assert_eq!((shared.json()["id"].as_str(), world.seen().len()), (Some("b"), 1));

    let both = async |id: &str| tokio::join!(grpc(&one, "plain-slow", id), rest(&other, "plain-slow", id, &[]));
    let (first, second) = both("c").await;
    assert_eq!((first.status, second.status, world.seen().len()), (0, 200, 2), "one call for both");

    let refused = ask_admin(another.admin, "POST", "/cache/purge?model=double", "").await;
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("x-spillway-admin: purge"), "{refused}");
    let purge = "x-spillway-admin: purge\r\n";
    assert!(ask_admin(another.admin, "GET", "/cache/purge?model=double", purge).await.starts_with("HTTP/1.1 405"));
    assert!(ask_admin(another.admin, "POST", "/cache/purge?what=ever", purge).await.starts_with("HTTP/1.1 400"));
    let purged = ask_admin(another.admin, "POST", "/cache/purge?entity=plain", purge).await;
    assert!(
        purged.ends_with("{\"bytes\":0,\"entries\":0,\"region\":true}\n") || purged.contains("\"entries\":1"),
        "{purged}"
    );
    until("the other hears", async || world.metric("spillway_cache_purges_total").await == 1).await;
    assert_eq!(grpc(&one, "plain", "d").await.answer.header("cache-status"), MISS);
    let (first, second) = both("e").await;
    assert!(is_hit(first.answer.header("cache-status"), "l1"), "another entity stays");
    assert!(second.header("cache-status").contains("hit"));
    world.stop().await;
    another.finish().await;
}

#[tokio::test]
async fn a_redis_that_fails_is_never_a_clients_trouble() {
    let redis = RedisServer::start();
    let link = Link::to(redis.address()).await;
    let settings = format!("redis: {{servers: ['{}'], timeout: 20ms}}", link.address);
    let world = world(&settings).await;
    let http2 = sharing(&world, world.gateway.https, world.gateway.admin).await;
    let failures =
        async |reason: &str| world.metric(&format!("spillway_cache_l2_failures_total{{reason=\"{reason}\"}}")).await;
    grpc(&http2, "plain", "a").await;
    link.delay(Duration::from_millis(300));
    for number in 0..20 {
        let began = std::time::Instant::now();
        assert_eq!(grpc(&http2, &format!("plain-{number}"), "a").await.status, 0);
        assert!(began.elapsed() < Duration::from_millis(250), "{:?}", began.elapsed());
    }
    assert!(failures("timeout").await >= 1 && failures("resting").await >= 10);
    link.delay(Duration::ZERO);
    redis.kill();
    for number in 20..40 {
        assert_eq!(grpc(&http2, &format!("plain-{number}"), "a").await.status, 0);
    }
    assert!(is_hit(grpc(&http2, "plain", "a").await.answer.header("cache-status"), "l1"));
    let purge = ask_admin(world.gateway.admin, "POST", "/cache/purge?tenant=acme", "x-spillway-admin: purge\r\n").await;
    assert!(purge.contains("\"region\":false"), "{purge}");
    assert_eq!(grpc(&http2, "plain", "a").await.answer.header("cache-status"), MISS);
    world.stop().await;
}

/// A model whose input is joined from features, which is cached too.
const JOINED: (&str, &str) = (
    "apiVersion: spillway/v1\nkind: Tenant\nmetadata: { name: acme }",
    "apiVersion: spillway/v1
kind: FeatureGroup
metadata: { name: site }
spec: {schemaVersion: 1, freshFor: 1h, retainFor: 30d, fields: [{name: age, datatype: FP32}]}
---
apiVersion: spillway/v1
kind: Model
metadata: { name: joined }
spec:
  pools: [scorers]
  versions: [1]
  backend: onnx
  deadline: 5s
  inputs: [{name: x, datatype: FP32, shape: [-1, 1], features: [site.age]}]
  outputs: [{name: y, datatype: FP32, shape: [-1]}]
  cache: {ttl: 10m}
---
apiVersion: spillway/v1\nkind: Tenant\nmetadata: { name: acme }",
);

#[tokio::test]
async fn results_made_of_features_end_with_the_features() {
    let redis = RedisServer::start();
    let world = World::with(&redis_settings(&redis)).await;
    publish(&world, 2, &[JOINED]).await;
    let http2 = sharing(&world, world.gateway.https, world.gateway.admin).await;
    let features = async || {
        let text = world.admin("/config").await;
        let config: serde_json::Value = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
        config["results"]["features"].clone()
    };
    until("changes are heard", async || features().await["hears"] == true).await;
    let base = features().await["number"].as_u64().unwrap();
    let hears = |sequence| world.sidecars.iter().for_each(|sidecar| sidecar.hears(sequence));
    let get = async || {
        let request = ModelInferRequest {
            model_name: "joined".into(),
            inputs: vec![],
            raw_input_contents: vec![],
            ..request("rows-1", "a", "")
        };
        let grpc = Grpc::call(&http2, INFER, &[], frame(&request)).await;
        assert_eq!(grpc.status, 0, "{grpc:?}");
        grpc
    };
    let status = async || get().await.answer.header("cache-status").to_owned();
    assert_eq!(status().await, "spillway; fwd=miss", "its sidecar does not hear");
    hears(base);
    assert_eq!(status().await, MISS);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let hit = get().await;
    let ttl = hit.answer.header("cache-status").strip_prefix("spillway; hit; ttl=").unwrap().split(';').next().unwrap();
    assert!((50..60).contains(&ttl.parse::<u64>().unwrap()), "no longer than its features are fresh: {ttl}");
    let age: i64 = hit.answer.header("spillway-feature-age-ms").parse().unwrap();
    let said = hit.decode::<ModelInferResponse>().parameters["spillway-feature-age-ms"].parameter_choice.clone();
    assert!((270..5_000).contains(&age) && said == Some(ParameterChoice::Int64Param(age)), "{age}, {said:?}");

    let script = "local number = redis.call('INCR', KEYS[1])
        redis.call('PUBLISH', ARGV[1], string.format('%.0f', number) .. ' {s:rows-1}:site')
        return number";
    let number = redis.cli(&["eval", script, "1", "spillway:eu:features:changes", "spillway:eu:features"]);
    assert_eq!(number, (base + 1).to_string());
    let invalidated = "spillway_cache_invalidated_total{reason=\"feature\"}";
    until("the change is heard", async || world.metric(invalidated).await == 1).await;
    assert_eq!(status().await, "spillway; fwd=miss", "its sidecar has not heard of it");
    assert_eq!(world.metric("spillway_cache_not_stored_total{reason=\"overtaken\"}").await, 1);
    hears(base + 1);
    assert_eq!(status().await, MISS);
    assert!(is_hit(&status().await, "l1"));
    redis.kill();
    until("its lease runs out", async || features().await["hears"] == false).await;
    assert_eq!(status().await, "spillway; fwd=bypass; detail=deaf");
    world.stop().await;
}
