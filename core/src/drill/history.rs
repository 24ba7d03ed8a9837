//! The last ten runs of a drill on a region, in a few figures.
//!
//! The rule: only runs that were carried through count. A run that was refused or aborted says nothing of how long
//! anything takes.

use serde::{Deserialize, Serialize};

use super::report::{Outcome, Report};
use super::timeline::Mark;

/// Runs that count.
const MOST: usize = 10;

/// Figures of earlier runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Past {
    pub runs: usize,
    /// Of these, passed.
    pub passed: usize,
    pub rto: Option<Spread>,
    pub verdict: Option<Spread>,
    pub moved95: Option<Spread>,
    pub moved99: Option<Spread>,
    pub errors_back: Option<Spread>,
    pub rpo: Option<Spread>,
}

/// Of the runs in which it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spread {
    /// The middle one, of two the lower.
    pub p50_ms: u64,
    pub max_ms: u64,
}

impl Past {
    /// The newest ten of these reports that are of this drill on this target.
    pub fn of(reports: &[Report], drill: &str, target: Option<&str>) -> Self {
        let counts = |report: &&Report| {
            let carried = matches!(report.outcome, Outcome::Pass | Outcome::Fail);
            carried && report.drill == drill && report.target.as_deref() == target
        };
        let mut runs: Vec<&Report> = reports.iter().filter(counts).collect();
        runs.sort_by(|one, other| other.began.cmp(&one.began));
        runs.truncate(MOST);
        let spread = |figure: &dyn Fn(&Report) -> Option<u64>| Spread::of(runs.iter().filter_map(|run| figure(run)));
        let mark = |mark: Mark| spread(&|run: &Report| run.at(mark));
        Self {
            runs: runs.len(),
            passed: runs.iter().filter(|run| run.outcome == Outcome::Pass).count(),
            rto: spread(&|run| Some(run.recovery.as_ref()?.rto_ms)),
            verdict: mark(Mark::Verdict),
            moved95: mark(Mark::Moved95),
            moved99: mark(Mark::Moved99),
            errors_back: mark(Mark::ErrorsBack),
            rpo: spread(&|run| run.data.as_ref()?.rpo_ms),
        }
    }
}

impl Spread {
    fn of(figures: impl Iterator<Item = u64>) -> Option<Self> {
        let mut figures: Vec<u64> = figures.collect();
        figures.sort_unstable();
        let middle = figures.len().checked_sub(1)? / 2;
        Some(Self { p50_ms: *figures.get(middle)?, max_ms: *figures.last()? })
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::example;
    use super::*;

    fn run(second: u32, rto_ms: u64, outcome: Outcome) -> Report {
        let mut report = example();
        report.began = format!("2026-03-01T12:00:{second:02}.000Z");
        report.outcome = outcome;
        report.recovery.as_mut().unwrap().rto_ms = rto_ms;
        report
    }

    #[test]
    fn the_newest_ten_that_were_carried_through_count() {
        let mut runs: Vec<Report> =
            (0..12).map(|second| run(second, 1_000 * u64::from(second), Outcome::Pass)).collect();
        runs.push(run(50, 99_000, Outcome::Aborted));
        runs.push(Report { target: Some("us-east".into()), ..run(51, 99_000, Outcome::Pass) });
        runs.push(Report { drill: "latency".into(), ..run(52, 99_000, Outcome::Pass) });
        runs[5].outcome = Outcome::Fail;
        runs.reverse();
        let past = Past::of(&runs, "region-loss", Some("eu-west"));
        assert_eq!((past.runs, past.passed), (10, 9));
        assert_eq!(past.rto, Some(Spread { p50_ms: 6_000, max_ms: 11_000 }));
        assert_eq!(Past::of(&[], "region-loss", None), Past::default());
    }

    #[test]
    fn what_was_not_measured_in_a_run_is_left_out_of_its_spread() {
        let mut runs: Vec<Report> = (0..3).map(|second| run(second, 1_000, Outcome::Fail)).collect();
        runs[0].recovery = None;
        runs.iter_mut().for_each(|run| run.data = None);
        let past = Past::of(&runs, "region-loss", Some("eu-west"));
        assert_eq!((past.runs, past.rto, past.rpo), (3, Some(Spread { p50_ms: 1_000, max_ms: 1_000 }), None));
    }
}
