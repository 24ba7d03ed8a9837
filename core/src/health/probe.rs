//! What one vantage knows of one gateway, and when it asks again.
//!
//! The rule: three failures in a row and the gateway has failed, as seen from there; one answer and it has not. Who has
//! reported nothing for three intervals knows nothing.
//!
//! A probe goes the way of clients: TLS, then a synthetic inference for each tier-1 model. The region must answer it
//! itself: a gateway that sends probes on to a peer hides that its own pods are gone.
//!
//! How long a dead gateway is not seen as failed, at worst, with the default settings:
//!
//! ```text
//! it answers nothing     interval x 3 + timeout       5 + 5 + 5 + 2 = 17 s
//! it refuses             interval + urgent x 2        5 + 1 + 1     =  7 s
//! ... and was noticed    urgent x 2                       1 + 1     =  2 s
//! ```
//!
//! It is noticed by who loses a connection to it, or cannot send it a request: [`Schedule::nudge`].

use std::time::Duration;

/// From the start of one probe to the start of the next, unless settings say otherwise. Those of control nodes may;
/// gateways and DNS nodes have none, and always keep to this.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// How often a gateway is probed, and what its answers mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSettings {
    /// From the start of one probe to the start of the next. 5 s.
    pub interval: Duration,
    /// A probe that takes longer has failed. 2 s.
    pub timeout: Duration,
    /// Failures in a row with which a gateway has failed. 3; at least 1.
    pub failures: u32,
    /// From the start of a probe that was refused to the start of the next, until the gateway has failed. 1 s.
    pub urgent: Duration,
    /// After this long without a report nothing is known. 15 s, three intervals of the slowest vantage:
    /// [`Self::stale_after`].
    pub stale_after: Duration,
}

impl ProbeSettings {
    /// Three intervals of whoever probes least often: of this one, or of those that always keep to [`INTERVAL`]. With
    /// less, each of their reports would find its pair stale, and no failures in a row would ever be counted.
    pub fn stale_after(interval: Duration) -> Duration {
        interval.max(INTERVAL).saturating_mul(3)
    }
}

impl Default for ProbeSettings {
    fn default() -> Self {
        Self {
            interval: INTERVAL,
            timeout: Duration::from_secs(2),
            failures: 3,
            urgent: Duration::from_secs(1),
            stale_after: Self::stale_after(INTERVAL),
        }
    }
}

/// How a probe ended, from best to worst: of its inferences the worst counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Good,
    /// Refused because there is too much of everything. Alive, so no reason to take the region out and give what it
    /// has to others; not clean either.
    Overloaded,
    /// No answer in time, no TLS, a wrong answer or an error.
    Failed,
    /// The connection was refused or reset: nobody is there. Lost packets do not look like this.
    Refused,
}

impl Outcome {
    pub fn is_failure(self) -> bool {
        self >= Self::Failed
    }
}

/// What a vantage sees of a gateway now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// No report, or none of late.
    Unknown,
    /// The last probe was answered.
    Answering,
    /// The last probe failed, but not enough of them in a row.
    Failing,
    Failed,
}

/// One vantage and one gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    failures: u32,
    clean: u32,
    reported: Option<Duration>,
}

impl Pair {
    /// A probe ended. `now` is the time of the report, by the clock of who keeps the pair.
    pub fn record(&mut self, outcome: Outcome, settings: &ProbeSettings, now: Duration) {
        if self.is_stale(settings, now) {
            *self = Self::default();
        }
        self.failures = if outcome.is_failure() { self.failures.saturating_add(1) } else { 0 };
        self.clean = if outcome == Outcome::Good { self.clean.saturating_add(1) } else { 0 };
        self.reported = Some(now);
    }

    pub fn seen(&self, settings: &ProbeSettings, now: Duration) -> Seen {
        match self.failures {
            _ if self.is_stale(settings, now) => Seen::Unknown,
            0 => Seen::Answering,
            failures if failures >= settings.failures => Seen::Failed,
            _ => Seen::Failing,
        }
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Good probes in a row.
    pub fn clean(&self) -> u32 {
        self.clean
    }

    fn is_stale(&self, settings: &ProbeSettings, now: Duration) -> bool {
        self.reported.is_none_or(|reported| now.saturating_sub(reported) > settings.stale_after)
    }
}

/// When a vantage probes a gateway. One probe is under way at a time, for `timeout` at most.
#[derive(Clone, Debug)]
pub struct Schedule {
    settings: ProbeSettings,
    began: Option<Duration>,
    due: Duration,
    failures: u32,
}

impl Schedule {
    /// `first` should differ between pairs, so that a gateway's probes do not come together.
    pub fn new(settings: ProbeSettings, first: Duration) -> Self {
        Self { settings, began: None, due: first, failures: 0 }
    }

    /// When the next probe should begin.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// A probe begins.
    pub fn begin(&mut self, now: Duration) {
        self.began = Some(now);
        self.due = now.saturating_add(self.settings.interval);
    }

    /// The probe that began last has ended.
    pub fn end(&mut self, outcome: Outcome) {
        self.failures = if outcome.is_failure() { self.failures.saturating_add(1) } else { 0 };
        if outcome == Outcome::Refused && self.failures < self.settings.failures {
            self.due = self.due.min(self.soonest());
        }
    }

    /// Something else than a probe says that the gateway may be gone: the next probe is due, but not sooner after the
    /// last one than after a refusal.
    pub fn nudge(&mut self, now: Duration) {
        self.due = self.due.min(self.soonest().max(now));
    }

    fn soonest(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |began| began.saturating_add(self.settings.urgent))
    }
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
