//! Writes answers: a REST body, gRPC messages with their trailers, or a refusal in either form.
//!
//! The rule: an answer's headers are ours and the sidecar's figures; nothing is copied from the request
//! but a plain request id.

use std::fmt::Write;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{AGE, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use pingora_core::protocols::http::ServerSession;
use pingora_http::ResponseHeader;
use spillway_core::cache::status::Status;
use spillway_core::inference::json;
use spillway_core::limit::headers::retry_after;

use crate::downstream::connection::WRITE_TIME;
use crate::errors::{Again, Refusal};
use crate::exchange::{Exchange, Protocol};
use crate::peers::concern::Concern;
use crate::peers::visit::Visit;
use crate::request::head::REQUEST_ID;

pub const ERROR: HeaderName = HeaderName::from_static("spillway-error");
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
pub const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
pub const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
pub const REGION: HeaderName = HeaderName::from_static("spillway-region");
const MODEL_VERSION: HeaderName = HeaderName::from_static("spillway-model-version");
const DEGRADED: HeaderName = HeaderName::from_static("spillway-degraded");
const FEATURE_AGE: HeaderName = HeaderName::from_static("spillway-feature-age-ms");
/// How long a gRPC client waits before it tries again, in milliseconds (gRFC A6).
pub const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// draft-ietf-httpapi-ratelimit-headers.
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
/// RFC 9211: streams are not looked up.
const BYPASS: HeaderValue = HeaderValue::from_static("spillway; fwd=bypass");
const OK: HeaderValue = HeaderValue::from_static("0");
/// Headers of an answer, about.
const HEADERS: usize = 16;
/// Bytes that a reader must take within [`WRITE_TIME`]: 6.4 KiB a second.
const SLICE: usize = 64 << 10;
/// Bytes of a message for the caller.
const MAX_MESSAGE: usize = 1_024;

/// The body of every REST refusal.
pub fn error_body(message: &str) -> Bytes {
    json::error(message)
}

/// What goes back.
pub enum Reply {
    Json(Bytes),
    Rest(json::RestBody),
    /// One length-prefixed message, in pieces.
    Grpc(Vec<Bytes>),
}

/// Writing failed: the client is gone, or takes nothing.
pub type Written = Result<(), pingora_core::BError>;

pub async fn reply(session: &mut ServerSession, exchange: &mut Exchange, reply: Reply) -> Written {
    let mut headers = headers(exchange);
    session.set_write_timeout(Some(WRITE_TIME));
    match reply {
        Reply::Json(body) => {
            headers.insert(CONTENT_TYPE, JSON);
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
            exchange.sent += body.len();
            session.write_response_header(head(StatusCode::OK, headers)).await?;
            write_body(session, body, true).await?;
        }
        Reply::Rest(body) => {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(body.content_type()));
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.content_length()));
            if let Some(length) = body.header_length {
                headers.insert(HEADER_LENGTH, HeaderValue::from(length));
            }
            exchange.sent += body.content_length();
            session.write_response_header(head(StatusCode::OK, headers)).await?;
            write_segments(session, body.segments, true).await?;
        }
        Reply::Grpc(frame) => {
            headers.insert(CONTENT_TYPE, GRPC);
            exchange.sent += frame.iter().map(Bytes::len).sum::<usize>();
            session.write_response_header(head(StatusCode::OK, headers)).await?;
            write_segments(session, frame, false).await?;
            session.write_response_trailers(ok_trailers()).await?;
        }
    }
    exchange.succeed();
    Ok(())
}

async fn write_segments(downstream: &mut ServerSession, segments: Vec<Bytes>, end: bool) -> Written {
    let last = segments.len().saturating_sub(1);
    for (index, segment) in segments.into_iter().enumerate() {
        write_body(downstream, segment, end && index == last).await?;
    }
    Ok(())
}

/// Writes a piece of a body, of any size. [`WRITE_TIME`] is for each slice of it: an honest slow reader
/// of much gets through, one that takes a byte now and then does not.
pub async fn write_body(downstream: &mut ServerSession, mut body: Bytes, end: bool) -> Written {
    while body.len() > SLICE {
        downstream.write_response_body(body.split_to(SLICE), false).await?;
    }
    downstream.write_response_body(body, end).await
}

