//! A gRPC channel to a server that proves its SPIFFE id.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use spillway_core::identity::SpiffeId;
use spillway_runtime::tls::Workload;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

const CONNECT: Duration = Duration::from_secs(2);

/// Connects; `call` is the deadline of each call.
pub async fn connect(workload: &Arc<Workload>, address: &str, expected: &SpiffeId, call: Duration) -> Result<Channel> {
    let (workload, expected, given) = (workload.clone(), expected.clone(), address.to_owned());
    let connector = tower::service_fn(move |_: Uri| {
        let (config, address) = (workload.client_config(expected.clone()), given.clone());
        async move {
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            // The name is not looked at: the SPIFFE id is what is verified.
            let name = ServerName::try_from("spillway").map_err(std::io::Error::other)?;
            TlsConnector::from(config).connect(name, tcp).await.map(TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("http://spillway").connect_timeout(CONNECT).timeout(call);
    // The connector has no time-out of its own.
    let connected = tokio::time::timeout(CONNECT, endpoint.connect_with_connector(connector)).await;
    connected.context("it takes too long").and_then(|connected| Ok(connected?)).with_context(|| address.to_owned())
}
