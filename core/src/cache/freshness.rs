//! Which answers may be stored, for how long, and what an entry is worth at a time.
//!
//! The rule: only a whole, undegraded answer of the model version that its key names is stored, and it is
//! fresh no longer than the features that it was made of. A request's wish only narrows.
//!
//! ```text
//! fresh --fresh until--> revalidate --stale while revalidate--> if error --stale if error--> expired
//! ```
//! Both stale times count from the end of freshness (RFC 5861), so either may end first. Times are
//! monotonic. What feature changes end is not asked here: that is [`super::coherence`].

use std::time::Duration;

use super::control::Wish;

/// How long a model's answers hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// How long an answer is fresh, if its features are. Default 5 min.
    pub ttl: Duration,
    /// How long a stale answer is still given while a new one is fetched. Default 0: never.
    pub stale_while_revalidate: Duration,
    /// How long a stale answer is still given when the model fails. Default 0: never.
    pub stale_if_error: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        let never = Duration::ZERO;
        Self { ttl: Duration::from_secs(300), stale_while_revalidate: never, stale_if_error: never }
    }
}

/// An answer, as far as it matters for storing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    pub end: End,
    /// The version that answered, as it says itself (`spillway-model-version`).
    pub model_version: Option<&'a str>,
    /// What it says of being degraded (`spillway-degraded`); stale features and defaults are level 1.
    pub degraded: Option<&'a str>,
    /// The age of the oldest feature row in it (`spillway-feature-age-ms`).
    pub feature_age: Option<Duration>,
    /// How long the call took: the age counts from some moment within.
    pub took: Duration,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an answer that was read to its end and checked.
    Whole,
    /// With an answer that broke off or was not well formed.
    Partial,
    /// With an error, whoever's fault.
    Error,
    /// Not before the deadline.
    DeadlineExceeded,
}

/// Why an answer is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// The request wished so.
    NoStore,
    Partial,
    Error,
    DeadlineExceeded,
    Degraded,
    /// The answer does not say which version made it.
    UnknownVersion,
    /// Another version than the key's made it.
    OtherVersion,
    /// It does not say how old its features are, or has features where none were expected.
    UnknownFeatures,
    /// Nothing is left of the time that it may be fresh.
    NoTimeLeft,
}

impl WhyNot {
    /// A stable word, for metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::NoStore => "no-store",
            Self::Partial => "partial",
            Self::Error => "error",
            Self::DeadlineExceeded => "deadline-exceeded",
            Self::Degraded => "degraded",
            Self::UnknownVersion => "unknown-version",
            Self::OtherVersion => "other-version",
            Self::UnknownFeatures => "unknown-features",
            Self::NoTimeLeft => "no-time-left",
        }
    }
}

/// Whether an answer may be stored, and how long it is fresh then.
///
/// `version` is the key's; `fresh_for` that of the dependencies. With several groups the oldest row's age is
/// held against the shortest `freshFor`, so the time left is never too long:
/// `min(ttl, fresh_for - feature_age - took)`.
pub fn may_store(
    answer: &Answer<'_>,
    version: &str,
    fresh_for: Option<Duration>,
    lifetimes: &Lifetimes,
    wish: &Wish,
) -> Result<Duration, WhyNot> {
    match answer.end {
        End::Whole => {}
        End::Partial => return Err(WhyNot::Partial),
        End::Error => return Err(WhyNot::Error),
        End::DeadlineExceeded => return Err(WhyNot::DeadlineExceeded),
    }
    if wish.no_store {
        return Err(WhyNot::NoStore);
    }
    if answer.degraded.is_some() {
        return Err(WhyNot::Degraded);
    }
    match answer.model_version {
        None | Some("") => return Err(WhyNot::UnknownVersion),
        Some(answered) if answered != version => return Err(WhyNot::OtherVersion),
        Some(_) => {}
    }
    let left = match (fresh_for, answer.feature_age) {
        (None, None) => lifetimes.ttl,
        (Some(fresh_for), Some(age)) => fresh_for.saturating_sub(age.saturating_add(answer.took)).min(lifetimes.ttl),
        (None, Some(_)) | (Some(_), None) => return Err(WhyNot::UnknownFeatures),
    };
    if left.is_zero() { Err(WhyNot::NoTimeLeft) } else { Ok(left) }
}

/// `ttl` x (1 - r x 10 %), with r from `random` evenly in 0 to 1: entries made together end apart.
/// Never longer than `ttl`.
pub fn jittered(ttl: Duration, random: u64) -> Duration {
    let nanos = u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX);
    let cut = (u128::from(nanos / 10) * u128::from(random)) >> 64;
    Duration::from_nanos(nanos.saturating_sub(u64::try_from(cut).unwrap_or(0)))
}

/// The times of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// When the model made it.
    pub stored: Duration,
    pub fresh_until: Duration,
}

/// What an entry is worth to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The answer.
    Fresh,
    /// The answer, while a new one is fetched in the background.
    Revalidate,
    /// The answer if the model fails.
    IfError,
    /// Nothing: too old.
    Expired,
    /// Nothing: the request's wish does not allow what is fresh.
    Refused,
}

impl Times {
    /// Of an answer made `now` that [`may_store`] gave `ttl`.
    pub fn new(now: Duration, ttl: Duration, random: u64) -> Self {
        Self { stored: now, fresh_until: now.saturating_add(jittered(ttl, random)) }
    }

    pub fn verdict(&self, now: Duration, lifetimes: &Lifetimes, wish: &Wish) -> Verdict {
        let young_enough = wish.max_age.is_none_or(|most| self.age(now) <= most);
        if now < self.fresh_until {
            let left = self.fresh_until.saturating_sub(now);
            let long_enough = wish.min_fresh.is_none_or(|least| left >= least);
            return if wish.no_cache || !young_enough || !long_enough { Verdict::Refused } else { Verdict::Fresh };
        }
        let stale_for = now.saturating_sub(self.fresh_until);
        let tolerated = wish.max_stale.map_or(wish.max_age.is_none(), |most| stale_for <= most);
        if wish.no_cache || wish.min_fresh.is_some() || !young_enough || !tolerated {
            Verdict::Expired
        } else if stale_for < lifetimes.stale_while_revalidate {
            Verdict::Revalidate
        } else if stale_for < lifetimes.stale_if_error {
            Verdict::IfError
        } else {
            Verdict::Expired
        }
    }

    /// Since the model made it; whole seconds of it are the answer's `Age`.
    pub fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.stored)
    }

    /// Seconds of freshness left, rounded down; negative where stale. The `ttl` of `Cache-Status`.
    pub fn ttl(&self, now: Duration) -> i64 {
        let whole = |time: u64| i64::try_from(time).unwrap_or(i64::MAX);
        match self.fresh_until.checked_sub(now) {
            Some(left) => whole(left.as_secs()),
            None => {
                let stale = now.saturating_sub(self.fresh_until);
                -whole(stale.as_secs().saturating_add(u64::from(stale.subsec_nanos() > 0)))
            }
        }
    }

    /// From when on it is of no use to anybody.
    pub fn end(&self, lifetimes: &Lifetimes) -> Duration {
        self.fresh_until.saturating_add(lifetimes.stale_while_revalidate.max(lifetimes.stale_if_error))
    }
}

#[cfg(test)]
#[path = "freshness_tests.rs"]
mod tests;
