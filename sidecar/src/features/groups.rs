//! Feature groups as a look-up needs them, worked out once for each group that a Snapshot brings.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use spillway_core::feature::{Freshness, Layout, freshness};
use spillway_core::resource::{Consistency, FeatureGroup, Scope};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

#[derive(Debug)]
pub(super) struct Group {
    pub name: Name,
    pub scope: Scope,
    pub layout: Arc<Layout>,
    pub consistency: Consistency,
    fresh_for: Duration,
    retain_for: Duration,
    /// What it was made of: another Snapshot's group of this name may be another one.
    source: Arc<FeatureGroup>,
}

impl Group {
    pub fn freshness(&self, event_us: i64, now_us: i64) -> Freshness {
        Freshness::at(event_us, self.fresh_for, self.retain_for, now_us)
    }

    pub fn fresh_until_us(&self, event_us: i64) -> i64 {
        freshness::until(event_us, self.fresh_for)
    }

    pub fn expires_us(&self, event_us: i64) -> i64 {
        freshness::until(event_us, self.retain_for)
    }
}

#[derive(Default)]
pub(super) struct Groups(ArcSwap<BTreeMap<Name, Arc<Group>>>);

impl Groups {
    pub fn get(&self, snapshot: &Snapshot, name: &Name) -> Option<Arc<Group>> {
        let source = snapshot.groups.get(name)?;
        if let Some(group) = self.0.load().get(name)
            && Arc::ptr_eq(&group.source, source)
        {
            return Some(group.clone());
        }
        let group = Arc::new(Group {
            name: name.clone(),
            scope: source.scope,
            layout: Arc::new(Layout::of(source)),
            consistency: source.consistency,
            fresh_for: source.fresh_for,
            retain_for: source.retain_for,
            source: source.clone(),
        });
        self.0.rcu(|groups| {
            // Groups that this Snapshot no longer has are forgotten, so the map stays as small as it.
            let kept = groups.iter().filter(|(name, _)| snapshot.groups.contains_key(*name));
            let mut groups: BTreeMap<_, _> = kept.map(|(name, group)| (name.clone(), group.clone())).collect();
            groups.insert(name.clone(), group.clone());
            groups
        });
        Some(group)
    }
}
