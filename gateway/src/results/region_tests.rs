//! Gateways that share results in a real Redis.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spillway_core::inference::Limits;
use spillway_core::limit::Class;
use spillway_runtime::feature_changes::Listener;
use spillway_runtime::store::{Redis, RedisSettings};
use spillway_runtime::telemetry::Metrics as Registry;

use super::changes::Ears;
use super::purges::Purge;
use super::tests::{Ask, World, ask, name, read_at, row, said};
use super::{Channels, ResultSettings, Results, SharedRedis};
use crate::redis_server::{Link, RedisServer};

const HIT: &str = "; detail=l2";

/// A gateway at this address of Redis, once it has read the purges and hears of changes.
async fn gateway(address: &str) -> Arc<World> {
    let world = unheard(address, Duration::from_millis(200));
    until("it follows", || world.results.purges_are_known() && world.results.changes.hears(world.results.now())).await;
    world
}

fn unheard(address: &str, timeout: Duration) -> Arc<World> {
    let registry = Registry::new("test");
    let redis = RedisSettings { servers: vec![address.to_owned()], timeout, ..RedisSettings::default() };
    let (results, channels) = opened(&redis, &registry);
    let drain = spillway_runtime::drain::Drain::new(Duration::from_secs(1));
    tokio::spawn(channels.unwrap().follow(results.clone(), registry, drain));
    Arc::new(World::with(results))
}

fn opened(redis: &RedisSettings, registry: &Registry) -> (Arc<Results>, Option<Channels>) {
    let (connection, subscriber) = Redis::open(redis).unwrap();
    let shared = SharedRedis { settings: redis, connection: Arc::new(connection), subscriber };
    Results::open(&ResultSettings::default(), Some(shared), &name("eu"), Limits::OF_SIDECARS, registry)
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within 10 s: {what}");
}

async fn kept(redis: &RedisServer, count: usize) {
    until("results are in Redis", || redis.results().len() == count).await;
}

/// What came of rounds that gave nothing, by reason.
fn failures(world: &World, reason: &'static str) -> u64 {
    world.results.metrics.region_failures(reason)
}

#[tokio::test]
async fn gateways_share_results_and_what_they_say_of_their_making() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let ask = ask("plain", 1.0);
    one.get(&ask, "one", said()).await;
    kept(&redis, 1).await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let (answer, status) = other.get(&ask, "other", said()).await;
    assert!(answer == "one" && status.ends_with(HIT), "{answer} {status}");
    let view = other.results.view();
    assert_eq!((view.entries, other.calls()), (1, 0));
    let found = other.results.memory.peek(&one.key(&ask)).unwrap();
    let age = found.times.age(other.results.now());
    assert!((1_000..1_600).contains(&age.as_millis()), "its age goes on: {age:?}");
    assert!(found.times.fresh_until - found.times.stored <= Duration::from_secs(10));
    // From now on it is in this gateway's own memory.
    assert!(other.get(&ask, "-", said()).await.1.ends_with("; detail=l1"));
    assert_eq!(other.get(&Ask { tenant: "globex", ..ask }, "globex's", said()).await.0, "globex's");
}

#[tokio::test]
async fn t11_gateways_share_one_call() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let slow = async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        Ok(("one", said()))
    };
    let ask = ask("plain", 1.0);
    let all = (0..50).flat_map(|_| [one.infer(&ask, slow), other.infer(&ask, slow)]);
    let answers = futures_util::future::join_all(all).await;
    assert!(answers.iter().all(|(answer, _)| matches!(answer, Ok(text) if text == "one")));
    assert_eq!(one.calls() + other.calls(), 1);
    assert!(answers.iter().any(|(_, status)| status.ends_with(HIT)));
    // A leader that fails gives its lease back: the other need not wait for it to run out.
    let next = Ask { number: 2.0, ..ask };
    assert!(one.infer(&next, async || Err(crate::errors::Refusal::NoPod)).await.0.is_err());
    let began = Instant::now();
    other.get(&next, "two", said()).await;
    assert!(began.elapsed() < Duration::from_millis(200), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_gateway_that_dies_with_the_lease_is_not_waited_for() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let ask = ask("plain", 1.0);
    // As if it were gone: the future stays, and neither answers nor is dropped.
    let mut hangs = Box::pin(one.infer(&ask, async || std::future::pending().await));
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut hangs).await.is_err());
    let began = Instant::now();
    assert_eq!(other.get(&ask, "other", said()).await.0, "other");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test]
