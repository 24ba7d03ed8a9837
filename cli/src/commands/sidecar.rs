//! A connection to a sidecar, mutually authenticated.

use std::path::PathBuf;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use spillway_core::identity::SpiffeId;
use spillway_runtime::tls::{IdentitySettings, Workload};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

/// Which sidecar, and who is asking.
#[derive(clap::Args, Clone)]
pub struct Connection {
    /// The sidecar's address
    #[arg(long, value_name = "HOST:PORT")]
    pub sidecar: String,
    /// The identity that the sidecar must prove
    #[arg(long, value_name = "SPIFFE-ID")]
    pub sidecar_id: String,
    /// Our certificate chain, PEM
    #[arg(long, value_name = "FILE")]
    pub certificate: PathBuf,
    /// Our private key, PEM
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// The roots that are trusted, PEM
    #[arg(long, value_name = "FILE")]
    pub trust_bundle: PathBuf,
}

impl Connection {
    pub async fn connect(&self) -> Result<Channel> {
        let expected = SpiffeId::parse(&self.sidecar_id).with_context(|| format!("--sidecar-id {}", self.sidecar_id))?;
        let identity = IdentitySettings {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            trust_bundle: self.trust_bundle.clone(),
        };
        let config = Workload::load(&identity)?.client_config(expected);
        let address = self.sidecar.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let (config, address) = (config.clone(), address.clone());
            async move {
                let tcp = TcpStream::connect(&address).await?;
                tcp.set_nodelay(true)?;
                // The name is not looked at: the SPIFFE id is what is verified.
                let name = ServerName::try_from("sidecar").map_err(std::io::Error::other)?;
                TlsConnector::from(config).connect(name, tcp).await.map(TokioIo::new)
            }
        });
        Endpoint::from_static("http://sidecar")
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("cannot connect to the sidecar at {}", self.sidecar))
    }
}
