//! Bad input on real sockets: what the caller sees, what is counted, and that others go on.

use std::time::{Duration, Instant};

use crate::support::*;
use bytes::Bytes;

const INFER: &str = "/v2/models/double/infer";
const GRPC_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const JSON: &[u8] = br#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#;

/// Raw bytes on a new HTTP/1.1 connection are refused like this, and the connection closed.
async fn refused(world: &World, wire: &[u8], status: u16, code: &str) {
    let before = world.rejected(code).await;
    let mut http1 = world.http1().await;
    let answer = http1.exchange(wire).await;
    let shown = String::from_utf8_lossy(&wire[..wire.len().min(300)]).into_owned();
    assert_eq!((answer.status, answer.header("spillway-error")), (status, code), "{shown:?}");
    assert!(answer.json()["error"].is_string());
    assert_eq!(answer.header("connection"), "close", "{shown:?}");
    assert!(http1.is_closed().await, "{shown:?}");
    assert_eq!(world.rejected(code).await, before + 1, "{shown:?}");
}

#[tokio::test]
async fn t14_t15_ambiguous_framing_is_refused_and_nothing_goes_upstream() {
    let world = World::start().await;
    let body = std::str::from_utf8(JSON).unwrap();
    let length = JSON.len();
    let chunked = format!("{length:x}\r\n{body}\r\n0\r\n\r\n");
    for (headers, body, code) in [
        (format!("content-length: {length}\r\ntransfer-encoding: chunked\r\n"), chunked.as_str(), "invalid-framing"),
        (format!("transfer-encoding: chunked\r\ncontent-length: {length}\r\n"), &chunked, "invalid-framing"),
        (format!("content-length: {length}\r\ncontent-length: 1\r\n"), body, "invalid-framing"),
        (format!("content-length: {length}, 1\r\n"), body, "invalid-framing"),
        ("transfer-encoding: gzip, chunked\r\n".into(), &chunked, "invalid-framing"),
        (format!("x: a\r\n b\r\ncontent-length: {length}\r\n"), body, "invalid-header"),
        (format!("x: a\ncontent-length: {length}\r\n"), body, "invalid-header"),
        (format!("content-length : {length}\r\n"), body, "invalid-header"),
        (format!("host: other\r\ncontent-length: {length}\r\n"), body, "invalid-host"),
        ("transfer-encoding: chunked\r\n".into(), "zz\r\n", "invalid-chunk"),
        ("transfer-encoding: chunked\r\n".into(), "5\nhello", "invalid-chunk"),
    ] {
        let wire = format!("POST {INFER} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n{body}");
        refused(&world, wire.as_bytes(), 400, code).await;
    }
    let old = format!("POST {INFER} HTTP/1.0\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{chunked}");
    refused(&world, old.as_bytes(), 400, "invalid-framing").await;
    let absolute = "GET http://localhost/v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n";
    refused(&world, absolute.as_bytes(), 400, "invalid-request-line").await;
    assert!(world.seen().is_empty(), "no pod saw anything");
    world.check_alive().await;
    world.stop().await;
}

#[tokio::test]
async fn t16_after_a_local_answer_the_next_request_is_right() {
    let world = World::start().await;
    // A body that nobody wanted is not taken for a request.
    let hidden = b"GET /v2/models/double HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut http1 = world.http1().await;
    let answer = http1.exchange(&h1_request("POST", "/v2/health/live", &[], hidden)).await;
    assert_eq!(answer.status, 405);
    assert!(
        http1.is_closed().await || http1.exchange(&h1_request("GET", "/v2/health/live", &[], b"")).await.status == 200
    );

    // Requests sent together are answered in their order.
    let mut http1 = world.http1().await;
    let three = [
        h1_request("POST", INFER, &[], JSON),
        h1_request("GET", "/v2/nothing", &[], b""),
        h1_request("GET", "/v2/models/double", &[], b""),
    ];
    http1.send(&three.concat()).await;
    assert_eq!(http1.answer().await.unwrap().json()["outputs"][0]["data"], serde_json::json!([2.0]));
    assert_eq!(http1.answer().await.unwrap().status, 403);
    assert_eq!(http1.answer().await.unwrap().json()["name"], "double");
    world.stop().await;
}