async fn who_comes_before_others_does_not_wait_for_their_lease() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let low = Ask { class: Class::Low, ..ask("plain", 1.0) };
    let mut queues = Box::pin(one.infer(&low, async || std::future::pending().await));
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut queues).await.is_err());
    let began = Instant::now();
    assert_eq!(other.get(&Ask { class: Class::High, ..low.clone() }, "at once", said()).await.0, "at once");
    assert!(began.elapsed() < Duration::from_millis(250), "{:?}", began.elapsed());
}

#[tokio::test]
async fn each_who_waited_judges_a_shared_result_by_its_own_wish() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let any = ask("plain", 1.0);
    one.get(&any, "old", said()).await;
    kept(&redis, 1).await;
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let wants_new = Ask { cache_control: "max-age=1", ..any.clone() };
    let leads = other.get(&any, "-", said());
    let ((leader, _), (same, how), (new, _)) =
        tokio::join!(leads, other.get(&any, "-", said()), other.get(&wants_new, "new", said()));
    assert_eq!((&*leader, &*same, &*new), ("old", "old", "new"));
    assert!(how.ends_with(HIT), "{how}");
}

#[tokio::test]
async fn a_result_older_than_a_change_is_not_taken_from_redis() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let mut channels = [Ears(one.results.clone()), Ears(other.results.clone())];
    let base = other.results.changes.coherence.lock().number().unwrap();
    let ask = ask("joined", 0.0);
    let number = base + 1;
    // The first has not heard of it, nor has the sidecar whose rows it was given.
    one.get(&ask, "old", read_at(base)).await;
    kept(&redis, 1).await;
    channels[1].changed(number, &row("e"));
    assert_eq!(other.get(&ask, "new", read_at(number)).await.0, "new");
    assert_eq!(other.calls(), 1);
    until("the newer one takes its place", || {
        redis.cli(&["get", &redis.results()[0]]).starts_with(&format!("\u{1}{number:016}"))
    })
    .await;
    // What knows more than a gateway has heard cannot be judged by it; once it has heard it, it can.
    let third = gateway(&redis.address()).await;
    assert_eq!(third.get(&ask, "unjudged", read_at(base)).await.0, "unjudged");
    let fourth = gateway(&redis.address()).await;
    Ears(fourth.results.clone()).changed(number, &row("f"));
    let (answer, status) = fourth.get(&ask, "-", read_at(number)).await;
    assert!(answer == "new" && status.ends_with(HIT), "{answer} {status}");
    channels[0].changed(number, &row("e"));
    let (answer, status) = one.get(&ask, "-", read_at(number)).await;
    assert!(answer == "new" && status.ends_with(HIT), "{answer} {status}");
}

/// Tells the region that an entity's row was overwritten; the change's number.
fn tell(redis: &RedisServer, entity: &str) -> u64 {
    const SCRIPT: &str = "local number = redis.call('INCR', KEYS[1])
        redis.call('PUBLISH', ARGV[1], string.format('%.0f', number) .. ' ' .. ARGV[2])
        return number";
    let words = [SCRIPT, "1", "spillway:eu:features:changes", "spillway:eu:features", &row(entity)];
    redis.cli(&[&["eval"], &words[..]].concat()).parse().unwrap()
}

fn has_heard(world: &World, number: u64) -> bool {
    world.results.changes.coherence.lock().number().is_some_and(|heard| heard >= number)
}

#[tokio::test]
async fn changes_are_heard_over_redis_and_acknowledged() {
    let redis = RedisServer::start();
    let one = gateway(&redis.address()).await;
    let (ask, base) = (ask("joined", 0.0), one.results.changes.coherence.lock().number().unwrap());
    one.get(&ask, "old", read_at(base)).await;
    assert_eq!(one.get(&ask, "-", read_at(base)).await.0, "old");
    let number = tell(&redis, "e");
    until("it is acknowledged", || {
        let leases = redis.cli(&["hvals", "spillway:eu:features:listeners"]);
        leases.lines().any(|lease| lease.split(' ').next() == Some(&number.to_string()))
    })
    .await;
    assert_eq!(one.get(&ask, "new", read_at(number)).await.0, "new");
    redis.kill();
    until("its lease runs out", || !one.results.changes.hears(one.results.now())).await;
    assert_eq!(one.get(&ask, "newer", read_at(number)).await.1, "spillway; fwd=bypass; detail=deaf");
}