pub async fn refuse(session: &mut ServerSession, exchange: &mut Exchange, refusal: &Refusal) -> Written {
    let answer = exchange.refuse(refusal);
    if matches!(refusal, Refusal::Cancelled) {
        session.set_keepalive(None);
        return Ok(());
    }
    let message = text(refusal);
    let grpc = exchange.protocol == Protocol::Grpc;
    let mut headers = headers(exchange);
    if let Ok(code) = HeaderValue::from_str(&answer.code) {
        headers.insert(ERROR, code);
    }
    match (refusal.again(), grpc) {
        (Again::Unsaid, _) | (Again::Never, false) => {}
        // A negative pushback: not again.
        (Again::Never, true) => drop(headers.insert(PUSHBACK, HeaderValue::from_static("-1"))),
        (Again::After(wait), true) => {
            let milliseconds = wait.as_nanos().div_ceil(1_000_000);
            headers.insert(PUSHBACK, HeaderValue::from(i32::try_from(milliseconds).unwrap_or(i32::MAX)));
        }
        (Again::After(wait), false) => drop(headers.insert(RETRY_AFTER, HeaderValue::from(retry_after(wait)))),
    }
    if let (Visit::Forwarded(_), Some((name, concern))) = (&exchange.visit, Concern::header(refusal)) {
        headers.insert(name, concern);
    }
    session.set_write_timeout(Some(WRITE_TIME));
    if refusal.ends_connection() {
        session.set_keepalive(None);
    }
    if grpc {
        headers.insert(CONTENT_TYPE, GRPC);
        headers.extend(status_trailers(answer.grpc, &message));
        if let ServerSession::H2(h2) = session {
            return h2.write_response_header(head(StatusCode::OK, headers), true);
        }
    }
    if let Refusal::Method { allow } = refusal {
        headers.insert(ALLOW, HeaderValue::from_static(allow));
    }
    let body = error_body(&message);
    headers.insert(CONTENT_TYPE, JSON);
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    exchange.sent += body.len();
    session.write_response_header(head(answer.status, headers)).await?;
    session.write_response_body(body, true).await
}

/// What a refusal says to the caller: one line, not too long.
pub fn text(refusal: &Refusal) -> String {
    refusal.to_string().chars().take(MAX_MESSAGE).map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// What Pingora writes. Made whole: its own way of adding a header copies the name.
pub fn head(status: StatusCode, headers: HeaderMap) -> Box<ResponseHeader> {
    let (mut parts, ()) = http::Response::new(()).into_parts();
    (parts.status, parts.headers) = (status, headers);
    Box::new(parts.into())
}

/// The headers of an answer, as far as all answers share them.
pub fn headers(exchange: &Exchange) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(HEADERS);
    let region = exchange.making.region.as_ref().unwrap_or(&exchange.shared.region_header);
    headers.insert(REGION, region.clone());
    headers.insert(CACHE_CONTROL, NO_STORE);
    if let Some(id) = &exchange.request_id {
        headers.insert(REQUEST_ID, unindexed(id.clone()));
    }
    match exchange.cached.status {
        Some(status) => drop(headers.insert(CACHE_STATUS, cache_status(status))),
        None if exchange.was_sent_on() => drop(headers.insert(CACHE_STATUS, BYPASS)),
        None => {}
    }
    if let Some(age) = exchange.cached.age.or(exchange.peer_age) {
        headers.insert(AGE, unindexed(HeaderValue::from(age.as_secs())));
    }
    let making = &exchange.making;
    if let Some(version) = &making.model_version {
        headers.insert(MODEL_VERSION, version.clone());
    }
    if let Some(degraded) = &making.degraded {
        headers.insert(DEGRADED, degraded.clone());
    }
    if let Some(age) = making.feature_age_ms {
        headers.insert(FEATURE_AGE, unindexed(HeaderValue::from(age)));
    }
    if let Some(limit) = &exchange.limit {
        headers.insert(RATE_LIMIT, unindexed(limit.header()));
        headers.insert(RATE_LIMIT_POLICY, limit.policy.clone());
    }
    headers.insert(SERVER_TIMING, unindexed(timing(exchange)));
    headers
}

