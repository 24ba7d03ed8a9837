//! One run of a drill, from the preflight to its report.
//!
//! The rule: from the moment that something may have been injected, every way ends with an order to remove it, and
//! what was not confirmed as removed is waited for as long as a lease lives.
//!
//! ```text
//! preflight --a reason against it--> done: refused
//! preflight --none--> injecting
//! injecting --done--> observing
//! injecting --failed--> restoring, to be aborted
//! observing --a guard, the lease is lost, another drill, interrupted--> restoring, to be aborted
//! observing --settled, or held for `hold`--> restoring
//! restoring --removed, or a lease's life and a renewal's time are over--> recovering
//! recovering --failed back, `recover` is over, interrupted--> done: completed or aborted
//! ```

use std::fmt;
use std::time::Duration;

use super::definition::{Drill, Expected};
use super::guard::{Breach, Guards, Sample, Watch};
use super::lease::Lease;
use super::preflight::Refusal;

/// How long what was ordered to be removed is waited for: then its lease has ended it.
const REMOVED_AFTER: Duration = Lease::LIFE.saturating_add(Lease::RENEW_EVERY);

/// Where a run is.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    Preflight,
    Injecting,
    Observing,
    Restoring,
    Recovering,
    Done(End),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    Refused(Vec<Refusal>),
    Aborted(Abort),
    Completed,
}

/// Why a run was broken off.
#[derive(Clone, Debug, PartialEq)]
pub enum Abort {
    NotInjected(String),
    Guard(Breach),
    LeaseLost,
    Displaced(String),
    Interrupted,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The preflight is over.
    Judged(Vec<Refusal>),
    Injected,
    NotInjected(String),
    /// A second of observation. `settled`: all that is expected under the fault has been seen, for `settle`.
    Seen {
        sample: Sample,
        settled: bool,
    },
    /// The injector says that the lease is over.
    LeaseLost,
    /// The control plane, which forgot of this drill, has taken note of another one.
    Displaced(String),
    /// The operator wants it to end.
    Interrupted,
    Removed,
    FailedBack,
}

/// What the controller is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Inject,
    Renew,
    Remove,
    Report,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Course {
    expects: Expected,
    hold: Duration,
    recover: Duration,
    guards: Guards,
    stage: Stage,
    since: Duration,
    /// When the injector was last told something.
    told: Duration,
    watch: Option<Watch>,
    abort: Option<Abort>,
}

impl Course {
    pub fn new(drill: &Drill, now: Duration) -> Self {
        Self {
            expects: drill.expects,
            hold: drill.hold,
            recover: drill.recover,
            guards: drill.guards.clone(),
            stage: Stage::Preflight,
            since: now,
            told: now,
            watch: None,
            abort: None,
        }
    }

    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Why it was broken off, also before it has ended.
    pub fn abort(&self) -> Option<&Abort> {
        self.abort.as_ref()
    }

    /// What follows from an event. Events that do not fit the stage change nothing.
    pub fn step(&mut self, event: Event, now: Duration) -> Option<Order> {
        match (&self.stage, event) {
            (Stage::Preflight, Event::Judged(refusals)) if refusals.is_empty() => {
                self.enter(Stage::Injecting, now);
                self.tell(Order::Inject, now)
            }
            (Stage::Preflight, Event::Judged(refusals)) => self.end(End::Refused(refusals), now),
            (Stage::Preflight, Event::Interrupted) => self.end(End::Aborted(Abort::Interrupted), now),
            (Stage::Injecting, Event::Injected) => {
                self.watch = Some(Watch::new(self.guards.clone(), now));
                self.enter(Stage::Observing, now);
                None
            }
            (Stage::Injecting, Event::NotInjected(why)) => self.restore(Some(Abort::NotInjected(why)), now),
            (Stage::Observing, Event::Seen { sample, settled }) => {
                let breach = self.watch.as_mut().and_then(|watch| watch.observe(&sample, now));
                match breach {
                    Some(breach) => self.restore(Some(Abort::Guard(breach)), now),
                    None if settled && self.expects == Expected::Failover => self.restore(None, now),
                    None => None,
                }
            }
            (Stage::Injecting | Stage::Observing, Event::LeaseLost) => self.restore(Some(Abort::LeaseLost), now),
            (Stage::Injecting | Stage::Observing, Event::Displaced(why)) => {
                self.restore(Some(Abort::Displaced(why)), now)
            }
            (Stage::Injecting | Stage::Observing, Event::Interrupted) => self.restore(Some(Abort::Interrupted), now),
            (Stage::Restoring, Event::Removed) => {
                self.enter(Stage::Recovering, now);
                None
            }
            (Stage::Recovering, Event::FailedBack | Event::Interrupted) => self.finish(now),
            _ => None,
        }
    }

    /// What follows from the time. To be asked every second.
    pub fn tick(&mut self, now: Duration) -> Option<Order> {
        let lasted = now.saturating_sub(self.since);
        let quiet = now.saturating_sub(self.told) >= Lease::RENEW_EVERY;
        match self.stage {
            Stage::Observing if lasted >= self.hold => self.restore(None, now),
            Stage::Injecting | Stage::Observing if quiet => self.tell(Order::Renew, now),
            Stage::Restoring if lasted >= REMOVED_AFTER => {
                self.enter(Stage::Recovering, now);
                None
            }
            Stage::Restoring if quiet => self.tell(Order::Remove, now),
            Stage::Recovering if lasted >= self.recover => self.finish(now),
            _ => None,
        }
    }

    fn restore(&mut self, abort: Option<Abort>, now: Duration) -> Option<Order> {
        self.abort = abort;
        self.enter(Stage::Restoring, now);
        self.tell(Order::Remove, now)
    }

    fn finish(&mut self, now: Duration) -> Option<Order> {
        let end = self.abort.clone().map_or(End::Completed, End::Aborted);
        self.end(end, now)
    }

    fn end(&mut self, end: End, now: Duration) -> Option<Order> {
        self.enter(Stage::Done(end), now);
        Some(Order::Report)
    }

    fn tell(&mut self, order: Order, now: Duration) -> Option<Order> {
        self.told = now;
        Some(order)
    }

    fn enter(&mut self, stage: Stage, now: Duration) {
        (self.stage, self.since) = (stage, now);
    }
}

impl Stage {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Injecting => "inject",
            Self::Observing => "observe",
            Self::Restoring => "restore",
            Self::Recovering => "recover",
            Self::Done(_) => "done",
        }
    }

    /// Whether a fault may be there.
    pub fn may_be_broken(&self) -> bool {
        matches!(self, Self::Injecting | Self::Observing | Self::Restoring)
    }
}

impl fmt::Display for Abort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInjected(why) => write!(f, "the fault could not be injected: {why}"),
            Self::Guard(breach) => write!(f, "a guard: {breach}"),
            Self::LeaseLost => {
                f.write_str("the injector did not hear from the drill for too long, and removed the fault")
            }
            Self::Displaced(why) => write!(f, "the control plane: {why}"),
            Self::Interrupted => f.write_str("interrupted by the operator"),
        }
    }
}

#[cfg(test)]
#[path = "course_tests.rs"]
mod tests;
