//! Confirmed writes on a real Redis: who has the old row in memory does not serve it after the answer.

use std::time::{Duration, Instant};

use crate::features_harness::redis::*;
use crate::features_harness::*;
use crate::support::fp32;
use crate::support::pod::{Pod, joined_model, resources};
use futures_util::future::join_all;
use spillway_core::feature::hearing::LEASE;
use spillway_core::inference::{InferRequest, Parameter, Parameters};
use spillway_runtime::feature_changes::confirm::PATIENCE;
use spillway_runtime::oip;
use spillway_sidecar::features::*;

/// What a slow machine adds.
const SLACK: Duration = Duration::from_secs(1);

/// In L1 of `sidecar`, and served from there.
async fn warm(sidecar: &Sidecar, entity: &str) {
    let in_memory = async || tier(&sidecar.site(entity).await) == Some(Tier::L1);
    eventually("the row is in memory", in_memory).await;
}

fn unconfirmed(sidecar: &Sidecar) -> u64 {
    ["listener", "redis", "crowded"]
        .iter()
        .map(|reason| sidecar.value(&format!("feature_writes_unconfirmed_total{{reason=\"{reason}\"}}")))
        .sum()
}

async fn every_confirmed_write_is_seen(mode: &str) {
    let region = Region::start(mode);
    let writer = region.sidecar().await;
    let (reader, _folder) = region.apart(None).await;
    for hits in 1..=200 {
        assert!(writer.put("a", hits, now_us()).await.unwrap().confirmed, "{mode}: {hits}");
        let lookup = reader.look(&["site"], &["a"], DEADLINE).await;
        assert_eq!(reader.hits(lookup.get(0, 0)), Some(hits), "{mode}");
        let told: u64 = region.server.redis_cli(&["get", "spillway:eu:features:changes"]).parse().unwrap();
        assert_eq!(lookup.sequence, Some(told), "{mode}");
        assert_eq!(tier(&reader.site("a").await), Some(Tier::L1), "{mode}: in memory before the next write");
    }
    assert!(writer.delete("a", now_us()).await.unwrap().confirmed);
    assert!(is_absent(&reader.site("a").await), "{mode}");
    assert_eq!(unconfirmed(&writer), 0);
    assert_eq!(writer.value("feature_confirmation_seconds_count"), 201);
    assert_eq!(writer.value("feature_listeners"), 2);
}

#[tokio::test]
async fn every_confirmed_write_is_seen_by_the_others() {
    every_confirmed_write_is_seen("plain").await;
}

#[tokio::test]
async fn in_a_cluster_every_confirmed_write_is_seen_by_the_others() {
    every_confirmed_write_is_seen("cluster").await;
}

#[tokio::test]
async fn who_is_cut_off_is_waited_for_until_its_lease_ends_and_serves_nothing_old() {
    let region = Region::start("plain");
    let link = Link::to(region.server.address()).await;
    let writer = region.sidecar().await;
    let (reader, _folder) = region.apart(Some(&link)).await;
    for hits in 1..=3 {
        assert!(writer.put("a", 2 * hits - 1, now_us()).await.unwrap().confirmed);
        warm(&reader, "a").await;
        link.hold(true);
        let began = Instant::now();
        let write = writer.put("a", 2 * hits, now_us());
        let mut write = std::pin::pin!(write);
        let answered = loop {
            tokio::select! {
                written = &mut write => break written.unwrap(),
                () = tokio::time::sleep(Duration::from_millis(20)) => drop(reader.site("a").await),
            }
        };
        assert!(answered.confirmed, "its lease has run out");
        assert!(began.elapsed() < LEASE + SLACK, "{:?}", began.elapsed());
        // Its store has no such row, and Redis it does not reach.
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            let lookup = reader.look(&["site"], &["a"], DEADLINE).await;
            assert!(is_absent(lookup.get(0, 0)), "{:?}", lookup.get(0, 0));
            assert_eq!(lookup.sequence, None, "it is deaf");
        }
        assert!(!reader.features.hears());
        link.hold(false);
        reader.until_well().await;
        assert_eq!(reader.hits(&reader.site("a").await), Some(2 * hits));
    }
    assert_eq!(reader.value("feature_leases_lost_total"), 3);
}

#[tokio::test]
async fn a_process_that_stood_still_serves_nothing_old() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    assert!(writer.put("a", 1, now_us()).await.unwrap().confirmed);
    let (warmed, is_warm) = tokio::sync::oneshot::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel();
    let folder = tempfile::tempdir().unwrap();
    let settings = FeatureSettings { store: sqlite(folder.path()), ..region.settings.clone() };
    // All of it runs on this thread, and so all of it stops.
    let reader = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let reader = Sidecar::open(&settings);
            reader.until_well().await;
            warm(&reader, "a").await;
            warmed.send(()).unwrap();
            goes_on.recv().unwrap();
            reader.hits(&reader.site("a").await)
        })
    });
    is_warm.await.unwrap();
    let began = Instant::now();
    assert!(writer.put("a", 2, now_us()).await.unwrap().confirmed);
    assert!((SLACK..LEASE + SLACK).contains(&began.elapsed()), "{:?}", began.elapsed());
    go_on.send(()).unwrap();
    assert_eq!(reader.join().unwrap(), Some(2));
}

