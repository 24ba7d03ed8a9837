//! The figures of one run, judged against what was declared. Its JSON is what is kept.
//!
//! The rule: all times are whole milliseconds since the injection, the parts of the time to recovery sum to it, and a
//! run passes only if each declared objective was measured and met.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::course::End;
use super::definition::Drill;
use super::fault::{Fault, Names};
use super::history::Past;
use super::record::{Recorder, Second};
use super::timeline::{Mark, Measure, Timeline};
use crate::units::Name;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Pass,
    Fail,
    Refused,
    Aborted,
}

impl Outcome {
    /// Of the command that ran it. 2 is a command that makes no sense.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Pass => 0,
            Self::Fail => 1,
            Self::Refused | Self::Aborted => 3,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Refused => "refused",
            Self::Aborted => "aborted",
        }
    }
}

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub drill: String,
    pub description: String,
    pub target: Option<String>,
    /// When it began, RFC 3339.
    pub began: String,
    pub outcome: Outcome,
    /// Why it was refused, aborted or failed.
    pub reasons: Vec<String>,
    pub faults: Vec<String>,
    pub timeline: Vec<Moment>,
    /// None: it was not reached.
    pub recovery: Option<Recovery>,
    pub data: Option<DataLoss>,
    pub clients: Clients,
    /// From the injection to the end.
    pub requests: Requests,
    pub objectives: Vec<Objective>,
    pub past: Past,
    /// Each second, for pictures.
    pub seconds: Vec<Drawn>,
}

/// When a mark was reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Moment {
    pub mark: String,
    pub name: String,
    /// None: not reached, or nothing of the kind was expected.
    pub at_ms: Option<u64>,
}

/// The time to recovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Recovery {
    /// The sum of the phases.
    pub rto_ms: u64,
    pub phases: Vec<Phase>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Phase {
    pub name: String,
    pub ms: u64,
}

/// What a loss of the region would lose: heartbeat entities, one each second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DataLoss {
    /// Acknowledged in the target before the injection.
    pub written: u64,
    /// Time between the newest of them and the newest that could be read elsewhere. None: none could.
    pub rpo_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Clients {
    pub all: usize,
    /// Those that the target served before, and those of them that moved.
    pub of_target: usize,
    pub moved: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Requests {
    pub sent: u64,
    pub failed: u64,
    /// Share of the sent that was served; 1 where nothing was sent.
    pub success: f64,
    /// Attempts beyond the first of each.
    pub retried: u64,
    /// critical, high, normal, low.
    pub classes: BTreeMap<String, ClassCount>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClassCount {
    pub sent: u64,
    pub failed: u64,
    /// By what the last attempt met.
    pub reasons: BTreeMap<String, u64>,
}

/// One objective and what was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Objective {
    pub name: String,
    /// For people, with unit.
    pub limit: String,
    pub found: String,
    pub met: bool,
}

/// One second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Drawn {
    /// Since the injection; negative before it.
    pub at_s: i64,
    pub sent: u64,
    pub failed: u64,
    /// By the region that answered, and by the one that was asked first.
    pub served: BTreeMap<String, u64>,
    pub first: BTreeMap<String, u64>,
}

/// What a report needs beside what was recorded.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// RFC 3339.
    pub began: String,
    pub data: Option<DataLoss>,
    pub clients: usize,
    /// Reports of earlier runs, any number.
    pub earlier: Vec<Report>,
}

impl Report {
    pub fn new(drill: &Drill, end: &End, recorder: &Recorder, about: About, now: Duration) -> Self {
        let timeline = recorder.timeline(now);
        let requests = Requests::of(recorder);
        let data = about.data;
        let objectives = judge(drill, &timeline, data.as_ref(), &requests, recorder.weight_changes());
        let (outcome, reasons) = match end {
            End::Refused(reasons) => (Outcome::Refused, reasons.iter().map(ToString::to_string).collect()),
            End::Aborted(why) => (Outcome::Aborted, vec![why.to_string()]),
            End::Completed => missed(&objectives, &timeline),
        };
        let refused = outcome == Outcome::Refused;
        let phases = timeline.phases(drill.expects);
        let recovery = phases.filter(|_| !refused).map(|phases| Recovery {
            rto_ms: phases.iter().map(|(_, time)| milliseconds(*time)).sum(),
            phases: phases
                .iter()
                .map(|(name, time)| Phase { name: (*name).to_owned(), ms: milliseconds(*time) })
                .collect(),
        });
        let (of_target, moved) = recorder.moved();
        let target = recorder.target().map(Name::to_string);
        let past = Past::of(&about.earlier, drill.name.as_str(), target.as_deref());
        Self {
            drill: drill.name.to_string(),
            description: drill.description.clone(),
            target,
            began: about.began,
            outcome,
            reasons,
            faults: drill.faults.iter().map(|fault| told(fault, recorder.target())).collect(),
            timeline: Mark::ALL.into_iter().map(|mark| Moment::of(mark, &timeline)).collect(),
            recovery,
            data,
            clients: Clients { all: about.clients, of_target, moved },
            requests,
            objectives: if refused { Vec::new() } else { objectives },
            past,
            seconds: drawn(recorder),
        }
    }

