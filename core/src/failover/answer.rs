//! The addresses that DNS gives a client.
//!
//! The rule: a client's subnet has one region, in proportion to the plan's weights, for as long as weights and health
//! stay; a change moves only what it must. While any region has an address there is an answer (THREATS 66).
//!
//! | regions that are not out        | answered                                              |
//! |---------------------------------|-------------------------------------------------------|
//! | some have weight                | one of these, by weight                               |
//! | none has weight                 | one of them, all alike                                |
//! | there are none                  | of each with weight some addresses; of all if none has |
//!
//! Region and order of addresses come from rendezvous hashing on the subnet: that of the EDNS client subnet
//! option where there is one (ECS, RFC 7871), or else of the resolver; /24 of IPv4, /56 of IPv6, as that RFC advises.
//!
//! Which name, type and class were asked, and how much fits into a message, is not decided here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::rendezvous::draw;
use super::weights::weight_of;
use crate::units::Name;

/// What of a client's address decides.
const V4_LENGTH: u8 = 24;
const V6_LENGTH: u8 = 56;

/// How answers are given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerSettings {
    /// Time to live of an answer while its region is steady. Default 30 s.
    pub ttl: Duration,
    /// While it is not. Default 5 s.
    pub hurried_ttl: Duration,
    /// Addresses in an answer, 1 at least. Default 8: of IPv6, 224 octets.
    pub addresses: usize,
}

impl Default for AnswerSettings {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(30), hurried_ttl: Duration::from_secs(5), addresses: 8 }
    }
}

/// What a region's health means for answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// Nothing is wrong with it.
    Steady,
    /// Suspected, or on its way back: clients should ask again soon.
    Unsteady,
    /// Not to be answered while there is another.
    Out,
}

/// A region as it can be answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Site<'a> {
    /// From the plan, made again under the node's own view of health ([`super::Plan::under`]).
    pub weight: f64,
    pub standing: Standing,
    /// Of the family that was asked for, each once. A region without any is not answered.
    pub addresses: &'a [IpAddr],
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    /// The region of the first address, which is that of all while any region is not out.
    pub region: &'a Name,
    /// At least one.
    pub addresses: Vec<IpAddr>,
    pub ttl: Duration,
}

/// The part of a client's address that decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subnet {
    /// Zero beyond `length`.
    address: IpAddr,
    length: u8,
}

impl Subnet {
    /// The subnet of a client or resolver.
    pub fn of(address: IpAddr) -> Self {
        let address = address.to_canonical();
        Self::cut(address, u8::MAX)
    }

    /// The subnet that decides a query: of its ECS option (address and source prefix length), or else of its
    /// sender. With it the scope prefix length for the option in the answer, 0 where the option said nothing.
    pub fn of_query(ecs: Option<(IpAddr, u8)>, resolver: IpAddr) -> (Self, u8) {
        let stated = ecs.filter(|(address, source)| (1..=bits(*address)).contains(source));
        match stated.map(|(address, source)| Self::cut(address, source)) {
            Some(subnet) => (subnet, subnet.length),
            None => (Self::of(resolver), 0),
        }
    }

    /// Bits of the address that count.
    pub fn length(&self) -> u8 {
        self.length
    }

    fn cut(address: IpAddr, source: u8) -> Self {
        match address {
            IpAddr::V4(address) => {
                let length = source.min(V4_LENGTH);
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or_default();
                Self { address: IpAddr::V4((address.to_bits() & mask).into()), length }
            }
            IpAddr::V6(address) => {
                let length = source.min(V6_LENGTH);
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or_default();
                Self { address: IpAddr::V6((address.to_bits() & mask).into()), length }
            }
        }
    }

    fn hash(&self) -> u64 {
        match self.address {
            IpAddr::V4(address) => xxh3_64(&address.octets()),
            IpAddr::V6(address) => xxh3_64(&address.octets()),
        }
    }
}

/// What a client of this subnet is told. None only if no region has an address.
///
/// O(regions + addresses of the answered region x log of them).
pub fn answer<'a>(
    sites: &BTreeMap<&'a Name, Site<'_>>,
    subnet: &Subnet,
    settings: &AnswerSettings,
) -> Option<Answer<'a>> {
    let key = subnet.hash();
    let there = |site: &Site<'_>| !site.addresses.is_empty();
    let weighs = |site: &Site<'_>| weight_of(site.weight) > 0.0;
    let any = |takes: &dyn Fn(&Site<'_>) -> bool| sites.values().any(|site| there(site) && takes(site));
    let blind = !any(&|site| site.standing != Standing::Out);
    let in_view = |site: &Site<'_>| there(site) && (blind || site.standing != Standing::Out);
    let weighted = any(&|site| in_view(site) && weighs(site));
    let drawn = sites.iter().filter(|(_, site)| in_view(site) && (!weighted || weighs(site))).map(|(name, site)| {
        let weight = if weighted { site.weight } else { 1.0 };
        (draw(name.as_str().as_bytes(), key, weight), *name, site)
    });
    let most = settings.addresses.max(1);
    if !blind {
        let (_, region, site) = drawn.min_by(|one, other| one.0.total_cmp(&other.0))?;
        let ttl = if site.standing == Standing::Steady { settings.ttl } else { settings.hurried_ttl };
        let mut addresses = ordered(site.addresses, key);
        addresses.truncate(most);
        return Some(Answer { region, addresses, ttl });
    }
    // Which of them serves is not known: the client is given some of each.
    let mut drawn: Vec<_> = drawn.collect();
    drawn.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (_, region, _) = drawn.first()?;
    let mut orders: Vec<_> = drawn.iter().map(|(.., site)| ordered(site.addresses, key).into_iter()).collect();
    let mut addresses = Vec::with_capacity(most.min(sites.values().map(|site| site.addresses.len()).sum()));
    while addresses.len() < most {
        let before = addresses.len();
        addresses.extend(orders.iter_mut().filter_map(Iterator::next).take(most - before));
        if addresses.len() == before {
            break;
        }
    }
    Some(Answer { region, addresses, ttl: settings.hurried_ttl })
}

/// In an order of the subnet's own: clients spread over a region's gateways, and one that goes moves its own clients
/// alone.
fn ordered(addresses: &[IpAddr], key: u64) -> Vec<IpAddr> {
    let hash = |address: &IpAddr| match address {
        IpAddr::V4(address) => xxh3_64_with_seed(&address.octets(), key),
        IpAddr::V6(address) => xxh3_64_with_seed(&address.octets(), key),
    };
    let mut ordered = addresses.to_vec();
    ordered.sort_by_cached_key(|address| (hash(address), *address));
    ordered
}

fn bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
