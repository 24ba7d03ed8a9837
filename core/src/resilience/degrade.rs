//! How well a model is served: fully, or with less because something it needs is slow or failing.
//!
//! The rule: down the ladder only after trouble was measured for a while, up again one level at a time after
//! it has stayed well below what started it, and never onto a level that the model does not allow.
//!
//! | level | served with                  | entered when                      |
//! |-------|------------------------------|-----------------------------------|
//! | 0     | everything                   |                                   |
//! | 1     | stale or default features    | feature p95 > 15 ms               |
//! | 2     | the fallback model           | prediction p95 > 20 ms            |
//! | 3     | the last cached prediction   | errors > 1 %                      |
//! | 4     | a static answer, or shed     | errors > 5 %                      |
//!
//! ```text
//! level n --a trigger for m > n holds for enter_after-----------------------> level m
//! level n --every trigger for n or more is below 80 % for leave_after,
//!           and n was entered or stepped down to leave_after ago------------> next allowed below n
//! ```
//!
//! A trigger for a level that is not allowed stands for the next lower allowed one. It fires on 50 samples or
//! more; for leaving, fewer do, and none at all is no trouble.
//!
//! Triggers measure the primary alone: features only where they were read as at level 0, predictions and
//! errors only where the primary was called (levels 0 and 1). So that its recovery is seen, a share of
//! requests, and at least one a second while there are any, is served as at level 0: the probes. What a
//! fallback does when it fails itself is the caller's: the next level that is allowed.

use std::time::Duration;

use super::latency::{Halves, Latencies, Turned};

/// How often the triggers are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// When a model is served with less.
#[derive(Clone, Debug, PartialEq)]
pub struct DegradeSettings {
    /// Whether the model allows level 1, 2, 3 and 4. Default none.
    pub allowed: [bool; 4],
    /// Level 1: p95 of feature look-ups. Default 15 ms.
    pub feature_p95: Duration,
    /// Level 2: p95 of predictions. Default 20 ms.
    pub prediction_p95: Duration,
    /// Level 3: share of errors. Default 0.01.
    pub errors: f64,
    /// Level 4: share of errors. Default 0.05.
    pub many_errors: f64,
    /// Samples in the window without which no trigger fires. Default 50.
    pub samples: u32,
    /// How old a sample may be. Default 10 s.
    pub window: Duration,
    /// How long a trigger holds before its level is entered. Default 3 s.
    pub enter_after: Duration,
    /// How long a trigger stays below `leave_below` before its level is left. Default 15 s.
    pub leave_after: Duration,
    /// Share of a threshold below which it is no trouble. 0 to 1, default 0.8.
    pub leave_below: f64,
    /// Share of requests that are probes while degraded. 0 to 1, default 0.02.
    pub probes: f64,
    /// The longest time without a probe while there are requests. Default 1 s.
    pub probe_every: Duration,
}

impl Default for DegradeSettings {
    fn default() -> Self {
        Self {
            allowed: [false; 4],
            feature_p95: Duration::from_millis(15),
            prediction_p95: Duration::from_millis(20),
            errors: 0.01,
            many_errors: 0.05,
            samples: 50,
            window: Duration::from_secs(10),
            enter_after: Duration::from_secs(3),
            leave_after: Duration::from_secs(15),
            leave_below: 0.8,
            probes: 0.02,
            probe_every: Duration::from_secs(1),
        }
    }
}

/// What a request is served with, from best to worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    #[default]
    Normal,
    StaleFeatures,
    FallbackModel,
    CachedPrediction,
    StaticAnswer,
}

impl Step {
    const ALL: [Self; 5] =
        [Self::Normal, Self::StaleFeatures, Self::FallbackModel, Self::CachedPrediction, Self::StaticAnswer];

    /// 0 to 4, as callers are told.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// What was measured when a level was entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    SlowFeatures,
    SlowPredictions,
    Errors,
}

impl Reason {
    /// As in `spillway-degraded` and in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SlowFeatures => "slow-features",
            Self::SlowPredictions => "slow-predictions",
            Self::Errors => "errors",
        }
    }
}

