//! Each dependency refuses, hangs, is slow or answers wrongly: what the client gets, and that nothing wrong stays.

use std::time::{Duration, Instant};

use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use spillway_tests::harness::client::{Answer, Client, Protocol};
use spillway_tests::harness::doubles::{Manner, TritonDouble};
use spillway_tests::harness::eventually;
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::inference::{Asked, Case, INFER, MODEL, assert_scores, cases, entity, message, scores};
use spillway_tests::harness::region::Region;
use spillway_tests::harness::relay::{Link, Relay};
use spillway_tests::harness::servers::{Redis, Server, redis_cli};
use tonic::Code;

/// What each request here asks for.
const DEADLINE: Duration = Duration::from_millis(500);
/// What an answer may come later than that, on a busy machine.
const SLACK: Duration = Duration::from_millis(250);
const BACK: Duration = Duration::from_secs(60);
const READS: &str = "spillway_sidecar_feature_reads_total";

/// Redis is a nearer copy: without it every answer is right, and in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_refusing_hanging_slow_or_wrong_costs_time_but_no_answer() {
    let mut region = Region::new("faults-redis");
    let redis = Server::redis(&region.folder, Redis::Plain);
    let cassandra = Server::cassandra(&region.folder);
    let relay = Relay::to(redis.address).await;
    region.use_stores(Some(relay.address), cassandra.address);
    forget_at_once(&mut region);
    region.start().await;
    let client = region.client("acme");
    let all = cases();
    let failed = || region.sidecars_sum(READS, &["tier=\"l2\"", "outcome=\"error\""]);
    let right = async |what: &str| {
        for case in &all[..8] {
            let answer = ask(&client, case).await;
            assert_scores(what, &scores(&answer), std::slice::from_ref(case));
            assert_eq!(answer.header("spillway-degraded"), "", "{what}");
        }
    };
    right("good").await;

    // wrong: other bytes, another type, somebody else's row under the key.
    let key = |case: &Case, group: &str| format!("spillway:eu-west:f:{{s:{}}}:{group}", case.entity);
    for case in &all[..4] {
        assert_eq!(redis_cli(&redis, &["EXISTS", &key(case, "site")]), "1", "the row is in Redis under this key");
    }
    redis_cli(&redis, &["SET", &key(&all[0], "site"), "no row of ours"]);
    redis_cli(&redis, &["DEL", &key(&all[1], "site")]);
    redis_cli(&redis, &["RPUSH", &key(&all[1], "site"), "a", "list"]);
    redis_cli(&redis, &["COPY", &key(&all[3], "page"), &key(&all[2], "site"), "REPLACE"]);
    redis_cli(&redis, &["SETRANGE", &key(&all[3], "site"), "100000", "huge"]);
    right("wrong").await;
    right("wrong, again").await;

    // slow: far beyond what the tier may take.
    let before = failed();
    relay.set(Link::Slow(Duration::from_millis(400)));
    right("slow").await;
    relay.set(Link::Good);
    assert!(failed() > before, "a read that is given up is counted");
    right("after slow").await;

    // hang
    let before = failed();
    redis.hang();
    right("hanging").await;
    redis.resume();
    assert!(failed() > before);
    right("after hanging").await;

    // refuse
    let before = failed();
    redis.kill();
    right("refusing").await;
    assert!(failed() > before);
    redis.restart();
    let hits = || region.sidecars_sum(READS, &["tier=\"l2\"", "outcome=\"hit\""]);
    let before = hits();
    eventually("Redis is used again", BACK, async || {
        right("after refusing").await;
        (hits() > before).then_some(())
    })
    .await;
}

