//! One unary call to a pod, and what its answer means.
//!
//! The rule: what goes upstream is set here and nowhere else; nothing of the client's headers is in it.
//! A call is repeated once, on another pod, and only if the first cannot have seen it.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use http_body_util::BodyExt;
use spillway_core::deadline::{SHORTEST_USEFUL, format_grpc_timeout};
use spillway_core::inference::Entities;
use spillway_runtime::telemetry::TraceParent;
use spillway_runtime::upstream::{OipBody, UpstreamBody, UpstreamError};
use tonic::Code;

use crate::answer::{ERROR, GRPC_MESSAGE, GRPC_STATUS, SERVER_TIMING, percent_decoded};
use crate::errors::{Refusal, sidecar_code};
use crate::exchange::Exchange;
use crate::pods::fleet::{PodLink, PoolLinks};
use crate::request::body::message;
use crate::request::head::REQUEST_ID;

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const TENANT: HeaderName = HeaderName::from_static("x-spillway-tenant");
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
/// Served at this level; see the sidecar.
const DEGRADE: HeaderName = HeaderName::from_static("spillway-degrade");
const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");
/// Bytes of a `spillway-error` code of a sidecar.
const MAX_CODE: usize = 64;

/// A call that is ready to be made.
pub struct PodCall<'a> {
    pub pool: &'a PoolLinks,
    pub entities: &'a Entities,
    /// The length-prefixed message, in pieces.
    pub frame: Vec<Bytes>,
    pub until: Instant,
    pub trace: TraceParent,
    /// Bytes of the answer.
    pub limit: usize,
}

/// A whole answer: one length-prefixed message, and the message in it.
pub struct PodAnswer {
    pub frame: Bytes,
    pub message: Bytes,
}

impl PodCall<'_> {
    pub async fn make(self, exchange: &mut Exchange) -> Result<PodAnswer, Refusal> {
        let mut tried: Option<&PodLink> = None;
        loop {
            let Some(link) = self.pool.pick(self.entities, rand::random(), tried) else { return Err(Refusal::NoPod) };
            let left = self.until.saturating_duration_since(Instant::now());
            if left < SHORTEST_USEFUL {
                return Err(Refusal::Deadline);
            }
            exchange.pod = Some(link.key.pod.clone());
            let request =
                request("ModelInfer", exchange, &self.trace, Some(left), OipBody::segments(self.frame.clone()));
            let error = match link.upstream.call_by(request, self.until).await {
                Ok(response) => {
                    let whole = read(response, exchange, self.limit);
                    let until = tokio::time::Instant::from_std(self.until);
                    return tokio::time::timeout_at(until, whole).await.unwrap_or(Err(Refusal::Deadline));
                }
                Err(error) => error,
            };
            let refusal = failed(link, &error, exchange);
            if tried.is_some() || !error.never_processed() || matches!(refusal, Refusal::Deadline) {
                return Err(refusal);
            }
            tried = Some(link);
            exchange.retries += 1;
            exchange.shared.metrics.retries.inc();
        }
    }
}

/// A request to a pod's `inference.GRPCInferenceService`.
pub fn request(
    method: &'static str,
    exchange: &Exchange,
    trace: &TraceParent,
    left: Option<Duration>,
    body: OipBody,
) -> Request<OipBody> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path(method);
    let headers = request.headers_mut();
    headers.reserve(8);
    headers.insert(CONTENT_TYPE, GRPC);
    headers.insert(TE, TRAILERS);
    let timeout = left.map(|left| HeaderValue::from_maybe_shared(Bytes::from(format_grpc_timeout(left))));
    if let Some(Ok(timeout)) = timeout {
        headers.insert(GRPC_TIMEOUT, timeout);
    }
    if let Some(principal) = &exchange.principal
        && let Ok(tenant) = HeaderValue::from_str(principal.tenant.as_str())
    {
        headers.insert(TENANT, tenant);
    }
    if let Some(id) = &exchange.request_id {
        headers.insert(REQUEST_ID, id.clone());
    }
    if let Some(step) = exchange.degrade {
        headers.insert(DEGRADE, HeaderValue::from(u16::from(step.number())));
    }
    trace.write(headers);
    request
}

fn path(method: &'static str) -> Uri {
    let path = match method {
        "ModelInfer" => PathAndQuery::from_static("/inference.GRPCInferenceService/ModelInfer"),
        "ModelStreamInfer" => PathAndQuery::from_static("/inference.GRPCInferenceService/ModelStreamInfer"),
        _ => PathAndQuery::from_static("/grpc.health.v1.Health/Check"),
    };
    Uri::from(path)
}