#[tokio::test]
async fn t17_t20_upgrades_and_named_headers_are_refused() {
    let world = World::start().await;
    let upgrade = ["connection: upgrade", "upgrade: websocket"];
    let wire = [h1_request("GET", "/v2", &upgrade, b""), b"trailing bytes".to_vec()].concat();
    let mut http1 = world.http1().await;
    let answer = http1.exchange(&wire).await;
    assert_eq!(answer.status, 400);
    assert!(http1.is_closed().await);
    refused(&world, &h1_request("GET", "/v2", &["upgrade: h2c"], b""), 400, "upgrade-refused").await;
    for named in ["connection: x-request-id", "connection: close, traceparent"] {
        refused(&world, &h1_request("GET", "/v2", &[named], b""), 400, "invalid-connection-header").await;
    }
    world.check_alive().await;
    world.stop().await;
}

#[tokio::test]
async fn t18_t19_malformed_h2_requests_are_refused_and_the_connection_lives() {
    let world = World::start().await;
    let http2 = world.http2().await;
    for (name, value) in [("connection", "close"), ("transfer-encoding", "chunked"), ("te", "gzip"), ("upgrade", "h2c")]
    {
        let answer = http2.exchange(Http2::request("GET", "/v2/health/live", &[(name, value)]), Bytes::new()).await;
        assert!(answer.is_err() || answer.unwrap().status == 400, "{name}");
    }
    let other = http2.exchange(Http2::request("GET", "/v2/health/live", &[("host", "other")]), Bytes::new()).await;
    assert!(other.is_err() || other.unwrap().status == 400);
    let short = Http2::request("POST", INFER, &[("content-length", "5")]);
    let answer = http2.exchange(short, Bytes::from_static(JSON)).await;
    assert!(answer.is_err() || answer.unwrap().status == 400, "content-length is not the data's");
    assert!(world.seen().is_empty());
    let answer = http2.exchange(Http2::request("GET", "/v2/health/live", &[]), Bytes::new()).await.unwrap();
    assert_eq!(answer.status, 200, "the same connection goes on");
    world.stop().await;
}

#[tokio::test]
async fn t22_t23_t39_paths_and_duplicates() {
    let world = World::start().await;
    let http2 = world.http2().await;
    for (method, path, status, code) in [
        ("GET", "/v2/%6dodels/double", 400, "invalid-path"),
        ("GET", "/v2/models%2fdouble", 400, "invalid-path"),
        ("GET", "/v2//models/double", 400, "invalid-path"),
        ("GET", "/v2/models/../models/double", 400, "invalid-path"),
        ("GET", "/v2/models/double;a=b", 400, "invalid-path"),
        ("POST", "/v2/repository/models/double/load", 403, "not-offered"),
        ("GET", "/v2/systemsharedmemory/status", 403, "not-offered"),
        ("GET", "/v2/models/double/config", 403, "not-offered"),
        ("POST", "/v2/models/double/generate", 403, "not-offered"),
        ("GET", "/v2/trace/setting", 403, "not-offered"),
        ("GET", "/metrics", 404, "not-found"),
        ("DELETE", "/v2/models/double", 405, "method-not-allowed"),
    ] {
        for over in ["h1", "h2"] {
            let answer = if over == "h1" {
                world.http1().await.exchange(&h1_request(method, path, &[], b"")).await
            } else {
                http2.exchange(Http2::request(method, path, &[]), Bytes::new()).await.unwrap()
            };
            assert_eq!((answer.status, answer.header("spillway-error")), (status, code), "{over} {method} {path}");
        }
        assert_eq!(world.rejected(code).await % 2, 0);
    }
    for method in [
        "RepositoryModelUnload",
        "SystemSharedMemoryRegister",
        "CudaSharedMemoryRegister",
        "TraceSetting",
        "LogSettings",
    ] {
        let grpc = Grpc::call(&http2, &format!("/inference.GRPCInferenceService/{method}"), &[], frame(&())).await;
        assert_eq!((grpc.status, grpc.code.as_str()), (7, "not-offered"), "{method}");
    }
    for name in ["content-type", "x-request-timeout-ms", "grpc-timeout", "x-spillway-tenant"] {
        let twice = [format!("{name}: 1"), format!("{name}: 1")];
        let answer = world.http1().await.exchange(&h1_request("POST", INFER, &[&twice[0], &twice[1]], JSON)).await;
        assert_eq!((answer.status, answer.header("spillway-error")), (400, "duplicate-header"), "{name}");
    }
    world.stop().await;
}

