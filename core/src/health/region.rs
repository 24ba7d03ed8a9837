//! How a region goes out and comes back: the share of its planned weight that it gets.
//!
//! The rule: out within seconds, back in minutes, and later each time. Clients are told to ask again soon as long as
//! anything is in doubt.
//!
//! ```text
//! Up --most of its probes failed last, or a verdict against it--> Suspect: all of its weight, short TTL
//! Suspect --well for `calm_after`--> Up
//! Suspect --a verdict for `down_after`, and the fleet can spare it--> Down: no weight
//! Down --well for its hold-down--> Probation: no weight
//! Probation --`clean` good probes in a row--> Ramp: 1, 5, 25, 50, 100 % of its weight
//! Ramp --well for `step_for` on each step--> Up
//! Probation, Ramp --a verdict for `down_after`--> Down
//! ```
//!
//! A verdict is that the region is down, or one of the soft rules. Well is a good view and within all soft limits,
//! without a break; what is not known is neither. The hold-down is `hold_down`, doubled for each time that the region
//! went down before, up to `longest_hold_down`; time spent up lets one after the other be forgotten.
//!
//! So a region that flaps goes out once and stays out, as long as it is never well for the hold-down and the probation
//! together: six minutes, at first.
//!
//! It does not know of other regions: [`super::fleet`] says when it may go.

use std::fmt;
use std::time::Duration;

use super::soft::Quality;
use super::verdict::{Evidence, View};
use crate::failover::Standing;

/// Percent of a region's weight, step by step.
const RAMP: [u8; 5] = [1, 5, 25, 50, 100];

/// How fast a region goes out and comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionSettings {
    /// How long a verdict must stand before a region goes out. 1 s.
    pub down_after: Duration,
    /// How long a suspect must be well to be above suspicion. 30 s, as long as a usual TTL.
    pub calm_after: Duration,
    /// How long a region that went down must be well before it is on probation. 5 min.
    pub hold_down: Duration,
    /// The longest hold-down. 30 min.
    pub longest_hold_down: Duration,
    /// After this long up, one time that it was down is forgotten. 30 min.
    pub forgive_after: Duration,
    /// Good probes in a row that end a probation. 12.
    pub clean: u32,
    /// The time of a step of the ramp. 60 s.
    pub step_for: Duration,
}

impl Default for RegionSettings {
    fn default() -> Self {
        Self {
            down_after: Duration::from_secs(1),
            calm_after: Duration::from_secs(30),
            hold_down: Duration::from_secs(300),
            longest_hold_down: Duration::from_secs(1_800),
            forgive_after: Duration::from_secs(1_800),
            clean: 12,
            step_for: Duration::from_secs(60),
        }
    }
}

impl RegionSettings {
    /// For `spillway dev`: out as fast as ever, back within a minute.
    pub fn dev() -> Self {
        Self {
            calm_after: Duration::from_secs(10),
            hold_down: Duration::from_secs(10),
            longest_hold_down: Duration::from_secs(60),
            forgive_after: Duration::from_secs(120),
            clean: 3,
            step_for: Duration::from_secs(5),
            ..Self::default()
        }
    }

    fn hold_down(&self, falls: u32) -> Duration {
        self.hold_down.saturating_mul(1 << falls.saturating_sub(1).min(31)).min(self.longest_hold_down)
    }
}

/// What is said of a region at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Word {
    pub view: View,
    /// As [`Evidence::clean`].
    pub clean: u32,
    pub quality: Quality,
}

impl Word {
    pub fn new(evidence: &Evidence, quality: Quality) -> Self {
        Self { view: evidence.view, clean: evidence.clean, quality }
    }
}

/// What a verdict is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// It does not answer.
    Unreachable,
    /// Too many errors.
    Failing,
    /// p99 too high.
    Slow,
}

impl Cause {
    /// The region answers all the same.
    pub fn is_soft(self) -> bool {
        self != Self::Unreachable
    }
}

/// Where a region is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Up,
    Suspect,
    Down,
    Probation,
    Ramp { percent: u8 },
}

impl Phase {
    /// What it means for DNS answers.
    pub fn standing(self) -> Standing {
        match self {
            Self::Up => Standing::Steady,
            Self::Suspect | Self::Ramp { .. } => Standing::Unsteady,
            Self::Down | Self::Probation => Standing::Out,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up => f.write_str("UP"),
            Self::Suspect => f.write_str("SUSPECT"),
            Self::Down => f.write_str("DOWN"),
            Self::Probation => f.write_str("PROBATION"),
            Self::Ramp { percent } => write!(f, "RAMP {percent} %"),
        }
    }
}

