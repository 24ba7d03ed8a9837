//! What happens to connections over time: certificates that end, roots that go, drains.

use std::time::{Duration, Instant};

use crate::support::*;
use bytes::Bytes;
use spillway_core::identity::TrustDomain;
use spillway_proto::inference::*;
use spillway_runtime::authority::Authority;

fn live() -> http::Request<()> {
    Http2::request("GET", "/v2/health/live", &[])
}

#[tokio::test]
async fn t51_clients_without_a_certificate_of_ours_do_not_get_in() {
    let world = World::start().await;
    let other = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let text = "spiffe://spillway.test/tenant/acme/client/web";
    let (settings, _) = workload(&other, &world.folder.path().join("other"), text, HOUR);
    // It trusts our gateway, but is of another root.
    std::fs::write(&settings.trust_bundle, world.authority.trust_bundle()).unwrap();
    let stranger = spillway_runtime::tls::Workload::load(&settings).unwrap();
    let got = async {
        let mut http1 = Http1::connect(world.gateway.https, &stranger).await.ok()?;
        let _ = tokio::io::AsyncWriteExt::write_all(&mut http1.stream, &h1_request("GET", "/v2", &[], b"")).await;
        http1.answer().await
    };
    assert!(got.await.is_none());
    let untrusted = "spillway_gateway_handshake_failures_total{reason=\"untrusted\"}";
    until("it is counted", async || world.metric(untrusted).await == 1).await;
    world.check_alive().await;
    world.stop().await;
}

#[tokio::test]
async fn t49_a_certificate_that_ends_ends_its_open_connections() {
    let world = World::start().await;
    let text = "spiffe://spillway.test/tenant/acme/client/brief";
    let (_, brief) = workload(&world.authority, &world.folder.path().join("brief"), text, Duration::from_secs(3));
    let http2 = Http2::connect(world.gateway.https, &brief).await.unwrap();
    let mut http1 = Http1::connect(world.gateway.https, &brief).await.unwrap();
    assert_eq!(http2.exchange(live(), Bytes::new()).await.unwrap().status, 200);
    assert_eq!(http1.exchange(&h1_request("GET", "/v2/health/live", &[], b"")).await.status, 200);
    let ended = tokio::time::timeout(Duration::from_secs(10), http2.connection).await;
    assert!(ended.is_ok(), "the h2 connection is closed");
    assert!(http1.is_closed().await);
    // Either the handshake fails, or within the second of its end the request does.
    if let Ok(again) = Http2::connect(world.gateway.https, &brief).await
        && let Ok(answer) = again.exchange(live(), Bytes::new()).await
    {
        assert_eq!((answer.status, answer.header("spillway-error")), (403, "untrusted-certificate"));
    }
    world.check_alive().await;
    world.stop().await;
}

#[tokio::test]
async fn t50_a_removed_root_is_refused_on_open_connections_at_once() {
    let world = World::start().await;
    let new = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let http2 = world.http2().await;
    let mut http1 = world.http1().await;
    assert_eq!(http2.exchange(live(), Bytes::new()).await.unwrap().status, 200);
    assert_eq!(http1.exchange(&h1_request("GET", "/v2/health/live", &[], b"")).await.status, 200);
    std::fs::write(world.folder.path().join("gateway/trust-bundle.pem"), new.trust_bundle()).unwrap();
    let reloads = "spillway_identity_reloads_total{outcome=\"accepted\"}";
    until("the bundle is read", async || {
        world.admin("/metrics").await.lines().any(|line| line.starts_with(reloads) && !line.ends_with(" 0"))
    })
    .await;
    let answer = http2.exchange(live(), Bytes::new()).await.unwrap();
    assert_eq!((answer.status, answer.header("spillway-error")), (403, "untrusted-certificate"));
    let ended = tokio::time::timeout(Duration::from_secs(10), http2.connection).await;
    assert!(ended.is_ok(), "the h2 connection is closed");
    let answer = http1.exchange(&h1_request("GET", "/v2/health/live", &[], b"")).await;
    assert_eq!((answer.status, answer.header("connection")), (403, "close"));
    assert!(http1.is_closed().await);
    assert!(world.rejected("untrusted-certificate").await >= 2);
    world.stop().await;
}

