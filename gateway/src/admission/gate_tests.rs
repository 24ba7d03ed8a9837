use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64};

use spillway_runtime::telemetry::Metrics;

use super::*;

const LONG: Duration = Duration::from_secs(600);

fn gate(in_flight: u32, queue: u32) -> (Arc<Gate>, PoolGate) {
    let settings = BulkheadSettings { in_flight, queue, tenant_in_flight: in_flight, tenant_queue: queue };
    let metrics = Arc::new(GateMetrics::new(&Metrics::new("test")));
    let clock = Clock::start();
    (Arc::new(Gate::new(clock, metrics.clone(), settings)), PoolGate::new(clock, metrics))
}

fn guest(tenant: u32, class: Class) -> Guest {
    Guest { class, tenant, bound: None }
}

impl Gate {
    fn counts(&self) -> (u32, usize, usize) {
        let inside = self.inside.lock();
        (inside.bulkhead.in_flight(), inside.bulkhead.waiting(), inside.waiting.len())
    }
}

/// Asks in a task of its own, and returns once it waits.
async fn waiter(
    waits_at: &Gate,
    gate: &Arc<Gate>,
    pool: &Arc<PoolGate>,
    guest: Guest,
    left: Duration,
) -> tokio::task::JoinHandle<Result<Place, Why>> {
    let (own, pool) = (gate.clone(), pool.clone());
    let waiting = waits_at.counts().1;
    let deadline = gate.clock.now() + left;
    let task = tokio::spawn(async move { enter(&own, &pool, &guest, deadline).await });
    while waits_at.counts().1 == waiting && !task.is_finished() {
        tokio::task::yield_now().await;
    }
    task
}

#[tokio::test]
async fn a_place_comes_back_and_goes_to_the_most_important() {
    let (gate, pool) = gate(1, 9);
    let pool = Arc::new(pool);
    let first = enter(&gate, &pool, &guest(1, Class::Normal), LONG).await.unwrap();
    let low = waiter(&gate, &gate, &pool, guest(1, Class::Low), LONG).await;
    let high = waiter(&gate, &gate, &pool, guest(2, Class::High), LONG).await;
    assert_eq!(gate.counts(), (1, 2, 2));
    drop(first);
    let second = high.await.unwrap().unwrap();
    assert!(!low.is_finished());
    assert_eq!(gate.counts(), (1, 1, 1));
    drop(second);
    drop(low.await.unwrap().unwrap());
    assert_eq!(gate.counts(), (0, 0, 0));
    assert_eq!(gate.metrics.waiting.get(), 0);
}

#[tokio::test]
async fn a_full_queue_refuses_or_gives_up_the_least_important() {
    let (gate, pool) = gate(1, 1);
    let pool = Arc::new(pool);
    let first = enter(&gate, &pool, &guest(1, Class::Low), LONG).await.unwrap();
    let low = waiter(&gate, &gate, &pool, guest(1, Class::Low), LONG).await;
    assert_eq!(enter(&gate, &pool, &guest(2, Class::Low), LONG).await.err(), Some(Why::Full));
    let important = guest(2, Class::Critical);
    let critical = enter(&gate, &pool, &important, LONG);
    let (displaced, critical) = tokio::join!(
        async {
            let displaced = low.await.unwrap().err();
            drop(first);
            displaced
        },
        critical
    );
    assert_eq!(displaced, Some(Why::Full));
    drop(critical.unwrap());
    assert_eq!(gate.counts(), (0, 0, 0));
}