/// A value that no other answer will have. HPACK would put it into the connection's table, and push out what all
/// answers share; as one that is never indexed (RFC 7541, section 7.1.3), it stays out.
pub fn unindexed(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

fn cache_status(status: Status) -> HeaderValue {
    match status.fixed() {
        Some(text) => HeaderValue::from_static(text),
        None => HeaderValue::from_maybe_shared(Bytes::from(status.to_string())).unwrap_or(BYPASS),
    }
}

/// `Server-Timing`, in milliseconds: what was spent here, and what the sidecar said it spent.
fn timing(exchange: &Exchange) -> HeaderValue {
    let mut text = BytesMut::with_capacity(96);
    let sidecar = exchange.making.sidecar_timing.as_ref().and_then(|timing| timing.to_str().ok());
    // Writing to memory cannot fail.
    let _ = write!(text, "auth;dur={}", Milliseconds(exchange.auth));
    if !exchange.cached.took.is_zero() {
        let _ = write!(text, ", cache;dur={}", Milliseconds(exchange.cached.took));
    }
    if exchange.was_sent_on() {
        let queue = exchange.upstream.saturating_sub(sidecar.map_or(Duration::ZERO, total));
        let _ = write!(text, ", queue;dur={}", Milliseconds(queue));
    }
    if let Some(sidecar) = sidecar {
        let _ = write!(text, ", {sidecar}");
    }
    let _ = write!(text, ", total;dur={}", Milliseconds(exchange.began.elapsed()));
    HeaderValue::from_maybe_shared(text.freeze()).unwrap_or(HeaderValue::from_static(""))
}

/// A time in milliseconds, to the microsecond. Without floating point, whose exact digits cost more than the rest of the
/// header.
struct Milliseconds(Duration);

impl std::fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let micros = u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX);
        write!(f, "{}.{:03}", micros / 1_000, micros % 1_000)
    }
}

/// The sum of the durations of a `Server-Timing` header.
fn total(timing: &str) -> Duration {
    let durations = timing.split(',').filter_map(|part| part.split_once("dur=")?.1.trim().parse::<f64>().ok());
    durations.filter_map(|milliseconds| Duration::try_from_secs_f64(milliseconds / 1e3).ok()).sum()
}

pub fn ok_trailers() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS, OK);
    trailers
}

pub fn status_trailers(status: tonic::Code, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(3);
    trailers.insert(GRPC_STATUS, HeaderValue::from(status as i32));
    if let Ok(message) = HeaderValue::from_str(&percent_encoded(message)) {
        trailers.insert(GRPC_MESSAGE, message);
    }
    trailers
}

/// `grpc-message`: UTF-8, percent-encoded where it is not printable ASCII (gRPC over HTTP/2).
fn percent_encoded(message: &str) -> String {
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// The reverse, for a sidecar's message; what is no escape stays as it is.
pub fn percent_decoded(message: &[u8]) -> String {
    let mut decoded = Vec::with_capacity(message.len());
    let mut rest = message;
    while let Some((&byte, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|digit| char::from(*digit).to_digit(16));
        rest = after;
        match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high << 4 | low) as u8);
                rest = &after[2..];
            }
            _ => decoded.push(byte),
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_messages_round_trip() {
        for message in ["plain", "100 % of\r\n\u{e9}\u{4e16}", "%41%", ""] {
            let encoded = percent_encoded(message);
            assert!(encoded.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            assert_eq!(percent_decoded(encoded.as_bytes()), message);
        }
        assert_eq!(percent_decoded(b"50%"), "50%");
    }

    #[test]
    fn times_are_told_to_the_microsecond() {
        let told = |micros| Milliseconds(Duration::from_micros(micros)).to_string();
        assert_eq!([told(0), told(7), told(1_230), told(61_000_042)], ["0.000", "0.007", "1.230", "61000.042"]);
    }

    #[test]
    fn server_timings_add_up() {
        assert_eq!(total("features;dur=0.21, model;dur=1.02"), Duration::from_micros(1_230));
        assert_eq!(total("nonsense"), Duration::ZERO);
        assert_eq!(total("a;dur=inf, b;dur=-1"), Duration::ZERO);
    }
}
