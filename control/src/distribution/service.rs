//! One node's stream: whose it is, and its way to the hub or to the leader.
//!
//! The rule: a node is who its certificate says it is; a control node may bring the streams of others, which it has
//! asked the same. Each message is believed only while the certificate is.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use spillway_core::identity::{Role as Identity, SpiffeId};
use spillway_proto::control;
use spillway_proto::control::distribution_server;
use spillway_proto::control::from_node::Message as FromNode;
use spillway_proto::control::to_node::Message;
use spillway_runtime::tls::Peer;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::hub::{Hub, Joined, ToNode};
use super::lead::Part;
use super::{Distribution, Report, is_node};

/// Whose stream it is that a control node brings.
pub(super) const NODE: &str = "x-spillway-node";
/// How long a stream may take to say Hello.
const HELLO: Duration = Duration::from_secs(5);
/// Three heartbeats missed.
const SILENCE: Duration = Duration::from_secs(16);

type Outgoing = Pin<Box<dyn Stream<Item = Result<control::ToNode, Status>> + Send>>;

/// The tonic service: it translates and calls.
pub struct Service {
    distribution: Distribution,
}

impl Service {
    pub(super) fn new(distribution: Distribution) -> Self {
        Self { distribution }
    }
}

#[tonic::async_trait]
impl distribution_server::Distribution for Service {
    type FollowStream = Outgoing;

    async fn follow(&self, request: Request<Streaming<control::FromNode>>) -> Result<Response<Outgoing>, Status> {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("there is no certificate"))?;
        let (node, relayed) = whose(&peer.id, request.metadata())?;
        let incoming = request.into_inner();
        let role = self.distribution.0.role.load_full();
        let elsewhere = || Status::unavailable("another node leads, or none yet");
        let outgoing = match &role.part {
            Part::Hub { leads: false, .. } | Part::Relay(_) if relayed => return Err(elsewhere()),
            Part::None => return Err(elsewhere()),
            Part::Hub { hub, leads } => {
                let reports = leads.then_some(&self.distribution);
                let stream = NodeStream { node, peer, over: role.over.clone(), incoming };
                self.distribution.seat(hub, reports.is_some(), stream).await?
            }
            Part::Relay(relay) => {
                let (workload, over) = (self.distribution.0.around.workload.clone(), role.over.clone());
                let trusted = move || workload.still_trusted(&peer, SystemTime::now()).is_ok();
                Box::pin(relay.follow(&node, incoming, trusted).await?.take_until(over.cancelled_owned()))
            }
        };
        Ok(Response::new(outgoing))
    }
}

/// A stream that is to have a seat.
struct NodeStream {
    node: SpiffeId,
    peer: Arc<Peer>,
    /// The role's end.
    over: CancellationToken,
    incoming: Streaming<control::FromNode>,
}

impl Distribution {
    async fn seat(&self, hub: &Arc<Mutex<Hub>>, leads: bool, mut stream: NodeStream) -> Result<Outgoing, Status> {
        let hello = match tokio::time::timeout(HELLO, stream.incoming.message()).await {
            Ok(Ok(Some(control::FromNode { message: Some(FromNode::Hello(hello)) }))) => hello,
            Ok(Err(status)) => return Err(status),
            Ok(Ok(_)) => return Err(Status::invalid_argument("a stream begins with Hello")),
            Err(_) => return Err(Status::deadline_exceeded("a stream begins with Hello")),
        };
        let joined = hub.lock().join(&stream.node, hello, self.now());
        let Some(Joined { session, mut queue }) = joined else {
            return Err(Status::resource_exhausted("there are too many nodes"));
        };
        let over = stream.over.clone();
        let (distribution, hub) = (self.clone(), Arc::clone(hub));
        // Ends with the stream or with the role.
        tokio::spawn(async move {
            if leads {
                distribution.report(Report::Joined(stream.node.clone())).await;
            }
            distribution.listen(&hub, leads, session, &mut stream).await;
            let left = hub.lock().leave(&stream.node, session, distribution.now());
            if left && leads {
                distribution.report(Report::Left(stream.node)).await;
            }
        });
        let queue = stream::poll_fn(move |context| queue.poll_recv(context));
        Ok(Box::pin(queue.map(|message| Ok(encode(message))).take_until(over.cancelled_owned())))
    }

