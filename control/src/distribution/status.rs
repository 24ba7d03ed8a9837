//! Where the fleet is, for people.

use std::time::Duration;

use spillway_core::identity::SpiffeId;
use spillway_core::rollout::Progress;
use spillway_proto::control;

use super::hub::{Hub, Seat};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct DistributionStatus {
    /// What everyone may have.
    pub settled: u64,
    /// How far the last change is, in a few lines.
    pub rollout: String,
    /// In the order of their ids.
    pub nodes: Vec<control::NodeStatus>,
}

impl Hub {
    pub fn status(&self, now: Duration) -> DistributionStatus {
        let node = |(id, seat): (&SpiffeId, &Seat)| control::NodeStatus {
            id: id.to_string(),
            connected: seat.left.is_none(),
            serving: Some(seat.serving.clone()),
            drift: self.drift(id, seat, now),
            build: seat.build.clone(),
        };
        DistributionStatus {
            settled: self.settled(),
            rollout: self.rollout.status(now).to_string(),
            nodes: self.seats.iter().map(node).collect(),
        }
    }

    /// How a node is not as it should be; empty if it is.
    fn drift(&self, id: &SpiffeId, seat: &Seat, now: Duration) -> String {
        let mut drift = Vec::new();
        let (serving, settled) = (seat.serving.snapshot_version, self.settled());
        if let Some((since, _)) = seat.left {
            drift.push(format!("away for {} s", now.saturating_sub(since).as_secs()));
        }
        if seat.differs {
            drift.push(format!("what it serves as {serving} is something else"));
        }
        if serving < settled {
            drift.push(format!("behind: serves {serving}, settled is {settled}"));
        } else if serving > settled && !matches!(self.rollout.progress(), Progress::Running { .. }) {
            drift.push(format!("serves {serving}, which has not settled"));
        } else if let Some(wanted) = self.rollout.wanted(id) {
            drift.push(format!("is given {wanted}"));
        }
        if let Some((newest, _)) = self.plan.as_ref().filter(|(newest, _)| *newest > seat.serving.plan_version) {
            drift.push(format!("acts on the plan {}, the newest is {newest}", seat.serving.plan_version));
        }
        let refused = |what| move |(version, why): &(u64, String)| format!("refused {what}{version}: {why}");
        drift.extend(seat.refused.iter().map(refused("")));
        drift.extend(seat.refused_plan.iter().map(refused("the plan ")));
        drift.join("; ")
    }
}