/// Without the durable store, what no nearer tier holds is the declared default, and said to be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cassandra_refusing_hanging_slow_or_wrong_gives_declared_defaults_that_are_told() {
    let mut region = Region::new("faults-cassandra");
    let redis = Server::redis(&region.folder, Redis::Plain);
    let cassandra = Server::cassandra(&region.folder);
    let relay = Relay::to(cassandra.address).await;
    region.use_stores(Some(redis.address), relay.address);
    forget_at_once(&mut region);
    region.start().await;
    let client = region.client("acme");
    let all = cases();
    let defaults = scores(&client.post(INFER, &entity("nobody")).await.expect("an answer"));
    let defaulted = |what: &str, answer: &Answer| {
        assert_eq!(answer.header("spillway-degraded"), "1 default-feature", "{what}: {:?}", answer.headers);
        assert!((scores(answer)[0] - defaults[0]).abs() < 1e-6, "{what}");
    };
    let back = async |what: &str, case: &Case| {
        eventually(&format!("the right answer after {what}"), BACK, async || {
            let answer = ask(&client, case).await;
            let right = answer.status == 200 && answer.header("spillway-degraded").is_empty();
            right.then(|| assert_scores(what, &scores(&answer), std::slice::from_ref(case)))
        })
        .await;
    };

    // wrong: bytes that are no row of ours.
    let session = SessionBuilder::new().known_node(cassandra.address.to_string()).build().await.expect("a session");
    let case = &all[10];
    let good = cell(&session, case).await;
    set_cell(&session, case, &[0xde, 0xad, 0xbe, 0xef]).await;
    redis_cli(&redis, &["FLUSHALL"]);
    let answer = ask(&client, case).await;
    assert_eq!(answer.header("spillway-degraded"), "1 default-feature", "wrong: {:?}", answer.headers);
    assert!(region.sidecars_sum("spillway_sidecar_feature_malformed_total", &[]) > 0.0, "it is counted");
    set_cell(&session, case, &good).await;
    back("wrong", case).await;

    // slow: what Redis has is right, what it has not is the default.
    let case = &all[11];
    back("nothing", &all[12]).await;
    redis_cli(&redis, &["FLUSHALL"]);
    back("nothing", &all[12]).await;
    relay.set(Link::Slow(Duration::from_secs(2)));
    defaulted("slow", &ask(&client, case).await);
    let near = ask(&client, &all[12]).await;
    assert_scores("in Redis", &scores(&near), &all[12..13]);
    relay.set(Link::Good);
    back("slow", case).await;

    // hang
    let case = &all[13];
    redis_cli(&redis, &["FLUSHALL"]);
    cassandra.hang();
    defaulted("hanging", &ask(&client, case).await);
    cassandra.resume();
    back("hanging", case).await;

    // refuse; where defaults are not accepted, it is a clear refusal.
    let case = &all[14];
    redis_cli(&redis, &["FLUSHALL"]);
    cassandra.kill();
    defaulted("refusing", &ask(&client, case).await);
    region.edit("model.yaml", "missingFeature: default", "missingFeature: refuse");
    region.apply();
    eventually("defaults are not accepted any more", Duration::from_secs(10), async || {
        let answer = ask(&client, case).await;
        (answer.status == 503 && answer.error_code() == "features-unavailable").then_some(())
    })
    .await;
    let answer =
        grpc::call_once(&client, MODEL_INFER, &message(&Asked::Entity(&case.entity))).await.expect("an answer");
    assert_eq!((answer.code, answer.error_code()), (Code::Unavailable, "features-unavailable"));
    cassandra.restart();
    back("refusing", case).await;
}

