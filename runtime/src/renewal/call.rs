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
        let call = |mut client: AuthorityClient<Channel>| {
            let request = request.clone();
            async move { client.issue(request).await }
        };
        self.ask(call).await
    }

    pub async fn bundle(&self) -> Result<String, RenewalError> {
        let call = |mut client: AuthorityClient<Channel>| async move { client.bundle(BundleRequest {}).await };
        self.ask(call).await.map(|bundle| bundle.roots)
    }

    /// The first answer. A node that says no has answered; one that cannot tell has not.
    async fn ask<T, F>(&self, call: impl Fn(AuthorityClient<Channel>) -> F) -> Result<T, RenewalError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
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
            let client = AuthorityClient::new(channel).max_decoding_message_size(MOST_BYTES);
            match tokio::time::timeout(ANSWER, call(client)).await {
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