#[tokio::test]
async fn a_drain_lets_requests_end_and_says_goodbye() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let mut idle = world.http1().await;
    assert_eq!(idle.exchange(&h1_request("GET", "/v2/health/ready", &[], b"")).await.status, 200);
    let mut send = http2.send.clone().ready().await.unwrap();
    let headers = [("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "1S")];
    let path = "/inference.GRPCInferenceService/ModelInfer";
    let (response, mut stream) = send.send_request(Http2::request("POST", path, &headers), false).unwrap();
    stream.send_data(request("double", "1", "hangs"), true).unwrap();
    until("the pod has it", async || world.seen().len() == 1).await;
    let began = Instant::now();
    world.drain.start();
    assert!(idle.is_closed().await, "an idle connection is closed");
    // What had begun ends in its own way.
    let answer = Grpc::of(Http2::answer(response).await.unwrap());
    assert_eq!(answer.code, "deadline-exceeded");
    assert!(tokio::time::timeout(Duration::from_secs(5), http2.connection).await.is_ok());
    let client = world.client("acme");
    assert!(Http1::connect(world.gateway.https, &client).await.is_err(), "nothing new is accepted");
    world.gateway.finish().await;
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_that_came_before_the_drain_is_served() {
    let world = World::start().await;
    let client = world.client("acme");
    let mut connected = Vec::new();
    for _ in 0..4 {
        connected.push(tokio::net::TcpStream::connect(world.gateway.https).await.unwrap());
    }
    world.drain.start();
    for (index, tcp) in connected.into_iter().enumerate() {
        if index % 2 == 0 {
            let mut http1 = Http1::over(tcp, &client).await.unwrap();
            let answer = http1.exchange(&h1_request("GET", "/v2/health/live", &[], b"")).await;
            assert_eq!((answer.status, answer.header("connection")), (200, "close"));
            assert!(http1.is_closed().await);
        } else {
            let http2 = Http2::over(tcp, &client).await.unwrap();
            assert_eq!(http2.exchange(live(), Bytes::new()).await.unwrap().status, 200);
        }
    }
    world.gateway.finish().await;
}

#[tokio::test]
async fn readiness_is_that_of_the_pods_of_now() {
    let world = World::start().await;
    let http2 = world.http2().await;
    // An open stream keeps the pods of before in use.
    let (_stream, mut answers) = open(&http2, &[], request("double", "0", "a")).await;
    assert!(answers.next().await.is_some());
    // Pods of the same names at addresses where nobody is.
    let moved: Vec<(String, String)> = world
        .sidecars
        .iter()
        .enumerate()
        .map(|(index, sidecar)| (sidecar.address.to_string(), format!("127.0.0.1:{}", index + 1)))
        .collect();
    let moved: Vec<(&str, &str)> = moved.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
    world.publish(2, &moved).await;
    until("it says that it is not ready", async || world.admin("/readyz").await.starts_with("HTTP/1.1 503")).await;
    assert_eq!(world.metric("spillway_gateway_pods_unhealthy").await, 2);
    drop((_stream, answers));
    world.stop().await;
}

#[tokio::test]
async fn metadata_and_health_over_grpc() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let service = "/inference.GRPCInferenceService";
    let call = async |path: &str, body: Bytes| Grpc::call(&http2, path, &[], body).await;
    let live = call(&format!("{service}/ServerLive"), frame(&ServerLiveRequest {})).await;
    assert!(live.decode::<ServerLiveResponse>().live);
    let ready = call(&format!("{service}/ServerReady"), frame(&ServerReadyRequest {})).await;
    assert!(ready.decode::<ServerReadyResponse>().ready);
    let metadata = call(&format!("{service}/ServerMetadata"), frame(&ServerMetadataRequest {})).await;
    assert_eq!(metadata.decode::<ServerMetadataResponse>().name, "spillway");
    let asked = ModelReadyRequest { name: "double".into(), version: "2".into() };
    assert!(call(&format!("{service}/ModelReady"), frame(&asked)).await.decode::<ModelReadyResponse>().ready);
    let asked = ModelMetadataRequest { name: "double".into(), version: String::new() };
    let model = call(&format!("{service}/ModelMetadata"), frame(&asked)).await.decode::<ModelMetadataResponse>();
    let names: Vec<&str> = model.inputs.iter().map(|input| input.name.as_str()).collect();
    assert_eq!((names, model.versions), (vec!["site", "x"], vec!["1".to_owned(), "2".to_owned()]));
    let asked = ModelMetadataRequest { name: "double".into(), version: "9".into() };
    let unknown = call(&format!("{service}/ModelMetadata"), frame(&asked)).await;
    assert_eq!((unknown.status, unknown.code.as_str()), (5, "unknown-version"));
    let health = call("/grpc.health.v1.Health/Check", frame(&())).await;
    assert_eq!((health.status, &health.answer.body[..]), (0, &[0, 0, 0, 0, 2, 8, 1][..]));
    assert_eq!(call("/grpc.health.v1.Health/Watch", frame(&())).await.status, 12);
    let answer = http2.exchange(Http2::request("GET", "/v2/models/double/ready", &[]), Bytes::new()).await.unwrap();
    assert_eq!(answer.status, 200);
    world.stop().await;
}
