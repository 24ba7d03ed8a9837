//! A request's head, read once: what of it is used, and whether it can be trusted to mean one thing.
//!
//! The rule: nothing that a client sends in a header goes upstream. What is used is named here; a
//! second value of it is refused, never chosen from.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Version};
use pingora_http::RequestHeader;
use spillway_core::deadline::{Asked, parse_grpc_timeout, parse_milliseconds};
use spillway_core::inference::InvalidRequest;
use spillway_core::inference::json::header_length;

use crate::downstream::framing::MAX_HEADERS;
use crate::errors::{HeadFault, Refusal};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Bytes of a caller's own request id.
const MAX_REQUEST_ID: usize = 128;

/// What is used of a head.
#[derive(Debug, Default)]
pub struct Head {
    pub asked: Asked,
    pub content: Content,
    pub content_length: Option<usize>,
    /// The client waits for `100 Continue` before it sends its body.
    pub expects_continue: bool,
    /// The caller's, if it is a plain word.
    pub request_id: Option<HeaderValue>,
    content_encoding: Option<Coding>,
    compressed: bool,
    /// `Inference-Header-Content-Length`, or what is wrong with it: only REST inference minds.
    header_length: Option<Result<usize, InvalidRequest>>,
}

/// What a body is compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    Gzip,
    /// The zlib format (RFC 9110, section 8.4.1.2).
    Deflate,
    /// One that is not undone here.
    Other,
}

impl Coding {
    fn of(value: &HeaderValue) -> Self {
        match value.as_bytes().trim_ascii() {
            coding if coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip") => Self::Gzip,
            coding if coding.eq_ignore_ascii_case(b"deflate") => Self::Deflate,
            _ => Self::Other,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    #[default]
    None,
    Json,
    Octets,
    Grpc,
    Other,
}

impl Head {
    /// Whether the caller speaks gRPC; for answers, this is known even where the rest is refused.
    pub fn is_grpc(request: &RequestHeader) -> bool {
        request.version == Version::HTTP_2
            && request.headers.get(http::header::CONTENT_TYPE).is_some_and(|value| content(value) == Content::Grpc)
    }

    pub fn read(request: &RequestHeader) -> Result<Self, Refusal> {
        let headers = &request.headers;
        if headers.len() > MAX_HEADERS {
            return Err(HeadFault::TooManyHeaders.into());
        }
        let mut head = Self::default();
        let mut seen = Seen::default();
        for (name, value) in headers {
            match name.as_str() {
                "content-type" => {
                    seen.once(Seen::CONTENT_TYPE, "content-type")?;
                    head.content = content(value);
                }
                "content-length" => {
                    head.content_length = value.to_str().ok().and_then(|text| text.parse().ok());
                }
                "content-encoding" if value.as_bytes() == b"identity" => {}
                "content-encoding" => {
                    // Codings can be stacked, by a second header or a list: neither is undone here.
                    let stacked = head.content_encoding.is_some();
                    head.content_encoding = Some(if stacked { Coding::Other } else { Coding::of(value) });
                }
                "grpc-encoding" => head.compressed |= value.as_bytes() != b"identity",
                "grpc-timeout" => {
                    seen.once(Seen::GRPC_TIMEOUT, "grpc-timeout")?;
                    head.asked.grpc_timeout = duration(value, parse_grpc_timeout);
                }
                "x-request-timeout-ms" => {
                    seen.once(Seen::TIMEOUT, "x-request-timeout-ms")?;
                    head.asked.header = duration(value, parse_milliseconds);
                }
                "x-request-id" => {
                    seen.once(Seen::REQUEST_ID, "x-request-id")?;
                    head.request_id = Some(value).filter(|value| is_plain(value.as_bytes())).cloned();
                }
                "traceparent" => seen.once(Seen::TRACEPARENT, "traceparent")?,
                "x-spillway-tenant" => seen.once(Seen::TENANT, "x-spillway-tenant")?,
                "spillway-forwarded" => seen.once(Seen::FORWARDED, "spillway-forwarded")?,
                "spillway-probe" => seen.once(Seen::PROBE, "spillway-probe")?,
                "inference-header-content-length" if head.header_length.is_none() => {
                    head.header_length = lengths(headers);
                }
                "expect" => head.expects_continue = value.as_bytes().eq_ignore_ascii_case(b"100-continue"),
                "upgrade" => return Err(Refusal::Upgrade),
                "connection" => check_connection(value)?,
                _ => {}
            }
        }
        Ok(head)
    }

    pub fn check_uncompressed(&self) -> Result<(), Refusal> {
        if self.compressed || self.content_encoding.is_some() { Err(Refusal::Compressed) } else { Ok(()) }
    }

    /// How the body is compressed, where it may be.
    pub fn coding(&self) -> Result<Option<Coding>, Refusal> {
        match self.content_encoding {
            Some(Coding::Other) => Err(Refusal::Compressed),
            _ if self.compressed => Err(Refusal::Compressed),
            coding => Ok(coding),
        }
    }

    /// Where the JSON of a REST inference request ends, if binary tensors follow it.
    pub fn header_length(&self) -> Result<Option<usize>, InvalidRequest> {
        self.header_length.clone().transpose()
    }
}

/// The headers that were seen already.
#[derive(Default)]
struct Seen(u8);

impl Seen {
    const CONTENT_TYPE: u8 = 1;
    const GRPC_TIMEOUT: u8 = 2;
    const TIMEOUT: u8 = 4;
    const REQUEST_ID: u8 = 8;
    const TRACEPARENT: u8 = 16;
    const TENANT: u8 = 32;
    const FORWARDED: u8 = 64;
    const PROBE: u8 = 128;

    fn once(&mut self, header: u8, name: &'static str) -> Result<(), Refusal> {
        if self.0 & header != 0 {
            return Err(Refusal::DuplicateHeader(name));
        }
        self.0 |= header;
        Ok(())
    }
}

fn lengths(headers: &HeaderMap) -> Option<Result<usize, InvalidRequest>> {
    header_length(headers.get_all(HEADER_LENGTH).iter().map(HeaderValue::as_bytes)).transpose()
}

fn content(value: &HeaderValue) -> Content {
    let value = value.as_bytes();
    let kind = value.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    if kind.eq_ignore_ascii_case(b"application/grpc") || kind.eq_ignore_ascii_case(b"application/grpc+proto") {
        Content::Grpc
    } else if kind.eq_ignore_ascii_case(b"application/json") {
        Content::Json
    } else if kind.eq_ignore_ascii_case(b"application/octet-stream") {
        Content::Octets
    } else {
        Content::Other
    }
}

fn duration(value: &HeaderValue, parse: fn(&str) -> Option<Duration>) -> Option<Duration> {
    parse(value.to_str().ok()?)
}

/// What may go into logs and back to the caller as it is.
fn is_plain(id: &[u8]) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len())
        && id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte))
}