/// Where a model stands, and why if not at normal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    pub step: Step,
    pub reason: Option<Reason>,
}

/// How one request is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serve {
    At(Level),
    /// As at level 0; if that fails and time is left, at this level.
    Probe(Level),
}

impl Serve {
    pub fn level(self) -> Level {
        match self {
            Self::At(level) | Self::Probe(level) => level,
        }
    }
}

/// One request, measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// How it was served; [`Step::Normal`] for a probe.
    pub step: Step,
    /// Time for its features. `None` if it has none.
    pub features: Option<Duration>,
    /// Time for the model's answer. `None` if there was none.
    pub prediction: Option<Duration>,
    /// The model failed. Overload replies and the caller's own faults are no errors.
    pub error: bool,
}

/// The ladder of one model.
#[derive(Clone, Debug)]
pub struct Ladder {
    settings: DegradeSettings,
    level: Level,
    changed: Duration,
    looked: Option<Duration>,
    features: Latencies,
    predictions: Latencies,
    errors: Errors,
    triggers: [Trigger; 4],
    /// Probes saved up by requests; one costs 1.
    credit: f64,
    probed: Option<Duration>,
}

/// Since when a trigger has been where it is.
#[derive(Clone, Copy, Debug, Default)]
struct Trigger {
    above: Option<Duration>,
    calm: Option<Duration>,
}

impl Ladder {
    /// At level 0.
    pub fn new(settings: DegradeSettings) -> Self {
        Self {
            level: Level::default(),
            changed: Duration::ZERO,
            looked: None,
            features: Latencies::new(settings.window),
            predictions: Latencies::new(settings.window),
            errors: Errors::new(settings.window),
            triggers: [Trigger::default(); 4],
            credit: 0.0,
            probed: None,
            settings,
        }
    }

    /// Where the model stands.
    pub fn level(&mut self, now: Duration) -> Level {
        self.look(now);
        self.level
    }

    /// How the next request is served.
    pub fn serve(&mut self, now: Duration) -> Serve {
        let level = self.level(now);
        if level.step == Step::Normal {
            return Serve::At(level);
        }
        self.credit = (self.credit + self.settings.probes).min(2.0);
        let due = self.probed.is_none_or(|probed| now.saturating_sub(probed) >= self.settings.probe_every);
        if due || self.credit >= 1.0 {
            self.credit = (self.credit - 1.0).max(0.0);
            self.probed = Some(now);
            return Serve::Probe(level);
        }
        Serve::At(level)
    }

    /// Counts what is the primary's own.
    pub fn observe(&mut self, sample: Sample, now: Duration) {
        if let Some(features) = sample.features
            && sample.step == Step::Normal
        {
            self.features.record(features, now);
        }
        if sample.step <= Step::StaleFeatures {
            if let Some(prediction) = sample.prediction {
                self.predictions.record(prediction, now);
            }
            self.errors.record(sample.error, now);
        }
        self.look(now);
    }

    /// Other settings. What was measured counts again from now on; a level that is no longer allowed gives
    /// way to the next lower one.
    pub fn reconfigure(&mut self, settings: DegradeSettings, now: Duration) {
        let step = allowed(&settings, self.level.step);
        let reason = self.level.reason.filter(|_| step != Step::Normal);
        *self = Self { level: Level { step, reason }, changed: now, ..Self::new(settings) };
    }

    fn look(&mut self, now: Duration) {
        if self.looked.is_some_and(|looked| now.saturating_sub(looked) < LOOK) {
            return;
        }
        self.looked = Some(now);
        let measured = self.measure(now);
        for (trigger, (share, samples)) in self.triggers.iter_mut().zip(measured) {
            let above = samples >= self.settings.samples.max(1) && share > 1.0;
            let calm = samples == 0 || share < self.settings.leave_below;
            trigger.above = above.then(|| trigger.above.unwrap_or(now));
            trigger.calm = calm.then(|| trigger.calm.unwrap_or(now));
        }
        self.enter(now);
        self.leave(now);
    }

