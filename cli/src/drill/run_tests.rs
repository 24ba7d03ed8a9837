use std::sync::Arc;
use std::time::Duration;

use spillway_core::drill::{Board, Drill, Mark, Outcome, Report, builtin, definition};
use spillway_core::units::Name;
use spillway_proto::control::Override;
use tokio::sync::mpsc;

use super::run::{Setup, run};
use super::support::{Fleet, Truth, notice, since_start};
use crate::dev::injector::{Serving, serve};
use crate::injector::Injector;
use crate::injector::relay::Links;

async fn stand() -> (Fleet, Serving) {
    let fleet = Fleet::start().await;
    let links = Links::new(fleet.gateways.clone());
    let injector = Injector::new(fleet.gateways.clone(), links);
    let serving = serve(injector, fleet.domain.folder.path()).await.unwrap();
    (fleet, serving)
}

fn drill() -> Drill {
    let text = builtin::text("region-loss").unwrap().replace("settle: 10s", "settle: 2s").replace("150s", "40s");
    let mut drill = definition::read(&text).unwrap();
    drill.load.clients = 30;
    drill.load.interval = Duration::from_millis(250);
    drill
}

fn setup(fleet: &Fleet, drill: Drill) -> Setup {
    let target = Some(Name::parse("eu-west").unwrap());
    Setup { drill, target, place: fleet.place.clone(), runs: fleet.domain.folder.path().join("drills") }
}

async fn reaches(truth: &Truth, stage: &str) {
    let reached = async {
        while truth.running().is_none_or(|drill| drill.stage != stage) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), reached).await.unwrap_or_else(|_| panic!("no stage '{stage}'"));
}

async fn finished(setup: Setup, interrupts: mpsc::Receiver<()>) -> Report {
    tokio::time::timeout(Duration::from_secs(90), run(setup, interrupts)).await.expect("it ends").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_region_is_measured_from_its_loss_to_its_return() {
    let (fleet, _serving) = stand().await;
    let (_quiet, interrupts) = mpsc::channel(1);
    let report = finished(setup(&fleet, drill()), interrupts).await;
    eprintln!("{}", spillway_core::drill::text::text(&report));
    assert_eq!((report.outcome, &report.reasons), (Outcome::Pass, &Vec::new()));
    let at = |mark| report.at(mark).unwrap_or_else(|| panic!("{mark:?} was not reached"));
    // A machine that stands still sees all of it later, and nothing of it earlier.
    let late = 20_000;
    assert!((1_000..late).contains(&at(Mark::FirstFailedProbe)), "the table says 1 s");
    assert!((2_000..late).contains(&at(Mark::Verdict)), "the table says 2 s");
    assert!(at(Mark::FirstFailedProbe) <= at(Mark::Verdict) && at(Mark::Verdict) <= at(Mark::Published));
    assert!((2_000..late).contains(&at(Mark::Answers)));
    assert!((2_000..late).contains(&at(Mark::Moved99)), "a TTL is 2 s");
    assert!(at(Mark::ErrorsBack) < late, "clients know a second address");
    assert!(at(Mark::FailedBack) > at(Mark::Removed));
    let recovery = report.recovery.unwrap();
    assert_eq!(recovery.phases.iter().map(|phase| phase.ms).sum::<u64>(), recovery.rto_ms);
    assert_eq!(report.data.unwrap().rpo_ms, Some(0), "these regions share their rows");
    assert_eq!((report.clients.of_target, report.clients.moved), (10, 10));
    assert!(report.requests.retried > 0 && report.requests.classes.len() == 4);
    let kept = super::keep::earlier(&fleet.domain.folder.path().join("drills"));
    assert_eq!(kept.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn t65_a_drill_over_an_override_is_refused_before_anything_is_broken() {
    let (fleet, _serving) = stand().await;
    fleet.truth.overrides.lock().push(Override { region: "ap-south".into(), ..Override::default() });
    let (_quiet, interrupts) = mpsc::channel(1);
    let report = finished(setup(&fleet, drill()), interrupts).await;
    assert_eq!(report.outcome, Outcome::Refused);
    assert_eq!(report.reasons, ["there is an override for the region 'ap-south'"]);
    assert_eq!((report.requests.sent, report.at(Mark::Injected)), (0, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn t65_a_guard_breaks_a_drill_off_and_the_region_comes_back() {
    let (fleet, _serving) = stand().await;
    let mut drill = drill();
    drill.guards.blind_for = Duration::from_secs(2);
    let truth = Arc::clone(&fleet.truth);
    let (_quiet, interrupts) = mpsc::channel(1);
    let mute = tokio::spawn(async move {
        reaches(&truth, "observe").await;
        *truth.mute.lock() = true;
        reaches(&truth, "recover").await;
        *truth.mute.lock() = false;
    });
    let report = finished(setup(&fleet, drill), interrupts).await;
    mute.await.unwrap();
    assert_eq!(report.outcome, Outcome::Aborted);
    assert!(report.reasons[0].starts_with("a guard: the control plane said nothing"), "{:?}", report.reasons);
    assert!(report.at(Mark::Removed).is_some() && report.at(Mark::FailedBack).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_end_a_drill() {
    let (fleet, _serving) = stand().await;
    let (interrupt, interrupts) = mpsc::channel(1);
    let truth = Arc::clone(&fleet.truth);
    let wait = tokio::spawn(async move {
        // Everybody is told before anything happens.
        reaches(&truth, "preflight").await;
        // Another node leads, and knows of nothing.
        *truth.drills.lock() = Board::default();
        reaches(&truth, "preflight").await;
        assert_eq!(truth.running().unwrap().drill, "region-loss");
        reaches(&truth, "observe").await;
        interrupt.send(()).await.unwrap();
        interrupt
    });
    let report = finished(setup(&fleet, drill()), interrupts).await;
    assert_eq!(fleet.truth.running(), None, "it is over, and nobody has to wait for its lease");
    let _open = wait.await.unwrap();
    assert!(report.at(Mark::FailedBack).is_some());
    assert_eq!((report.outcome, report.reasons), (Outcome::Aborted, vec!["interrupted by the operator".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn t65_a_second_drill_is_refused_and_one_that_was_displaced_is_broken_off() {
    let (fleet, _serving) = stand().await;
    fleet.truth.drills.lock().announce(notice(1, "latency", "observe"), since_start()).unwrap();
    let (_quiet, interrupts) = mpsc::channel(1);
    let report = finished(setup(&fleet, drill()), interrupts).await;
    assert_eq!(report.outcome, Outcome::Refused);
    assert_eq!(report.reasons, ["the drill 'latency' runs: see spillway status"]);
    assert_eq!((report.requests.sent, report.at(Mark::Injected)), (0, None));

    *fleet.truth.drills.lock() = Board::default();
    let truth = Arc::clone(&fleet.truth);
    let displace = tokio::spawn(async move {
        reaches(&truth, "observe").await;
        let mut drills = truth.drills.lock();
        *drills = Board::default();
        drills.announce(notice(2, "latency", "inject"), since_start()).unwrap();
    });
    let (_quiet, interrupts) = mpsc::channel(1);
    let report = finished(setup(&fleet, drill()), interrupts).await;
    displace.await.unwrap();
    assert_eq!(
        (report.outcome, report.reasons.clone()),
        (Outcome::Aborted, vec!["the control plane: the drill latency runs".to_owned()])
    );
    assert!(report.at(Mark::Removed).is_some());
    assert_eq!(fleet.truth.running().map(|drill| drill.lease), Some(2), "it ended itself, not the other");
}
