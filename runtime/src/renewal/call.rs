//! Asking control nodes, one after the other, until one answers.

use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_proto::control::{BundleRequest, IssueRequest, IssueResponse};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::RenewalError;
use crate::dial::dial_as;
use crate::telemetry::Chain;

/// For a connection, and for an answer.
const CONNECT: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(5);
/// No chain and no bundle is near this.
const MOST_BYTES: usize = 1 << 20;

/// Control nodes, and who we are to them.
pub(super) struct Servers<'a> {
    pub servers: &'a [String],
    pub config: Arc<ClientConfig>,
    /// From 0 to 1: who is asked first, so that a fleet asks all of them.
    pub draw: f64,
}

impl Servers<'_> {
    pub async fn issue(&self, request: IssueRequest) -> Result<IssueResponse, RenewalError> {
        self.ask(async |client| client.issue(request.clone()).await).await
    }

    pub async fn bundle(&self) -> Result<String, RenewalError> {
        self.ask(async |client| client.bundle(BundleRequest {}).await).await.map(|bundle| bundle.roots)
    }

    /// The first answer. A node that says no has answered; one that cannot tell has not.
    async fn ask<T>(
        &self,
        call: impl AsyncFn(&mut AuthorityClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, RenewalError> {
        let count = self.servers.len();
        let first = (self.draw * count as f64) as usize;
        let mut problem = None;
        for index in 0..count {
            let server = &self.servers[(first + index) % count];
            let config = self.config.clone();
            let channel = match dial_as(move || config.clone(), server, CONNECT).await {
                Ok(channel) => channel,
                Err(error) => {
                    problem = Some(format!("{server}: {}", Chain(&error)));
                    continue;
                }
            };
            let mut client = AuthorityClient::new(channel).max_decoding_message_size(MOST_BYTES);
            match tokio::time::timeout(ANSWER, call(&mut client)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if is_denial(&status) => {
                    return Err(RenewalError::Denied(status.message().to_owned()));
                }
                Ok(Err(status)) => problem = Some(format!("{server}: {}", status.message())),
                Err(_) => problem = Some(format!("{server}: there was no answer in time")),
            }
        }
        Err(RenewalError::Unreachable(problem.unwrap_or_default()))
    }
}

fn is_denial(status: &Status) -> bool {
    matches!(status.code(), Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated)
}
