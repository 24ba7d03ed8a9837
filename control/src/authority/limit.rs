//! How often somebody, and all together, may come.

use std::hash::{BuildHasher, Hash, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spillway_core::limit::{Class, Decision, Gcra, Key, Rate, Reserves, Table, TableBounds};

/// Times a second, and at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub a_second: u64,
    pub at_once: u32,
}

pub(super) struct Limit {
    seed: RandomState,
    began: Instant,
    of_one: Gcra,
    of_all: Gcra,
    state: Mutex<State>,
}

struct State {
    buckets: Table,
    /// The bucket of those who found no room, and that of all.
    overflow: u64,
    all: u64,
}

impl std::fmt::Debug for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Limit")
    }
}

impl Limit {
    pub fn new(of_one: Pace, of_all: Pace) -> Self {
        let bucket = |pace: Pace| {
            let rate = Rate { tokens: pace.a_second, per: Duration::from_secs(1) };
            Gcra::new(rate, pace.at_once, Reserves::default()).expect("a rate and a burst above 0")
        };
        Self {
            seed: RandomState::new(),
            began: Instant::now(),
            of_one: bucket(of_one),
            of_all: bucket(of_all),
            state: Mutex::new(State { buckets: Table::new(TableBounds::default()), overflow: 0, all: 0 }),
        }
    }

    /// Whether this one may come now. Who may not takes nothing from the others.
    pub fn admits(&self, who: impl Hash) -> bool {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let hash = u128::from(self.seed.hash_one(&who)) << 64 | u128::from(self.seed.hash_one((&who, 1)));
        let mut state = self.state.lock();
        let State { buckets, overflow, all } = &mut *state;
        let key = Key { hash, owner: 0 };
        let own = buckets.decide(key, &self.of_one, now, 1, Class::Critical, overflow);
        if !matches!(own.decision, Decision::Admitted { .. }) {
            return false;
        }
        let Decision::Admitted { state, .. } = self.of_all.decide(*all, now, 1, Class::Critical) else { return false };
        *all = state;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_uses_up_its_own_and_all_together_theirs() {
        let limit = Limit::new(Pace { a_second: 5, at_once: 50 }, Pace { a_second: 50, at_once: 200 });
        let admitted = |who: u8| (0..100).filter(|_| limit.admits(who)).count();
        assert!((50..55).contains(&admitted(1)));
        assert!((50..55).contains(&admitted(2)), "another has its own");
        let rest: usize = (3..100).map(admitted).sum();
        assert!((100..150).contains(&rest), "{rest}");
    }
}
