//! The faults table, dependency Redis: refuse, hang, slow, wrong.
//!
//! Each says what a look-up gets, that it is in time, and that nothing wrong is kept.

use std::time::{Duration, Instant};

use crate::features_harness::redis::*;
use crate::features_harness::*;
use spillway_sidecar::features::*;

/// What a look-up may take although Redis fails: its own timeout, the store, and a slow machine.
const SOON: Duration = Duration::from_millis(800);

#[tokio::test]
async fn redis_refuses_and_the_store_answers() {
    let region = Region::start("plain");
    let sidecar = region.sidecar().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    sidecar.put("b", 1, now_us()).await.unwrap();
    region.server.kill();
    eventually("the loss is noticed", async || !sidecar.features.hears()).await;
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["b"], DEADLINE).await;
    assert!(began.elapsed() < SOON);
    assert_eq!((sidecar.hits(lookup.get(0, 0)), tier(lookup.get(0, 0))), (Some(1), Some(Tier::L3)));
    assert_eq!(lookup.failed_tiers, FailedTiers { l2: true, l3: false });
    assert!(sidecar.reads("l2", "error") > 0);
    // A write meanwhile succeeds, and what Redis could not be told it is told later.
    sidecar.put("a", 2, now_us()).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(2));
    assert_eq!(sidecar.metric("writes_total{tier=\"l2\",outcome=\"failed\"}"), 1);
    region.server.start();
    sidecar.until_well().await;
    eventually("Redis is told", async || sidecar.metric("repairs_total{outcome=\"repaired\"}") == 1).await;
    // Somebody may still come to fill in what was there before: Redis takes nothing for a while.
    let left: i64 = region.meddle("a", |key| words(&["pttl", key])).parse().unwrap();
    assert!((0..=5_000).contains(&left), "{left}");
    let found = region.sidecar().await.site("a").await;
    assert_eq!((sidecar.hits(&found), tier(&found)), (Some(2), Some(Tier::L3)));
    region.meddle("a", |key| words(&["persist", key]));
    assert_eq!(region.meddle("a", |key| words(&["strlen", key])), "1", "not what the store said");
    region.meddle("a", |key| words(&["del", key]));
    assert_eq!(sidecar.hits(&region.sidecar().await.site("a").await), Some(2));
    eventually("it is filled in again", async || region.meddle("a", |key| words(&["exists", key])) == "1").await;
}

#[tokio::test]
async fn redis_is_gone_at_the_start_and_comes() {
    let region = Region::start("plain");
    region.server.kill();
    let sidecar = Sidecar::open(&region.settings);
    sidecar.put("a", 1, now_us()).await.unwrap();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    assert_eq!((sidecar.hits(lookup.get(0, 0)), lookup.failed_tiers.l2), (Some(1), true));
    assert!(!sidecar.features.hears());
    region.server.start();
    sidecar.until_well().await;
    let other = region.sidecar().await;
    sidecar.put("b", 2, now_us()).await.unwrap();
    assert_eq!(tier(&other.site("b").await), Some(Tier::L2));
}

#[tokio::test]
async fn redis_hangs_and_the_store_answers_within_the_deadline() {
    let region = Region::start("plain");
    let sidecar = region.sidecar().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    let store = region.set_aside_store();
    region.server.freeze();
    // Both tiers fail: nothing is known, nothing is kept.
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!((lookup.get(0, 0), lookup.failed_tiers), (&Found::Unavailable, FailedTiers { l2: true, l3: true }));
    store.execute_batch("ALTER TABLE away RENAME TO features").unwrap();
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!((sidecar.hits(lookup.get(0, 0)), lookup.failed_tiers), (Some(1), FailedTiers { l2: true, l3: false }));
    region.server.thaw();
    sidecar.until_well().await;
}

#[tokio::test]
async fn redis_is_slow_and_the_store_answers() {
    let region = Region::start("plain");
    let link = Link::to(region.server.address()).await;
    let mut settings = region.settings.clone();
    settings.redis = Some(redis(link.address.to_string()));
    let sidecar = Sidecar::open(&settings);
    sidecar.until_well().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    link.delay(Duration::from_millis(400));
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!((sidecar.hits(lookup.get(0, 0)), tier(lookup.get(0, 0))), (Some(1), Some(Tier::L3)));
    assert!(lookup.failed_tiers.l2);
    link.delay(Duration::ZERO);
    sidecar.until_well().await;
}

