//! L1, real Redis in its three forms, and SQLite behind it.
//!
//! The faults table, dependency Redis: refuse, hang, slow, wrong. Each says what a look-up gets, that it
//! is in time, and that nothing wrong is kept.

mod features_harness;

use std::time::{Duration, Instant};

use features_harness::*;
use spillway_core::feature::Stored;
use spillway_sidecar::features::*;

const SECOND: i64 = 1_000_000;

/// What a look-up may take although Redis fails: its own timeout, the store, and a slow machine.
const SOON: Duration = Duration::from_millis(800);

fn redis(address: String) -> RedisSettings {
    RedisSettings { servers: vec![address], timeout: Duration::from_millis(100), ..RedisSettings::default() }
}

struct Region {
    server: Server,
    folder: tempfile::TempDir,
    settings: FeatureSettings,
}

impl Region {
    fn start(mode: &str) -> Self {
        let server = Server::redis(mode);
        let folder = tempfile::tempdir().unwrap();
        let mut redis = redis(server.address());
        redis.cluster = mode == "cluster";
        if mode == "tls" {
            let password = folder.path().join("password");
            std::fs::write(&password, "spillway-password\n").unwrap();
            redis.servers = vec![format!("localhost:{}", server.port)];
            redis.username = Some("spillway".into());
            redis.password_file = Some(password);
            redis.tls = Some(TlsSettings { ca: server.folder.path().join("tls/ca.crt"), identity: None });
        }
        let settings = settings(sqlite(folder.path()), Some(redis));
        Self { server, folder, settings }
    }

    async fn sidecar(&self) -> Sidecar {
        let sidecar = Sidecar::open(&self.settings);
        sidecar.until_well().await;
        sidecar
    }

    /// Changes what lies under the key of an entity's row in `site`.
    fn meddle(&self, entity: &str, command: impl FnOnce(&str) -> Vec<String>) -> String {
        let arguments = command(&key(entity));
        self.server.redis_cli(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Overwrites a row in the store behind everyone's back.
    fn set_aside_store(&self) -> rusqlite::Connection {
        let store = rusqlite::Connection::open(self.folder.path().join("features.db")).unwrap();
        store.execute_batch("ALTER TABLE features RENAME TO away").unwrap();
        store
    }
}

fn key(entity: &str) -> String {
    format!("spillway:eu:f:{{s:{entity}}}:site")
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
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
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(2));
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
    sidecar.put("a", 2, now_us()).await.unwrap();
    assert_eq!(tier(&other.site("a").await), Some(Tier::L2));
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
        eventually("it is mended", async || {
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
