//! A node's stream, passed on to the leader.
//!
//! The rule: messages go through as they are, both ways; the end of one side is the end of the other. Nothing is kept.

use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::{ExpectedPeer, SpiffeId};
use spillway_proto::control;
use spillway_proto::control::distribution_client::DistributionClient;
use spillway_runtime::dial::dial;
use spillway_runtime::link::MOST_MESSAGE;
use spillway_runtime::tls::Workload;
use tokio::sync::OnceCell;
use tokio_stream::StreamExt;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::service::NODE;
use crate::store::Leader;

/// Connecting, and the leader's answer, each: less than a node waits for ours.
const OPENING: Duration = Duration::from_millis(1_400);

pub(super) struct Relay {
    leader: Leader,
    workload: Arc<Workload>,
    /// One connection for all streams.
    channel: OnceCell<Channel>,
}

impl Relay {
    pub fn new(leader: Leader, workload: Arc<Workload>) -> Self {
        Self { leader, workload, channel: OnceCell::new() }
    }

    /// Passes a stream on as long as the node is trusted.
    pub async fn follow(
        &self,
        node: &SpiffeId,
        incoming: Streaming<control::FromNode>,
        trusted: impl Fn() -> bool + Send + 'static,
    ) -> Result<Streaming<control::ToNode>, Status> {
        let away = |problem: &dyn std::fmt::Display| Status::unavailable(format!("the leader: {problem}"));
        let expected = ExpectedPeer::ControlOf { trust_domain: self.workload.id().trust_domain };
        let connect = || dial(&self.workload, expected, &self.leader.address, OPENING);
        let channel = self.channel.get_or_try_init(connect).await.map_err(|error| away(&error))?.clone();
        let mut request = Request::new(incoming.map_while(move |message| message.ok().filter(|_| trusted())));
        let name = MetadataValue::try_from(node.to_string()).map_err(|error| away(&error))?;
        request.metadata_mut().insert(NODE, name);
        let mut client = DistributionClient::new(channel)
            .max_decoding_message_size(MOST_MESSAGE)
            .max_encoding_message_size(MOST_MESSAGE);
        let answer = tokio::time::timeout(OPENING, client.follow(request)).await;
        Ok(answer.map_err(|late| away(&late))??.into_inner())
    }
}
