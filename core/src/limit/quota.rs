//! A gateway's slice of a quota that all gateways of its region share.
//!
//! The rule: what the region admits stays within the bound below, also while gateways come, go and
//! lose Redis, and no gateway waits for Redis to answer a request. The slices are cut by Redis
//! ([`super::lease`]), once a term T, by recent demand; this module says what one gateway asks, what it
//! does with the answer, and with none. It does not talk to Redis.
//!
//! ```text
//! joining (φR) --answer--> leased (granted rate) --answer--> leased
//! joining --no answer--> local (R / gateways)
//! leased --no answer for L = 3 T since the last was asked for--> local (the same rate)
//! local --answer--> leased
//! ```
//!
//! # What a region admits at most
//!
//! In any window W, for a quota of R tokens a second with burst B:
//!
//! ```text
//! admitted(W) ≤ (R × W + B) × (1 + φ × j + λ) + B × σ + (n + j) × c
//! ```
//!
//! * φ = 1/16: the floor that a newcomer gets; c: the largest cost of a request, so the least burst.
//! * n: gateways as the window opens.
//! * j: gateways that start, or start again, in the window, or that did before it and are not settled.
//! * σ: the shares of R that such gateways get with their first answer, if that comes in the window.
//! * λ: the shares of R of gateways that are forgotten (their leases ran out or were lost, and Redis then
//!   raised another gateway's rate), or that started without Redis, in the window or not settled before.
//! * Settled: Redis has a lease of every gateway, and each has had two answers since: two terms.
//!
//! So R × W + B + n × c while nothing happens. Redis gone for all adds nothing by itself.
//!
//! 1. A bucket admits the tokens in it and those that come: the sum over gateways is what is in their
//!    buckets as the window opens, the integral of their rates, and what starting gateways bring.
//! 2. No gateway uses more than its record in Redis, if it has one. Let Φ be the sum over gateways of the
//!    record, or of the rate used by those without. An answer grants at most what the records of the
//!    others leave of R, or what was its own: Φ ≤ max(R, Φ before). It does not see rates without a
//!    record: λR. A newcomer is granted its floor whatever the others have: φR. So Φ ≤ R (1 + φj + λ).
//! 3. The excess goes: while Φ > R and all have records, two answers leave a gateway with what the
//!    records of the others leave of R, and then Φ ≤ R, or with at most R / n; if all have that, Φ ≤ R
//!    too. (The first answer lowers what it uses, the second what is on record.)
//! 4. A slice of rate r has the burst max(c, B × r / R): the sum is at most B × Φ / R + n × c. Cut anew, a
//!    bucket keeps its tokens and gets no more ([`Gcra::carry`]), so only a gateway that starts brings
//!    some: the burst of its floor, or of its first slice. A gateway that hears of a larger cost than before
//!    ([`Quota::admitting`]) has a larger burst from then on; that is within its c.

use std::time::Duration;

use super::lease::{Ask, Grant, LARGEST_DEMAND, LARGEST_RATE, LONGEST_LEASE};
use super::{Gcra, InvalidLimit, Rate, Reserves};

/// 1 / φ: a newcomer gets one part in this many of the quota.
pub const FLOOR_PARTS: u64 = 16;

/// A lease's life in terms: two answers may be missed.
pub const LEASE_TERMS: u32 = 3;

/// Terms in which half of the demand's past is forgotten.
const DEMAND_HALF_LIFE: f64 = 2.0;

/// A quota as its operator writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaSettings {
    /// Tokens for the whole region, at least one a minute.
    pub rate: Rate,
    /// Tokens that the whole region may take at once.
    pub burst: u32,
    /// The largest cost of one request, tokens: each gateway's burst is at least this. Default 1.
    pub largest_cost: u32,
    /// What each class leaves in each gateway's bucket.
    pub reserves: Reserves,
    /// The time between two askings, 10 ms to 20 s. Default 500 ms.
    pub term: Duration,
    /// Gateways of the region, for those that start while Redis is gone. Default 1.
    pub gateways: u32,
}

