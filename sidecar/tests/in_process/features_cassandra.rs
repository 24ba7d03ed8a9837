//! L1, real Redis and real Cassandra.
//!
//! The faults table, dependency Cassandra: refuse, hang, slow, wrong; and what the two together give.
//! One test with one server: a node takes seconds to boot.

use std::time::{Duration, Instant};

use crate::features_harness::*;
use bytes::Bytes;
use futures_util::future::join_all;
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use spillway_core::feature::Missing;
use spillway_core::resource::FieldValue;
use spillway_sidecar::features::*;

const SECOND: i64 = 1_000_000;

/// What a look-up may take although Cassandra fails: its timeout, and a slow machine.
const SOON: Duration = Duration::from_millis(1_500);

fn cassandra(address: String) -> CassandraSettings {
    CassandraSettings {
        contact_points: vec![address],
        keyspace: "features_test".into(),
        timeout: Duration::from_millis(800),
        create_schema: true,
        replication_factor: 1,
        speculate_after: Some(Duration::from_millis(400)),
        ..CassandraSettings::default()
    }
}

async fn opened(settings: &FeatureSettings) -> Sidecar {
    let sidecar = Sidecar::open(settings);
    sidecar.until_answered().await;
    sidecar
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cassandra_serves_and_fails_as_said() {
    let server = Server::cassandra();
    let alone = settings(StoreSettings::Cassandra(cassandra(server.address())), None);

    it_is_gone_at_the_start_and_comes(&server, &alone).await;
    let session = SessionBuilder::new().known_node(server.address()).build().await.unwrap();
    the_last_event_wins(&alone, &session).await;
    many_entities_of_two_groups_in_one_round(&alone).await;
    no_row_ends_later_than_cassandra_can_say(&alone, &session).await;
    what_it_refuses_is_not_to_be_sent_again(&alone, &session).await;
    rows_end_with_their_retention(&alone, &session).await;
    what_is_wrong_in_the_table_is_never_read_as_values(&alone, &session).await;
    it_is_slow_or_talks_nonsense(&server, &alone).await;

    let redis = Server::redis("plain");
    let l2 = RedisSettings {
        servers: vec![redis.address()],
        timeout: Duration::from_millis(100),
        ..RedisSettings::default()
    };
    let both = FeatureSettings { redis: Some(l2), ..alone.clone() };
    an_answer_from_before_a_write_is_kept_nowhere(&server, &both).await;
    let sidecars = [Sidecar::open(&both), Sidecar::open(&both)];
    for sidecar in &sidecars {
        sidecar.until_well().await;
    }
    the_last_event_is_left_in_every_tier(&sidecars, async || {
        redis.redis_cli(&["flushall"]);
    })
    .await;
    it_hangs(&server, &both).await;
    it_refuses(&server, &both).await;
}

async fn it_is_gone_at_the_start_and_comes(server: &Server, settings: &FeatureSettings) {
    let sidecar = Sidecar::open(settings);
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    assert_eq!((lookup.get(0, 0), lookup.failed_tiers.l3), (&Found::Unavailable, true));
    assert!(began.elapsed() < SOON);
    assert!(matches!(sidecar.put("a", 1, now_us()).await, Err(WriteError::Unavailable { .. })));
    server.start();
    sidecar.until_answered().await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    let found = sidecar.site("a").await;
    assert_eq!((sidecar.hits(&found), tier(&found), is_stale(&found)), (Some(1), Some(Tier::L3), false));
    assert_eq!(tier(&sidecar.site("a").await), Some(Tier::L1));
}

async fn the_last_event_wins(settings: &FeatureSettings, session: &Session) {
    let sidecar = opened(settings).await;
    let now = now_us();
    for (hits, at) in [(2, now), (1, now - SECOND), (2, now), (3, now - 1)] {
        sidecar.put("order", hits, at).await.unwrap();
        assert_eq!(sidecar.hits(&sidecar.site("order").await), Some(2));
    }
    sidecar.delete("order", now + 1).await.unwrap();
    sidecar.put("order", 9, now).await.unwrap();
    assert!(is_absent(&sidecar.site("order").await), "an event from before the deletion does not bring the row back");
    sidecar.put("order", 10, now + 2).await.unwrap();
    sidecar.delete("order", now).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("order").await), Some(10));
    let query = "SELECT event_us, schema_ver, TTL(v), WRITETIME(v) FROM features_test.features WHERE entity_key = 's:order' AND fg_id = 'site'";
    let rows = session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
    let (event_us, schema, ttl, written) = rows.single_row::<(i64, i32, i32, i64)>().unwrap();
    assert_eq!((event_us, schema, written), (now + 2, 1, now + 2));
    assert!((3_500..=3_600).contains(&ttl), "{ttl}");
}

