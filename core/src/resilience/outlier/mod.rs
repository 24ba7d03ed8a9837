//! Which pods of a pool get no calls because theirs end badly, late or never: passive outlier ejection.
//!
//! The rule: a pod is judged by its own calls, against the rest of its pool, and never more than half of
//! the pool is out. A pod that should go and may not is held. Where more than half are out or held, the
//! trouble is not the pods': the pool is in panic and routing should ignore ejections (Envoy, "Panic threshold").
//!
//! ```text
//! Usable --silent for `overdue_after`--> Suspect --any answer, or nothing outstanding--> Usable
//! Usable, Suspect --a rule is broken--> Ejected if half of the pool stays, else held
//! Ejected --its time is over--> Probing: one call at a time
//! Probing --`probe_successes` in a row--> Usable
//! Probing --a failure, or no answer--> Ejected, twice as long up to `max_ejection`
//! ```
//!
//! The rules, by what they see: failures in a row (at once); the share of successes, the latency and the
//! silence of a pod (at each [`Outliers::sweep`]). It asks no pod by itself: active checks are another's task.
//!
//! Bounds: about 400 bytes a pod and 1 KiB a pool. All calls are O(log pods) and do not allocate, but for
//! [`Outliers::keep`] and [`Outliers::sweep`], which are O(pods log pods).

mod latencies;
mod pod;
mod settings;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use settings::OutlierSettings;

use self::latencies::{Latencies, Usual, log2_micros, scaled};
use self::pod::{Counts, Held, Pod, State};
use super::Outcome;

/// The small number that the gateway gives to a pod's identity.
pub type PodId = u32;

/// Whether a pod may have a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// As many as it can take.
    Usable,
    /// One call, to see whether it is well again.
    Probe,
    /// Only if no other pod can.
    Suspect,
    /// None, but in panic.
    Ejected,
}

/// The rule that a pod broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Too many failures in a row.
    ConsecutiveFailures,
    /// Too few successes, by themselves or beside the other pods.
    SuccessRate,
    /// Too slow beside the other pods.
    Latency,
    /// It owed an answer for too long.
    Silence,
    /// It was not well again.
    FailedProbe,
}

/// What operators should hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// No calls for it before `until`.
    Ejected { pod: PodId, reason: Reason, until: Duration },
    /// It broke a rule and stays, because half of the pool is out already: panic.
    Held { pod: PodId, reason: Reason },
    /// It is in again: its probes were good, or too many others would be out.
    Restored { pod: PodId },
}

/// One pod as `/config` shows it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PodReport {
    pub pod: PodId,
    pub standing: Standing,
    /// The rule for which it is out or held.
    pub reason: Option<Reason>,
    /// When its ejection or hold ends.
    pub until: Option<Duration>,
    /// As [`Outliers::penalty`] has it.
    pub penalty: f64,
}

/// A call that began. It must come back to [`Outliers::record`], a stream with its first answer: one that does not
/// looks like a pod that hangs.
#[must_use]
#[derive(Debug)]
pub struct Call {
    pod: PodId,
    period: u64,
    group: u64,
    started: Duration,
    probe: bool,
}

/// The pods of one pool.
#[derive(Clone, Debug)]
pub struct Outliers {
    settings: OutlierSettings,
    /// Sorted by id.
    pods: Vec<Pod>,
    /// Pods that are ejected or probing.
    out: usize,
    held: usize,
    last_period: u64,
    latencies: Latencies,
    usual: Option<Usual>,
    /// As [`Self::overdue_after`] has it: made with `usual`, since it is asked for each pod of each choice.
    overdue: Option<Duration>,
    /// Room for the sweep's medians.
    means: Vec<f64>,
}

impl Outliers {
    /// A pool without pods.
    pub fn new(settings: OutlierSettings) -> Self {
        Self {
            settings,
            pods: Vec::new(),
            out: 0,
            held: 0,
            last_period: 0,
            latencies: Latencies::default(),
            usual: None,
            overdue: None,
            means: Vec::new(),
        }
    }

