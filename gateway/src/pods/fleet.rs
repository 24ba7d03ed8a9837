//! The pods of this region as one worker thread sees them: their places on the ring, the way to each,
//! and whether they answer.
//!
//! The rule: a [`Fleet`] is made from one Snapshot with its members and holds it, so that a request sees
//! both or neither change. Ways to pods are kept across both. Health is an advice on order: a pod that
//! looks dead is tried last, never written off.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::Mutex;
use spillway_core::identity::{ExpectedPeer, Role, SpiffeId};
use spillway_core::inference::Entities;
use spillway_core::resource::{Model, Pod};
use spillway_core::routing::{Call, Candidate, Ring, RoutingSettings, choose, key_hash};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::tls::Workload;
use spillway_runtime::upstream::{Upstream, UpstreamMetrics, UpstreamSettings};

use crate::members::Members;

/// Where a pod is and what it is called.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodKey {
    pub pool: Name,
    pub pod: Name,
    pub address: SocketAddr,
}

/// What is known of a pod's health, shared by all threads.
///
/// ```text
/// Unknown --answered--> Serving --failed--> Failed --answered--> Serving
/// ```
#[derive(Debug, Default)]
pub struct Health(
    /// 0: unknown.
    AtomicU8,
);

impl Health {
    const SERVING: u8 = 1;
    const FAILED: u8 = 2;

    /// Says what the last call showed. Whether that is a change.
    pub fn set(&self, serving: bool) -> bool {
        let next = if serving { Self::SERVING } else { Self::FAILED };
        self.0.swap(next, Ordering::Relaxed) != next
    }

    /// Whether the last check was answered.
    pub fn is_serving(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::SERVING
    }

    /// Not checked yet counts as alive: unknown is not down.
    pub fn may_serve(&self) -> bool {
        self.0.load(Ordering::Relaxed) != Self::FAILED
    }
}

/// The health of all pods of the region, shared by threads.
///
/// Only the pods of the newest Members count: threads that still look at an older one keep the entries
/// of pods that are gone, and nobody asks those any more.
#[derive(Debug, Default)]
pub struct HealthBook(Mutex<HashMap<PodKey, Entry>>);

#[derive(Debug, Default)]
struct Entry {
    health: Arc<Health>,
    /// Is in the newest Members.
    current: bool,
}

impl HealthBook {
    pub fn of(&self, key: &PodKey) -> Arc<Health> {
        self.0.lock().entry(key.clone()).or_default().health.clone()
    }

    /// Says which pods are in the region now, and forgets the others once no thread looks at them.
    pub fn keep<'a>(&self, keys: impl Iterator<Item = &'a PodKey>) {
        let mut entries = self.0.lock();
        entries.values_mut().for_each(|entry| entry.current = false);
        for key in keys {
            entries.entry(key.clone()).or_default().current = true;
        }
        entries.retain(|_, entry| entry.current || Arc::strong_count(&entry.health) > 1);
    }

    pub fn any_serving(&self) -> bool {
        self.0.lock().values().any(|entry| entry.current && entry.health.is_serving())
    }

    pub fn failed(&self) -> usize {
        self.0.lock().values().filter(|entry| entry.current && !entry.health.may_serve()).count()
    }
}

/// The way to one pod.
pub struct PodLink {
    pub key: PodKey,
    pub upstream: Upstream,
    pub health: Arc<Health>,
    pub weight: f64,
}

impl PodLink {
    fn looks_alive(&self) -> bool {
        self.health.may_serve()
    }
}

/// The pods of one pool.
pub struct PoolLinks {
    ring: Ring,
    pods: Vec<Arc<PodLink>>,
}

