//! From what is seen to when what happened: all observations of one run.
//!
//! The rule: marks come from what clients and the control plane said when they said it, and nothing is assumed. The
//! clock is the controller's alone; times count from the run's beginning, marks from the injection.
//!
//! * T1, T2, T3 are what the control plane says of the target, T4 what DNS nodes say to subnets that had the target.
//! * T5: of the clients whose requests went to the target first, so many sent one elsewhere first. 95 % of 10 are 10.
//! * T6: the last failed request of the last second in which too large a share failed, if [`CALM`] of good ones
//!   followed under the fault.
//! * T7: the fault is gone, and weights and phases are as they were.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::definition::{Drill, Expected};
use super::timeline::{Mark, Timeline};
use crate::health::Phase;
use crate::limit::Class;
use crate::units::Name;

/// Good seconds that prove that errors are back.
const CALM: Duration = Duration::from_secs(5);
/// Seconds of a run that are kept; later requests are counted, and not drawn.
const MOST_SECONDS: usize = 4_000;
/// Weights that differ by less are the same: a plan is made of measured capacities.
const SAME_WEIGHT: f64 = 0.01;

/// What the control plane says at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sight {
    pub plan_version: u64,
    pub regions: BTreeMap<Name, RegionSight>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RegionSight {
    pub phase: Option<Phase>,
    /// Pairs of vantage and gateway whose last probe failed.
    pub failing: u64,
    /// Part of all traffic, in the plan.
    pub weight: f64,
}

/// One request of a synthetic client, with all its attempts.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub client: u32,
    pub class: Class,
    pub sent: Duration,
    pub took: Duration,
    /// The region whose gateway was asked first.
    pub first: Option<Name>,
    /// Attempts beyond the first.
    pub retries: u32,
    pub outcome: Result<Served, Failure>,
}

/// Who answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    pub region: Option<Name>,
}

/// Why nobody did, by the last attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Failure {
    /// The name has no address.
    Unresolved,
    /// Connections are refused, reset or do not get through TLS.
    Unreachable,
    TimedOut,
    /// 429 and 503: there is too much to do.
    Overloaded,
    /// Other 5xx.
    Failed,
    /// 4xx: the request is wrong, or may not be asked.
    Rejected,
}

impl Failure {
    pub const ALL: [Self; 6] =
        [Self::Unresolved, Self::Unreachable, Self::TimedOut, Self::Overloaded, Self::Failed, Self::Rejected];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unresolved => "unresolved",
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Overloaded => "overloaded",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
        }
    }
}

/// One second of all clients.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Second {
    pub sent: u64,
    pub failed: u64,
    /// Served, by the region that answered.
    pub served: BTreeMap<Name, u64>,
    /// By the region asked first.
    pub first: BTreeMap<Name, u64>,
    last_failed: Duration,
}

/// Counts of one class.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub sent: u64,
    pub retried: u64,
    pub failed: BTreeMap<Failure, u64>,
}

/// Everything seen in one run.
#[derive(Clone, Debug)]
pub struct Recorder {
    expects: Expected,
    /// Share of failed requests that a good second may have.
    errors: f64,
    target: Option<Name>,
    before: Sight,
    last: Sight,
    injected: Option<Duration>,
    timeline: Timeline,
    /// Seconds since the run began.
    seconds: Vec<Second>,
    /// Since the injection.
    tallies: BTreeMap<Class, Tally>,
    /// The region that each client asked first before, and those of the target that have moved.
    clients: BTreeMap<u32, Name>,
    moved: BTreeMap<u32, Duration>,
    /// Subnets by number: the region that DNS said before.
    answers: BTreeMap<u32, Name>,
    weight_changes: u64,
}

impl Recorder {
    pub fn new(drill: &Drill, target: Option<Name>) -> Self {
        Self {
            expects: drill.expects,
            errors: drill.objectives.errors.ratio(),
            target,
            before: Sight::default(),
            last: Sight::default(),
            injected: None,
            timeline: Timeline::default(),
            seconds: Vec::new(),
            tallies: BTreeMap::new(),
            clients: BTreeMap::new(),
            moved: BTreeMap::new(),
            answers: BTreeMap::new(),
            weight_changes: 0,
        }
    }

