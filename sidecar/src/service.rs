//! The OIP gRPC service: translates and calls, decides nothing.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::HeaderMap;
use spillway_core::deadline::parse_grpc_timeout;
use spillway_core::identity::Role;
use spillway_core::inference::{ModelMetadata, ServerMetadata};
use spillway_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use spillway_proto::inference::{
    ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
    ModelReadyResponse, ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
};
use spillway_runtime::audit::Audit;
use spillway_runtime::oip;
use spillway_runtime::telemetry::TraceParent;
use spillway_runtime::tls::{Peer, Workload};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::audit::denial;
use crate::failure::Failure;
use crate::inference::{Context, Inference};
use crate::model::served::{Lookup, ServedModel};
use crate::stream::Session;

/// Answers of a stream that may wait for the gateway to read them.
const STREAM_BUFFER: usize = 16;
/// The longest tenant or request id that is taken over.
const LONGEST_TEXT: usize = 128;

#[derive(Clone)]
pub struct Service {
    inference: Arc<Inference>,
    workload: Arc<Workload>,
    audit: Audit,
}

impl Service {
    pub fn new(inference: Arc<Inference>, workload: Arc<Workload>, audit: Audit) -> Self {
        Self { inference, workload, audit }
    }

    fn served(&self, name: &str, version: &str) -> Result<Arc<ServedModel>, Status> {
        match self.inference.models.get(name) {
            Lookup::Served(served) if served.manifest.version(version).is_some() => Ok(served),
            Lookup::Served(_) => Err(Failure::UnknownVersion.status()),
            Lookup::NotReady => Err(Failure::NotReady.status()),
            Lookup::Unknown => Err(Failure::UnknownModel.status()),
        }
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    type ModelStreamInferStream = ReceiverStream<Result<ModelStreamInferResponse, Status>>;

    async fn server_live(&self, _request: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _request: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.inference.models.ready() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = match self.served(&name, &version) {
            Ok(_) => self.inference.models.model_ready(&name),
            Err(status) if status.code() == tonic::Code::Unavailable => false,
            Err(status) => return Err(status),
        };
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        let metadata = ServerMetadata {
            name: "spillway".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: Vec::new(),
        };
        Ok(Response::new(oip::encode_server_metadata(&metadata)))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let served = self.served(&name, &version)?;
        Ok(Response::new(oip::encode_model_metadata(&ModelMetadata::of(served.name.as_str(), &served.manifest))))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let context = context(&request);
        let (result, timing) = self.inference.infer(request.into_inner(), &context).await;
        let timing = timing.parse().ok().filter(|_| !timing.is_empty());
        match result {
            Ok(answer) => {
                let mut response = Response::new(answer);
                timing.map(|timing| response.metadata_mut().insert("server-timing", timing));
                Ok(response)
            }
            Err(failure) => {
                let mut status = failure.status();
                timing.map(|timing| status.metadata_mut().insert("server-timing", timing));
                Err(status)
            }
        }
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let context = context(&request);
        let (workload, audit, peer) = (Arc::clone(&self.workload), self.audit.clone(), peer(&request));
        let request_id = context.request_id.clone();
        let allowed = move || {
            let peer = peer.as_ref().ok_or(Failure::NotAGateway)?;
            let trusted = workload.still_trusted(peer, SystemTime::now()).map_err(Failure::Untrusted);
            trusted.inspect_err(|failure| audit.denied(|| denial(&peer.id, failure, "infer", &request_id, None)))
        };
        let (answers, stream) = mpsc::channel(STREAM_BUFFER);
        let session = Session::new(Arc::clone(&self.inference), context, answers, Box::new(allowed));
        // Owned by the stream: it ends when the client's side of the channel is dropped.
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// The peer that the accept loop put beside the request.
fn peer<T>(request: &Request<T>) -> Option<Arc<Peer>> {
    request.extensions().get::<Arc<Peer>>().cloned()
}

fn context<T>(request: &Request<T>) -> Context {
    let metadata = request.metadata();
    let gateway = match peer(request).map(|peer| peer.id.role.clone()) {
        Some(Role::Gateway { name, .. }) => name.to_string(),
        _ => String::new(),
    };
    Context {
        arrived: Instant::now(),
        grpc_timeout: metadata.get("grpc-timeout").and_then(|value| parse_grpc_timeout(value.to_str().ok()?)),
        tenant: text(metadata.as_ref(), "x-spillway-tenant"),
        request_id: text(metadata.as_ref(), "x-request-id"),
        trace: TraceParent::read(metadata.as_ref()),
        gateway,
    }
}

/// A header's value; empty if it is not there, or too long.
pub fn text(headers: &HeaderMap, key: &str) -> String {
    let value = headers.get(key).and_then(|value| value.to_str().ok());
    value.filter(|value| value.len() <= LONGEST_TEXT).unwrap_or_default().to_owned()
}
