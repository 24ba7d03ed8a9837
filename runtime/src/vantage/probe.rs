//! One probe: TLS, then a synthetic inference for each tier-1 model, all over one connection of its own.
//!
//! The rule: what a client would call an answer is good, and the worst of the answers counts.
//!
//! | what comes back                                                    | outcome    |
//! |--------------------------------------------------------------------|------------|
//! | an answer as the model's manifest promises, of that region          | good       |
//! | `RESOURCE_EXHAUSTED`, a code of overload, an answer of level 3 or 4 | overloaded |
//! | connection refused or reset                                        | refused    |
//! | anything else, or nothing in time                                  | failed     |
//! | `NOT_FOUND`, `INVALID_ARGUMENT`                                    | not judged |
//!
//! The last ones are said by a gateway that has another version of the Snapshot than we have, as long as a change
//! rolls. It would be wrong to take a region out for that. Where no model could be asked, it is asked whether it is
//! ready.

use std::error::Error;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::iter;
use futures_util::{FutureExt, StreamExt};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::BodyExt;
use prost::Message;
use spillway_core::deadline::format_grpc_timeout;
use spillway_core::health::Outcome;
use spillway_core::inference::{Limits, check_answer};
use spillway_proto::inference::{ServerReadyRequest, ServerReadyResponse};
use tokio::time::{Instant, timeout_at};
use tonic::Code;

use super::target::{Asked, Target};
use crate::forwarding::PROBE;
use crate::oip;
use crate::upstream::{ConnectError, OipBody, Upstream, UpstreamBody, UpstreamError};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const READY: &str = "/inference.GRPCInferenceService/ServerReady";
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const ERROR: HeaderName = HeaderName::from_static("spillway-error");
const REGION: HeaderName = HeaderName::from_static("spillway-region");
const DEGRADED: &str = "spillway-degraded";
/// The `spillway-error` codes of who has too much to do.
const OVERLOAD: [&str; 4] = ["overloaded", "pods-busy", "model-overloaded", "lowest-class"];
/// Models that are asked at a time.
const AT_A_TIME: usize = 8;
/// Compression flag and length before a gRPC message.
const PREFIX: usize = 5;

/// How a probe ended.
#[derive(Debug)]
pub(super) struct Probed {
    pub(super) outcome: Outcome,
    /// What is wrong, for the log; empty where nothing is.
    pub(super) why: &'static str,
    pub(super) took: Duration,
}