#[tokio::test]
async fn t24_too_large_heads_are_refused() {
    let world = World::start().await;
    let long = format!("x-long: {}", "a".repeat(61 << 10));
    refused(&world, &h1_request("GET", "/v2", &[&long], b""), 431, "headers-too-large").await;
    let many: Vec<String> = (0..101).map(|index| format!("x-{index}: a")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refused(&world, &h1_request("GET", "/v2", &many, b""), 431, "headers-too-large").await;

    let http2 = world.http2().await;
    let big = "a".repeat(16 << 10);
    let answer = http2
        .exchange(
            Http2::request("GET", "/v2", &[("x-a", &big), ("x-b", &big), ("x-c", &big), ("x-d", &big)]),
            Bytes::new(),
        )
        .await;
    assert_eq!(answer.map(|answer| answer.status).unwrap_or(431), 431);
    let mut request = Http2::request("GET", "/v2", &[]);
    for index in 0..101 {
        request.headers_mut().append("x-many", index.into());
    }
    let http2 = world.http2().await;
    let answer = http2.exchange(request, Bytes::new()).await.unwrap();
    assert_eq!((answer.status, answer.header("spillway-error")), (431, "headers-too-large"));
    let answer = http2.exchange(Http2::request("GET", "/v2", &[]), Bytes::new()).await.unwrap();
    assert_eq!(answer.status, 200);
    world.stop().await;
}

#[tokio::test]
async fn t25_bodies_over_the_limit_are_refused() {
    let world = World::with("limits: {body: 64KiB}").await;
    let answer =
        world.http1().await.exchange(&h1_request("POST", INFER, &["expect: 100-continue"], &[b' '; 65_537])).await;
    assert_eq!((answer.status, answer.header("spillway-error")), (413, "body-too-large"));

    // No length declared: refused when it is passed, long before the end.
    let mut http1 = world.http1().await;
    http1
        .send(format!("POST {INFER} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n").as_bytes())
        .await;
    let chunk = [b"4000\r\n".to_vec(), vec![b' '; 0x4000], b"\r\n".to_vec()].concat();
    for _ in 0..5 {
        http1.send(&chunk).await;
    }
    let answer = http1.answer().await.unwrap();
    assert_eq!((answer.status, answer.header("spillway-error")), (413, "body-too-large"));
    assert!(http1.is_closed().await);

    let http2 = world.http2().await;
    let answer = http2.exchange(Http2::request("POST", INFER, &[]), vec![b' '; 70_000].into()).await.unwrap();
    assert_eq!((answer.status, answer.header("spillway-error")), (413, "body-too-large"));
    let grpc = Grpc::call(&http2, GRPC_INFER, &[], vec![0; 70_000].into()).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (8, "body-too-large"));
    assert_eq!(world.rejected("body-too-large").await, 4);
    world.check_alive().await;
    world.stop().await;
}

#[tokio::test]
async fn t26_t27_slow_requests_are_cut_off() {
    let world = World::start().await;
    let drip_head = async {
        let began = Instant::now();
        let mut http1 = world.http1().await;
        http1.send(b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\nx-slow: ").await;
        let mut answer = None;
        while answer.is_none() && began.elapsed() < Duration::from_secs(14) {
            use tokio::io::AsyncWriteExt;
            let _ = http1.stream.write_all(b"a").await;
            let _ = http1.stream.flush().await;
            answer = tokio::time::timeout(Duration::from_millis(500), http1.answer()).await.ok();
        }
        let answer = answer.flatten().expect("an answer");
        assert_eq!((answer.status, answer.header("spillway-error")), (408, "head-too-slow"));
        assert!((9..12).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    };
    let drip_body = async {
        let began = Instant::now();
        let mut http1 = world.http1().await;
        http1
            .send(format!("POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n").as_bytes())
            .await;
        let mut answer = None;
        while answer.is_none() && began.elapsed() < Duration::from_secs(14) {
            http1.send(b" ").await;
            answer = tokio::time::timeout(Duration::from_millis(500), http1.answer()).await.ok();
        }
        let answer = answer.flatten().expect("an answer");
        assert_eq!((answer.status, answer.header("spillway-error")), (408, "body-too-slow"));
        assert!((4..8).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    };
    let drip_h2_body = async {
        let http2 = world.http2().await;
        let mut send = http2.send.clone().ready().await.unwrap();
        let (response, _stream) = send.send_request(Http2::request("POST", INFER, &[]), false).unwrap();
        let answer = Http2::answer(response).await.unwrap();
        assert_eq!((answer.status, answer.header("spillway-error")), (408, "body-too-slow"));
    };
    let silent_h2 = async {
        let began = Instant::now();
        let mut stream = tls(world.gateway.https, &world.client("globex"), b"h2").await.unwrap();
        use tokio::io::AsyncReadExt;
        let mut bytes = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(14), stream.read_to_end(&mut bytes)).await.expect("closed");
        assert!((9..12).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    };
    tokio::join!(drip_head, drip_body, drip_h2_body, silent_h2);
    world.check_alive().await;
    world.stop().await;
}

#[tokio::test]
async fn t28_a_reader_that_takes_nothing_is_cut_off() {
    const WIDE: &str = "/v2/models/wide/infer";
    let world = World::start().await;
    let values: Vec<u8> = vec![1; 8 << 20];
    let json = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1,{}],"parameters":{{"binary_data_size":{}}}}}],"parameters":{{"binary_data_output":true}}}}"#,
        values.len() / 4,
        values.len()
    );
    let length = format!("inference-header-content-length: {}", json.len());
    let wire = h1_request("POST", WIDE, &[&length, "x-request-id: slow-1"], &[json.as_bytes(), &values].concat());
    let mut http1 = world.http1().await;
    http1.send(&wire).await;
    let http2 = world.http2().await;
    let headers = [("inference-header-content-length", json.len().to_string()), ("x-request-id", "slow-2".to_owned())];
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut send = http2.send.clone().ready().await.unwrap();
    let (response, mut stream) = send.send_request(Http2::request("POST", WIDE, &headers), false).unwrap();
    stream.send_data([json.as_bytes(), &values].concat().into(), true).unwrap();
    // The head comes, the windows stay shut.
    let response = response.await.unwrap();
    let began = Instant::now();
    for id in ["slow-1", "slow-2"] {
        let line = until_logged(&world, id).await;
        assert_eq!(line["cancelled"], true, "{line}");
    }
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    drop((http1, response));
    world.check_alive().await;
    world.stop().await;
}

