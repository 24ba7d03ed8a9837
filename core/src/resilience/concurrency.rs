//! How many calls a pod takes at a time, learned from their latency: no limit is set by hand.
//!
//! The rule: while calls take hardly longer than on a quiet pod, the limit grows; where they wait for each
//! other for longer than is tolerated, it falls until they do not. It never falls below `min`, so no pod is
//! starved by its past.
//!
//! A round is as many good answers as were in flight, so that each change of the limit shows in the next one,
//! and as many as make a precise average:
//!
//! ```text
//! tolerated = max(tolerance x latency of a quiet pod, latency of a quiet pod + slack)
//! gradient = tolerated / latency of this round
//! target   = limit x max(gradient, 0.5)   gradient < 1
//!            limit                        else, while less than half of the limit is in use
//!            limit + sqrt(limit)          else, gradient < sqrt(tolerance)
//!            limit x 2                    else: far from what is tolerated
//! limit   += smoothing x (target - limit)
//! ```
//!
//! That is Gradient2 of Netflix' concurrency-limits (a long-term latency, tolerance, smoothing, sqrt(limit) for
//! the queue, no growth while less than half is used), with four differences. The queue is added only while the
//! gradient is at least 1, so a full pod of capacity c settles at c x tolerated / quiet latency, also where sqrt(c)
//! is not small. Waiting for `slack` is always tolerated, as CoDel tolerates its target: a scheduler or a garbage
//! collector holds up a pod that answers in 0.2 ms for many times that, and there is nothing to gain by turning
//! calls away for it. Far from what is tolerated the limit grows faster, so that a pod that was slow or new is full
//! within seconds. And the long-term latency is that of a quiet pod, as Envoy's adaptive concurrency measures its
//! minRTT: an average of all calls would take a standing queue for the pod's own latency, and creep up with it.
//!
//! A pod is quiet while less than a quarter of the limit is in flight (or less than `min`): with a tolerance below
//! 4, what is learned at such a load brings the limit nearer to the capacity, however wrong it was (where the slack
//! decides, to a wait of 4/3 of it at most). Where traffic leaves no such moment the limit falls to that quarter for
//! some round trips to learn anew: each `relearn_after`, and when the limit has halved, since then it may be the
//! latency of a quiet pod that changed.
//!
//! ```text
//! Following --`relearn_after` without quiet calls, or the limit has halved--> Learning: a quarter of the limit
//! Learning --a precise average of quiet calls, or 20 round trips--> Following
//! ```
//!
//! Latencies are averaged by their logarithms, each within a factor of 8 of what is known: neither a zero nor a
//! minute weighs more than that. It knows only what this caller sends: where several share a pod, each takes the
//! others' load for the pod's own latency.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::Outcome;

/// Good answers that make an average: at least, and at most.
const SAMPLES: RangeInclusive<u32> = 16..=128;
/// The standard error at which an average is good enough, as log2: 10 %. Equal latencies need 16 samples,
/// exponential ones 128.
const PRECISION: f64 = 0.15;
/// The part of the limit at which a pod counts as quiet.
const QUIET: f64 = 0.25;
/// How far a single latency may be from the averages: a factor of 8, as log2.
const FARTHEST: f64 = 3.0;
/// How much an average of calls that happened to be quiet moves the latency of a quiet pod.
const QUIET_GAIN: f64 = 0.5;
/// Round trips after which learning ends without enough quiet calls.
const LONGEST_LEARNING: f64 = 20.0;
/// What counts as another latency: two standard errors, as log2.
const MOVED: f64 = 2.0 * PRECISION;
/// Learning begins again this soon while it finds another latency than the last time.
const LEARN_AGAIN: Duration = Duration::from_millis(100);
/// Else it pauses for so many times what it took, where that is longer than `relearn_after`.
const LEARNING_PAUSE: u32 = 30;

