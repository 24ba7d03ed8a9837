//! The way to a gRPC service of ours: a tonic channel over mTLS.
//!
//! The rule: the server is known by its SPIFFE id, whatever name or address it is called by. For long calls between
//! processes; requests of clients take [`crate::upstream`].

use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use spillway_core::identity::ExpectedPeer;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::tls::Workload;

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// The server's fault, or the link's. Nothing was called; a retry is safe.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("it cannot be reached")]
    Unreachable(#[source] tonic::transport::Error),
    #[error("it did not answer in time")]
    Timeout,
}

/// Connects to `server`, `host:port`. A channel whose connection was lost connects anew by itself when it is called.
pub async fn dial(
    workload: &Arc<Workload>,
    expected: impl Into<ExpectedPeer>,
    server: &str,
    within: Duration,
) -> Result<Channel, DialError> {
    let (workload, expected) = (workload.clone(), expected.into());
    dial_as(move || workload.client_config(expected.clone()), server, within).await
}

/// The same with what `config` gives for each connection: it says who the server must be, and who we are.
pub async fn dial_as(
    config: impl Fn() -> Arc<ClientConfig> + Send + 'static,
    server: &str,
    within: Duration,
) -> Result<Channel, DialError> {
    let server: Arc<str> = server.into();
    let connector = service_fn(move |_: Uri| {
        let (config, server) = (config(), server.clone());
        async move { connect(config, &server).await.map(TokioIo::new) }
    });
    // Neither scheme nor name is looked at: the connector does both.
    let endpoint = Endpoint::from_static("http://spillway")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_timeout(within);
    let connected = tokio::time::timeout(within, endpoint.connect_with_connector(connector));
    connected.await.map_err(|_| DialError::Timeout)?.map_err(DialError::Unreachable)
}

async fn connect(config: Arc<ClientConfig>, server: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    let stream = TlsConnector::from(config).connect(name, stream).await?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(std::io::Error::other("it does not speak h2"));
    }
    Ok(stream)
}
