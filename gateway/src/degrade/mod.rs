//! What a request gets when its model is in trouble (DESIGN "Degradation ladder"), for models that allow it.
//!
//! The rule: levels 1 and 2 are the sidecar's to serve and are asked of it; 3 and 4 are answered here. What fails
//! at the pods is answered here, too, whatever the level, before its deadline. Every degraded answer says so.
//!
//! ```text
//! level 0 ------> pods ------------------------------ server error --> answered here, else the error
//! level 1, 2 ---> pods, asked for that level --------- server error --> answered here, else the error
//! level 3, 4 ---> answered here; what cannot be: level 4 refuses the lowest class, the rest goes on as at level 2
//! probe --------> pods, as at level 0, in half of the time -- server error --> as at its level
//! ```
//!
//! * [`ladders`]: where each model stands. [`answers`]: those that no pod gave. [`metrics`]: what is counted.

mod answers;
mod ladders;
mod metrics;

use std::sync::Arc;
use std::time::{Duration, Instant};

use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::inference::InferResponse;
use spillway_core::limit::Class;
use spillway_core::resilience::{Level, Sample, Serve, Step};
use spillway_core::resource::Model;
use spillway_core::snapshot::Snapshot;
use spillway_runtime::snapshot::Subscription;
use spillway_runtime::telemetry::Metrics as Registry;
use tonic::Code;

pub use answers::Question;
use answers::answer_here;
use ladders::{Ladders, ModelLadder};
use metrics::Metrics;

use crate::clock::Clock;
use crate::errors::Refusal;
use crate::exchange::{Exchange, Making};
use crate::shared::Shared;

/// Of the time that is left, what is kept back for an answer of our own: a tenth, up to this.
const RESERVE: Duration = Duration::from_millis(10);
/// How often ladders look at the time when no request has them do it.
const LOOK: Duration = Duration::from_secs(1);

pub struct Degradation {
    ladders: Ladders,
    metrics: Metrics,
}

/// One request of a model with a ladder.
pub struct Turn<'a> {
    degradation: &'a Degradation,
    ladder: Arc<ModelLadder>,
    serve: Serve,
    /// Whether the model has the time that it should need: a caller in a hurry says nothing about it.
    patient: bool,
    until: Instant,
    stage: Stage,
    /// Why there is no better answer yet.
    failed: Option<Refusal>,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Begun,
    /// Served as at level 0, which failed.
    Probed,
    /// Served at its level as far as pods can.
    Asked,
}

impl Degradation {
    pub fn new(registry: &Registry, clock: Clock, snapshot: &Snapshot) -> Self {
        let degradation = Self { ladders: Ladders::new(clock), metrics: Metrics::new(registry) };
        degradation.ladders.adopt(snapshot, &degradation.metrics);
        degradation
    }

    /// `None`: the model has no ladder.
    pub fn turn(&self, name: &str, model: &Model, until: Instant) -> Option<Turn<'_>> {
        model.traffic.degradation.as_ref()?;
        let ladder = self.ladders.of(name)?;
        let serve = self.ladders.serve(&ladder);
        // The snapshot of this request may allow less than that of the ladder.
        let serve = if model.allows(serve.level().step) { serve } else { Serve::At(Level::default()) };
        let patient = left(until) >= model.deadline / 2;
        Some(Turn { degradation: self, ladder, serve, patient, until, stage: Stage::Begun, failed: None })
    }

    /// Whether the model is served as it should be.
    pub fn is_normal(&self, name: &str) -> bool {
        self.ladders.of(name).is_none_or(|ladder| ladder.is_normal())
    }

    /// The answer that this gateway gives in place of a refusal that came before any pod was asked; else the
    /// refusal.
    pub fn instead(
        &self,
        exchange: &mut Exchange,
        question: &Question<'_>,
        cached: impl Fn() -> Option<InferResponse>,
        refusal: Refusal,
    ) -> Result<InferResponse, Refusal> {
        if !mendable(&refusal) || !question.may_be_answered_here() {
            return Err(refusal);
        }
        answer_here(exchange, question, cached()).ok_or(refusal)
    }

    /// Where a model stands; level 0 without a ladder.
    pub fn level(&self, name: &str) -> Level {
        self.ladders.of(name).map(|ladder| self.ladders.level(&ladder)).unwrap_or_default()
    }

    /// Counts an answer by the level that it says.
    pub fn answered(&self, making: &Making) {
        if let Some(step) = said_step(making) {
            self.metrics.answered(step);
        }
    }

    /// Where each model with a ladder stands: its level and the reason.
    pub fn view(&self) -> serde_json::Value {
        let level = |level: Level| {
            let reason = level.reason.map(|reason| reason.as_str());
            serde_json::json!({"level": level.step.number(), "reason": reason})
        };
        self.ladders.levels().into_iter().map(|(model, at)| (model.to_string(), level(at))).collect()
    }
}

