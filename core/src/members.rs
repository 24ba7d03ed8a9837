//! Who is in a pool, as DNS says.
//!
//! The rule: what DNS said last stays until it says something else. No answer, an error and an empty
//! answer say nothing; of the questions about targets, each keeps what it last heard.
//!
//! What DNS gives is bounded, in the order of names, and has each name once.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16};
use std::time::Duration;

use crate::resource::Pod;
use crate::units::Name;

/// The most pods that DNS can give a pool. Those beyond it in the order of names are left out.
pub const MOST: usize = 1_000;

/// The pods of one pool at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    /// Each name once.
    pub pods: Vec<Pod>,
    /// Each pod must prove the name that it has here. Otherwise the names are made of addresses, and any
    /// sidecar of the pool will do.
    pub named: bool,
}

/// What came of the question for the addresses of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Addresses(Vec<IpAddr>),
    /// It has none.
    Nothing,
    /// No answer, or none that says anything.
    Failed,
}

/// An SRV record (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub priority: u16,
    pub weight: u16,
    pub port: u16,
    /// The whole name of a host, in lower case.
    pub target: String,
}

/// What one round of questions about a pool gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Not empty.
    pub roster: Roster,
    /// Some questions about targets failed; these have the addresses of before, if they had any.
    pub partial: bool,
    /// Members beyond [`MOST`].
    pub cut: usize,
    /// Records that can be no pod: addresses of nobody, ports of 0, names that are none or given twice.
    pub unusable: usize,
}

/// The pods at the addresses of a name. None if the answer says nothing.
pub fn of_hosts(answer: Answer, port: NonZeroU16) -> Option<Round> {
    let Answer::Addresses(found) = answer else { return None };
    let mut pods = BTreeMap::new();
    let mut unusable = 0;
    for address in found.into_iter().map(|address| address.to_canonical()) {
        match Name::parse(&name_of(address)) {
            Ok(name) if is_someone(address) => {
                let address = SocketAddr::new(address, port.get());
                pods.insert(name.clone(), Pod { name, address, weight: Pod::FULL_WEIGHT });
            }
            _ => unusable += 1,
        }
    }
    let cut = cut(&mut pods);
    let roster = Roster { pods: pods.into_values().collect(), named: false };
    finish(Round { roster, partial: false, cut, unusable })
}

/// The targets of SRV records that are a pool's pods: those of the lowest priority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets {
    services: BTreeMap<Name, Service>,
    cut: usize,
    unusable: usize,
}

impl Targets {
    pub fn of(mut services: Vec<Service>) -> Self {
        // Servers turn the order round with each answer; of those of one name the same must stay.
        services.sort_by(|one, other| (&one.target, one.port).cmp(&(&other.target, other.port)));
        let lowest = services.iter().map(|service| service.priority).min();
        let mut targets = Self { services: BTreeMap::new(), cut: 0, unusable: 0 };
        for service in services.into_iter().filter(|service| Some(service.priority) == lowest) {
            let label = service.target.split('.').next().unwrap_or_default();
            match Name::parse(label) {
                Ok(name) if service.port > 0 && !targets.services.contains_key(&name) => {
                    targets.services.insert(name, service);
                }
                _ => targets.unusable += 1,
            }
        }
        targets.cut = cut(&mut targets.services);
        targets
    }

    /// The names of hosts whose addresses are to be asked for.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.services.values().map(|service| service.target.as_str())
    }

    /// The pods at the targets. `addresses` answers for each of [`Self::hosts`]; `last` is what the same
    /// records gave before. None if no target has an address.
    pub fn resolved(self, addresses: Vec<Answer>, last: &Roster) -> Option<Round> {
        let heaviest = self.services.values().map(|service| service.weight).max().unwrap_or_default();
        let (mut partial, mut unusable) = (false, self.unusable);
        let mut pods = Vec::with_capacity(self.services.len());
        for ((name, service), answer) in self.services.into_iter().zip(addresses) {
            let address = match answer {
                // One way to a pod is enough; the first of a kind, so that it stays the same.
                Answer::Addresses(found) => {
                    let usable = found.into_iter().map(|address| address.to_canonical());
                    let first = usable.filter(|address| is_someone(*address)).min();
                    unusable += usize::from(first.is_none());
                    first
                }
                Answer::Nothing => None,
                Answer::Failed => {
                    partial = true;
                    let known = last.pods.binary_search_by(|pod| pod.name.cmp(&name)).ok();
                    known.and_then(|index| last.pods.get(index)).map(|pod| pod.address.ip())
                }
            };
            let weight = relative_weight(service.weight, heaviest);
            pods.extend(address.map(|ip| Pod { name, address: SocketAddr::new(ip, service.port), weight }));
        }
        finish(Round { roster: Roster { pods, named: true }, partial, cut: self.cut, unusable })
    }
}

/// When to ask again after an answer whose first record ends after `ttl`.
pub fn refresh_after(ttl: Duration) -> Duration {
    const SOONEST: Duration = Duration::from_secs(1);
    const LATEST: Duration = Duration::from_secs(300);
    ttl.clamp(SOONEST, LATEST)
}

/// When to ask again after so many failures in a row: 1 s, doubling to 30 s, less up to a tenth so that
/// gateways do not ask together. `random` is from 0 to 1.
pub fn retry_after(failures: u32, random: f64) -> Duration {
    const LONGEST: Duration = Duration::from_secs(30);
    let doubled = Duration::from_secs(1 << failures.saturating_sub(1).min(5));
    doubled.min(LONGEST).mul_f64(1.0 - 0.1 * random.clamp(0.0, 1.0))
}

fn cut<T>(members: &mut BTreeMap<Name, T>) -> usize {
    let before = members.len();
    while members.len() > MOST {
        members.pop_last();
    }
    before - members.len()
}

fn finish(round: Round) -> Option<Round> {
    (!round.roster.pods.is_empty()).then_some(round)
}

/// Of a record's weight the share of the heaviest one's, in percent. A weight of 0 is the smallest there
/// is; where all are 0, all are equal.
fn relative_weight(weight: u16, heaviest: u16) -> NonZeroU8 {
    let (weight, heaviest) = (u32::from(weight.max(1)), u32::from(heaviest.max(1)));
    let full = u32::from(Pod::FULL_WEIGHT.get());
    let relative = (weight * full).div_ceil(heaviest);
    u8::try_from(relative).ok().and_then(NonZeroU8::new).unwrap_or(Pod::FULL_WEIGHT)
}

/// `10-0-0-7`, `fd00-0-0-0-0-0-0-7`: what no `::` could make begin or end with a dash.
fn name_of(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string().replace('.', "-"),
        IpAddr::V6(address) => address.segments().map(|segment| format!("{segment:x}")).join("-"),
    }
}

/// Whether one host may have this address.
fn is_someone(address: IpAddr) -> bool {
    let broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !address.is_unspecified() && !address.is_multicast() && !broadcast
}

#[cfg(test)]
#[path = "members_tests.rs"]
mod tests;