    /// Says which pods the pool has. What is known of those that stay is kept; new ones are usable.
    /// Where too many of the rest would be out, those that are nearest to coming back do so at once.
    pub fn keep(&mut self, ids: &[PodId]) -> Vec<Change> {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids.dedup();
        self.pods.retain(|pod| ids.binary_search(&pod.id).is_ok());
        for id in ids {
            if let Err(place) = self.find(id) {
                self.last_period += 1;
                self.pods.insert(place, Pod::new(id, self.last_period));
            }
        }
        self.means = Vec::with_capacity(self.pods.len());
        self.out = self.pods.iter().filter(|pod| pod.state != State::In).count();
        self.held = self.pods.iter().filter(|pod| pod.held.is_some()).count();
        let mut changes = Vec::new();
        while self.out > self.most_out() {
            let outside = (0..self.pods.len()).filter(|index| self.pods[*index].state != State::In);
            let Some(first) = outside.min_by_key(|index| self.pods[*index].until()) else { break };
            changes.push(self.restore(first));
        }
        changes
    }

    /// Whether this pod may have a call. A pod that was never named is usable: unknown is not down.
    pub fn may_take(&self, pod: PodId, now: Duration) -> Standing {
        self.find(pod).map_or(Standing::Usable, |index| self.standing(&self.pods[index], now))
    }

    /// The pod's recent share of failures, 0 to 1: how much a quick failure must not look like a quick answer.
    pub fn penalty(&self, pod: PodId, now: Duration) -> f64 {
        self.find(pod).map_or(0.0, |index| self.pods[index].failures.at(now))
    }

    /// Whether routing should ignore ejections: less than half of the pool is neither out nor held.
    pub fn panic(&self) -> bool {
        2 * (self.out + self.held) > self.pods.len()
    }

    /// A call that waits for longer is suspicious. `None` until the pool gave `min_samples` good answers.
    pub fn overdue_after(&self) -> Option<Duration> {
        self.overdue
    }

    /// The outcome that breakers and concurrency limits should be told, to be asked before [`Self::record`].
    ///
    /// A pod is not charged with what ends after it was ejected: twenty calls that fail with the fifth would open a
    /// breaker for longer than the ejection. Nor with a timeout of less than the pool's p99, so that callers in a
    /// hurry harm no pod.
    pub fn judged(&self, call: &Call, outcome: Outcome, now: Duration) -> Outcome {
        let late = self.find(call.pod).is_ok_and(|index| self.pods[index].period != call.period);
        let waited = now.saturating_sub(call.started);
        let hurried = outcome == Outcome::Timeout && self.usual.is_some_and(|usual| waited < usual.p99);
        if (late && outcome.is_failure()) || hurried { Outcome::Cancelled } else { outcome }
    }

    /// A call goes to this pod, whatever its standing.
    pub fn begin(&mut self, pod: PodId, now: Duration) -> Call {
        let mut call = Call { pod, period: 0, group: 0, started: now, probe: false };
        let Ok(index) = self.find(pod) else { return call };
        let pod = &mut self.pods[index];
        if let State::Ejected { until, reason } = pod.state
            && now >= until
        {
            pod.state = State::Probing { successes: 0, since: None, reason };
        }
        if let State::Probing { since: since @ None, .. } = &mut pod.state {
            *since = Some(now);
            call.probe = true;
        }
        call.period = pod.period;
        call.group = pod.outstanding.begin(now);
        call
    }

