//! One call for all who ask the same, on any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use spillway_core::cache::key::Key;
use spillway_core::limit::Class;
use spillway_runtime::telemetry::Metrics as Registry;
use tonic::Code;

use super::flight::{Began, Needed, Turn};
use super::memory::{Entered, Entering, Memory};
use super::metrics::Metrics;
use super::tests::{Ask, MISS, World, ask, entry, key, said};
use crate::errors::Refusal;
use crate::exchange::Making;

#[tokio::test]
async fn t02_a_collision_does_not_share_a_call_either() {
    let metrics = Arc::new(Metrics::new(&Registry::new("test")));
    let memory = Arc::new(Memory::new(1 << 20, metrics));
    let one = key("one");
    let other = Key { material: Bytes::from_static(b"another"), ..one.clone() };
    let enter = |key: &Key| {
        memory.enter(Entering {
            key,
            about: &entry("-", Bytes::new()).about,
            began: Began { at: Duration::ZERO, tick: None, number: None, mark: 0, class: Class::Normal },
            needed: Needed::default(),
            waits: true,
            is_fresh: &|_| true,
            is_purged: &|_, _| false,
        })
    };
    let Some(Entered::Leads(first)) = enter(&one) else { panic!("nobody calls") };
    let Some(Entered::Leads(second)) = enter(&other) else { panic!("another key") };
    drop((first, second));
    assert_eq!(memory.flights(), 0);
}

#[tokio::test]
async fn who_comes_before_others_does_not_wait_behind_them() {
    let memory = Arc::new(Memory::new(1 << 20, Arc::new(Metrics::new(&Registry::new("test")))));
    let enter = |class| {
        memory.enter(Entering {
            key: &key("one"),
            about: &entry("-", Bytes::new()).about,
            began: Began { at: Duration::ZERO, tick: None, number: None, mark: 0, class },
            needed: Needed { class, ..Needed::default() },
            waits: true,
            is_fresh: &|_| true,
            is_purged: &|_, _| false,
        })
    };
    let Some(Entered::Leads(low)) = enter(Class::Low) else { panic!("nobody calls") };
    let Some(Entered::Waits(waiter)) = enter(Class::Low) else { panic!("an equal waits") };
    let Some(Entered::Leads(critical)) = enter(Class::Critical) else { panic!("it calls by itself") };
    let Some(Entered::Waits(normal)) = enter(Class::Normal) else { panic!("it may wait for one of a higher class") };
    drop(low);
    assert!(matches!(waiter.await, Ok(Turn::Lead(_))), "who waited for the first is not forgotten");
    // Handed on, it goes to the most important who waits; who comes then judges by that one.
    let Some(Entered::Waits(high)) = enter(Class::High) else { panic!("it waits for the critical one") };
    drop(critical);
    let Ok(Turn::Lead(high)) = high.await else { panic!("it comes before the normal one") };
    let Some(Entered::Leads(critical)) = enter(Class::Critical) else { panic!("it calls by itself") };
    drop((normal, high, critical));
    assert_eq!(memory.flights(), 0);
}

/// `count` equal requests on four threads, each with a runtime of its own.
fn at_once(
    world: &Arc<World>,
    count: usize,
    ask: &Ask,
    model: impl AsyncFn() -> Result<(&'static str, Making), Refusal> + Clone + Send + 'static,
) -> Vec<(Result<String, Refusal>, String)> {
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (world, ask, model) = (world.clone(), ask.clone(), model.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let all = (0..count / 4).map(|_| world.infer(&ask, async || model().await));
                runtime.block_on(futures_util::future::join_all(all))
            })
        })
        .collect();
    threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
}

#[test]
fn t11_a_thousand_identical_misses_are_one_call() {
    let world = Arc::new(World::new());
    let model = async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(("one", said()))
    };
    let answers = at_once(&world, 1_000, &ask("plain", 1.0), model);
    assert_eq!(answers.len(), 1_000);
    assert!(answers.iter().all(|(answer, _)| matches!(answer, Ok(text) if text == "one")));
    let collapsed = answers.iter().filter(|(_, status)| status.contains("collapsed; stored")).count();
    assert!(collapsed > 900, "{collapsed}");
    assert_eq!((world.calls(), world.results.memory.flights()), (1, 0));
}

