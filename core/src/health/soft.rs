//! Whether a region that answers does so too slowly or too badly, by what its gateways count.
//!
//! The rules: p99 above 100 ms for five minutes without a break, or more than 5 % of errors for three; with 200 requests
//! in that time, and not while there is more to do than the region can.
//!
//! "For five minutes" means each part of them: one good part begins the time anew, so that a spike that is over counts
//! for nothing, however high it was. A part is what the gateways of the region counted together between two reports,
//! or as many reports as it takes to have 20 requests.
//!
//! Overload is the cause (and the part a good one, for these rules) where
//!
//! ```text
//! utilisation >= 0.9                                        more is asked for than the region can do; or
//! shed > 1 % of what came, unless utilisation < 0.7         it refuses, and that there is too much is not excluded
//! ```
//!
//! To take an overloaded region out would overload the next one. Utilisation is of the *planned* capacity: requests
//! per second that come by those that the region was measured or sized to serve. Of what it manages now a sick region
//! is always full.

use std::collections::VecDeque;
use std::time::Duration;

use super::region::Cause;

/// Requests that a part has at least. Fewer are put together with the next ones.
const PART: u64 = 20;
/// How long a part is at least: with [`MOST_PARTS`], the bound of memory.
const SHORTEST_PART: Duration = Duration::from_secs(1);
const MOST_PARTS: usize = 1_024;

/// When a region is too slow or fails too often.
#[derive(Clone, Debug, PartialEq)]
pub struct SoftSettings {
    /// Requests that took longer than this are slow. 100 ms; gateways count by it.
    pub slow_after: Duration,
    /// The share of slow requests above which a region is too slow. 0.01, so that p99 is above `slow_after`.
    pub slow: f64,
    /// For how long. 5 min.
    pub slow_for: Duration,
    /// The share of errors above which a region fails too often. 0.05.
    pub errors: f64,
    /// For how long. 3 min.
    pub errors_for: Duration,
    /// Requests in that time without which it says nothing. 200.
    pub samples: u64,
    /// The utilisation from which overload is the cause. 0.9.
    pub full: f64,
    /// The utilisation below which overload is not the cause, whatever is shed. 0.7.
    pub spare: f64,
    /// The share shed above which overload is the cause, if utilisation does not exclude it. 0.01.
    pub shed: f64,
    /// A silence that ends what was measured, and the longest part. 1 min.
    pub stale_after: Duration,
}

impl Default for SoftSettings {
    fn default() -> Self {
        Self {
            slow_after: Duration::from_millis(100),
            slow: 0.01,
            slow_for: Duration::from_secs(300),
            errors: 0.05,
            errors_for: Duration::from_secs(180),
            samples: 200,
            full: 0.9,
            spare: 0.7,
            shed: 0.01,
            stale_after: Duration::from_secs(60),
        }
    }
}

/// What all gateways of a region counted from one time to another. What a tenant's own limit refused, and what was
/// wrong with requests, is not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    pub from: Duration,
    pub to: Duration,
    /// Requests that were taken on and ended.
    pub requests: u64,
    /// Of these, those that took longer than [`SoftSettings::slow_after`].
    pub slow: u64,
    /// Of these, those that failed by the region's fault, timeouts among them.
    pub errors: u64,
    /// Requests that were refused because there was too much: shed, queue full, all pods full.
    pub shed: u64,
    /// Requests that came per second, by those planned for. 1 is full; none if it is not known.
    pub utilisation: Option<f64>,
}

/// How well a region serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quality {
    /// Within its limits, or nothing is known.
    #[default]
    Fine,
    /// Above a limit, not for long enough.
    Breaching,
    /// p99 was above its limit for long enough.
    Slow,
    /// The errors were.
    Failing,
}

impl Quality {
    /// What a verdict says, if this is one.
    pub fn cause(self) -> Option<Cause> {
        match self {
            Self::Fine | Self::Breaching => None,
            Self::Slow => Some(Cause::Slow),
            Self::Failing => Some(Cause::Failing),
        }
    }
}

/// The soft rules for one region. At most 1,024 parts of 40 bytes; a sample is O(1), a look O(parts).
#[derive(Clone, Debug)]
pub struct Watch {
    settings: SoftSettings,
    /// Too little for a part.
    rest: Option<Sample>,
    parts: VecDeque<Part>,
    slow: Streak,
    errors: Streak,
}

impl Watch {
    /// Without samples.
    pub fn new(settings: SoftSettings) -> Self {
        Self { settings, rest: None, parts: VecDeque::new(), slow: Streak::default(), errors: Streak::default() }
    }

