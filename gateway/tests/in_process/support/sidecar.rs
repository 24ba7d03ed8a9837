//! A stand-in for the sidecar: doubles what it gets, and does what the entity's name says.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use parking_lot::Mutex;
use spillway_proto::inference::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::*;
use spillway_runtime::tls::{Offer, Workload, accept};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tonic::body::Body;
use tonic::{Code, Request, Response, Status, Streaming};

/// When the stand-in tells of a deadline: after that of the model `brief`, 300 ms.
const LATE: Duration = Duration::from_millis(500);

/// Entities of such names are answered without features, as well as can be: a cache may keep that.
pub const PLAIN: &str = "plain";

/// Entities of such names are answered from features, fresh for a minute; the answer says which changes it
/// knows of.
pub const ROWS: &str = "rows";

/// What an entity's name says when it ends so: that its answers take a while.
pub const SLOW: &str = "slow";

/// How a sidecar answers inference calls.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Manner {
    /// As the entity's name says.
    #[default]
    Well,
    /// The same, so much later.
    Slow(Duration),
    /// Not at all.
    Hangs,
    /// The stream is reset.
    Resets,
    /// A gRPC status that is no number.
    Garbage,
    /// A frame that is no message.
    Nonsense,
    /// An HTTP status, and no gRPC.
    Http(u16),
    /// A gRPC status at once, with its `spillway-error`.
    Refuses(Code, &'static str),
}

/// One request as a sidecar saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub pod: String,
    pub metadata: HeaderMap,
    pub message: ModelInferRequest,
}

pub struct Sidecar {
    pub name: String,
    pub address: SocketAddr,
    state: Arc<State>,
    /// Its own, so that its end closes every connection.
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Default)]
struct State {
    pod: String,
    seen: Mutex<Vec<Seen>>,
    cancelled: AtomicUsize,
    calls: AtomicUsize,
    streams: AtomicUsize,
    manner: Mutex<Manner>,
    /// What it says of its load.
    load: Mutex<Option<&'static str>>,
    capacity: Mutex<Option<Capacity>>,
    /// The feature changes that it knows of; 0: it does not hear.
    sequence: AtomicU64,
}

/// So many unary calls at a time, each of which takes so long.
#[derive(Clone)]
struct Capacity {
    places: Arc<Semaphore>,
    takes: Duration,
}

struct CountDrop(Arc<State>, bool);

impl Drop for CountDrop {
    fn drop(&mut self) {
        if self.1 {
            self.0.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Sidecar {
    pub async fn start_at(name: &str, workload: Arc<Workload>, listener: std::net::TcpListener) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State { pod: name.to_owned(), ..State::default() });
        let entered = runtime.enter();
        let listener = TcpListener::from_std(listener).unwrap();
        drop(entered);
        let incoming = futures_util::stream::unfold((listener, workload), |(listener, workload)| async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                if let Ok(accepted) = accept(&workload, tcp, Offer::H2, Duration::from_secs(5)).await {
                    return Some((Ok::<_, std::io::Error>(accepted.stream), (listener, workload)));
                }
            }
        });
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<GrpcInferenceServiceServer<Service>>().await;
        let service = GrpcInferenceServiceServer::new(Service(state.clone())).max_decoding_message_size(64 << 20);
        let service = Mannered { service, state: state.clone() };
        runtime.spawn(async move {
            let router = tonic::transport::Server::builder().add_service(health).add_service(service);
            router.serve_with_incoming(incoming).await.unwrap();
        });
        Self { name: name.to_owned(), address, state, runtime: Some(runtime) }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().clone()
    }

    /// What it has seen so far is gone.
    pub fn forget(&self) {
        self.state.seen.lock().clear();
    }

    /// It has heard of the feature changes up to this one.
    pub fn hears(&self, sequence: u64) {
        self.state.sequence.store(sequence, Ordering::SeqCst);
    }

    pub fn cancelled(&self) -> usize {
        self.state.cancelled.load(Ordering::SeqCst)
    }

    /// Inference calls that came, answered or not, a stream as one.
    pub fn calls(&self) -> usize {
        self.state.calls.load(Ordering::SeqCst)
    }

    /// Streams that came, answered or not.
    pub fn streams(&self) -> usize {
        self.state.streams.load(Ordering::SeqCst)
    }

    pub fn behave(&self, manner: Manner) {
        *self.state.manner.lock() = manner;
    }

    /// Says this of its load in the trailers of every answer from now on.
    pub fn report(&self, load: &'static str) {
        *self.state.load.lock() = Some(load);
    }

    /// From now on it serves `places` unary calls at a time, each for `takes`; more of them wait.
    pub fn slow_down(&self, places: usize, takes: Duration) {
        *self.state.capacity.lock() = Some(Capacity { places: Arc::new(Semaphore::new(places)), takes });
    }

    /// Dies: the port refuses from now on.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The service, with what tonic cannot say by itself.
