//! One inference at Triton, on h2 itself: tensors are sent from where they lie, head and body in one write.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use spillway_core::deadline::format_grpc_timeout;
use spillway_core::inference::{InferRequest, InferResponse, Parameter};
use spillway_runtime::oip::{self, FRAME_HEADER, frame_header};
use spillway_runtime::upstream::{
    Beside, OipBody, Upstream, UpstreamBody, UpstreamError, UpstreamMetrics, UpstreamSettings,
};
use tokio::time::timeout_at;
use tonic::Status;

use super::{ANSWER_LIMITS, CONNECT_TIMEOUT, LARGEST_MESSAGE, TIMEOUT, at_deadline, fault, left, micros};
use crate::model::{Call, ModelError};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// After a failed connect. A server beside us is soon back, and an attempt costs little.
const REST: Duration = Duration::from_millis(10);
const LONGEST_REST: Duration = Duration::from_millis(100);

#[derive(Clone, Debug)]
pub(super) struct Unary(Upstream);

impl Unary {
    /// Connects with the first call.
    pub fn at(server: Beside, metrics: UpstreamMetrics) -> Self {
        let settings = UpstreamSettings {
            connect_timeout: CONNECT_TIMEOUT,
            ping_every: None,
            rest: REST,
            longest_rest: LONGEST_REST,
            ..UpstreamSettings::default()
        };
        Self(Upstream::beside(server, settings, metrics))
    }

    pub async fn infer(&self, request: &InferRequest, call: &Call) -> Result<InferResponse, ModelError> {
        let answered = async {
            let answer = self.0.call(message(request, call)?).await.map_err(|error| lost(&error, call.deadline))?;
            read(answer, call.deadline).await
        };
        timeout_at(call.deadline.into(), answered).await.unwrap_or(Err(ModelError::DeadlineExceeded))
    }
}

fn message(request: &InferRequest, call: &Call) -> Result<Request<OipBody>, ModelError> {
    let left = left(call.deadline)?;
    let mut message = Request::new(OipBody::segments(oip::frame_with(request, TIMEOUT, &Parameter::Int(micros(left)))));
    *message.method_mut() = Method::POST;
    *message.uri_mut() = Uri::from_static(INFER);
    let headers = message.headers_mut();
    headers.reserve(8);
    headers.insert(CONTENT_TYPE, GRPC);
    headers.insert(TE, TRAILERS);
    if let Ok(timeout) = HeaderValue::from_maybe_shared(Bytes::from(format_grpc_timeout(left))) {
        headers.insert(GRPC_TIMEOUT, timeout);
    }
    call.trace.write(headers);
    Ok(message)
}

/// Reads an answer to its end. Its status comes first, since only a success has a message.
async fn read(answer: Response<UpstreamBody>, deadline: Instant) -> Result<InferResponse, ModelError> {
    let (head, mut body) = answer.into_parts();
    if head.headers.contains_key(Status::GRPC_STATUS) {
        // A refusal has no message, and may be no more than this head.
        check(&head.headers, deadline)?;
    }
    match head.status {
        StatusCode::OK => {}
        // As gRPC takes them: somebody between us and Triton.
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => {
            return Err(ModelError::Unavailable(format!("it answered HTTP {}", head.status)));
        }
        other => return Err(ModelError::Failed(format!("it answered HTTP {other}"))),
    }
    let (mut whole, mut pieces, mut trailers) = (Bytes::new(), BytesMut::new(), None);
    while let Some(frame) = body.frame().await {
        match frame.map_err(|error| lost(&error, deadline))?.into_data() {
            Ok(data) if whole.len() + pieces.len() + data.len() > LARGEST_MESSAGE + FRAME_HEADER => {
                let problem = format!("it is longer than {LARGEST_MESSAGE} bytes");
                return Err(ModelError::BadAnswer(problem));
            }
            Ok(data) if whole.is_empty() && pieces.is_empty() => whole = data,
            Ok(data) => {
                if pieces.is_empty() {
                    let length = frame_header(&whole).map_or(0, |(_, length)| length.min(LARGEST_MESSAGE));
                    pieces.reserve(FRAME_HEADER + length);
                    pieces.extend_from_slice(&std::mem::take(&mut whole));
                }
                pieces.extend_from_slice(&data);
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    check(trailers.as_ref().unwrap_or(&head.headers), deadline)?;
    let whole = if pieces.is_empty() { whole } else { pieces.freeze() };
    let message = oip::message(&whole).map_err(|problem| ModelError::BadAnswer(problem.to_string()))?;
    oip::decode_response_message(message, &ANSWER_LIMITS).map_err(|problem| ModelError::BadAnswer(problem.to_string()))
}

fn check(said: &HeaderMap, deadline: Instant) -> Result<(), ModelError> {
    match Status::from_header_map(said) {
        Some(status) if status.code() == tonic::Code::Ok => Ok(()),
        Some(status) => Err(fault(&status, deadline)),
        None => Err(ModelError::BadAnswer("it has no grpc-status".into())),
    }
}

/// The connection broke or never was, or Triton reset the stream, as it does with one whose time is over.
fn lost(error: &UpstreamError, deadline: Instant) -> ModelError {
    if matches!(error, UpstreamError::Deadline { .. }) || (error.is_cancelled() && at_deadline(deadline)) {
        return ModelError::DeadlineExceeded;
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    ModelError::Unavailable(text)
}

#[cfg(test)]
#[path = "unary_tests.rs"]
mod tests;