/// Why a region moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Planned, and nothing said against it yet.
    Planned,
    /// Its probes begin to fail, or a soft rule is broken.
    Doubted,
    /// A verdict.
    Verdict(Cause),
    /// No longer doubted.
    Calm,
    /// Its hold-down is over.
    HeldDown,
    /// Its probation is.
    Clean,
    /// A step of its ramp is.
    Climbed,
    /// All regions that had their whole weight are lost.
    Needed,
    /// No region would have been left.
    Last,
    /// An operator drained it.
    Drained,
    /// An operator forced it in.
    ForcedIn,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Planned => "as planned",
            Self::Doubted => "its probes begin to fail, or it is too slow or fails too often",
            Self::Verdict(Cause::Unreachable) => "more than half of its probed pairs have failed",
            Self::Verdict(Cause::Failing) => "it failed too often for too long",
            Self::Verdict(Cause::Slow) => "it was too slow for too long",
            Self::Calm => "nothing is said against it any more",
            Self::HeldDown => "it was well for its hold-down",
            Self::Clean => "its probes were good",
            Self::Climbed => "it was well on this step",
            Self::Needed => "all regions with their whole weight are lost",
            Self::Last => "no region would be left",
            Self::Drained => "drained by an operator",
            Self::ForcedIn => "forced in by an operator",
        })
    }
}

/// A change of phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    pub from: Phase,
    pub to: Phase,
    pub why: Why,
}

/// What the next leader must know of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub phase: Phase,
    pub why: Why,
    /// How long it has been in this phase.
    pub lasted: Duration,
    pub falls: u32,
}

/// What an operator wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// It has no weight.
    Out,
    /// It does not go out.
    In,
}

/// One region. About 200 bytes; all calls are O(1).
#[derive(Clone, Debug)]
pub struct Region {
    settings: RegionSettings,
    state: State,
    since: Duration,
    why: Why,
    pin: Option<Pin>,
    /// Times that it went down and that are not forgotten.
    falls: u32,
    /// When it last had its whole weight again.
    up_since: Duration,
    /// A verdict, and since when there is one without a break.
    verdict: Option<(Cause, Duration)>,
    well_since: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Suspect,
    Down {
        hold: Duration,
    },
    Probation {
        /// The good probes in a row that do not count, because they were before.
        before: u32,
    },
    Ramp {
        step: usize,
    },
}

impl Region {
    /// Up, as planned.
    pub(super) fn new(settings: RegionSettings, now: Duration) -> Self {
        Self {
            settings,
            state: State::Up,
            since: now,
            why: Why::Planned,
            pin: None,
            falls: 0,
            up_since: now,
            verdict: None,
            well_since: None,
        }
    }

    /// As another leader left it. What was said of it has to be said again.
    pub(super) fn resume(settings: RegionSettings, record: Record, now: Duration) -> Self {
        let state = match record.phase {
            Phase::Up => State::Up,
            Phase::Suspect => State::Suspect,
            Phase::Down if record.why == Why::Drained => State::Down { hold: Duration::ZERO },
            Phase::Down => State::Down { hold: settings.hold_down(record.falls) },
            Phase::Probation => State::Probation { before: u32::MAX },
            Phase::Ramp { percent } => {
                State::Ramp { step: RAMP.iter().rposition(|step| *step <= percent).unwrap_or_default() }
            }
        };
        let since = now.saturating_sub(record.lasted);
        Self { state, since, why: record.why, falls: record.falls, ..Self::new(settings, now) }
    }

    pub(super) fn record(&self, now: Duration) -> Record {
        let lasted = now.saturating_sub(self.since);
        Record { phase: self.phase(), why: self.why, lasted, falls: self.falls_at(now) }
    }

    pub fn phase(&self) -> Phase {
        match self.state {
            State::Up => Phase::Up,
            State::Suspect => Phase::Suspect,
            State::Down { .. } => Phase::Down,
            State::Probation { .. } => Phase::Probation,
            State::Ramp { step } => Phase::Ramp { percent: percent(step) },
        }
    }

    /// Why it is in this phase.
    pub fn why(&self) -> Why {
        self.why
    }

    /// Since when.
    pub fn since(&self) -> Duration {
        self.since
    }

    pub fn pin(&self) -> Option<Pin> {
        self.pin
    }

    /// Times that it went down and that are not forgotten.
    pub fn falls(&self) -> u32 {
        self.falls
    }

    /// The share of its planned weight that it gets, 0 to 1.
    pub fn share(&self) -> f64 {
        match self.state {
            State::Up | State::Suspect => 1.0,
            State::Down { .. } | State::Probation { .. } => 0.0,
            State::Ramp { step } => f64::from(percent(step)) / 100.0,
        }
    }