    /// The fault is there. What was seen last is how it was before.
    pub fn injected(&mut self, now: Duration) {
        self.injected = Some(now);
        self.before = self.last.clone();
        self.timeline.reach(Mark::Injected, Duration::ZERO);
    }

    /// The fault is gone.
    pub fn removed(&mut self, now: Duration) {
        self.reach(Mark::Removed, now);
    }

    /// What the control plane says.
    pub fn sight(&mut self, sight: Sight, now: Duration) {
        if self.injected.is_some() {
            self.weight_changes += u64::from(differ(&self.last, &sight));
            self.compare(&sight, now);
        }
        self.last = sight;
    }

    /// What a DNS node says to a subnet now, asked without a cache between.
    pub fn answer(&mut self, subnet: u32, region: &Name, now: Duration) {
        if self.injected.is_none() {
            self.answers.insert(subnet, region.clone());
        } else if self.expects == Expected::Failover
            && self.under_fault()
            && self.answers.get(&subnet).is_some_and(|before| Some(before) == self.target.as_ref() && before != region)
        {
            self.reach(Mark::Answers, now);
        }
    }

    pub fn request(&mut self, request: &Request) {
        if let Some(first) = &request.first {
            self.note_first(request, first);
        }
        if self.injected.is_some_and(|injected| request.sent >= injected) {
            let tally = self.tallies.entry(request.class).or_default();
            tally.sent += 1;
            tally.retried += u64::from(request.retries);
            if let Err(failure) = request.outcome {
                *tally.failed.entry(failure).or_default() += 1;
            }
        }
        let place = usize::try_from(request.sent.as_secs()).unwrap_or(usize::MAX);
        if place >= MOST_SECONDS {
            return;
        }
        if self.seconds.len() <= place {
            self.seconds.resize_with(place + 1, Second::default);
        }
        let Some(second) = self.seconds.get_mut(place) else { return };
        second.sent += 1;
        if let Some(first) = &request.first {
            *second.first.entry(first.clone()).or_default() += 1;
        }
        match &request.outcome {
            Ok(Served { region: Some(region) }) => *second.served.entry(region.clone()).or_default() += 1,
            Ok(Served { region: None }) => {}
            Err(_) => {
                second.failed += 1;
                second.last_failed = second.last_failed.max(request.sent);
            }
        }
    }

    /// Whether all that is expected under the fault has been seen.
    pub fn is_settled(&self, now: Duration) -> bool {
        let (Some(injected), Some(back)) = (self.injected, self.errors_back(now)) else { return false };
        let moved = self.timeline.at(Mark::Moved99);
        let calm = now.saturating_sub(injected).saturating_sub(back) >= CALM;
        match self.expects {
            Expected::Steady => calm,
            Expected::Failover => calm && moved.is_some() && self.timeline.at(Mark::Verdict).is_some(),
        }
    }

    /// Whether everything is as it was before the injection.
    pub fn is_back(&self) -> bool {
        self.timeline.at(Mark::FailedBack).is_some()
    }

    /// Regions other than the target that are suspected or out, and were not before.
    pub fn doubted(&self) -> BTreeSet<Name> {
        let was_up = |name: &Name| self.before.regions.get(name).is_none_or(|before| before.phase == Some(Phase::Up));
        let doubted = self.last.regions.iter().filter(|(name, region)| {
            Some(*name) != self.target.as_ref() && region.phase != Some(Phase::Up) && was_up(name)
        });
        doubted.map(|(name, _)| name.clone()).collect()
    }

    /// All marks as they are known now.
    pub fn timeline(&self, now: Duration) -> Timeline {
        let mut timeline = self.timeline.clone();
        timeline.set(Mark::ErrorsBack, self.errors_back(now));
        timeline
    }

    pub fn target(&self) -> Option<&Name> {
        self.target.as_ref()
    }

    pub fn injected_at(&self) -> Option<Duration> {
        self.injected
    }

    /// Clients that had the target before, and those of them that have moved.
    pub fn moved(&self) -> (usize, usize) {
        (self.had_target(), self.moved.len())
    }

    pub fn seconds(&self) -> &[Second] {
        &self.seconds
    }

    pub fn tallies(&self) -> &BTreeMap<Class, Tally> {
        &self.tallies
    }

    pub fn weight_changes(&self) -> u64 {
        self.weight_changes
    }

