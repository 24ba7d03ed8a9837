//! Cassandra is the durable store: without it, what no nearer tier holds is a stale value or the declared default, and
//! said to be.

use std::time::Duration;

use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use spillway_tests::harness::client::Client;
use spillway_tests::harness::eventually;
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::inference::{Asked, Case, INFER, assert_scores, cases, entity, message, scores};
use spillway_tests::harness::region::Region;
use spillway_tests::harness::relay::{Link, Relay};
use spillway_tests::harness::servers::{Redis, Server, redis_cli};
use tonic::Code;

use super::{BACK, ask, forget_at_once};

/// A region whose Cassandra is behind a relay, with a Redis before it.
struct WithCassandra {
    client: Client,
    relay: Relay,
    _redis: Server,
    cassandra: Server,
    region: Region,
    /// What the model says of an entity of which nothing is known.
    default: f32,
}

impl WithCassandra {
    async fn start(name: &str) -> Self {
        let mut region = Region::new(name);
        let redis = Server::redis(&region.folder, Redis::Plain);
        let cassandra = Server::cassandra(&region.folder);
        let relay = Relay::to(cassandra.address).await;
        region.use_stores(Some(redis.address), relay.address);
        forget_at_once(&mut region);
        region.start().await;
        let client = region.client("acme");
        let default = scores(&client.post(INFER, &entity("nobody")).await.expect("an answer"))[0];
        redis_cli(&redis, &["FLUSHALL"]);
        Self { client, relay, _redis: redis, cassandra, region, default }
    }

    async fn is_the_default(&self, what: &str, case: &Case) {
        let answer = ask(&self.client, case).await;
        assert_eq!(answer.header("spillway-degraded"), "1 default-feature", "{what}: {:?}", answer.headers);
        assert!((scores(&answer)[0] - self.default).abs() < 1e-6, "{what}");
    }

    /// In the end; and nothing wrong stayed on the way.
    async fn is_right_after(&self, what: &str, case: &Case) {
        eventually(&format!("the right answer after {what}"), BACK, async || {
            let answer = ask(&self.client, case).await;
            let right = answer.status == 200 && answer.header("spillway-degraded").is_empty();
            right.then(|| assert_scores(what, &scores(&answer), std::slice::from_ref(case)))
        })
        .await;
    }
}

/// Where defaults are not accepted, it is a clear refusal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cassandra_that_refuses_gives_declared_defaults_or_a_503() {
    let mut it = WithCassandra::start("faults-cassandra-refuses").await;
    let case = &cases()[14];
    it.cassandra.kill();
    it.is_the_default("refusing", case).await;
    it.region.edit("model.yaml", "missingFeature: default", "missingFeature: refuse");
    it.region.apply();
    it.region.sidecars_serve(2).await;
    let answer = ask(&it.client, case).await;
    assert_eq!((answer.status.as_u16(), answer.error_code()), (503, "features-unavailable"));
    let asked = message(&Asked::Entity(&case.entity));
    let answer = grpc::call_once(&it.client, MODEL_INFER, &asked).await.expect("an answer");
    assert_eq!((answer.code, answer.error_code()), (Code::Unavailable, "features-unavailable"));
    it.cassandra.restart();
    it.is_right_after("refusing", case).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cassandra_that_hangs_gives_declared_defaults_that_are_told() {
    let it = WithCassandra::start("faults-cassandra-hangs").await;
    let case = &cases()[13];
    it.cassandra.hang();
    it.is_the_default("hanging", case).await;
    it.cassandra.resume();
    it.is_right_after("hanging", case).await;
}

/// What Redis has is right meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cassandra_that_is_slow_gives_declared_defaults_that_are_told() {
    let it = WithCassandra::start("faults-cassandra-slow").await;
    let (near, far) = (&cases()[12], &cases()[11]);
    it.is_right_after("nothing", near).await;
    it.relay.set(Link::Slow(Duration::from_secs(2)));
    it.is_the_default("slow", far).await;
    let answer = ask(&it.client, near).await;
    assert_scores("in Redis", &scores(&answer), std::slice::from_ref(near));
    it.relay.set(Link::Good);
    it.is_right_after("slow", far).await;
}

/// Bytes that are no row of ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cassandra_that_holds_wrong_values_gives_declared_defaults_that_are_told() {
    let it = WithCassandra::start("faults-cassandra-wrong").await;
    let session = SessionBuilder::new().known_node(it.cassandra.address.to_string()).build().await.expect("a session");
    let case = &cases()[10];
    let good = cell(&session, case).await;
    set_cell(&session, case, &[0xde, 0xad, 0xbe, 0xef]).await;
    let answer = ask(&it.client, case).await;
    assert_eq!(answer.header("spillway-degraded"), "1 default-feature", "wrong: {:?}", answer.headers);
    assert!(it.region.sidecars_sum("spillway_sidecar_feature_malformed_total", &[]) > 0.0, "it is counted");
    set_cell(&session, case, &good).await;
    it.is_right_after("wrong", case).await;
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
