//! From what vantages see of regions to the plan: who gets how much of the traffic.
//!
//! The rule: judged here, by core; written to the store with the fence of this node's election; and only then told to
//! anybody. A plan that could not be written is told to nobody.
//!
//! ```text
//! nodes: sightings, heartbeats ─▶ hearing ─▶ judge: Fleet, Demand ─every 250 ms─▶ Plan::of
//!          (one's own vantage too)    │          ▲                                   │ differs in what matters
//!                                     │       overrides                              ▼
//!                        nudges ◀─────┘                               docket: store, key `plan` ──▶ published
//!          other nodes:                     key `plan` ──watched────────────────────────────────▶ published
//! ```
//!
//! Every control node hears ([`crate::evidence`]); the leader alone judges, so that a new leader has evidence from its
//! first second. It goes on from the records beside the plan. While the store cannot be written, or says that the election is over, nothing
//! new is told: two leaders with two truths would be worse than none, and no failover waits for it. Gateways spill over
//! by themselves, and DNS nodes answer the last plan without what they see to be down.
//!
//! * [`settings`]: the rules' figures. `hearing`, `traffic`, `answered`: what is heard of regions. `orders`: operators' overrides.
//! * `judge`: all of that, to a plan. `docket`: when a plan is worth a version. `stored`: what the next leader reads.
//! * `judging`: the task. `status`: what people see of it. `metrics`.

mod answered;
mod docket;
mod hearing;
mod judge;
mod judging;
mod metrics;
mod orders;
mod settings;
mod status;
mod stored;
mod traffic;

use std::sync::Arc;

use spillway_core::health::{Gateway, Vantage};
use spillway_core::identity::{Role, SpiffeId};
use spillway_proto::control::SealedPlan;
use tokio::sync::watch;

pub use judging::{Inputs, Judging};
pub use settings::HealthSettings;
pub use status::Findings;

/// What is judged, for the rest of the process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Verdicts {
    plan: watch::Receiver<Option<Arc<SealedPlan>>>,
    findings: watch::Receiver<Arc<Findings>>,
}

impl Verdicts {
    /// The plan that is in force: the newest in the store that this node knows.
    pub fn plan(&self) -> watch::Receiver<Option<Arc<SealedPlan>>> {
        self.plan.clone()
    }

    /// What `spillway status` shows of regions. On a node that does not lead, as the leader last wrote it.
    pub fn findings(&self) -> Arc<Findings> {
        self.findings.borrow().clone()
    }
}

/// Who of the nodes has a word on regions.
pub fn vantage(id: &SpiffeId) -> Option<Vantage> {
    match &id.role {
        Role::Gateway { region, name } => {
            Some(Vantage::Gateway(Gateway { region: region.clone(), node: name.clone() }))
        }
        Role::Control { region, name } => Some(Vantage::Control { region: Some(region.clone()), node: name.clone() }),
        Role::Dns { region, name } => Some(Vantage::Dns { region: Some(region.clone()), node: name.clone() }),
        Role::Sidecar { .. }
        | Role::Injector { .. }
        | Role::Loader { .. }
        | Role::Client { .. }
        | Role::Operator { .. } => None,
    }
}

#[cfg(test)]
mod tests;
