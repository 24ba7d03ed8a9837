//! Which part of the answers each region got of late, to be held against the plan.
//!
//! The rule: it speaks of answers, not of traffic. A resolver that asks for thousands of clients counts as one answer,
//! so the shares are near the plan's where many resolvers ask, or tell subnets.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use spillway_core::units::Name;

/// How often counts are kept.
pub const STEP: Duration = Duration::from_secs(10);
/// Steps that are looked back: a minute.
const STEPS: usize = 6;

/// Counts of the last minute, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    kept: VecDeque<BTreeMap<Name, u64>>,
}

impl Shares {
    /// Keeps counts since the start, once each [`STEP`].
    pub fn keep(&mut self, counts: BTreeMap<Name, u64>) {
        if self.kept.len() > STEPS {
            self.kept.pop_front();
        }
        self.kept.push_back(counts);
    }

    /// Each region's part of the answers since the oldest counts. Empty where nothing was answered.
    pub fn until(&self, counts: &BTreeMap<Name, u64>) -> BTreeMap<Name, f64> {
        let before = |name: &Name| self.kept.front().and_then(|oldest| oldest.get(name)).copied().unwrap_or(0);
        let recent: BTreeMap<&Name, u64> =
            counts.iter().map(|(name, count)| (name, count.saturating_sub(before(name)))).collect();
        let all: u64 = recent.values().sum();
        if all == 0 {
            return BTreeMap::new();
        }
        recent.into_iter().map(|(name, count)| (name.clone(), count as f64 / all as f64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(eu: u64, us: u64) -> BTreeMap<Name, u64> {
        [("eu", eu), ("us", us)].map(|(name, count)| (Name::parse(name).unwrap(), count)).into()
    }

    #[test]
    fn shares_are_those_of_the_last_minute() {
        let mut shares = Shares::default();
        assert_eq!(shares.until(&counts(3, 1)).into_values().collect::<Vec<_>>(), [0.75, 0.25], "since the start");
        for step in 0..20 {
            shares.keep(counts(1_000, 10 * step));
        }
        assert_eq!(shares.kept.len(), STEPS + 1);
        assert_eq!(shares.until(&counts(1_000, 200)).into_values().collect::<Vec<_>>(), [0.0, 1.0]);
    }

    #[test]
    fn without_answers_there_are_no_shares() {
        let mut shares = Shares::default();
        shares.keep(counts(5, 5));
        assert_eq!(shares.until(&counts(5, 5)), BTreeMap::new());
    }
}