#[derive(Clone)]
struct Mannered {
    service: GrpcInferenceServiceServer<Service>,
    state: Arc<State>,
}

impl tonic::server::NamedService for Mannered {
    const NAME: &'static str = "inference.GRPCInferenceService";
}

impl tonic::codegen::Service<http::Request<Body>> for Mannered {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        tonic::codegen::Service::<http::Request<Body>>::poll_ready(&mut self.service, context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let streams = usize::from(request.uri().path() == super::STREAM);
        let (answer, state) = (self.service.call(request), self.state.clone());
        Box::pin(async move {
            let manner = *state.manner.lock();
            state.calls.fetch_add(1, Ordering::SeqCst);
            state.streams.fetch_add(streams, Ordering::SeqCst);
            let mut counted = CountDrop(state.clone(), true);
            match manner {
                Manner::Well => {}
                Manner::Slow(time) => tokio::time::sleep(time).await,
                Manner::Hangs => std::future::pending().await,
                _ => {
                    counted.1 = false;
                    return Ok(misbehave(manner));
                }
            }
            counted.1 = false;
            let answer = answer.await?;
            let Some(load) = *state.load.lock() else { return Ok(answer) };
            let trailers = HeaderMap::from_iter([(LOAD, HeaderValue::from_static(load))]);
            Ok(answer.map(|body| Body::new(body.with_trailers(std::future::ready(Some(Ok(trailers)))))))
        })
    }
}

const LOAD: HeaderName = HeaderName::from_static("endpoint-load-metrics");

fn misbehave(manner: Manner) -> http::Response<Body> {
    let mut answer = http::Response::new(Body::empty());
    answer.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    match manner {
        Manner::Resets => {
            let reset = futures_util::stream::iter([Err::<Frame<Bytes>, _>(Status::internal("reset"))]);
            *answer.body_mut() = Body::new(StreamBody::new(reset));
        }
        Manner::Garbage => {
            answer.headers_mut().insert("grpc-status", HeaderValue::from_static("fine"));
        }
        Manner::Nonsense => {
            let frame = Full::new(Bytes::from_static(&[0, 0, 0, 0, 3, 0xff, 0xff, 0xff]));
            let trailers = HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static("0"))]);
            *answer.body_mut() = Body::new(frame.with_trailers(std::future::ready(Some(Ok(trailers)))));
        }
        Manner::Http(status) => *answer.status_mut() = status.try_into().unwrap(),
        Manner::Refuses(code, name) => {
            answer.headers_mut().insert(GRPC_STATUS, HeaderValue::from(code as i32));
            answer.headers_mut().insert("spillway-error", HeaderValue::from_static(name));
        }
        Manner::Well | Manner::Slow(_) | Manner::Hangs => unreachable!(),
    }
    answer
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

struct Service(Arc<State>);

fn text(value: &str) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::StringParam(value.into())) }
}

fn answer(message: &ModelInferRequest, pod: &str) -> ModelInferResponse {
    let one = || Bytes::from_static(&[0, 0, 0x80, 0x3f]);
    let raw = message.raw_input_contents.last().cloned().unwrap_or_else(one);
    let doubled: Vec<u8> = raw
        .chunks_exact(4)
        .flat_map(|bytes| (f32::from_le_bytes(bytes.try_into().unwrap()) * 2.0).to_le_bytes())
        .collect();
    let shape = vec![i64::try_from(doubled.len() / 4).unwrap()];
    let (plain, rows) = (entity(message).starts_with(PLAIN), entity(message).starts_with(ROWS));
    let age = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(250)) };
    ModelInferResponse {
        model_name: message.model_name.clone(),
        model_version: "1".into(),
        id: message.id.clone(),
        parameters: [
            ("spillway-model-version".to_owned(), text("1")),
            ("spillway-region".to_owned(), text("eu")),
            ("spillway-degraded".to_owned(), text("1 stale-feature")),
            ("spillway-feature-age-ms".to_owned(), age),
            ("pod".to_owned(), text(pod)),
        ]
        .into_iter()
        .filter(|(name, _)| !(plain || rows) || name != "spillway-degraded")
        .filter(|(name, _)| !plain || name != "spillway-feature-age-ms")
        .collect(),
        outputs: vec![InferOutputTensor { name: "y".into(), datatype: "FP32".into(), shape, ..Default::default() }],
        raw_output_contents: vec![Bytes::from(doubled)],
    }
}

