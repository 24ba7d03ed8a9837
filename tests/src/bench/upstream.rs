//! The upstream that both proxies call: an h2 server with mTLS that knows one answer.
//!
//! As little work as an honest server can do, so that the proxy is what limits the calls. It takes the
//! place of a sidecar, hence answers health and readiness too.

use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;

use anyhow::Result;
use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::identities::Identities;
use super::message;

/// `true` as field 1: SERVING of the health service, `ready` of each of OIP's readiness calls.
const READY: &[u8] = &[0, 0, 0, 0, 2, 8, 1];

/// Serves until the process ends; says where as its first line, and ends when its input does.
pub async fn serve(pki: &Path) -> Result<()> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let acceptor = TlsAcceptor::from(Identities::at(pki).upstream()?);
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    println!("{}", serde_json::json!({ "listening": listener.local_addr()? }));
    let answers = Rc::new(Answers { infer: message::response(), ready: Bytes::from_static(READY) });
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
    infer: Bytes,
    ready: Bytes,
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, answers: Rc<Answers>) -> Result<()> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
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
    let infer = request.uri().path() == message::PATH;
    let mut body = request.into_body();
    while let Some(part) = body.data().await {
        body.flow_control().release_capacity(part?.len())?;
    }
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    if infer {
        head.headers_mut().insert("server-timing", HeaderValue::from_static("features;dur=0.21, model;dur=1.02"));
    }
    let mut send = reply.send_response(head, false)?;
    send.send_data(if infer { answers.infer.clone() } else { answers.ready.clone() }, false)?;
    send.send_trailers(HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]))
}
