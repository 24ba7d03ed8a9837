//! What a node asks of a version that it is offered, beyond that it compiles.
//!
//! The rule: what is offered is taken whole or not at all, and refused with every reason at once. The last good version
//! stays (THREATS 60 to 62).
//!
//! Refused is
//! * what is older: a version that is not above the one served, or a leader's epoch below the newest one seen. In
//!   answer to a mismatch the same version comes again, whole; that is let in ([`Offer::resync`]);
//! * what is too large;
//! * what would leave nothing: no region, no weight above 0, a pool or a region without pods that had some, unless
//!   the operator confirmed that very one. A pool that is gone is no pool without pods; a region that is gone is one;
//! * weights that are not finite, or negative.
//!
//! A pool whose pods DNS names counts as having some.

use std::collections::{BTreeMap, BTreeSet};

use crate::failover::{UnfitWeights, check_weights};
use crate::resource::PodSource;
use crate::snapshot::Snapshot;
use crate::units::{ByteSize, Name};

/// The most bytes of a version unless set otherwise.
pub const MOST_BYTES: ByteSize = ByteSize(64 << 20);

/// Reasons that are given. What is beyond them is counted.
const MOST_REASONS: usize = 32;

/// What of a version the checks look at.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// Each region's planned weight.
    pub regions: BTreeMap<Name, f64>,
    pub pools: BTreeMap<Name, PoolContents>,
}

/// A pool as far as the checks look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolContents {
    pub region: Name,
    /// At least one pod, or DNS says which.
    pub has_pods: bool,
}

/// What an operator said may be left without pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confirmed {
    pub regions: BTreeSet<Name>,
    pub pools: BTreeSet<Name>,
}

/// A version as it is offered.
#[derive(Clone, Debug)]
pub struct Offer<'a> {
    pub version: u64,
    /// Revision of the election that its sender won.
    pub epoch: u64,
    /// Its length as it came.
    pub size: ByteSize,
    /// The node asked for it because what it serves is not what its version should be.
    pub resync: bool,
    pub contents: &'a Contents,
    pub confirmed: &'a Confirmed,
}

/// What the node has.
#[derive(Clone, Debug)]
pub struct Held<'a> {
    /// Version and contents that it serves, if any.
    pub serving: Option<(u64, &'a Contents)>,
    /// The newest epoch that it has seen, on disk or from any leader. 0 for none.
    pub epoch: u64,
}

/// Why a version is not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unsafe {
    #[error("the version {offered} is not newer than {serving}, which is served")]
    Older { offered: u64, serving: u64 },
    #[error("it comes from the leader of epoch {offered}; there has been one of epoch {seen} since")]
    StaleLeader { offered: u64, seen: u64 },
    #[error("it has {} bytes; expected at most {}", .size.0, .most.0)]
    TooLarge { size: ByteSize, most: ByteSize },
    #[error(transparent)]
    Weights(#[from] UnfitWeights),
    #[error("the pool '{pool}' would have no pods, and has some now; confirm it if it is meant")]
    EmptiedPool { pool: Name },
    #[error("the region '{region}' would have no pods, and has some now; confirm it if it is meant")]
    EmptiedRegion { region: Name },
    #[error("and {0} more")]
    More(usize),
}

impl Contents {
    /// Those of a snapshot, and the weight of each region.
    pub fn of(snapshot: &Snapshot, weight: impl Fn(&Name) -> f64) -> Self {
        let has_pods = |source: &PodSource| match source {
            PodSource::Listed(pods) => !pods.is_empty(),
            PodSource::Dns(_) => true,
        };
        let pool = |pool: &crate::resource::Pool| PoolContents {
            region: pool.region.clone(),
            has_pods: has_pods(&pool.source),
        };
        Self {
            regions: snapshot.regions.keys().map(|region| (region.clone(), weight(region))).collect(),
            pools: snapshot.pools.iter().map(|(name, of)| (name.clone(), pool(of))).collect(),
        }
    }

    fn staffed_regions(&self) -> BTreeSet<&Name> {
        self.pools.values().filter(|pool| pool.has_pods).map(|pool| &pool.region).collect()
    }
}

/// Whether a node may take what it is offered, or all reasons why not.
pub fn check(offer: &Offer<'_>, held: &Held<'_>, most: ByteSize) -> Result<(), Vec<Unsafe>> {
    let mut faults = Vec::new();
    if offer.epoch < held.epoch {
        faults.push(Unsafe::StaleLeader { offered: offer.epoch, seen: held.epoch });
    }
    if offer.size > most {
        faults.push(Unsafe::TooLarge { size: offer.size, most });
    }
    let weights = offer.contents.regions.iter().map(|(region, weight)| (region, *weight));
    faults.extend(check_weights(weights, |_| true).into_iter().map(Unsafe::Weights));
    if let Some((serving, contents)) = held.serving {
        let newer = offer.version > serving || (offer.resync && offer.version == serving);
        if !newer {
            faults.push(Unsafe::Older { offered: offer.version, serving });
        }
        faults.extend(emptied(contents, offer.contents, offer.confirmed));
    }
    let beyond = faults.len().saturating_sub(MOST_REASONS);
    if beyond > 0 {
        faults.truncate(MOST_REASONS);
        faults.push(Unsafe::More(beyond));
    }
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// Pools and regions that have pods and would have none.
fn emptied(now: &Contents, then: &Contents, confirmed: &Confirmed) -> Vec<Unsafe> {
    let had = |pool: &Name| now.pools.get(pool).is_some_and(|pool| pool.has_pods);
    let pools = then.pools.iter().filter(|(name, pool)| !pool.has_pods && had(name));
    let unconfirmed = pools.filter(|(name, _)| !confirmed.pools.contains(*name));
    let mut faults: Vec<Unsafe> = unconfirmed.map(|(pool, _)| Unsafe::EmptiedPool { pool: pool.clone() }).collect();
    let (before, after) = (now.staffed_regions(), then.staffed_regions());
    let regions = before.difference(&after).filter(|region| !confirmed.regions.contains(**region));
    faults.extend(regions.map(|region| Unsafe::EmptiedRegion { region: (*region).clone() }));
    faults
}

#[cfg(test)]
#[path = "semantics_tests.rs"]
mod tests;
