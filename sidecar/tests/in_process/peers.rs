//! Who may hold a connection to a sidecar, and how much of one.

use std::time::Duration;

use crate::support::fp32;
use crate::support::pod::{Client, GATEWAY, Pod, code, joined_model, resources};
use bytes::Bytes;
use http_body_util::StreamBody;
use hyper::body::Frame;
use spillway_core::identity::TrustDomain;
use spillway_core::inference::InferRequest;
use spillway_proto::feature::PutRequest;
use spillway_proto::feature::feature_service_client::FeatureServiceClient;
use spillway_proto::inference::ServerLiveRequest;
use spillway_runtime::authority::Authority;
use spillway_runtime::oip;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tower::{Service, ServiceExt};

const SOON: Duration = Duration::from_secs(3);

async fn pod() -> Pod {
    Pod::start(&resources(&joined_model("phishing", "  backend: onnx")), "").await.ready().await
}

async fn live(client: &mut Client) -> Result<(), Status> {
    let answer = timeout(SOON, client.server_live(ServerLiveRequest {})).await.expect("an answer");
    answer.map(|answer| assert!(answer.into_inner().live))
}

#[tokio::test(flavor = "multi_thread")]
async fn t50_an_open_connection_of_a_removed_root_is_refused_at_its_next_call() {
    let pod = pod().await;
    let other = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    pod.trust(&[&other]);
    pod.assert_metric("spillway_identity_reloads_total{outcome=\"accepted\"} 1").await;
    let mut stays = pod.gateway().await;
    let mut leaves = Client::new(pod.connect_from(&other, GATEWAY).await);
    let mut streams = Client::new(pod.connect_from(&other, GATEWAY).await);
    live(&mut stays).await.unwrap();
    live(&mut leaves).await.unwrap();
    let sent = InferRequest {
        model: "phishing".into(),
        inputs: vec![fp32("features", &[1, 9], &[0.0; 9])],
        ..InferRequest::default()
    };
    let (requests, open) = tokio::sync::mpsc::channel(1);
    requests.send(oip::encode_request(&sent)).await.unwrap();
    let mut stream = streams.model_stream_infer(ReceiverStream::new(open)).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().error_message, "");

    pod.trust(&[]);
    pod.assert_metric("spillway_identity_reloads_total{outcome=\"accepted\"} 2").await;
    let status = live(&mut leaves).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::PermissionDenied, "untrusted"));
    requests.send(oip::encode_request(&sent)).await.unwrap();
    let status = timeout(SOON, stream.message()).await.expect("an answer").unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::PermissionDenied, "untrusted"));
    pod.assert_metric("spillway_sidecar_calls_refused_total{reason=\"untrusted\"} 1").await;
    live(&mut stays).await.unwrap();
    drop((stream, streams));
    pod.assert_metric("spillway_sidecar_connections_open 1").await;
    assert!(live(&mut leaves).await.is_err(), "a new connection is not let in");
}

/// A call of the feature service whose rows never come.
async fn put_without_rows(channel: &mut Channel) -> http::Response<tonic::body::Body> {
    let rows = StreamBody::new(futures_util::stream::pending::<Result<Frame<Bytes>, Status>>());
    let call = http::Request::post("http://sidecar/spillway.feature.v1.FeatureService/Put")
        .header("content-type", "application/grpc")
        .body(tonic::body::Body::new(rows));
    let answer = channel.ready().await.unwrap().call(call.unwrap());
    timeout(SOON, answer).await.expect("an answer without waiting for the rows").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feature_service_refuses_strangers_before_their_rows_and_ends_their_connections() {
    let pod = pod().await;
    let strangers = [
        "spiffe://spillway.test/region/us/gateway/gw-0",
        "spiffe://spillway.test/region/eu/control/c-0",
        "spiffe://spillway.test/region/eu/sidecar/scorers/pod-1",
        "spiffe://spillway.test/tenant/acme/client/web",
    ];
    let mut open = Vec::new();
    for stranger in strangers {
        let mut channel = pod.connect(stranger).await;
        let answer = put_without_rows(&mut channel).await;
        let header = |name: &str| answer.headers().get(name).unwrap().to_str().unwrap().to_owned();
        assert_eq!((header("grpc-status"), header("spillway-error")), ("7".into(), "permission-denied".into()));
        open.push(channel);
    }
    pod.assert_metric("spillway_sidecar_calls_refused_total{reason=\"permission-denied\"} 4").await;
    pod.assert_metric("spillway_sidecar_connections_open 0").await;

    // A loader may write features and ask for no inference; it keeps its connection for the one.
    let loader = pod.connect("spiffe://spillway.test/region/eu/loader/one").await;
    let status = live(&mut Client::new(loader.clone())).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::PermissionDenied, "not-a-gateway"));
    FeatureServiceClient::new(loader.clone()).put(PutRequest::default()).await.unwrap();
    pod.assert_metric("spillway_sidecar_connections_open 1").await;
    drop(loader);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_says_how_many_streams_and_how_large_heads_it_takes() {
    let pod = pod().await;
    let mut connection = pod.raw(GATEWAY).await;
    let empty_settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    connection.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &empty_settings[..]].concat()).await.unwrap();
    // RFC 9113, sections 4.1 and 6.5: the server's first frame is its settings, six bytes each.
    let mut head = [0; 9];
    connection.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "SETTINGS");
    let mut settings = vec![0; usize::from(head[2])];
    connection.read_exact(&mut settings).await.unwrap();
    let value = |id: u8| {
        let setting = settings.chunks(6).find(|setting| setting[..2] == [0, id]).expect("the setting is said");
        u32::from_be_bytes(setting[2..].try_into().unwrap())
    };
    let (most_streams, largest_head) = (value(3), value(6));
    assert_eq!((most_streams, largest_head), (1_024, 16 << 10));

    let mut gateway = pod.gateway().await;
    let mut large = Request::new(ServerLiveRequest {});
    large.metadata_mut().insert("x-large", "x".repeat(20 << 10).parse().unwrap());
    assert!(timeout(SOON, gateway.server_live(large)).await.expect("an answer").is_err());
    live(&mut gateway).await.unwrap();
}