async fn many_entities_of_two_groups_in_one_round(settings: &FeatureSettings) {
    const PATIENCE: Duration = Duration::from_secs(10);
    let StoreSettings::Cassandra(store) = &settings.store else { panic!("cassandra") };
    let patient = CassandraSettings { timeout: PATIENCE, write_timeout: PATIENCE, ..store.clone() };
    let sidecar = opened(&FeatureSettings { store: StoreSettings::Cassandra(patient), ..settings.clone() }).await;
    let entities: Vec<String> = (0..512).map(|index| format!("many {index}")).collect();
    let mut events: Vec<Event> =
        entities.iter().enumerate().map(|(index, entity)| event(entity, Some(index as i64), now_us())).collect();
    for (index, entity) in entities.iter().enumerate() {
        let values = Some(vec![Some(FieldValue::Float(index as f64))]);
        events.push(Event {
            group: name("user"),
            tenant: "acme".into(),
            entity: Bytes::copy_from_slice(entity.as_bytes()),
            event_us: now_us(),
            values,
        });
    }
    sidecar.features.write(&sidecar.snapshot, &events).await.unwrap();
    let entities: Vec<&str> = entities.iter().map(String::as_str).collect();
    let before = sidecar.reads("l3", "hit");
    let lookup = sidecar.look(&["site", "user"], &entities, PATIENCE).await;
    assert_eq!((lookup.unavailable(), sidecar.reads("l3", "hit") - before), (0, 1_024));
    let layout = sidecar.features.layout(&sidecar.snapshot, &name("user")).unwrap();
    for index in 0..512 {
        assert_eq!(sidecar.hits(lookup.get(index, 0)), Some(index as i64));
        let row = lookup.cell(index, 1).unwrap().row;
        assert_eq!(layout.value(row, 0), Some(FieldValue::Float(index as f64)));
    }
}

async fn no_row_ends_later_than_cassandra_can_say(settings: &FeatureSettings, session: &Session) {
    let sidecar = Sidecar::with(settings, snapshot_of(1, "1h", "7300d"));
    sidecar.features.first_attempt(Duration::from_secs(10)).await;
    sidecar.put("long", 1, now_us()).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("long").await), Some(1));
    let query = "SELECT TTL(v) FROM features_test.features WHERE entity_key = 's:long' AND fg_id = 'site'";
    let rows = session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
    let (ttl,) = rows.single_row::<(i32,)>().unwrap();
    let ends = now_us() / SECOND + i64::from(ttl);
    assert!((i64::from(i32::MAX) - 86_400..i64::from(i32::MAX)).contains(&ends), "{ends}");
}

async fn what_it_refuses_is_not_to_be_sent_again(settings: &FeatureSettings, session: &Session) {
    let StoreSettings::Cassandra(store) = &settings.store else { panic!("cassandra") };
    let elsewhere = CassandraSettings { keyspace: "refusing".into(), ..store.clone() };
    let sidecar = opened(&FeatureSettings { store: StoreSettings::Cassandra(elsewhere), ..settings.clone() }).await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    session.query_unpaged("ALTER TABLE refusing.features DROP schema_ver", ()).await.unwrap();
    let refused = sidecar.put("a", 2, now_us()).await;
    assert!(matches!(refused, Err(WriteError::Refused { refused: 1, of: 1 })), "{refused:?}");
    assert_eq!(sidecar.metric("writes_total{tier=\"l3\",outcome=\"refused\"}"), 1);
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(1));
    session.query_unpaged("ALTER TABLE refusing.features ADD schema_ver int", ()).await.unwrap();
    eventually("it is taken again", async || sidecar.put("a", 2, now_us()).await.is_ok()).await;
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(2));
}

