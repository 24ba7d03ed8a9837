//! Who may write intent, how it spreads, and how it is taken back.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use spillway_figures::{Goal, record};
use spillway_tests::harness::eventually;
use spillway_tests::harness::fleet::{Fleet, Store};
use spillway_tests::harness::region::text;

use super::on_etcd;

/// Until every node serves this version.
async fn until_served(fleet: &Fleet, version: u64, within: Duration) -> Duration {
    let begun = Instant::now();
    eventually(&format!("all nodes serve version {version}"), within, async || {
        let status = fleet.try_status()?;
        let nodes = status["nodes"].as_array()?;
        let serve = nodes.iter().all(|node| node["serving"]["snapshot_version"] == version);
        (nodes.len() >= 7 && serve).then_some(())
    })
    .await;
    begun.elapsed()
}

fn version(status: &Value) -> u64 {
    status["intent_version"].as_u64().expect("a version")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_rolls_out_and_back_and_every_node_follows() {
    let mut fleet = Fleet::new("rollout", Store::Sqlite);
    fleet.start().await;
    let first = version(&fleet.status());
    until_served(&fleet, first, Duration::from_secs(30)).await;
    fleet.edit("tenants.yaml", "Uses the model", "Uses the model still");
    fleet.apply("a description").await;
    let spread = until_served(&fleet, first + 1, Duration::from_secs(30)).await;
    record("control.rollout.converged", spread.as_secs_f64(), "s", Goal::AtMost(2.0));
    fleet.operator_ok(&["rollback", &first.to_string(), "-m", "back"]);
    let back = until_served(&fleet, first + 2, Duration::from_secs(30)).await;
    assert!(record("control.rollback.converged", back.as_secs_f64(), "s", Goal::AtMost(10.0)));
    let history = fleet.operator_ok(&["history"]);
    assert!(history.contains("a description") && history.contains("back"), "{history}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_paused_is_refused_and_another_one_leads() {
    let (mut fleet, _run) = on_etcd("paused-leader");
    fleet.start().await;
    let before = fleet.status();
    until_served(&fleet, version(&before), Duration::from_secs(30)).await;
    let leader = before["leader"].as_str().expect("a leader").to_owned();
    let at = fleet.controls.iter().position(|node| node.name == leader).expect("one of ours");
    // What is taken here is nobody's to ask; the operator asks another one.
    let stopped = fleet.controls[at].process.take().expect("it runs");
    stopped.signal(Signal::SIGSTOP);
    let paused = Instant::now();
    let (next, epoch) = eventually("another one leads", Duration::from_secs(30), async || {
        let status = fleet.try_status()?;
        let next = status["leader"].as_str().filter(|next| !next.is_empty() && *next != leader)?.to_owned();
        Some((next, status["epoch"].as_u64()?))
    })
    .await;
    record("control.leader_paused.next_leads", paused.elapsed().as_secs_f64(), "s", Goal::AtMost(15.0));
    assert!(epoch > before["epoch"].as_u64().expect("an epoch"));

    // Nodes whose stream is half-open at the paused one find the next one.
    fleet.edit("tenants.yaml", "Uses the model", "Uses the model still");
    fleet.apply("by the next leader").await;
    let second = version(&fleet.status());
    until_served(&fleet, second, Duration::from_secs(60)).await;
    record("control.leader_paused.all_follow_the_next", paused.elapsed().as_secs_f64(), "s", Goal::AtMost(30.0));

    tokio::time::sleep(Duration::from_secs(60).saturating_sub(paused.elapsed())).await;
    stopped.signal(Signal::SIGCONT);
    // It wakes as a leader of its own belief: what it is told now is the next leader's work, or nobody's.
    fleet.edit("tenants.yaml", "Uses the model still", "Uses the model yet");
    let folder = fleet.write_files();
    let late = fleet.operator_at(&fleet.controls[at], &["apply", "-f", text(&folder), "-m", "late"]);
    let status = fleet.status();
    assert_eq!((status["leader"].as_str(), status["epoch"].as_u64()), (Some(&*next), Some(epoch)), "{status}");
    let newest = version(&status);
    assert_eq!(newest, second + u64::from(late.status.success()), "{late:?}");
    if late.status.success() {
        let author = eventually("what it was told is in the trail", Duration::from_secs(10), async || {
            let trail: Value = serde_json::from_slice(&fleet.operator(&["audit", "show", "-o", "json"]).stdout).ok()?;
            let mut records = trail["records"].as_array()?.iter();
            Some(records.find(|record| record["message"] == "late")?["node"].as_str()?.to_owned())
        })
        .await;
        assert_eq!(author, next, "the one that was paused wrote nothing");
    }
    until_served(&fleet, newest, Duration::from_secs(30)).await;
    fleet.controls[at].process = Some(stopped);
}
