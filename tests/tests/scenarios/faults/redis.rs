//! Redis is a nearer copy: without it every answer is right, and in time.

use std::time::Duration;

use spillway_tests::harness::client::Client;
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{Case, assert_scores, cases, scores};
use spillway_tests::harness::region::Region;
use spillway_tests::harness::relay::{Link, Relay};
use spillway_tests::harness::servers::{Redis, Server, redis_cli};

use super::{BACK, ask, forget_at_once};

const READS: &str = "spillway_sidecar_feature_reads_total";

/// A region whose Redis is behind a relay.
struct WithRedis {
    client: Client,
    relay: Relay,
    redis: Server,
    _cassandra: Server,
    region: Region,
}

impl WithRedis {
    async fn start(name: &str) -> Self {
        let mut region = Region::new(name);
        let redis = Server::redis(&region.folder, Redis::Plain);
        let cassandra = Server::cassandra(&region.folder);
        let relay = Relay::to(redis.address).await;
        region.use_stores(Some(relay.address), cassandra.address);
        forget_at_once(&mut region);
        region.start().await;
        let this = Self { client: region.client("acme"), relay, redis, _cassandra: cassandra, region };
        this.is_right("good").await;
        this
    }

    async fn is_right(&self, what: &str) {
        for case in &cases()[..8] {
            let answer = ask(&self.client, case).await;
            assert_scores(what, &scores(&answer), std::slice::from_ref(case));
            assert_eq!(answer.header("spillway-degraded"), "", "{what}");
        }
    }

    fn reads(&self, outcome: &str) -> f64 {
        self.region.sidecars_sum(READS, &["tier=\"l2\"", &format!("outcome=\"{outcome}\"")])
    }

    /// Right, while reads of Redis fail and are counted.
    async fn is_right_without(&self, what: &str) {
        let before = self.reads("error");
        self.is_right(what).await;
        assert!(self.reads("error") > before, "{what}: a read that is given up is counted");
    }

    async fn is_used_again(&self) {
        let before = self.reads("hit");
        eventually("Redis is used again", BACK, async || {
            self.is_right("afterwards").await;
            (self.reads("hit") > before).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_that_refuses_costs_no_answer() {
    let it = WithRedis::start("faults-redis-refuses").await;
    it.redis.kill();
    it.is_right_without("refusing").await;
    it.redis.restart();
    it.is_used_again().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_that_hangs_costs_no_answer() {
    let it = WithRedis::start("faults-redis-hangs").await;
    it.redis.hang();
    it.is_right_without("hanging").await;
    it.redis.resume();
    it.is_used_again().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_that_is_slow_costs_no_answer() {
    let it = WithRedis::start("faults-redis-slow").await;
    // Far beyond what the tier may take.
    it.relay.set(Link::Slow(Duration::from_millis(400)));
    it.is_right_without("slow").await;
    it.relay.set(Link::Good);
    it.is_used_again().await;
}

/// Other bytes, another type, somebody else's row under the key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_that_holds_wrong_values_costs_no_answer() {
    let it = WithRedis::start("faults-redis-wrong").await;
    let all = cases();
    let key = |case: &Case, group: &str| format!("spillway:eu-west:f:{{s:{}}}:{group}", case.entity);
    for case in &all[..4] {
        assert_eq!(redis_cli(&it.redis, &["EXISTS", &key(case, "site")]), "1", "the row is in Redis under this key");
    }
    redis_cli(&it.redis, &["SET", &key(&all[0], "site"), "no row of ours"]);
    redis_cli(&it.redis, &["DEL", &key(&all[1], "site")]);
    redis_cli(&it.redis, &["RPUSH", &key(&all[1], "site"), "a", "list"]);
    redis_cli(&it.redis, &["COPY", &key(&all[3], "page"), &key(&all[2], "site"), "REPLACE"]);
    redis_cli(&it.redis, &["SETRANGE", &key(&all[3], "site"), "100000", "huge"]);
    it.is_right("wrong").await;
    it.is_right("wrong, again").await;
    it.is_used_again().await;
}
