//! An operator's questions to the control plane's certificate authority.

use std::time::Duration;

use anyhow::{Result, bail};
use spillway_core::identity::ExpectedPeer;
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_runtime::dial::dial;
use spillway_runtime::tls::Workload;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::control::Target;

const CONNECT: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(10);

/// Asks node by node until one can answer: some things only the leader does, and it is not asked for by others.
pub fn ask<T, F>(target: &Target, call: impl Fn(AuthorityClient<Channel>) -> F) -> Result<T>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let workload = Workload::load(&target.identity()?)?;
    let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut problems = Vec::new();
        for server in &target.servers()? {
            let channel = match dial(&workload, expected.clone(), server, CONNECT).await {
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
    })
}
