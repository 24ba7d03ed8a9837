//! The gateways of other regions as one worker thread reaches them.
//!
//! The rule: there is one way to each gateway of each thread, made from a Snapshot and kept across them. It is open
//! before it is needed, so that a request that is stranded goes on at once, and a gateway that cannot be reached is
//! known before it is asked.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::join_all;
use spillway_core::failover::{Peer, Spare, Standing, spare};
use spillway_core::identity::ExpectedPeer;
use spillway_core::limit::Class;
use spillway_core::resource::{GatewayAddress, Model};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::plan::Published;
use spillway_runtime::tls::Workload;
use spillway_runtime::upstream::{Upstream, UpstreamMetrics, UpstreamSettings};

use crate::peers::rests::Rests;
use crate::pods::fleet::Fleet;
use crate::shared::Shared;

/// How often ways that have closed are opened again.
const OPEN_EVERY: Duration = Duration::from_secs(1);
/// How long one that could not be reached is let be: as long as it is not asked again anyway.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(2);

/// The ways to all other regions, by name; those without gateways are not in it.
#[derive(Default)]
pub struct Peers(Vec<PeerRegion>);

pub struct PeerRegion {
    pub name: Name,
    cost: f64,
    gateways: Vec<PeerGateway>,
    /// It serves some model, and some tenant's requests may be answered there.
    is_open: bool,
    /// Which gateway is the next one's first.
    turn: AtomicUsize,
}

pub struct PeerGateway {
    pub at: GatewayAddress,
    pub upstream: Upstream,
}

/// What a region's fitness is judged from, beside the ways there.
pub struct Sight<'a> {
    pub snapshot: &'a Snapshot,
    pub plan: Option<&'a Published>,
    pub rests: &'a Rests,
    pub model: &'a Model,
    pub model_name: &'a str,
    pub tenant: &'a Name,
    pub class: Class,
    /// On the gateway's clock.
    pub now: Duration,
}

impl Peers {
    /// Ways of `before` are kept where address, name and region are the same.
    pub fn new(
        snapshot: &Snapshot,
        region: &Name,
        workload: &Arc<Workload>,
        metrics: &UpstreamMetrics,
        before: Option<&Self>,
    ) -> Self {
        let trust_domain = workload.id().trust_domain;
        let kept: HashMap<(&Name, &GatewayAddress), &Upstream> = before
            .into_iter()
            .flat_map(|before| &before.0)
            .flat_map(|region| region.gateways.iter().map(|gateway| ((&region.name, &gateway.at), &gateway.upstream)))
            .collect();
        let others = snapshot.regions.iter().filter(|(name, other)| {
            *name != region && other.trust_domain == trust_domain && !other.gateways.is_empty()
        });
        let peer = |(name, other): (&Name, &Arc<spillway_core::resource::Region>)| {
            let gateway = |at: &GatewayAddress| {
                let upstream = kept.get(&(name, at)).map_or_else(
                    || {
                        let expected =
                            ExpectedPeer::GatewayOf { trust_domain: trust_domain.clone(), region: name.clone() };
                        let settings =
                            UpstreamSettings { rest: REST, longest_rest: LONGEST_REST, ..UpstreamSettings::default() };
                        Upstream::with(workload.clone(), at.address, expected, settings, metrics.clone())
                    },
                    |upstream| (*upstream).clone(),
                );
                PeerGateway { at: at.clone(), upstream }
            };
            PeerRegion {
                name: name.clone(),
                cost: other.cost,
                gateways: other.gateways.iter().map(gateway).collect(),
                is_open: is_open(snapshot, name),
                // Threads and restarts do not all begin with the first.
                turn: AtomicUsize::new(rand::random_range(0..other.gateways.len())),
            }
        };
        Self(others.map(peer).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.0.iter().map(|region| &region.name)
    }

    pub fn region(&self, name: &Name) -> Option<&PeerRegion> {
        self.0.iter().find(|region| region.name == *name)
    }

    /// Opens the ways that have closed. Who cannot be reached says so in the log once, and counts as resting.
    pub async fn open(&self) {
        join_all(self.0.iter().flat_map(|region| &region.gateways).map(|gateway| gateway.upstream.connect())).await;
    }

    /// All regions, as a request of this model and class sees them.
    pub fn seen(&self, sight: &Sight<'_>) -> Vec<Peer> {
        self.0.iter().map(|region| region.seen(sight)).collect()
    }
}

impl PeerRegion {
    fn seen(&self, sight: &Sight<'_>) -> Peer {
        let known = self.known(sight.plan);
        let is_full = sight.rests.is_full(&self.name, sight.model_name, sight.tenant, sight.class, sight.now);
        Peer {
            region: self.name.clone(),
            serves: sight.snapshot.pool_of(sight.model, &self.name).is_some(),
            healthy: known.is_none_or(|known| known.serves)
                && self.gateways.iter().any(|gateway| !gateway.upstream.is_resting()),
            headroom: if is_full { Some(0.0) } else { known.and_then(|known| known.headroom) },
            cost: self.cost,
            round_trip: self.gateways.iter().filter_map(|gateway| gateway.upstream.round_trip()).min(),
        }
    }

    /// How many gateways it has, and how many of them are not known to be unreachable.
    pub fn gateways(&self) -> (usize, usize) {
        let reachable = self.gateways.iter().filter(|gateway| !gateway.upstream.is_resting());
        (self.gateways.len(), reachable.count())
    }

    /// What the plan says that it has left; none: there is no plan.
    fn known(&self, plan: Option<&Published>) -> Option<Spare> {
        let published = plan?;
        let standing = published.standings.get(&self.name).map_or(Standing::Steady, |(standing, _)| *standing);
        Some(spare(&published.plan, standing, &self.name))
    }

    /// Connects to those of its gateways that there is no connection to. Whether one can be reached.
    async fn open(&self) -> bool {
        // Who cannot be reached says so in the log once, and counts as resting.
        let connected = join_all(self.gateways.iter().map(|gateway| gateway.upstream.connect())).await;
        connected.iter().any(Result::is_ok)
    }

    /// Its gateways in turn, those that can be reached first.
    pub fn in_turn(&self) -> Vec<&PeerGateway> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % self.gateways.len().max(1);
        let mut turned: Vec<&PeerGateway> =
            self.gateways.iter().cycle().skip(first).take(self.gateways.len()).collect();
        turned.sort_by_key(|gateway| gateway.upstream.is_resting());
        turned
    }
}

fn is_open(snapshot: &Snapshot, region: &Name) -> bool {
    snapshot.tenants.values().any(|tenant| tenant.may_leave_region.permits(region))
        && snapshot.models.values().any(|model| snapshot.pool_of(model, region).is_some())
}

/// Keeps the ways of a thread open, for as long as the thread serves, and says whether any of them leads to answers.
pub async fn keep_open(shared: &Shared, fleets: &ArcSwap<Fleet>) {
    loop {
        let (fleet, plan) = (fleets.load_full(), shared.plan());
        let reached = join_all(fleet.peers.0.iter().map(PeerRegion::open)).await;
        let takes = |region: &PeerRegion| region.known(plan.as_deref()).is_none_or(|known| known.serves);
        let answers = |(region, reached): (&PeerRegion, bool)| reached && region.is_open && takes(region);
        shared.peers_reached.store(fleet.peers.0.iter().zip(reached).any(answers), Ordering::Relaxed);
        tokio::time::sleep(OPEN_EVERY).await;
    }
}

#[cfg(test)]
#[path = "links_tests.rs"]
mod tests;
