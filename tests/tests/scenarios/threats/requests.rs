//! What requests ask for, and what is left of them in metrics and logs.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::Full;
use serde_json::{Value, json};
use spillway_tests::harness::client::{Answer, Client, Connection, Protocol};
use spillway_tests::harness::eventually;
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::inference::{
    Asked, INFER, binary, cases, entity, feature_bytes, features, message, scores,
};
use spillway_tests::harness::metrics::Metrics;
use spillway_tests::harness::process::Process;
use spillway_tests::harness::region::Region;
use tonic::Code;

use super::{others_are_served, refused, region, rejected};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t33_to_t38_requests_that_contradict_themselves_or_the_model_are_refused() {
    let region = region("threats-inference").await;
    let client = region.client("acme");
    let one = &cases()[..1];
    let tensor = feature_bytes(one);
    let head = |size: usize, shape: Value| json!({ "inputs": [{ "name": "features", "datatype": "FP32", "shape": shape, "parameters": { "binary_data_size": size } }] });
    let lengths = |lengths: &[&str]| {
        let mut request = binary(&client, &head(36, json!([1, 9])), &tensor);
        request.headers_mut().remove("inference-header-content-length");
        for length in lengths {
            let value = HeaderValue::from_str(length).expect("a header");
            request.headers_mut().append("inference-header-content-length", value);
        }
        request
    };
    let input = |shape: Value, data: Value| {
        client.json(
            INFER,
            &json!({ "inputs": [{ "name": "features", "datatype": "FP32", "shape": shape, "data": data }] }),
        )
    };
    let nine = json!([0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut shared = features(one);
    shared["inputs"][0]["parameters"] = json!({ "shared_memory_region": "a", "shared_memory_byte_size": 36 });
    let mut unknown = features(one);
    unknown["outputs"] = json!([{ "name": "nothing" }]);
    let twice = {
        let mut body = features(one);
        let input = body["inputs"][0].clone();
        body["inputs"].as_array_mut().expect("a list").push(input);
        body
    };
    let mut other = entity("site-0001");
    other["inputs"] = json!([{ "name": "nothing", "datatype": "FP32", "shape": [1], "data": [1] }]);
    let prefix = [&200_u32.to_le_bytes()[..], b"site-0001"].concat();
    let entities = json!({ "inputs": [{ "name": "site_id", "datatype": "BYTES", "shape": [1], "parameters": { "binary_data_size": prefix.len() } }] });
    let cases: Vec<(&str, Request<Full<Bytes>>, &str)> = vec![
        ("t33 negative", lengths(&["-1"]), "invalid-header-length"),
        ("t33 beyond the body", lengths(&["100000"]), "invalid-header-length"),
        ("t33 no number", lengths(&["all"]), "invalid-header-length"),
        ("t33 twice", lengths(&["5", "5"]), "invalid-header-length"),
        (
            "t34 too much",
            binary(&client, &head(36, json!([1, 9])), &[&tensor[..], b"more"].concat()),
            "binary-size-mismatch",
        ),
        ("t34 too little", binary(&client, &head(40, json!([1, 9])), &tensor), "binary-size-mismatch"),
        ("t35 overflow", input(json!([4_294_967_296_u64, 4_294_967_296_u64, 4_294_967_296_u64]), json!([1])), ""),
        ("t36 negative", input(json!([-1, 9]), nine.clone()), "invalid-shape"),
        ("t36 shape and data", input(json!([2, 9]), nine.clone()), "data-length-mismatch"),
        ("t36 a size for another shape", binary(&client, &head(32, json!([1, 9])), &tensor), "data-length-mismatch"),
        ("t36 shape and bytes", binary(&client, &head(36, json!([2, 9])), &tensor), "data-length-mismatch"),
        ("t36 a huge one", input(json!([9_000_000_000_u64, 9]), nine), ""),
        ("t37 past the end", binary(&client, &entities, &prefix), ""),
        ("t38 an unknown input", client.json(INFER, &other), "unknown-tensor"),
        ("t38 an unknown output", client.json(INFER, &unknown), "unknown-tensor"),
        ("t38 twice", client.json(INFER, &twice), "duplicate-tensor"),
        ("t38 nothing at all", client.json(INFER, &json!({ "inputs": [] })), ""),
        ("t39 shared memory", client.json(INFER, &shared), "shared-memory"),
        ("t6 a key twice", text(&client, "{\"inputs\":[],\"inputs\":[]}"), "invalid-json"),
        ("t7 beyond FP32", input(json!([1, 9]), json!([1e300, 0, 0, 0, 0, 0, 0, 0, 0])), ""),
        (
            "t8 not a number",
            text(
                &client,
                "{\"inputs\":[{\"name\":\"features\",\"datatype\":\"FP32\",\"shape\":[1,9],\"data\":[NaN,0,0,0,0,0,0,0,0]}]}",
            ),
            "invalid-element",
        ),
        ("t8 no JSON", text(&client, "{\"unread\":NaN}"), "invalid-json"),
        ("t42 a large entity", client.json(INFER, &entity(&"a".repeat(1_000))), "invalid-entity-id"),
    ];
    for (what, request, code) in cases {
        let before = refused(&region);
        let answer: Answer = client.send(Protocol::H1, request).await.expect("an answer");
        assert_eq!(answer.status, 400, "{what}: {answer:?}");
        assert!(!answer.error_code().is_empty(), "{what}");
        if !code.is_empty() {
            assert_eq!(answer.error_code(), code, "{what}: {answer:?}");
        }
        assert!(answer.json()["error"].is_string(), "{what}");
        assert_eq!(refused(&region) - before, 1.0, "{what}: it is counted once");
        others_are_served(&client).await;
    }
    // Entity ids of any bytes are ids like others, only unknown ones.
    for odd in ["a\r\nb", "a:b", "{x}", "'\"", "\u{202e}abc", "nul\0"] {
        let answer = client.post(INFER, &entity(odd)).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.header("spillway-degraded")), (200, "1 default-feature"), "{odd:?}");
    }
}

