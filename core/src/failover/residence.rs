//! Where a gateway without usable local capacity may send a request.
//!
//! The rule: a request leaves its region only where its tenant lets it, once, and for a region that can answer it in
//! time. Among those the cheaper one is first, then the nearer, then whoever the request's key draws, in proportion
//! to headroom: so that all gateways of a region together do not fill one peer.
//!
//! Peers whose headroom is not known come after all others, and are not refused for it: unknown is not full. Round
//! trips within the same 20 ms count as equally near.
//!
//! That the local region cannot serve is found out elsewhere, and so is which gateway of the peer gets the request.

use std::collections::BTreeSet;
use std::time::Duration;

use super::rendezvous::draw;
use crate::deadline::SHORTEST_USEFUL;
use crate::units::Name;

/// Steps in which round trips are compared.
const NEAR: Duration = Duration::from_millis(20);

/// Where a tenant's requests may be answered, beside the region that they were sent to: `may_leave_region`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MayLeave {
    /// `false`, and where nothing is said: residence is a promise.
    #[default]
    No,
    /// In these regions.
    To(BTreeSet<Name>),
    /// `true`.
    Anywhere,
}

impl MayLeave {
    pub fn permits(&self, region: &Name) -> bool {
        match self {
            Self::No => false,
            Self::To(regions) => regions.contains(region),
            Self::Anywhere => true,
        }
    }
}

/// Another region as a gateway sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    pub region: Name,
    /// The model has a pool there.
    pub serves: bool,
    /// It takes traffic, and one of its gateways can be reached.
    pub healthy: bool,
    /// Requests/s that it could take more.
    pub headroom: Option<f64>,
    /// What a request costs there, in any unit that is the same for all peers. What is no number costs most.
    pub cost: f64,
    /// To its gateways and back.
    pub round_trip: Option<Duration>,
}

/// A request that cannot be served where it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stranded<'a> {
    /// The region that it is in.
    pub region: &'a Name,
    /// Another region's gateway sent it.
    pub forwarded: bool,
    pub may_leave: &'a MayLeave,
    /// Time left until its deadline.
    pub left: Duration,
    /// What the model usually takes: its recent p50.
    pub expected: Duration,
    /// Hash of the entity, or of anything that spreads requests.
    pub key: u64,
}

/// Why a request stays, the farthest it got: so `Full` says that all else would have done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NoPeer {
    /// It came from another region already: one hop is the most.
    Forwarded,
    /// There is no other region.
    Alone,
    /// Its tenant does not let it leave to any.
    Residence,
    /// The model is not served in any that it may go to.
    NotServed,
    Unhealthy,
    Full,
    /// It could not be answered in time.
    Deadline,
}

impl NoPeer {
    /// As in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Alone => "alone",
            Self::Residence => "residence",
            Self::NotServed => "not-served",
            Self::Unhealthy => "unhealthy",
            Self::Full => "full",
            Self::Deadline => "deadline",
        }
    }
}

/// The regions to which a request may be forwarded, the best one first; not empty.
pub fn peers_for<'a>(request: &Stranded<'_>, peers: &'a [Peer]) -> Result<Vec<&'a Name>, NoPeer> {
    if request.forwarded {
        return Err(NoPeer::Forwarded);
    }
    let mut farthest = NoPeer::Alone;
    let mut fit = Vec::with_capacity(peers.len());
    for peer in peers.iter().filter(|peer| peer.region != *request.region) {
        match unfit(request, peer) {
            Some(reason) => farthest = farthest.max(reason),
            None => fit.push((preference(request, peer), &peer.region)),
        }
    }
    if fit.is_empty() {
        return Err(farthest);
    }
    fit.sort_by(|(one, of_one), (other, of_other)| one.compare(other).then_with(|| of_one.cmp(of_other)));
    Ok(fit.into_iter().map(|(_, region)| region).collect())
}

/// Why a request cannot be forwarded to this one of other regions.
pub fn unfit(request: &Stranded<'_>, peer: &Peer) -> Option<NoPeer> {
    let needed = peer.round_trip.unwrap_or_default().saturating_add(request.expected.max(SHORTEST_USEFUL));
    if !request.may_leave.permits(&peer.region) {
        Some(NoPeer::Residence)
    } else if !peer.serves {
        Some(NoPeer::NotServed)
    } else if !peer.healthy {
        Some(NoPeer::Unhealthy)
    } else if headroom_of(peer).is_some_and(|headroom| headroom <= 0.0) {
        Some(NoPeer::Full)
    } else if request.left < needed {
        Some(NoPeer::Deadline)
    } else {
        None
    }
}

/// What is compared, in this order; the least is best.
struct Preference {
    unknown: bool,
    cost: f64,
    distance: u128,
    draw: f64,
}

impl Preference {
    fn compare(&self, other: &Self) -> std::cmp::Ordering {
        let known = self.unknown.cmp(&other.unknown);
        let cheaper = || self.cost.total_cmp(&other.cost);
        known.then_with(cheaper).then(self.distance.cmp(&other.distance)).then_with(|| self.draw.total_cmp(&other.draw))
    }
}

fn preference(request: &Stranded<'_>, peer: &Peer) -> Preference {
    let headroom = headroom_of(peer);
    Preference {
        unknown: headroom.is_none(),
        cost: if peer.cost.is_finite() { peer.cost } else { f64::INFINITY },
        distance: peer.round_trip.map_or(u128::MAX, |time| time.as_nanos() / NEAR.as_nanos()),
        draw: draw(peer.region.as_str().as_bytes(), request.key, headroom.unwrap_or(1.0)),
    }
}

fn headroom_of(peer: &Peer) -> Option<f64> {
    peer.headroom.filter(|headroom| headroom.is_finite())
}

#[cfg(test)]
#[path = "residence_tests.rs"]
mod tests;