impl QuotaSettings {
    /// Defaults for all but the rate and the burst.
    pub fn new(rate: Rate, burst: u32) -> Self {
        let (reserves, term) = (Reserves::default(), Duration::from_millis(500));
        Self { rate, burst, largest_cost: 1, reserves, term, gateways: 1 }
    }
}

/// A checked quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// R, milli-tokens a second.
    rate: u64,
    burst: u32,
    largest_cost: u32,
    reserves: Reserves,
    term: Duration,
    gateways: u32,
}

/// What happens in a region around a window: the letters of the bound.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Upheaval {
    /// n
    pub gateways: u32,
    /// j
    pub started: u32,
    /// σ
    pub first_shares: f64,
    /// λ
    pub forgotten_shares: f64,
}

impl Quota {
    pub fn new(settings: &QuotaSettings) -> Result<Self, InvalidLimit> {
        let QuotaSettings { rate, burst, largest_cost, reserves, term, gateways } = *settings;
        Gcra::new(rate, burst, reserves)?;
        let rate = rate.milli_per_second().min(LARGEST_RATE);
        if rate < FLOOR_PARTS {
            return Err(InvalidLimit::QuotaTooSlow);
        }
        if largest_cost == 0 || largest_cost > burst {
            return Err(InvalidLimit::LargestCost);
        }
        if term < Duration::from_millis(10) || term.saturating_mul(LEASE_TERMS).as_millis() > LONGEST_LEASE.into() {
            return Err(InvalidLimit::Term);
        }
        if gateways == 0 {
            return Err(InvalidLimit::NoGateways);
        }
        Ok(Self { rate, burst, largest_cost, reserves, term, gateways })
    }

    /// T
    pub fn term(&self) -> Duration {
        self.term
    }

    /// R, milli-tokens a second.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// B
    pub fn burst(&self) -> u32 {
        self.burst
    }

    /// The same, with every slice's burst large enough for a request of this cost, and for those of `other`.
    /// A cost above B stays too large.
    pub fn admitting(self, cost: u32, other: &Self) -> Self {
        let largest_cost = self.largest_cost.max(cost).max(other.largest_cost).min(self.burst);
        Self { largest_cost, ..self }
    }

    /// The bound on the tokens that the region admits in a window.
    pub fn most_admitted(&self, window: Duration, upheaval: &Upheaval) -> f64 {
        let Upheaval { gateways, started, first_shares, forgotten_shares } = *upheaval;
        let (rate, burst) = (self.rate as f64 / 1_000.0, f64::from(self.burst));
        let shares = 1.0 + f64::from(started) / FLOOR_PARTS as f64 + forgotten_shares;
        let rounding = f64::from(gateways.saturating_add(started)) * f64::from(self.largest_cost);
        (rate * window.as_secs_f64() + burst) * shares + burst * first_shares + rounding
    }

    fn floor(&self) -> u64 {
        self.rate / FLOOR_PARTS
    }

    /// L
    fn lease_life(&self) -> Duration {
        self.term * LEASE_TERMS
    }

    fn bucket(&self, rate: u64) -> Gcra {
        let burst = u128::from(self.burst) * u128::from(rate) / u128::from(self.rate);
        let burst = u32::try_from(burst).unwrap_or(self.burst).clamp(self.largest_cost, self.burst);
        Gcra::of_slice(rate, burst, self.reserves)
    }
}

/// Where a slice's rate comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No answer yet: the newcomer's floor.
    Joining,
    /// Granted by Redis, and not run out.
    Leased,
    /// Redis does not answer: the last share, or an equal one.
    Local,
}

/// One gateway's slice of one quota.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    quota: Quota,
    basis: Basis,
    /// Milli-tokens a second, 1 to R.
    rate: u64,
    bucket: Gcra,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basis {
    Joining,
    /// Redis was gone from the start.
    Placed,
    Leased {
        until: Duration,
    },
}

/// A slice's bucket was replaced: how its state goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub from: Gcra,
    pub to: Gcra,
    keeps: Keeps,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeps {
    Fraction,
    Tokens,
}

impl Slice {
    /// A gateway that starts. Ask Redis before, or as soon as, requests come.
    pub fn new(quota: Quota) -> Self {
        let rate = quota.floor();
        Self { quota, basis: Basis::Joining, rate, bucket: quota.bucket(rate) }
    }