    /// When a mark was reached, in milliseconds since the injection.
    pub fn at(&self, mark: Mark) -> Option<u64> {
        self.timeline.iter().find(|moment| moment.name == mark.name())?.at_ms
    }
}

impl Moment {
    fn of(mark: Mark, timeline: &Timeline) -> Self {
        let at_ms = timeline.at(mark).map(milliseconds);
        Self { mark: mark.number().to_owned(), name: mark.name().to_owned(), at_ms }
    }
}

impl Requests {
    fn of(recorder: &Recorder) -> Self {
        let mut requests = Self { success: 1.0, ..Self::default() };
        for (class, tally) in recorder.tallies() {
            let reasons = tally.failed.iter().map(|(why, count)| (why.name().to_owned(), *count)).collect();
            let failed = tally.failed.values().sum();
            requests.sent += tally.sent;
            requests.failed += failed;
            requests.retried += tally.retried;
            requests.classes.insert(class.name().to_owned(), ClassCount { sent: tally.sent, failed, reasons });
        }
        if requests.sent > 0 {
            // Whole millionths, rounded down: what is not all is never 1, and JSON keeps them.
            let served = u128::from(requests.sent.saturating_sub(requests.failed));
            requests.success = (served * 1_000_000 / u128::from(requests.sent)) as f64 / 1e6;
        }
        requests
    }
}

fn judge(
    drill: &Drill,
    timeline: &Timeline,
    data: Option<&DataLoss>,
    requests: &Requests,
    weight_changes: u64,
) -> Vec<Objective> {
    let time = |(measure, limit): (&Measure, &Duration)| {
        let found = match measure {
            Measure::Rpo => data.and_then(|data| data.rpo_ms).map(Duration::from_millis),
            measure => timeline.measured(*measure, drill.expects),
        };
        Objective {
            name: measure.key().to_owned(),
            limit: format!("<= {}", seconds(milliseconds(*limit))),
            found: found.map_or_else(|| "not measured".to_owned(), |found| seconds(milliseconds(found))),
            met: found.is_some_and(|found| found <= *limit),
        }
    };
    let mut objectives: Vec<Objective> = drill.objectives.times.iter().map(time).collect();
    if let Some(least) = drill.objectives.success {
        objectives.push(Objective {
            name: "success".to_owned(),
            limit: format!(">= {}", percent(least.ratio())),
            found: if requests.sent > 0 { percent(requests.success) } else { "not measured".to_owned() },
            met: requests.sent > 0 && requests.success >= least.ratio(),
        });
    }
    if let Some(most) = drill.objectives.weight_changes {
        objectives.push(Objective {
            name: "weightChanges".to_owned(),
            limit: format!("<= {most}"),
            found: weight_changes.to_string(),
            met: weight_changes <= most,
        });
    }
    objectives
}

fn missed(objectives: &[Objective], timeline: &Timeline) -> (Outcome, Vec<String>) {
    let missed = objectives.iter().filter(|objective| !objective.met);
    let mut reasons: Vec<String> = missed
        .map(|objective| format!("{}: {}, expected {}", objective.name, objective.found, objective.limit))
        .collect();
    if timeline.at(Mark::FailedBack).is_none() {
        reasons.push("not everything came back to what it was".to_owned());
    }
    if reasons.is_empty() { (Outcome::Pass, reasons) } else { (Outcome::Fail, reasons) }
}

fn told(fault: &Fault, target: Option<&Name>) -> String {
    let names = |names: &[Names]| {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let names = names.join(", ");
        target.map_or_else(|| names.clone(), |target| names.replace("$target", target.as_str()))
    };
    let from = if fault.from.is_empty() { String::new() } else { format!(", from {}", names(&fault.from)) };
    format!("{} {}{from}", fault.act, names(&fault.on))
}

fn drawn(recorder: &Recorder) -> Vec<Drawn> {
    let injected = recorder.injected_at().map_or(0, |at| at.as_secs());
    let injected = i64::try_from(injected).unwrap_or(i64::MAX);
    let counts = |counts: &BTreeMap<Name, u64>| counts.iter().map(|(name, count)| (name.to_string(), *count)).collect();
    let one = |(place, second): (usize, &Second)| Drawn {
        at_s: i64::try_from(place).unwrap_or(i64::MAX).saturating_sub(injected),
        sent: second.sent,
        failed: second.failed,
        served: counts(&second.served),
        first: counts(&second.first),
    };
    recorder.seconds().iter().enumerate().map(one).collect()
}

/// Milliseconds, for people.
pub fn seconds(ms: u64) -> String {
    match ms {
        1..1_000 => format!("{ms} ms"),
        0..10_000 => format!("{} s", (ms / 10) as f64 / 100.0),
        _ => format!("{} s", (ms / 100) as f64 / 10.0),
    }
}

/// A ratio in percent, for people. Rounded down, so that what is not all is never 100 %.
pub fn percent(ratio: f64) -> String {
    let hundredths = (ratio * 10_000.0 + 1e-6).floor() / 100.0;
    format!("{hundredths} %")
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "report_tests.rs"]
pub(super) mod tests;
