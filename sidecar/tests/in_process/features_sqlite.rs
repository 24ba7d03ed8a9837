//! The tiers of one machine: L1 and SQLite.

use std::time::{Duration, Instant};

use crate::features_harness::*;
use bytes::Bytes;
use futures_util::future::join_all;
use spillway_core::feature::{InvalidKey, Missing};
use spillway_core::resource::FieldValue;
use spillway_sidecar::features::*;

const SECOND: i64 = 1_000_000;

async fn opened(folder: &tempfile::TempDir, snapshot: spillway_core::snapshot::Snapshot) -> Sidecar {
    let sidecar = Sidecar::with(&settings(sqlite(folder.path()), None), snapshot);
    sidecar.until_well().await;
    sidecar
}

/// A process also hears its own writes, which drops the rows once more.
async fn until_heard(sidecar: &Sidecar, events: usize) {
    let heard = || sidecar.metric("invalidations_total{kind=\"heard\"}");
    eventually("its own writes are heard", async || heard() >= events as u64).await;
}

#[tokio::test]
async fn a_row_comes_from_the_store_once_and_then_from_memory() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot()).await;
    let event = now_us();
    sidecar.put("a", 7, event).await.unwrap();
    until_heard(&sidecar, 1).await;
    let first = sidecar.site("a").await;
    assert_eq!((sidecar.hits(&first), tier(&first), is_stale(&first)), (Some(7), Some(Tier::L3), false));
    let Found::Present(present) = &first else { panic!("{first:?}") };
    assert_eq!((present.row.event_us(), present.fresh_until_us), (event, event + 60 * SECOND));
    let again = sidecar.site("a").await;
    assert_eq!((sidecar.hits(&again), tier(&again)), (Some(7), Some(Tier::L1)));
    assert_eq!(sidecar.reads("l3", "hit"), 1);
    assert!(sidecar.features.memory_bytes() > 0);
}

#[tokio::test]
async fn rows_of_512_entities_and_two_groups_keep_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot()).await;
    let entities: Vec<String> = (0..512).map(|index| format!("e{index}")).collect();
    let mut events: Vec<Event> = entities
        .iter()
        .enumerate()
        .filter(|(index, _)| index % 3 != 0)
        .map(|(index, entity)| event(entity, Some(index as i64), now_us()))
        .collect();
    for entity in &entities {
        let values = Some(vec![Some(FieldValue::Float(2.0))]);
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
    until_heard(&sidecar, events.len()).await;
    let before = sidecar.reads("l3", "absent");
    for _ in 0..2 {
        let lookup = sidecar.look(&["user", "site"], &entities, DEADLINE).await;
        for index in 0..512 {
            assert!(lookup.cell(index, 0).is_some());
            assert_eq!(sidecar.hits(lookup.get(index, 1)), (index % 3 != 0).then_some(index as i64));
        }
        assert_eq!((lookup.unavailable(), lookup.failed_tiers.any(), lookup.any_stale()), (0, false, false));
    }
    let asked = sidecar.reads("l3", "hit") + sidecar.reads("l3", "absent") - before;
    assert_eq!(asked, 1_024, "one round, then memory");
}

#[tokio::test]
async fn the_last_event_wins_and_replays_are_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot()).await;
    let now = now_us();
    for (hits, at) in [(2, now), (1, now - SECOND), (2, now), (3, now - 1)] {
        sidecar.put("a", hits, at).await.unwrap();
        assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(2));
    }
    sidecar.delete("a", now + 1).await.unwrap();
    assert!(is_absent(&sidecar.site("a").await));
    sidecar.put("a", 9, now).await.unwrap();
    assert!(is_absent(&sidecar.site("a").await), "an event from before the deletion does not bring the row back");
    sidecar.put("a", 10, now + 2).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(10));
    sidecar.delete("a", now).await.unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(10), "an old deletion leaves a newer row");
}

#[tokio::test]
async fn past_its_freshness_a_row_is_served_as_stale_and_past_its_retention_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot_of(1, "10s", "60s")).await;
    sidecar.put("old", 1, now_us() - 30 * SECOND).await.unwrap();
    until_heard(&sidecar, 1).await;
    for from in [Tier::L3, Tier::L1] {
        let found = sidecar.site("old").await;
        assert_eq!((sidecar.hits(&found), is_stale(&found), tier(&found)), (Some(1), true, Some(from)));
    }
    assert_eq!(
        sidecar.put("older", 1, now_us() - 90 * SECOND).await.unwrap(),
        Written { count: 0, expired: 1, confirmed: true }
    );
    assert!(is_absent(&sidecar.site("older").await));
}

