//! When what happened, and how the time to recovery divides.
//!
//! All times count from the injection, in whole milliseconds, so that parts sum exactly to their whole:
//!
//! ```text
//! detect  T0 .. T1   first failed probe
//! judge   .. T2      verdict
//! publish .. T3      plan published
//! answer  .. T4      DNS answers changed
//! move    .. T5      95 % of clients moved
//! recover .. T6      errors back under the objective
//! ```
//!
//! A phase begins where the latest of those before it ended, and is empty if what ends it came earlier. The time to
//! recovery is the latest of all: what clients wait for and what they do not see are both over. Where nothing should
//! move, it is T6 alone.

use std::collections::BTreeMap;
use std::time::Duration;

use super::definition::Expected;

/// A moment of a drill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mark {
    Injected,
    FirstFailedProbe,
    Verdict,
    Published,
    Answers,
    Moved90,
    Moved95,
    Moved99,
    ErrorsBack,
    /// The faults are gone.
    Removed,
    FailedBack,
}

impl Mark {
    pub const ALL: [Self; 11] = [
        Self::Injected,
        Self::FirstFailedProbe,
        Self::Verdict,
        Self::Published,
        Self::Answers,
        Self::Moved90,
        Self::Moved95,
        Self::Moved99,
        Self::ErrorsBack,
        Self::Removed,
        Self::FailedBack,
    ];

    /// As reports call it. The end of the fault is no step of the way out, and has no number.
    pub fn number(self) -> &'static str {
        match self {
            Self::Injected => "T0",
            Self::FirstFailedProbe => "T1",
            Self::Verdict => "T2",
            Self::Published => "T3",
            Self::Answers => "T4",
            Self::Moved90 | Self::Moved95 | Self::Moved99 => "T5",
            Self::ErrorsBack => "T6",
            Self::Removed => "",
            Self::FailedBack => "T7",
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Injected => "fault injected",
            Self::FirstFailedProbe => "first failed probe",
            Self::Verdict => "verdict",
            Self::Published => "plan published",
            Self::Answers => "DNS answers changed",
            Self::Moved90 => "90 % of clients moved",
            Self::Moved95 => "95 % of clients moved",
            Self::Moved99 => "99 % of clients moved",
            Self::ErrorsBack => "errors back under the objective",
            Self::Removed => "fault removed",
            Self::FailedBack => "failback done",
        }
    }
}

/// What objectives are declared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Measure {
    FirstProbe,
    Verdict,
    Published,
    Answers,
    Moved90,
    Moved95,
    Moved99,
    ErrorsBack,
    /// From the end of the fault.
    Failback,
    Rto,
    Rpo,
}

impl Measure {
    pub const ALL: [Self; 11] = [
        Self::FirstProbe,
        Self::Verdict,
        Self::Published,
        Self::Answers,
        Self::Moved90,
        Self::Moved95,
        Self::Moved99,
        Self::ErrorsBack,
        Self::Failback,
        Self::Rto,
        Self::Rpo,
    ];

    /// As an operator writes it.
    pub fn key(self) -> &'static str {
        match self {
            Self::FirstProbe => "firstProbe",
            Self::Verdict => "verdict",
            Self::Published => "published",
            Self::Answers => "answers",
            Self::Moved90 => "moved90",
            Self::Moved95 => "moved95",
            Self::Moved99 => "moved99",
            Self::ErrorsBack => "errorsBack",
            Self::Failback => "failback",
            Self::Rto => "rto",
            Self::Rpo => "rpo",
        }
    }
}

/// When each mark was reached, since the injection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline(BTreeMap<Mark, Duration>);

impl Timeline {
    /// The first time counts.
    pub fn reach(&mut self, mark: Mark, at: Duration) {
        self.0.entry(mark).or_insert_with(|| whole_milliseconds(at));
    }

    /// Says anew when a mark was reached, or that it was not.
    pub fn set(&mut self, mark: Mark, at: Option<Duration>) {
        match at {
            Some(at) => drop(self.0.insert(mark, whole_milliseconds(at))),
            None => drop(self.0.remove(&mark)),
        }
    }

    pub fn at(&self, mark: Mark) -> Option<Duration> {
        self.0.get(&mark).copied()
    }

