//! The streams to all nodes: what each is to serve, and what it says of itself.
//!
//! The rule: the leader alone decides who gets which version, and every push carries its epoch. Any control node takes
//! any stream: one that follows passes it on to the leader, and without a leader it gives what has settled. A node that
//! is slow is cut off, never waited for.
//!
//! ```text
//!                       ┌ leading: hub, whose rollout goes on ─┬─▶ reports, for verdicts
//! stream ─▶ service ─▶ ─┼ following: relay ─▶ leader's service ┘
//!                       └ alone: hub, whose rollout stands still
//! ```
//!
//! When the role changes, all streams end; nodes come again, to whichever control node, and lose nothing by it.
//!
//! * `shelf`: versions at hand, and what is sent of them. `hub`: who is there and gets what; no I/O.
//! * `service`: one stream. `relay`: the same, to the leader. `lead`: the role as it is, and the leader's tasks.
//! * `settled`: what stays of it for the next leader.

mod hub;
mod lead;
mod relay;
mod service;
mod settings;
mod settled;
mod shelf;
mod standing;
mod status;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use parking_lot::Mutex;
use spillway_core::identity::{Role as Identity, SpiffeId};
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_proto::control::distribution_server::DistributionServer;
use spillway_runtime::link::MOST_MESSAGE;
use spillway_runtime::tls::Workload;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;

pub use settings::DistributionSettings;
pub use standing::Standing;
pub use status::DistributionStatus;

use crate::intent::{StatusSource, Version, Versions};
use crate::store::{Store, StoreError};
use lead::Role;
pub use service::Service;
use settled::Settled;

/// What nodes say, for [`crate::verdicts`].
#[derive(Debug)]
pub enum Report {
    /// A node's stream began.
    Joined(SpiffeId),
    /// It ended.
    Left(SpiffeId),
    Heartbeat(SpiffeId, control::Heartbeat),
    Sightings(SpiffeId, Vec<control::Sighting>),
}

/// How long a report waits for room.
const REPORT: Duration = Duration::from_secs(1);

impl Report {
    /// Whose it is.
    pub fn node(&self) -> &SpiffeId {
        match self {
            Self::Joined(node) | Self::Left(node) | Self::Heartbeat(node, _) | Self::Sightings(node, _) => node,
        }
    }

    /// Gives it to who judges. Where there is no room it is lost.
    pub async fn give(self, reports: &mpsc::Sender<Self>) {
        if reports.send_timeout(self, REPORT).await.is_err() {
            tracing::warn!("a report of a node is lost: nobody takes it");
        }
    }
}

/// Where versions come from.
#[async_trait]
pub trait Library: Send + Sync {
    /// The number of the newest version, 0 for none; tells of each new one.
    fn newest(&self) -> watch::Receiver<u64>;

    async fn version(&self, number: u64) -> Result<Option<Arc<Version>>, StoreError>;
}

#[async_trait]
impl Library for Versions {
    fn newest(&self) -> watch::Receiver<u64> {
        self.changed()
    }

    async fn version(&self, number: u64) -> Result<Option<Arc<Version>>, StoreError> {
        Self::version(self, number).await
    }
}

/// What the distribution goes by, and whom it tells.
pub struct Surroundings {
    /// Our own name.
    pub node: Name,
    pub workload: Arc<Workload>,
    pub store: Store,
    pub library: Arc<dyn Library>,
    pub standing: watch::Receiver<Standing>,
    /// The newest plan: the leader's own, or else the store's.
    pub plan: watch::Receiver<Option<Arc<control::SealedPlan>>>,
    /// `region/gateway` that somebody was just refused by.
    pub nudges: broadcast::Sender<String>,
    /// Told what all nodes may serve, while this node leads: what plans are made of.
    pub served: watch::Sender<Option<Arc<Version>>>,
    /// Filled by the leader alone. Where it stays full, heartbeats are lost.
    pub reports: mpsc::Sender<Report>,
}

/// The distribution of one control node. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Distribution(Arc<Inner>);

struct Inner {
    settings: DistributionSettings,
    around: Surroundings,
    role: ArcSwap<Role>,
    /// What the store said last of what has settled: it counts while the store cannot be asked.
    known: Mutex<Option<Settled>>,
    /// From which the hubs' time counts.
    began: Instant,
}

impl Distribution {
    pub fn new(settings: DistributionSettings, around: Surroundings) -> Self {
        let role = ArcSwap::from_pointee(Role::none());
        Self(Arc::new(Inner { settings, around, role, known: Mutex::default(), began: Instant::now() }))
    }

    /// The gRPC service. Each request needs an `Arc<Peer>` among its extensions: whom the connection is with.
    pub fn service(&self) -> DistributionServer<Service> {
        DistributionServer::new(Service::new(self.clone()))
            .max_decoding_message_size(MOST_MESSAGE)
            .max_encoding_message_size(MOST_MESSAGE)
    }

    /// Where the fleet is. Of the leader it is whole; of others, what their own streams say.
    pub fn status(&self) -> DistributionStatus {
        let role = self.0.role.load();
        role.hub().map(|hub| hub.lock().status(self.now())).unwrap_or_default()
    }

    fn now(&self) -> Duration {
        self.0.began.elapsed()
    }
}

impl StatusSource for Distribution {
    fn add_to(&self, status: &mut control::StatusResponse) {
        let DistributionStatus { settled, rollout, nodes } = self.status();
        (status.settled_version, status.rollout, status.nodes) = (settled, rollout, nodes);
    }
}

/// The path of the service, for the server's door.
pub const SERVICE: &str = "/spillway.control.v1.Distribution/";

/// Who may call it: nodes of the trust domain. Control nodes bring the streams of others, and are nodes themselves.
pub fn may_call(own: &SpiffeId, peer: &SpiffeId) -> bool {
    own.trust_domain == peer.trust_domain && is_node(peer)
}

fn is_node(id: &SpiffeId) -> bool {
    match id.role {
        Identity::Gateway { .. } | Identity::Sidecar { .. } | Identity::Control { .. } | Identity::Dns { .. } => true,
        Identity::Injector { .. } | Identity::Loader { .. } | Identity::Client { .. } | Identity::Operator { .. } => {
            false
        }
    }
}

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;
