//! What a gateway holds at most, and that those within the bounds go on.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::support::*;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

const INFER: &str = "/v2/models/double/infer";
const WIDE: &str = "/v2/models/wide/infer";
const GRPC_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const JSON: &[u8] = br#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#;

/// A REST request for `wide` with so many bytes of binary data: its answer has as many.
fn wide(bytes: usize, id: &str) -> Vec<u8> {
    let json = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1,{}],"parameters":{{"binary_data_size":{bytes}}}}}],"parameters":{{"binary_data_output":true}}}}"#,
        bytes / 4,
    );
    let length = format!("inference-header-content-length: {}", json.len());
    let id = format!("x-request-id: {id}");
    h1_request("POST", WIDE, &[&length, &id], &[json.as_bytes(), &vec![1; bytes]].concat())
}

#[tokio::test]
async fn bodies_in_memory_are_bounded_over_all_requests() {
    let world = World::with("limits: {body: 1MiB, answer: 1MiB, bodiesInMemory: 1MiB}").await;
    // Most of it is held by one that does not get on.
    let held = h1_request("POST", INFER, &[], &vec![b' '; 1 << 20]);
    let mut holder = world.http1().await;
    holder.send(&held[..900 << 10]).await;
    let large = h1_request("POST", INFER, &[], &[&vec![b' '; 200 << 10], JSON].concat());
    let mut http1 = world.http1().await;
    until("there is no room for a large body", async || {
        let mut other = world.http1().await;
        let answer = other.exchange(&large).await;
        if answer.status != 200 {
            assert_eq!(
                (answer.status, answer.header("spillway-error"), answer.header("retry-after")),
                (503, "overloaded", "1")
            );
        }
        answer.status != 200
    })
    .await;
    assert!(world.rejected("overloaded").await >= 1);
    assert_eq!(http1.exchange(&h1_request("POST", INFER, &[], JSON)).await.status, 200, "a small one finds room");
    // A stream is told as well.
    let http2 = world.http2().await;
    let frame = [&[0_u8, 0, 4, 0, 0][..], &vec![0; 200 << 10]].concat();
    let grpc = Grpc::call(&http2, STREAM, &[], frame.into()).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (8, "overloaded"));
    drop(holder);
    until("what it held is given back", async || world.http1().await.exchange(&large).await.status == 200).await;
    world.stop().await;
}

#[tokio::test]
async fn who_may_use_no_model_is_refused_before_the_body_is_read() {
    let world = World::start().await;
    let globex = Http2::connect(world.gateway.https, &world.client("globex")).await.unwrap();
    for path in [GRPC_INFER, STREAM] {
        let headers = [("content-type", "application/grpc"), ("te", "trailers")];
        let mut send = globex.send.clone().ready().await.unwrap();
        let (response, _open) = send.send_request(Http2::request("POST", path, &headers), false).unwrap();
        let grpc = Grpc::of(Http2::answer(response).await.unwrap());
        assert_eq!((grpc.status, grpc.code.as_str()), (7, "not-allowed"), "{path}");
    }
    world.stop().await;
}

#[tokio::test]
async fn handshakes_that_do_not_end_take_no_places_of_others() {
    let world = World::with("limits: {connections: 50}").await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(world.gateway.https).await.unwrap());
    }
    // An address has 128 handshakes under way, and its others are closed.
    let refused = "spillway_gateway_handshake_failures_total{reason=\"too-many-handshakes\"}";
    until("the others are closed", async || world.metric(refused).await == 72).await;
    world.check_alive().await;
    drop(silent);
    world.stop().await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let world = World::with("limits: {connections: 3}").await;
    let client = world.client("acme");
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut http1 = Http1::connect(world.gateway.https, &client).await.unwrap();
        assert_eq!(http1.exchange(&h1_request("GET", "/v2/health/live", &[], b"")).await.status, 200);
        open.push(http1);
    }
    let closed = match Http1::connect(world.gateway.https, &client).await {
        Ok(mut over) => over.stream.read_u8().await.is_err(),
        Err(_) => true,
    };
    assert!(closed);
    let refused = "spillway_gateway_handshake_failures_total{reason=\"too-many-connections\"}";
    until("it is counted", async || world.metric(refused).await == 1).await;
    drop(open);
    until("there is a place again", async || {
        let Ok(mut http1) = Http1::connect(world.gateway.https, &client).await else { return false };
        let _ = http1.stream.write_all(&h1_request("GET", "/v2/health/live", &[], b"")).await;
        http1.answer().await.is_some()
    })
    .await;
    world.stop().await;
}