    /// How a call ended.
    pub fn record(&mut self, call: Call, outcome: Outcome, now: Duration) -> Option<Change> {
        let waited = now.saturating_sub(call.started);
        let outcome = self.judged(&call, outcome, now);
        let index = self.find(call.pod).ok()?;
        let pod = &mut self.pods[index];
        // What began before the pod went or came back tells nothing of it now.
        if pod.period != call.period {
            return None;
        }
        pod.outstanding.end(call.group);
        if outcome.is_answer() {
            pod.last_answer = pod.last_answer.max(now);
            pod.unanswered = Duration::ZERO;
        } else if self.usual.is_some_and(|usual| waited >= usual.median) {
            pod.unanswered = pod.unanswered.saturating_add(waited);
        }
        let failed = outcome.is_failure();
        if !failed && outcome != Outcome::Success {
            if let State::Probing { since, .. } = &mut pod.state
                && call.probe
            {
                *since = None;
            }
            return None;
        }
        pod.failures.add(failed, now);
        match &mut pod.state {
            State::In if failed => {
                pod.window.add(Counts { failures: 1, ..Counts::default() }, self.settings.slot(now));
                pod.failures_in_row = pod.failures_in_row.saturating_add(1);
                let limit = self.settings.consecutive_failures;
                let broken = limit > 0 && pod.failures_in_row >= limit;
                if broken { self.eject(index, Reason::ConsecutiveFailures, now) } else { None }
            }
            State::In => {
                let log2_sum = log2_micros(waited);
                pod.window.add(Counts { successes: 1, failures: 0, log2_sum }, self.settings.slot(now));
                pod.failures_in_row = 0;
                self.latencies.add(log2_sum);
                None
            }
            State::Probing { .. } if !call.probe => None,
            State::Probing { .. } if failed => self.eject(index, Reason::FailedProbe, now),
            State::Probing { successes, since, .. } => {
                *successes = successes.saturating_add(1);
                *since = None;
                (*successes >= self.settings.probe_successes).then(|| self.restore(index))
            }
            State::Ejected { .. } => None,
        }
    }

    /// Applies the rules that compare pods, and those of time. To be called about every 100 ms.
    pub fn sweep(&mut self, now: Duration) -> Vec<Change> {
        self.latencies.rotate(now, self.settings.window);
        // What was last known stands while the pool answers nothing.
        self.usual = self.latencies.usual(self.settings.min_samples).or(self.usual);
        let OutlierSettings { suspect_factor, suspect_min, .. } = self.settings;
        self.overdue = self.usual.map(|usual| scaled(usual.p99, suspect_factor).max(suspect_min));
        let slot = self.settings.slot(now);
        for pod in &mut self.pods {
            pod.window.advance(slot);
            if pod.held.is_some_and(|held| now >= held.until) {
                pod.held = None;
                self.held -= 1;
            }
            pod.forgive(now, self.settings.forgive_after);
        }
        let mut means = std::mem::take(&mut self.means);
        means.clear();
        means.extend(self.judgeable().filter_map(|pod| self.mean_latency(pod)));
        means.sort_unstable_by(f64::total_cmp);
        let rates = Rates::of(self.judgeable().filter_map(|pod| self.success_rate(pod)));
        let mut changes = Vec::new();
        for index in 0..self.pods.len() {
            if let Some(reason) = self.broken_rule(&self.pods[index], rates, &means, now) {
                changes.extend(self.eject(index, reason, now));
            }
        }
        self.means = means;
        changes
    }