    /// What to ask of Redis each term. One asking at a time, and in order: Redis must not hear an old one
    /// after a newer one.
    pub fn ask(&self, demand: &Demand) -> Ask {
        let held = if self.basis == Basis::Joining { 0 } else { self.rate };
        let lease = u64::try_from(self.quota.lease_life().as_millis()).unwrap_or(LONGEST_LEASE);
        Ask { demand: demand.milli_per_second(), held, rate: self.quota.rate, floor: self.quota.floor(), lease }
    }

    /// Takes the answer to what was asked at `sent`; use the change at once. An answer that comes after
    /// the lease ran out is ignored.
    pub fn granted(&mut self, sent: Duration, now: Duration, grant: Grant) -> Option<Change> {
        let until = sent.saturating_add(self.quota.lease_life());
        if now >= until {
            return None;
        }
        let keeps = if self.basis == Basis::Joining { Keeps::Fraction } else { Keeps::Tokens };
        self.basis = Basis::Leased { until };
        self.set(grant.rate, keeps)
    }

    /// Asking failed, or was not answered in time. Only a gateway that was never answered does anything.
    pub fn missed(&mut self) -> Option<Change> {
        if self.basis != Basis::Joining {
            return None;
        }
        self.basis = Basis::Placed;
        self.set(self.quota.rate / u64::from(self.quota.gateways), Keeps::Fraction)
    }

    /// Goes on with a quota that its operator changed: the same share of it.
    pub fn change_quota(&mut self, quota: Quota) -> Option<Change> {
        let rate = u128::from(self.rate) * u128::from(quota.rate) / u128::from(self.quota.rate);
        self.quota = quota;
        self.set(u64::try_from(rate).unwrap_or(quota.rate), Keeps::Fraction)
    }

    pub fn standing(&self, now: Duration) -> Standing {
        match self.basis {
            Basis::Joining => Standing::Joining,
            Basis::Leased { until } if now < until => Standing::Leased,
            Basis::Placed | Basis::Leased { .. } => Standing::Local,
        }
    }

    /// Milli-tokens a second.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// The bucket that judges requests. A new slice's state is 0.
    pub fn bucket(&self) -> Gcra {
        self.bucket
    }

    fn set(&mut self, rate: u64, keeps: Keeps) -> Option<Change> {
        self.rate = rate.clamp(1, self.quota.rate);
        let from = std::mem::replace(&mut self.bucket, self.quota.bucket(self.rate));
        (from != self.bucket).then_some(Change { from, to: self.bucket, keeps })
    }
}

impl Change {
    /// The state of the new bucket that goes on from `state` of the old one.
    pub fn state(&self, state: u64, now_ns: u64) -> u64 {
        match self.keeps {
            Keeps::Fraction => self.from.rescale(state, now_ns, &self.to),
            Keeps::Tokens => self.from.carry(state, now_ns, &self.to),
        }
    }
}

/// Tokens asked for, admitted or not: a mean over terms with weights that halve every two.
///
/// mean += (sample − mean) × (1 − 2^(−elapsed / 2T)); the first sample is the first mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Demand {
    /// Milli-tokens a second.
    mean: Option<f64>,
}

impl Demand {
    /// Counts the tokens asked for in the time since the last sample.
    pub fn observe(&mut self, asked: u64, elapsed: Duration, quota: &Quota) {
        if elapsed.is_zero() {
            return;
        }
        let sample = (asked as f64 * 1_000.0 / elapsed.as_secs_f64()).min(LARGEST_DEMAND as f64);
        let terms = elapsed.as_secs_f64() / quota.term.as_secs_f64();
        let mean = self.mean.unwrap_or(sample);
        self.mean = Some(sample + (mean - sample) * (-terms / DEMAND_HALF_LIFE).exp2());
    }

    /// Milli-tokens a second, rounded down, at most [`LARGEST_DEMAND`].
    pub fn milli_per_second(&self) -> u64 {
        self.mean.map_or(0, |mean| mean as u64).min(LARGEST_DEMAND)
    }
}

#[cfg(test)]
#[path = "quota_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "quota_region_tests.rs"]
mod region_tests;