/// A sidecar: rows in its memory, which are read again from the store after a change.
#[derive(Default)]
struct Sidecar {
    applied: AtomicU64,
    row: Mutex<Option<u64>>,
}

#[test]
fn nothing_older_than_a_confirmed_change_is_given() {
    const READERS: usize = 6;
    const WRITES: u64 = 150;
    let redis = RedisServer::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let gateways: Vec<Arc<World>> = runtime.block_on(async {
        let address = redis.address();
        vec![gateway(&address).await, gateway(&address).await, gateway(&address).await]
    });
    let base = gateways[0].results.changes.coherence.lock().number().unwrap();
    let sidecar = Sidecar { applied: base.into(), row: Mutex::new(None) };
    // What the row is, and what it was when a writer was last told that all know of it.
    let (stored, confirmed, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let read = || {
        let mut row = sidecar.row.lock();
        let applied = sidecar.applied.load(Ordering::SeqCst);
        (applied, *row.get_or_insert_with(|| stored.load(Ordering::SeqCst)))
    };
    let pause = |most: u64| std::thread::sleep(Duration::from_micros(rand::random_range(0..most)));
    let counts: Vec<[u64; 3]> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|reader| {
                let (world, confirmed, done, read) = (&gateways[reader % 3], &confirmed, &done, &read);
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    runtime.block_on(async {
                        let mut counts = [0; 3];
                        while !done.load(Ordering::SeqCst) {
                            let known = confirmed.load(Ordering::SeqCst);
                            let model = async || {
                                let (applied, value) = read();
                                tokio::time::sleep(Duration::from_micros(rand::random_range(0..3_000))).await;
                                Ok((&*value.to_string().leak(), read_at(applied)))
                            };
                            let (answer, status) = world.infer(&ask("joined", 0.0), model).await;
                            let answer: u64 = answer.unwrap().parse().unwrap();
                            assert!(answer >= known, "{answer} given, {known} confirmed: {status}");
                            counts[0] += 1;
                            counts[1] += u64::from(status.contains("hit"));
                            counts[2] += u64::from(status.contains("l2"));
                            tokio::time::sleep(Duration::from_micros(rand::random_range(0..500))).await;
                        }
                        counts
                    })
                })
            })
            .collect();
        for version in 1..=WRITES {
            stored.store(version, Ordering::SeqCst);
            let number = tell(&redis, "e");
            pause(4_000);
            {
                let mut row = sidecar.row.lock();
                *row = None;
                sidecar.applied.store(number, Ordering::SeqCst);
            }
            while !gateways.iter().all(|world| has_heard(world, number)) {
                std::thread::sleep(Duration::from_micros(200));
            }
            confirmed.store(version, Ordering::SeqCst);
            pause(20_000);
        }
        done.store(true, Ordering::SeqCst);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    let sum = |index: usize| counts.iter().map(|counts| counts[index]).sum::<u64>();
    println!("{} requests, {} hits, {} of them in Redis", sum(0), sum(1), sum(2));
    assert!(sum(1) > sum(0) / 3 && sum(2) > 0, "{counts:?}");
}

#[tokio::test]
async fn t02_wrong_bytes_in_redis_are_a_miss() {
    let redis = RedisServer::start();
    let one = gateway(&redis.address()).await;
    for number in 0..8 {
        one.get(&ask("plain", number as f32), "one", said()).await;
    }
    kept(&redis, 8).await;
    let keys = redis.results();
    redis.cli(&["set", &keys[0], "garbage"]);
    redis.cli(&["set", &keys[1], &"x".repeat(100_000)]);
    redis.cli(&["del", &keys[2]]);
    redis.cli(&["lpush", &keys[2], "a list"]);
    redis.cli(&["setrange", &keys[3], "120", "!!"]);
    redis.cli(&["persist", &keys[4]]);
    redis.cli(&["pexpire", &keys[5], "100000000"]);
    // Another key's result, as if their hashes were one.
    redis.cli(&["copy", &keys[7], &keys[6], "replace"]);
    let other = gateway(&redis.address()).await;
    for number in 0..8 {
        let answer = other.get(&ask("plain", number as f32), "other", said()).await.0;
        assert!(answer == "other" || answer == "one");
    }
    assert_eq!((other.calls(), failures(&other, "garbage")), (7, 7));
    until("they are mended", || {
        let third = redis.results();
        third.len() == 8 && third.iter().all(|key| redis.cli(&["type", key]) == "string")
    })
    .await;
}

