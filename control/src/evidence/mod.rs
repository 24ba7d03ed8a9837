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
/// A sign of life, in both directions.
const BEAT: Duration = Duration::from_secs(5);
/// Two signs of life missed.
const SILENCE: Duration = Duration::from_secs(12);

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

#[cfg(test)]
mod tests {
    use spillway_proto::control::{Heartbeat, Sighting, Traffic};

    use super::*;

    fn id(path: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://{path}")).unwrap()
    }

    #[test]
    fn reports_come_as_they_were_and_signs_of_life_are_none() {
        let node = || id("td/region/eu/gateway/g");
        let heartbeat =
            Heartbeat { traffic: Some(Traffic { requests: 7, ..Traffic::default() }), ..Heartbeat::default() };
        let sighting = Sighting { region: "us".into(), gateway: "g".into(), outcome: 4, round_trip_us: 1 };
        for report in [
            Report::Joined(node()),
            Report::Left(node()),
            Report::Heartbeat(node(), heartbeat),
            Report::Sightings(node(), vec![sighting]),
        ] {
            let told = decode(encode(&report)).map(|told| format!("{told:?}"));
            assert_eq!(told, Some(format!("{report:?}")));
        }
        assert!(decode(Heard::default()).is_none());
        let of_nobody = Heard { node: "g".into(), ..encode(&Report::Left(node())) };
        assert!(decode(of_nobody).is_none());
    }

    #[test]
    fn only_control_nodes_of_the_trust_domain_may_call() {
        let own = id("td/region/eu/control/c-0");
        assert!(may_call(&own, &id("td/region/us/control/c-1")));
        for other in
            ["other/region/us/control/c-1", "td/region/us/gateway/g", "td/region/us/dns/d", "td/operator/alice"]
        {
            assert!(!may_call(&own, &id(other)), "{other}");
        }
    }
}
