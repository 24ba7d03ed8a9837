//! What comes of a call to the model: kept, shared, or made up for.
//!
//! The rule: an answer is kept only if core says so of what it says about itself, and if it knows every
//! change of its rows; the judgement and the insert are one step to those who tell of changes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use spillway_core::cache::coherence::{Coherence, Tick};
use spillway_core::cache::control::Wish;
use spillway_core::cache::freshness::{Answer, End, Lifetimes, Times, may_store};
use spillway_core::cache::guard::Observation;
use spillway_core::cache::key::{Dependencies, Key};
use spillway_core::cache::status::{Forwarded, Status};
use spillway_core::limit::Class;
use spillway_core::units::Name;

use super::Results;
use super::changes::{Changes, LONGEST_UNHEARD, Truth};
use super::entry::{About, Entry, Kept, Made};
use super::flight::{Began, Lead, Maker};
use super::look::Said;
use super::message::without_id;
use super::models::Judged;
use crate::errors::Refusal;
use crate::exchange::Making;

/// To ask the model. Dropped, somebody else who waits gets it.
pub struct Permit(Option<Box<Pending>>);

/// A request that was looked up in vain.
pub struct Pending {
    pub key: Key,
    pub about: Arc<About>,
    pub dependencies: Dependencies,
    pub truth: Truth,
    pub class: Class,
    pub began: Began,
    pub version: Name,
    pub lifetimes: Lifetimes,
    pub wish: Wish,
    pub why: Forwarded,
    /// Others may wait for it.
    pub lead: Option<Lead>,
    /// What may be given if the model fails.
    pub stale: Option<Arc<Entry>>,
    pub judged: Arc<Judged>,
    /// On looking up, so far.
    pub spent: Duration,
}

/// A whole answer of the model.
pub struct Fresh<'a> {
    /// The `ModelInferResponse`.
    pub message: &'a [u8],
    /// What it says about how it was made.
    pub making: &'a Making,
    /// How long the call took.
    pub took: Duration,
}

/// Whether an answer may be kept, and what it knew.
struct Judgement {
    kept: Result<(), &'static str>,
    tick: Option<Tick>,
    sequence: u64,
}

impl Permit {
    /// The cache takes no part.
    pub fn none() -> Self {
        Self(None)
    }

    pub fn of(pending: Pending) -> Self {
        Self(Some(Box::new(pending)))
    }

    /// Whether the cache was looked into.
    pub fn was_looked_up(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn into_pending(self) -> Option<Pending> {
        self.0.map(|pending| *pending)
    }

    /// The model answered.
    pub fn keep(self, results: &Results, fresh: &Fresh<'_>, said: &mut Said) {
        if let Some(pending) = self.into_pending() {
            let began = results.now();
            let why = pending.why;
            let (collapsed, stored) = pending.keep(results, fresh);
            said.took += results.now().saturating_sub(began);
            said.status = Some(Status::Forwarded { why, collapsed, stored });
        }
    }

    /// Whether a stale answer would take the place of this failure.
    pub fn may_replace(&self, results: &Results, refusal: &Refusal) -> bool {
        let Some(pending) = &self.0 else { return false };
        results.replacement(pending.stale.as_ref(), pending, refusal).is_some()
    }

    /// The model failed, and the request is answered in another way; those who wait hear of it.
    pub fn let_go(self, refusal: &Refusal) {
        if let Some(lead) = self.into_pending().and_then(|mut pending| pending.lead.take()) {
            lead.fail(refusal);
        }
    }

    /// The model failed. A stale answer may take the place of the failure.
    pub fn fail(self, results: &Results, refusal: &Refusal, said: &mut Said) -> Option<Kept> {
        let mut pending = self.into_pending()?;
        said.status = Some(Status::Forwarded { why: pending.why, collapsed: false, stored: false });
        if let Some(lead) = pending.lead.take() {
            lead.fail(refusal);
        }
        results.if_error(pending.stale.as_ref(), &pending, refusal, said)
    }
}

impl Pending {
    /// Whether it was shared, and whether it was stored.
    fn keep(mut self, results: &Results, fresh: &Fresh<'_>) -> (bool, bool) {
        let (began, lead) = (results.now(), self.lead.take());
        let ttl = self.ttl(fresh).and_then(|ttl| match fresh.message.len() <= results.memory.largest() {
            true => Ok(ttl),
            false => Err("too-large"),
        });
        let is_awaited = || lead.as_ref().is_some_and(|lead| lead.flight().anyone_waits());
        let message = if ttl.is_ok() || is_awaited() { without_id(fresh.message) } else { None };
        let outcome = match message {
            Some(message) => self.land(results, fresh.making, lead, message, ttl),
            // Whoever came just now leads.
            None => (false, false),
        };
        if let Err(reason) = ttl {
            results.metrics.not_stored(reason);
        }
        let cost = self.spent + results.now().saturating_sub(began);
        self.judged.observe(results.now(), Observation::Miss { cost, call: fresh.took });
        outcome
    }

