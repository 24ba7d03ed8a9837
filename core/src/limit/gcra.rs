//! One token bucket: the generic cell rate algorithm (ITU-T I.371, annex A, virtual scheduling).
//!
//! The rule: within any window W a bucket admits at most burst + rate × W tokens, and exactly `burst`
//! at once when it is full. It does not sleep, queue, or share its state: the caller keeps the state.
//!
//! The state is the theoretical arrival time (TAT): when the bucket will be full, in nanoseconds since
//! the process's start. A state that has passed, such as 0, is a full bucket.
//!
//! ```text
//! T             = ceil(per / tokens)                           time of one token, ns
//! tau           = burst × T                                    time from empty to full
//! tokens(now)   = (now + tau − max(TAT, now)) / T
//! reserve(k, c) = min(burst × percent(k) / 100, burst − c)     what class k with cost c must leave
//! admitted      = max(TAT, now) + c × T ≤ now + tau − reserve(k, c) × T;  TAT becomes the left side
//! ```
//!
//! Classes share the bucket. Each must leave a reserve for those above it, so that critical requests
//! find tokens however much low ones ask for, and a class gets whatever those above it do not use.
//! `burst − c` lets every class into a full bucket, also where the bucket is too small for reserves.
//!
//! T rounds up to whole nanoseconds: a bucket is never faster than its rate, and slower by at most
//! rate / 1e9 (0.1 % at a million tokens a second, 1 % at [`FASTEST`]).
//!
//! A clock that steps back costs tokens for as long as the step is not made up; it never gives any.

use std::time::Duration;

use super::Class;

/// The most tokens a second of one bucket. Ask for more in larger units of cost.
pub const FASTEST: u64 = 10_000_000;

/// The longest time from empty to full.
pub const LONGEST_FILL: Duration = Duration::from_secs(366 * 86_400);

const FILL_NS: u64 = LONGEST_FILL.as_secs() * 1_000_000_000;
const SHORTEST_INTERVAL_NS: u64 = 1_000_000_000 / FASTEST;

/// Tokens that come in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Count of tokens, at least 1.
    pub tokens: u64,
    /// The time in which they come.
    pub per: Duration,
}

/// What requests of each class must leave in the bucket for the classes above, in percent of the burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserves {
    /// Default 0 %.
    pub critical: u8,
    /// Default 10 %.
    pub high: u8,
    /// Default 20 %.
    pub normal: u8,
    /// Default 50 %.
    pub low: u8,
}

impl Default for Reserves {
    fn default() -> Self {
        Self { critical: 0, high: 10, normal: 20, low: 50 }
    }
}

/// A limit that cannot be kept; says what the operator wrote wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLimit {
    #[error("the rate must be at least one token in a time above zero")]
    NoRate,
    #[error("the burst must be at least one token")]
    NoBurst,
    #[error("the rate is above {FASTEST} tokens a second: count in larger units")]
    TooFast,
    #[error("the burst takes more than {} days to come back", LONGEST_FILL.as_secs() / 86_400)]
    TooSlow,
    #[error("a reserve is at most 100 %")]
    ReserveAboveWhole,
    #[error("a region's quota must be at least one token a minute")]
    QuotaTooSlow,
    #[error("the largest cost must be 1 to the burst")]
    LargestCost,
    #[error("the term must be 10ms to 20s")]
    Term,
    #[error("there is at least one gateway")]
    NoGateways,
}

/// A bucket's rate, burst and reserves, checked. The state is the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gcra {
    /// T: nanoseconds of one token.
    interval: u64,
    burst: u32,
    /// Tokens that each class leaves, in the order of [`Class::ALL`].
    reserves: [u32; 4],
}

/// What a bucket says to a request. `remaining` counts the tokens that requests of the same class and
/// of cost 1 could take at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The bucket's next state, and the time until it is full.
    Admitted { state: u64, remaining: u32, full_after: Duration },
    /// The state stays. If nothing else is admitted, the same request is, `retry_after` from now.
    Refused { retry_after: Duration, remaining: u32 },
    /// The cost is above the burst: no time will help.
    Never { remaining: u32 },
}

impl Gcra {
    /// A bucket of `burst` tokens that come back at `rate`.
    pub fn new(rate: Rate, burst: u32, reserves: Reserves) -> Result<Self, InvalidLimit> {
        let interval = rate.interval()?;
        if burst == 0 {
            return Err(InvalidLimit::NoBurst);
        }
        if interval.checked_mul(burst.into()).is_none_or(|fill| fill > FILL_NS) {
            return Err(InvalidLimit::TooSlow);
        }
        Ok(Self { interval, burst, reserves: reserves.tokens(burst)? })
    }

    /// The bucket of a slice: `milli` thousandths of a token a second, at least one. A burst that the
    /// rate could not fill in [`LONGEST_FILL`] is cut to what it can.
    pub(super) fn of_slice(milli: u64, burst: u32, reserves: Reserves) -> Self {
        let interval = 1_000_000_000_000_u64.div_ceil(milli.max(1)).max(SHORTEST_INTERVAL_NS);
        let burst = burst.min(u32::try_from(FILL_NS / interval).unwrap_or(u32::MAX)).max(1);
        Self { interval, burst, reserves: reserves.tokens(burst).unwrap_or_default() }
    }

    /// Judges a request of `cost` tokens. A cost of 0 is always admitted and changes nothing.
    pub fn decide(&self, state: u64, now_ns: u64, cost: u32, class: Class) -> Decision {
        if cost > self.burst {
            return Decision::Never { remaining: self.remaining(state, now_ns, class) };
        }
        if cost == 0 {
            return self.admitted(state, now_ns, class);
        }
        let next = state.max(now_ns).saturating_add(self.span(cost));
        let latest = now_ns.saturating_add(self.span(self.burst - self.reserve(class, cost)));
        if next <= latest {
            self.admitted(next, now_ns, class)
        } else {
            let retry_after = Duration::from_nanos(next - latest);
            Decision::Refused { retry_after, remaining: self.remaining(state, now_ns, class) }
        }
    }

