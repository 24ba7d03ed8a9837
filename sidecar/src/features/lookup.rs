//! What a look-up found, for each entity and group.

use std::time::Duration;

use spillway_core::feature::{Cell, InvalidKey, Missing, Row};
use spillway_core::units::Name;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// In process.
    L1,
    /// Redis.
    L2,
    /// The durable store.
    L3,
}

impl Tier {
    pub fn name(self) -> &'static str {
        match self {
            Self::L1 => "l1",
            Self::L2 => "l2",
            Self::L3 => "l3",
        }
    }
}

/// Which tiers a look-up asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    All,
    /// L1 and L2 only, and nobody who may ask L3 is waited for.
    Near,
}

/// One entity's row in one group.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    Present(Present),
    /// The durable tier, or a deletion, says that there is none.
    Absent {
        /// There are bytes, but they are no row of this group.
        malformed: Option<Missing>,
    },
    /// No tier that could know answered: there may be a row or not.
    Unavailable,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Present {
    pub row: Row,
    /// Past the group's freshness, and no tier that answered had a newer one.
    pub stale: bool,
    pub tier: Tier,
    /// Unix microseconds.
    pub fresh_until_us: i64,
}

/// Tiers that failed for at least one row of a look-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FailedTiers {
    pub l2: bool,
    pub l3: bool,
}

impl FailedTiers {
    pub fn any(self) -> bool {
        self.l2 || self.l3
    }

    pub(super) fn add(&mut self, other: Self) {
        self.l2 |= other.l2;
        self.l3 |= other.l3;
    }
}

/// The answer to one [`super::Features::read`].
#[derive(Clone, Debug)]
pub struct Lookup {
    /// Row-major: all groups of the first entity, then those of the second.
    pub(super) found: Vec<Found>,
    pub(super) groups: usize,
    pub(super) now_us: i64,
    /// Every change up to this number is reflected. `None`: changes are not heard, or not numbered.
    pub sequence: Option<u64>,
    /// When the row that ends first ends to be fresh, in Unix microseconds; long past if one is stale or not
    /// known. An absent row counts as one that is written now: a write that ends its absence is told like any
    /// other. `None` without rows.
    pub fresh_until_us: Option<i64>,
    /// Tiers that were asked and failed: the values are the best that is known.
    pub failed_tiers: FailedTiers,
}

impl Lookup {
    /// `entity` and `group` are indices into what was asked.
    pub fn get(&self, entity: usize, group: usize) -> &Found {
        const NOTHING: &Found = &Found::Unavailable;
        if group >= self.groups {
            return NOTHING;
        }
        self.found.get(entity * self.groups + group).unwrap_or(NOTHING)
    }

    /// For [`spillway_core::feature::Gather::write`].
    pub fn cell(&self, entity: usize, group: usize) -> Option<Cell<'_>> {
        match self.get(entity, group) {
            Found::Present(present) => Some(Cell { row: &present.row, stale: present.stale }),
            Found::Absent { .. } | Found::Unavailable => None,
        }
    }

    /// Rows of which nothing is known.
    pub fn unavailable(&self) -> usize {
        self.found.iter().filter(|found| matches!(found, Found::Unavailable)).count()
    }

    /// Whether nothing is known of some row, because no tier that could know it answered.
    pub fn failed(&self) -> bool {
        self.unavailable() > 0
    }

    pub fn any_stale(&self) -> bool {
        self.found.iter().any(|found| matches!(found, Found::Present(present) if present.stale))
    }

    /// How long ago an event happened, as this look-up sees it.
    pub fn age(&self, event_us: i64) -> Duration {
        Duration::from_micros(u64::try_from(self.now_us.saturating_sub(event_us)).unwrap_or(0))
    }
}

/// The look-up itself makes no sense. The caller's fault, or a Snapshot's; a retry is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    #[error("there is no feature group '{0}'")]
    UnknownGroup(Name),
    #[error("entity {index}: {fault}")]
    Key { index: usize, fault: InvalidKey },
    #[error("at most {limit} rows in one look-up, not {found}")]
    TooMany { limit: usize, found: usize },
}

impl FeatureError {
    /// The stable `spillway-error` code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownGroup(_) => "unknown-feature-group",
            Self::Key { .. } => "invalid-entity-id",
            Self::TooMany { .. } => "limit-exceeded",
        }
    }
}