/// What a failed call means, and what it says about the pod.
pub fn failed(link: &PodLink, error: &UpstreamError, exchange: &Exchange) -> Refusal {
    let metrics = &exchange.shared.metrics;
    metrics.upstream_failed(error.reason());
    match error {
        UpstreamError::Deadline { .. } => Refusal::Deadline,
        UpstreamError::Unreachable(reason) => {
            // The next check may find it alive again; until then others come first.
            if link.health.set(false) {
                tracing::warn!(pool = %link.key.pool, pod = %link.key.pod, %reason, "pod cannot be reached");
            }
            Refusal::NoPod
        }
        UpstreamError::Refused => Refusal::NoPod,
        UpstreamError::Lost(reason) => {
            tracing::debug!(pool = %link.key.pool, pod = %link.key.pod, %reason, "call lost");
            Refusal::PodLost
        }
    }
}

/// Reads an answer to its end and judges its status.
async fn read(response: Response<UpstreamBody>, exchange: &mut Exchange, limit: usize) -> Result<PodAnswer, Refusal> {
    let (head, mut body) = response.into_parts();
    if !head.status.is_success() {
        return Err(Refusal::BadAnswer);
    }
    if let Some(timing) = head.headers.get(SERVER_TIMING) {
        exchange.making.sidecar_timing = Some(timing.clone());
    }
    let mut whole = Bytes::new();
    let mut pieces = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            exchange.shared.metrics.upstream_failed(error.reason());
            Refusal::PodLost
        })?;
        match frame.into_data() {
            Ok(data) => {
                if whole.len() + pieces.len() + data.len() > limit {
                    return Err(Refusal::BadAnswer);
                }
                exchange.keep(data.len())?;
                if whole.is_empty() && pieces.is_empty() {
                    whole = data;
                } else {
                    pieces.extend_from_slice(&std::mem::take(&mut whole));
                    pieces.extend_from_slice(&data);
                }
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    let status = trailers.as_ref().unwrap_or(&head.headers);
    if let Some(timing) = status.get(SERVER_TIMING) {
        exchange.making.sidecar_timing = Some(timing.clone());
    }
    check_status(status, &head.headers)?;
    let frame = if pieces.is_empty() { whole } else { pieces.freeze() };
    let message = message(&frame).map_err(|_| Refusal::BadAnswer)?;
    Ok(PodAnswer { frame, message })
}

/// Reads `grpc-status`; an error is passed on with the sidecar's own code and words.
pub fn check_status(trailers: &HeaderMap, head: &HeaderMap) -> Result<(), Refusal> {
    let Some(status) = trailers.get(GRPC_STATUS) else { return Err(Refusal::BadAnswer) };
    if status.as_bytes() == b"0" {
        return Ok(());
    }
    let status = Code::from_bytes(status.as_bytes());
    let code = trailers.get(ERROR).or_else(|| head.get(ERROR)).and_then(|code| code.to_str().ok());
    let code = code.filter(|code| code.len() <= MAX_CODE).map_or_else(|| default_code(status), sidecar_code);
    let message = trailers.get(GRPC_MESSAGE).map(|text| percent_decoded(text.as_bytes())).unwrap_or_default();
    Err(Refusal::Sidecar { status, code, message })
}

fn default_code(status: Code) -> Cow<'static, str> {
    let code = match status {
        Code::DeadlineExceeded => "deadline-exceeded",
        Code::Unavailable => "model-unavailable",
        Code::NotFound => "unknown-model",
        Code::InvalidArgument => "invalid-request",
        _ => "sidecar-error",
    };
    code.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(headers: &[(&'static str, &'static str)]) -> Option<(u16, String, String)> {
        let mut trailers = HeaderMap::new();
        for (name, value) in headers {
            trailers.insert(*name, HeaderValue::from_static(value));
        }
        let refusal = check_status(&trailers, &HeaderMap::new()).err()?;
        let answer = refusal.answer();
        Some((answer.status.as_u16(), answer.code.into_owned(), refusal.to_string()))
    }

    #[test]
    fn a_sidecars_refusal_keeps_its_code_and_words() {
        assert_eq!(judged(&[("grpc-status", "0")]), None);
        assert_eq!(
            judged(&[("grpc-status", "9"), ("spillway-error", "missing-feature"), ("grpc-message", "no%20row")]),
            Some((422, "missing-feature".into(), "no row".into()))
        );
        assert_eq!(judged(&[("grpc-status", "14")]).unwrap().1, "model-unavailable");
    }

    #[test]
    fn t40_an_answer_without_a_status_is_a_bad_one() {
        assert_eq!(judged(&[]).unwrap().0, 502);
    }
}
