//! What is heard of regions, shared among control nodes.
//!
//! The rule: control nodes are vantages, whether they lead or not. Who follows tells the leader what it saw, and is told
//! all that the leader heard, so that it has the same evidence when it leads. Nobody waits for anybody: who is slow
//! misses some, and there is newer soon.
//!
//! ```text
//! follower: own probes ─▶ log ─▶ [`Follower`] ══▶ [`Service`] ─▶ reports ─▶ judging :leader
//!                     reports ◀─ [`Follower`] ◀══ [`Service`] ◀── shared ◀─────┘
//! ```

mod follower;
mod service;

use std::time::Duration;

use spillway_core::identity::{Role, SpiffeId};
use spillway_proto::control::Heard;
use spillway_proto::control::heard::What;

pub use follower::Follower;
pub use service::Service;

use crate::distribution::Report;

/// The path of the service, for the server's door.
pub const SERVICE: &str = "/spillway.control.v1.Evidence/";
/// A sign of life.
const BEAT: Duration = Duration::from_secs(5);

/// Who may call it: control nodes of the trust domain.
pub fn may_call(own: &SpiffeId, peer: &SpiffeId) -> bool {
    own.trust_domain == peer.trust_domain && matches!(peer.role, Role::Control { .. })
}

fn encode(report: &Report) -> Heard {
    let what = match report {
        Report::Joined(_) => What::Here(true),
        Report::Left(_) => What::Here(false),
        Report::Heartbeat(_, heartbeat) => What::Heartbeat(heartbeat.clone()),
        Report::Sightings(_, sightings) => {
            What::Sightings(spillway_proto::control::Sightings { sightings: sightings.clone() })
        }
    };
    Heard { node: report.node().to_string(), what: Some(what) }
}

/// None: a sign of life, or of a later protocol.
fn decode(heard: Heard) -> Option<Report> {
    let (node, what) = (SpiffeId::parse(&heard.node).ok()?, heard.what?);
    Some(match what {
        What::Here(true) => Report::Joined(node),
        What::Here(false) => Report::Left(node),
        What::Heartbeat(heartbeat) => Report::Heartbeat(node, heartbeat),
        What::Sightings(sightings) => Report::Sightings(node, sightings.sightings),
    })
}
