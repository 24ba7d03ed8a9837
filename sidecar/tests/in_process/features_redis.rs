//! L1, real Redis in its three forms, and SQLite behind it: what is served, and who hears of what.

use std::time::{Duration, Instant};

use crate::features_harness::redis::*;
use crate::features_harness::*;
use futures_util::future::join_all;
use spillway_core::feature::Stored;
use spillway_sidecar::features::*;

const SECOND: i64 = 1_000_000;

/// Each write is heard of twice, from Redis and from the file, also by who wrote: after that nothing is
/// dropped any more.
async fn until_heard(sidecar: &Sidecar, writes: u64) {
    let heard = || sidecar.metric("invalidations_total{kind=\"heard\"}");
    eventually("the writes are heard of", async || heard() == 2 * writes).await;
}

async fn tiers_and_invalidation(mode: &str) {
    let region = Region::start(mode);
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);

    // A write reaches L2: another process finds it there, with one round for many entities.
    let entities: Vec<String> = (0..64).map(|index| format!("e{index}")).collect();
    let now = now_us();
    let events: Vec<Event> =
        entities.iter().enumerate().map(|(index, entity)| event(entity, Some(index as i64), now)).collect();
    assert_eq!(writer.features.write(&writer.snapshot, &events).await.unwrap().count, 64);
    let entities: Vec<&str> = entities.iter().map(String::as_str).collect();
    let lookup = reader.look(&["site"], &entities, DEADLINE).await;
    for index in 0..64 {
        let found = lookup.get(index, 0);
        assert_eq!((reader.hits(found), tier(found)), (Some(index as i64), Some(Tier::L2)), "{mode}: e{index}");
    }

    // The last event wins in L2 as well, whatever comes when, and however often.
    for (hits, at) in [(5, now + 5), (4, now + 4), (5, now + 5), (3, now + 3)] {
        writer.put("e1", hits, at).await.unwrap();
    }
    eventually("the reader hears of it", async || reader.hits(&reader.site("e1").await) == Some(5)).await;
    let fresh = region.sidecar().await;
    let found = fresh.site("e1").await;
    assert_eq!((fresh.hits(&found), tier(&found)), (Some(5), Some(Tier::L2)));

    // A deletion is heard too, and an older event does not undo it.
    writer.delete("e1", now + 9).await.unwrap();
    writer.put("e1", 8, now + 8).await.unwrap();
    eventually("the reader hears of the deletion", async || is_absent(&reader.site("e1").await)).await;
    assert!(is_absent(&fresh.site("e2-never-written").await));
    assert!(reader.metric("invalidations_total{kind=\"heard\"}") > 0);
    assert!(reader.features.hears());
}

#[tokio::test]
async fn redis_alone_serves_and_tells_the_region() {
    tiers_and_invalidation("plain").await;
}

#[tokio::test]
async fn redis_with_tls_and_acl_serves_and_tells_the_region() {
    tiers_and_invalidation("tls").await;
}

#[tokio::test]
async fn a_redis_cluster_serves_and_tells_the_region() {
    tiers_and_invalidation("cluster").await;
}

#[tokio::test]
async fn a_row_that_only_the_store_has_is_filled_into_redis() {
    let region = Region::start("plain");
    let one = region.sidecar().await;
    one.put("a", 1, now_us()).await.unwrap();
    region.meddle("a", |key| words(&["del", key]));
    let other = region.sidecar().await;
    let found = other.site("a").await;
    assert_eq!((other.hits(&found), tier(&found)), (Some(1), Some(Tier::L3)));
    eventually("the row is in Redis again", async || region.meddle("a", |key| words(&["exists", key])) == "1").await;
    let ttl: i64 = region.meddle("a", |key| words(&["pttl", key])).parse().unwrap();
    assert!((1..=300_000).contains(&ttl), "{ttl}");
    let third = region.sidecar().await;
    assert_eq!(tier(&third.site("a").await), Some(Tier::L2));
}

