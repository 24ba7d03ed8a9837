//! Up to a thousand pods in this process: each a port and a certificate of its own, and the right answer for
//! any model.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::pki::Pki;
use super::{message, world};
use crate::bench::process;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
/// `true` as field 1: SERVING of the health service.
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];

/// They serve until this value goes.
pub struct Pods {
    pub addresses: Vec<SocketAddr>,
    /// Dropped first, it ends the thread.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Pods {
    /// On a thread of its own, bound to one core.
    pub fn start(count: usize, pki: &Pki, core: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut listening = Vec::with_capacity(count);
        for at in 0..count {
            let listener = runtime.block_on(TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))))?;
            listening.push((listener, pki.pod(&world::pod(at))?));
        }
        let addresses = listening.iter().map(|(listener, _)| listener.local_addr()).collect::<Result<_, _>>()?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = process::on_cores(&[core], || {
            std::thread::spawn(move || {
                tokio::task::LocalSet::new().block_on(&runtime, async {
                    for (listener, config) in listening {
                        tokio::task::spawn_local(serve(listener, config));
                    }
                    // An error says that the sender is gone, which is what is waited for.
                    let _ = stopped.await;
                });
            })
        })?;
        Ok(Self { addresses, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        drop(self.stop.take());
        // A panic there has been printed.
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

async fn serve(listener: TcpListener, config: Arc<ServerConfig>) {
    let acceptor = TlsAcceptor::from(config);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::task::spawn_local(connection(stream, acceptor.clone()))),
            Err(error) => eprintln!("a pod cannot accept: {error}"),
        }
    }
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor) -> Result<()> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let mut connection: h2::server::Connection<_, Bytes> = h2::server::handshake(stream).await?;
    while let Some(call) = connection.accept().await {
        let (request, reply) = call?;
        tokio::task::spawn_local(async move {
            // A caller that went away is its own affair; whoever gets no answer says so.
            let _ = answer(request, reply).await;
        });
    }
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut reply: SendResponse<Bytes>) -> Result<()> {
    let infer = request.uri().path() == INFER;
    let body = whole(request.into_body()).await?;
    let message = if infer { message::answer(&body)? } else { Bytes::from_static(SERVING) };
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let mut send = reply.send_response(head, false)?;
    send.send_data(message, false)?;
    let status = (HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
    send.send_trailers(HeaderMap::from_iter([status]))?;
    Ok(())
}

/// A body in one piece.
async fn whole(mut body: RecvStream) -> Result<Bytes> {
    let mut all = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part.context("no whole body")?;
        body.flow_control().release_capacity(part.len())?;
        all.extend_from_slice(&part);
    }
    Ok(all.freeze())
}