    /// Gives an answer to those who wait, and stores it if it has a time to live and knew all changes.
    fn land(
        &self,
        results: &Results,
        making: &Making,
        lead: Option<Lead>,
        message: Bytes,
        ttl: Result<Duration, &'static str>,
    ) -> (bool, bool) {
        let now = results.now();
        let coherence = (self.truth == Truth::Numbered).then(|| results.changes.coherence.lock());
        let judgement = self.judge(results, coherence.as_deref(), making);
        let entry = Arc::new(Entry {
            key: self.key.clone(),
            about: self.about.clone(),
            message,
            made: made(making),
            times: Times::new(now, ttl.unwrap_or_default(), rand::random()),
            mark: self.began.mark,
            generation: (self.truth != Truth::Timeless).then(|| results.changes.generation()),
        });
        let rows = match (ttl, judgement.kept) {
            (Ok(_), Ok(())) => Some(&self.dependencies.rows[..]),
            (Ok(_), Err(reason)) => {
                results.metrics.not_stored(reason);
                None
            }
            (Err(_), _) => None,
        };
        let Some(lead) = lead else {
            return (false, rows.is_some_and(|rows| results.memory.insert(&entry, rows)));
        };
        let (stored, crowd) = results.memory.land(lead.flight(), &entry, rows);
        drop(coherence);
        let slot = lead.take_slot();
        lead.landed();
        if let (Some(slot), Some(_)) = (slot, rows) {
            slot.keep(&entry, judgement.sequence, entry.times.fresh_until.saturating_sub(now));
        }
        let given = crowd.give(&entry, Maker::Call { stored }, judgement.tick, self.began.at);
        (given > 0, stored)
    }

    /// How long the answer is fresh, by what it says; or why it is not stored.
    fn ttl(&self, fresh: &Fresh<'_>) -> Result<Duration, &'static str> {
        let making = fresh.making;
        if making.region.is_some() {
            // Which changes of its rows it knew of cannot be told here.
            return Err("spilled");
        }
        let said_age = making.feature_age_ms.map(|age| Duration::from_millis(u64::try_from(age).unwrap_or(0)));
        // The sidecar knows which row ends first; else the oldest is taken for one of the shortest group.
        let age = match (self.dependencies.fresh_for, making.feature_fresh) {
            (Some(fresh_for), Some(left)) => Some(fresh_for.saturating_sub(left)),
            _ => said_age,
        };
        let answer = Answer {
            end: End::Whole,
            model_version: making.model_version.as_ref().and_then(|version| version.to_str().ok()),
            degraded: making.degraded.as_ref().map(|degraded| degraded.to_str().unwrap_or("-")),
            feature_age: age,
            took: fresh.took,
        };
        let ttl = may_store(&answer, self.version.as_str(), self.dependencies.fresh_for, &self.lifetimes, &self.wish);
        let ttl = ttl.map_err(|reason| reason.code())?;
        Ok(if self.truth == Truth::Unheard { ttl.min(LONGEST_UNHEARD) } else { ttl })
    }

    /// Whether the answer knew every change of its rows.
    fn judge(&self, results: &Results, coherence: Option<&Coherence>, making: &Making) -> Judgement {
        let Some(coherence) = coherence else { return Judgement { kept: Ok(()), tick: None, sequence: 0 } };
        let Some(sidecar) = making.feature_sequence else {
            return Judgement { kept: Err("deaf-sidecar"), tick: None, sequence: 0 };
        };
        let tick = Changes::knew(coherence, self.began.tick, self.began.number, sidecar);
        let sequence = self.began.number.map_or(0, |number| number.min(sidecar));
        let needed = coherence.needed(&self.dependencies.rows);
        let kept = match tick {
            Some(tick) if tick >= needed && results.changes.hears(results.now()) => Ok(()),
            _ => Err("overtaken"),
        };
        Judgement { kept, tick, sequence }
    }
}

fn made(making: &Making) -> Made {
    Made {
        model_version: making.model_version.clone(),
        degraded: making.degraded.clone(),
        feature_age_ms: making.feature_age_ms,
        region: making.region.clone(),
    }
}
