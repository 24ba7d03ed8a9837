//! Which results an operator has sent away.
//!
//! The rule: a purge is a number that rises. A result knows the last purge before its call began (its
//! *mark*), and is not given if a later one covers it, whenever and wherever it turns up: in memory, in
//! Redis, or with a call that was under way. Removing it is only tidying up.
//!
//! The last [`KEPT`] purges are known one by one; what is older than those ends every result.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use spillway_core::units::Name;

use super::entry::About;

/// Purges that are told apart, here and in Redis.
pub const KEPT: usize = 1_024;

/// What is sent away.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Purge {
    Model(Name),
    Tenant(Name),
    /// A [`spillway_core::routing::key_hash`]: ids stay out of lists and logs. Two entities with one hash
    /// cost a result too many.
    Entity(u64),
}

impl fmt::Display for Purge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model(name) => write!(f, "model {name}"),
            Self::Tenant(name) => write!(f, "tenant {name}"),
            Self::Entity(hash) => write!(f, "entity {hash:016x}"),
        }
    }
}

impl Purge {
    /// Reads what [`fmt::Display`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(' ')? {
            ("model", name) => Name::parse(name).ok().map(Self::Model),
            ("tenant", name) => Name::parse(name).ok().map(Self::Tenant),
            ("entity", hash) if hash.len() == 16 => u64::from_str_radix(hash, 16).ok().map(Self::Entity),
            _ => None,
        }
    }
}

/// The purges that this gateway knows of.
#[derive(Debug, Default)]
pub struct Purges {
    /// The number of the last one. Nearly always every result's mark, so that no lock is needed.
    latest: AtomicU64,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Results with a lower mark are none.
    floor: u64,
    numbers: HashMap<Purge, u64>,
    order: VecDeque<(u64, Purge)>,
}

impl Purges {
    /// The mark of a call that begins now.
    pub fn mark(&self) -> u64 {
        self.latest.load(Ordering::SeqCst)
    }

    /// Whether a purge later than `mark` covers a result.
    pub fn cover(&self, about: &About, mark: u64) -> bool {
        mark < self.mark() && mark < self.least(about)
    }

    /// The least mark that a result about this must have.
    pub fn least(&self, about: &About) -> u64 {
        if self.mark() == 0 {
            return 0;
        }
        let known = self.known.read();
        let number = |purge: &Purge| known.numbers.get(purge).copied().unwrap_or(0);
        let least = known.floor.max(number(&Purge::Model(about.model.clone())));
        let least = least.max(number(&Purge::Tenant(about.tenant.clone())));
        about.entities.iter().map(|entity| number(&Purge::Entity(*entity))).fold(least, u64::max)
    }

    /// A purge that only this gateway knows of. Its number.
    pub fn add(&self, purge: Purge) -> u64 {
        let mut known = self.known.write();
        let number = self.mark().saturating_add(1);
        known.add(number, purge);
        self.latest.store(number, Ordering::SeqCst);
        number
    }

    /// A purge of the region. False: it was known.
    pub fn hear(&self, number: u64, purge: Purge) -> bool {
        let mut known = self.known.write();
        if number <= self.mark() {
            return false;
        }
        known.add(number, purge);
        self.latest.store(number, Ordering::SeqCst);
        true
    }

    /// There were purges up to this number that nobody can name any more: every result goes.
    pub fn forget(&self, number: u64) {
        let mut known = self.known.write();
        known.floor = known.floor.max(number);
        self.latest.fetch_max(number, Ordering::SeqCst);
    }
}

impl Known {
    fn add(&mut self, number: u64, purge: Purge) {
        self.numbers.insert(purge.clone(), number);
        self.order.push_back((number, purge));
        if self.order.len() > KEPT
            && let Some((number, purge)) = self.order.pop_front()
        {
            self.floor = self.floor.max(number);
            if self.numbers.get(&purge) == Some(&number) {
                self.numbers.remove(&purge);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn about(tenant: &str, model: &str, entities: &[u64]) -> About {
        About { tenant: name(tenant), model: name(model), entities: entities.into() }
    }

    #[test]
    fn a_purge_covers_what_it_names_and_was_begun_before_it() {
        let purges = Purges::default();
        let all = [about("acme", "eta", &[1, 2]), about("globex", "eta", &[]), about("acme", "fraud", &[2])];
        assert!(all.iter().all(|about| !purges.cover(about, 0)));
        for (purge, covered) in [
            (Purge::Model(name("eta")), [true, true, false]),
            (Purge::Tenant(name("acme")), [true, false, true]),
            (Purge::Entity(1), [true, false, false]),
            (Purge::Entity(2), [true, false, true]),
            (Purge::Entity(3), [false, false, false]),
        ] {
            let before = purges.mark();
            let number = purges.add(purge.clone());
            assert_eq!(all.each_ref().map(|about| purges.cover(about, before)), covered, "{purge}");
            assert!(all.iter().all(|about| !purges.cover(about, number)), "what began after it");
        }
    }

    #[test]
    fn what_is_forgotten_covers_everything() {
        let purges = Purges::default();
        for number in 0..KEPT as u64 {
            assert!(purges.hear(number + 10, Purge::Entity(number)));
        }
        let other = about("acme", "eta", &[u64::MAX]);
        assert!(!purges.cover(&other, 0));
        assert!(purges.hear(5_000, Purge::Entity(77)));
        assert!(purges.cover(&other, 9) && !purges.cover(&other, 10));
        assert!(!purges.hear(5_000, Purge::Entity(78)), "it is known");
        purges.forget(6_000);
        assert!(purges.cover(&other, 5_999) && !purges.cover(&other, 6_000));
    }

    #[test]
    fn purges_are_texts_and_back() {
        for purge in [Purge::Model(name("eta")), Purge::Tenant(name("acme")), Purge::Entity(0xf00d)] {
            assert_eq!(Purge::parse(&purge.to_string()), Some(purge));
        }
        for text in ["", "model", "model ", "model a b", "entity 1", "entity 00000000000000zz", "group g"] {
            assert_eq!(Purge::parse(text), None, "{text}");
        }
    }
}