impl PoolLinks {
    /// The pod for a request; `tried` is one that it must not be.
    ///
    /// One entity goes where the ring says, so that its features are warm there; all else goes to the
    /// less loaded of two. Pods that look dead come last.
    pub fn pick(&self, entities: &Entities, random: u64, tried: Option<&PodLink>) -> Option<&Arc<PodLink>> {
        // However it is named: by the parameter, or by an entity input of one row.
        let key = match entities.ids() {
            [entity] => Some(key_hash(entity)),
            _ => None,
        };
        let call = Call { key, hot: false, panic: false, random };
        let candidate = |index: usize| {
            let pod = &self.pods[index];
            Candidate {
                usable: pod.looks_alive(),
                tried: tried.is_some_and(|tried| tried.key == pod.key),
                in_flight: pod.upstream.in_flight(),
                report: None,
                weight: pod.weight,
                failing: 0.0,
            }
        };
        let choice = choose(&RoutingSettings::default(), &call, &self.ring, candidate, || random)?;
        self.pods.get(choice.pod)
    }

    pub fn any_serving(&self) -> bool {
        self.pods.iter().any(|pod| pod.health.is_serving())
    }
}

/// One Snapshot and the ways to the members of its pools.
pub struct Fleet {
    pub members: Arc<Members>,
    pub snapshot: Arc<Snapshot>,
    region: Name,
    pools: HashMap<Name, PoolLinks>,
    links: HashMap<PodKey, Arc<PodLink>>,
}

impl Fleet {
    /// Links of `before` are kept where name, address and the identity expected are the same.
    pub fn new(
        members: Arc<Members>,
        region: &Name,
        workload: &Arc<Workload>,
        book: &HealthBook,
        metrics: &UpstreamMetrics,
        before: Option<&Self>,
    ) -> Self {
        let (mut pools, mut links) = (HashMap::new(), HashMap::new());
        for (name, roster) in &members.rosters {
            let link = |pod: &Pod| {
                let key = PodKey { pool: name.clone(), pod: pod.name.clone(), address: pod.address };
                let expected = expected(workload, region, &key, roster.named);
                let kept = before.and_then(|before| before.links.get(&key));
                let kept = kept.filter(|kept| *kept.upstream.expected() == expected);
                let upstream = kept.map_or_else(
                    || {
                        let settings = UpstreamSettings::default();
                        Upstream::with(workload.clone(), key.address, expected, settings, metrics.clone())
                    },
                    |kept| kept.upstream.clone(),
                );
                Arc::new(PodLink { upstream, health: book.of(&key), key, weight: pod.weight.get().into() })
            };
            let pods: Vec<Arc<PodLink>> = roster.pods.iter().map(link).collect();
            links.extend(pods.iter().map(|pod| (pod.key.clone(), pod.clone())));
            let identities: Vec<String> =
                pods.iter().map(|pod| identity(workload, region, &pod.key).to_string()).collect();
            let ring =
                Ring::weighted(identities.iter().zip(&pods).map(|(identity, pod)| (identity.as_str(), pod.weight)));
            pools.insert(name.clone(), PoolLinks { ring, pods });
        }
        Self { snapshot: members.snapshot.clone(), members, region: region.clone(), pools, links }
    }

    pub fn links(&self) -> impl Iterator<Item = &Arc<PodLink>> {
        self.links.values()
    }

    /// Whether a pod is in this fleet, at this address.
    pub fn has(&self, key: &PodKey) -> bool {
        self.links.contains_key(key)
    }

    /// The pods that serve a model in this region.
    pub fn pool(&self, model: &Model) -> Option<&PoolLinks> {
        self.pools.get(self.pool_name(model)?)
    }

    pub fn pool_name(&self, model: &Model) -> Option<&Name> {
        self.snapshot.pool_of(model, &self.region).map(|(name, _)| name)
    }
}

/// Who a pod must prove to be.
fn expected(workload: &Workload, region: &Name, key: &PodKey, named: bool) -> ExpectedPeer {
    let SpiffeId { trust_domain, .. } = workload.id();
    if named {
        return identity(workload, region, key).into();
    }
    ExpectedPeer::SidecarOf { trust_domain, region: region.clone(), pool: key.pool.clone() }
}

/// A pod's place on the ring: a sidecar of our own trust domain and region.
fn identity(workload: &Workload, region: &Name, key: &PodKey) -> SpiffeId {
    SpiffeId {
        trust_domain: workload.id().trust_domain,
        role: Role::Sidecar { region: region.clone(), pool: key.pool.clone(), pod: key.pod.clone() },
    }
}