async fn until_logged(world: &World, id: &str) -> serde_json::Value {
    for _ in 0..30 {
        let log = std::fs::read_to_string(world.folder.path().join("access.log")).unwrap_or_default();
        if let Some(line) = log.lines().find(|line| line.contains(id)) {
            return serde_json::from_str(line).unwrap();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    panic!("no line for {id}");
}

#[tokio::test]
async fn t30_t31_compressed_bodies_and_chunk_floods_are_refused() {
    let world = World::start().await;
    for encoding in ["zstd", "br", "gzip, gzip", "compress"] {
        let header = format!("content-encoding: {encoding}");
        let answer = world.http1().await.exchange(&h1_request("POST", INFER, &[&header], JSON)).await;
        assert_eq!((answer.status, answer.header("spillway-error")), (415, "unsupported-encoding"));
    }
    let http2 = world.http2().await;
    let compressed = Bytes::from_static(&[1, 0, 0, 0, 1, 7]);
    let grpc = Grpc::call(&http2, GRPC_INFER, &[], compressed).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (12, "unsupported-encoding"));

    let head = format!("POST {INFER} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n");
    let flood = [head.as_bytes(), "1\r\n \r\n".repeat(65_537).as_bytes()].concat();
    refused(&world, &flood, 400, "too-many-chunks").await;
    world.check_alive().await;
    world.stop().await;
}

#[tokio::test]
async fn t41_malformed_protobuf_has_its_status_and_the_connection_lives() {
    let world = World::start().await;
    let http2 = world.http2().await;
    for (body, code) in [
        (&[0, 0, 0, 0, 2, 0xff, 0xff][..], "invalid-protobuf"),
        (&[0, 0, 0, 0, 9, 1], "invalid-frame"),
        (&[0, 0, 0, 0], "invalid-frame"),
        (&[0, 0, 0, 0, 0, 0], "invalid-frame"),
    ] {
        let grpc = Grpc::call(&http2, GRPC_INFER, &[], Bytes::copy_from_slice(body)).await;
        assert_eq!((grpc.status, grpc.code.as_str()), (3, code), "{body:?}");
    }
    // No model is named, so nobody may use it.
    let grpc = Grpc::call(&http2, GRPC_INFER, &[], frame(&())).await;
    assert_ne!(grpc.status, 0);
    let answer = http2
        .exchange(Http2::request("POST", GRPC_INFER, &[("content-type", "application/json")]), Bytes::from_static(JSON))
        .await;
    assert_eq!(answer.unwrap().status, 415);
    let answer = http2.exchange(Http2::request("GET", "/v2/health/live", &[]), Bytes::new()).await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(world.seen().is_empty());
    world.stop().await;
}
