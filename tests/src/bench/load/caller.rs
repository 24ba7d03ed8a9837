//! One client of the bench: what it asks, over which protocol, and whether the answer is right.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::bench::message::{Protocol, grpc, numbered, rest};

/// Answers that were found right are kept: equal bytes need no decoding.
const KNOWN: usize = 8;
const SERVER: &str = "localhost";
const USER_AGENT: HeaderValue = HeaderValue::from_static("spillway-bench");

/// What one client asks, and what it knows to be right.
#[derive(Debug)]
pub struct Caller {
    protocol: Protocol,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
    /// gRPC's status is expected in the head, where proxies put it that have no trailers of their own.
    status_in_head: bool,
    /// No two calls are the same, so that none is answered out of a cache.
    distinct: bool,
    calls: Cell<u64>,
    /// The length of the JSON head, where there is one, and the body.
    known: RefCell<Vec<(Option<HeaderValue>, Bytes)>>,
}

/// A connection to a proxy.
#[derive(Debug)]
pub enum Sender {
    H2(h2::client::SendRequest<Bytes>),
    H1(http1::SendRequest<Full<Bytes>>),
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl Caller {
    pub fn new(protocol: Protocol, distinct: bool) -> Self {
        let body = protocol.request();
        Self {
            protocol,
            uri: uri(protocol),
            headers: headers(protocol, body.len()),
            body,
            status_in_head: false,
            distinct,
            calls: Cell::new(0),
            known: RefCell::default(),
        }
    }

    /// For a proxy that answers gRPC itself without trailers, and only if it is not told that it is gRPC.
    pub fn with_status_in_head(mut self) -> Self {
        self.status_in_head = true;
        self.headers.insert(header::CONTENT_TYPE, rest::CONTENT_TYPE);
        self
    }

    /// The connector has to offer the protocol; the connection serves until its senders are gone.
    /// Runs inside a `LocalSet`.
    pub async fn connect(&self, address: SocketAddr, connector: &TlsConnector) -> Result<Sender> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot reach {address}"))?;
        stream.set_nodelay(true)?;
        let stream = connector.connect(ServerName::try_from(SERVER)?, stream).await.context("no TLS")?;
        let alpn = stream.get_ref().1.alpn_protocol();
        ensure!(alpn == Some(self.protocol.alpn()), "the proxy chose {alpn:?}");
        // A connection's error also reaches each call on it.
        Ok(match self.protocol {
            Protocol::Grpc | Protocol::H2 => {
                let (sender, connection) = h2::client::Builder::new().enable_push(false).handshake(stream).await?;
                tokio::task::spawn_local(connection);
                Sender::H2(sender)
            }
            Protocol::H1 => {
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                tokio::task::spawn_local(connection);
                Sender::H1(sender)
            }
        })
    }

    /// One call; an answer that is not right is an error.
    pub async fn call(&self, sender: &mut Sender) -> Result<()> {
        let answer = self.ask(sender).await?;
        ensure!(self.is_right(&answer), "a wrong answer: {answer:?}");
        Ok(())
    }

    /// One call that may be turned away for the load: whether it was answered. What is neither is an error.
    pub async fn call_or_lose(&self, sender: &mut Sender) -> Result<bool> {
        let answer = match self.ask(sender).await {
            // A proxy that has begun to answer when the time is over can only end the stream.
            Err(error) if is_reset(&error) => return Ok(false),
            answer => answer?,
        };
        let right = self.is_right(&answer);
        ensure!(right || answer.is_overload(), "a wrong answer: {answer:?}");
        Ok(right)
    }

    /// One call, whatever comes back.
    pub async fn ask(&self, sender: &mut Sender) -> Result<Answer> {
        let body = self.next_body();
        match sender {
            Sender::H2(sender) => {
                let (response, mut send) = sender.send_request(self.request(()), false)?;
                send.send_data(body, true)?;
                received(response.await.context("no answer")?).await
            }
            Sender::H1(sender) => {
                let request = self.request(Full::new(body));
                let (head, body) = sender.send_request(request).await.context("no answer")?.into_parts();
                let body = body.collect().await.context("no whole answer")?.to_bytes();
                Ok(Answer { status: head.status, headers: head.headers, body, trailers: None })
            }
        }
    }