async fn rows_end_with_their_retention(settings: &FeatureSettings, session: &Session) {
    // Stale for so long that no pause of the server hides it.
    let sidecar = Sidecar::with(settings, snapshot_of(1, "1s", "8s"));
    sidecar.until_answered().await;
    sidecar.put("short", 1, now_us()).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("short").await), Some(1));
    eventually("stale, and still served", async || is_stale(&sidecar.site("short").await)).await;
    eventually("gone", async || is_absent(&sidecar.site("short").await)).await;
    eventually("gone from the table", async || {
        let query = "SELECT v FROM features_test.features WHERE entity_key = 's:short' AND fg_id = 'site'";
        session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap().rows_num() == 0
    })
    .await;
}

async fn what_is_wrong_in_the_table_is_never_read_as_values(settings: &FeatureSettings, session: &Session) {
    let sidecar = opened(settings).await;
    let insert = "INSERT INTO features_test.features (entity_key, fg_id, v) VALUES (?, 'site', ?)";
    for (entity, value, reason) in [
        ("s:wrong-short", vec![1_u8, 2, 3], Missing::Length),
        ("s:wrong-empty", vec![], Missing::Length),
        ("s:wrong-time", vec![0xF1; 64], Missing::Event),
    ] {
        session.query_unpaged(insert, (entity, value)).await.unwrap();
        let found = sidecar.site(entity.trim_start_matches("s:")).await;
        assert_eq!(found, Found::Absent { malformed: Some(reason) }, "{entity}");
    }
    session
        .query_unpaged(
            "INSERT INTO features_test.features (entity_key, fg_id, event_us) VALUES ('s:wrong-null', 'site', 1)",
            (),
        )
        .await
        .unwrap();
    assert_eq!(sidecar.site("wrong-null").await, Found::Absent { malformed: Some(Missing::Length) });
    // Not kept: a right row is seen at once.
    sidecar.put("wrong-short", 4, now_us() + 1).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("wrong-short").await), Some(4));
}

async fn it_is_slow_or_talks_nonsense(server: &Server, settings: &FeatureSettings) {
    let link = Link::to(server.address()).await;
    let StoreSettings::Cassandra(store) = &settings.store else { panic!("cassandra") };
    // The driver reaches every node at the port of its contact point: here, through the link.
    let through = CassandraSettings { contact_points: vec![link.address.to_string()], ..store.clone() };
    let sidecar = opened(&FeatureSettings { store: StoreSettings::Cassandra(through), ..settings.clone() }).await;
    sidecar.put("slow", 1, now_us()).await.unwrap();
    link.delay(Duration::from_secs(1));
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["slow"], DEADLINE).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!((lookup.get(0, 0), lookup.failed_tiers.l3), (&Found::Unavailable, true));
    link.delay(Duration::ZERO);
    sidecar.until_answered().await;
    assert_eq!(sidecar.hits(&sidecar.site("slow").await), Some(1), "the error was not kept");
    sidecar.put("nonsense", 1, now_us()).await.unwrap();
    link.garble(true);
    let began = Instant::now();
    assert_eq!(sidecar.site("nonsense").await, Found::Unavailable);
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    link.garble(false);
    sidecar.until_answered().await;
    assert_eq!(sidecar.hits(&sidecar.site("nonsense").await), Some(1));
}

