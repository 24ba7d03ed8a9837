//! What the next leader must know of the rollout, as the store has it.

use serde::{Deserialize, Serialize};
use spillway_core::rollout::{Change, Kind, Stop};

/// Its key.
pub const KEY: &str = "rollout";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    pub version: u64,
    /// Of the leader that wrote it: no node has seen a newer one that pushed anything.
    pub epoch: u64,
    /// The last change, if it was stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Stopped>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    pub version: u64,
    pub rollback: bool,
    pub why: String,
}

impl Stopped {
    pub fn of(change: Change, stop: &Stop) -> Self {
        let rollback = change.kind == Kind::Rollback;
        Self { version: change.version, rollback, why: stop.to_string().chars().take(512).collect() }
    }

    pub fn change(&self) -> Change {
        let kind = if self.rollback { Kind::Rollback } else { Kind::Ordinary };
        Change { version: self.version, kind }
    }
}