/// How the limit of a pod follows its latency.
#[derive(Clone, Debug, PartialEq)]
pub struct ConcurrencySettings {
    /// The lowest limit. 4.
    pub min: u32,
    /// The highest limit. 1,000.
    pub max: u32,
    /// The first limit. 20.
    pub initial: u32,
    /// How much longer than on a quiet pod calls may take. 1.5 (1.5 to 2 in Gradient2).
    pub tolerance: f64,
    /// How much longer they may take in any case. 5 ms, CoDel's target (RFC 8289, section 4.3).
    pub slack: Duration,
    /// How far one round moves the limit to its target. 0.2.
    pub smoothing: f64,
    /// What a timeout or an overload reply leaves of the limit, at most once in a round trip. 0.9.
    pub backoff: f64,
    /// How long the latency of a quiet pod is good for. 30 s.
    pub relearn_after: Duration,
}

impl Default for ConcurrencySettings {
    fn default() -> Self {
        Self {
            min: 4,
            max: 1_000,
            initial: 20,
            tolerance: 1.5,
            slack: Duration::from_millis(5),
            smoothing: 0.2,
            backoff: 0.9,
            relearn_after: Duration::from_secs(30),
        }
    }
}

/// The limit of one pod. About 200 bytes; every call is O(1).
#[derive(Clone, Debug)]
pub struct ConcurrencyLimit {
    settings: ConcurrencySettings,
    limit: f64,
    /// log2 of the microseconds of a call to a quiet pod.
    quiet_latency: Option<f64>,
    /// The same of the latest round.
    latency: f64,
    round: Average,
    most_in_flight: u32,
    quiet_calls: Average,
    phase: Phase,
    /// No second step back before.
    next_backoff: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Following {
        learn_at: Duration,
        /// The limit when learning last ended.
        learned_limit: f64,
    },
    Learning {
        since: Duration,
        until: Duration,
    },
}

impl ConcurrencyLimit {
    /// Settings beyond their bounds are cut to them. `random` stretches `relearn_after` by up to a quarter, so that
    /// pods that began together do not learn together.
    pub fn new(settings: ConcurrencySettings, random: u64) -> Self {
        let min = settings.min.max(1);
        let stretch = settings.relearn_after / 1_024 * (random % 256) as u32;
        let relearn_after = settings.relearn_after.saturating_add(stretch);
        let settings = ConcurrencySettings { min, max: settings.max.max(min), relearn_after, ..settings };
        let limit = f64::from(settings.initial.clamp(settings.min, settings.max));
        Self {
            settings,
            limit,
            quiet_latency: None,
            latency: 0.0,
            round: Average::default(),
            most_in_flight: 0,
            quiet_calls: Average::default(),
            phase: Phase::Following { learn_at: Duration::MAX, learned_limit: limit },
            next_backoff: Duration::ZERO,
        }
    }

    /// Calls that may be in flight now.
    pub fn limit(&self) -> u32 {
        match self.phase {
            Phase::Following { .. } => self.limit as u32,
            Phase::Learning { .. } => self.quiet_limit(),
        }
    }

    /// How a call ended that began beside `in_flight` others.
    pub fn record(&mut self, latency: Duration, in_flight: u32, outcome: Outcome, now: Duration) {
        match outcome {
            Outcome::Success => self.follow(latency, in_flight, now),
            Outcome::Timeout | Outcome::Overload => self.back_off(now),
            Outcome::Failure | Outcome::ClientError | Outcome::Cancelled => {}
        }
        if let Phase::Learning { until, .. } = self.phase
            && now >= until
        {
            self.learn(now);
        }
    }

    fn follow(&mut self, latency: Duration, in_flight: u32, now: Duration) {
        let mut log2 = (latency.as_micros().max(1) as f64).log2();
        if let Some(quiet) = self.quiet_latency {
            log2 = log2.clamp(quiet.min(self.latency) - FARTHEST, quiet.max(self.latency) + FARTHEST);
        }
        if in_flight < self.quiet_limit() {
            self.quiet_calls.add(log2);
            if self.quiet_calls.is_precise() {
                self.learn(now);
            }
        }
        self.round.add(log2);
        self.most_in_flight = self.most_in_flight.max(in_flight.saturating_add(1));
        if self.round.count >= self.most_in_flight && self.round.is_precise() {
            self.end_round(now);
        }
    }