#[tokio::test]
async fn an_old_event_does_not_get_into_an_empty_redis() {
    let region = Region::start("plain");
    let one = region.sidecar().await;
    let now = now_us();
    one.put("a", 2, now).await.unwrap();
    region.server.redis_cli(&["flushall"]);
    one.put("a", 1, now - SECOND).await.unwrap();
    let other = region.sidecar().await;
    let found = other.site("a").await;
    assert_eq!(
        (other.hits(&found), tier(&found)),
        (Some(2), Some(Tier::L2)),
        "the write told Redis what the store holds"
    );
}

/// Two writers whose stores know only their own events: what Redis keeps is decided by its script.
#[tokio::test]
async fn redis_keeps_the_last_event_of_any_order_and_duplication() {
    let region = Region::start("plain");
    let elsewhere = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let other =
        |folder: &tempfile::TempDir| Sidecar::open(&settings(sqlite(folder.path()), region.settings.redis.clone()));
    let writers = [region.sidecar().await, other(&elsewhere[0])];
    let reader = other(&elsewhere[1]);
    writers[1].until_well().await;
    reader.until_well().await;
    let layout = reader.features.layout(&reader.snapshot, &name("site")).unwrap();
    let now = now_us();
    let mut last: Vec<Option<Stored>> = vec![None; 12];
    // A linear congruential generator: events of 12 entities at 5 times, so that many tie.
    let mut state = 7_u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for _ in 0..300 {
        let (entity, at, writer) = (next(12) as usize, now - next(5) as i64, &writers[next(2) as usize]);
        let hits = (next(4) > 0).then(|| next(400) as i64 - 200);
        let event = event(&format!("e{entity}"), hits, at);
        let stored = match &event.values {
            Some(values) => Stored::Row(layout.encode(at, values).unwrap()),
            None => Stored::Deleted { event_us: at },
        };
        if last[entity].as_ref().is_none_or(|last| stored.supersedes(last)) {
            last[entity] = Some(stored);
        }
        writer.features.write(&writer.snapshot, &[event]).await.unwrap();
    }
    reader.until_well().await;
    for (entity, last) in last.iter().enumerate() {
        let found = reader.site(&format!("e{entity}")).await;
        match (last, &found) {
            (Some(Stored::Row(row)), Found::Present(present)) => {
                assert_eq!((&present.row, present.tier), (row, Tier::L2), "e{entity}");
            }
            (Some(Stored::Deleted { .. }) | None, Found::Absent { malformed: None }) => {}
            _ => panic!("e{entity}: {last:?} {found:?}"),
        }
    }
}

#[tokio::test]
async fn staleness_does_not_add_up_through_the_tiers() {
    let region = Region::start("plain");
    let fresh_1s = || snapshot_of(1, "1s", "1h");
    let one = Sidecar::with(&region.settings, fresh_1s());
    one.until_well().await;
    let event_us = now_us();
    one.put("a", 1, event_us).await.unwrap();
    assert!(!is_stale(&one.site("a").await));
    eventually("stale everywhere", async || is_stale(&one.site("a").await)).await;
    let other = Sidecar::with(&region.settings, fresh_1s());
    other.until_well().await;
    let found = other.site("a").await;
    let Found::Present(present) = &found else { panic!("{found:?}") };
    assert!(present.stale, "as old for a process that read it just now");
    assert_eq!(present.fresh_until_us, event_us + SECOND);
}

