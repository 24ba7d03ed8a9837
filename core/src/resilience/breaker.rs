//! Whether one model on one pod is left alone for a while: a circuit breaker.
//!
//! The rule: half of the last 100 calls bad, and nobody is sent there for 30 s; then ten calls go and decide.
//! A call counts only in the period in which it began, so that late answers move nothing.
//!
//! ```text
//! Closed --failures >= `failure_ratio` of the last `window` (of at least `minimum`)--> Open
//! Open --`open_for` is over--> HalfOpen: at most `probes` calls
//! HalfOpen --all probes ended, failures < `failure_ratio` of them--> Closed
//! HalfOpen --failures >= `failure_ratio` of `probes`--> Open
//! ```
//!
//! It is always open for the same time: with doubling, a whole pool that was bad for long would stay shut for
//! minutes after it healed, to save ten calls every 30 s.
//!
//! It opens where [`super::outlier`] does not eject: one bad model of a pod's many, or a pod that has to stay.

use std::time::Duration;

use super::Outcome;

/// When a breaker opens and closes.
#[derive(Clone, Debug, PartialEq)]
pub struct BreakerSettings {
    /// The last calls that count. 100; at most 128.
    pub window: u32,
    /// Calls that must have ended before it opens. 20.
    pub minimum: u32,
    /// The share of failures that opens it. 0.5.
    pub failure_ratio: f64,
    /// How long it is open. 30 s.
    pub open_for: Duration,
    /// Calls that decide whether it closes. 10.
    pub probes: u32,
    /// After this long without a call that counts, older ones are forgotten. 5 s, so that the probes of a pod that
    /// is ejected for up to 8 s do not add up and keep it out for 30 s more when it has healed.
    pub forget_after: Duration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            window: 100,
            minimum: 20,
            failure_ratio: 0.5,
            open_for: Duration::from_secs(30),
            probes: 10,
            forget_after: Duration::from_secs(5),
        }
    }
}

/// A call that may be made. It must come back to [`Breaker::record`], [`Outcome::Cancelled`] if it was not made.
#[must_use]
#[derive(Debug)]
pub struct Permit {
    period: u64,
    probe: bool,
}

impl Permit {
    /// Whether this call decides on closing.
    pub fn is_probe(&self) -> bool {
        self.probe
    }
}

/// No call may be made before `until`, unless a probe is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// When to ask again.
    pub until: Duration,
}

/// A breaker as metrics and `/config` show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls are made; of the last ones, these ended and failed.
    Closed { calls: u32, failures: u32 },
    /// No calls before `until`.
    Open { until: Duration },
    /// Probes are made.
    HalfOpen {
        /// Probes that ended.
        calls: u32,
        failures: u32,
        /// Probes under way.
        under_way: u32,
        last_began: Duration,
    },
}

/// The breaker of one model on one pod. About 100 bytes; every call is O(1).
#[derive(Clone, Debug)]
pub struct Breaker {
    settings: BreakerSettings,
    state: BreakerState,
    /// The last calls while closed, the newest in the lowest bit, 1 for a failure.
    history: u128,
    last_recorded: Duration,
    period: u64,
}

impl Breaker {
    /// Closed. Settings beyond their bounds are cut to them.
    pub fn new(settings: BreakerSettings) -> Self {
        let window = settings.window.clamp(1, u128::BITS);
        let settings = BreakerSettings {
            window,
            minimum: settings.minimum.clamp(1, window),
            probes: settings.probes.max(1),
            ..settings
        };
        Self {
            settings,
            state: BreakerState::Closed { calls: 0, failures: 0 },
            history: 0,
            last_recorded: Duration::ZERO,
            period: 0,
        }
    }

    /// As the last call left it: an open one whose time is over is still open here.
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// Whether [`Self::permit`] would give one.
    pub fn allows(&self, now: Duration) -> bool {
        self.refusal(now).is_none()
    }

    /// Asks for one call.
    pub fn permit(&mut self, now: Duration) -> Result<Permit, Refused> {
        if let Some(refused) = self.refusal(now) {
            return Err(refused);
        }
        match &mut self.state {
            BreakerState::Closed { .. } => return Ok(Permit { period: self.period, probe: false }),
            BreakerState::Open { .. } => {
                self.enter(BreakerState::HalfOpen { calls: 0, failures: 0, under_way: 1, last_began: now });
            }
            BreakerState::HalfOpen { calls, under_way, last_began, .. } => {
                let lost = calls.saturating_add(*under_way) >= self.settings.probes;
                *under_way = if lost { 1 } else { *under_way + 1 };
                *last_began = now;
                // Lost ones that come back after all are of another period.
                self.period += u64::from(lost);
            }
        }
        Ok(Permit { period: self.period, probe: true })
    }

    /// How a call ended. The new state, if it changed.
    pub fn record(&mut self, permit: Permit, outcome: Outcome, now: Duration) -> Option<BreakerState> {
        if permit.period != self.period {
            return None;
        }
        let failed = outcome.is_failure();
        let counts = failed || outcome == Outcome::Success;
        let settings = &self.settings;
        let open = BreakerState::Open { until: now.saturating_add(settings.open_for) };
        match &mut self.state {
            BreakerState::Closed { calls, failures } if counts => {
                if now.saturating_sub(self.last_recorded) > settings.forget_after {
                    (self.history, *calls) = (0, 0);
                }
                self.last_recorded = self.last_recorded.max(now);
                let window = u128::MAX >> (u128::BITS - settings.window);
                self.history = (self.history << 1 | u128::from(failed)) & window;
                *calls = (*calls + 1).min(settings.window);
                *failures = self.history.count_ones();
                let opens = *calls >= settings.minimum && settings.are_too_many(*failures, *calls);
                opens.then(|| self.enter(open))
            }
            BreakerState::HalfOpen { calls, failures, under_way, .. } => {
                *under_way = under_way.saturating_sub(1);
                *calls += u32::from(counts);
                *failures += u32::from(failed);
                if settings.are_too_many(*failures, settings.probes) {
                    Some(self.enter(open))
                } else if *calls >= settings.probes {
                    Some(self.enter(BreakerState::Closed { calls: 0, failures: 0 }))
                } else {
                    None
                }
            }
            BreakerState::Closed { .. } | BreakerState::Open { .. } => None,
        }
    }

    fn refusal(&self, now: Duration) -> Option<Refused> {
        let until = match self.state {
            BreakerState::Closed { .. } => return None,
            BreakerState::Open { until } => until,
            BreakerState::HalfOpen { calls, under_way, .. }
                if calls.saturating_add(under_way) < self.settings.probes =>
            {
                return None;
            }
            // A probe that is under way for this long is lost.
            BreakerState::HalfOpen { last_began, .. } => last_began.saturating_add(self.settings.open_for),
        };
        (now < until).then_some(Refused { until })
    }

    fn enter(&mut self, state: BreakerState) -> BreakerState {
        self.state = state;
        self.history = 0;
        self.period += 1;
        state
    }
}

impl BreakerSettings {
    fn are_too_many(&self, failures: u32, calls: u32) -> bool {
        failures > 0 && f64::from(failures) >= self.failure_ratio * f64::from(calls)
    }
}

#[cfg(test)]
#[path = "breaker_tests.rs"]
mod tests;