/// A header that `connection` names would be dropped on the way: a client could remove what we rely
/// on. Only the words about the connection itself are let through.
fn check_connection(value: &HeaderValue) -> Result<(), Refusal> {
    let known = |word: &[u8]| {
        let word = word.trim_ascii();
        [&b""[..], b"close", b"keep-alive", b"te"].iter().any(|known| word.eq_ignore_ascii_case(known))
    };
    if value.as_bytes().split(|byte| *byte == b',').all(known) { Ok(()) } else { Err(Refusal::ConnectionHeader) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(headers: &[(&'static str, &str)]) -> Result<Head, String> {
        let mut request = RequestHeader::build("POST", b"/v2", None).unwrap();
        for (name, value) in headers {
            request.append_header(*name, *value).unwrap();
        }
        Head::read(&request).map_err(|refusal| refusal.answer().code.into_owned())
    }

    #[test]
    fn t20_connection_may_not_name_a_header() {
        assert!(read(&[("connection", "keep-alive, Close")]).is_ok());
        for value in ["x-request-id", "close, traceparent", "authorization", "close,x-spillway-tenant"] {
            assert_eq!(read(&[("connection", value)]).unwrap_err(), "invalid-connection-header", "{value}");
        }
    }

    #[test]
    fn t23_what_must_be_one_is_refused_twice() {
        for name in [
            "content-type",
            "grpc-timeout",
            "x-request-timeout-ms",
            "x-spillway-tenant",
            "x-request-id",
            "spillway-forwarded",
            "spillway-probe",
        ] {
            assert!(read(&[(name, "a")]).is_ok());
            assert_eq!(read(&[(name, "a"), (name, "a")]).unwrap_err(), "duplicate-header", "{name}");
        }
    }

    #[test]
    fn t17_upgrades_are_refused() {
        assert_eq!(read(&[("upgrade", "websocket")]).unwrap_err(), "upgrade-refused");
    }

    #[test]
    fn t24_headers_are_counted() {
        let many = vec![("x-a", "b"); MAX_HEADERS + 1];
        assert_eq!(read(&many).unwrap_err(), "headers-too-large");
    }

    #[test]
    fn t33_the_header_length_is_a_number_given_once() {
        let length = |headers: &[_]| read(headers).unwrap().header_length();
        let name = "inference-header-content-length";
        assert_eq!(length(&[(name, "12")]), Ok(Some(12)));
        assert_eq!(length(&[]), Ok(None));
        for bad in [&[(name, "-1")][..], &[(name, "x")], &[(name, "1"), (name, "1")]] {
            assert_eq!(length(bad), Err(InvalidRequest::HeaderLength));
        }
    }

    #[test]
    fn t57_request_ids_that_are_not_plain_are_replaced() {
        assert!(read(&[("x-request-id", "abc-1.2:3_4")]).unwrap().request_id.is_some());
        for bad in ["", "a b", "a\"b", "\u{e9}", &"a".repeat(129)] {
            assert!(read(&[("x-request-id", bad)]).unwrap().request_id.is_none(), "{bad:?}");
        }
    }

    #[test]
    fn t30_one_coding_that_is_known_is_taken_and_stacks_are_not() {
        let coding = |values: &[&str]| {
            let headers: Vec<_> = values.iter().map(|value| ("content-encoding", *value)).collect();
            read(&headers).unwrap().coding().map_err(|refusal| refusal.answer().status.as_u16())
        };
        assert_eq!(coding(&[]), Ok(None));
        assert_eq!(coding(&["identity"]), Ok(None));
        assert_eq!(coding(&["GZip"]), Ok(Some(Coding::Gzip)));
        assert_eq!(coding(&["deflate"]), Ok(Some(Coding::Deflate)));
        for bad in [&["zstd"][..], &["gzip, gzip"], &["gzip", "gzip"], &["gzip", "br"], &[""]] {
            assert_eq!(coding(bad), Err(415), "{bad:?}");
        }
        assert!(read(&[("content-encoding", "gzip")]).unwrap().check_uncompressed().is_err());
        assert_eq!(read(&[("grpc-encoding", "gzip")]).unwrap().coding().unwrap_err().answer().status, 415);
    }

    #[test]
    fn content_types_are_told_apart() {
        for (value, expected) in [
            ("application/json; charset=utf-8", Content::Json),
            ("application/grpc", Content::Grpc),
            ("application/grpc+proto", Content::Grpc),
            ("application/grpc-web", Content::Other),
            ("application/octet-stream", Content::Octets),
        ] {
            assert_eq!(read(&[("content-type", value)]).unwrap().content, expected, "{value}");
        }
    }
}