/// A slow reader gets the row from before a write that passes it by.
async fn an_answer_from_before_a_write_is_kept_nowhere(server: &Server, settings: &FeatureSettings) {
    let writer = Sidecar::open(settings);
    let link = Link::to(server.address()).await;
    let StoreSettings::Cassandra(store) = &settings.store else { panic!("cassandra") };
    let through = CassandraSettings { contact_points: vec![link.address.to_string()], ..store.clone() };
    let reader = Sidecar::open(&FeatureSettings { store: StoreSettings::Cassandra(through), ..settings.clone() });
    writer.until_well().await;
    reader.until_well().await;
    let now = now_us();
    // Into the store alone, as if Redis had dropped it.
    let alone = opened(&FeatureSettings { redis: None, ..settings.clone() }).await;
    alone.put("passed by", 1, now).await.unwrap();
    let refused = || reader.metric("fills_total{tier=\"l1\",outcome=\"refused\"}");
    let filled = || reader.metric("fills_total{tier=\"l2\",outcome=\"filled\"}");
    let before = (refused(), filled());
    link.delay(Duration::from_millis(300));
    let slow = async {
        let found = reader.site("passed by").await;
        (reader.hits(&found), tier(&found))
    };
    let write = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        writer.put("passed by", 2, now + 1).await.unwrap();
    };
    let (read, ()) = tokio::join!(slow, write);
    assert_eq!(read, (Some(1), Some(Tier::L3)), "it had been asked before");
    assert_eq!(refused() - before.0, 1);
    eventually("the late fill has come to Redis", async || filled() - before.1 == 1).await;
    let found = reader.site("passed by").await;
    assert_eq!((reader.hits(&found), tier(&found)), (Some(2), Some(Tier::L2)));
}

async fn it_hangs(server: &Server, settings: &FeatureSettings) {
    let mut sidecar = Sidecar::with(settings, snapshot_of(1, "1s", "1h"));
    sidecar.until_well().await;
    // Sidecars of other parts were dropped with their leases: the first write waits for those to run out.
    sidecar.put("known", 0, now_us()).await.unwrap();
    sidecar.put("known", 1, now_us()).await.unwrap();
    assert_eq!(tier(&sidecar.site("known").await), Some(Tier::L2));
    server.freeze();
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["unknown"], DEADLINE).await;
    assert_eq!((lookup.get(0, 0), lookup.failed_tiers), (&Found::Unavailable, FailedTiers { l2: false, l3: true }));
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    // All who ask for a row share its failure: they do not queue up to wait one after the other.
    let (began, before) = (Instant::now(), sidecar.reads("l3", "error"));
    let found = join_all((0..20).map(|_| sidecar.site("unknown"))).await;
    assert!(found.iter().all(|found| *found == Found::Unavailable));
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(sidecar.reads("l3", "error") - before, 1);
    // But one who had no time to wait does not speak for one who has.
    let before = sidecar.reads("l3", "error");
    let hasty = sidecar.look(&["site"], &["unknown"], Duration::from_millis(50));
    let (hasty, patient) = tokio::join!(hasty, sidecar.site("unknown"));
    assert_eq!((hasty.get(0, 0), &patient), (&Found::Unavailable, &Found::Unavailable));
    assert_eq!(sidecar.reads("l3", "error") - before, 2);
    // What is known is served, past its freshness too, and said to be stale.
    eventually("the row is stale", async || {
        let lookup = sidecar.look(&["site"], &["known"], DEADLINE).await;
        assert_eq!(sidecar.hits(lookup.get(0, 0)), Some(1));
        is_stale(lookup.get(0, 0)) && lookup.failed_tiers.l3
    })
    .await;
    // A deadline shorter than the store's timeout is kept.
    let began = Instant::now();
    sidecar.look(&["site"], &["unknown"], Duration::from_millis(60)).await;
    assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
    server.thaw();
    sidecar.snapshot = snapshot();
    sidecar.until_well().await;
    assert!(is_absent(&sidecar.site("unknown").await), "at once: the error was not kept");
}

async fn it_refuses(server: &Server, settings: &FeatureSettings) {
    let sidecar = Sidecar::open(settings);
    sidecar.until_well().await;
    sidecar.put("kept", 1, now_us()).await.unwrap();
    server.kill();
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["kept", "unknown"], DEADLINE).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!((sidecar.hits(lookup.get(0, 0)), tier(lookup.get(0, 0))), (Some(1), Some(Tier::L2)));
    assert_eq!((lookup.get(1, 0), lookup.failed_tiers.l3), (&Found::Unavailable, true));
    let failed = sidecar.put("kept", 2, now_us()).await;
    assert!(matches!(failed, Err(WriteError::Unavailable { written: 0, of: 1 })), "{failed:?}");
    // A write that the store may have taken: Redis does not go on serving what was there before.
    assert_eq!(sidecar.site("kept").await, Found::Unavailable);
    server.start();
    sidecar.until_answered().await;
    assert_eq!(sidecar.hits(&sidecar.site("kept").await), Some(1));
}
