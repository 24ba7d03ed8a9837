//! What happens to connections and streams over time: certificates that end, roots that go, drains.

mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use spillway_core::identity::TrustDomain;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::*;
use spillway_runtime::authority::Authority;
use support::*;

const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
const HEADERS: [(&str, &str); 2] = [("content-type", "application/grpc"), ("te", "trailers")];

fn request(model: &str, id: &str, entity: &str) -> Bytes {
    let entity = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(entity.into())) };
    frame(&ModelInferRequest {
        model_name: model.into(),
        id: id.into(),
        parameters: [("entity_id".to_owned(), entity)].into(),
        inputs: vec![InferInputTensor {
            name: "x".into(),
            datatype: "FP32".into(),
            shape: vec![1],
            ..Default::default()
        }],
        raw_input_contents: vec![Bytes::copy_from_slice(&1.0_f32.to_le_bytes())],
        ..Default::default()
    })
}

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
    let mut headers = HEADERS.to_vec();
    headers.push(("grpc-timeout", "1S"));
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

/// The answers on a stream, until its end.
struct Answers {
    incoming: h2::RecvStream,
    buffer: Vec<u8>,
}

impl Answers {
    async fn next(&mut self) -> Option<ModelStreamInferResponse> {
        loop {
            if let Some(length) = self.buffer.get(1..5) {
                let whole = 5 + u32::from_be_bytes(length.try_into().unwrap()) as usize;
                if self.buffer.len() >= whole {
                    let frame: Vec<u8> = self.buffer.drain(..whole).collect();
                    return Some(prost::Message::decode(&frame[5..]).unwrap());
                }
            }
            let data = tokio::time::timeout(Duration::from_secs(10), self.incoming.data()).await.expect("an answer")?;
            let data = data.ok()?;
            self.incoming.flow_control().release_capacity(data.len()).unwrap();
            self.buffer.extend_from_slice(&data);
        }
    }

    async fn status(&mut self) -> (String, String) {
        let trailers = self.incoming.trailers().await.unwrap().unwrap();
        let text = |name: &str| trailers.get(name).map_or(String::new(), |value| value.to_str().unwrap().to_owned());
        (text("grpc-status"), text("spillway-error"))
    }
}

async fn open(http2: &Http2, headers: &[(&str, &str)], first: Bytes) -> (h2::SendStream<Bytes>, Answers) {
    let mut all = HEADERS.to_vec();
    all.extend_from_slice(headers);
    let mut send = http2.send.clone().ready().await.unwrap();
    let (response, mut stream) = send.send_request(Http2::request("POST", STREAM, &all), false).unwrap();
    stream.send_data(first, false).unwrap();
    let response = tokio::time::timeout(Duration::from_secs(10), response).await.expect("a head").unwrap();
    assert_eq!(response.status(), 200);
    (stream, Answers { incoming: response.into_body(), buffer: Vec::new() })
}

#[tokio::test]
async fn a_stream_answers_each_request_and_tells_of_bad_ones() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[], request("double", "0", "a")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    for index in 1..50 {
        stream.send_data(request("double", &index.to_string(), "a"), false).unwrap();
    }
    for index in 1..50 {
        assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, index.to_string());
    }
    // A request that is not valid is told of; the stream goes on.
    stream.send_data(request("unknown", "bad", "a"), false).unwrap();
    let told = answers.next().await.unwrap();
    assert_eq!(told.infer_response.unwrap().id, "bad");
    assert!(told.error_message.contains("no model 'unknown'"), "{}", told.error_message);
    // Half a request, then the rest.
    let whole = request("double", "halved", "a");
    stream.send_data(whole.slice(..7), false).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    stream.send_data(whole.slice(7..), true).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "halved");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("0".into(), String::new()));
    assert_eq!(world.seen().len(), 51);
    let pods: std::collections::BTreeSet<String> = world.seen().into_iter().map(|seen| seen.pod).collect();
    assert_eq!(pods.len(), 1, "one stream, one pod");
    world.stop().await;
}

#[tokio::test]
async fn a_stream_ends_where_it_is_not_allowed_and_with_its_deadline() {
    let world = World::start().await;
    let globex = Http2::connect(world.gateway.https, &world.client("globex")).await.unwrap();
    let grpc = Grpc::call(&globex, STREAM, &[], request("double", "0", "a")).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (7, "not-allowed"));
    assert!(world.seen().is_empty());

    let http2 = world.http2().await;
    let (_stream, mut answers) = open(&http2, &[("grpc-timeout", "300m")], request("double", "0", "a")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("4".into(), "deadline-exceeded".into()));
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_resets_its_stream_resets_the_pods() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[("x-request-id", "reset-1")], request("double", "0", "hangs")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    stream.send_reset(h2::Reason::CANCEL);
    until("the pod is told", async || world.sidecars.iter().any(|sidecar| sidecar.cancelled() == 1)).await;
    assert_eq!(world.logged("reset-1").await["cancelled"], true);
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