#[tokio::test]
async fn a_stale_row_in_memory_gives_way_to_a_newer_one() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot_of(1, "1s", "60s")).await;
    let event_us = now_us();
    sidecar.put("a", 1, event_us).await.unwrap();
    assert!(!is_stale(&sidecar.site("a").await));
    eventually("the row is stale", async || is_stale(&sidecar.site("a").await)).await;
    assert!(now_us() >= event_us + SECOND, "stale from its event time on, however long it was in memory");
    sidecar.put("a", 2, now_us()).await.unwrap();
    let found = sidecar.site("a").await;
    assert_eq!((sidecar.hits(&found), is_stale(&found)), (Some(2), false));
}

#[tokio::test]
async fn sidecars_on_one_file_hear_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(sqlite(folder.path()), None);
    let (one, other) = (Sidecar::open(&settings), Sidecar::open(&settings));
    one.until_well().await;
    other.until_well().await;
    one.put("a", 1, now_us()).await.unwrap();
    assert_eq!(other.hits(&other.site("a").await), Some(1));
    assert!(is_absent(&other.site("b").await));
    one.put("a", 2, now_us()).await.unwrap();
    one.put("b", 3, now_us()).await.unwrap();
    eventually("the other hears of a", async || other.hits(&other.site("a").await) == Some(2)).await;
    eventually("the other hears of b", async || other.hits(&other.site("b").await) == Some(3)).await;
    assert!(other.metric("invalidations_total{kind=\"heard\"}") > 0);
}

#[tokio::test]
async fn rows_of_another_schema_are_missing_with_a_reason_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(sqlite(folder.path()), None);
    let old = Sidecar::open(&settings);
    old.put("a", 1, now_us() - SECOND).await.unwrap();
    assert_eq!(old.hits(&old.site("a").await), Some(1));
    let mut new = Sidecar::with(&settings, snapshot_of(2, "1m", "1h"));
    assert_eq!(new.site("a").await, Found::Absent { malformed: Some(Missing::Schema) });
    assert_eq!(new.metric("malformed_total{reason=\"schema\"}"), 1);
    new.put("a", 2, now_us()).await.unwrap();
    assert_eq!(new.hits(&new.site("a").await), Some(2));
    // The same process with another Snapshot: what memory holds is not read by another layout.
    new.snapshot = snapshot_of(1, "1m", "1h");
    assert_eq!(new.site("a").await, Found::Absent { malformed: Some(Missing::Schema) });
}

#[tokio::test]
async fn t42_tenants_and_hostile_entities_keep_apart() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot()).await;
    let hostile: [&[u8]; 7] =
        [b"a\r\nb", b"a\0b", b"}:user", b"{t4:acme:x", b"x'); DROP TABLE features;--", "\u{202e}e".as_bytes(), b"%00"];
    let user = |tenant: &str, entity: &[u8], score| Event {
        group: name("user"),
        tenant: tenant.into(),
        entity: Bytes::copy_from_slice(entity),
        event_us: now_us(),
        values: Some(vec![Some(FieldValue::Float(score))]),
    };
    let events: Vec<Event> = hostile
        .iter()
        .enumerate()
        .flat_map(|(index, entity)| [user("acme", entity, index as f64), user("globex", entity, -1.0 - index as f64)])
        .collect();
    sidecar.features.write(&sidecar.snapshot, &events).await.unwrap();
    let entities: Vec<Bytes> = hostile.iter().map(|entity| Bytes::copy_from_slice(entity)).collect();
    let group = name("user");
    let layout = sidecar.features.layout(&sidecar.snapshot, &group).unwrap();
    for (tenant, score) in [("acme", 0.0), ("globex", -1.0)] {
        let deadline = Instant::now() + DEADLINE;
        let lookup = sidecar.features.read(&sidecar.snapshot, tenant, &[&group], &entities, deadline).await.unwrap();
        for index in 0..hostile.len() {
            let expected = if score < 0.0 { score - index as f64 } else { index as f64 };
            let row = lookup.cell(index, 0).unwrap().row;
            assert_eq!(layout.value(row, 0), Some(FieldValue::Float(expected)));
        }
    }
    let too_long = [Bytes::from(vec![b'a'; 1 << 20])];
    let deadline = Instant::now() + DEADLINE;
    let refused = sidecar.features.read(&sidecar.snapshot, "acme", &[&group], &too_long, deadline).await.unwrap_err();
    assert_eq!(refused, FeatureError::Key { index: 0, fault: InvalidKey::Entity });
    let nobody = sidecar.features.read(&sidecar.snapshot, "", &[&group], &entities, deadline).await.unwrap_err();
    assert_eq!(nobody, FeatureError::Key { index: 0, fault: InvalidKey::Tenant });
}

#[tokio::test]
async fn a_hundred_misses_of_one_row_ask_the_store_once() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot()).await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    until_heard(&sidecar, 1).await;
    let found = join_all((0..100).map(|_| sidecar.site("a"))).await;
    assert!(found.iter().all(|found| sidecar.hits(found) == Some(1)));
    assert_eq!(sidecar.reads("l3", "hit"), 1);
    let shared = sidecar.metric("flights_total{outcome=\"shared\"}");
    assert_eq!(shared + sidecar.reads("l1", "hit"), 99, "the others waited for it, or came when it was there");
}