    /// Of each trigger: its measure as a share of the threshold, and the samples behind it.
    fn measure(&mut self, now: Duration) -> [(f64, u32); 4] {
        let settings = &self.settings;
        let p95 = |latencies: &mut Latencies, threshold: Duration| {
            let p95 = latencies.quantile(0.95, now).unwrap_or_default();
            (p95.as_secs_f64() / threshold.as_secs_f64().max(1e-9), latencies.samples(now))
        };
        let (share, samples) = self.errors.share(now);
        [
            p95(&mut self.features, settings.feature_p95),
            p95(&mut self.predictions, settings.prediction_p95),
            (share / settings.errors.max(1e-9), samples),
            (share / settings.many_errors.max(1e-9), samples),
        ]
    }

    fn enter(&mut self, now: Duration) {
        let holds = |since: Option<Duration>| held(since, now, self.settings.enter_after);
        let firing = self.triggers.iter().rposition(|trigger| holds(trigger.above));
        let Some(wanted) = firing.and_then(|index| Step::ALL.get(index + 1).copied()) else { return };
        let step = allowed(&self.settings, wanted);
        if step > self.level.step {
            self.level = Level { step, reason: reason(wanted) };
            self.changed = now;
        }
    }

    fn leave(&mut self, now: Duration) {
        let after = self.settings.leave_after;
        let step = self.level.step;
        // A trigger concerns this level if what it stands for is this level or worse.
        let mut concerned =
            Step::ALL.iter().skip(1).zip(&self.triggers).filter(|(of, _)| allowed(&self.settings, **of) >= step);
        let calm = concerned.all(|(_, trigger)| held(trigger.calm, now, after));
        if step != Step::Normal && calm && held(Some(self.changed), now, after) {
            let lower = Step::ALL.get(usize::from(step.number()).saturating_sub(1)).copied().unwrap_or(Step::Normal);
            let step = allowed(&self.settings, lower);
            self.level = Level { step, reason: self.level.reason.filter(|_| step != Step::Normal) };
            self.changed = now;
        }
    }
}

fn held(since: Option<Duration>, now: Duration, time: Duration) -> bool {
    since.is_some_and(|since| now.saturating_sub(since) >= time)
}

/// The level itself or the next lower one that the model allows; level 0 always is.
fn allowed(settings: &DegradeSettings, step: Step) -> Step {
    let steps = Step::ALL.into_iter().skip(1).zip(settings.allowed);
    let reachable = steps.filter(|(candidate, allowed)| *allowed && *candidate <= step);
    reachable.map(|(candidate, _)| candidate).next_back().unwrap_or(Step::Normal)
}

fn reason(step: Step) -> Option<Reason> {
    match step {
        Step::Normal => None,
        Step::StaleFeatures => Some(Reason::SlowFeatures),
        Step::FallbackModel => Some(Reason::SlowPredictions),
        Step::CachedPrediction | Step::StaticAnswer => Some(Reason::Errors),
    }
}

/// Requests and errors of the last window.
#[derive(Clone, Debug)]
struct Errors {
    halves: Halves,
    /// Requests and errors of the half that fills, and of the one before.
    filling: (u32, u32),
    before: (u32, u32),
}

impl Errors {
    fn new(window: Duration) -> Self {
        Self { halves: Halves::new(window), filling: (0, 0), before: (0, 0) }
    }

    fn record(&mut self, error: bool, now: Duration) {
        self.advance(now);
        self.filling.0 = self.filling.0.saturating_add(1);
        self.filling.1 = self.filling.1.saturating_add(u32::from(error));
    }

    /// Errors per request, and the requests.
    fn share(&mut self, now: Duration) -> (f64, u32) {
        self.advance(now);
        let requests = self.filling.0.saturating_add(self.before.0);
        let errors = self.filling.1.saturating_add(self.before.1);
        (f64::from(errors) / f64::from(requests.max(1)), requests)
    }

    fn advance(&mut self, now: Duration) {
        match self.halves.advance(now) {
            Turned::Not => {}
            Turned::Once => self.before = std::mem::take(&mut self.filling),
            Turned::Over => (self.before, self.filling) = ((0, 0), (0, 0)),
        }
    }
}

#[cfg(test)]
#[path = "degrade_tests.rs"]
mod tests;