    /// Every pod, for `/config`.
    pub fn pods(&self, now: Duration) -> impl Iterator<Item = PodReport> + '_ {
        self.pods.iter().map(move |pod| PodReport {
            pod: pod.id,
            standing: self.standing(pod, now),
            reason: pod.reason(),
            until: pod.held.map(|held| held.until).or_else(|| pod.until()),
            penalty: pod.failures.at(now),
        })
    }

    fn find(&self, pod: PodId) -> Result<usize, usize> {
        self.pods.binary_search_by_key(&pod, |pod| pod.id)
    }

    fn most_out(&self) -> usize {
        // The cast saturates, and takes a share that is no number for 0.
        ((self.pods.len() as f64 * self.settings.max_ejected) as usize).min(self.pods.len() / 2)
    }

    fn standing(&self, pod: &Pod, now: Duration) -> Standing {
        match pod.state {
            State::In if self.overdue.is_some_and(|after| pod.owes_for(now) > after) => Standing::Suspect,
            State::In => Standing::Usable,
            State::Ejected { until, .. } if now >= until => Standing::Probe,
            State::Probing { since: None, .. } => Standing::Probe,
            State::Ejected { .. } | State::Probing { .. } => Standing::Ejected,
        }
    }

    /// Puts a pod out, if enough of the others stay in.
    fn eject(&mut self, index: usize, reason: Reason, now: Duration) -> Option<Change> {
        let (inside, most_out) = (self.pods[index].state == State::In, self.most_out());
        let pod = &mut self.pods[index];
        // Whatever comes of it, the next verdict needs new evidence.
        pod.forget_evidence();
        let until = now.saturating_add(self.settings.ejection_time(pod.ejections));
        if inside && self.out >= most_out {
            let known = pod.held.replace(Held { until, reason }).is_some();
            self.held += usize::from(!known);
            return (!known).then_some(Change::Held { pod: pod.id, reason });
        }
        self.out += usize::from(inside);
        self.held -= usize::from(pod.held.take().is_some());
        pod.ejections = pod.ejections.saturating_add(1);
        self.last_period += 1;
        pod.enter(State::Ejected { until, reason }, self.last_period);
        Some(Change::Ejected { pod: pod.id, reason, until })
    }

    fn restore(&mut self, index: usize) -> Change {
        self.out -= 1;
        self.last_period += 1;
        let pod = &mut self.pods[index];
        pod.forget_evidence();
        pod.enter(State::In, self.last_period);
        Change::Restored { pod: pod.id }
    }

    fn broken_rule(&self, pod: &Pod, rates: Rates, means: &[f64], now: Duration) -> Option<Reason> {
        let settings = &self.settings;
        let silence = self.usual.map(|usual| scaled(usual.p99, settings.silence_factor).max(settings.silence_min));
        let (owes_for, after) = match pod.state {
            State::Ejected { .. } => return None,
            State::Probing { since, .. } => (
                since.map_or(Duration::ZERO, |since| now.saturating_sub(since)),
                silence.unwrap_or(settings.silence_min),
            ),
            State::In => (pod.owes_for(now), silence.unwrap_or(Duration::MAX)),
        };
        if owes_for.max(pod.unanswered) > after {
            return Some(Reason::Silence);
        }
        if pod.state != State::In {
            return None;
        }
        if let Some(rate) = self.success_rate(pod)
            && (rate < settings.success_floor || rates.is_far_below(rate, settings))
        {
            return Some(Reason::SuccessRate);
        }
        let mean = self.mean_latency(pod)?;
        let usual = median_of_others(means, mean)?;
        let slow = mean > log2_micros(settings.latency_min) && mean > usual + settings.latency_factor.log2();
        (slow && settings.latency_factor > 0.0).then_some(Reason::Latency)
    }

    fn judgeable(&self) -> impl Iterator<Item = &Pod> {
        self.pods.iter().filter(|pod| pod.state == State::In)
    }

    fn success_rate(&self, pod: &Pod) -> Option<f64> {
        let counts = pod.window.total();
        let all = counts.successes.saturating_add(counts.failures);
        (all >= self.settings.min_samples.max(1)).then(|| f64::from(counts.successes) / f64::from(all))
    }

    /// The logarithm of the geometric mean: quick and slow models in one pool move it evenly, and a single
    /// very slow answer hardly at all.
    fn mean_latency(&self, pod: &Pod) -> Option<f64> {
        let counts = pod.window.total();
        (counts.successes >= self.settings.min_samples.max(1)).then(|| counts.log2_sum / f64::from(counts.successes))
    }
}

/// Shares of successes of the pods that have enough calls.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    pods: f64,
    sum: f64,
    squares: f64,
}

impl Rates {
    fn of(rates: impl Iterator<Item = f64>) -> Self {
        rates.fold(Self::default(), |all, rate| Self {
            pods: all.pods + 1.0,
            sum: all.sum + rate,
            squares: all.squares + rate * rate,
        })
    }

    /// Compares one pod of these with the others. It is left out of its own yardstick: with it, one bad pod
    /// of n is sqrt(n - 1) deviations below the mean, so 1.9 could not be reached by less than five pods.
    fn is_far_below(self, rate: f64, settings: &OutlierSettings) -> bool {
        let others = self.pods - 1.0;
        if others < 1.0 {
            return false;
        }
        let mean = (self.sum - rate) / others;
        let deviation = ((self.squares - rate * rate) / others - mean * mean).max(0.0).sqrt();
        rate < mean - (settings.success_deviations * deviation).max(settings.success_margin)
    }
}

/// The lower median of `sorted` without one entry that is `own`.
fn median_of_others(sorted: &[f64], own: f64) -> Option<f64> {
    let others = sorted.len().checked_sub(1).filter(|others| *others > 0)?;
    let middle = (others - 1) / 2;
    let place = sorted.partition_point(|mean| *mean < own);
    sorted.get(if middle < place { middle } else { middle + 1 }).copied()
}
