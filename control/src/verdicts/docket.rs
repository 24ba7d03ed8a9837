//! When a plan is worth a new version, and which number it gets.
//!
//! The rule: what moves traffic is written at once; figures that only describe it every 5 s at most, and only if they
//! changed by more than noise. Numbers only rise, also over attempts of which nobody knows what became of them: such a
//! number is never used for another plan.
//!
//! | differs                                                                          | written           |
//! |----------------------------------------------------------------------------------|-------------------|
//! | which regions there are, basis, standing, drained                                | at once           |
//! | a weight or a share by more than 0.1 % of the traffic, what is shed by more than 1 % | at once       |
//! | demand or a capacity by more than 2 %, a class by more than 2 % of it            | 5 s after the last |
//! | nothing, but a region is not up or the hold is on: the records beside it         | 30 s after the last |

use std::time::Duration;

use spillway_core::failover::{Allotment, Plan};
use spillway_core::health::{Phase, Records};
use spillway_runtime::plan::Published;

const WEIGHT: f64 = 0.001;
const SHED: f64 = 0.01;
const FIGURE: f64 = 0.02;
const REFRESH: Duration = Duration::from_secs(5);
const RENEW: Duration = Duration::from_secs(30);

/// What one leader wrote.
#[derive(Debug)]
pub(super) struct Docket {
    /// The revision of the key, if it is there.
    revision: Option<u64>,
    /// No plan has had this number, and none may have.
    next: u64,
    written: Option<Published>,
    at: Duration,
}

/// What is to be written.
#[derive(Debug, PartialEq)]
pub(super) enum Due {
    /// A plan of its own number.
    Plan(Published),
    /// The same plan, newer records.
    Records,
}

impl Docket {
    /// As the store has it. The first plan of a leader is always due: it carries its epoch.
    pub(super) fn new(revision: Option<u64>, newest: u64, now: Duration) -> Self {
        Self { revision, next: newest.saturating_add(1), written: None, at: now }
    }

    pub(super) fn revision(&self) -> Option<u64> {
        self.revision
    }

    /// The number that the next plan has.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    pub(super) fn written(&self) -> Option<&Published> {
        self.written.as_ref()
    }

    pub(super) fn due(&self, draft: Published, records: &Records, now: Duration) -> Option<Due> {
        let since = now.saturating_sub(self.at);
        let Some(written) = &self.written else { return Some(Due::Plan(draft)) };
        if moves(written, &draft) || (since >= REFRESH && describes(&written.plan, &draft.plan)) {
            return Some(Due::Plan(draft));
        }
        let all_up = records.regions.values().all(|record| record.phase == Phase::Up && record.falls == 0);
        (since >= RENEW && !(all_up && records.hold.is_zero())).then_some(Due::Records)
    }

    /// A number is used up, whatever becomes of it.
    pub(super) fn attempt(&mut self, due: &Due) {
        if let Due::Plan(draft) = due {
            self.next = self.next.max(draft.plan.version.saturating_add(1));
        }
    }

    pub(super) fn done(&mut self, due: Due, revision: u64, now: Duration) {
        self.revision = Some(revision);
        self.at = now;
        if let Due::Plan(draft) = due {
            self.written = Some(draft);
        }
    }

    /// An attempt that was thought to be lost was not: this is what the store has.
    pub(super) fn found(&mut self, revision: Option<u64>, newest: u64) {
        self.revision = revision;
        self.next = self.next.max(newest.saturating_add(1));
        // What it says may not be what was written last.
        self.written = None;
    }
}

/// Whether traffic goes elsewhere by it.
fn moves(before: &Published, after: &Published) -> bool {
    let standing = |one: &Published, name| one.standings.get(name).map(|(standing, _)| *standing);
    let differs = |one: f64, other: f64, least: f64| (one - other).abs() > least;
    let region = |one: &Allotment, other: &Allotment| {
        let shed = one.shed.classes.iter().zip(other.shed.classes).any(|(one, other)| differs(*one, other, SHED));
        differs(one.weight, other.weight, WEIGHT)
            || differs(one.terms.share, other.terms.share, WEIGHT)
            || one.terms.drained != other.terms.drained
            || one.capacity_factor != other.capacity_factor
            || shed
    };
    before.plan.basis != after.plan.basis
        || before.plan.regions.len() != after.plan.regions.len()
        || after.plan.regions.iter().any(|(name, allotment)| {
            before.plan.regions.get(name).is_none_or(|known| region(known, allotment))
                || standing(before, name) != standing(after, name)
        })
}

/// Whether it says something else of what is asked for and what can be served.
fn describes(before: &Plan, after: &Plan) -> bool {
    let figure = |one: Option<f64>, other: Option<f64>| match (one, other) {
        (Some(one), Some(other)) => (one - other).abs() > FIGURE * one.abs().max(other.abs()),
        (one, other) => one.is_some() != other.is_some(),
    };
    let class = |(one, other): (&f64, &f64)| (one - other).abs() > FIGURE;
    figure(before.demand, after.demand)
        || before.classes.iter().zip(&after.classes).any(class)
        || after.regions.iter().any(|(name, allotment)| {
            let known = before.regions.get(name).and_then(|known| known.terms.capacity);
            figure(known, allotment.terms.capacity)
        })
}