/// One stream.
struct Conversation {
    messages: Streaming<ModelInferRequest>,
    counted: CountDrop,
    state: Arc<State>,
    metadata: HeaderMap,
}

impl Conversation {
    async fn answer(&mut self) -> Option<ModelStreamInferResponse> {
        loop {
            let message = self.messages.message().await.ok()??;
            let seen = Seen { pod: self.state.pod.clone(), metadata: self.metadata.clone(), message: message.clone() };
            self.state.seen.lock().push(seen);
            let entity = entity(&message);
            self.counted.1 = entity == "hangs";
            let mut answer = ModelStreamInferResponse {
                infer_response: Some(answer(&message, &self.state.pod)),
                ..Default::default()
            };
            match entity.as_str() {
                "silent" => continue,
                // A sidecar tells of a deadline a little after the gateway's own clock would.
                "late" => {
                    tokio::time::sleep(LATE).await;
                    answer.error_message = "the deadline passed".into();
                }
                // The end of an answer of many parts, of which there was none.
                "none" => {
                    let last = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
                    answer.infer_response = Some(ModelInferResponse {
                        id: message.id,
                        parameters: [("triton_final_response".to_owned(), last)].into(),
                        ..Default::default()
                    });
                }
                _ => {}
            }
            return Some(answer);
        }
    }
}

fn entity(message: &ModelInferRequest) -> String {
    match message.parameters.get("entity_id").and_then(|value| value.parameter_choice.clone()) {
        Some(ParameterChoice::StringParam(text)) => text,
        _ => String::new(),
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let by_fallback = metadata.get("spillway-degrade").is_some_and(|level| level == "2");
        let seen = Seen { pod: self.0.pod.clone(), metadata: metadata.into_headers(), message: message.clone() };
        let capacity = self.0.capacity.lock().clone();
        if let Some(Capacity { places, takes }) = capacity {
            let _place = places.acquire().await.unwrap();
            tokio::time::sleep(takes).await;
        }
        self.0.seen.lock().push(seen);
        let mut timing = "features;dur=0.21, model;dur=1.02";
        let entity = entity(&message);
        match entity.as_str() {
            _ if by_fallback => {
                let mut answer = answer(&message, &self.0.pod);
                answer.parameters.insert("spillway-degraded".to_owned(), text("2 fallback-model"));
                return Ok(Response::new(answer));
            }
            "slow" => timing = "features;dur=0.21, model;dur=40",
            "fails" => {
                let mut status = Status::new(Code::Internal, "the model failed");
                status.metadata_mut().insert("spillway-error", "model-failed".parse().unwrap());
                return Err(status);
            }
            "hangs" => {
                let _counted = CountDrop(self.0.clone(), true);
                std::future::pending::<()>().await;
            }
            "missing" => {
                let mut status = Status::new(Code::FailedPrecondition, "no features: 100 % of \u{e9}");
                status.metadata_mut().insert("spillway-error", "missing-feature".parse().unwrap());
                return Err(status);
            }
            "lies" => {
                return Ok(Response::new(ModelInferResponse {
                    raw_output_contents: vec![Bytes::new(); 3],
                    ..answer(&message, "")
                }));
            }
            slow if slow.ends_with(SLOW) => tokio::time::sleep(Duration::from_millis(300)).await,
            _ => {}
        }
        let mut response = Response::new(answer(&message, &self.0.pod));
        let metadata = response.metadata_mut();
        metadata.insert("server-timing", timing.parse().unwrap());
        if entity.starts_with(ROWS) {
            metadata.insert("spillway-feature-fresh-ms", 60_000.into());
            let sequence = Some(self.0.sequence.load(Ordering::SeqCst)).filter(|sequence| *sequence > 0);
            sequence.map(|sequence| metadata.insert("spillway-feature-sequence", sequence.into()));
        }
        Ok(response)
    }

    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let (metadata, _, messages) = request.into_parts();
        let conversation = Conversation {
            messages,
            counted: CountDrop(self.0.clone(), true),
            state: self.0.clone(),
            metadata: metadata.into_headers(),
        };
        let answers = futures_util::stream::unfold(conversation, |mut conversation| async move {
            let answer = conversation.answer().await?;
            Some((Ok(answer), conversation))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn model_statistics(
        &self,
        _: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn model_ready(&self, _: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn model_metadata(
        &self,
        _: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}
