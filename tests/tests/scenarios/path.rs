//! One prediction, end to end: the same scores by every protocol, client and backend.

use std::time::Duration;

use serde_json::json;
use spillway_proto::inference::{ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::collector::Collector;
use spillway_tests::harness::doubles::TritonDouble;
use spillway_tests::harness::eventually;
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::inference::{
    Asked, Case, INFER, MODEL, assert_scores, binary_entities, binary_features, binary_scores, cases, entities, entity,
    features, message, message_scores, scores,
};
use spillway_tests::harness::process::Process;
use spillway_tests::harness::region::{Region, text};
use spillway_tests::harness::servers::{Redis, Server, redis_cli};
use spillway_tests::harness::unmodified;
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedded_backends_predict_as_the_training_library_by_every_protocol() {
    let mut region = Region::new("path-embedded");
    region.start().await;
    predict_in_every_way(&region).await;
    unmodified::predict(region.gateway().address.port(), &region.identity("acme"));
    for process in region.sidecars.iter().chain([region.gateway()]) {
        has_no_huge_pages(process);
    }
}

/// Caches and models are small here: that one byte in use takes 2 MiB would be most of what the process has.
fn has_no_huge_pages(process: &Process) {
    let memory = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid())).expect("proc");
    assert!(!may_have_huge_pages(process));
    let huge = memory.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).expect("huge pages are counted");
    assert_eq!(huge.trim(), "0 kB", "{memory}");
}