#[tokio::test]
async fn t44_what_is_wrong_in_redis_is_never_read_as_values_and_is_mended() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    let entity = |kind: &str| format!("wrong-{kind}");
    let kinds = ["list", "garbage", "huge", "cut", "empty"];
    let events: Vec<Event> = kinds.iter().map(|kind| event(&entity(kind), Some(7), now_us())).collect();
    writer.features.write(&writer.snapshot, &events).await.unwrap();
    region.meddle(&entity("list"), |key| words(&["del", key]));
    region.meddle(&entity("list"), |key| words(&["lpush", key, "x"]));
    region.meddle(&entity("garbage"), |key| words(&["set", key, "not a row of ours at all"]));
    region.meddle(&entity("huge"), |key| words(&["setrange", key, "1048576", "x"]));
    region.meddle(&entity("cut"), |key| {
        words(&["eval", "redis.call('SET', KEYS[1], string.sub(redis.call('GET', KEYS[1]), 1, -2))", "1", key])
    });
    region.meddle(&entity("empty"), |key| words(&["set", key, ""]));
    let reader = region.sidecar().await;
    for kind in kinds {
        let found = reader.site(&entity(kind)).await;
        assert_eq!((reader.hits(&found), tier(&found)), (Some(7), Some(Tier::L3)), "{kind}");
    }
    assert_eq!(reader.reads("l2", "malformed"), 4, "a list reads as nothing there");
    for kind in kinds {
        eventually(&format!("{kind} is mended"), async || {
            let fresh = Sidecar::open(&region.settings);
            fresh.until_answered().await;
            tier(&fresh.site(&entity(kind)).await) == Some(Tier::L2)
        })
        .await;
    }
}

#[tokio::test]
async fn a_wrong_password_leaves_the_store_to_answer() {
    let region = Region::start("tls");
    let mut settings = region.settings.clone();
    let password = region.folder.path().join("wrong");
    std::fs::write(&password, "wrong").unwrap();
    settings.redis.as_mut().unwrap().password_file = Some(password.clone());
    let sidecar = Sidecar::open(&settings);
    sidecar.put("a", 1, now_us()).await.unwrap();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    assert_eq!((sidecar.hits(lookup.get(0, 0)), lookup.failed_tiers.l2), (Some(1), true));
}

#[tokio::test]
async fn a_certificate_of_another_root_is_refused() {
    let region = Region::start("tls");
    let other = Server::redis("tls");
    let mut settings = region.settings.clone();
    settings.redis.as_mut().unwrap().tls =
        Some(TlsSettings { ca: other.folder.path().join("tls/ca.crt"), identity: None });
    let sidecar = Sidecar::open(&settings);
    sidecar.put("a", 1, now_us()).await.unwrap();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    assert_eq!((sidecar.hits(lookup.get(0, 0)), lookup.failed_tiers.l2), (Some(1), true));
}

#[tokio::test]
async fn what_redis_missed_is_neither_believed_nor_filled_in_from_before() {
    let region = Region::start("plain");
    let (writer, link) = region.linked().await;
    let reader = region.sidecar().await;
    writer.put("a", 1, now_us()).await.unwrap();
    assert_eq!(tier(&reader.site("a").await), Some(Tier::L2));
    // The writer's way to Redis is too slow to tell it anything; the others' is not.
    link.delay(Duration::from_secs(3));
    writer.put("a", 2, now_us()).await.unwrap();
    assert_eq!(region.meddle("a", |key| words(&["strlen", key])).parse::<usize>().unwrap(), row_length(&writer));
    link.delay(Duration::ZERO);
    let found = writer.site("a").await;
    assert_eq!((writer.hits(&found), tier(&found)), (Some(2), Some(Tier::L3)), "Redis holds the row from before");
    eventually("Redis is told", async || writer.metric("repairs_total{outcome=\"repaired\"}") == 1).await;
    eventually("the reader hears of it", async || reader.hits(&reader.site("a").await) == Some(2)).await;
}

fn row_length(sidecar: &Sidecar) -> usize {
    sidecar.features.layout(&sidecar.snapshot, &name("site")).unwrap().row_length()
}