#[tokio::test]
async fn a_gap_in_the_sequence_flushes_memory() {
    let region = Region::start("plain");
    let sidecar = region.sidecar().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    eventually("the row is in memory", async || tier(&sidecar.site("a").await) == Some(Tier::L1)).await;
    let gaps = sidecar.metric("invalidations_total{kind=\"gap\"}");
    // Two numbers whose messages nobody gets, then one that is heard.
    region.server.redis_cli(&["incrby", "spillway:eu:features:changes", "2"]);
    let number = region.server.redis_cli(&["incr", "spillway:eu:features:changes"]);
    region.server.redis_cli(&["publish", "spillway:eu:features", &format!("{number} {{s:other}}:site")]);
    eventually("the gap is seen", async || sidecar.metric("invalidations_total{kind=\"gap\"}") > gaps).await;
    assert_eq!(tier(&sidecar.site("a").await), Some(Tier::L2), "not from memory");
    // A last message that is lost is noticed by the counter alone.
    let gaps = sidecar.metric("invalidations_total{kind=\"gap\"}");
    region.server.redis_cli(&["incr", "spillway:eu:features:changes"]);
    eventually("the counter tells", async || sidecar.metric("invalidations_total{kind=\"gap\"}") > gaps).await;
}

#[tokio::test]
async fn nonsense_on_the_channel_flushes_and_harms_nothing() {
    let region = Region::start("plain");
    let sidecar = region.sidecar().await;
    for message in ["", " ", "x y", "18446744073709551616 a", "1", "99 ", "100 }{", "101 {s:a"] {
        region.server.redis_cli(&["publish", "spillway:eu:features", message]);
    }
    sidecar.put("a", 1, now_us()).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(1));
    sidecar.until_well().await;
}

#[tokio::test]
async fn a_cancelled_leader_hands_over() {
    let region = Region::start("plain");
    let link = Link::to(region.server.address()).await;
    let mut settings = region.settings.clone();
    settings.redis = Some(redis(link.address.to_string()));
    let sidecar = Sidecar::open(&settings);
    sidecar.until_well().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    link.delay(Duration::from_millis(50));
    // The first is dropped after it has begun to ask.
    let mut leader = Box::pin(sidecar.site("a"));
    assert!(futures_util::poll!(&mut leader).is_pending());
    let mut follower = Box::pin(sidecar.site("a"));
    assert!(futures_util::poll!(&mut follower).is_pending());
    drop(leader);
    assert_eq!(sidecar.hits(&follower.await), Some(1));
    assert_eq!(sidecar.metric("flights_total{outcome=\"handed_over\"}"), 1);
}

#[tokio::test]
async fn a_near_look_up_asks_redis_alone_and_shares_nobodys_question() {
    let region = Region::start("plain");
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);
    let now = now_us();
    for (entity, hits) in [("a", 1), ("b", 2)] {
        writer.put(entity, hits, now).await.unwrap();
    }
    region.meddle("b", |key| words(&["del", key]));
    let l3 = || ["hit", "stale", "absent", "error"].map(|outcome| reader.reads("l3", outcome)).iter().sum::<u64>();
    let (asked, questions) = (l3(), region.calls("mget"));
    // Somebody with more reach is asking for the same row.
    let mut far = Box::pin(reader.site("b"));
    assert!(futures_util::poll!(&mut far).is_pending());
    let near = reader.look_within(Reach::Near, &["site"], &["a", "b"], DEADLINE).await;
    assert_eq!((reader.hits(near.get(0, 0)), tier(near.get(0, 0))), (Some(1), Some(Tier::L2)));
    assert_eq!(near.get(1, 0), &Found::Unavailable, "which is not an absence");
    assert_eq!((l3(), region.calls("mget") - questions), (asked, 2));
    // Nothing of it is remembered.
    let found = far.await;
    assert_eq!((reader.hits(&found), tier(&found)), (Some(2), Some(Tier::L3)));
    eventually("it is near", async || {
        reader.site("b").await;
        let near = reader.look_within(Reach::Near, &["site"], &["b"], DEADLINE).await;
        (reader.hits(near.get(0, 0)), is_stale(near.get(0, 0))) == (Some(2), false)
    })
    .await;
}

