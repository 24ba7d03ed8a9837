//! One call to one pod, from its request to its whole answer.
//!
//! The rule: what goes upstream is set here and nowhere else; nothing of the client's headers is in it. An
//! attempt changes nothing of its exchange: what it found comes back as a value, so that two can be under
//! way at once. One that is dropped resets its stream and gives back what it held.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use http_body_util::BodyExt;
use spillway_core::deadline::format_grpc_timeout;
use spillway_core::inference::InferResponse;
use spillway_core::resilience::Outcome;
use spillway_runtime::oip;
use spillway_runtime::telemetry::TraceParent;
use spillway_runtime::upstream::{OipBody, OipSender, UpstreamBody, UpstreamError};
use tonic::Code;

use crate::answer::{ERROR, GRPC_MESSAGE, GRPC_STATUS, SERVER_TIMING, percent_decoded, unindexed};
use crate::errors::sidecar_code;
use crate::exchange::Exchange;
use crate::pods::fleet::PodLink;
use crate::pods::judge::Ended;
use crate::pods::lease::Lease;
use crate::pods::load;
use crate::request::body::message;
use crate::request::head::REQUEST_ID;
use crate::request::memory::Part;
use crate::shared::Shared;

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const TENANT: HeaderName = HeaderName::from_static("x-spillway-tenant");
/// Served at this level; see the sidecar.
const DEGRADE: HeaderName = HeaderName::from_static("spillway-degrade");
const FEATURE_SEQUENCE: HeaderName = HeaderName::from_static("spillway-feature-sequence");
const FEATURE_FRESH: HeaderName = HeaderName::from_static("spillway-feature-fresh-ms");
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");
/// Bytes of a `spillway-error` code of a sidecar.
const MAX_CODE: usize = 64;

/// A whole answer.
pub struct PodAnswer {
    /// One length-prefixed message.
    pub frame: Bytes,
    /// What is in it.
    pub response: InferResponse,
    pub said: Said,
}

/// What a pod said beside its answer, or its refusal.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// `features;dur=…, model;dur=…`
    pub timing: Option<HeaderValue>,
    /// The last change of features that it had applied when it began to read them.
    pub feature_sequence: Option<u64>,
    /// What is left of the freshness of the features that it used.
    pub feature_fresh: Option<Duration>,
}

/// What came of an attempt.
pub struct Attempted<'a> {
    pub link: Arc<PodLink>,
    pub took: Duration,
    pub said: Said,
    /// The length-prefixed message, what is in it, and the memory that it takes.
    pub result: Result<(Bytes, InferResponse, Part<'a>), Ended>,
}

/// Makes the call, and tells those who judge the pod how it ended.
pub async fn attempt<'a>(
    shared: &'a Shared,
    lease: Lease,
    request: Request<OipBody>,
    mut part: Part<'a>,
) -> Attempted<'a> {
    let (link, mut said) = (lease.link().clone(), Said::default());
    let result = match link.upstream.call(request).await {
        Ok(response) => read(shared, &link, response, &mut part, &mut said).await,
        Err(error) => Err(Ended::Call(error)),
    };
    let result = result.map_err(|ended| if lease.is_due() { ended.at_deadline() } else { ended });
    let took = lease.end(result.as_ref().map_or_else(|ended| ended.verdict(true).outcome, |_| Outcome::Success));
    if let Err(Ended::Call(error)) = &result {
        failed(shared, &link, error);
    }
    Attempted { link, took, said, result: result.map(|(frame, response)| (frame, response, part)) }
}

pub const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
pub const STREAM_INFER: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// A request to a pod's `inference.GRPCInferenceService`.
pub fn request(
    path: &'static str,
    exchange: &Exchange,
    trace: &TraceParent,
    left: Option<Duration>,
    body: OipBody,
) -> Request<OipBody> {
    let mut request = oip_request(path, exchange, trace, left, body);
    let headers = request.headers_mut();
    if let Some(principal) = &exchange.principal
        && let Ok(tenant) = HeaderValue::from_str(principal.tenant.as_str())
    {
        headers.insert(TENANT, tenant);
    }
    if let Some(step) = exchange.degrade {
        headers.insert(DEGRADE, HeaderValue::from(u16::from(step.number())));
    }
    request
}

/// A request to anybody's `inference.GRPCInferenceService`.
pub fn oip_request(
    path: &'static str,
    exchange: &Exchange,
    trace: &TraceParent,
    left: Option<Duration>,
    body: OipBody,
) -> Request<OipBody> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(path);
    let headers = request.headers_mut();
    headers.reserve(8);
    headers.insert(CONTENT_TYPE, GRPC);
    headers.insert(TE, TRAILERS);
    let timeout = left.map(|left| HeaderValue::from_maybe_shared(Bytes::from(format_grpc_timeout(left))));
    if let Some(Ok(timeout)) = timeout {
        headers.insert(GRPC_TIMEOUT, unindexed(timeout));
    }
    if let Some(id) = &exchange.request_id {
        headers.insert(REQUEST_ID, unindexed(id.clone()));
    }
    trace.write(headers);
    request
}

/// Counts a call that failed below gRPC.
pub fn failed(shared: &Shared, link: &PodLink, error: &UpstreamError) {
    shared.metrics.upstream_failed(error.reason());
    let (pool, pod) = (&link.key().pool, &link.key().pod);
    match error {
        UpstreamError::Unreachable(reason) => {
            // The next check may find it alive again; until then others come first.
            if link.state.checked(false, shared.clock.now()) {
                tracing::warn!(%pool, %pod, %reason, "pod cannot be reached");
            }
        }
        UpstreamError::Lost(reason) => tracing::debug!(%pool, %pod, %reason, "call lost"),
        UpstreamError::Refused | UpstreamError::Deadline { .. } => {}
    }
}