#[tokio::test]
async fn t28_a_slow_reader_gets_all_and_one_that_drips_does_not() {
    const ANSWER: usize = 14 << 20;
    let world = World::start().await;
    let slow = async {
        // The kernel would take a good part of the answer into a larger buffer.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(128 << 10).unwrap();
        let tcp = socket.connect(world.gateway.https).await.unwrap();
        let mut http1 = Http1::over(tcp, &world.client("acme")).await.unwrap();
        http1.send(&wide(ANSWER, "slow-3")).await;
        let began = Instant::now();
        let (mut read, mut buffer) = (0, vec![0; 64 << 10]);
        while read < ANSWER {
            let count = http1.stream.read(&mut buffer).await.unwrap();
            assert_ne!(count, 0, "cut off at {read} after {:?}", began.elapsed());
            read += count;
            // 900 kB a second.
            let due = began + Duration::from_nanos(read as u64 * 1_111);
            tokio::time::sleep_until(due.into()).await;
        }
        assert!(began.elapsed() > Duration::from_secs(12), "{:?}", began.elapsed());
        assert_eq!(world.logged("slow-3").await["status"], 200);
    };
    let dripping = async {
        let mut http1 = world.http1().await;
        http1.send(&wide(ANSWER, "drip-1")).await;
        let (began, mut buffer) = (Instant::now(), vec![0; 2 << 10]);
        let is_cut = || {
            let log = std::fs::read_to_string(world.folder.path().join("access.log")).unwrap_or_default();
            log.lines().any(|line| line.contains("drip-1") && line.contains(r#""cancelled":true"#))
        };
        while !is_cut() {
            assert!(began.elapsed() < Duration::from_secs(25), "it still drips");
            let _ = http1.stream.read(&mut buffer).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::join!(slow, dripping);
    world.stop().await;
}

#[tokio::test]
async fn t25_tensors_that_grow_beyond_the_limit_are_too_large() {
    let world = World::with("limits: {body: 64KiB}").await;
    let data = vec!["1"; 12_000].join(",");
    let json = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[12000],"data":[{data}]}},{{"name":"z","datatype":"FP32","shape":[12000],"data":[{data}]}}]}}"#
    );
    assert!(json.len() < 64 << 10);
    let answer = world.http1().await.exchange(&h1_request("POST", INFER, &[], json.as_bytes())).await;
    assert_eq!((answer.status, answer.header("spillway-error")), (413, "body-too-large"));
    world.stop().await;
}

#[tokio::test]
async fn t30_gzip_and_deflate_are_read_within_the_limit() {
    let world = World::with("limits: {body: 1MiB}").await;
    let gzip = |data: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    };
    let mut deflate = ZlibEncoder::new(Vec::new(), Compression::fast());
    deflate.write_all(JSON).unwrap();
    let http2 = world.http2().await;
    for (coding, body) in [("gzip", gzip(JSON)), ("deflate", deflate.finish().unwrap())] {
        let header = format!("content-encoding: {coding}");
        let answer = world.http1().await.exchange(&h1_request("POST", INFER, &[&header], &body)).await;
        assert_eq!(answer.json()["outputs"][0]["data"], serde_json::json!([2.0]), "{coding}");
        let request = Http2::request("POST", INFER, &[("content-encoding", coding)]);
        assert_eq!(http2.exchange(request, Bytes::from(body)).await.unwrap().status, 200);
    }
    let bomb = gzip(&vec![b' '; 64 << 20]);
    assert!(bomb.len() < 1 << 20);
    for (body, status, code) in [
        (bomb, 413, "body-too-large"),
        (gzip(JSON)[..30].to_vec(), 400, "invalid-encoding"),
        ([&gzip(JSON)[..], b"{}"].concat(), 400, "invalid-encoding"),
        (JSON.to_vec(), 400, "invalid-encoding"),
    ] {
        let before = world.rejected(code).await;
        let wire = h1_request("POST", INFER, &["content-encoding: gzip"], &body);
        let answer = world.http1().await.exchange(&wire).await;
        assert_eq!((answer.status, answer.header("spillway-error")), (status, code));
        assert_eq!(world.rejected(code).await, before + 1);
    }
    // What is not inference takes no body, and so no coding either.
    let grpc = Grpc::call(&http2, GRPC_INFER, &[("content-encoding", "gzip")], Bytes::new()).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (12, "unsupported-encoding"));
    world.check_alive().await;
    world.stop().await;
}
