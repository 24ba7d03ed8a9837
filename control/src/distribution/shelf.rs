//! Versions at hand, and the Deltas between them.
//!
//! The rule: a Delta is made once, however many nodes it is sent to; what is at hand is bounded.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use spillway_proto::control;

use crate::intent::Version;

/// Versions that nodes serve or are to serve: two while one is rolling, more only where nodes were away.
const MOST_VERSIONS: usize = 16;
const MOST_DELTAS: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Shelf {
    versions: BTreeMap<u64, Arc<Version>>,
    /// In the order of their coming.
    arrived: VecDeque<u64>,
    /// By base, 0 for none, and target; the newest last.
    deltas: VecDeque<((u64, u64), Arc<control::Delta>)>,
}

impl Shelf {
    pub fn put(&mut self, version: Arc<Version>, keep: &[u64]) {
        let number = version.number;
        if self.versions.insert(number, version).is_none() {
            self.arrived.push_back(number);
        }
        while self.versions.len() > MOST_VERSIONS {
            let gone = self.arrived.iter().position(|number| !keep.contains(number)).unwrap_or(0);
            let Some(gone) = self.arrived.remove(gone) else { return };
            self.versions.remove(&gone);
        }
    }

    pub fn get(&self, number: u64) -> Option<&Arc<Version>> {
        self.versions.get(&number)
    }

    /// What turns `base` into `target`, or `target` whole; with what operators confirmed since `since`.
    pub fn delta(&mut self, epoch: u64, base: Option<&Arc<Version>>, target: &Arc<Version>) -> Arc<control::Delta> {
        let key = (base.map_or(0, |base| base.number), target.number);
        if let Some((_, delta)) = self.deltas.iter().find(|(of, delta)| *of == key && delta.epoch == epoch) {
            return Arc::clone(delta);
        }
        let mut delta = match base {
            Some(base) => between(base, target),
            None => whole(target),
        };
        delta.epoch = epoch;
        // A node that was away leaves versions out, and what was confirmed for them counts all the same.
        let since = self.versions.range(key.0 + 1..=target.number);
        delta.confirmed_empty = since.flat_map(|(_, version)| version.confirmed_empty.iter().cloned()).collect();
        let delta = Arc::new(delta);
        self.deltas.push_back((key, Arc::clone(&delta)));
        if self.deltas.len() > MOST_DELTAS {
            self.deltas.pop_front();
        }
        delta
    }
}

fn whole(target: &Version) -> control::Delta {
    control::Delta {
        target: target.number,
        target_sha256: Bytes::copy_from_slice(&target.sha256),
        changed: target.resources.clone(),
        ..control::Delta::default()
    }
}

/// Both are sorted by kind and name.
fn between(base: &Version, target: &Version) -> control::Delta {
    let mut delta = control::Delta {
        base: base.number,
        base_sha256: Bytes::copy_from_slice(&base.sha256),
        target: target.number,
        target_sha256: Bytes::copy_from_slice(&target.sha256),
        ..control::Delta::default()
    };
    let (mut before, mut after) = (base.resources.iter().peekable(), target.resources.iter().peekable());
    loop {
        let order = match (before.peek(), after.peek()) {
            (None, None) => return delta,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(before), Some(after)) => (&before.kind, &before.name).cmp(&(&after.kind, &after.name)),
        };
        let gone = if order.is_le() { before.next() } else { None };
        let new = if order.is_ge() { after.next() } else { None };
        match (gone, new) {
            (Some(gone), None) => {
                delta.removed.push(control::ResourceName { kind: gone.kind.clone(), name: gone.name.clone() });
            }
            (gone, Some(new)) if gone != Some(new) => delta.changed.push(new.clone()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::version;
    use super::*;

    fn names(resources: &[control::Resource]) -> Vec<&str> {
        resources.iter().map(|resource| resource.name.as_str()).collect()
    }

    #[test]
    fn a_delta_has_what_differs_and_is_made_once() {
        let mut shelf = Shelf::default();
        let (one, two) = (version(1, &["ap", "eu"], "100"), version(2, &["eu", "us"], "100"));
        let delta = shelf.delta(7, Some(&one), &two);
        assert_eq!((delta.epoch, delta.base, delta.target, names(&delta.changed)), (7, 1, 2, vec!["us"]));
        assert_eq!(delta.removed[0].name, "ap");
        assert!(Arc::ptr_eq(&delta, &shelf.delta(7, Some(&one), &two)));
        assert_eq!(shelf.delta(8, Some(&one), &two).epoch, 8);
        let heavier = version(3, &["eu", "us"], "50");
        assert_eq!(names(&shelf.delta(7, Some(&two), &heavier).changed), ["eu", "us"]);
        let whole = shelf.delta(7, None, &two);
        assert_eq!((whole.base, names(&whole.changed)), (0, vec!["eu", "us"]));
        assert!(whole.base_sha256.is_empty() && whole.removed.is_empty());
    }

    #[test]
    fn what_was_confirmed_for_versions_between_counts() {
        let mut shelf = Shelf::default();
        let confirming = |number: u64, pool: &str| {
            let mut version = Arc::into_inner(version(number, &["eu"], "100")).unwrap();
            version.confirmed_empty = vec![control::ResourceName { kind: "Pool".into(), name: pool.into() }];
            Arc::new(version)
        };
        let versions = [confirming(1, "one"), confirming(2, "two"), confirming(3, "three")];
        versions.iter().for_each(|version| shelf.put(Arc::clone(version), &[]));
        let names = |delta: &control::Delta| -> Vec<String> {
            delta.confirmed_empty.iter().map(|confirmed| confirmed.name.clone()).collect()
        };
        assert_eq!(names(&shelf.delta(1, Some(&versions[0]), &versions[2])), ["two", "three"]);
        assert_eq!(names(&shelf.delta(1, None, &versions[1])), ["one", "two"]);
    }

    #[test]
    fn the_oldest_to_come_leaves_unless_it_is_to_be_kept() {
        let mut shelf = Shelf::default();
        for number in 1..=20 {
            shelf.put(version(number, &["eu"], "100"), &[1]);
        }
        assert_eq!(shelf.versions.len(), MOST_VERSIONS);
        assert!(shelf.get(1).is_some() && shelf.get(2).is_none() && shelf.get(20).is_some());
    }
}