fn text(client: &Client, body: &str) -> Request<Full<Bytes>> {
    let request = client.request("POST", INFER).header("content-type", "application/json");
    request.body(Full::from(body.to_owned())).expect("a request")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t37_t41_messages_that_are_none_get_a_status_and_the_connection_lives() {
    let region = region("threats-grpc").await;
    let client = region.client("acme");
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let case = &cases()[0];
    let mut mixed = message(&Asked::RawFeatures(std::slice::from_ref(case)));
    mixed.inputs[0].contents = message(&Asked::Features(std::slice::from_ref(case))).inputs[0].contents.clone();
    let mut short = message(&Asked::RawFeatures(std::slice::from_ref(case)));
    short.raw_input_contents[0] = Bytes::from_static(&[0; 35]);
    use prost::Message;
    for (what, bytes, status, code) in [
        ("no protobuf", vec![0xff; 20], Code::InvalidArgument, "invalid-protobuf"),
        (
            "cut off",
            message(&Asked::Features(std::slice::from_ref(case))).encode_to_vec()[..30].to_vec(),
            Code::InvalidArgument,
            "invalid-protobuf",
        ),
        ("mixed", mixed.encode_to_vec(), Code::InvalidArgument, "mixed-contents"),
        ("short", short.encode_to_vec(), Code::InvalidArgument, "data-length-mismatch"),
        ("oversized", vec![0; 2 << 20], Code::ResourceExhausted, "body-too-large"),
    ] {
        let before = rejected(&region, code);
        let answer = open.send(grpc::request_of_bytes(&client, MODEL_INFER, &bytes, None)).await.expect("an answer");
        let answer = grpc::read(answer).expect("a gRPC status");
        assert_eq!((answer.code, answer.error_code()), (status, code), "{what}: {}", answer.message);
        assert_eq!(rejected(&region, code) - before, 1.0, "{what}: it is counted");
        let good = message(&Asked::Entity(&case.entity));
        let good = grpc::call(&mut open, &client, MODEL_INFER, &good, None).await.expect("the connection lives");
        assert_eq!(good.code, Code::Ok, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t53_a_deadline_that_cannot_be_read_is_the_default_and_one_too_long_is_cut() {
    let region = region("threats-deadlines").await;
    let client = region.client("acme");
    for (header, value) in [
        ("x-request-timeout-ms", "0"),
        ("x-request-timeout-ms", "-5"),
        ("x-request-timeout-ms", "99999999999999999999999"),
        ("x-request-timeout-ms", "soon"),
        ("grpc-timeout", "0m"),
        ("grpc-timeout", "-1S"),
        ("grpc-timeout", "99999999H"),
        ("grpc-timeout", "5x"),
        ("grpc-timeout", ""),
    ] {
        let mut request = client.json(INFER, &entity("site-0001"));
        request.headers_mut().insert(header, value.parse().expect("a header"));
        let answer = client.send(Protocol::H2, request).await.expect("an answer");
        assert_eq!(scores(&answer).len(), 1, "{header}: {value}");
    }
    for micros in [json!(0), json!(-7), json!(i64::MAX)] {
        let mut body = entity("site-0001");
        body["parameters"]["timeout"] = micros.clone();
        assert_eq!(client.post(INFER, &body).await.expect("an answer").status, 200, "{micros}");
    }
    let mut body = entity("site-0001");
    body["parameters"]["timeout"] = json!(1);
    let before = rejected(&region, "deadline-exceeded");
    let answer = client.post(INFER, &body).await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.error_code()), (504, "deadline-exceeded"));
    assert_eq!(rejected(&region, "deadline-exceeded") - before, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t57_the_access_log_has_one_escaped_line_for_each_request_and_nobodys_data() {
    let region = region("threats-log").await;
    let client = region.client("acme");
    let secret = "secret-entity-4711";
    let requests = 20;
    for n in 0..requests {
        let mut request = client.json(INFER, &entity(secret));
        let id = format!("ok-{n}");
        let id = if n % 2 == 0 { id.as_str() } else { "\u{9}{\"level\":\"error\"}" };
        request.headers_mut().insert("x-request-id", HeaderValue::from_bytes(id.as_bytes()).expect("a header"));
        request.headers_mut().insert("user-agent", HeaderValue::from_static("\"}\u{9}{"));
        request.headers_mut().insert("authorization", HeaderValue::from_static("Bearer token-0815"));
        client.send(Protocol::H2, request).await.expect("an answer");
    }
    let mut named = message(&Asked::Entity(secret));
    named.model_name = "phishing\r\n\u{1b}[31m{\"forged\":true}".into();
    grpc::call_once(&client, MODEL_INFER, &named).await.expect("an answer");
    region.record("gateway-0", "request_id", "ok-18").await;
    eventually("each request has its record", Duration::from_secs(5), async || {
        (region.records("gateway-0").len() > requests).then_some(())
    })
    .await;
    for process in ["gateway-0", "pod-0", "pod-1"] {
        let log = std::fs::read_to_string(region.folder.join(format!("{process}.access.log"))).unwrap_or_default();
        for line in log.lines() {
            serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{process}: {error}: {line}"));
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
        for data in [secret, "token-0815", "\"forged\":true"] {
            assert!(!log.contains(data), "{process} logs {data}");
        }
    }
    let records = region.records("gateway-0");
    assert!(records.len() > requests, "{}", records.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t56_distinct_paths_models_and_entities_make_no_metric_series() {
    let region = region("threats-series").await;
    let client = region.client("acme");
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let warm = async |open: &mut Connection, n: usize| {
        open.send(client.json(INFER, &entity(&format!("entity-{n}")))).await.expect("an answer");
        open.send(client.json(&format!("/v2/models/model-{n}/infer"), &entity("a"))).await.expect("an answer");
        open.send(client.json(&format!("/path-{n}"), &json!({}))).await.expect("an answer");
        open.send(client.json(&format!("/v2/models/phishing/versions/{n}/infer"), &entity("a")))
            .await
            .expect("an answer");
    };
    // Every process has to have seen each kind of request once, or it makes its series later on.
    let served = |sidecar: &Process| Metrics::of(sidecar.admin).sum("spillway_sidecar_requests_total", &[]);
    let mut first = 0;
    eventually("both pods have served", Duration::from_secs(10), async || {
        warm(&mut open, first).await;
        first += 1;
        (first >= 20 && region.sidecars.iter().all(|sidecar| served(sidecar) >= 5.0)).then_some(())
    })
    .await;
    let before = series(&region);
    for n in first..first + 300 {
        warm(&mut open, n).await;
    }
    let new: Vec<String> = series(&region).difference(&before).cloned().collect();
    // Some come by chance, such as two requests that share one read.
    assert!(new.len() <= 10, "{new:#?}");
}

/// Name and labels of all series of gateway and sidecars.
fn series(region: &Region) -> BTreeSet<String> {
    let of = |process: &Process| -> Vec<String> {
        let text = Metrics::of(process.admin).text().to_owned();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples.filter_map(|line| Some(format!("{} {}", process.name, line.rsplit_once(' ')?.0))).collect()
    };
    std::iter::once(region.gateway()).chain(&region.sidecars).flat_map(of).collect()
}
