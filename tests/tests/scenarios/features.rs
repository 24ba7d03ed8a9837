//! Features in: loaded from files, written by one sidecar, seen by the other.

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use scylla::client::session_builder::SessionBuilder;
use spillway_proto::feature::value::Kind;
use spillway_proto::feature::{
    DeleteRequest, Found, GetRequest, GetResponse, Key, PutRequest, PutResponse, Row, Value,
};
use spillway_tests::harness::client::Client;
use spillway_tests::harness::process::{binary, spillway};
use spillway_tests::harness::region::{Region, text, wait_until_ready};
use spillway_tests::harness::servers::{Redis, Server, redis_cli};
use spillway_tests::harness::{eventually, grpc};

const SERVICE: &str = "/spillway.feature.v1.FeatureService";
const SOON: Duration = Duration::from_secs(10);
const HEADER: &str = "entity,event_time,age_of_domain,is_popular,long_url,ip_in_url,https";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn csv_and_json_lines_are_loaded_and_bad_rows_are_told_with_line_and_reason() {
    let mut region = Region::new("load");
    region.start_sidecars().await;
    let csv = region.folder.join("rows.csv");
    let rows = [
        HEADER,
        "a-1,2026-01-01T00:00:00Z,1,0.5,0,0,1",
        "a-2,yesterday,1,0.5,0,0,1",
        "a-3,2026-01-01T00:00:00Z,heavy,0.5,0,0,1",
        "a-4,2026-01-01T00:00:00Z,1",
        "a-5,2099-01-01T00:00:00Z,1,0.5,0,0,1",
        ",2026-01-01T00:00:00Z,1,0.5,0,0,1",
        "a-6,2026-01-01T00:00:00Z,,0.5,0,0,1",
    ];
    std::fs::write(&csv, rows.join("\n")).expect("a file");
    let output = load(&region, &csv);
    assert_eq!(output.status.code(), Some(1), "some rows were bad");
    let told = String::from_utf8_lossy(&output.stderr);
    for (line, reason) in
        [(3, "event_time"), (4, "age_of_domain"), (5, "expected 7 columns"), (6, "future"), (7, "entity")]
    {
        let place = format!("{}:{line}: ", csv.display());
        assert!(told.lines().any(|told| told.contains(&place) && told.contains(reason)), "{line} {reason}\n{told}");
    }
    assert!(told.contains("2 rows written, 5 refused"), "{told}");
    let client = region.caller_of_pod("loader", 0);
    assert_eq!(number(&get(&client, "a-1").await, "age_of_domain"), Some(1.0));
    let empty = get(&client, "a-6").await;
    assert_eq!(
        (number(&empty, "age_of_domain"), number(&empty, "is_popular")),
        (None, Some(0.5)),
        "an empty cell is null"
    );
    for refused in ["a-2", "a-3", "a-4", "a-5"] {
        assert!(!get(&client, refused).await.present, "{refused} was refused, not half written");
    }

    let jsonl = region.folder.join("rows.jsonl");
    let rows = [
        r#"{"entity":"b-1","event_time":"2026-01-01T00:00:00Z","age_of_domain":0.25,"https":1}"#,
        r#"{"entity":"b-2","event_time":1767225600000000,"no_such_field":1}"#,
        r"not json",
        r#"{"entity":"b-3","event_time":1767225600000000,"https":null}"#,
    ];
    std::fs::write(&jsonl, rows.join("\n")).expect("a file");
    let output = load(&region, &jsonl);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains(":2: ") && told.contains("no_such_field") && told.contains(":3: "), "{told}");
    assert_eq!(number(&get(&client, "b-1").await, "age_of_domain"), Some(0.25));

    // All right: nothing to tell, and again it changes nothing.
    std::fs::write(&csv, format!("{HEADER}\na-1,2026-01-02T00:00:00Z,0,0,0,0,0\n")).expect("a file");
    for _ in 0..2 {
        let output = load(&region, &csv);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(number(&get(&client, "a-1").await, "age_of_domain"), Some(0.0));
    }
    // A group that is not there, a file that is not there.
    let mut arguments = region.load_arguments("nothing", text(&csv), 0);
    assert_eq!(run(&arguments).status.code(), Some(1));
    arguments = region.load_arguments("site", "/nonexistent.csv", 0);
    assert_eq!(run(&arguments).status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_was_killed_goes_on_where_it_was() {
    let mut region = Region::new("load-resume");
    region.start_sidecars().await;
    const ROWS: usize = 20_000;
    let csv = region.folder.join("many.csv");
    // The first batch has a bad row, and one that is older than what the group keeps.
    let mut content = format!("{HEADER}\nbad,2026-01-01T00:00:00Z,many,0,0,0,0\nold,2001-01-01T00:00:00Z,1,0,0,0,0");
    for row in 0..ROWS {
        content.push_str(&format!("\nm-{row},2026-01-01T00:00:00Z,{},0,0,0,0", row % 2));
    }
    std::fs::write(&csv, content).expect("a file");
    let mut arguments = region.load_arguments("site", text(&csv), 0);
    arguments.extend(["--batch", "50"].map(str::to_owned));
    let mut loader = Command::new(binary()).args(&arguments).stderr(Stdio::null()).spawn().expect("it starts");
    let progress = region.folder.join("many.csv.site.progress");
    eventually("some rows are loaded", SOON, async || progress.exists().then_some(())).await;
    loader.kill().expect("it runs");
    loader.wait().expect("it ends");
    assert!(progress.exists(), "it was cut off before its end");
    let output = run(&arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("going on after line"), "{told}");
    // What the first half of the load met is not forgotten.
    assert_eq!(output.status.code(), Some(1), "{told}");
    let all = format!("{ROWS} rows written, 1 refused, 1 not kept: past the group's retainFor");
    assert_eq!(told.lines().last(), Some(all.as_str()), "{told}");
    assert!(!progress.exists(), "a finished load leaves nothing");
    let client = region.caller_of_pod("loader", 0);
    for row in (0..ROWS).step_by(997).chain([0, ROWS - 1]) {
        assert_eq!(number(&get(&client, &format!("m-{row}")).await, "age_of_domain"), Some((row % 2) as f64), "{row}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_event_time_wins_in_every_tier() {
    let mut region = Region::new("load-order");
    let redis = Server::redis(&region.folder, Redis::Plain);
    let cassandra = Server::cassandra(&region.folder);
    region.use_stores(Some(redis.address), cassandra.address);
    region.start_sidecars().await;
    let (first, second) = (region.caller_of_pod("loader", 0), region.caller_of_pod("loader", 1));
    let now = now_micros();
    for (at, value) in [(now - 2_000_000, 1.0), (now - 3_000_000, 2.0), (now - 1_000_000, 3.0), (now - 2_500_000, 4.0)]
    {
        put(&first, "order", at, value).await;
        // Also where an older value is asked for in between, and so copied into nearer tiers.
        get(&second, "order").await;
    }
    for client in [&first, &second] {
        eventually("the newest is served", SOON, async || {
            (number(&get(client, "order").await, "age_of_domain") == Some(3.0)).then_some(())
        })
        .await;
    }
    // Without the nearer tiers: what the durable store itself says.
    redis_cli(&redis, &["FLUSHALL"]);
    eventually("the durable store serves the newest", SOON, async || {
        let found = get(&second, "order").await;
        assert_eq!(number(&found, "age_of_domain"), Some(3.0));
        Some(())
    })
    .await;
    // A deletion is an event like any other: older than the value it does nothing.
    delete(&first, "order", now - 1_500_000).await;
    assert!(get(&first, "order").await.present);
    delete(&first, "order", now - 500_000).await;
    for client in [&first, &second] {
        eventually("the deletion is seen", SOON, async || (!get(client, "order").await.present).then_some(())).await;
    }
    put(&first, "order", now - 700_000, 5.0).await;
    assert!(!get(&first, "order").await.present, "an older write does not bring it back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_through_one_sidecar_is_seen_in_the_memory_of_the_other() {
    let mut region = Region::new("load-coherence");
    let redis = Server::redis(&region.folder, Redis::Plain);
    let sqlite = region.folder.join("features.sqlite");
    // Kept for an hour: only a word about the write can make the other sidecar forget.
    region.features = format!(
        "  memory: {{ size: 64MiB, keep: 1h, keepAbsent: 5s }}\n  redis: {{ servers: [\"{}\"], timeout: 50ms }}\n  sqlite: {}\n",
        redis.address,
        text(&sqlite)
    );
    region.start_sidecars().await;
    let (first, second) = (region.caller_of_pod("loader", 0), region.caller_of_pod("loader", 1));
    let start = now_micros() - 60_000_000;
    for round in 0..20 {
        put(&first, "shared", start + round * 1_000, round as f64).await;
        eventually("the other sidecar serves what was written", Duration::from_secs(2), async || {
            (number(&get(&second, "shared").await, "age_of_domain") == Some(round as f64)).then_some(())
        })
        .await;
    }
    eventually("it is served from memory between writes", SOON, async || {
        (get(&second, "shared").await.tier == "l1").then_some(())
    })
    .await;
    assert!(region.sidecars_sum("spillway_sidecar_feature_invalidations_total", &["kind=\"heard\""]) > 0.0);

    // The line to Redis is cut, words are missed: when it is back, the gap is noticed and the memory emptied.
    let before = region.sidecars_sum("spillway_sidecar_feature_invalidations_total", &["kind=\"gap\""])
        + region.sidecars_sum("spillway_sidecar_feature_invalidations_total", &["kind=\"lost\""]);
    redis_cli(&redis, &["CLIENT", "KILL", "TYPE", "pubsub"]);
    put(&first, "shared", start + 30_000, 77.0).await;
    eventually("the other sidecar serves the write that it may have missed", SOON, async || {
        (number(&get(&second, "shared").await, "age_of_domain") == Some(77.0)).then_some(())
    })
    .await;
    eventually("the loss is counted", SOON, async || {
        let now = region.sidecars_sum("spillway_sidecar_feature_invalidations_total", &["kind=\"gap\""])
            + region.sidecars_sum("spillway_sidecar_feature_invalidations_total", &["kind=\"lost\""]);
        (now > before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_listens_has_its_stores_and_one_whose_store_is_gone_starts_all_the_same() {
    let mut region = Region::new("load-first");
    let redis = Server::redis(&region.folder, Redis::Plain);
    let cassandra = Server::cassandra(&region.folder);
    region.use_stores(Some(redis.address), cassandra.address);
    region.apply();
    let first = region.spawn_sidecar(0);
    let client = region.caller_of_pod("loader", 0);
    let request = one_row("at-once", now_micros(), 1.0);
    let answer = grpc::call_once(&client, &format!("{SERVICE}/Put"), &request).await.expect("an answer");
    assert_eq!(answer.decode::<PutResponse>().written, 1, "the first write is taken");
    assert_eq!(number(&get(&client, "at-once").await, "age_of_domain"), Some(1.0));

    cassandra.kill();
    let second = region.spawn_sidecar(1);
    wait_until_ready(&second).await;
    let client = region.caller_of_pod("loader", 1);
    assert_eq!(number(&get(&client, "at-once").await, "age_of_domain"), Some(1.0), "Redis has it");
    let answer = grpc::call_once(&client, &format!("{SERVICE}/Put"), &request).await.expect("an answer");
    assert_eq!((answer.code, answer.error_code()), (tonic::Code::Unavailable, "features-unavailable"));
    let log = second.log();
    assert!(log.contains("starting without a tier") && log.contains("l3"), "{log}");
    assert!(!first.log().contains("starting without a tier"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_the_store_refuses_ends_at_once_and_the_log_says_why() {
    let mut region = Region::new("load-refused");
    let cassandra = Server::cassandra(&region.folder);
    region.use_stores(None, cassandra.address);
    region.start_sidecars().await;
    let csv = region.folder.join("rows.csv");
    std::fs::write(&csv, format!("{HEADER}\nr-1,2026-01-01T00:00:00Z,1,0.5,0,0,1\n")).expect("a file");
    let session = SessionBuilder::new().known_node(cassandra.address.to_string()).build().await.expect("a session");
    session.query_unpaged("ALTER TABLE spillway.features DROP schema_ver", ()).await.expect("it is dropped");
    let begun = Instant::now();
    let output = load(&region, &csv);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(begun.elapsed() < SOON && told.contains("refused 1 of 1"), "{:?} {told}", begun.elapsed());
    let log = region.sidecars[0].log();
    assert!(log.contains("a store fails") && log.contains("invalid") && log.contains("schema_ver"), "{log}");
    session.query_unpaged("ALTER TABLE spillway.features ADD schema_ver int", ()).await.expect("it is there again");
    eventually("the load goes through", SOON, async || load(&region, &csv).status.success().then_some(())).await;
}

fn load(region: &Region, file: &std::path::Path) -> std::process::Output {
    run(&region.load_arguments("site", text(file), 0))
}

fn run(arguments: &[String]) -> std::process::Output {
    spillway(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn key(entity: &str) -> Key {
    Key { group: "site".into(), entity: entity.to_owned().into(), tenant: String::new() }
}

async fn get(client: &Client, entity: &str) -> Found {
    let request = GetRequest { keys: vec![key(entity)] };
    let answer = grpc::call_once(client, &format!("{SERVICE}/Get"), &request).await.expect("an answer");
    answer.decode::<GetResponse>().rows.remove(0)
}

async fn put(client: &Client, entity: &str, event_time_micros: i64, age: f64) {
    let request = one_row(entity, event_time_micros, age);
    let answer = grpc::call_once(client, &format!("{SERVICE}/Put"), &request).await.expect("an answer");
    let answer: PutResponse = answer.decode();
    assert!(answer.rejections.is_empty(), "{answer:?}");
}

fn one_row(entity: &str, event_time_micros: i64, age: f64) -> PutRequest {
    let value = Value { kind: Some(Kind::DoubleValue(age)) };
    let fields = HashMap::from([("age_of_domain".to_owned(), value)]);
    PutRequest { rows: vec![Row { key: Some(key(entity)), event_time_micros, fields }] }
}

async fn delete(client: &Client, entity: &str, event_time_micros: i64) {
    let request = DeleteRequest { keys: vec![key(entity)], event_time_micros };
    let answer = grpc::call_once(client, &format!("{SERVICE}/Delete"), &request).await.expect("an answer");
    answer.decode::<spillway_proto::feature::DeleteResponse>();
}

fn number(found: &Found, field: &str) -> Option<f64> {
    match found.row.as_ref()?.fields.get(field)?.kind.as_ref()? {
        Kind::DoubleValue(value) => Some(*value),
        _ => None,
    }
}

fn now_micros() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_micros()).expect("not that far in the future")
}