    /// The phases that the time to recovery consists of, in order. None: it is not over.
    pub fn phases(&self, expected: Expected) -> Option<Vec<(&'static str, Duration)>> {
        let failover = [
            ("detect", Mark::FirstFailedProbe),
            ("judge", Mark::Verdict),
            ("publish", Mark::Published),
            ("answer", Mark::Answers),
            ("move", Mark::Moved95),
            ("recover", Mark::ErrorsBack),
        ];
        let ends = match expected {
            Expected::Failover => &failover[..],
            Expected::Steady => &failover[5..],
        };
        let needed = |mark: &Mark| matches!(mark, Mark::Moved95 | Mark::ErrorsBack);
        if ends.iter().any(|(_, mark)| needed(mark) && self.at(*mark).is_none()) {
            return None;
        }
        let mut reached = Duration::ZERO;
        let phase = |(name, mark): &(&'static str, Mark)| {
            let from = reached;
            reached = reached.max(self.at(*mark).unwrap_or_default());
            (*name, reached - from)
        };
        Some(ends.iter().map(phase).collect())
    }

    /// The time to recovery: the sum of its phases.
    pub fn recovery(&self, expected: Expected) -> Option<Duration> {
        Some(self.phases(expected)?.into_iter().map(|(_, time)| time).sum())
    }

    /// What was measured. The loss of data is not a matter of time marks.
    pub fn measured(&self, measure: Measure, expected: Expected) -> Option<Duration> {
        match measure {
            Measure::FirstProbe => self.at(Mark::FirstFailedProbe),
            Measure::Verdict => self.at(Mark::Verdict),
            Measure::Published => self.at(Mark::Published),
            Measure::Answers => self.at(Mark::Answers),
            Measure::Moved90 => self.at(Mark::Moved90),
            Measure::Moved95 => self.at(Mark::Moved95),
            Measure::Moved99 => self.at(Mark::Moved99),
            Measure::ErrorsBack => self.at(Mark::ErrorsBack),
            Measure::Failback => Some(self.at(Mark::FailedBack)?.saturating_sub(self.at(Mark::Removed)?)),
            Measure::Rto => self.recovery(expected),
            Measure::Rpo => None,
        }
    }
}

fn whole_milliseconds(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(time: u64) -> Duration {
        Duration::from_millis(time)
    }

    #[test]
    fn phases_end_with_their_marks() {
        let mut timeline = Timeline::default();
        for (mark, at) in [
            (Mark::FirstFailedProbe, 900),
            (Mark::Verdict, 4_000),
            (Mark::Published, 4_100),
            (Mark::Answers, 4_600),
            (Mark::Moved95, 31_000),
        ] {
            timeline.reach(mark, ms(at));
        }
        assert_eq!(timeline.recovery(Expected::Failover), None, "errors go on");
        timeline.reach(Mark::ErrorsBack, ms(2_500));
        timeline.reach(Mark::ErrorsBack, ms(9_999));
        let phases = timeline.phases(Expected::Failover).unwrap();
        let times: Vec<u128> = phases.iter().map(|(_, time)| time.as_millis()).collect();
        assert_eq!(times, [900, 3_100, 100, 500, 26_400, 0], "what came before needs no time of its own");
        assert_eq!(timeline.recovery(Expected::Failover), Some(ms(31_000)));
        assert_eq!(timeline.phases(Expected::Steady).unwrap(), [("recover", ms(2_500))]);
    }

    #[test]
    fn failback_counts_from_the_end_of_the_fault() {
        let mut timeline = Timeline::default();
        timeline.reach(Mark::FailedBack, ms(100_000));
        assert_eq!(timeline.measured(Measure::Failback, Expected::Failover), None);
        timeline.reach(Mark::Removed, ms(40_000));
        assert_eq!(timeline.measured(Measure::Failback, Expected::Failover), Some(ms(60_000)));
    }

    proptest! {
        #[test]
        fn parts_sum_to_the_whole(times in proptest::collection::vec(proptest::option::of(0_u64..200_000_000), 11)) {
            let mut timeline = Timeline::default();
            for (mark, at) in Mark::ALL.into_iter().zip(times) {
                timeline.set(mark, at.map(Duration::from_micros));
            }
            if let Some(phases) = timeline.phases(Expected::Failover) {
                let sum: u128 = phases.iter().map(|(_, time)| time.as_millis()).sum();
                let last = Mark::ALL[1..9].iter().filter(|mark| !matches!(mark, Mark::Moved90 | Mark::Moved99));
                let last = last.filter_map(|mark| timeline.at(*mark)).max().unwrap();
                prop_assert_eq!(sum, last.as_millis(), "milliseconds are exact");
            }
        }
    }
}