#[tokio::test]
async fn who_lost_its_connection_to_the_channel_serves_nothing_old() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    let (reader, _folder) = region.apart(None).await;
    for hits in 1..=20 {
        region.server.redis_cli(&["client", "kill", "type", "pubsub"]);
        assert!(writer.put("a", hits, now_us()).await.unwrap().confirmed, "{hits}");
        assert_eq!(reader.hits(&reader.site("a").await), Some(hits));
        reader.site("a").await;
    }
}

#[tokio::test]
async fn a_message_that_is_lost_is_made_up_for_before_the_answer() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    let (reader, _folder) = region.apart(None).await;
    for hits in 1..=3 {
        assert!(writer.put("a", hits, now_us()).await.unwrap().confirmed);
        warm(&reader, "a").await;
        // A change whose message nobody gets, just before.
        region.server.redis_cli(&["incr", "spillway:eu:features:changes"]);
        assert!(writer.put("a", 10 * hits, now_us()).await.unwrap().confirmed);
        assert_eq!(reader.hits(&reader.site("a").await), Some(10 * hits));
    }
}

#[tokio::test]
async fn who_crashed_is_waited_for_once_and_who_ended_not_at_all() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    let (ended, _folder) = region.apart(None).await;
    ended.features.end().await;
    assert!(!ended.features.hears());
    let began = Instant::now();
    assert!(writer.put("a", 1, now_us()).await.unwrap().confirmed);
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    let (crashed, _folder) = region.apart(None).await;
    drop(crashed);
    let began = Instant::now();
    assert!(writer.put("a", 2, now_us()).await.unwrap().confirmed);
    assert!((SLACK..LEASE + SLACK).contains(&began.elapsed()), "{:?}", began.elapsed());
    let began = Instant::now();
    assert!(writer.put("a", 3, now_us()).await.unwrap().confirmed);
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
}

#[tokio::test]
async fn without_redis_a_write_is_answered_unconfirmed() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    let link = Link::to(region.server.address()).await;
    let (_reader, _folder) = region.apart(Some(&link)).await;
    // It dies while the writer waits for the other one's word.
    link.hold(true);
    let began = Instant::now();
    let mut write = Box::pin(writer.put("a", 1, now_us()));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut write).await;
    assert!(early.is_err(), "{early:?}");
    region.server.kill();
    let written = write.await.unwrap();
    assert_eq!((written.count, written.confirmed), (1, false));
    assert!(began.elapsed() < PATIENCE + SLACK, "{:?}", began.elapsed());
    // It is dead already.
    let began = Instant::now();
    assert!(!writer.put("a", 2, now_us()).await.unwrap().confirmed);
    assert!(began.elapsed() < 2 * SLACK, "{:?}", began.elapsed());
    assert_eq!(writer.value("feature_writes_unconfirmed_total{reason=\"redis\"}"), 2);
}

#[tokio::test]
async fn after_a_restart_of_redis_nothing_is_confirmed_until_all_leases_from_before_have_run_out() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    let link = Link::to(region.server.address()).await;
    let (reader, _folder) = region.apart(Some(&link)).await;
    assert!(writer.put("a", 1, now_us()).await.unwrap().confirmed);
    warm(&reader, "a").await;
    // Cut off, the reader does not notice that its Redis is gone, and the new one does not know of the reader.
    link.hold(true);
    region.server.kill();
    region.server.start();
    let began = Instant::now();
    writer.until_well().await;
    let mut hits = 2;
    while !writer.put("a", hits, now_us()).await.unwrap().confirmed {
        hits += 1;
    }
    assert!(began.elapsed() > LEASE - SLACK, "{:?}", began.elapsed());
    assert!(is_absent(&reader.site("a").await));
}

#[tokio::test]
async fn a_list_with_wrong_bytes_blocks_no_write_and_heals() {
    const LIST: &str = "spillway:eu:features:listeners";
    let region = Region::start("plain");
    let sidecar = region.sidecar().await;
    region.server.redis_cli(&["hset", LIST, "a", "1 99999999999999", "b", "x", "c", "1 2 3", "d", "-1 5", "e", ""]);
    let began = Instant::now();
    assert!(sidecar.put("a", 1, now_us()).await.unwrap().confirmed);
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    for wrong in [&["set", LIST, "x"][..], &["hset", LIST, "since", "x"], &["hset", LIST, "seen", ""], &["del", LIST]] {
        region.server.redis_cli(wrong);
        // What was told before the list began anew is not confirmed, what is told after it is.
        eventually("writes are confirmed again", async || sidecar.put("a", 1, now_us()).await.unwrap().confirmed).await;
        sidecar.until_well().await;
    }
}

