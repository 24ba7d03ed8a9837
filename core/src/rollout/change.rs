//! A change of version: its kind, its stages, how long they take, and how it ended.

use std::fmt;
use std::time::Duration;

use super::comparison::{ComparisonSettings, Worse};
use crate::identity::SpiffeId;

/// Why there is a new version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An operator changed something.
    Ordinary,
    /// The content of an older version again.
    Rollback,
}

/// A new version on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub version: u64,
    pub kind: Kind,
}

/// Who may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// One gateway.
    Canary,
    /// All nodes of its region.
    Region,
    All,
}

/// How long the stages of a change take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pace {
    /// How long the canary is watched after it applied the version. Default 30 s.
    pub canary_dwell: Duration,
    /// How long its region is. Default 30 s.
    pub region_dwell: Duration,
    /// How long nodes that are there are waited for. Default 15 s: three heartbeats.
    pub patience: Duration,
    /// Canaries that may be tried: one that goes away or does not apply it is lost. At least 1, default 2.
    pub canaries: u32,
}

impl Pace {
    /// How long the first stage may take.
    pub(super) fn trial(&self) -> Duration {
        self.patience.saturating_add(self.canary_dwell).saturating_mul(self.canaries.max(1))
    }
}

/// How changes roll.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutSettings {
    pub ordinary: Pace,
    /// Default: 1 s for each dwell, 1.5 s of patience.
    pub rollback: Pace,
    pub comparison: ComparisonSettings,
}

impl Default for RolloutSettings {
    fn default() -> Self {
        let [second, half] = [Duration::from_secs(1), Duration::from_millis(500)];
        let pace = |dwell, patience| Pace { canary_dwell: dwell, region_dwell: dwell, patience, canaries: 2 };
        Self {
            ordinary: pace(second * 30, second * 15),
            rollback: pace(second, second + half),
            comparison: ComparisonSettings::default(),
        }
    }
}

impl RolloutSettings {
    /// The longest that a change takes until it is done or stopped, whatever nodes do.
    pub fn longest(&self, kind: Kind) -> Duration {
        let pace = self.pace(kind);
        let waits = pace.patience.saturating_mul(2).saturating_add(pace.region_dwell);
        pace.trial().saturating_add(waits)
    }

    pub(super) fn pace(&self, kind: Kind) -> &Pace {
        match kind {
            Kind::Ordinary => &self.ordinary,
            Kind::Rollback => &self.rollback,
        }
    }
}

/// Why a change went no further.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Stop {
    #[error("{node} refused it: {}", .reasons.join("; "))]
    Refused { node: SpiffeId, reasons: Vec<String> },
    #[error("worse than without it: {0}")]
    Worse(Worse),
    #[error("{lost} canaries went away or did not apply it in time")]
    CanariesLost { lost: usize },
    #[error("no gateway could be found to try it on in time")]
    NoCanary,
    #[error("{applied} of {given} nodes of the region serve it; expected more than half")]
    TooFew { applied: usize, given: usize },
    /// By another leader, in whose words this is.
    #[error("{why}")]
    Before { why: String },
}

/// The version is not above those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the version {offered} is not newer than {newest}")]
pub struct NotNewer {
    pub offered: u64,
    pub newest: u64,
}

/// How far the last change is.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// None was begun.
    Idle,
    Running {
        stage: Stage,
        /// Those that were waited for serve it, and are watched.
        watching: bool,
    },
    /// So many nodes that are there do not serve it yet; they are still given it.
    Done {
        behind: usize,
    },
    Stopped(Stop),
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str("idle"),
            Self::Running { stage, watching: false } => write!(f, "given to {}", stage.as_str()),
            Self::Running { stage, watching: true } => write!(f, "given to {}, which is watched", stage.as_str()),
            Self::Done { behind: 0 } => f.write_str("done"),
            Self::Done { behind } => write!(f, "done, {behind} nodes behind"),
            Self::Stopped(stop) => write!(f, "stopped: {stop}"),
        }
    }
}

impl Kind {
    /// As in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ordinary => "ordinary",
            Self::Rollback => "rollback",
        }
    }
}

impl Stage {
    /// As in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Region => "region",
            Self::All => "all",
        }
    }
}