#[tokio::test]
async fn t53_who_cannot_be_served_in_time_is_told_in_time() {
    let (gate, pool) = gate(1, 9);
    let pool = Arc::new(pool);
    while gate.inside.lock().expected.is_zero() {
        gate.inside.lock().learn(Duration::from_millis(100), gate.clock.now());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let soon = gate.clock.now() + Duration::from_millis(90);
    assert_eq!(enter(&gate, &pool, &guest(1, Class::Normal), soon).await.err(), Some(Why::TooShort));
    let first = enter(&gate, &pool, &guest(1, Class::Normal), LONG).await.unwrap();
    let began = gate.clock.now();
    let late = waiter(&gate, &gate, &pool, guest(1, Class::Normal), Duration::from_millis(150)).await;
    assert_eq!(late.await.unwrap().err(), Some(Why::TooLate), "though nobody leaves");
    let waited = gate.clock.now() - began;
    assert!(waited < Duration::from_millis(140), "{waited:?}: what the model takes was left");
    drop(first);
    assert_eq!(gate.counts(), (0, 0, 0));
}

#[tokio::test]
async fn what_the_model_took_once_does_not_refuse_for_ever() {
    let (gate, _) = gate(1, 9);
    let now = gate.clock.now();
    for turn in 0..200 {
        gate.inside.lock().learn(Duration::from_millis(100), now + Duration::from_millis(turn));
    }
    let soon = now + Duration::from_millis(300);
    let brief = Duration::from_millis(50);
    assert_eq!(gate.ask(&guest(1, Class::Normal), soon + brief, Duration::ZERO, soon).err(), Some(Why::TooShort));
    let later = now + Duration::from_secs(60);
    assert!(gate.ask(&guest(1, Class::Normal), later + brief, Duration::ZERO, later).is_ok_and(|wait| wait.is_none()));
    gate.leave(1, later, None);
}

#[tokio::test]
async fn a_model_with_too_much_to_do_costs_its_pools_others_nothing() {
    let ((gate, pool), (other, _)) = (gate(1, 1), gate(100, 1));
    let pool = Arc::new(pool);
    let first = enter(&gate, &pool, &guest(1, Class::Low), LONG).await.unwrap();
    let second = waiter(&gate, &gate, &pool, guest(1, Class::Low), LONG).await;
    for _ in 0..500 {
        let refused = enter(&gate, &pool, &guest(2, Class::Low), LONG).await.err();
        assert!(matches!(refused, Some(Why::Full | Why::Shed | Why::Share)), "{refused:?}");
    }
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    drop(first);
    drop(second.await.unwrap().unwrap());
    for _ in 0..100 {
        assert!(enter(&other, &pool, &guest(2, Class::Low), LONG).await.is_ok(), "nothing of the other is shed");
    }
}

#[tokio::test]
async fn a_tenants_own_bound_counts_all_that_it_has() {
    let (gate, pool) = gate(9, 9);
    let bound = TenantBound { present: Arc::default(), most: 2 };
    let guest = Guest { class: Class::Critical, tenant: 1, bound: Some(bound.clone()) };
    let places = [enter(&gate, &pool, &guest, LONG).await, enter(&gate, &pool, &guest, LONG).await];
    assert_eq!(enter(&gate, &pool, &guest, LONG).await.err(), Some(Why::TenantFull));
    drop(places);
    assert_eq!(bound.present.load(Ordering::Relaxed), 0);
    assert!(enter(&gate, &pool, &guest, LONG).await.is_ok());
}

#[tokio::test]
async fn more_room_of_the_pool_wakes_those_who_wait() {
    let (gate, pool) = gate(4, 9);
    let pool = Arc::new(pool);
    pool.fit(1);
    let first = enter(&gate, &pool, &guest(1, Class::Normal), LONG).await.unwrap();
    let second = waiter(&pool.places, &gate, &pool, guest(1, Class::Low), LONG).await;
    let third = waiter(&pool.places, &gate, &pool, guest(1, Class::High), LONG).await;
    assert_eq!((gate.counts(), pool.places.counts()), ((3, 0, 0), (1, 2, 2)));
    pool.fit(2);
    let third = third.await.unwrap().unwrap();
    assert!(!second.is_finished());
    pool.fit(u32::MAX);
    let second = second.await.unwrap().unwrap();
    assert_eq!(pool.places.counts().0, 3);
    drop((first, second, third));
    assert_eq!((gate.counts(), pool.places.counts()), ((0, 0, 0), (0, 0, 0)));
}

/// Two models share the pods of one pool.
#[tokio::test]
async fn a_pools_room_is_that_of_all_its_models() {
    let (one, pool) = gate(4, 9);
    let (other, _) = gate(4, 9);
    let pool = Arc::new(pool);
    pool.fit(1);
    let first = enter(&one, &pool, &guest(1, Class::Normal), LONG).await.unwrap();
    let second = waiter(&pool.places, &other, &pool, guest(1, Class::Normal), LONG).await;
    assert!(!second.is_finished());
    drop(first);
    drop(second.await.unwrap().unwrap());
    assert_eq!((one.counts(), other.counts(), pool.places.counts()), ((0, 0, 0), (0, 0, 0), (0, 0, 0)));
}

/// Threads that enter, wait, give up at any moment and leave: no more are ever inside than may be, and in
/// the end nobody is. Each goes on until it was inside 20 times, however seldom a busy machine lets it in.
#[test]
fn no_place_is_lost_or_given_twice() {
    const IN_FLIGHT: u32 = 3;
    let (gate, pool) = gate(IN_FLIGHT, 12);
    let pool = Arc::new(pool);
    let (inside, most, refused, seed) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU64::new(0), AtomicU64::new(1));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let tasks = (0..8).map(|_| async {
                        let mut entered = 0;
                        while entered < 20 {
                            let random =
                                seed.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed).wrapping_mul(31) >> 40;
                            let class = Class::ALL[random as usize % 4];
                            let patience = Duration::from_micros(random % 3_000);
                            let deadline = gate.clock.now() + Duration::from_millis(random % 5 + 1);
                            let guest = guest((random % 3) as u32, class);
                            let entering = enter(&gate, &pool, &guest, deadline);
                            let Ok(Ok(place)) = tokio::time::timeout(patience, entering).await else {
                                refused.fetch_add(1, Ordering::Relaxed);
                                tokio::time::sleep(Duration::from_micros(random % 500)).await;
                                continue;
                            };
                            most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            entered += 1;
                            tokio::time::sleep(Duration::from_micros(random % 200)).await;
                            inside.fetch_sub(1, Ordering::SeqCst);
                            if random % 2 == 0 { place.served() } else { drop(place) }
                        }
                    });
                    futures_util::future::join_all(tasks).await;
                });
            });
        }
    });
    assert_eq!(most.load(Ordering::SeqCst), IN_FLIGHT);
    assert_eq!(gate.counts(), (0, 0, 0));
    assert_eq!(gate.metrics.waiting.get(), 0);
    assert!(refused.load(Ordering::Relaxed) > 300, "too few gave up or were shed: {refused:?}");
}