#[test]
fn t11_a_leader_that_is_cancelled_hands_over() {
    let world = Arc::new(World::new());
    let cancelled = Arc::new(AtomicU64::new(0));
    let counted = cancelled.clone();
    // The first three are dropped in the middle of their calls.
    let model = async move || {
        let first = counted.fetch_add(1, Ordering::SeqCst) < 3;
        tokio::time::sleep(Duration::from_millis(100)).await;
        if first { Err(Refusal::Cancelled) } else { Ok(("one", said())) }
    };
    let answers = at_once(&world, 400, &ask("plain", 1.0), model);
    let failed = answers.iter().filter(|(answer, _)| answer.is_err()).count();
    assert_eq!((failed, world.calls(), world.results.memory.flights()), (3, 4, 0));
    assert_eq!(world.results.metrics.handed_over.get(), 3);
}

#[tokio::test]
async fn t11_a_dropped_leader_hands_over_and_dropped_followers_are_passed_over() {
    let world = Arc::new(World::new());
    let ask = ask("plain", 1.0);
    let hangs = async || std::future::pending().await;
    let leader = tokio::spawn({
        let (world, ask) = (world.clone(), ask.clone());
        async move { world.infer(&ask, hangs).await }
    });
    while world.calls() == 0 {
        tokio::task::yield_now().await;
    }
    let follow = |text: &'static str| {
        let (world, ask) = (world.clone(), ask.clone());
        tokio::spawn(async move { world.get(&ask, text, said()).await })
    };
    let (gone, stays) = (follow("gone"), follow("stays"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    gone.abort();
    leader.abort();
    assert_eq!(stays.await.unwrap(), ("stays".into(), MISS.into()));
    assert_eq!((world.calls(), world.results.memory.flights()), (2, 0));
}

#[test]
fn t11_a_model_that_fails_is_tried_once_more_and_then_fails_for_all() {
    let world = Arc::new(World::new());
    let model = async || {
        tokio::time::sleep(Duration::from_millis(200)).await;
        Err(Refusal::PodLost)
    };
    let answers = at_once(&world, 1_000, &ask("plain", 1.0), model);
    assert!(answers.iter().all(|(answer, _)| matches!(answer, Err(Refusal::PodLost))));
    assert_eq!((world.calls(), world.results.memory.flights()), (2, 0));
}

#[test]
fn what_is_wrong_with_a_request_is_wrong_with_all_of_its_kind() {
    let world = Arc::new(World::new());
    let model = async || {
        tokio::time::sleep(Duration::from_millis(200)).await;
        Err(Refusal::Sidecar { status: Code::FailedPrecondition, code: "missing-feature".into(), message: "-".into() })
    };
    let answers = at_once(&world, 400, &ask("plain", 1.0), model);
    assert!(answers.iter().all(|(answer, _)| matches!(answer, Err(Refusal::Sidecar { .. }))));
    assert_eq!(world.calls(), 1);
}

#[tokio::test]
async fn who_waits_waits_no_longer_than_its_own_deadline() {
    let world = Arc::new(World::new());
    let slow = {
        let world = world.clone();
        tokio::spawn(async move {
            let model = async || {
                tokio::time::sleep(Duration::from_millis(500)).await;
                Ok(("slow", said()))
            };
            world.infer(&ask("plain", 1.0), model).await.0.unwrap()
        })
    };
    while world.calls() == 0 {
        tokio::task::yield_now().await;
    }
    let hasty = Ask { patience: Duration::from_millis(50), ..ask("plain", 1.0) };
    let began = Instant::now();
    let (answer, _) = world.infer(&hasty, async || panic!("not asked")).await;
    assert!(matches!(answer, Err(Refusal::Deadline)) && began.elapsed() < Duration::from_millis(400));
    assert_eq!(slow.await.unwrap(), "slow");
}

#[tokio::test]
async fn a_stampede_at_expiry_is_one_call_and_stale_answers_meanwhile() {
    let world = Arc::new(World::new());
    let ask = ask("brief", 1.0);
    world.get(&ask, "old", said()).await;
    tokio::time::sleep(Duration::from_millis(120)).await;
    let all = (0..200).map(|_| {
        world.infer(&ask, async || {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok(("new", said()))
        })
    });
    let answers = futures_util::future::join_all(all).await;
    assert!(answers.iter().all(|(answer, _)| matches!(answer, Ok(text) if text == "old")));
    assert_eq!(world.calls(), 2);
    assert_eq!(world.get(&ask, "-", said()).await.0, "new");
}
