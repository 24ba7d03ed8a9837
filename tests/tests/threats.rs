//! Hostile bytes at the real gateway: refused with a status, a code and a count, and nobody else notices.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::Full;
use serde_json::{Value, json};
use spillway_tests::harness::client::{Answer, Client, Connection, Protocol};
use spillway_tests::harness::eventually;
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::h2_frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, block, frame, frames,
    opening,
};
use spillway_tests::harness::inference::{
    Asked, INFER, assert_scores, binary, cases, entity, feature_bytes, features, message, scores,
};
use spillway_tests::harness::metrics::Metrics;
use spillway_tests::harness::process::Process;
use spillway_tests::harness::raw::Raw;
use spillway_tests::harness::region::Region;
use tonic::Code;

const SILENCE: Duration = Duration::from_millis(800);

async fn region(name: &str) -> Region {
    let mut region = Region::new(name);
    region.gateway_settings = "limits: { body: 1MiB }\n".into();
    region.start().await;
    region
}

fn rejected(region: &Region, code: &str) -> f64 {
    region.gateway_metrics().sum("spillway_gateway_rejected_total", &[&format!("reason=\"{code}\"")])
}

/// A request on another connection gets its right answer.
async fn others_are_served(client: &Client) {
    let case = &cases()[0];
    let answer = client.post(INFER, &entity(&case.entity)).await.expect("an answer");
    assert_scores("another connection", &scores(&answer), std::slice::from_ref(case));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t14_to_t24_heads_that_could_mean_two_things_are_refused() {
    let region = region("threats-heads").await;
    let client = region.client("acme");
    let post = |headers: &str, body: &str| format!("POST {INFER} HTTP/1.1\r\nhost: a\r\n{headers}\r\n{body}");
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
    let many = (0..101).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    let large = format!("x-large: {}\r\n", "a".repeat(62 << 10));
    let cases: Vec<(&str, String, u16, &str)> = vec![
        ("t14 both lengths", post("content-length: 5\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n"), 400, "invalid-framing"),
        ("t14 two lengths", post("content-length: 5\r\ncontent-length: 6\r\n", "hello!"), 400, "invalid-framing"),
        ("t14 a signed length", post("content-length: +5\r\n", "hello"), 400, "invalid-framing"),
        ("t14 a fold", post("x-a: b\r\n c\r\ncontent-length: 0\r\n", ""), 400, "invalid-header"),
        ("t14 a bare line feed", "GET /v2 HTTP/1.1\nhost: a\r\n\r\n".into(), 400, "invalid-header"),
        ("t14 space before the colon", post("content-length : 5\r\n", "hello"), 400, "invalid-header"),
        ("t14 another coding", post("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n"), 400, "invalid-framing"),
        ("t14 a bad chunk", post("transfer-encoding: chunked\r\n", "zz\r\n"), 400, "invalid-chunk"),
        ("t15 chunked HTTP/1.0", "POST /v2 HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".into(), 400, "invalid-framing"),
        ("t17 an upgrade", "GET /v2 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nGET /v2 HTTP/1.1\r\nhost: a\r\n\r\n".into(), 400, ""),
        ("t19 two hosts", "GET /v2 HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".into(), 400, "invalid-host"),
        ("t19 no host", "GET /v2 HTTP/1.1\r\nx: a\r\n\r\n".into(), 400, "invalid-host"),
        ("t20 connection names a header", post("connection: x-spillway-tenant\r\ncontent-length: 0\r\n", ""), 400, "invalid-connection-header"),
        ("t22 an escape", get("/v2/models/phishing%2finfer"), 400, "invalid-path"),
        ("t22 an escaped dot", get("/v2/%2e%2e/health/live"), 400, "invalid-path"),
        ("t22 two slashes", get("/v2//health/live"), 400, "invalid-path"),
        ("t22 a dot segment", get("/v2/models/../health/live"), 400, "invalid-path"),
        ("t22 a parameter", get("/v2/models/phishing;x=1/ready"), 400, "invalid-path"),
        ("t23 two content types", post("content-type: application/json\r\ncontent-type: text/plain\r\ncontent-length: 0\r\n", ""), 400, "duplicate-header"),
        ("t23 two deadlines", post("x-request-timeout-ms: 5\r\nx-request-timeout-ms: 9\r\ncontent-length: 0\r\n", ""), 400, "duplicate-header"),
        ("t23 two tenants", post("x-spillway-tenant: a\r\nx-spillway-tenant: b\r\ncontent-length: 0\r\n", ""), 400, "duplicate-header"),
        ("t24 many headers", post(&many, ""), 431, "headers-too-large"),
        ("t24 a large header", post(&large, ""), 431, "headers-too-large"),
    ];
    for (what, bytes, status, code) in cases {
        let before = region.gateway_metrics().sum("spillway_gateway_rejected_total", &[]);
        let mut raw = Raw::h1(&client).await;
        raw.send(&bytes).await;
        let answer = raw.read(SILENCE).await;
        assert_eq!(answer.status(), status, "{what}: {answer:?}");
        if !code.is_empty() {
            assert_eq!(answer.header("spillway-error"), code, "{what}: {answer:?}");
        }
        assert_eq!(answer.count(), 1, "{what}: nothing behind it is taken for a request: {answer:?}");
        let ambiguous = !what.starts_with("t22") && !what.starts_with("t23");
        assert!(answer.closed || !ambiguous, "{what}: the connection is closed");
        assert!(region.gateway_metrics().sum("spillway_gateway_rejected_total", &[]) > before, "{what}: it is counted");
        others_are_served(&client).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t16_a_body_that_nobody_reads_does_not_become_the_next_request() {
    let region = region("threats-unread").await;
    let client = region.client("acme");
    let smuggled = "GET /v2/models/phishing HTTP/1.1\r\nhost: a\r\n\r\n";
    let refused = format!(
        "POST /v2/repository/index HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{smuggled}",
        smuggled.len()
    );
    let mut raw = Raw::h1(&client).await;
    raw.send(format!("{refused}GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n")).await;
    let answer = raw.read(SILENCE).await;
    assert_eq!(answer.status(), 403, "{answer:?}");
    assert!(!answer.text.contains("phishing"), "the body was answered as a request: {answer:?}");
    assert!(answer.closed && answer.count() == 1 || answer.count() == 2 && answer.text.contains(" 200 "), "{answer:?}");
    others_are_served(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t18_t19_h2_requests_against_the_protocol_are_reset() {
    let region = region("threats-h2").await;
    let client = region.client("acme");
    let good = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/v2/health/live")];
    let with = |more: &[(&'static str, &'static str)]| [&good[..], more].concat();
    let post = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", INFER)];
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("t18 a line break in a value", headers(&with(&[("x-a", "b\r\nx-c: d")]))),
        ("t18 a NUL in a value", headers(&with(&[("x-a", "b\0c")]))),
        ("t18 an upper-case name", headers(&with(&[("X-A", "b")]))),
        ("t18 connection", headers(&with(&[("connection", "close")]))),
        ("t18 transfer-encoding", headers(&with(&[("transfer-encoding", "chunked")]))),
        ("t18 a length that is not the body's", {
            let head = frame(HEADERS, END_HEADERS, 1, &block(&[&post[..], &[("content-length", "9")]].concat()));
            [head, frame(DATA, END_STREAM, 1, b"{}")].concat()
        }),
        ("t19 a host that is another", headers(&with(&[("host", "elsewhere")]))),
        ("t19 two paths", headers(&with(&[(":path", "/v2")]))),
        ("t19 two authorities", headers(&with(&[(":authority", "elsewhere")]))),
        ("t19 a pseudo-header behind others", headers(&[("x-a", "b"), good[0], good[1], good[2], good[3]])),
        ("t19 an unknown pseudo-header", headers(&with(&[(":protocol-x", "b")]))),
    ];
    for (what, bytes) in cases {
        let before = others_refused(&region);
        let mut raw = Raw::h2(&client).await;
        raw.send([opening(), bytes].concat()).await;
        let (answer, closed) = raw.read_bytes(SILENCE).await;
        let found = frames(&answer);
        // Stream or connection error; where the bytes are well-formed but mean two things, a 400 will do.
        let reset = found.iter().any(|frame| frame.error().is_some_and(|code| code != 0));
        let refused = found.iter().any(|frame| frame.kind == HEADERS) && others_refused(&region) > before;
        assert!(reset || closed || refused, "{what}: {found:?}");
        others_are_served(&client).await;
    }
    let mut raw = Raw::h2(&client).await;
    raw.send([opening(), headers(&good)].concat()).await;
    let (answer, _) = raw.read_bytes(SILENCE).await;
    assert!(frames(&answer).iter().any(|frame| frame.kind == HEADERS && frame.stream == 1), "the good one is answered");
}

fn others_refused(region: &Region) -> f64 {
    region.gateway_metrics().sum("spillway_gateway_rejected_total", &[])
}

fn headers(headers: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(headers))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t29_floods_end_their_own_connection_and_honest_clients_are_served() {
    let region = region("threats-floods").await;
    let client = region.client("acme");
    let good =
        block(&[(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/v2/health/live")]);
    let post = block(&[
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", INFER),
        ("content-type", "application/json"),
    ]);
    let rapid_reset = (0..20_000_u32).flat_map(|n| {
        let stream = 2 * n + 1;
        [frame(HEADERS, END_HEADERS | END_STREAM, stream, &good), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
    });
    // The server resets these streams itself: a window update of 0.
    let made_you_reset = (0..20_000_u32).flat_map(|n| {
        let stream = 2 * n + 1;
        [frame(HEADERS, END_HEADERS, stream, &post), frame(8, 0, stream, &[0, 0, 0, 0])].concat()
    });
    let mut continuations = frame(HEADERS, 0, 1, &good);
    for n in 0..20_000 {
        continuations.extend(frame(CONTINUATION, 0, 1, &block(&[(&format!("x-{n}"), "a")])));
    }
    let settings = (0..20_000).flat_map(|_| frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]));
    let pings = (0..20_000).flat_map(|_| frame(PING, 0, 0, &[7; 8]));
    let mut tiny = frame(HEADERS, END_HEADERS, 1, &post);
    tiny.extend((0..50_000).flat_map(|_| frame(DATA, 0, 1, &[])));
    let quiet = honest_p99(&client).await;
    for (what, flood) in [
        ("rapid reset", rapid_reset.collect()),
        ("made you reset", made_you_reset.collect()),
        ("continuations", continuations),
        ("settings", settings.collect::<Vec<u8>>()),
        ("pings", pings.collect()),
        ("empty data", tiny),
    ] {
        let before = connections_ended(&region);
        let mut raw = Raw::h2(&client).await;
        raw.send(opening()).await;
        let flooding = tokio::spawn(async move {
            // What comes back is not read meanwhile: the flooder takes nothing.
            let _ = tokio::time::timeout(Duration::from_secs(10), raw.send(flood)).await;
            raw.read_bytes(Duration::from_secs(2)).await
        });
        let loud = honest_p99(&client).await;
        let (answer, closed) = flooding.await.expect("it ran");
        let goaway = frames(&answer).iter().any(|frame| frame.kind == GOAWAY);
        assert!(closed || goaway, "{what}: the connection is not ended");
        assert_eq!(connections_ended(&region) - before, 1.0, "{what}: it is counted");
        assert!(loud <= (quiet * 2).max(Duration::from_millis(100)), "{what}: honest p99 {quiet:?} -> {loud:?}");
        others_are_served(&client).await;
    }
}

fn connections_ended(region: &Region) -> f64 {
    region.gateway_metrics().sum("spillway_gateway_connections_ended_total", &[])
}

async fn honest_p99(client: &Client) -> Duration {
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let mut took = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        assert_eq!(open.send(client.json(INFER, &entity("site-0001"))).await.expect("an answer").status, 200);
        took.push(begun.elapsed());
    }
    spillway_tests::harness::load::percentile(&mut took, 0.99)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t25_t30_to_t32_bodies_beyond_their_limits_are_refused() {
    let region = region("threats-bodies").await;
    let client = region.client("acme");
    let post =
        |headers: &str| format!("POST {INFER} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{headers}\r\n");
    let chunk = format!("10000\r\n{}\r\n", "a".repeat(64 << 10));
    let chunked = |body: &str| [post("transfer-encoding: chunked\r\n").as_str(), body].concat();
    // Under a key that nobody reads: elsewhere a list too many is refused before it can be deep.
    let deep = format!("{{\"unread\":{}{}}}", "[".repeat(65), "]".repeat(65));
    let coded = |coding: &str, body: &[u8]| {
        let head = post(&format!("content-encoding: {coding}\r\ncontent-length: {}\r\n", body.len()));
        [head.as_bytes(), body].concat()
    };
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        ("t25 declared", post("content-length: 2000000\r\n").into(), 413, "body-too-large"),
        ("t25 huge", post("content-length: 999999999999\r\n").into(), 413, "body-too-large"),
        ("t25 chunked", chunked(&chunk.repeat(20)).into(), 413, "body-too-large"),
        ("t30 a bomb", coded("gzip", &bomb(&region)), 413, "body-too-large"),
        ("t30 no gzip", coded("gzip", b"hello"), 400, "invalid-encoding"),
        ("t30 zstd", coded("zstd", b"hello"), 415, "unsupported-encoding"),
        ("t31 many chunks", chunked(&"1\r\n \r\n".repeat(65_537)).into(), 400, "too-many-chunks"),
        (
            "t32 deep",
            format!("{}{deep}", post(&format!("content-length: {}\r\n", deep.len()))).into(),
            400,
            "json-too-deep",
        ),
    ];
    for (what, bytes, status, code) in cases {
        let before = rejected(&region, code);
        let mut raw = Raw::h1(&client).await;
        raw.send(&bytes).await;
        let answer = raw.read(SILENCE).await;
        assert_eq!((answer.status(), answer.header("spillway-error")), (status, code), "{what}: {answer:?}");
        assert!(rejected(&region, code) > before, "{what}: it is counted");
        others_are_served(&client).await;
    }
}

/// Some 64 KiB of gzip that would be 64 MiB of zeros.
fn bomb(region: &Region) -> Vec<u8> {
    let zeros = region.folder.join("zeros");
    std::fs::File::create(&zeros).and_then(|file| file.set_len(64 << 20)).expect("a sparse file");
    let gzip = Command::new("gzip").args(["-9", "-c"]).arg(&zeros).output().expect("gzip is there");
    assert!(gzip.status.success() && gzip.stdout.len() < 1 << 20, "{}", gzip.stdout.len());
    gzip.stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t26_t27_heads_and_bodies_that_drip_are_cut_off() {
    let region = region("threats-drips").await;
    let client = region.client("acme");
    let head = async {
        let mut raw = Raw::h1(&client).await;
        raw.send("GET /v2 HTTP/1.1\r\nhost: a\r\n").await;
        let begun = Instant::now();
        loop {
            raw.send("x: y\r\n").await;
            let answer = raw.read(Duration::from_millis(500)).await;
            if answer.closed || !answer.text.is_empty() {
                return (begun.elapsed(), answer);
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "a head that drips for 20 s");
        }
    };
    let body = async {
        let mut raw = Raw::h1(&client).await;
        raw.send(format!("POST {INFER} HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n")).await;
        let begun = Instant::now();
        loop {
            raw.send(" ").await;
            let answer = raw.read(Duration::from_millis(500)).await;
            if answer.closed || !answer.text.is_empty() {
                return (begun.elapsed(), answer);
            }
            assert!(begun.elapsed() < Duration::from_secs(90), "a body that drips for 90 s");
        }
    };
    let honest = async {
        for _ in 0..20 {
            others_are_served(&client).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (head, body, ()) = tokio::join!(head, body, honest);
    assert!((8..=13).contains(&head.0.as_secs()), "{head:?}");
    assert_eq!(body.1.status(), 408, "{body:?}");
    assert_eq!(body.1.header("spillway-error"), "body-too-slow");
    assert!(rejected(&region, "body-too-slow") >= 1.0);
    assert!(rejected(&region, "head-too-slow") >= 1.0);
    others_are_served(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t28_an_answer_that_nobody_reads_does_not_pile_up() {
    let region = region("threats-slow-reader").await;
    let client = region.client("acme");
    let mut raw = Raw::h1(&client).await;
    let body = features(&cases()).to_string();
    let request = format!(
        "POST {INFER} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    // Requests one behind the other, no answer read: the gateway answers one at a time and then waits.
    let pipelined = request.repeat(200);
    let _ = tokio::time::timeout(Duration::from_secs(2), raw.send(pipelined)).await;
    let memory = || region.gateway_metrics().sum("process_resident_memory_bytes", &[]);
    let before = memory();
    others_are_served(&client).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(memory() - before < 8e6, "{} bytes more", memory() - before);
    let answer = raw.read(SILENCE).await;
    assert!(answer.count() >= 1 && answer.text.starts_with("HTTP/1.1 200"), "{}", answer.status());
    others_are_served(&client).await;
}

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
        let before = others_refused(&region);
        let answer: Answer = client.send(Protocol::H1, request).await.expect("an answer");
        assert_eq!(answer.status, 400, "{what}: {answer:?}");
        assert!(!answer.error_code().is_empty(), "{what}");
        if !code.is_empty() {
            assert_eq!(answer.error_code(), code, "{what}: {answer:?}");
        }
        assert!(answer.json()["error"].is_string(), "{what}");
        assert_eq!(others_refused(&region) - before, 1.0, "{what}: it is counted once");
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
    tokio::time::sleep(Duration::from_millis(200)).await;
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