    /// The state before `cost` tokens were taken, as far as it matters from then on.
    pub fn give_back(&self, state: u64, cost: u32) -> u64 {
        state.saturating_sub(self.interval.saturating_mul(cost.into()))
    }

    /// The tokens that requests of this class and of cost 1 could take at once.
    pub fn remaining(&self, state: u64, now_ns: u64, class: Class) -> u32 {
        let latest = now_ns.saturating_add(self.span(self.burst - self.reserve(class, 1)));
        let tokens = latest.saturating_sub(state.max(now_ns)) / self.interval;
        u32::try_from(tokens).unwrap_or(u32::MAX)
    }

    /// The state of this bucket as a state of `new`, with the same fraction of the burst used: for a
    /// limit that its operator changed.
    pub fn rescale(&self, state: u64, now_ns: u64, new: &Self) -> u64 {
        if self.same_size(new) {
            return state;
        }
        let used = u128::from(state.saturating_sub(now_ns).min(self.fill()));
        let used = (used * u128::from(new.fill())).div_ceil(self.fill().into());
        now_ns.saturating_add(u64::try_from(used).unwrap_or(u64::MAX))
    }

    /// The state of this bucket as a state of `new`, with the same tokens in it, or a full one if it is
    /// smaller: for slices of one quota, whose sum must not grow by being cut anew.
    pub fn carry(&self, state: u64, now_ns: u64, new: &Self) -> u64 {
        if self.same_size(new) {
            return state;
        }
        let held = u128::from(self.fill().saturating_sub(state.saturating_sub(now_ns)));
        let held = held * u128::from(new.interval) / u128::from(self.interval);
        let used = new.fill().saturating_sub(u64::try_from(held).unwrap_or(u64::MAX));
        now_ns.saturating_add(used)
    }

    pub fn burst(&self) -> u32 {
        self.burst
    }

    /// The time from empty to full: with the burst, what a `RateLimit-Policy` says.
    pub fn window(&self) -> Duration {
        Duration::from_nanos(self.fill())
    }

    fn admitted(&self, state: u64, now_ns: u64, class: Class) -> Decision {
        let full_after = Duration::from_nanos(state.saturating_sub(now_ns));
        Decision::Admitted { state, remaining: self.remaining(state, now_ns, class), full_after }
    }

    /// At most burst − cost. The cost is at most the burst, which is at least 1.
    fn reserve(&self, class: Class, cost: u32) -> u32 {
        self.reserves[class as usize].min(self.burst - cost)
    }

    /// Does not overflow for up to `burst` tokens: they are at most [`LONGEST_FILL`].
    fn span(&self, tokens: u32) -> u64 {
        self.interval * u64::from(tokens)
    }

    fn fill(&self) -> u64 {
        self.span(self.burst)
    }

    fn same_size(&self, other: &Self) -> bool {
        (self.interval, self.burst) == (other.interval, other.burst)
    }
}

impl Decision {
    pub fn remaining(&self) -> u32 {
        match *self {
            Self::Admitted { remaining, .. } | Self::Refused { remaining, .. } | Self::Never { remaining } => remaining,
        }
    }

    /// What the `t` of a `RateLimit` header says: until the bucket is full after an admission, until
    /// the same request would be admitted after a refusal. `Retry-After` is then never before it.
    pub fn reset(&self) -> Option<Duration> {
        match *self {
            Self::Admitted { full_after, .. } => Some(full_after),
            Self::Refused { retry_after, .. } => Some(retry_after),
            Self::Never { .. } => None,
        }
    }
}

impl Rate {
    /// Thousandths of a token a second, rounded down.
    pub fn milli_per_second(self) -> u64 {
        let milli = (u128::from(self.tokens) * 1_000_000_000_000).checked_div(self.per.as_nanos());
        u64::try_from(milli.unwrap_or(0)).unwrap_or(u64::MAX)
    }

    fn interval(self) -> Result<u64, InvalidLimit> {
        if self.tokens == 0 || self.per.is_zero() {
            return Err(InvalidLimit::NoRate);
        }
        match u64::try_from(self.per.as_nanos().div_ceil(self.tokens.into())) {
            Ok(interval) if interval < SHORTEST_INTERVAL_NS => Err(InvalidLimit::TooFast),
            Ok(interval) => Ok(interval),
            Err(_) => Err(InvalidLimit::TooSlow),
        }
    }
}

impl Reserves {
    /// For a caller whose requests are never above `highest`: nothing is left for classes that do not come.
    pub fn up_to(self, highest: Class) -> Self {
        let percents = [self.critical, self.high, self.normal, self.low];
        let least = percents[highest as usize];
        let [critical, high, normal, low] = percents.map(|percent| percent.saturating_sub(least));
        Self { critical, high, normal, low }
    }

    /// In tokens of a bucket, in the order of [`Class::ALL`].
    fn tokens(self, burst: u32) -> Result<[u32; 4], InvalidLimit> {
        let percents = [self.critical, self.high, self.normal, self.low];
        if percents.iter().any(|percent| *percent > 100) {
            return Err(InvalidLimit::ReserveAboveWhole);
        }
        // At most the burst, so it fits.
        Ok(percents.map(|percent| (u64::from(burst) * u64::from(percent) / 100) as u32))
    }
}

#[cfg(test)]
#[path = "gcra_tests.rs"]
mod tests;