    /// Hears what is said of it. It goes out from any weight only by [`Self::put_out`].
    pub(super) fn hear(&mut self, word: Word, now: Duration) -> Option<Move> {
        self.note(word, now);
        let well_for = self.well_since.map(|since| now.saturating_sub(since.max(self.since)));
        let was_well = |least: Duration| well_for.is_some_and(|time| time >= least);
        match self.state {
            State::Up if self.verdict.is_some() || word.view == View::Doubtful => {
                Some(self.enter(State::Suspect, Why::Doubted, now))
            }
            State::Suspect if was_well(self.settings.calm_after) => Some(self.enter(State::Up, Why::Calm, now)),
            State::Down { hold } if self.pin != Some(Pin::Out) && was_well(hold) => {
                Some(self.enter(State::Probation { before: word.clean }, Why::HeldDown, now))
            }
            State::Probation { before } => match self.standing_verdict(now) {
                Some(cause) => Some(self.put_out(cause, now)),
                None if word.view.is_good() => self.count_clean(before, word.clean, now),
                None => None,
            },
            State::Ramp { step } if was_well(self.settings.step_for) => {
                if step + 1 < RAMP.len() {
                    return Some(self.enter(State::Ramp { step: step + 1 }, Why::Climbed, now));
                }
                self.up_since = now;
                Some(self.enter(State::Up, Why::Climbed, now))
            }
            State::Up | State::Suspect | State::Down { .. } | State::Ramp { .. } => None,
        }
    }

    /// Whether it should go out from the weight that it has, and why.
    pub(super) fn due(&self, now: Duration) -> Option<Cause> {
        let may = matches!(self.state, State::Suspect | State::Ramp { .. }) && self.pin != Some(Pin::In);
        self.standing_verdict(now).filter(|_| may)
    }

    /// The verdict that an operator keeps it in against.
    pub(super) fn forced(&self, now: Duration) -> Option<Cause> {
        self.standing_verdict(now).filter(|_| self.pin == Some(Pin::In))
    }

    /// The verdict that has stood for `down_after`, whatever the phase.
    pub(super) fn standing_verdict(&self, now: Duration) -> Option<Cause> {
        let (cause, since) = self.verdict?;
        (now.saturating_sub(since) >= self.settings.down_after).then_some(cause)
    }

    /// Since when there is a verdict without a break.
    pub(super) fn verdict_since(&self) -> Option<Duration> {
        self.verdict.map(|(_, since)| since)
    }

    /// It goes down for a verdict.
    pub(super) fn put_out(&mut self, cause: Cause, now: Duration) -> Move {
        self.falls = self.falls_at(now).saturating_add(1);
        self.enter(State::Down { hold: self.settings.hold_down(self.falls) }, Why::Verdict(cause), now)
    }

    /// An operator wants it out until [`Self::unpin`]. It comes back by probation, without a hold-down.
    pub(super) fn drain(&mut self, now: Duration) -> Option<Move> {
        self.pin = Some(Pin::Out);
        if let State::Down { .. } = self.state {
            return None;
        }
        self.falls = self.falls_at(now);
        Some(self.enter(State::Down { hold: Duration::ZERO }, Why::Drained, now))
    }

    /// An operator wants it in until [`Self::unpin`].
    pub(super) fn force_in(&mut self, now: Duration) -> Option<Move> {
        self.pin = Some(Pin::In);
        self.admit(Why::ForcedIn, now)
    }

    /// It follows what is said of it again.
    pub(super) fn unpin(&mut self) {
        self.pin = None;
    }

    /// Gives it its whole weight at once, under suspicion. None if it has it.
    pub(super) fn admit(&mut self, why: Why, now: Duration) -> Option<Move> {
        if let State::Up | State::Suspect = self.state {
            return None;
        }
        self.up_since = now;
        Some(self.enter(State::Suspect, why, now))
    }

    fn note(&mut self, word: Word, now: Duration) {
        let cause = if word.view == View::Down { Some(Cause::Unreachable) } else { word.quality.cause() };
        self.verdict = cause.map(|cause| (cause, self.verdict.map_or(now, |(_, since)| since)));
        let well = word.view.is_good() && word.quality == Quality::Fine;
        self.well_since = well.then(|| self.well_since.unwrap_or(now));
    }

    fn count_clean(&mut self, before: u32, clean: u32, now: Duration) -> Option<Move> {
        let before = before.min(clean);
        if clean - before >= self.settings.clean {
            return Some(self.enter(State::Ramp { step: 0 }, Why::Clean, now));
        }
        self.state = State::Probation { before };
        None
    }

    fn falls_at(&self, now: Duration) -> u32 {
        let (State::Up | State::Suspect) = self.state else { return self.falls };
        let up_for = now.saturating_sub(self.up_since).as_nanos();
        let forgiven = up_for.checked_div(self.settings.forgive_after.as_nanos()).unwrap_or(u128::MAX);
        self.falls.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX))
    }

    fn enter(&mut self, state: State, why: Why, now: Duration) -> Move {
        let from = self.phase();
        (self.state, self.since, self.why) = (state, now, why);
        Move { from, to: self.phase(), why }
    }
}

fn percent(step: usize) -> u8 {
    RAMP.get(step).copied().unwrap_or(100)
}

#[cfg(test)]
#[path = "region_tests.rs"]
mod tests;