#[tokio::test]
async fn rows_of_512_entities_and_two_groups_are_one_question_to_redis() {
    let region = Region::start("plain");
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);
    let entities: Vec<String> = (0..512).map(|index| format!("e{index}")).collect();
    let events: Vec<Event> =
        entities.iter().enumerate().map(|(index, entity)| event(entity, Some(index as i64), now_us())).collect();
    writer.features.write(&writer.snapshot, &events).await.unwrap();
    let entities: Vec<&str> = entities.iter().map(String::as_str).collect();
    reader.until_well().await;
    let before = region.calls("mget");
    let lookup = reader.look(&["site", "user"], &entities, DEADLINE).await;
    assert_eq!(region.calls("mget") - before, 1);
    assert_eq!((reader.reads("l2", "hit"), lookup.unavailable()), (512, 0));
    for index in 0..512 {
        assert_eq!(reader.hits(lookup.get(index, 0)), Some(index as i64));
        assert!(is_absent(lookup.get(index, 1)));
    }
}

#[tokio::test]
async fn a_hundred_look_ups_of_one_row_are_one_question_to_redis() {
    let region = Region::start("plain");
    let (sidecar, link) = region.linked().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    until_heard(&sidecar, 1).await;
    link.delay(Duration::from_millis(40));
    let before = region.calls("mget");
    assert_eq!(sidecar.metric("flights_total{outcome=\"shared\"}"), 0);
    let found = join_all((0..100).map(|_| sidecar.site("a"))).await;
    assert!(found.iter().all(|found| sidecar.hits(found) == Some(1)));
    assert_eq!(region.calls("mget") - before, 1);
    assert_eq!(sidecar.metric("flights_total{outcome=\"shared\"}"), 99);
}

#[tokio::test]
async fn an_absence_ends_with_a_write_in_every_sidecar() {
    let mut region = Region::start("plain");
    region.settings.memory.keep_absent = MemorySettings::MAX_KEEP_ABSENT;
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);
    for sidecar in [&writer, &reader] {
        assert!(is_absent(&sidecar.site("a").await));
        assert!(is_absent(&sidecar.site("a").await));
        assert_eq!(sidecar.reads("l1", "absent"), 1, "it is remembered");
    }
    let began = Instant::now();
    assert!(writer.put("a", 1, now_us()).await.unwrap().confirmed);
    for sidecar in [&writer, &reader] {
        assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(1));
    }
    assert!(began.elapsed() < MemorySettings::MAX_KEEP_ABSENT / 2, "long before it would forget by itself");
}

#[tokio::test]
async fn a_write_goes_on_when_its_caller_has_left() {
    let region = Region::start("plain");
    let reader = region.sidecar().await;
    let (writer, link) = region.linked().await;
    writer.put("a", 1, now_us()).await.unwrap();
    eventually("the row is in memory", async || tier(&reader.site("a").await) == Some(Tier::L1)).await;
    link.delay(Duration::from_millis(100));
    let mut put = Box::pin(writer.put("a", 2, now_us()));
    assert!(futures_util::poll!(&mut put).is_pending());
    drop(put);
    eventually("the reader hears of it", async || reader.hits(&reader.site("a").await) == Some(2)).await;
}

#[tokio::test]
async fn the_end_of_freshness_is_the_same_in_every_tier() {
    let region = Region::start("plain");
    let (writer, reader) = (region.sidecar().await, region.sidecar().await);
    let event_us = now_us() - 7 * SECOND;
    writer.put("a", 1, event_us).await.unwrap();
    writer.put("b", 1, event_us).await.unwrap();
    region.meddle("b", |key| words(&["del", key]));
    until_heard(&reader, 2).await;
    let found = [reader.site("b").await, reader.site("a").await, reader.site("a").await];
    for (found, tier) in found.iter().zip([Tier::L3, Tier::L2, Tier::L1]) {
        let Found::Present(present) = found else { panic!("{found:?}") };
        assert_eq!((present.tier, present.fresh_until_us), (tier, event_us + 60 * SECOND));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_and_readers_at_once_leave_the_last_event_in_every_tier() {
    let region = Region::start("plain");
    let sidecars = [region.sidecar().await, region.sidecar().await];
    the_last_event_is_left_in_every_tier(&sidecars, async || {
        region.server.redis_cli(&["flushall"]);
    })
    .await;
}