#[tokio::test]
async fn an_absence_is_remembered_shortly() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings(sqlite(folder.path()), None);
    settings.memory.keep_absent = Duration::from_millis(200);
    let sidecar = Sidecar::open(&settings);
    sidecar.until_well().await;
    let before = sidecar.reads("l3", "absent");
    let began = Instant::now();
    assert!(is_absent(&sidecar.site("a").await));
    assert!(is_absent(&sidecar.site("a").await));
    if began.elapsed() < Duration::from_millis(200) {
        assert_eq!(sidecar.reads("l3", "absent") - before, 1);
    }
    eventually("the store is asked again", async || {
        assert!(is_absent(&sidecar.site("a").await));
        sidecar.reads("l3", "absent") - before == 2
    })
    .await;
    assert!(began.elapsed() >= Duration::from_millis(200));
}

#[tokio::test]
async fn one_bad_event_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot()).await;
    let now = now_us();
    let mut events =
        vec![event("good", Some(1), now), event("future", Some(1), now + 60 * SECOND), event("", Some(1), now)];
    events.push(Event { values: Some(vec![Some(FieldValue::Bool(true)), None]), ..event("bad", None, now) });
    events.push(Event { group: name("nobody"), ..event("bad", None, now) });
    let Err(WriteError::Rejected(rejected)) = sidecar.features.write(&sidecar.snapshot, &events).await else {
        panic!("accepted")
    };
    assert_eq!(rejected.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(is_absent(&sidecar.site("good").await));
}

#[tokio::test]
async fn a_store_that_is_broken_is_unavailable_not_absent_and_nothing_is_remembered() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot_of(1, "1s", "1h")).await;
    sidecar.put("known", 1, now_us()).await.unwrap();
    sidecar.put("other", 2, now_us()).await.unwrap();
    until_heard(&sidecar, 2).await;
    assert_eq!(sidecar.hits(&sidecar.site("known").await), Some(1));
    let outside = rusqlite::Connection::open(folder.path().join("features.db")).unwrap();
    outside.execute_batch("ALTER TABLE features RENAME TO away").unwrap();
    let lookup = sidecar.look(&["site"], &["other"], DEADLINE).await;
    assert_eq!((lookup.get(0, 0), lookup.failed(), lookup.failed_tiers.l3), (&Found::Unavailable, true, true));
    eventually("what memory knows goes stale", async || is_stale(&sidecar.site("known").await)).await;
    assert!(matches!(sidecar.put("new", 1, now_us()).await, Err(WriteError::Refused { refused: 1, of: 1 })));
    outside.execute_batch("ALTER TABLE away RENAME TO features").unwrap();
    assert_eq!(sidecar.hits(&sidecar.site("other").await), Some(2), "at once: the error was not kept");
    assert!(is_absent(&sidecar.site("new").await));
}

#[tokio::test]
async fn t53_a_look_up_without_time_says_unavailable_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let sidecar = opened(&folder, snapshot()).await;
    sidecar.put("a", 1, now_us()).await.unwrap();
    let began = Instant::now();
    let lookup = sidecar.look(&["site"], &["a"], Duration::ZERO).await;
    assert_eq!(lookup.get(0, 0), &Found::Unavailable);
    assert!(began.elapsed() < Duration::from_millis(100));
    assert_eq!(sidecar.hits(&sidecar.site("a").await), Some(1));
}

#[tokio::test]
async fn memory_stays_within_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings(sqlite(folder.path()), None);
    settings.memory.size = spillway_core::units::ByteSize(128 << 10);
    let StoreSettings::Sqlite(store) = &mut settings.store else { panic!("sqlite") };
    store.timeout = Duration::from_secs(10);
    let sidecar = Sidecar::open(&settings);
    sidecar.until_well().await;
    let entities: Vec<String> = (0..4_000).map(|index| format!("entity-{index}")).collect();
    for entities in entities.chunks(1_000) {
        let events: Vec<Event> = entities.iter().map(|entity| event(entity, Some(1), now_us())).collect();
        sidecar.features.write(&sidecar.snapshot, &events).await.unwrap();
    }
    until_heard(&sidecar, 4_000).await;
    for entities in entities.chunks(1_000) {
        let entities: Vec<&str> = entities.iter().map(String::as_str).collect();
        let lookup = sidecar.look(&["site"], &entities, Duration::from_secs(10)).await;
        assert_eq!(lookup.unavailable(), 0);
    }
    assert!(sidecar.features.memory_bytes() <= 128 << 10);
    assert!(sidecar.features.memory_bytes() > 64 << 10, "and uses them");
}
