//! Who is in each pool of this region: what the Snapshot lists, and what DNS says.
//!
//! The rule: a Snapshot and its members are one value behind one swap. A pool keeps the members that it
//! has until DNS names others, also when the Snapshot sends it to another name.
//!
//! ```text
//! Snapshot ------------------------------┐
//! followers, a task for each pool in DNS ┴-> Members -> fleets of the worker threads, health checks
//! ```

mod follower;
mod metrics;
mod resolver;

use std::collections::BTreeMap;
use std::sync::Arc;

use spillway_core::members::Roster;
use spillway_core::resource::{DnsSource, PodSource};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::drain::Drain;
use spillway_runtime::snapshot::Subscription;
use spillway_runtime::telemetry::Metrics as Registry;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::settings::DnsSettings;
use follower::Follower;
use metrics::MembersMetrics;
use resolver::Resolver;

/// One Snapshot and who is in its pools.
pub struct Members {
    pub snapshot: Arc<Snapshot>,
    /// Of every pool of our region; empty where DNS has not answered yet.
    pub rosters: BTreeMap<Name, Arc<Roster>>,
}

impl Members {
    /// Lists as they are; names as `before`, until DNS says more.
    pub fn of(snapshot: Arc<Snapshot>, region: &Name, before: Option<&Self>) -> Self {
        let ours = snapshot.pools.iter().filter(|(_, pool)| pool.region == *region);
        let rosters = ours.map(|(name, pool)| {
            let kept = before.and_then(|before| before.rosters.get(name));
            let roster = match &pool.source {
                PodSource::Listed(pods) => Arc::new(Roster { pods: pods.clone(), named: true }),
                PodSource::Dns(_) => kept.cloned().unwrap_or_default(),
            };
            (name.clone(), roster)
        });
        Self { rosters: rosters.collect(), snapshot }
    }
}

/// Where the [`Members`] of now are.
pub struct Membership {
    region: Name,
    current: watch::Sender<Arc<Members>>,
    resolver: Resolver,
    metrics: MembersMetrics,
}

impl Membership {
    pub fn new(snapshot: Arc<Snapshot>, region: &Name, dns: &DnsSettings, registry: &Registry) -> Arc<Self> {
        let metrics = MembersMetrics::register(registry);
        Arc::new(Self {
            region: region.clone(),
            current: watch::Sender::new(Arc::new(Members::of(snapshot, region, None))),
            resolver: Resolver::new(dns.clone(), metrics.questions.clone()),
            metrics,
        })
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Members>> {
        self.current.subscribe()
    }

    /// Follows the Snapshot and DNS until stopped.
    pub async fn follow(self: Arc<Self>, subscription: Arc<Subscription>, drain: Drain) {
        let mut changed = subscription.changed();
        // Dropped with this, and all followers with it.
        let mut tasks = JoinSet::new();
        let mut followed: BTreeMap<Name, (DnsSource, AbortHandle)> = BTreeMap::new();
        loop {
            let snapshot = subscription.current();
            self.take(&snapshot);
            let ours = snapshot.pools.iter().filter(|(_, pool)| pool.region == self.region);
            let sources: BTreeMap<&Name, &DnsSource> = ours
                .filter_map(|(name, pool)| match &pool.source {
                    PodSource::Dns(source) => Some((name, source)),
                    PodSource::Listed(_) => None,
                })
                .collect();
            followed.retain(|name, (source, task)| {
                let stays = sources.get(name).is_some_and(|now| *now == source);
                if !stays {
                    task.abort();
                }
                stays
            });
            for (name, source) in sources {
                followed.entry(name.clone()).or_insert_with(|| {
                    let follower = Follower::new(self.clone(), name.clone(), source.clone());
                    (source.clone(), tasks.spawn(follower.follow()))
                });
            }
            self.metrics.keep(|name| followed.contains_key(name));
            tokio::select! {
                Ok(()) = changed.changed() => {}
                // Those that were aborted.
                Some(_) = tasks.join_next() => {}
                () = drain.stopped() => return,
            }
        }
    }

    fn take(&self, snapshot: &Arc<Snapshot>) {
        self.current.send_if_modified(|members| {
            let other = !Arc::ptr_eq(&members.snapshot, snapshot);
            if other {
                *members = Arc::new(Members::of(snapshot.clone(), &self.region, Some(members)));
            }
            other
        });
    }

    /// Says who is in a pool, if it still has this source. Whether that is a change.
    fn set(&self, name: &Name, source: &DnsSource, roster: &Roster) -> bool {
        self.current.send_if_modified(|members| {
            let Some(before) = members.rosters.get(name) else { return false };
            let now = members.snapshot.pools.get(name).map(|pool| &pool.source);
            if !matches!(now, Some(PodSource::Dns(now)) if now == source) || **before == *roster {
                return false;
            }
            let mut rosters = members.rosters.clone();
            rosters.insert(name.clone(), Arc::new(roster.clone()));
            *members = Arc::new(Members { snapshot: members.snapshot.clone(), rosters });
            true
        })
    }
}