#[test]
fn who_is_shed_by_its_tenants_share_is_told_so() {
    // Half of the requests are of the class high, one each so many microseconds; the pool serves one each 1,100.
    for (high_us, mostly) in [(1_000, Why::Shed), (2_000, Why::Share)] {
        let (gate, pool) = gate(1, 9);
        let (shed, began) = (&pool.places.shed, gate.clock.now());
        let (mut free_at, mut whys) = (began, Vec::new());
        let mut waiting = VecDeque::new();
        for turn in 0..4_000_u32 {
            let class = if turn % 2 == 0 { Class::High } else { Class::Low };
            let now = began + Duration::from_micros(high_us / 2) * turn;
            while let Some((_, wait)) = waiting.pop_front_if(|(starts, _)| *starts <= now) {
                shed.observe(Some(wait));
            }
            match shed.admit(&guest(1, class), now) {
                Ok(()) => {
                    waiting.push_back((free_at.max(now), free_at.saturating_sub(now)));
                    free_at = free_at.max(now) + Duration::from_micros(1_100);
                }
                Err(why) => {
                    assert_eq!(why == Why::Share, shed.lets_in(now) > f64::from(class as u32), "{class:?}");
                    whys.push(why);
                }
            }
        }
        let most = whys.iter().filter(|why| **why == mostly).count();
        assert!(most > whys.len() / 2 && whys.len() > 100, "{most} of {} are {mostly:?}", whys.len());
    }
}

#[test]
fn a_pool_with_too_much_to_do_sheds_the_least_important() {
    let (gate, pool) = gate(1, 9);
    // Two seconds of 2,000 a second for a pool that serves one each millisecond.
    let began = gate.clock.now();
    let (mut shed, mut free_at) = (0, began);
    let mut waiting = VecDeque::new();
    for turn in 0..4_000_u64 {
        let class = if turn % 5 == 0 { Class::Critical } else { Class::Low };
        let now = began + Duration::from_micros(500) * turn as u32;
        while let Some((_, wait)) = waiting.pop_front_if(|(starts, _)| *starts <= now) {
            pool.places.shed.observe(Some(wait));
        }
        if pool.places.shed.admit(&guest(1, class), now).is_ok() {
            waiting.push_back((free_at.max(now), free_at.saturating_sub(now)));
            free_at = free_at.max(now) + Duration::from_millis(1);
        } else {
            assert_eq!(class, Class::Low);
            shed += 1;
        }
    }
    assert!(shed > 300, "{shed}");
}