    fn request<B>(&self, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }

    fn next_body(&self) -> Bytes {
        if !self.distinct {
            return self.body.clone();
        }
        self.calls.set(self.calls.get() + 1);
        numbered(&self.body, self.calls.get())
    }

    fn is_right(&self, answer: &Answer) -> bool {
        let grpc_head = if self.status_in_head { Some(&answer.headers) } else { answer.trailers.as_ref() };
        answer.status == StatusCode::OK
            && (self.protocol != Protocol::Grpc || grpc_head.is_some_and(is_ok))
            && self.is_expected(answer)
    }

    fn is_expected(&self, answer: &Answer) -> bool {
        let length = answer.headers.get(rest::HEAD_LENGTH);
        let is_known = |(known_length, body): &(Option<HeaderValue>, Bytes)| {
            known_length.as_ref() == length && *body == answer.body
        };
        if self.known.borrow().iter().any(is_known) {
            return true;
        }
        let right = self.protocol.is_answer(&answer.headers, &answer.body);
        let mut known = self.known.borrow_mut();
        if right && known.len() < KNOWN {
            known.push((length.cloned(), Bytes::copy_from_slice(&answer.body)));
        }
        right
    }
}

impl Sender {
    /// One more for the same connection, for calls in flight beside this one's.
    pub fn another(&self) -> Result<Self> {
        match self {
            Self::H2(sender) => Ok(Self::H2(sender.clone())),
            Self::H1(_) => bail!("HTTP/1.1 has one call in flight on a connection"),
        }
    }

    /// When the connection takes a call.
    pub async fn ready(self) -> Result<Self> {
        Ok(match self {
            Self::H2(sender) => Self::H2(sender.ready().await?),
            Self::H1(mut sender) => {
                sender.ready().await?;
                Self::H1(sender)
            }
        })
    }
}

impl Answer {
    /// Whether a proxy said that it has too much to do, or that it took too long: 429, 503, 504, or gRPC's
    /// RESOURCE_EXHAUSTED, UNAVAILABLE and DEADLINE_EXCEEDED.
    pub fn is_overload(&self) -> bool {
        const STATUSES: [StatusCode; 3] =
            [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];
        let heads = [Some(&self.headers), self.trailers.as_ref()];
        let said = heads.into_iter().flatten().filter_map(|head| head.get("grpc-status"));
        STATUSES.contains(&self.status)
            || said.into_iter().any(|status| ["8", "14", "4"].iter().any(|one| status == one))
    }

    /// Whether a proxy said that this client may not ask: 403, or gRPC's PERMISSION_DENIED.
    pub fn is_refusal(&self) -> bool {
        const PERMISSION_DENIED: &str = "7";
        let heads = [Some(&self.headers), self.trailers.as_ref()];
        let denied = |head: &HeaderMap| head.get("grpc-status").is_some_and(|status| status == PERMISSION_DENIED);
        self.status == StatusCode::FORBIDDEN || heads.into_iter().flatten().any(denied)
    }
}

fn uri(protocol: Protocol) -> Uri {
    match protocol {
        Protocol::Grpc => Uri::from_static("https://localhost/inference.GRPCInferenceService/ModelInfer"),
        Protocol::H2 => Uri::from_static("https://localhost/v2/models/scorer/infer"),
        Protocol::H1 => Uri::from_static("/v2/models/scorer/infer"),
    }
}

fn headers(protocol: Protocol, length: usize) -> HeaderMap {
    let mut headers = HeaderMap::from_iter([(header::USER_AGENT, USER_AGENT)]);
    match protocol {
        Protocol::Grpc => {
            headers.insert(header::CONTENT_TYPE, grpc::CONTENT_TYPE);
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        Protocol::H2 | Protocol::H1 => {
            headers.insert(header::CONTENT_TYPE, rest::CONTENT_TYPE);
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
            headers.insert(rest::HEAD_LENGTH, rest::request_head_length());
        }
    }
    if protocol == Protocol::H1 {
        headers.insert(header::HOST, HeaderValue::from_static(SERVER));
    }
    headers
}

/// Whether the stream was ended, and the connection goes on.
fn is_reset(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<h2::Error>().is_some_and(h2::Error::is_reset))
}

fn is_ok(head: &HeaderMap) -> bool {
    head.get("grpc-status").is_some_and(|status| status == "0")
}

