//! Answers that need no pod: health, server and model metadata.

use pingora_core::protocols::http::ServerSession;
use prost::Message;
use spillway_core::inference::{ModelMetadata, ServerMetadata, json};
use spillway_core::resource::Action;
use spillway_proto::inference as proto;
use spillway_runtime::oip::{self, FRAME_HEADER};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::answer::Reply;
use crate::edge::Asking;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::infer::find;
use crate::request::body;
use crate::request::route::GrpcMethod;
use crate::shared::Shared;

/// A metadata request is a name and a version.
pub const MAX_MESSAGE: usize = 4 << 10;
/// What `/v2` says is spoken beyond the protocol's core.
const EXTENSIONS: [&str; 3] = ["binary_tensor_data", "parameters", "schedule_policy"];
const INFERENCE_SERVICE: &str = "inference.GRPCInferenceService";

fn server() -> ServerMetadata {
    ServerMetadata {
        name: "spillway".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        extensions: EXTENSIONS.map(str::to_owned).to_vec(),
    }
}

pub fn live() -> Reply {
    Reply::Json(json::live(true))
}

/// The status says it too: that is what load balancers look at.
pub fn ready(shared: &Shared) -> Result<Reply, Refusal> {
    if shared.is_ready() { Ok(Reply::Json(json::ready(true))) } else { Err(Refusal::NotReady) }
}

pub fn server_metadata() -> Reply {
    Reply::Json(json::server_metadata(&server()))
}

pub fn model_metadata(asking: &Asking, exchange: &mut Exchange, model: &str, version: &str) -> Result<Reply, Refusal> {
    let found = find(asking, exchange, model, version, Action::Metadata)?;
    Ok(Reply::Json(json::model_metadata(&ModelMetadata::of(model, &found))))
}

pub fn model_ready(asking: &Asking, exchange: &mut Exchange, model: &str, version: &str) -> Result<Reply, Refusal> {
    if is_model_ready(asking, exchange, model, version)? {
        Ok(Reply::Json(json::model_ready(model, true)))
    } else {
        Err(Refusal::NotReady)
    }
}

/// A model is ready here if a pod that serves it answered its last check.
fn is_model_ready(asking: &Asking, exchange: &mut Exchange, model: &str, version: &str) -> Result<bool, Refusal> {
    find(asking, exchange, model, version, Action::Metadata)?;
    Ok(asking.fleet.lane(model).is_some_and(|lane| lane.pool.any_serving()))
}

/// The small gRPC methods.
pub async fn grpc(
    shared: &Shared,
    session: &mut ServerSession,
    exchange: &mut Exchange,
    asking: &Asking,
    method: GrpcMethod,
) -> Result<Reply, Refusal> {
    asking.head.check_uncompressed()?;
    let frame = body::read(session, exchange, &asking.head, MAX_MESSAGE).await?;
    exchange.received = frame.len();
    let message = body::message(&frame)?;
    let invalid =
        |_| Refusal::Invalid(spillway_core::inference::InvalidRequest::Protobuf("the message cannot be read".into()));
    Ok(match method {
        GrpcMethod::ServerLive => framed(&proto::ServerLiveResponse { live: true }),
        GrpcMethod::ServerReady => framed(&proto::ServerReadyResponse { ready: shared.is_ready() }),
        GrpcMethod::ServerMetadata => framed(&oip::encode_server_metadata(&server())),
        GrpcMethod::ModelReady => {
            let asked = proto::ModelReadyRequest::decode(message).map_err(invalid)?;
            let ready = is_model_ready(asking, exchange, &asked.name, &asked.version)?;
            framed(&proto::ModelReadyResponse { ready })
        }
        GrpcMethod::ModelMetadata => {
            let asked = proto::ModelMetadataRequest::decode(message).map_err(invalid)?;
            let found = find(asking, exchange, &asked.name, &asked.version, Action::Metadata)?;
            framed(&oip::encode_model_metadata(&ModelMetadata::of(&asked.name, &found)))
        }
        GrpcMethod::HealthCheck => {
            let asked = HealthCheckRequest::decode(message).map_err(invalid)?;
            if !matches!(asked.service.as_str(), "" | INFERENCE_SERVICE) {
                return Err(Refusal::UnknownService);
            }
            let status = if shared.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
            framed(&HealthCheckResponse { status: status as i32 })
        }
        // A watch would hold a stream for as long as a client likes; checks are cheap.
        GrpcMethod::HealthWatch => return Err(Refusal::NotImplemented),
        // Both have their own modules.
        GrpcMethod::ModelInfer | GrpcMethod::ModelStreamInfer => return Err(Refusal::NotImplemented),
    })
}

fn framed(message: &impl Message) -> Reply {
    Reply::Grpc(vec![frame(message)])
}

/// A length-prefixed message.
pub fn frame(message: &impl Message) -> bytes::Bytes {
    let length = message.encoded_len();
    let mut frame = Vec::with_capacity(FRAME_HEADER + length);
    frame.push(0);
    // Messages made here are far below 4 GiB.
    frame.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(&message.encode_to_vec());
    frame.into()
}
