//! The way of an operator's commands to the control plane's certificate authority.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use spillway_core::identity::ExpectedPeer;
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_runtime::dial::dial;
use spillway_runtime::tls::{IdentitySettings, Workload};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

const CONNECT: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(10);

/// Which control nodes, and who asks.
#[derive(clap::Args)]
pub struct Target {
    /// Control nodes, host:port; the first that can do it does
    #[arg(long, value_name = "HOST:PORT", env = "SPILLWAY_CONTROL", value_delimiter = ',', required = true)]
    control: Vec<String>,
    /// The operator's folder: certificate.pem, key.pem, trust-bundle.pem
    #[arg(long, value_name = "DIR", env = "SPILLWAY_IDENTITY")]
    identity: PathBuf,
}

impl Target {
    /// Asks node by node: some things only the leader does.
    pub async fn ask<T, F>(&self, call: impl Fn(AuthorityClient<Channel>) -> F) -> Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let file = |name: &str| self.identity.join(name);
        let identity = IdentitySettings {
            certificate: file("certificate.pem"),
            key: file("key.pem"),
            trust_bundle: file("trust-bundle.pem"),
        };
        let workload = Workload::load(&identity).with_context(|| self.identity.display().to_string())?;
        let mut problems = Vec::new();
        for server in &self.control {
            let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
            let channel = match dial(&workload, expected, server, CONNECT).await {
                Ok(channel) => channel,
                Err(error) => {
                    problems.push(format!("{server}: {:#}", anyhow::Error::from(error)));
                    continue;
                }
            };
            match tokio::time::timeout(ANSWER, call(AuthorityClient::new(channel))).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if status.code() == Code::Unavailable => {
                    problems.push(format!("{server}: {}", status.message()));
                }
                Ok(Err(status)) => bail!("{server}: {}", status.message()),
                Err(_) => problems.push(format!("{server}: no answer in time")),
            }
        }
        bail!("{}", problems.join("\n"))
    }
}