/// A value past its freshness is served while the durable store is gone, and said to be stale.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_value_is_served_and_told_while_the_durable_store_is_gone() {
    let mut region = Region::new("faults-stale");
    let cassandra = Server::cassandra(&region.folder);
    region.use_stores(None, cassandra.address);
    region.edit("features.yaml", "freshFor: 3650d", "freshFor: 2s");
    region.start_sidecars().await;
    // The same features as in the data set, but as of now.
    let case = &cases()[0];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_micros();
    for group in ["site", "page"] {
        let source = std::fs::read_to_string(spillway_tests::root().join(format!("cli/dev/model/{group}.csv")))
            .expect("features");
        let header = source.lines().next().expect("a header");
        let row = source.lines().find(|line| line.starts_with(&format!("{},", case.entity))).expect("the entity");
        let at = header.split(',').position(|column| column == "event_time").expect("a column");
        let row: Vec<String> = row
            .split(',')
            .enumerate()
            .map(|(index, cell)| if index == at { now.to_string() } else { cell.to_owned() })
            .collect();
        let file = region.folder.join(format!("{group}.csv"));
        std::fs::write(&file, format!("{header}\n{}\n", row.join(","))).expect("a file");
        let arguments = region.load_arguments(group, file.to_str().expect("UTF-8"), 0);
        spillway_tests::harness::process::spillway_ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    }
    region.start_gateway().await;
    let client = region.client("acme");
    let fresh = ask(&client, case).await;
    assert_scores("fresh", &scores(&fresh), std::slice::from_ref(case));
    cassandra.kill();
    let stale = eventually("the value is past its freshness", Duration::from_secs(10), async || {
        let answer = ask(&client, case).await;
        assert_scores("fresh or stale", &scores(&answer), std::slice::from_ref(case));
        (answer.header("spillway-degraded") == "1 stale-feature").then_some(answer)
    })
    .await;
    let age: u64 = stale.header("spillway-feature-age-ms").parse().expect("an age");
    assert!((2_000..60_000).contains(&age), "{age}");
    assert!(region.sidecars_sum("spillway_sidecar_degraded_total", &["reason=\"stale-feature\""]) > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triton_refusing_hanging_or_slow_is_told_within_the_deadline() {
    let mut region = Region::new("faults-triton");
    let triton = Server::triton(&region.folder, &[MODEL]);
    let relay = Relay::to(triton.address).await;
    region.use_triton(relay.address);
    region.start().await;
    let client = region.client("acme");
    let case = &cases()[0];
    let errors =
        |reason: &str| region.sidecars_sum("spillway_sidecar_model_errors_total", &[&format!("reason=\"{reason}\"")]);
    let back = async |what: &str| {
        eventually(&format!("the right answer after {what}"), BACK, async || {
            let answer = ask(&client, case).await;
            (answer.status == 200).then(|| assert_scores(what, &scores(&answer), std::slice::from_ref(case)))
        })
        .await;
    };
    back("nothing").await;

    // slow
    let before = errors("deadline-exceeded");
    relay.set(Link::Slow(Duration::from_secs(2)));
    let answer = ask(&client, case).await;
    assert_eq!((answer.status.as_u16(), answer.error_code()), (504, "deadline-exceeded"));
    let (answer, took) = ask_grpc(&client, case).await;
    assert_eq!((answer.code, answer.error_code()), (Code::DeadlineExceeded, "deadline-exceeded"), "{took:?}");
    relay.set(Link::Good);
    back("slow").await;
    eventually("each is counted", Duration::from_secs(5), async || {
        (errors("deadline-exceeded") - before >= 1.0).then_some(())
    })
    .await;

    // hang
    triton.hang();
    let answer = ask(&client, case).await;
    assert_eq!((answer.status.as_u16(), answer.error_code()), (504, "deadline-exceeded"));
    triton.resume();
    back("hanging").await;

    // refuse
    triton.kill();
    let answer = ask(&client, case).await;
    assert_eq!((answer.status.as_u16(), answer.error_code()), (503, "model-unavailable"), "{:?}", answer.json());
    let (answer, _) = ask_grpc(&client, case).await;
    assert_eq!((answer.code, answer.error_code()), (Code::Unavailable, "model-unavailable"));
    triton.restart();
    back("refusing").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t40_a_wrong_answer_of_triton_is_a_502_and_never_reaches_the_client() {
    let triton = TritonDouble::start();
    let mut region = Region::new("faults-wrong");
    region.use_triton(triton.address);
    region.start().await;
    let client = region.client("acme");
    let case = &cases()[0];
    let wrong = [Manner::WrongId, Manner::WrongShape, Manner::WrongDatatype, Manner::WrongLength, Manner::WrongName];
    for manner in wrong {
        let errors = || region.sidecars_sum("spillway_sidecar_model_errors_total", &["reason=\"bad-model-answer\""]);
        let before = errors();
        triton.set(manner);
        let answer = ask(&client, case).await;
        assert_eq!(
            (answer.status.as_u16(), answer.error_code()),
            (502, "bad-model-answer"),
            "{manner:?}: {:?}",
            answer.json()
        );
        let (answer, _) = ask_grpc(&client, case).await;
        assert_eq!((answer.code, answer.error_code()), (Code::Internal, "bad-model-answer"), "{manner:?}");
        assert!(errors() - before >= 2.0, "{manner:?} is counted");
        triton.set(Manner::Right);
        let answer = ask(&client, case).await;
        assert_scores("nothing wrong stayed", &scores(&answer), std::slice::from_ref(case));
    }
    // t54: one request is one call, or at most one more on another pod.
    triton.set(Manner::Fails);
    let before = triton.seen().len();
    for _ in 0..20 {
        let answer = ask(&client, case).await;
        assert!(answer.status.is_server_error(), "{}", answer.status);
    }
    let calls = triton.seen().len() - before;
    assert!(calls <= 22, "{calls} calls for 20 requests");
    // t53: work whose time is over before it arrives never reaches the model.
    triton.set(Manner::Right);
    let before = triton.seen().len();
    let mut request = client.json(INFER, &entity(&case.entity));
    request.headers_mut().insert("grpc-timeout", "1n".parse().expect("a header"));
    let answer = client.send(Protocol::H2, request).await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.error_code()), (504, "deadline-exceeded"));
    assert_eq!(triton.seen().len(), before);
    // Late is late, however right: and the time is kept though nobody downstream keeps it.
    triton.set(Manner::Late(Duration::from_secs(5)));
    let answer = ask(&client, case).await;
    assert_eq!((answer.status.as_u16(), answer.error_code()), (504, "deadline-exceeded"));
}