fn may_have_huge_pages(process: &Process) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("proc");
    let says = |word| status.lines().any(|line| line == format!("THP_enabled:\t{word}"));
    assert_ne!(says(0), says(1), "{status}");
    says(1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_cache_may_lie_in_huge_pages() {
    let mut region = Region::new("path-large-cache");
    let sqlite = region.folder.join("features.sqlite");
    region.features = format!("  memory: 1GiB\n  sqlite: {}\n", text(&sqlite));
    region.start().await;
    assert!(region.sidecars.iter().all(may_have_huge_pages));
    assert!(!may_have_huge_pages(region.gateway()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_servers_predict_as_the_training_library_by_every_protocol() {
    let mut region = Region::new("path-servers");
    let redis = Server::redis(&region.folder, Redis::Plain);
    let cassandra = Server::cassandra(&region.folder);
    let triton = Server::triton(&region.folder, &[MODEL]);
    region.use_stores(Some(redis.address), cassandra.address);
    region.use_triton(triton.address);
    region.start().await;
    // The load filled Redis: without its rows the first read of each goes to Cassandra and fills it again.
    redis_cli(&redis, &["FLUSHALL"]);
    predict_in_every_way(&region).await;
    unmodified::predict(region.gateway().address.port(), &region.identity("acme"));
    for tier in ["l1", "l2", "l3"] {
        let labels = [&format!("tier=\"{tier}\""), "outcome=\"hit\""];
        assert!(region.sidecars_sum("spillway_sidecar_feature_reads_total", &labels) > 0.0, "{tier} was used");
    }
}

/// A second region of sidecars with cold memories reads what the first ones left in a TLS Redis with users.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_over_tls_with_a_user_and_redis_cluster_serve_features() {
    for mode in [Redis::Tls, Redis::Cluster] {
        let mut region = Region::new("path-redis");
        let redis = Server::redis(&region.folder, mode);
        let sqlite = region.folder.join("features.sqlite");
        let settings = match mode {
            Redis::Tls => {
                let password = region.folder.join("password");
                std::fs::write(&password, "spillway-password\n").expect("a password file");
                let ca = redis.folder().join("tls/ca.crt");
                format!("username: spillway, passwordFile: {}, tls: {{ ca: {} }}", text(&password), text(&ca))
            }
            _ => "cluster: true".to_owned(),
        };
        let server =
            if mode == Redis::Tls { format!("localhost:{}", redis.address.port()) } else { redis.address.to_string() };
        region.features = format!(
            "  memory: {{ size: 64MiB, keep: 1ms, keepAbsent: 1ms }}\n  redis: {{ servers: [\"{server}\"], timeout: 200ms, {settings} }}\n  sqlite: {}\n",
            text(&sqlite)
        );
        region.start().await;
        let all = cases();
        let client = region.client("acme");
        for _ in 0..2 {
            assert_scores("entities", &scores(&client.post(INFER, &entities(&all)).await.expect("an answer")), &all);
        }
        let hits = region.sidecars_sum("spillway_sidecar_feature_reads_total", &["tier=\"l2\"", "outcome=\"hit\""]);
        assert!(hits >= 64.0, "{mode:?}: {hits} hits in Redis");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_says_how_it_was_made_and_one_trace_runs_through_all_hops() {
    let triton = TritonDouble::start();
    let collector = Collector::start();
    let mut region = Region::new("path-making");
    region.use_triton(triton.address);
    for settings in [&mut region.gateway_settings, &mut region.sidecar_settings] {
        settings.push_str(&format!("otlp: \"http://{}\"\n", collector.address));
    }
    region.start().await;
    let client = region.client("acme");
    let case = &cases()[0];
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let mut request = client.json(INFER, &entity(&case.entity));
    let headers = request.headers_mut();
    headers.insert("x-request-id", "ask-7".parse().expect("a header"));
    headers.insert("traceparent", format!("00-{trace}-b7ad6b7169203331-01").parse().expect("a header"));
    headers.insert("x-request-timeout-ms", "750".parse().expect("a header"));
    let answer = client.send(Protocol::H1, request).await.expect("an answer");
    assert_scores("entity", &scores(&answer), std::slice::from_ref(case));
    assert_eq!(answer.header("spillway-region"), "eu-west");
    assert_eq!(answer.header("spillway-model-version"), "1");
    assert_eq!(answer.header("x-request-id"), "ask-7");
    assert!(answer.header("cache-status").starts_with("spillway"), "{:?}", answer.headers);
    assert_eq!(answer.header("spillway-degraded"), "", "nothing was missing");
    assert!(answer.header("spillway-feature-age-ms").parse::<u64>().is_ok(), "{:?}", answer.headers);
    for stage in ["auth;dur=", "features;dur=", "model;dur="] {
        assert!(answer.header("server-timing").contains(stage), "{}", answer.header("server-timing"));
    }
    // Each process knows the request by the client's trace and id.
    let record = region.record("gateway-0", "request_id", "ask-7").await;
    assert_eq!(record["trace_id"], trace);
    let pod = record["pod"].as_str().expect("a pod answered").to_owned();
    let record = region.record(&pod, "request_id", "ask-7").await;
    assert_eq!((record["trace_id"].as_str(), record["tenant"].as_str()), (Some(trace), Some("acme")));
    // The model server got the trace and what was left of the client's time.
    let seen = triton.seen().pop().expect("the model was called");
    let traceparent = seen.traceparent.expect("it carries the trace");
    assert!(traceparent.starts_with(&format!("00-{trace}-")), "{traceparent}");
    let left = seen.grpc_timeout.expect("it carries the deadline");
    let (number, unit) = left.split_at(left.len() - 1);
    let unit = match unit {
        "n" => 1_000_000.0,
        "u" => 1_000.0,
        "m" => 1.0,
        _ => panic!("{left}"),
    };
    let milliseconds = number.parse::<f64>().expect("a number") / unit;
    assert!(milliseconds > 100.0 && milliseconds < 750.0, "{left}");
    let model = traceparent.split('-').nth(2).expect("the id of a span");
    spans_lead_from_the_client_to_the_model(&collector, trace, "b7ad6b7169203331", model).await;
    // Without an id the gateway gives one.
    let answer = client.post(INFER, &entity(&case.entity)).await.expect("an answer");
    assert!(!answer.header("x-request-id").is_empty());
}

/// What a collector got: the gateway's span is the client's child, and so on to the one that the model server was told.
async fn spans_lead_from_the_client_to_the_model(collector: &Collector, trace: &str, client: &str, model: &str) {
    let spans = eventually("all spans of the trace arrive", Duration::from_secs(10), async || {
        let spans = collector.of(trace);
        (spans.len() >= 4).then_some(spans)
    })
    .await;
    let named = |service: &str, name: &str| {
        let span = spans.iter().find(|span| (span.service.as_str(), span.name.as_str()) == (service, name));
        span.unwrap_or_else(|| panic!("no {service} {name} in {spans:?}"))
    };
    let request = named("spillway-gateway", "gateway.request");
    let infer = named("spillway-sidecar", "infer");
    assert_eq!(request.parent, client);
    assert_eq!(infer.parent, request.id);
    assert_eq!(named("spillway-sidecar", "features").parent, infer.id);
    let call = named("spillway-sidecar", "model");
    assert_eq!((call.parent.as_str(), call.id.as_str()), (infer.id.as_str(), model));
}

/// All 64 cases, by each way to name them and each protocol.
async fn predict_in_every_way(region: &Region) {
    let all = cases();
    assert_eq!(all.len(), 64);
    let client = region.client("acme");
    for protocol in [Protocol::H1, Protocol::H2] {
        let mut open = client.connect(protocol).await.expect("a connection");
        for case in &all {
            let answer = open.send(client.json(INFER, &entity(&case.entity))).await.expect("an answer");
            assert_scores("entity_id", &scores(&answer), std::slice::from_ref(case));
        }
        let answer = open.send(client.json(INFER, &features(&all))).await.expect("an answer");
        assert_scores("features", &scores(&answer), &all);
        let answer = open.send(binary_features(&client, &all)).await.expect("an answer");
        assert_scores("binary features", &binary_scores(&answer), &all);
        let answer = open.send(binary_entities(&client, &all)).await.expect("an answer");
        assert_scores("binary entities", &binary_scores(&answer), &all);
    }
    rows_belong_to_their_entities(&client, &all).await;
    client_sent_features_win(&client, &all).await;
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    for case in &all {
        let one = message(&Asked::Entity(&case.entity));
        let answer = grpc::call(&mut open, &client, MODEL_INFER, &one, None).await.expect("an answer");
        let answer: ModelInferResponse = answer.decode();
        assert_eq!((answer.id.as_str(), answer.model_name.as_str()), ("a-1", MODEL));
        assert_scores("gRPC entity", &message_scores(&answer), std::slice::from_ref(case));
    }
    for asked in [Asked::Entities(&all), Asked::Features(&all), Asked::RawFeatures(&all)] {
        let answer = grpc::call(&mut open, &client, MODEL_INFER, &message(&asked), None).await.expect("an answer");
        assert_scores("gRPC batch", &message_scores(&answer.decode()), &all);
    }
    what_is_there_is_told(&client).await;
}

async fn rows_belong_to_their_entities(client: &Client, all: &[Case]) {
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    for count in 1..=all.len() {
        // Another order for each size: a row's place says whose it is.
        let mut some: Vec<Case> = all.to_vec();
        some.rotate_left(count);
        some.truncate(count);
        let answer = open.send(client.json(INFER, &entities(&some))).await.expect("an answer");
        assert_scores(&format!("{count} entities"), &scores(&answer), &some);
    }
    // The most that one call may hold, each entity eight times.
    let many: Vec<Case> = all.iter().cycle().take(512).cloned().collect();
    let answer = open.send(client.json(INFER, &entities(&many))).await.expect("an answer");
    assert_scores("512 entities", &scores(&answer), &many);
    let more: Vec<Case> = all.iter().cycle().take(513).cloned().collect();
    let answer = open.send(client.json(INFER, &entities(&more))).await.expect("an answer");
    assert_eq!(answer.status, 400, "{}", answer.json());
}

async fn client_sent_features_win(client: &Client, all: &[Case]) {
    let (stored, sent) = (&all[0], &all[5]);
    assert!((stored.score - sent.score).abs() > 0.5, "the two differ much");
    let mut body = features(std::slice::from_ref(sent));
    body["parameters"] = json!({ "entity_id": stored.entity });
    let answer = client.post(INFER, &body).await.expect("an answer");
    assert_scores("client's features", &scores(&answer), std::slice::from_ref(sent));
}

async fn what_is_there_is_told(client: &Client) {
    for path in
        ["/v2/health/live", "/v2/health/ready", "/v2/models/phishing/ready", "/v2/models/phishing/versions/1/ready"]
    {
        assert_eq!(client.get(path).await.expect("an answer").status, 200, "{path}");
    }
    let server = client.get("/v2").await.expect("an answer").json();
    assert!(server["name"].is_string() && server["version"].is_string() && server["extensions"].is_array(), "{server}");
    let model = client.get("/v2/models/phishing").await.expect("an answer").json();
    assert_eq!(model["name"], MODEL);
    assert_eq!(model["versions"], json!(["1"]));
    let features = json!({ "name": "features", "datatype": "FP32", "shape": [-1, 9] });
    assert!(model["inputs"].as_array().expect("inputs").contains(&features), "{model}");
    assert_eq!(model["outputs"], json!([{ "name": "score", "datatype": "FP32", "shape": [-1, 1] }]));
    for (path, status, code) in [
        ("/v2/models/phishing/versions/9", 404, "unknown-version"),
        // A tenant learns nothing about models that it may not use, not even that there are none.
        ("/v2/models/none", 403, "not-allowed"),
    ] {
        let answer = client.get(path).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.error_code()), (status, code), "{path}");
        assert!(answer.json()["error"].is_string());
    }
    let asked = ModelMetadataRequest { name: MODEL.into(), version: String::new() };
    let answer = grpc::call_once(client, "/inference.GRPCInferenceService/ModelMetadata", &asked).await;
    let metadata: ModelMetadataResponse = answer.expect("an answer").decode();
    assert_eq!((metadata.name.as_str(), &metadata.versions[..]), (MODEL, &["1".to_owned()][..]));
    // grpc.health.v1: SERVING is 1.
    let answer =
        client.send(Protocol::H2, grpc::request_of_bytes(client, "/grpc.health.v1.Health/Check", &[], None)).await;
    let answer = answer.expect("an answer");
    assert_eq!(&answer.body[..], [0, 0, 0, 0, 2, 8, 1], "{answer:?}");
    assert_eq!(grpc::read(answer).expect("a status").code, Code::Ok);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entity_without_features_gets_the_declared_defaults_and_is_told_or_is_refused() {
    let mut region = Region::new("path-missing");
    region.start().await;
    let client = region.client("acme");
    let answer = client.post(INFER, &entity("nobody")).await.expect("an answer");
    assert_eq!(scores(&answer).len(), 1);
    assert_eq!(answer.header("spillway-degraded"), "1 default-feature");
    let answer = grpc::call_once(&client, MODEL_INFER, &message(&Asked::Entity("nobody"))).await.expect("an answer");
    assert_eq!(answer.header("spillway-degraded"), "1 default-feature", "{:?}", answer.metadata);
    assert!(region.sidecars_sum("spillway_sidecar_degraded_total", &["reason=\"default-feature\""]) >= 2.0);
    region.edit("model.yaml", "missingFeature: default", "missingFeature: refuse");
    region.apply();
    region.sidecars_serve(2).await;
    let answer = client.post(INFER, &entity("nobody")).await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.error_code()), (422, "missing-feature"));
    let answer = grpc::call_once(&client, MODEL_INFER, &message(&Asked::Entity("nobody"))).await.expect("an answer");
    assert_eq!((answer.code, answer.error_code()), (Code::FailedPrecondition, "missing-feature"));
    assert_eq!(client.post(INFER, &entity("site-0001")).await.expect("an answer").status, 200);
}