async fn received(response: http::Response<h2::RecvStream>) -> Result<Answer> {
    let (head, mut stream) = response.into_parts();
    let mut body = Bytes::new();
    while let Some(part) = stream.data().await {
        let part = part.context("no whole answer")?;
        stream.flow_control().release_capacity(part.len())?;
        body = if body.is_empty() { part } else { [body, part].concat().into() };
    }
    let trailers = stream.trailers().await.context("no whole answer")?;
    Ok(Answer { status: head.status, headers: head.headers, body, trailers })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(protocol: Protocol) -> Answer {
        let headers = HeaderMap::from_iter([(rest::HEAD_LENGTH, rest::response_head_length())]);
        let trailers = HeaderMap::from_iter([(header::HeaderName::from_static("grpc-status"), "0".parse().unwrap())]);
        Answer { status: StatusCode::OK, headers, body: protocol.response(), trailers: Some(trailers) }
    }

    #[test]
    fn only_whole_and_right_answers_pass() {
        for protocol in [Protocol::Grpc, Protocol::H2, Protocol::H1] {
            let caller = Caller::new(protocol, false);
            assert!(caller.is_right(&answer(protocol)));
            assert!(!caller.is_right(&Answer { status: StatusCode::BAD_GATEWAY, ..answer(protocol) }));
            assert!(!caller.is_right(&Answer { body: Bytes::new(), ..answer(protocol) }));
            // What was right once passes without decoding, with the same head alone.
            assert!(caller.is_right(&answer(protocol)));
            let without_length = Answer { headers: HeaderMap::new(), ..answer(protocol) };
            assert_eq!(caller.is_right(&without_length), protocol == Protocol::Grpc);
        }
        assert!(!Caller::new(Protocol::Grpc, false).is_right(&Answer { trailers: None, ..answer(Protocol::Grpc) }));
        // A status in the head passes only where it is asked for.
        let headers = answer(Protocol::Grpc).trailers.unwrap();
        let in_head = Answer { headers, trailers: None, ..answer(Protocol::Grpc) };
        assert!(!Caller::new(Protocol::Grpc, false).is_right(&in_head));
        assert!(Caller::new(Protocol::Grpc, false).with_status_in_head().is_right(&in_head));
        assert!(!Caller::new(Protocol::Grpc, false).with_status_in_head().is_right(&answer(Protocol::Grpc)));
    }

    #[test]
    fn each_protocol_asks_at_its_path() {
        for protocol in [Protocol::Grpc, Protocol::H2, Protocol::H1] {
            assert_eq!(uri(protocol).path(), protocol.path());
        }
    }

    #[test]
    fn overload_is_told_apart_from_wrong_answers() {
        let status = |code: &str| {
            HeaderMap::from_iter([(header::HeaderName::from_static("grpc-status"), code.parse().unwrap())])
        };
        for code in ["4", "8", "14"] {
            assert!(Answer { headers: status(code), trailers: None, ..answer(Protocol::Grpc) }.is_overload());
            assert!(Answer { trailers: Some(status(code)), ..answer(Protocol::Grpc) }.is_overload());
        }
        assert!(Answer { status: StatusCode::SERVICE_UNAVAILABLE, ..answer(Protocol::H2) }.is_overload());
        for wrong in ["0", "2", "7", "13"] {
            assert!(!Answer { trailers: Some(status(wrong)), ..answer(Protocol::Grpc) }.is_overload());
        }
        assert!(!Answer { status: StatusCode::BAD_GATEWAY, ..answer(Protocol::H2) }.is_overload());
    }

    #[test]
    fn refusals_are_told_apart_from_failures() {
        let refused = Answer { status: StatusCode::FORBIDDEN, ..answer(Protocol::H2) };
        assert!(refused.is_refusal());
        assert!(!Answer { status: StatusCode::SERVICE_UNAVAILABLE, ..answer(Protocol::H2) }.is_refusal());
        let denied = HeaderMap::from_iter([(header::HeaderName::from_static("grpc-status"), "7".parse().unwrap())]);
        assert!(Answer { trailers: Some(denied), ..answer(Protocol::Grpc) }.is_refusal());
        assert!(!answer(Protocol::Grpc).is_refusal());
    }
}
