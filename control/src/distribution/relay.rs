//! A node's stream, passed on to the leader.
//!
//! The rule: messages go through as they are, both ways; the end of one side is the end of the other. Nothing is kept.

use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use spillway_core::identity::{ExpectedPeer, SpiffeId};
use spillway_proto::control;
use spillway_proto::control::distribution_client::DistributionClient;
use spillway_runtime::dial::dial;
use spillway_runtime::link::MOST_MESSAGE;
use spillway_runtime::tls::Workload;
use tokio::sync::Mutex;
use tokio_stream::StreamExt;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::service::NODE;
use crate::store::Leader;

/// Connecting, and the leader's answer, each: less than a node waits for ours.
const OPENING: Duration = Duration::from_millis(1_400);
/// Streams of one connection: fewer than a server takes.
const STREAMS: usize = 48;
/// Connections to the leader, for as many nodes as there can be.
const CONNECTIONS: usize = 1_100;

pub(super) struct Relay {
    leader: Leader,
    workload: Arc<Workload>,
    connections: Mutex<Vec<Connection>>,
}

struct Connection {
    channel: Channel,
    /// Held by each of its streams.
    streams: Arc<()>,
}

impl Relay {
    pub fn new(leader: Leader, workload: Arc<Workload>) -> Self {
        Self { leader, workload, connections: Mutex::default() }
    }

    /// Passes a stream on as long as the node is trusted.
    pub async fn follow(
        &self,
        node: &SpiffeId,
        incoming: Streaming<control::FromNode>,
        trusted: impl Fn() -> bool + Send + 'static,
    ) -> Result<impl Stream<Item = Result<control::ToNode, Status>> + Send + 'static, Status> {
        let (channel, place) = self.connection().await?;
        let mut request = Request::new(incoming.map_while(move |message| message.ok().filter(|_| trusted())));
        let name = MetadataValue::try_from(node.to_string()).map_err(|error| away(&error))?;
        request.metadata_mut().insert(NODE, name);
        let mut client = DistributionClient::new(channel)
            .max_decoding_message_size(MOST_MESSAGE)
            .max_encoding_message_size(MOST_MESSAGE);
        let answer = tokio::time::timeout(OPENING, client.follow(request)).await;
        let outgoing = answer.map_err(|late| away(&late))??.into_inner();
        Ok(outgoing.map(move |message| {
            let _held = &place;
            message
        }))
    }

    /// A connection with room, and a place on it.
    async fn connection(&self) -> Result<(Channel, Arc<()>), Status> {
        let mut connections = self.connections.lock().await;
        if let Some(with_room) = connections.iter().find(|known| Arc::strong_count(&known.streams) <= STREAMS) {
            return Ok((with_room.channel.clone(), with_room.streams.clone()));
        }
        if connections.len() >= CONNECTIONS {
            return Err(Status::resource_exhausted("there are too many streams"));
        }
        let expected = ExpectedPeer::ControlOf { trust_domain: self.workload.id().trust_domain };
        let channel =
            dial(&self.workload, expected, &self.leader.address, OPENING).await.map_err(|error| away(&error))?;
        let streams = Arc::new(());
        connections.push(Connection { channel: channel.clone(), streams: streams.clone() });
        Ok((channel, streams))
    }
}

fn away(problem: &dyn std::fmt::Display) -> Status {
    Status::unavailable(format!("the leader: {problem}"))
}