    /// Adds a sample. Samples are in order; what is of an earlier time than the last one's end is left out.
    pub fn observe(&mut self, mut sample: Sample) {
        if let Some(end) = self.end() {
            if sample.to <= end {
                return;
            }
            if sample.from > end.saturating_add(self.settings.stale_after) {
                *self = Self::new(self.settings.clone());
            }
            sample.from = sample.from.max(end);
        }
        let part = self.rest.take().map_or(sample, |rest| rest.and(sample));
        let lasted = part.to.saturating_sub(part.from);
        if part.requests >= PART && lasted >= SHORTEST_PART {
            self.judge(part);
        } else if lasted <= self.settings.stale_after {
            self.rest = Some(part);
        } else {
            // So few in so long a time say nothing of what comes next.
            self.rest = Some(Sample { from: part.to, to: part.to, ..Sample::default() });
        }
    }

    /// What the rules say at this time.
    pub fn quality(&self, now: Duration) -> Quality {
        let Some(last) = self.parts.back() else { return Quality::Fine };
        if now.saturating_sub(last.to) > self.settings.stale_after {
            Quality::Fine
        } else if self.is_broken(&self.errors, self.settings.errors_for) {
            Quality::Failing
        } else if self.is_broken(&self.slow, self.settings.slow_for) {
            Quality::Slow
        } else if self.errors.since.is_some() || self.slow.since.is_some() {
            Quality::Breaching
        } else {
            Quality::Fine
        }
    }

    /// Both measures as an operator reads them: of the breach that goes on, if there is one.
    pub fn reason(&self) -> String {
        let end = self.parts.back().map_or(Duration::ZERO, |part| part.to);
        let slow_after = self.settings.slow_after.as_millis();
        format!("errors: {}; over {slow_after} ms: {}", self.errors.text(end), self.slow.text(end))
    }

    fn end(&self) -> Option<Duration> {
        self.rest.map(|rest| rest.to).or(self.parts.back().map(|part| part.to))
    }

    fn judge(&mut self, part: Sample) {
        let SoftSettings { slow, errors, slow_for, errors_for, .. } = self.settings;
        let overloaded = self.settings.is_overloaded(&part);
        self.slow.note(!overloaded && share(part.slow, part.requests) > slow, part.slow, &part);
        self.errors.note(!overloaded && share(part.errors, part.requests) > errors, part.errors, &part);
        self.parts.push_back(Part { from: part.from, to: part.to, requests: part.requests });
        let begin = part.to.saturating_sub(slow_for.max(errors_for));
        while self.parts.len() > MOST_PARTS || self.parts.front().is_some_and(|part| part.from < begin) {
            self.parts.pop_front();
        }
    }

    fn is_broken(&self, streak: &Streak, least: Duration) -> bool {
        let (Some(since), Some(last)) = (streak.since, self.parts.back()) else { return false };
        let begin = last.to.saturating_sub(least);
        let within = self.parts.iter().filter(|part| part.from >= begin);
        let samples = within.fold(0_u64, |sum, part| sum.saturating_add(part.requests));
        last.to.saturating_sub(since) >= least && samples >= self.settings.samples
    }
}

impl SoftSettings {
    fn is_overloaded(&self, part: &Sample) -> bool {
        let full = part.utilisation.is_some_and(|utilisation| utilisation >= self.full);
        let spare = part.utilisation.is_some_and(|utilisation| utilisation < self.spare);
        full || (!spare && share(part.shed, part.requests.saturating_add(part.shed)) > self.shed)
    }
}

impl Sample {
    fn and(self, next: Self) -> Self {
        let utilisation = match (self.utilisation, next.utilisation) {
            (Some(one), Some(other)) => Some(one.max(other)),
            (one, other) => one.or(other),
        };
        Self {
            from: self.from,
            to: next.to,
            requests: self.requests.saturating_add(next.requests),
            slow: self.slow.saturating_add(next.slow),
            errors: self.errors.saturating_add(next.errors),
            shed: self.shed.saturating_add(next.shed),
            utilisation,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Part {
    from: Duration,
    to: Duration,
    requests: u64,
}

/// Parts in a row that are above a limit.
#[derive(Clone, Copy, Debug, Default)]
struct Streak {
    since: Option<Duration>,
    bad: u64,
    of: u64,
}

impl Streak {
    fn note(&mut self, above: bool, bad: u64, part: &Sample) {
        if !above {
            *self = Self::default();
            return;
        }
        self.since.get_or_insert(part.from);
        self.bad = self.bad.saturating_add(bad);
        self.of = self.of.saturating_add(part.requests);
    }

    fn text(&self, end: Duration) -> String {
        let Some(since) = self.since else { return "within the limit".to_owned() };
        let (percent, seconds) = (100.0 * share(self.bad, self.of), end.saturating_sub(since).as_secs());
        format!("{percent:.1} % of {} requests, for {seconds} s", self.of)
    }
}

/// A division of two counts is the nearest number to the true one, so that 10 of 200 is no more than 0.05.
fn share(part: u64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { part as f64 / of as f64 }
}

#[cfg(test)]
#[path = "soft_tests.rs"]
mod tests;
