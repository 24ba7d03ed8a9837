//! One leader and the next, followers, and a store that is away.

use std::collections::BTreeMap;
use std::time::Duration;

use spillway_runtime::audit::Audit;
use spillway_runtime::plan::open;
use spillway_runtime::telemetry::Metrics;
use tokio::sync::watch;

use super::world::*;
use crate::distribution::Report;
use crate::store::{Fence, Store, StoreSettings};
use crate::verdicts::stored;

#[tokio::test]
async fn the_next_leader_goes_on_and_the_last_one_is_refused() {
    let mut world = World::new(Some(400)).await;
    world.run(SECOND * 30).await;
    world.kill(1);
    world.until("us is out", SECOND * 10, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    world.run(SECOND * 120).await;
    let before = world.plans.last().unwrap().1.clone();
    assert!(before.plan.shed.share > 0.1, "900/s for 800");

    // Another process opens the file, wins, and knows nothing of its own.
    let path = world.folder.path().join("control.db");
    let other = Store::open(&StoreSettings::Sqlite(path)).await.unwrap();
    let won = other.campaign(&name("d"), "127.0.0.1:2").await.unwrap();
    let leading = watch::Sender::new(Some(won.fence.clone()));
    let (_outside, mut next, told) = judging(&other, &leading, Some(400), &Metrics::new("test"), Audit::off());
    let times = world.times();
    next.tick(times).await;
    let plan = open(&told.plan().borrow().clone().unwrap()).unwrap();
    assert!(plan.plan.version > before.plan.version && plan.epoch > before.epoch);
    assert_eq!(plan.plan.regions, before.plan.regions, "nothing moves because the leader does");
    let us = told.findings().regions.iter().find(|status| status.region == "us").unwrap().clone();
    assert_eq!((us.phase.as_str(), us.why.as_str()), ("down", "more than half of its probed pairs have failed"));

    // The old one has not noticed. What it judges now is refused by the store.
    let plans = world.plans.len();
    world.loads = [(10, 0); 3];
    world.run(SECOND * 200).await;
    assert!(world.plans[plans..].iter().all(|(_, plan)| plan.epoch == won.fence.epoch), "told is only what is written");
    assert!(world.metrics.encode().unwrap().contains("spillway_control_plan_writes_total{outcome=\"fenced\"} 1"));
    let stored = stored::Stored::decode(other.get("plan").await.unwrap().unwrap().bytes).unwrap();
    assert_eq!(open(&stored.plan).unwrap().epoch, won.fence.epoch);
}

/// The leader goes; who has heard all that it heard leads so many seconds later.
async fn succeed(world: &mut World, follows: &watch::Sender<Option<Fence>>, seconds: u32) -> Fence {
    drop(world.leadership.take());
    world.leading.send_replace(None);
    world.run(SECOND * seconds).await;
    let won = world.store.campaign(&name("d"), "127.0.0.1:2").await.unwrap();
    let fence = won.fence.clone();
    world.leadership = Some(won);
    follows.send_replace(Some(fence.clone()));
    fence
}

#[tokio::test]
async fn what_died_while_nobody_led_is_out_as_soon_as_somebody_does() {
    let mut world = World::new(None).await;
    let follows = watch::Sender::new(None);
    let (_outside, heir, _told) = judging(&world.store, &follows, None, &Metrics::new("test"), Audit::off());
    world.heir = Some(heir);
    world.run(SECOND * 40).await;
    world.kill(1);
    let fence = succeed(&mut world, &follows, 6).await;
    near(world.weights(), [THIRD; 3]);
    let took = world.until("its plan stands", SECOND, |plan| plan.epoch == fence.epoch).await;
    assert!(took <= Duration::from_millis(500), "{took:?}");
    near(world.weights(), [THIRD; 3]);
    let took = world.until("us is out", SECOND * 5, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    assert!(took <= SECOND * 2, "{took:?}");
}

#[tokio::test]
async fn minutes_of_errors_count_for_the_next_leader_too() {
    let mut world = World::new(None).await;
    let follows = watch::Sender::new(None);
    let (_outside, heir, _told) = judging(&world.store, &follows, None, &Metrics::new("test"), Audit::off());
    world.heir = Some(heir);
    world.run(SECOND * 30).await;
    world.errors[1] = 30;
    world.run(SECOND * 160).await;
    succeed(&mut world, &follows, 10).await;
    assert_eq!(world.moves(), 0);
    let took = world.until("us is out", SECOND * 60, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    println!("a region that failed for 170 s was out {took:?} after the next leader began");
}

#[tokio::test]
async fn without_the_store_nothing_new_is_told_and_with_it_at_once() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    let plans = world.plans.len();
    let lock = rusqlite::Connection::open(world.folder.path().join("control.db")).unwrap();
    lock.execute_batch("BEGIN EXCLUSIVE").unwrap();
    world.kill(1);
    world.run(Duration::from_millis(4_900)).await;
    assert_eq!(world.plans.len(), plans);
    assert!(world.metrics.encode().unwrap().contains("writes_total{outcome=\"failed\"}"));
    lock.execute_batch("COMMIT").unwrap();
    let took = world.until("us is out", SECOND * 5, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    assert!(took <= SECOND * 2, "it was judged all the time: {took:?}");
}

#[tokio::test]
async fn who_does_not_lead_tells_what_the_leader_wrote() {
    let mut world = World::new(None).await;
    world.run(SECOND * 20).await;
    let follows = watch::Sender::new(None);
    let (_outside, mut follower, told) = judging(&world.store, &follows, None, &Metrics::new("test"), Audit::off());
    follower.tick(world.times()).await;
    assert_eq!(*told.plan().borrow(), *world.verdicts.plan().borrow());
    world.kill(1);
    world.run(SECOND * 10).await;
    follower.tick(world.times()).await;
    assert_eq!(*told.plan().borrow(), *world.verdicts.plan().borrow());
    let us = told.findings().regions.iter().find(|status| status.region == "us").unwrap().clone();
    assert_eq!((us.phase.as_str(), us.weight), ("down", 0.0));
    // It resigns; the leadership of before says nothing any more.
    drop(world.leadership.take());
    world.leading.send_replace(None);
    let plans = world.plans.len();
    world.lives[1] = Life::Well;
    world.run(SECOND * 700).await;
    assert_eq!(world.plans.len(), plans);
}

/// The task itself, in real time: it judges without being called, and ends with the drain.
#[tokio::test]
async fn the_task_judges_by_itself_and_ends_with_the_drain() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
    let leadership = store.campaign(&name("c"), "127.0.0.1:1").await.unwrap();
    let leading = watch::Sender::new(None);
    let (outside, judging, verdicts) = judging(&store, &leading, None, &Metrics::new("test"), Audit::off());
    let drain = spillway_runtime::drain::Drain::new(SECOND);
    let task = tokio::spawn(judging.run(drain.clone()));
    let mut plan = verdicts.plan();
    assert!(plan.borrow().is_none());
    leading.send_replace(Some(leadership.fence.clone()));
    tokio::time::timeout(SECOND * 5, plan.wait_for(Option::is_some)).await.unwrap().unwrap();
    let statuses: BTreeMap<String, String> =
        verdicts.findings().regions.iter().map(|status| (status.region.clone(), status.phase.clone())).collect();
    assert_eq!(statuses.len(), 3);
    let mut nudges = outside.nudges.subscribe();
    outside.reports.send(Report::Left(id("us/gateway/g"))).await.unwrap();
    tokio::time::timeout(SECOND * 5, nudges.recv()).await.unwrap().unwrap();
    drain.stop();
    tokio::time::timeout(SECOND * 5, task).await.unwrap().unwrap();
}