/// One answer; none is not judged.
type Heard = (Option<Outcome>, &'static str);

const GOOD: Heard = (Some(Outcome::Good), "");

pub(super) async fn probe(target: &Target, upstream: &Upstream, timeout: Duration) -> Probed {
    let began = Instant::now();
    let deadline = began + timeout;
    let heard = timeout_at(deadline, ask(target, upstream, deadline)).await;
    let (outcome, why) = heard.unwrap_or((Outcome::Failed, "no answer in time"));
    Probed { outcome, why, took: began.elapsed() }
}

async fn ask(target: &Target, upstream: &Upstream, deadline: Instant) -> (Outcome, &'static str) {
    if let Err(error) = upstream.connect().await {
        return lost(&error);
    }
    let answers: Vec<_> = target.asked.iter().map(|asked| infer(target, asked, upstream, deadline).boxed()).collect();
    let mut answers = iter(answers).buffer_unordered(AT_A_TIME);
    let mut worst: Option<(Outcome, &'static str)> = None;
    while let Some((outcome, why)) = answers.next().await {
        let heard = outcome.map(|outcome| (outcome, why));
        worst = worst.into_iter().chain(heard).max_by_key(|(outcome, _)| *outcome);
    }
    match worst {
        Some(worst) => worst,
        None => ready(target, upstream, deadline).await,
    }
}

async fn infer(target: &Target, asked: &Asked, upstream: &Upstream, deadline: Instant) -> Heard {
    let message = match call(target, upstream, INFER, OipBody::segments(asked.frame.clone()), deadline).await {
        Ok(message) => message,
        Err(heard) => return heard,
    };
    let Ok(response) = oip::decode_response_message(message, &Limits::OF_SIDECARS) else {
        return (Some(Outcome::Failed), "its answer cannot be read");
    };
    // `3 …` and `4 …`: no pod gave it.
    if response.parameters.text(DEGRADED).is_some_and(|degraded| degraded.starts_with(['3', '4'])) {
        return (Some(Outcome::Overloaded), "no pod gave its answer");
    }
    match check_answer(&asked.model, &asked.request, &response, None) {
        Ok(()) => GOOD,
        Err(_) => (Some(Outcome::Failed), "its answer is not what the model's manifest promises"),
    }
}

async fn ready(target: &Target, upstream: &Upstream, deadline: Instant) -> (Outcome, &'static str) {
    let mut frame = BytesMut::zeroed(PREFIX);
    frame.extend_from_slice(&ServerReadyRequest {}.encode_to_vec());
    match call(target, upstream, READY, frame.freeze().into(), deadline).await {
        Ok(message) => match ServerReadyResponse::decode(message) {
            Ok(ServerReadyResponse { ready: true }) => (Outcome::Good, ""),
            Ok(ServerReadyResponse { ready: false }) => (Outcome::Failed, "it is not ready"),
            Err(_) => (Outcome::Failed, "its answer cannot be read"),
        },
        Err((outcome, why)) => (outcome.unwrap_or(Outcome::Failed), why),
    }
}

/// The message of a good answer, without its prefix.
async fn call(
    target: &Target,
    upstream: &Upstream,
    path: &'static str,
    body: OipBody,
    deadline: Instant,
) -> Result<Bytes, Heard> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(path);
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.insert(PROBE, HeaderValue::from_static("1"));
    let left = format_grpc_timeout(deadline.saturating_duration_since(Instant::now()));
    if let Ok(timeout) = HeaderValue::from_maybe_shared(Bytes::from(left)) {
        headers.insert(GRPC_TIMEOUT, timeout);
    }
    let failed = |error: &UpstreamError| {
        let (outcome, why) = lost(error);
        (Some(outcome), why)
    };
    let response = upstream.call_by(request, deadline.into_std()).await.map_err(|error| failed(&error))?;
    let (head, body) = response.into_parts();
    if !head.status.is_success() {
        return Err((Some(Outcome::Failed), "it answered with an HTTP error"));
    }
    if head.headers.get(REGION).is_some_and(|region| region != target.region.as_str()) {
        return Err((Some(Outcome::Failed), "another region answered for it"));
    }
    let (frame, trailers) = read(body).await.map_err(|error| match error {
        ReadError::Lost(error) => failed(&error),
        ReadError::TooLarge => (Some(Outcome::Failed), "its answer is too large"),
    })?;
    check_status(trailers.as_ref().unwrap_or(&head.headers), &head.headers)?;
    let length = frame.get(1..PREFIX).and_then(|length| length.try_into().ok()).map(u32::from_be_bytes);
    let whole = length.is_some_and(|length| usize::try_from(length) == Ok(frame.len() - PREFIX));
    if whole && frame.first() == Some(&0) {
        Ok(frame.slice(PREFIX..))
    } else {
        Err((Some(Outcome::Failed), "its answer cannot be read"))
    }
}

enum ReadError {
    Lost(UpstreamError),
    TooLarge,
}

async fn read(mut body: UpstreamBody) -> Result<(Bytes, Option<HeaderMap>), ReadError> {
    let (mut frame, mut trailers) = (BytesMut::new(), None);
    while let Some(piece) = body.frame().await {
        match piece.map_err(ReadError::Lost)?.into_data() {
            Ok(data) if frame.len() + data.len() > Limits::OF_SIDECARS.message() => return Err(ReadError::TooLarge),
            Ok(data) => frame.extend_from_slice(&data),
            Err(piece) => trailers = piece.into_trailers().ok(),
        }
    }
    Ok((frame.freeze(), trailers))
}

fn check_status(trailers: &HeaderMap, head: &HeaderMap) -> Result<(), Heard> {
    let Some(status) = trailers.get(GRPC_STATUS) else {
        return Err((Some(Outcome::Failed), "its answer has no status"));
    };
    let code = trailers.get(ERROR).or_else(|| head.get(ERROR));
    let is_overload = code.is_some_and(|code| OVERLOAD.iter().any(|known| code == known));
    match Code::from_bytes(status.as_bytes()) {
        Code::Ok => Ok(()),
        Code::ResourceExhausted => Err((Some(Outcome::Overloaded), "it has too much to do")),
        Code::Unavailable if is_overload => Err((Some(Outcome::Overloaded), "it has too much to do")),
        Code::NotFound | Code::InvalidArgument => Err((None, "it does not know the request")),
        Code::DeadlineExceeded => Err((Some(Outcome::Failed), "no answer in time")),
        Code::Unavailable => Err((Some(Outcome::Failed), "it cannot serve the model")),
        _ => Err((Some(Outcome::Failed), "it answered with an error")),
    }
}

/// What it means that there is no answer.
fn lost(error: &UpstreamError) -> (Outcome, &'static str) {
    let reset = match error {
        UpstreamError::Unreachable(error) => match &**error {
            ConnectError::Tcp(error) | ConnectError::Tls(error) => is_reset(error),
            ConnectError::Http(error) => is_reset(error),
            ConnectError::Timeout | ConnectError::Protocol | ConnectError::Closed | ConnectError::GivenUp => false,
        },
        UpstreamError::Lost(error) => is_reset(error),
        UpstreamError::Refused | UpstreamError::Deadline { .. } => false,
    };
    if reset {
        return (Outcome::Refused, "the connection was refused or reset");
    }
    let why = match error {
        UpstreamError::Unreachable(_) => "no connection",
        UpstreamError::Deadline { .. } => "no answer in time",
        UpstreamError::Refused | UpstreamError::Lost(_) => "the connection was lost",
    };
    (Outcome::Failed, why)
}

/// Whether a reset, which nobody but the other machine sends, is what it comes from.
fn is_reset(error: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset};
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(error.kind(), ConnectionRefused | ConnectionReset | ConnectionAborted | BrokenPipe)
        {
            return true;
        }
        next = error.source();
    }
    false
}