/// Follows the snapshot and the time until the drain is over.
pub async fn follow(shared: Arc<Shared>, subscription: Arc<Subscription>) {
    let Degradation { ladders, metrics } = &shared.degradation;
    let mut changed = subscription.changed();
    loop {
        ladders.adopt(&subscription.current(), metrics);
        ladders.look();
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            Ok(()) = changed.changed() => {}
            () = shared.drain.stopped() => return,
        }
    }
}

/// What is to be done next for a request.
pub enum Next {
    /// Ask the pods until then; [`Exchange::degrade`] says how. Then tell [`Turn::hear`] and [`Turn::told`].
    Ask(Instant),
    /// Answered without them; and why, if they were asked.
    Answer(InferResponse, Option<Refusal>),
    Refuse(Refusal),
}

impl Turn<'_> {
    /// `cached` is the last prediction for the same question.
    pub fn next(
        &mut self,
        exchange: &mut Exchange,
        question: &Question<'_>,
        cached: impl Fn() -> Option<InferResponse>,
    ) -> Next {
        let level = self.serve.level().step;
        // What is asked of the pods, at this level or instead of a higher one.
        let step = match level {
            Step::CachedPrediction | Step::StaticAnswer if !question.model.allows(Step::FallbackModel) => Step::Normal,
            level => level.min(Step::FallbackModel),
        };
        let last = self.last(question);
        if self.stage == Stage::Begun && matches!(self.serve, Serve::Probe(_)) {
            self.stage = Stage::Probed;
            self.degradation.metrics.probes.inc();
            let until = if step == Step::Normal { last } else { last - left(last) / 2 };
            return self.ask(exchange, Step::Normal, until);
        }
        if self.stage != Stage::Asked && level >= Step::CachedPrediction {
            if let Some(answer) = answer_here(exchange, question, cached()) {
                return Next::Answer(answer, self.failed.take());
            }
            if level == Step::StaticAnswer && question.class == Class::Low {
                return Next::Refuse(Refusal::LowestClass);
            }
        }
        let ask = match self.stage {
            Stage::Begun => true,
            Stage::Probed => step != Step::Normal && left(last) >= SHORTEST_USEFUL,
            Stage::Asked => false,
        };
        self.stage = Stage::Asked;
        if ask {
            return self.ask(exchange, step, last);
        }
        match answer_here(exchange, question, cached()) {
            Some(answer) => Next::Answer(answer, self.failed.take()),
            None => Next::Refuse(self.failed.take().unwrap_or(Refusal::NoPod)),
        }
    }

    /// Until when others are asked: some time is left for an answer from here.
    pub fn last(&self, question: &Question<'_>) -> Instant {
        if question.may_be_answered_here() { self.until - reserve(self.until) } else { self.until }
    }

    /// Whether the next answer will be less than it should be: the model is at level 2 or beyond, and this request does
    /// not find out whether it has healed.
    pub fn is_lesser(&self) -> bool {
        let is_probe = matches!(self.serve, Serve::Probe(_));
        self.stage == Stage::Begun && !is_probe && self.serve.level().step >= Step::FallbackModel
    }

    /// Learns from how asking the pods ended.
    pub fn hear<T>(&self, exchange: &Exchange, answered: &Result<T, Refusal>) {
        let asked = exchange.degrade.unwrap_or_default();
        if let Some(sample) = self.sample(asked, answered.as_ref().err(), &exchange.making) {
            self.degradation.ladders.observe(&self.ladder, sample);
        }
    }

    /// How asking the pods ended. `None`: there may be a better answer, [`Self::next`] says.
    pub fn told<T>(&mut self, answered: Result<T, Refusal>) -> Option<Result<T, Refusal>> {
        match answered {
            Err(failed) if mendable(&failed) => {
                if self.stage == Stage::Probed {
                    self.degradation.metrics.probes_failed.inc();
                }
                self.failed = Some(failed);
                None
            }
            answered => Some(answered),
        }
    }

    /// Why there is no answer, once nobody else is to be asked.
    pub fn give_up(self) -> Refusal {
        self.failed.unwrap_or(Refusal::NoPod)
    }

    fn ask(&self, exchange: &mut Exchange, step: Step, until: Instant) -> Next {
        exchange.degrade = Some(step).filter(|step| *step != Step::Normal);
        exchange.making = Making::default();
        Next::Ask(until)
    }

    /// What a call tells about the model; `None` if nothing.
    fn sample(&self, asked: Step, failed: Option<&Refusal>, making: &Making) -> Option<Sample> {
        let error = match failed.map(|refusal| fault(refusal, self.patient)) {
            None => false,
            Some(Some(fault)) => fault,
            Some(None) => return None,
        };
        let timing = making.sidecar_timing.as_ref().and_then(|timing| timing.to_str().ok()).unwrap_or_default();
        let step = match (failed, asked) {
            // Whatever was asked: the sidecar may have fallen back by itself, or have no fallback.
            (None, _) if said_step(making) == Some(Step::FallbackModel) => Step::FallbackModel,
            (None, Step::FallbackModel) => Step::Normal,
            _ => asked,
        };
        let prediction = duration(timing, "model").filter(|_| failed.is_none());
        Some(Sample { step, features: duration(timing, "features"), prediction, error })
    }
}

