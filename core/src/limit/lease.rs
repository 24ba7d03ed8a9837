//! How a region's quota is cut into slices: the reference of `quota.lua`, digit for digit.
//!
//! The rule: the rates on record never sum to more than the quota, but for a floor that a newcomer is
//! always granted. Everything is in whole milli-tokens a second, so that Redis and Rust agree. What
//! follows from the rule for the tokens admitted stands in [`super::quota`].
//!
//! With R the quota, φR the floor, n the gateways with a lease, d the caller's demand, D that of all,
//! O the rates on record of the others:
//!
//! ```text
//! target  = d + (R − D) / n                  if D ≤ R − φR: its demand, and an equal part of the rest
//!           (R − φR) × d / D + φR / n        otherwise: by demand, with a standby for idle gateways
//! least   = max(1, min(φR, R / n))
//! granted = max(1, min(target, max(R − O, least)))            without a lease, holding nothing
//!           the same, at most what it holds                   without a lease, holding a rate
//!           max(1, min(target, max(R − O, min(least, own))))  with `own` on record
//! record  = max(granted, held) until now + L
//! ```
//!
//! Targets sum to at most R. A grant may stay below its target until the others have given back theirs,
//! and a gateway's record is the larger of what it is granted and what it held when it asked: whether
//! the answer reaches it or not, it never uses more than its record. A gateway that comes with a rate but
//! without a lease was forgotten (Redis lost its memory, or was away): all such come back with what they
//! hold before any of them grows.

use std::collections::BTreeMap;

/// The script that Redis runs. KEYS: the quota's hash; ARGV: [`Ask::arguments`]; it returns two whole
/// numbers: [`Grant::rate`] and [`Grant::gateways`].
pub const SCRIPT: &str = include_str!("quota.lua");

/// The largest rate, milli-tokens a second: [`super::gcra::FASTEST`].
pub const LARGEST_RATE: u64 = super::gcra::FASTEST * 1_000;

/// The largest demand that counts, milli-tokens a second.
pub const LARGEST_DEMAND: u64 = 1_000_000_000_000;

/// The longest lease, ms. A record that claims a longer one is wrong, or Redis' clock stepped back.
pub const LONGEST_LEASE: u64 = 60_000;

/// Demands are cut to 19 bits before they are multiplied by a rate of 34: below 2^53, where Lua is exact.
const FINEST: u64 = 1 << 19;

/// What a gateway tells and asks of Redis once a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Tokens that callers asked it for lately, milli-tokens a second, at most [`LARGEST_DEMAND`].
    pub demand: u64,
    /// The rate that it works with, milli-tokens a second, at most [`LARGEST_RATE`]; 0 before its first.
    pub held: u64,
    /// The quota's rate, milli-tokens a second, 1 to [`LARGEST_RATE`].
    pub rate: u64,
    /// What a newcomer gets, milli-tokens a second, at most the rate.
    pub floor: u64,
    /// The lease's life, ms, 1 to [`LONGEST_LEASE`].
    pub lease: u64,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Milli-tokens a second.
    pub rate: u64,
    /// Gateways with a lease, the caller among them.
    pub gateways: u64,
}

/// A gateway's record: the most it uses until `expiry`, and what it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Milli-tokens a second.
    pub rate: u64,
    /// Milli-tokens a second.
    pub demand: u64,
    /// ms of Redis' clock.
    pub expiry: u64,
}

/// The leases of one quota, as the hash in Redis holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases(pub BTreeMap<String, Lease>);

impl Leases {
    /// What the script does. Leases that ran out are forgotten.
    pub fn renew(&mut self, now: u64, gateway: &str, ask: &Ask) -> Grant {
        self.0.retain(|_, lease| lease.is_right(now));
        let mine = self.0.get(gateway).map(|lease| lease.rate);
        let others = self.0.iter().filter(|(name, _)| *name != gateway).map(|(_, lease)| lease);
        let grant = grant(others, mine, ask);
        let lease = Lease { rate: grant.rate.max(ask.held), demand: ask.demand, expiry: now + ask.lease };
        self.0.insert(gateway.to_owned(), lease);
        grant
    }
}

impl Ask {
    /// The script's ARGV.
    pub fn arguments(&self, gateway: &str) -> [String; 6] {
        let Self { demand, held, rate, floor, lease } = self;
        let numbers = [demand, held, rate, floor, lease].map(|number| number.to_string());
        let [demand, held, rate, floor, lease] = numbers;
        [gateway.to_owned(), demand, held, rate, floor, lease]
    }
}

impl Lease {
    fn is_right(&self, now: u64) -> bool {
        self.rate <= LARGEST_RATE
            && self.demand <= LARGEST_DEMAND
            && self.expiry > now
            && self.expiry <= now.saturating_add(LONGEST_LEASE)
    }
}

/// The rate for one gateway, from the leases of the `others` that have not run out, the rate that is on
/// record for it (`mine`), and what it asks.
pub fn grant<'a>(others: impl Iterator<Item = &'a Lease>, mine: Option<u64>, ask: &Ask) -> Grant {
    let (mut outstanding, mut total, mut gateways) = (0_u64, ask.demand, 1_u64);
    for lease in others {
        outstanding = outstanding.saturating_add(lease.rate);
        total = total.saturating_add(lease.demand);
        gateways += 1;
    }
    let shared = ask.rate.saturating_sub(ask.floor);
    let target = if total <= shared {
        ask.demand + (ask.rate - total) / gateways
    } else {
        by_demand(shared, ask.demand, total) + ask.floor / gateways
    };
    let least = ask.floor.min(ask.rate / gateways).max(1);
    let keep = mine.unwrap_or(least).min(least);
    let free = ask.rate.saturating_sub(outstanding);
    let mut rate = target.min(free.max(keep)).max(1);
    if mine.is_none() && ask.held > 0 {
        rate = rate.min(ask.held);
    }
    Grant { rate, gateways }
}

fn by_demand(shared: u64, mut part: u64, mut whole: u64) -> u64 {
    while whole >= FINEST {
        part /= 2;
        whole /= 2;
    }
    shared.saturating_mul(part).checked_div(whole).unwrap_or(0)
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