/// An answer as it came, to its end.
pub struct Whole {
    pub head: HeaderMap,
    trailers: Option<HeaderMap>,
    frame: Bytes,
}

impl Whole {
    /// Where its status stands: without trailers, in the head.
    fn status(&self) -> &HeaderMap {
        self.trailers.as_ref().unwrap_or(&self.head)
    }

    pub fn check(&self) -> Result<(), Ended> {
        check_status(self.status(), &self.head)
    }

    /// The length-prefixed message, and what is in it.
    pub fn decode(self, shared: &Shared) -> Result<(Bytes, InferResponse), String> {
        let message = message(&self.frame).map_err(|problem| problem.to_string())?;
        let response = oip::decode_response_message(message, &shared.limits.of_answers());
        let response = response.map_err(|problem| problem.to_string())?;
        if response.outputs.is_empty() { Err("it has no outputs".to_owned()) } else { Ok((self.frame, response)) }
    }
}

/// Reads a pod's answer.
async fn read(
    shared: &Shared,
    link: &PodLink,
    response: Response<UpstreamBody>,
    part: &mut Part<'_>,
    said: &mut Said,
) -> Result<(Bytes, InferResponse), Ended> {
    let head = response.headers();
    said.feature_sequence = number(head, &FEATURE_SEQUENCE);
    said.feature_fresh = number(head, &FEATURE_FRESH).map(Duration::from_millis);
    let whole = read_whole(shared, response, part).await?;
    let status = whole.status();
    said.timing = status.get(SERVER_TIMING).or_else(|| whole.head.get(SERVER_TIMING)).cloned();
    take_load(shared, link, status);
    whole.check()?;
    whole.decode(shared).map_err(|problem| {
        tracing::warn!(problem, pool = %link.key().pool, pod = %link.key().pod, "a pod's answer could not be read");
        Ended::Unreadable
    })
}

/// A stream that whom it goes to has taken.
pub struct Taken {
    pub sender: OipSender,
    pub head: HeaderMap,
    pub body: UpstreamBody,
}

impl Taken {
    /// A refusal may be no more than a head.
    pub fn of(sender: OipSender, response: Response<UpstreamBody>) -> Result<Self, Ended> {
        let (head, body) = response.into_parts();
        if !head.status.is_success() {
            return Err(Ended::Http(head.status));
        }
        if head.headers.contains_key(&GRPC_STATUS) {
            check_status(&head.headers, &head.headers)?;
        }
        Ok(Self { sender, head: head.headers, body })
    }
}

/// Reads an answer to its end, within what may be kept of it.
pub async fn read_whole(
    shared: &Shared,
    response: Response<UpstreamBody>,
    part: &mut Part<'_>,
) -> Result<Whole, Ended> {
    let (head, mut body) = response.into_parts();
    if !head.status.is_success() {
        return Err(Ended::Http(head.status));
    }
    let mut whole = Bytes::new();
    let mut pieces = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = body.frame().await {
        match frame.map_err(Ended::Call)?.into_data() {
            Ok(data) => {
                if whole.len() + pieces.len() + data.len() > shared.limits.answer {
                    return Err(Ended::Unreadable);
                }
                part.keep(data.len()).map_err(|_| Ended::NoRoom)?;
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
    let frame = if pieces.is_empty() { whole } else { pieces.freeze() };
    Ok(Whole { head: head.headers, trailers, frame })
}

/// Takes in what a pod said of its load.
pub fn take_load(shared: &Shared, link: &PodLink, trailers: &HeaderMap) {
    let recorder = &shared.book.recorder;
    match load::reported(trailers) {
        Some(Ok(reported)) => {
            link.state.report(reported, recorder.clock.now());
            recorder.metrics.reported(true);
        }
        Some(Err(load::Unreadable)) => recorder.metrics.reported(false),
        None => {}
    }
}

/// Digits only; anything else was not said.
fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    let text = headers.get(name)?.to_str().ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Reads `grpc-status`; an error keeps the sidecar's own code and words.
pub fn check_status(trailers: &HeaderMap, head: &HeaderMap) -> Result<(), Ended> {
    let Some(status) = trailers.get(GRPC_STATUS) else { return Err(Ended::Unreadable) };
    if status.as_bytes() == b"0" {
        return Ok(());
    }
    let status = Code::from_bytes(status.as_bytes());
    let code = trailers.get(ERROR).or_else(|| head.get(ERROR)).and_then(|code| code.to_str().ok());
    let code = code.filter(|code| code.len() <= MAX_CODE).map_or_else(|| default_code(status), sidecar_code);
    let message = trailers.get(GRPC_MESSAGE).map(|text| percent_decoded(text.as_bytes())).unwrap_or_default();
    Err(Ended::Said { status, code, message })
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
        let refusal = check_status(&trailers, &HeaderMap::new()).err()?.refusal();
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

    #[test]
    fn a_number_of_a_pod_is_digits_alone() {
        let read = |text: &'static str| {
            let headers = HeaderMap::from_iter([(FEATURE_SEQUENCE, HeaderValue::from_static(text))]);
            number(&headers, &FEATURE_SEQUENCE)
        };
        assert_eq!(read("17"), Some(17));
        for bad in ["", "-1", "+1", "1.5", "99999999999999999999", "1 "] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