/// Whether a refusal is the model's fault, of which a ladder hears; `None`: it says nothing about the model.
fn fault(refusal: &Refusal, patient: bool) -> Option<bool> {
    match refusal {
        Refusal::NoPod | Refusal::PodLost | Refusal::BadAnswer => Some(true),
        Refusal::Deadline | Refusal::Sidecar { status: Code::DeadlineExceeded, .. } => patient.then_some(true),
        Refusal::Sidecar { status: Code::ResourceExhausted | Code::Cancelled, .. } => None,
        Refusal::Sidecar { .. } => Some(refusal.answer().status.is_server_error()),
        _ => None,
    }
}

/// Whether another answer is better than this refusal: it is not the caller's fault, nor by the caller's own rules.
fn mendable(refusal: &Refusal) -> bool {
    match refusal {
        Refusal::Deadline
        | Refusal::NoPod
        | Refusal::PodLost
        | Refusal::BadAnswer
        | Refusal::Overloaded
        | Refusal::Busy { .. }
        | Refusal::PodsBusy => true,
        Refusal::Sidecar { .. } => refusal.answer().status.is_server_error(),
        _ => false,
    }
}

/// The level that an answer says.
pub fn said_step(making: &Making) -> Option<Step> {
    match making.degraded.as_ref()?.as_bytes().first()? {
        b'1' => Some(Step::StaleFeatures),
        b'2' => Some(Step::FallbackModel),
        b'3' => Some(Step::CachedPrediction),
        b'4' => Some(Step::StaticAnswer),
        _ => None,
    }
}

/// One figure of a `Server-Timing` header, which has milliseconds.
fn duration(timing: &str, name: &str) -> Option<Duration> {
    let mut figures = timing.split(',').filter_map(|part| part.trim().split_once(";dur="));
    let milliseconds: f64 = figures.find(|(found, _)| *found == name)?.1.parse().ok()?;
    Duration::try_from_secs_f64(milliseconds / 1e3).ok()
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

fn reserve(until: Instant) -> Duration {
    RESERVE.min(left(until) / 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Why;

    #[test]
    fn figures_of_server_timing_are_read_and_nonsense_is_none() {
        let timing = "features;dur=0.21, model;dur=1.5, fallback;dur=-1";
        assert_eq!(duration(timing, "features"), Some(Duration::from_micros(210)));
        assert_eq!(duration(timing, "model"), Some(Duration::from_micros(1_500)));
        assert_eq!(duration(timing, "fallback"), None);
        for nonsense in ["", "model", "model;dur=x", "model;dur=inf", "model;dur=NaN", "model;dur=1e300"] {
            assert_eq!(duration(nonsense, "model"), None, "{nonsense}");
        }
    }

    #[test]
    fn callers_in_a_hurry_and_overload_say_nothing_about_the_model() {
        let sidecar = |status| Refusal::Sidecar { status, code: "x".into(), message: String::new() };
        for (refusal, patient, said, mends) in [
            (Refusal::Deadline, true, Some(true), true),
            (Refusal::Deadline, false, None, true),
            (sidecar(Code::DeadlineExceeded), false, None, true),
            (sidecar(Code::ResourceExhausted), true, None, true),
            (sidecar(Code::Internal), false, Some(true), true),
            (sidecar(Code::Unavailable), true, Some(true), true),
            (sidecar(Code::FailedPrecondition), true, Some(false), false),
            (sidecar(Code::InvalidArgument), true, Some(false), false),
            (Refusal::NoPod, true, Some(true), true),
            (Refusal::PodsBusy, true, None, true),
            (Refusal::busy(Why::Shed), true, None, true),
            (Refusal::Cancelled, true, None, false),
            (Refusal::LowestClass, true, None, false),
        ] {
            assert_eq!((fault(&refusal, patient), mendable(&refusal)), (said, mends), "{refusal:?}");
        }
    }
}