#[tokio::test]
async fn redis_without_memory_forgets_the_row_and_everyone_hears_of_it() {
    let region = Region::start("plain");
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);
    writer.put("a", 1, now_us()).await.unwrap();
    assert_eq!(tier(&reader.site("a").await), Some(Tier::L2));
    region.server.redis_cli(&["config", "set", "maxmemory", "1"]);
    let gaps = reader.metric("invalidations_total{kind=\"gap\"}");
    writer.put("a", 2, now_us()).await.unwrap();
    assert_eq!(writer.metric("writes_total{tier=\"l2\",outcome=\"failed\"}"), 1);
    eventually("the reader hears of it", async || reader.metric("invalidations_total{kind=\"gap\"}") > gaps).await;
    for sidecar in [&writer, &reader] {
        let found = sidecar.site("a").await;
        assert_eq!((sidecar.hits(&found), tier(&found)), (Some(2), Some(Tier::L3)));
    }
    region.server.redis_cli(&["config", "set", "maxmemory", "0"]);
    writer.put("b", 3, now_us()).await.unwrap();
    assert_eq!(tier(&region.sidecar().await.site("b").await), Some(Tier::L2), "there is room again");
}

#[tokio::test]
async fn redis_that_became_a_replica_is_not_believed_by_the_writer_and_told_later() {
    let region = Region::start("plain");
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);
    writer.put("a", 1, now_us()).await.unwrap();
    assert_eq!(tier(&reader.site("a").await), Some(Tier::L2));
    // Of a master that is not there: it goes on serving what it has, and takes no write.
    region.server.redis_cli(&["replicaof", "127.0.0.1", "1"]);
    writer.put("a", 2, now_us()).await.unwrap();
    assert_eq!(writer.metric("writes_total{tier=\"l2\",outcome=\"failed\"}"), 1);
    let found = writer.site("a").await;
    assert_eq!((writer.hits(&found), tier(&found)), (Some(2), Some(Tier::L3)));
    region.server.redis_cli(&["replicaof", "no", "one"]);
    eventually("the reader hears of it", async || reader.hits(&reader.site("a").await) == Some(2)).await;
    eventually("it is counted", async || writer.metric("repairs_total{outcome=\"repaired\"}") == 1).await;
}

#[tokio::test]
async fn a_counter_of_another_type_makes_memory_not_believed() {
    let region = Region::start("plain");
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);
    writer.put("a", 1, now_us()).await.unwrap();
    assert_eq!(reader.hits(&reader.site("a").await), Some(1));
    region.server.redis_cli(&["del", "spillway:eu:features:changes"]);
    region.server.redis_cli(&["rpush", "spillway:eu:features:changes", "x"]);
    writer.put("a", 2, now_us()).await.unwrap();
    eventually("it is heard as a gap", async || reader.hits(&reader.site("a").await) == Some(2)).await;
    eventually("the reader is deaf", async || !reader.features.hears()).await;
    region.server.redis_cli(&["del", "spillway:eu:features:changes"]);
    reader.until_well().await;
}

#[tokio::test]
async fn a_redis_that_talks_nonsense_is_left_and_the_store_answers() {
    let region = Region::start("plain");
    let (sidecar, link) = region.linked().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    link.garble(true);
    for _ in 0..3 {
        let began = Instant::now();
        let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        assert_eq!(sidecar.hits(lookup.get(0, 0)), Some(1));
        sidecar.put("a", 1, now_us()).await.unwrap();
    }
    assert!(sidecar.reads("l2", "error") > 0);
    link.garble(false);
    sidecar.until_well().await;
    sidecar.put("b", 2, now_us()).await.unwrap();
    assert_eq!(tier(&region.sidecar().await.site("b").await), Some(Tier::L2));
}

#[tokio::test]
async fn a_sidecar_waits_for_its_first_attempts_and_no_longer() {
    let region = Region::start("plain");
    // There: the first look-up has it.
    let sidecar = Sidecar::open(&region.settings);
    sidecar.features.first_attempt(Duration::from_secs(5)).await;
    assert!(!sidecar.look(&["site"], &["a"], DEADLINE).await.failed_tiers.any());
    // Refusing: known at once.
    region.server.kill();
    let sidecar = Sidecar::open(&region.settings);
    let began = Instant::now();
    sidecar.features.first_attempt(Duration::from_secs(5)).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(sidecar.look(&["site"], &["a"], DEADLINE).await.failed_tiers.l2);
    // Silent: not waited for beyond the bound.
    region.server.start();
    region.server.freeze();
    let sidecar = Sidecar::open(&region.settings);
    let began = Instant::now();
    sidecar.features.first_attempt(Duration::from_millis(500)).await;
    assert!((500..1_500).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    region.server.thaw();
    sidecar.until_well().await;
}
