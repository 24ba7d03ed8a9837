//! The pods of this region as one worker thread sees them: their places on the ring and the way to each.
//!
//! The rule: a [`Fleet`] is made from one Snapshot with its members and holds it, so that a request sees
//! both or neither change. Ways to pods are kept across both; what is known of the pods is the [`Book`]'s.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::{ExpectedPeer, Role, SpiffeId};
use spillway_core::resilience::outlier::Change;
use spillway_core::resource::Pod;
use spillway_core::routing::Ring;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::tls::Workload;
use spillway_runtime::upstream::{Upstream, UpstreamMetrics, UpstreamSettings};

use crate::members::Members;
use crate::peers::links::Peers;
use crate::pods::book::{Book, PoolState, Recorder};
use crate::pods::lane::Lane;
use crate::pods::pod::{PodKey, PodState};

/// The way to one pod.
pub struct PodLink {
    pub upstream: Upstream,
    pub state: Arc<PodState>,
    pub weight: f64,
}

impl PodLink {
    pub fn key(&self) -> &PodKey {
        &self.state.key
    }
}

/// The pods of one pool.
pub struct PoolLinks {
    pub name: Name,
    /// Its indexes are those of `pods`.
    pub ring: Ring,
    pub pods: Vec<Arc<PodLink>>,
    pub state: Arc<PoolState>,
}

impl PoolLinks {
    pub fn any_serving(&self) -> bool {
        self.pods.iter().any(|pod| pod.state.health.is_serving())
    }

    /// Calls that its pods may have at a time; those that fail their checks count for none, unless all do.
    pub fn capacity(&self) -> u32 {
        let alive = self.pods.iter().any(|pod| pod.state.health.may_serve());
        let pods = self.pods.iter().filter(|pod| !alive || pod.state.health.may_serve());
        pods.fold(0, |sum, pod| pod.state.limit().saturating_add(sum))
    }

    /// Acts on what the pool's outlier detector found.
    pub fn tell(&self, recorder: &Recorder, changes: &[Change], now: Duration) {
        for change in changes {
            let (Change::Ejected { pod: id, .. } | Change::Held { pod: id, .. } | Change::Restored { pod: id }) =
                change;
            if let Some(pod) = self.pods.iter().find(|pod| pod.state.id == *id) {
                recorder.tell(&pod.state, change, now);
            }
        }
    }
}

/// One Snapshot and the ways to the members of its pools.
pub struct Fleet {
    pub members: Arc<Members>,
    pub snapshot: Arc<Snapshot>,
    /// The ways to other regions.
    pub peers: Peers,
    pools: HashMap<Name, Arc<PoolLinks>>,
    lanes: HashMap<Name, Arc<Lane>>,
    links: HashMap<PodKey, Arc<PodLink>>,
}

impl Fleet {
    /// Ways of `before` are kept where name, address and the identity expected are the same.
    pub fn new(
        members: Arc<Members>,
        region: &Name,
        workload: &Arc<Workload>,
        book: &Book,
        metrics: &UpstreamMetrics,
        before: Option<&Self>,
    ) -> Self {
        let (mut pools, mut lanes, mut links) = (HashMap::new(), HashMap::new(), HashMap::new());
        for (name, roster) in &members.rosters {
            let link = |pod: &Pod| {
                let key = PodKey { pool: name.clone(), pod: pod.name.clone(), address: pod.address };
                let expected = expected(workload, region, &key, roster.named);
                let kept = before.and_then(|before| before.links.get(&key));
                let kept = kept.filter(|kept| kept.upstream.expected() == Some(&expected));
                let upstream = kept.map_or_else(
                    || {
                        let settings = UpstreamSettings::default();
                        Upstream::with(workload.clone(), key.address, expected, settings, metrics.clone())
                    },
                    |kept| kept.upstream.clone(),
                );
                Arc::new(PodLink { upstream, state: book.pod(&key), weight: pod.weight.get().into() })
            };
            let pods: Vec<Arc<PodLink>> = roster.pods.iter().map(link).collect();
            links.extend(pods.iter().map(|pod| (pod.key().clone(), pod.clone())));
            let identities: Vec<String> =
                pods.iter().map(|pod| identity(workload, region, pod.key()).to_string()).collect();
            let ring =
                Ring::weighted(identities.iter().zip(&pods).map(|(identity, pod)| (identity.as_str(), pod.weight)));
            let pool = Arc::new(PoolLinks { name: name.clone(), ring, pods, state: book.pool(name) });
            pools.insert(name.clone(), pool);
        }
        let snapshot = members.snapshot.clone();
        for (name, model) in &snapshot.models {
            if let Some((pool, _)) = snapshot.pool_of(model, region)
                && let Some(pool) = pools.get(pool)
            {
                lanes.insert(name.clone(), Arc::new(Lane::new(name, model, pool, book)));
            }
        }
        let peers = Peers::new(&snapshot, region, workload, metrics, before.map(|before| &before.peers));
        Self { members, snapshot, peers, pools, lanes, links }
    }

    pub fn links(&self) -> impl Iterator<Item = &Arc<PodLink>> {
        self.links.values()
    }

    pub fn pools(&self) -> impl Iterator<Item = &Arc<PoolLinks>> {
        self.pools.values()
    }

    pub fn lanes(&self) -> impl Iterator<Item = &Arc<Lane>> {
        self.lanes.values()
    }

    /// Whether a pod is in this fleet, at this address.
    pub fn has(&self, key: &PodKey) -> bool {
        self.links.contains_key(key)
    }

    /// A model on its pool of this region, if it has one.
    pub fn lane(&self, model: &str) -> Option<&Arc<Lane>> {
        self.lanes.get(model)
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