    /// Takes what a node says until it says nothing more, or is not believed any more.
    async fn listen(&self, hub: &Mutex<Hub>, leads: bool, session: u64, stream: &mut NodeStream) {
        let NodeStream { node, peer, over, incoming } = stream;
        loop {
            let message = tokio::select! {
                message = tokio::time::timeout(SILENCE, incoming.message()) => message,
                () = over.cancelled() => return,
            };
            let Ok(Ok(Some(control::FromNode { message }))) = message else { return };
            if let Err(error) = self.0.around.workload.still_trusted(peer, SystemTime::now()) {
                tracing::info!(%node, %error, "a node is not trusted any more");
                return;
            }
            // Of a later protocol.
            let Some(message) = message else { continue };
            if !hub.lock().hear(node, session, &message, self.now()) {
                return;
            }
            if leads {
                match message {
                    FromNode::Heartbeat(heartbeat) => self.report(Report::Heartbeat(node.clone(), heartbeat)).await,
                    FromNode::Sightings(control::Sightings { sightings }) => {
                        self.report(Report::Sightings(node.clone(), sightings)).await;
                    }
                    FromNode::Hello(_) | FromNode::Ack(_) | FromNode::Nack(_) => {}
                }
            }
        }
    }

    async fn report(&self, report: Report) {
        report.give(&self.0.around.reports).await;
    }
}

fn encode(message: ToNode) -> control::ToNode {
    let message = match message {
        ToNode::Delta(delta) => Message::Delta((*delta).clone()),
        ToNode::Plan(plan) => Message::Plan((*plan).clone()),
        ToNode::Pulse(pulse) => Message::Pulse((*pulse).clone()),
    };
    control::ToNode { message: Some(message) }
}

/// Whose stream it is, and whether another control node brings it.
fn whose(peer: &SpiffeId, metadata: &MetadataMap) -> Result<(SpiffeId, bool), Status> {
    let refused = |problem: &str| Err(Status::permission_denied(problem));
    let (node, relayed) = match metadata.get(NODE) {
        None => (peer.clone(), false),
        Some(_) if !matches!(peer.role, Identity::Control { .. }) => {
            return refused("only control nodes bring others' streams");
        }
        Some(value) => match value.to_str().ok().and_then(|id| SpiffeId::parse(id).ok()) {
            Some(id) if id.trust_domain == peer.trust_domain => (id, true),
            _ => return refused("this is no node of the trust domain"),
        },
    };
    if is_node(&node) {
        Ok((node, relayed))
    } else {
        refused("only gateways, sidecars, control and DNS nodes are nodes")
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn a_node_is_who_its_certificate_says_and_only_control_nodes_speak_for_others() {
        let id = |path: &str| SpiffeId::parse(&format!("spiffe://{path}")).unwrap();
        let (gateway, control) = (id("td/region/eu/gateway/one"), id("td/region/eu/control/one"));
        let with = |node: &str| {
            MetadataMap::from_headers([(NODE.parse().unwrap(), node.parse().unwrap())].into_iter().collect())
        };
        let plain = MetadataMap::new();
        let dns = id("td/region/eu/dns/one");
        for node in [&gateway, &control, &dns, &id("td/region/eu/sidecar/pool/one")] {
            assert_eq!(whose(node, &plain).unwrap(), (node.clone(), false));
        }
        assert_eq!(whose(&control, &with(&gateway.to_string())).unwrap(), (gateway.clone(), true));
        for (peer, metadata) in [
            (&id("td/tenant/shop/client/one"), plain),
            (&gateway, with(&control.to_string())),
            (&gateway, with(&gateway.to_string())),
            (&dns, with(&gateway.to_string())),
            (&dns, with(&dns.to_string())),
            (&control, with("spiffe://td/tenant/shop/client/one")),
            (&control, with("spiffe://other/region/eu/gateway/one")),
            (&control, with("gateway")),
        ] {
            assert_eq!(whose(peer, &metadata).unwrap_err().code(), Code::PermissionDenied, "{peer} {metadata:?}");
        }
    }
}