    fn end_round(&mut self, now: Duration) {
        let (round, in_flight) = (std::mem::take(&mut self.round), std::mem::take(&mut self.most_in_flight));
        let Some(latency) = round.mean() else { return };
        self.latency = latency;
        let Phase::Following { learn_at, learned_limit } = self.phase else { return };
        let Some(mut quiet) = self.quiet_latency else {
            // A guess, under whatever load there is.
            self.quiet_latency = Some(latency);
            self.phase = Phase::Following { learn_at: now.saturating_add(LEARN_AGAIN), learned_limit };
            return;
        };
        if latency < quiet - MOVED {
            // Quicker than a quiet pod: it is quicker than it was.
            quiet += QUIET_GAIN * (latency - quiet);
            self.quiet_latency = Some(quiet);
        }
        let tolerance = self.settings.tolerance;
        let slack = self.settings.slack.as_micros() as f64;
        let tolerated = (tolerance * quiet.exp2()).max(quiet.exp2() + slack);
        let gradient = tolerated / latency.exp2();
        let in_use = f64::from(in_flight);
        let target = if gradient < 1.0 {
            // A limit of twice what is in use limits nothing: there is no need to go below.
            let enough = if in_use * 2.0 < self.limit { in_use * 2.0 } else { 0.0 };
            (self.limit * gradient.max(0.5)).max(enough)
        } else if in_use < self.limit / 2.0 {
            self.limit
        } else if gradient < tolerance.sqrt() {
            self.limit + self.limit.sqrt()
        } else {
            self.limit * 2.0
        };
        self.set(self.limit + self.settings.smoothing * (target - self.limit));
        if now >= learn_at || self.limit < learned_limit / 2.0 {
            self.quiet_calls = Average::default();
            let until = now.saturating_add(round_trip(latency + LONGEST_LEARNING.log2()));
            self.phase = Phase::Learning { since: now, until };
        }
    }

    /// Takes what quiet calls say, and follows again.
    fn learn(&mut self, now: Duration) {
        let calls = std::mem::take(&mut self.quiet_calls);
        let found = calls.mean().filter(|_| calls.count >= *SAMPLES.start());
        let (found, quiet) = (found.or(self.quiet_latency), self.quiet_latency.or(found));
        let moved = found.zip(quiet).map_or(0.0, |(found, quiet)| found - quiet);
        let after = match self.phase {
            Phase::Following { .. } => {
                self.quiet_latency = quiet.map(|quiet| quiet + QUIET_GAIN * moved);
                self.settings.relearn_after
            }
            Phase::Learning { since, .. } => {
                self.quiet_latency = found;
                let pause = now.saturating_sub(since).saturating_mul(LEARNING_PAUSE);
                if moved.abs() > MOVED { LEARN_AGAIN } else { pause.max(self.settings.relearn_after) }
            }
        };
        self.phase = Phase::Following { learn_at: now.saturating_add(after), learned_limit: self.limit };
    }

    fn back_off(&mut self, now: Duration) {
        if now >= self.next_backoff {
            self.set(self.limit * self.settings.backoff);
            self.next_backoff = now.saturating_add(round_trip(self.latency).max(Duration::from_millis(1)));
        }
    }

    fn quiet_limit(&self) -> u32 {
        ((self.limit * QUIET) as u32).max(self.settings.min)
    }

    fn set(&mut self, limit: f64) {
        if limit.is_finite() {
            self.limit = limit.clamp(f64::from(self.settings.min), f64::from(self.settings.max));
        }
    }
}

fn round_trip(log2_micros: f64) -> Duration {
    Duration::from_micros(log2_micros.exp2() as u64)
}

#[derive(Clone, Copy, Debug, Default)]
struct Average {
    count: u32,
    sum: f64,
    squares: f64,
}

impl Average {
    fn add(&mut self, value: f64) {
        self.count = self.count.saturating_add(1);
        self.sum += value;
        self.squares += value * value;
    }

    fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }

    fn is_precise(&self) -> bool {
        let count = f64::from(self.count);
        // Of all samples, times count squared: no division, no root.
        let variance = (self.squares * count - self.sum * self.sum).max(0.0);
        self.count >= *SAMPLES.end()
            || (self.count >= *SAMPLES.start() && variance <= PRECISION * PRECISION * count * count * count)
    }
}

#[cfg(test)]
#[path = "concurrency_tests.rs"]
mod tests;
