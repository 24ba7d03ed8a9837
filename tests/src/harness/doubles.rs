//! Doubles of what misbehaves on command: a Triton that answers wrongly, a pod that only shakes hands.

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use parking_lot::Mutex;
use rustls::NamedGroup;
use spillway_proto::inference::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::model_metadata_response::TensorMetadata;
use spillway_proto::inference::*;
use spillway_runtime::tls::Workload;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::inference::{Case, FEATURES, cases, feature_bytes};

/// How the double answers `ModelInfer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Right,
    /// Another request's id.
    WrongId,
    /// One row too many.
    WrongShape,
    WrongDatatype,
    /// Fewer bytes than the shape says.
    WrongLength,
    /// An output that nobody asked for in place of the score.
    WrongName,
    Late(Duration),
    /// So many requests at a time, each for so long; the others wait.
    Busy {
        at_once: usize,
        each: Duration,
    },
    Fails,
}

/// What a request carried.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub traceparent: Option<String>,
    pub grpc_timeout: Option<String>,
    pub rows: usize,
}

/// A model of the double that answers its BF16 input `x`: Triton's python backend cannot carry this datatype.
pub const ECHO_BF16: &str = "echo-bf16";

/// A model server for `phishing` that knows the scores of the expected cases, and for [`ECHO_BF16`].
pub struct TritonDouble {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    manner: Mutex<Manner>,
    seen: Mutex<Vec<Seen>>,
    cases: Vec<Case>,
    places: Semaphore,
}

impl TritonDouble {
    pub fn start() -> Self {
        let incoming = TcpIncoming::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a free port");
        let address = incoming.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            manner: Mutex::new(Manner::Right),
            seen: Mutex::default(),
            cases: cases(),
            places: Semaphore::new(0),
        });
        let service = GrpcInferenceServiceServer::from_arc(shared.clone());
        let task = tokio::spawn(async move {
            let served = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
            served.await.expect("the double serves");
        });
        Self { address, shared, task }
    }

    pub fn set(&self, manner: Manner) {
        if let Manner::Busy { at_once, .. } = manner {
            self.shared.places.add_permits(at_once);
        }
        *self.shared.manner.lock() = manner;
    }

    /// The inference requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().clone()
    }
}

impl Drop for TritonDouble {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn score(&self, row: &[u8]) -> f32 {
        let known = self.cases.iter().find(|case| feature_bytes(std::slice::from_ref(case)) == row);
        known.map_or(0.5, |case| case.score)
    }
}

fn echo(request: ModelInferRequest) -> ModelInferResponse {
    let outputs = request.inputs.into_iter().map(|input| InferOutputTensor {
        name: input.name,
        datatype: input.datatype,
        shape: input.shape,
        ..InferOutputTensor::default()
    });
    ModelInferResponse {
        model_name: request.model_name,
        model_version: "1".into(),
        id: request.id,
        outputs: outputs.collect(),
        raw_output_contents: request.raw_input_contents,
        ..ModelInferResponse::default()
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

#[tonic::async_trait]
impl GrpcInferenceService for Shared {
    type ModelStreamInferStream = Answers;

    async fn model_statistics(
        &self,
        _: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: true }))
    }

    async fn model_ready(&self, _: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        Ok(Response::new(ModelReadyResponse { ready: true }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse { name: "double".into(), ..ServerMetadataResponse::default() }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let tensor = |name: &str, width: usize| TensorMetadata {
            name: name.into(),
            datatype: "FP32".into(),
            shape: vec![-1, i64::try_from(width).expect("a width")],
        };
        let name = request.into_inner().name;
        let (inputs, outputs) = if name == ECHO_BF16 {
            let x = TensorMetadata { name: "x".into(), datatype: "BF16".into(), shape: vec![-1] };
            (vec![x.clone()], vec![x])
        } else {
            (vec![tensor("features", FEATURES)], vec![tensor("score", 1)])
        };
        let (versions, platform) = (vec!["1".into()], "double".into());
        Ok(Response::new(ModelMetadataResponse { name, versions, platform, inputs, outputs }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let text = |name| request.metadata().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (traceparent, grpc_timeout) = (text("traceparent"), text("grpc-timeout"));
        let request = request.into_inner();
        if request.model_name == ECHO_BF16 {
            return Ok(Response::new(echo(request)));
        }
        let raw = request.raw_input_contents.first().cloned().unwrap_or_default();
        let mut scores: Vec<f32> = raw.chunks_exact(FEATURES * 4).map(|row| self.score(row)).collect();
        self.seen.lock().push(Seen { traceparent, grpc_timeout, rows: scores.len() });
        let manner = *self.manner.lock();
        match manner {
            Manner::Late(time) => tokio::time::sleep(time).await,
            Manner::Busy { each, .. } => {
                let _place = self.places.acquire().await.map_err(|_| Status::unavailable("the double ends"))?;
                tokio::time::sleep(each).await;
            }
            Manner::Fails => return Err(Status::internal("the double fails as told")),
            Manner::WrongShape => scores.push(0.25),
            _ => {}
        }
        let mut bytes: Vec<u8> = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
        if manner == Manner::WrongLength {
            bytes.pop();
        }
        let output = InferOutputTensor {
            name: if manner == Manner::WrongName { "other" } else { "score" }.into(),
            datatype: if manner == Manner::WrongDatatype { "INT32" } else { "FP32" }.into(),
            shape: vec![i64::try_from(scores.len()).expect("a size"), 1],
            ..InferOutputTensor::default()
        };
        Ok(Response::new(ModelInferResponse {
            model_name: request.model_name,
            model_version: "1".into(),
            id: if manner == Manner::WrongId { "somebody-else".into() } else { request.id },
            outputs: vec![output],
            raw_output_contents: vec![bytes.into()],
            ..ModelInferResponse::default()
        }))
    }

    async fn model_stream_infer(&self, _: Request<Streaming<ModelInferRequest>>) -> Result<Response<Answers>, Status> {
        Err(Status::unimplemented("the double does not stream"))
    }
}

/// A TLS server with a pod's identity that completes handshakes and remembers their key exchange.
pub struct Handshakes {
    pub address: SocketAddr,
    groups: Arc<Mutex<Vec<NamedGroup>>>,
    task: JoinHandle<()>,
}

impl Handshakes {
    pub async fn listen(address: SocketAddr, workload: &Workload) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let acceptor = tokio_rustls::TlsAcceptor::from(workload.server_config());
        let groups = Arc::new(Mutex::new(Vec::new()));
        let noted = groups.clone();
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                if let Ok(stream) = acceptor.accept(tcp).await
                    && let Some(group) = stream.get_ref().1.negotiated_key_exchange_group()
                {
                    noted.lock().push(group.name());
                }
            }
        });
        Self { address, groups, task }
    }

    pub fn groups(&self) -> Vec<NamedGroup> {
        self.groups.lock().clone()
    }
}

impl Drop for Handshakes {
    fn drop(&mut self) {
        self.task.abort();
    }
}