/// One entity's prediction on a connection of its own; the answer must come in time.
async fn ask(client: &Client, case: &Case) -> Answer {
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let mut request = client.json(INFER, &entity(&case.entity));
    let header = DEADLINE.as_millis().to_string().parse().expect("a header");
    request.headers_mut().insert("x-request-timeout-ms", header);
    let begun = Instant::now();
    let answer = open.send(request).await.expect("an answer");
    let took = begun.elapsed();
    assert!(took <= DEADLINE + SLACK, "answered {} after {took:?}", answer.status);
    answer
}

async fn ask_grpc(client: &Client, case: &Case) -> (grpc::GrpcAnswer, Duration) {
    let mut open = client.connect(Protocol::H2).await.expect("a connection");
    let begun = Instant::now();
    let asked = message(&Asked::Entity(&case.entity));
    let answer = grpc::call(&mut open, client, MODEL_INFER, &asked, Some(DEADLINE)).await.expect("an answer");
    let took = begun.elapsed();
    assert!(took <= DEADLINE + SLACK, "answered {:?} after {took:?}", answer.code);
    (answer, took)
}

/// Sidecars remember nothing themselves, so that the stores are asked each time.
fn forget_at_once(region: &mut Region) {
    region.features = region.features.replace("memory: 64MiB", "memory: { size: 1KiB, keep: 1ms, keepAbsent: 1ms }");
}

async fn cell(session: &Session, case: &Case) -> Vec<u8> {
    let query = "SELECT v FROM spillway.features WHERE entity_key = ? AND fg_id = 'site'";
    let rows = session.query_unpaged(query, (format!("s:{}", case.entity),)).await.expect("a read");
    let (value,) = rows.into_rows_result().expect("rows").single_row::<(Vec<u8>,)>().expect("the row is there");
    value
}

async fn set_cell(session: &Session, case: &Case, value: &[u8]) {
    let query = "UPDATE spillway.features SET v = ? WHERE entity_key = ? AND fg_id = 'site'";
    session.query_unpaged(query, (value, format!("s:{}", case.entity))).await.expect("a write");
}