#[tokio::test]
async fn t02_leases_that_are_none_are_not_waited_for() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let asks = [1.0, 2.0, 3.0].map(|number| ask("plain", number));
    for ask in &asks {
        one.get(ask, "one", said()).await;
    }
    kept(&redis, 3).await;
    for (key, lease) in redis.results().iter().zip([
        &["lpush", "a list"][..],
        &["set", "0123456789abcdef2"],
        &["set", "0123456789abcdef2", "px", "100000000"],
    ]) {
        redis.cli(&["del", key]);
        redis.cli(&[&[lease[0], &format!("{key}:l")], &lease[1..]].concat());
    }
    let began = Instant::now();
    for ask in &asks {
        assert_eq!(other.get(ask, "other", said()).await.0, "other");
    }
    assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
    assert_eq!(failures(&other, "garbage"), 3);
    kept(&redis, 3).await;
}

#[tokio::test]
async fn redis_gone_is_a_miss_that_costs_no_time() {
    let redis = RedisServer::start();
    let one = gateway(&redis.address()).await;
    one.get(&ask("plain", 1.0), "one", said()).await;
    kept(&redis, 1).await;
    redis.kill();
    until("it is noticed", || !one.results.region.as_ref().unwrap().is_connected()).await;
    let began = Instant::now();
    assert_eq!(one.get(&ask("plain", 2.0), "two", said()).await.0, "two");
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    assert!(one.get(&ask("plain", 1.0), "-", said()).await.1.ends_with("; detail=l1"), "its own memory goes on");
    assert!(failures(&one, "away") > 0);
    redis.restart();
    until("it is back", || one.results.region.as_ref().unwrap().is_connected()).await;
    for number in 0..100 {
        one.get(&ask("plain", 10.0 + number as f32), "back", said()).await;
        if !redis.results().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("results go to Redis again");
}

#[tokio::test]
async fn a_slow_redis_costs_few_requests_its_time_and_none_twice() {
    let redis = RedisServer::start();
    let link = Link::to(redis.address()).await;
    let one = unheard(&link.address.to_string(), Duration::from_millis(50));
    until("it follows", || one.results.purges_are_known()).await;
    link.delay(Duration::from_millis(400));
    let mut slow = 0;
    for number in 0..100 {
        let began = Instant::now();
        assert_eq!(one.get(&ask("plain", number as f32), "one", said()).await.0, "one");
        assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
        slow += u32::from(began.elapsed() >= Duration::from_millis(50));
    }
    assert!((1..=4).contains(&slow), "{slow} waited");
    assert_eq!(failures(&one, "timeout"), u64::from(slow));
    assert_eq!(failures(&one, "resting"), u64::from(100 - slow));
    link.delay(Duration::ZERO);
    let mut number = 1_000.0;
    let before = one.results.metrics.stored_in_region.get();
    for _ in 0..100 {
        number += 1.0;
        one.get(&ask("plain", number), "one", said()).await;
        if one.results.metrics.stored_in_region.get() > before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it is tried again");
}

#[tokio::test]
async fn a_full_redis_is_a_miss() {
    let redis = RedisServer::start();
    let one = gateway(&redis.address()).await;
    one.get(&ask("plain", 1.0), "one", said()).await;
    kept(&redis, 1).await;
    redis.cli(&["config", "set", "maxmemory-policy", "noeviction"]);
    redis.cli(&["config", "set", "maxmemory", "1"]);
    assert_eq!(one.get(&ask("plain", 2.0), "two", said()).await.0, "two");
    assert_eq!(failures(&one, "full"), 1);
    let other = unheard(&redis.address(), Duration::from_millis(200));
    until("it follows", || other.results.purges_are_known()).await;
    assert!(other.get(&ask("plain", 1.0), "-", said()).await.1.ends_with(HIT), "what is there is still given");
}

#[tokio::test]
async fn a_purge_reaches_every_gateway_and_what_lies_in_redis() {
    let redis = RedisServer::start();
    let (one, other) = (gateway(&redis.address()).await, gateway(&redis.address()).await);
    let asks = [ask("plain", 1.0), Ask { tenant: "globex", ..ask("plain", 1.0) }, ask("brief", 1.0)];
    let all = async |world: &World, text| {
        let mut answers = Vec::new();
        for ask in &asks[..2] {
            answers.push(world.get(ask, text, said()).await.0);
        }
        answers
    };
    assert_eq!(all(&one, "old").await, ["old", "old"]);
    kept(&redis, 2).await;
    assert_eq!(all(&other, "-").await, ["old", "old"]);
    let purged = one.results.purge(Purge::Tenant(name("acme"))).await;
    assert_eq!((purged.entries, purged.region), (1, Some(true)));
    until("the other hears", || other.results.metrics.purges.get() == 1).await;
    assert_eq!(all(&other, "new").await, ["new", "old"]);
    until("the new one is in Redis", || other.results.metrics.stored_in_region.get() == 1).await;
    assert_eq!(all(&one, "-").await, ["new", "old"]);
    // A gateway that starts after it knows of it too.
    redis.cli(&["config", "set", "notify-keyspace-events", ""]);
    other.results.purge(Purge::Model(name("plain"))).await;
    let third = gateway(&redis.address()).await;
    assert_eq!(all(&third, "newer").await, ["newer", "newer"]);
}

#[tokio::test]
async fn a_purge_that_was_not_heard_is_read() {
    let redis = RedisServer::start();
    let one = gateway(&redis.address()).await;
    one.get(&ask("plain", 1.0), "old", said()).await;
    // The message gets lost; the list has it.
    let number = one.results.purges.mark() + 5;
    redis.cli(&["lpush", "spillway:eu:purges", &format!("{number} model plain")]);
    until("it is read", || one.results.purges.mark() == number).await;
    assert_eq!(one.get(&ask("plain", 1.0), "new", said()).await.0, "new");
}

#[tokio::test]
async fn a_gateways_own_purge_does_not_hide_one_that_it_missed() {
    let redis = RedisServer::start();
    let one = gateway(&redis.address()).await;
    one.get(&ask("plain", 1.0), "old", said()).await;
    let missed = one.results.purges.mark() + 5;
    redis.cli(&["lpush", "spillway:eu:purges", &format!("{missed} model plain")]);
    let purged = one.results.purge(Purge::Tenant(name("globex"))).await;
    assert_eq!((purged.entries, purged.region), (1, Some(true)));
    assert_eq!(one.get(&ask("plain", 1.0), "new", said()).await.0, "new");
    assert_eq!(one.results.metrics.purges.get(), 2);
}

#[tokio::test]
async fn in_a_cluster_it_is_the_same() {
    let redis = RedisServer::of("cluster");
    let registry = Registry::new("test");
    let timeout = Duration::from_millis(500);
    let at = RedisSettings { servers: vec![redis.address()], cluster: true, timeout, ..RedisSettings::default() };
    let open = || {
        let (results, channels) = opened(&at, &registry);
        let drain = spillway_runtime::drain::Drain::new(Duration::from_secs(1));
        tokio::spawn(channels.unwrap().follow(results.clone(), Registry::new("test"), drain));
        World::with(results)
    };
    let (one, other) = (open(), open());
    for world in [&one, &other] {
        until("it follows", || world.results.purges_are_known()).await;
    }
    for number in 0..20 {
        one.get(&ask("plain", number as f32), "one", said()).await;
    }
    until("they are kept", || one.results.metrics.stored_in_region.get() == 20).await;
    for number in 0..20 {
        assert!(other.get(&ask("plain", number as f32), "-", said()).await.1.ends_with(HIT));
    }
    assert_eq!(one.results.purge(Purge::Model(name("plain"))).await.region, Some(true));
    until("the other hears", || other.results.metrics.purges.get() == 1).await;
    assert_eq!(other.get(&ask("plain", 1.0), "new", said()).await.0, "new");
}