#[tokio::test]
async fn many_waits_share_one_question() {
    let region = Region::start("plain");
    let writer = region.sidecar().await;
    let (crashed, _folder) = region.apart(None).await;
    drop(crashed);
    let before = region.calls("eval");
    let entities: Vec<String> = (0..100).map(|_| unique("e")).collect();
    let writes = entities.iter().map(async |entity| writer.put(entity, 1, now_us()).await.unwrap().confirmed);
    assert!(join_all(writes).await.into_iter().all(|confirmed| confirmed));
    let calls = region.calls("eval") - before;
    assert!(calls < 600, "100 writes, their 100 messages, and 3 s of questions each 20 ms at most: {calls}");
}

#[tokio::test]
async fn deaf_a_row_from_memory_is_of_use_only_where_no_tier_answers_and_counts_as_stale() {
    let region = Region::start("plain");
    let (sidecar, link) = region.linked().await;
    assert!(sidecar.put("a", 1, now_us()).await.unwrap().confirmed);
    link.hold(true);
    eventually("it is deaf, and has dropped all", async || sidecar.value("feature_leases_lost_total") == 1).await;
    for _ in 0..3 {
        assert_eq!(tier(&sidecar.site("a").await), Some(Tier::L3), "asked each time");
    }
    let _store = region.set_aside_store();
    let lookup = sidecar.look(&["site"], &["a"], DEADLINE).await;
    let found = lookup.get(0, 0);
    assert_eq!((sidecar.hits(found), tier(found), is_stale(found)), (Some(1), Some(Tier::L1), true));
    assert_eq!(lookup.fresh_until_us, Some(0));
}

#[tokio::test]
async fn a_look_up_says_how_long_its_rows_stay_fresh() {
    let region = Region::start("plain");
    let sidecar = region.sidecar().await;
    let (old, new) = (now_us() - 30_000_000, now_us());
    sidecar.put("old", 1, old).await.unwrap();
    sidecar.put("new", 1, new).await.unwrap();
    const MINUTE: i64 = 60_000_000;
    let until = async |entities: &[&str]| sidecar.look(&["site"], entities, DEADLINE).await.fresh_until_us;
    for _ in 0..3 {
        assert_eq!(until(&["new"]).await, Some(new + MINUTE));
        assert_eq!(until(&["new", "old"]).await, Some(old + MINUTE));
        assert_eq!(until(&["new", "never-written"]).await, Some(new + MINUTE), "an absence ends with a write");
    }
    sidecar.put("stale", 1, now_us() - 2 * MINUTE).await.unwrap();
    assert_eq!(until(&["new", "stale"]).await, Some(0));
    assert_eq!(until(&[]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_says_which_changes_it_reflects_and_how_long_its_rows_stay_fresh() {
    let region = Region::start("plain");
    let resources = resources(&joined_model("phishing", "  backend: onnx\n  missingFeature: refuse"));
    let stores =
        format!("features: {{redis: {{servers: ['{}']}}, sqlite: FOLDER/features.db}}\n", region.server.address());
    let pod = Pod::start(&resources, &stores).await.ready().await;
    let (cases, _) = crate::support::expected();
    pod.put(&cases[..1], Duration::ZERO).await;
    pod.put(&cases[1..2], Duration::from_secs(2 * 3_600)).await;
    let mut gateway = pod.gateway().await;
    // The sequence, and the freshness left in milliseconds.
    let mut said = async |case: usize, sent: bool| {
        let entity = Parameter::Text(cases[case].entity.clone());
        let request = InferRequest {
            model: "phishing".into(),
            inputs: if sent { vec![fp32("features", &[1, 9], &cases[case].features)] } else { Vec::new() },
            parameters: Parameters(vec![("entity_id".into(), entity)]),
            ..InferRequest::default()
        };
        let answer = gateway.model_infer(oip::encode_request(&request)).await.unwrap();
        let number = |name| answer.metadata().get(name).map(|value| value.to_str().unwrap().parse::<u64>().unwrap());
        (number("spillway-feature-sequence"), number("spillway-feature-fresh-ms"))
    };
    eventually("changes are heard", async || said(0, false).await.0.is_some()).await;
    let told: u64 = region.server.redis_cli(&["get", "spillway:eu:features:changes"]).parse().unwrap();
    let (sequence, fresh) = said(0, false).await;
    assert_eq!(sequence, Some(told));
    assert!((3_500_000..=3_600_000).contains(&fresh.unwrap()), "{fresh:?}");
    assert_eq!(said(1, false).await, (Some(told), Some(0)), "stale");
    assert_eq!(said(0, true).await, (None, None), "the client's own features");
    // Its end gives the lease back: nobody waits for it.
    let leases = || region.server.redis_cli(&["hlen", "spillway:eu:features:listeners"]);
    assert_eq!(leases(), "4");
    drop(gateway);
    pod.stop().await;
    assert_eq!(leases(), "3", "what is said of the list itself");
}
