//! The upstream that all proxies call: an mTLS server of HTTP/2 and HTTP/1.1 that knows one answer.
//!
//! As little work as an honest server can do, so that the proxy is what limits the calls. It takes the
//! place of a sidecar, hence answers gRPC health and readiness too; REST it answers to proxies that pass it on.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;

use anyhow::Result;
use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::identities::Identities;
use super::message::{Protocol, grpc, rest};

/// `true` as field 1: SERVING of the health service, `ready` of each of OIP's readiness calls.
const READY: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
/// What a sidecar says of the call.
const SERVER_TIMING: (HeaderName, HeaderValue) =
    (HeaderName::from_static("server-timing"), HeaderValue::from_static("features;dur=0.21, model;dur=1.02"));

/// Serves until the process ends; says where as its first line, and ends when its input does.
pub async fn serve(pki: &Path) -> Result<()> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let acceptor = TlsAcceptor::from(Identities::at(pki).upstream()?);
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    println!("{}", serde_json::json!({ "listening": listener.local_addr()? }));
    let answers = Rc::new(Answers::new());
    loop {
        let (stream, _) = listener.accept().await?;
        let (acceptor, answers) = (acceptor.clone(), answers.clone());
        tokio::task::spawn_local(async move {
            if let Err(error) = connection(stream, acceptor, answers).await {
                eprintln!("upstream: {error:#}");
            }
        });
    }
}

struct Answers {
    grpc: (HeaderMap, Bytes),
    rest: (HeaderMap, Bytes),
    ready: (HeaderMap, Bytes),
}

impl Answers {
    fn new() -> Self {
        let ready = HeaderMap::from_iter([(header::CONTENT_TYPE, grpc::CONTENT_TYPE)]);
        let mut grpc = ready.clone();
        grpc.extend([SERVER_TIMING]);
        let rest_body = Protocol::H2.response();
        let rest = HeaderMap::from_iter([
            (header::CONTENT_TYPE, rest::CONTENT_TYPE),
            (header::CONTENT_LENGTH, HeaderValue::from(rest_body.len())),
            (rest::HEAD_LENGTH, rest::response_head_length()),
            SERVER_TIMING,
        ]);
        Self {
            grpc: (grpc, Protocol::Grpc.response()),
            rest: (rest, rest_body),
            ready: (ready, Bytes::from_static(READY)),
        }
    }
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, answers: Rc<Answers>) -> Result<()> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    // Who negotiates nothing speaks HTTP/1.1, as nginx does to an upstream of REST.
    if stream.get_ref().1.alpn_protocol() != Some(Protocol::H2.alpn()) {
        return http1(stream, answers).await;
    }
    let mut connection: Connection<_, Bytes> =
        h2::server::Builder::new().max_concurrent_streams(1_000).handshake(stream).await?;
    while let Some(call) = connection.accept().await {
        let (request, reply) = call?;
        let answers = answers.clone();
        tokio::task::spawn_local(async move {
            // A caller that went away is its own affair.
            let _ = answer(request, reply, &answers).await;
        });
    }
    Ok(())
}

async fn answer(
    request: Request<h2::RecvStream>,
    mut reply: SendResponse<Bytes>,
    answers: &Answers,
) -> Result<(), h2::Error> {
    let path = request.uri().path();
    let is_rest = path == rest::PATH;
    let (headers, message) = match path {
        grpc::PATH => &answers.grpc,
        rest::PATH => &answers.rest,
        _ => &answers.ready,
    };
    let mut body = request.into_body();
    while let Some(part) = body.data().await {
        body.flow_control().release_capacity(part?.len())?;
    }
    let mut head = Response::new(());
    *head.headers_mut() = headers.clone();
    let mut send = reply.send_response(head, false)?;
    send.send_data(message.clone(), is_rest)?;
    if is_rest {
        return Ok(());
    }
    send.send_trailers(HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]))
}

/// REST alone: gRPC needs HTTP/2.
async fn http1(stream: TlsStream<TcpStream>, answers: Rc<Answers>) -> Result<()> {
    let answer = hyper::service::service_fn(move |request: Request<Incoming>| {
        let answers = answers.clone();
        async move {
            let is_known = request.uri().path() == rest::PATH;
            // A body that breaks off breaks the connection too.
            let _ = request.into_body().collect().await;
            let (headers, message) = &answers.rest;
            let mut response = Response::new(Full::new(message.clone()));
            *response.headers_mut() = headers.clone();
            if !is_known {
                *response.status_mut() = http::StatusCode::NOT_FOUND;
            }
            Ok::<_, Infallible>(response)
        }
    });
    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await?;
    Ok(())
}