    /// Requests of all clients so far, and those of them that failed.
    pub fn counts(&self) -> (u64, u64) {
        self.seconds.iter().fold((0, 0), |(sent, failed), second| (sent + second.sent, failed + second.failed))
    }

    fn under_fault(&self) -> bool {
        self.injected.is_some() && self.timeline.at(Mark::Removed).is_none()
    }

    fn reach(&mut self, mark: Mark, now: Duration) {
        if let Some(injected) = self.injected {
            self.timeline.reach(mark, now.saturating_sub(injected));
        }
    }

    fn compare(&mut self, sight: &Sight, now: Duration) {
        let target = self.target.clone();
        let of_target = |sight: &Sight| target.as_ref().and_then(|target| sight.regions.get(target)).cloned();
        if let (Some(before), Some(at)) = (of_target(&self.before), of_target(sight))
            && self.under_fault()
        {
            let doubted = at.phase != before.phase;
            if at.failing > before.failing || doubted {
                self.reach(Mark::FirstFailedProbe, now);
            }
            if self.expects == Expected::Failover {
                let newer = sight.plan_version > self.before.plan_version;
                let lighter = newer && at.weight < before.weight - SAME_WEIGHT.min(before.weight / 2.0);
                if at.phase == Some(Phase::Down) || lighter {
                    self.reach(Mark::Verdict, now);
                }
                if lighter {
                    self.reach(Mark::Published, now);
                }
            }
        }
        let up = sight.regions.values().all(|region| region.phase == Some(Phase::Up));
        let is_as_before = up && !differ(&self.before, sight);
        if is_as_before && self.timeline.at(Mark::Removed).is_some() {
            self.reach(Mark::FailedBack, now);
        }
    }

    fn note_first(&mut self, request: &Request, first: &Name) {
        let Some(injected) = self.injected.filter(|injected| request.sent >= *injected) else {
            if self.injected.is_none() {
                self.clients.insert(request.client, first.clone());
            } else {
                // A request of before that ended late.
                self.clients.entry(request.client).or_insert_with(|| first.clone());
            }
            return;
        };
        let had = self.clients.get(&request.client);
        if self.expects != Expected::Failover
            || !self.under_fault()
            || had.is_none()
            || had != self.target.as_ref()
            || had == Some(first)
        {
            return;
        }
        let at = self.moved.entry(request.client).or_insert(request.sent);
        *at = (*at).min(request.sent);
        let mut times: Vec<Duration> = self.moved.values().copied().collect();
        times.sort_unstable();
        let all = self.had_target();
        for (mark, percent) in [(Mark::Moved90, 90), (Mark::Moved95, 95), (Mark::Moved99, 99)] {
            // The least count that is so large a share.
            let needed = (all * percent).div_ceil(100);
            let reached = needed.checked_sub(1).and_then(|place| times.get(place));
            self.timeline.set(mark, reached.map(|time| time.saturating_sub(injected)));
        }
    }

    fn had_target(&self) -> usize {
        self.clients.values().filter(|first| Some(*first) == self.target.as_ref()).count()
    }

    /// T6, since the injection.
    fn errors_back(&self, now: Duration) -> Option<Duration> {
        let injected = self.injected?;
        let under = match self.timeline.at(Mark::Removed) {
            Some(removed) => injected + removed,
            None => now,
        };
        let first = usize::try_from(injected.as_secs()).unwrap_or(usize::MAX);
        let last = usize::try_from(under.as_secs()).unwrap_or(usize::MAX);
        let is_bad = |second: &&Second| second.failed as f64 > self.errors * second.sent as f64;
        let seconds = self.seconds.iter().take(last.saturating_add(1)).skip(first);
        let back = seconds.filter(is_bad).map(|second| second.last_failed).max();
        let back = back.unwrap_or(injected);
        (under.saturating_sub(back) >= CALM).then(|| back.saturating_sub(injected))
    }
}

fn differ(one: &Sight, other: &Sight) -> bool {
    let weight = |sight: &Sight, name: &Name| sight.regions.get(name).map_or(0.0, |region| region.weight);
    let names: BTreeSet<&Name> = one.regions.keys().chain(other.regions.keys()).collect();
    names.into_iter().any(|name| (weight(one, name) - weight(other, name)).abs() > SAME_WEIGHT)
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
