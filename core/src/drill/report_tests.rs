use super::*;
use crate::drill::builtin;
use crate::drill::definition::read;
use crate::drill::preflight::Refusal;
use crate::drill::record::{Failure, RegionSight, Request, Served, Sight};
use crate::health;
use crate::limit::Class;

const SECOND: Duration = Duration::from_secs(1);
const REGIONS: [&str; 3] = ["eu-west", "us-east", "ap-south"];

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn drill(text: &str) -> Drill {
    read(builtin::text(text).unwrap()).unwrap()
}

fn sight(version: u64, weights: [f64; 3], phase: health::Phase, failing: u64) -> Sight {
    let regions = REGIONS.iter().zip(weights).map(|(region, weight)| {
        let is_target = *region == "eu-west";
        let phase = if is_target { phase } else { health::Phase::Up };
        let failing = if is_target { failing } else { 0 };
        (name(region), RegionSight { phase: Some(phase), failing, weight })
    });
    Sight { plan_version: version, regions: regions.collect() }
}

/// A region is lost after 10 s, its verdict stands after 4 s, its ten clients move from the sixth second on, and from
/// the 20th on everything comes back.
pub fn recorded(drill: &Drill) -> Recorder {
    use health::Phase::{Down, Suspect, Up};
    let mut recorder = Recorder::new(drill, Some(name("eu-west")));
    let third = [1.0 / 3.0; 3];
    for second in 0..40_u32 {
        let now = SECOND * second;
        if second == 10 {
            recorder.injected(now);
        }
        match second {
            0..11 => recorder.sight(sight(1, third, Up, 0), now),
            11..14 => recorder.sight(sight(1, third, Suspect, 2), now),
            14 => recorder.sight(sight(1, third, Down, 4), now),
            15..38 => recorder.sight(sight(2, [0.0, 0.5, 0.5], Down, 4), now),
            _ => recorder.sight(sight(3, third, Up, 0), now),
        }
        let answered = if (16..38).contains(&second) { "us-east" } else { "eu-west" };
        recorder.answer(0, &name(answered), now);
        if second == 30 {
            recorder.removed(now);
        }
        for client in 0..30_u32 {
            let home = REGIONS[client as usize % 3];
            let moved = home == "eu-west" && (16 + client / 5..38).contains(&second);
            let first = if moved { "us-east" } else { home };
            let lost = (10..30).contains(&second) && first == "eu-west";
            let failed = lost && second < 12;
            let by = if lost { "ap-south" } else { first };
            recorder.request(&Request {
                client,
                class: Class::Normal,
                sent: now,
                took: Duration::from_millis(5),
                first: Some(name(first)),
                retries: u32::from(lost),
                outcome: if failed { Err(Failure::Unreachable) } else { Ok(Served { region: Some(name(by)) }) },
            });
        }
    }
    recorder
}

fn about() -> About {
    About {
        began: "2026-03-01T12:00:00.000Z".into(),
        data: Some(DataLoss { written: 10, rpo_ms: Some(1_000) }),
        clients: 30,
        earlier: Vec::new(),
    }
}

pub fn example() -> Report {
    let drill = drill("region-loss");
    let mut report = Report::new(&drill, &End::Completed, &recorded(&drill), about(), SECOND * 40);
    // Its figures are in other tests; here all of it counts.
    report.requests.sent = 1_200;
    report.requests.classes.get_mut("normal").unwrap().sent = 1_200;
    report
}

#[test]
fn a_run_that_met_all_objectives_passes() {
    let drill = drill("region-loss");
    let report = Report::new(&drill, &End::Completed, &recorded(&drill), about(), SECOND * 40);
    assert_eq!((report.outcome, &report.reasons), (Outcome::Pass, &Vec::new()));
    let at = |mark| report.at(mark);
    assert_eq!(
        Mark::ALL.map(at),
        [
            Some(0),
            Some(1_000),
            Some(4_000),
            Some(5_000),
            Some(6_000),
            Some(10_000),
            Some(11_000),
            Some(11_000),
            Some(1_000),
            Some(20_000),
            Some(28_000)
        ]
    );
    assert_eq!((report.requests.sent, report.requests.failed, report.requests.retried), (900, 20, 83));
    assert_eq!((report.clients.of_target, report.clients.moved), (10, 10));
    assert_eq!(report.seconds[12].at_s, 2);
    assert_eq!(report.outcome.exit_code(), 0);
}

#[test]
fn a_missed_objective_fails_the_run_and_so_does_one_that_was_not_measured() {
    let mut drill = drill("region-loss");
    drill.objectives.times.insert(Measure::Verdict, SECOND * 3);
    let mut about = about();
    about.data = Some(DataLoss { written: 10, rpo_ms: None });
    let report = Report::new(&drill, &End::Completed, &recorded(&drill), about, SECOND * 40);
    assert_eq!(report.outcome, Outcome::Fail);
    assert_eq!(report.reasons, ["verdict: 4 s, expected <= 3 s", "rpo: not measured, expected <= 300 s"]);
    assert_eq!(report.outcome.exit_code(), 1);
}

#[test]
fn a_run_after_which_not_all_is_as_before_fails() {
    let drill = drill("region-loss");
    let mut recorder = Recorder::new(&drill, Some(name("eu-west")));
    recorder.injected(SECOND);
    recorder.removed(SECOND * 9);
    let report = Report::new(&drill, &End::Completed, &recorder, about(), SECOND * 40);
    assert!(report.reasons.contains(&"not everything came back to what it was".to_owned()));
}

#[test]
fn refused_and_aborted_runs_are_no_verdict_on_objectives() {
    let drill = drill("region-loss");
    let recorder = Recorder::new(&drill, None);
    let report = Report::new(&drill, &End::Refused(vec![Refusal::NoLeader]), &recorder, about(), SECOND);
    assert_eq!((report.outcome, report.objectives.len(), report.outcome.exit_code()), (Outcome::Refused, 0, 3));
    let end = End::Aborted(crate::drill::course::Abort::Interrupted);
    let report = Report::new(&drill, &end, &recorded(&drill), about(), SECOND * 40);
    assert_eq!((report.outcome, report.outcome.exit_code()), (Outcome::Aborted, 3));
    assert_eq!(report.reasons, ["interrupted by the operator"]);
}

#[test]
fn what_is_kept_reads_back_as_it_was() {
    let report = example();
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    assert!(json.contains("\"rtoMs\":11000") && json.contains("\"outcome\":\"pass\""), "{json}");
}

#[test]
fn figures_are_short() {
    let times = [0, 7, 950, 9_990, 12_000, 12_340, 120_000].map(seconds);
    assert_eq!(times, ["0 s", "7 ms", "950 ms", "9.99 s", "12 s", "12.3 s", "120 s"]);
    assert_eq!([1.0, 0.9999, 0.99999, 0.5].map(percent), ["100 %", "99.99 %", "99.99 %", "50 %"]);
}
