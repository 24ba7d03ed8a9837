//! A connection to a sidecar, mutually authenticated.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use spillway_core::identity::{InvalidId, SpiffeId};
use spillway_runtime::tls::{IdentitySettings, Workload};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

/// Which sidecar, and who is asking.
#[derive(clap::Args)]
pub struct Target {
    /// A region that `spillway dev` runs out of this folder, instead of the five options below
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, require_equals = true, default_missing_value = ".dev")]
    dev: Option<PathBuf>,
    /// Which region, with --dev [default: the first one]
    #[arg(long, value_name = "NAME", requires = "dev")]
    region: Option<String>,
    /// The sidecar's address
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "dev")]
    sidecar: Option<String>,
    /// The identity that the sidecar must prove
    #[arg(long, value_name = "SPIFFE-ID", required_unless_present = "dev", value_parser = parse_id)]
    sidecar_id: Option<SpiffeId>,
    /// Our certificate chain, PEM; its role is control or gateway
    #[arg(long, value_name = "FILE", required_unless_present = "dev")]
    certificate: Option<PathBuf>,
    /// Our private key, PEM
    #[arg(long, value_name = "FILE", required_unless_present = "dev")]
    key: Option<PathBuf>,
    /// The roots that are trusted, PEM
    #[arg(long, value_name = "FILE", required_unless_present = "dev")]
    trust_bundle: Option<PathBuf>,
}

/// All that it takes to connect.
#[derive(Clone)]
pub struct Connection {
    pub address: String,
    pub expected: SpiffeId,
    pub identity: IdentitySettings,
}

impl Target {
    pub fn connection(&self) -> Result<Connection> {
        if let Some(folder) = &self.dev {
            return crate::dev::loader(folder, self.region.as_deref());
        }
        let given = (&self.sidecar, &self.sidecar_id, &self.certificate, &self.key, &self.trust_bundle);
        let (Some(address), Some(expected), Some(certificate), Some(key), Some(trust_bundle)) = given else {
            bail!("--dev, or all of --sidecar, --sidecar-id, --certificate, --key and --trust-bundle are needed");
        };
        let (certificate, key, trust_bundle) = (certificate.clone(), key.clone(), trust_bundle.clone());
        let identity = IdentitySettings { certificate, key, trust_bundle };
        Ok(Connection { address: address.clone(), expected: expected.clone(), identity })
    }
}

fn parse_id(text: &str) -> Result<SpiffeId, InvalidId> {
    SpiffeId::parse(text)
}

impl Connection {
    pub async fn connect(&self) -> Result<Channel> {
        let config = Workload::load(&self.identity)?.client_config(self.expected.clone());
        let address = self.address.clone();
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
            .with_context(|| format!("cannot connect to the sidecar at {}", self.address))
    }
}
