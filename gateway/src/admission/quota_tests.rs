//! Gateways that share quotas in a real Redis. Each here is an `Admission` with a connection of its own.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;

use spillway_core::inference::{Entities, InferRequest};
use spillway_core::limit::quota::Upheaval;
use spillway_core::limit::{Class, Quota, QuotaSettings as WholeQuota, Rate, TableBounds};
use spillway_core::resource::{self, Model, Spec};
use spillway_core::snapshot::Snapshot;
use spillway_runtime::store::RedisSettings;
use spillway_runtime::telemetry::Metrics as Registry;

use super::*;
use crate::admission::entities::EntityBuckets;
use crate::admission::limit::Charge;
use crate::admission::view::ShareView;
use crate::admission::{self, Admission};
use crate::redis_server::{Link, RedisServer};

const TERM: Duration = Duration::from_millis(200);
/// Of the quota that most tests share.
const TOKENS: u64 = 500;
const BURST: u32 = 100;
const KEY: &str = "spillway:eu:quota:acme:all";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn resources(limits: &str) -> String {
    format!(
        "
{{apiVersion: spillway/v1, kind: Region, metadata: {{name: eu}}, spec: {{trustDomain: td}}}}
---
apiVersion: spillway/v1
kind: Tenant
metadata: {{name: acme}}
spec: {{limits: [{limits}]}}
---
apiVersion: spillway/v1
kind: Pool
metadata: {{name: p}}
spec: {{region: eu, pods: [{{name: a, address: '10.0.0.1:1'}}]}}
---
apiVersion: spillway/v1
kind: Model
metadata: {{name: m}}
spec:
  pools: [p]
  versions: ['1']
  backend: onnx
  deadline: 1s
  inputs: [{{name: x, datatype: FP32, shape: [1]}}]
  outputs: [{{name: y, datatype: FP32, shape: [1]}}]
"
    )
}

fn all() -> String {
    format!("{{name: all, per: tenant, rate: {TOKENS}/s, burst: {BURST}, scope: region}}")
}

struct Gateway {
    admission: Arc<Admission>,
    registry: Registry,
    model: Box<Model>,
    drain: Drain,
}

impl Gateway {
    /// One of three.
    fn start(own: &str, settings: &RedisSettings) -> Self {
        Self::of(own, settings, &all(), TERM)
    }

    fn of(own: &str, settings: &RedisSettings, limits: &str, term: Duration) -> Self {
        let resources = resource::parse(&resources(limits)).unwrap();
        let model = resources.iter().find_map(|resource| match &resource.spec {
            Spec::Model(model) => Some(model.clone()),
            _ => None,
        });
        let (registry, drain) = (Registry::new("test"), Drain::new(Duration::from_secs(1)));
        let redis = Redis::open(settings).unwrap().0.into();
        let quota = QuotaSettings { term, gateways: 3 };
        let admission = Admission::new(Clock::start(), name("eu"), name(own), quota, Some(redis), &registry);
        admission.follow(&Snapshot::compile(1, &resources).unwrap());
        let admission = Arc::new(admission);
        let (watched, over) = (admission.clone(), drain.clone());
        tokio::spawn(async move { watched.watch(over).await });
        Self { admission, registry, model: model.unwrap(), drain }
    }

    fn admits(&self, model: &str) -> bool {
        let (request, entities) = (InferRequest::default(), Entities::None);
        let tenant = name("acme");
        let ask =
            admission::Ask { tenant: &tenant, name: model, model: &self.model, request: &request, entities: &entities };
        !self.admission.judge(&ask).taken.refused
    }

    /// Its shares of all buckets of its first limit.
    fn shares(&self) -> Vec<ShareView> {
        let tenant = self.admission.view().tenants.remove("acme").unwrap();
        tenant.limits.into_iter().take(1).flat_map(|limit| limit.buckets).filter_map(|bucket| bucket.share).collect()
    }

    fn rate(&self) -> f64 {
        self.shares().first().map_or(0.0, |share| share.rate)
    }

    fn stands(&self, standing: &str) -> bool {
        let shares = self.shares();
        !shares.is_empty() && shares.iter().all(|share| share.standing == standing)
    }

    /// The value of a metric's line, or 0.
    fn metric(&self, line: &str) -> f64 {
        let text = self.registry.encode().unwrap();
        text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0.0)
    }

    fn failures(&self, reason: &str) -> f64 {
        self.metric(&format!("spillway_gateway_quota_failures_total{{reason=\"{reason}\"}}"))
    }

    /// Callers that ask `rate` times a second.
    fn load(self: &Arc<Self>, rate: u64) -> Load {
        let (gateway, counts) = (self.clone(), Arc::new(Counts::default()));
        let counted = counts.clone();
        let thread = std::thread::spawn(move || {
            let (began, mut asked) = (Instant::now(), 0);
            while !counted.stop.load(Ordering::Relaxed) {
                let due = (began.elapsed().as_secs_f64() * rate as f64) as u64;
                for _ in asked..due {
                    let at = Instant::now();
                    let admits = gateway.admits("m");
                    counted.slowest_us.fetch_max(at.elapsed().as_micros() as u64, Ordering::Relaxed);
                    counted.admitted.fetch_add(admits.into(), Ordering::Relaxed);
                }
                asked = due;
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Load { counts, thread: Some(thread) }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.drain.start();
    }
}

#[derive(Default)]
struct Counts {
    admitted: AtomicU64,
    slowest_us: AtomicU64,
    stop: AtomicBool,
}

struct Load {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_some_and(|ended| ended.is_ok()));
    }
}

/// What was admitted since it was opened.
struct Window<'a> {
    loads: &'a [Load],
    since: Instant,
    before: u64,
}

impl<'a> Window<'a> {
    fn open(loads: &'a [Load]) -> Self {
        let since = Instant::now();
        Self { loads, since, before: admitted(loads) }
    }

    /// Holds the bound, and tells the share of the quota that was used.
    fn check(self, what: &str, upheaval: Upheaval) -> f64 {
        let tokens = (admitted(self.loads) - self.before) as f64;
        let window = self.since.elapsed();
        let most = whole().most_admitted(window, &upheaval);
        assert!(tokens <= most, "{what}: {tokens} tokens in {window:?}, at most {most}");
        tokens / (TOKENS as f64 * window.as_secs_f64())
    }
}

fn admitted(loads: &[Load]) -> u64 {
    loads.iter().map(|load| load.counts.admitted.load(Ordering::Relaxed)).sum()
}

fn whole() -> Quota {
    let rate = Rate { tokens: TOKENS, per: Duration::from_secs(1) };
    Quota::new(&WholeQuota { term: TERM, gateways: 3, ..WholeQuota::new(rate, BURST) }).unwrap()
}

const QUIET: Upheaval = Upheaval { gateways: 3, started: 0, first_shares: 0.0, forgotten_shares: 0.0 };

fn at(address: String) -> RedisSettings {
    RedisSettings { servers: vec![address], timeout: Duration::from_millis(50), ..RedisSettings::default() }
}

fn three(redis: &RedisServer) -> Vec<Arc<Gateway>> {
    let start = |own: &str| Arc::new(Gateway::start(own, &at(redis.address())));
    ["a", "b", "c"].map(start).into()
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..1_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 10 s: {what}");
}

/// Settled: all are leased, and the rates sum to no more than the quota.
async fn settled(gateways: &[Arc<Gateway>]) {
    until("the shares are settled", || {
        let rates: f64 = gateways.iter().map(|gateway| gateway.rate()).sum();
        gateways.iter().all(|gateway| gateway.stands("leased"))
            && (0.97..=1.0).contains(&(rates / TOKENS as f64))
            && gateways.iter().all(|gateway| gateway.metric("spillway_gateway_quota_local ") == 0.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn t55_three_gateways_share_a_quota_and_the_bound_holds() {
    let redis = RedisServer::start();
    let gateways = three(&redis);
    let loads: Vec<Load> =
        gateways.iter().zip([4, 2, 2]).map(|(gateway, times)| gateway.load(TOKENS * times)).collect();
    let whole_time = Window::open(&loads);
    settled(&gateways).await;
    for _ in 0..10 {
        let window = Window::open(&loads);
        tokio::time::sleep(TERM * 3 / 2).await;
        window.check("a window", QUIET);
    }
    let window = Window::open(&loads);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = window.check("a long window", QUIET);
    assert!(used > 0.7, "{used} of the quota");
    let rates: Vec<f64> = gateways.iter().map(|gateway| gateway.rate() / TOKENS as f64).collect();
    assert!((0.45..0.55).contains(&rates[0]) && (0.2..0.3).contains(&rates[2]), "by demand: {rates:?}");
    // Each started, with a floor; the first to be answered then had all of it.
    whole_time.check("from the start", Upheaval { gateways: 0, started: 3, first_shares: 1.0 + 2.0 / 16.0, ..QUIET });
    assert_eq!(gateways[0].metric("spillway_gateway_quotas "), 1.0);
    let told = gateways[0].metric("spillway_gateway_quota_rate ") / TOKENS as f64;
    assert!((0.4..0.6).contains(&told), "{told}");
    assert!(gateways[0].metric("spillway_gateway_quota_demand ") > 3.0 * TOKENS as f64);

    // Demand moves, and the shares with it: 0.1 of 4.1, of what the standbys leave, and a third of these.
    drop(loads);
    let loads: Vec<Load> =
        gateways.iter().zip([1, 20, 20]).map(|(gateway, tenths)| gateway.load(TOKENS * tenths / 10)).collect();
    until("the shares have moved", || (0.03..0.06).contains(&(gateways[0].rate() / TOKENS as f64))).await;
    settled(&gateways).await;
    let window = Window::open(&loads);
    tokio::time::sleep(TERM * 5).await;
    window.check("unequal", QUIET);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_keeps_its_share_while_redis_is_gone_and_says_so() {
    let redis = RedisServer::start();
    let mut gateways = three(&redis);
    let loads: Vec<Load> = gateways.iter().map(|gateway| gateway.load(2 * TOKENS)).collect();
    settled(&gateways).await;
    let window = Window::open(&loads);
    redis.kill();
    for gateway in &gateways {
        until("it says so", || gateway.metric("spillway_gateway_quota_local ") == 1.0).await;
        assert!(gateway.stands("local"));
    }
    let rates = || gateways.iter().map(|gateway| gateway.rate()).collect::<Vec<_>>();
    let kept = rates();
    tokio::time::sleep(TERM * 5).await;
    assert_eq!(rates(), kept);
    let used = window.check("Redis was killed", QUIET);
    assert!(used > 0.7, "{used} of the quota");
    assert!(gateways.iter().all(|gateway| gateway.failures("away") > 0.0));

    // It comes back without its memory. While some are back and others are not, these are forgotten.
    let window = Window::open(&loads);
    redis.restart();
    settled(&gateways).await;
    window.check("Redis came back", Upheaval { forgotten_shares: 1.0, ..QUIET });
    tokio::time::sleep(TERM * 3).await;
    let window = Window::open(&loads);
    tokio::time::sleep(TERM * 10).await;
    let used = window.check("it is as before", QUIET);
    assert!(used > 0.7, "{used} of the quota");

    // One that starts without it has an equal share.
    drop(loads);
    redis.kill();
    let late = Arc::new(Gateway::start("d", &at(redis.address())));
    until("it is used", || late.admits("m") && late.stands("local")).await;
    assert!((late.rate() - TOKENS as f64 / 3.0).abs() < 1.0, "{}", late.rate());
    redis.restart();
    gateways.push(late);
    let _loads: Vec<Load> = gateways.iter().map(|gateway| gateway.load(TOKENS)).collect();
    settled(&gateways).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_redis_costs_no_request_its_time() {
    let redis = RedisServer::start();
    let link = Link::to(redis.address()).await;
    let gateway = Arc::new(Gateway::start("a", &at(link.address.to_string())));
    let loads = [gateway.load(2 * TOKENS)];
    until("it is leased", || gateway.stands("leased") && gateway.rate() == TOKENS as f64).await;
    link.delay(TERM * 4);
    until("it keeps its share", || gateway.metric("spillway_gateway_quota_local ") == 1.0).await;
    assert_eq!(gateway.rate(), TOKENS as f64);
    assert!(gateway.failures("timeout") > 0.0);
    link.delay(Duration::ZERO);
    until("it is leased again", || gateway.metric("spillway_gateway_quota_local ") == 0.0).await;
    // A thread may have to wait for its turn, but none waited for an answer.
    let slowest = loads[0].counts.slowest_us.load(Ordering::Relaxed);
    assert!(slowest < TERM.as_micros() as u64, "{slowest} us");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_is_one_that_does_not_answer() {
    let redis = RedisServer::start();
    let gateway = Arc::new(Gateway::start("a", &at(redis.address())));
    let _load = gateway.load(TOKENS);
    until("it is leased", || gateway.stands("leased")).await;
    redis.cli(&["config", "set", "maxmemory-policy", "noeviction"]);
    redis.cli(&["config", "set", "maxmemory", "1"]);
    until("it keeps its share", || gateway.metric("spillway_gateway_quota_local ") == 1.0).await;
    assert!(gateway.failures("error") > 0.0);
    assert_eq!(gateway.rate(), TOKENS as f64);
    let late = Gateway::start("b", &at(redis.address()));
    until("another has an equal share", || late.admits("m") && late.stands("local")).await;
    redis.cli(&["config", "set", "maxmemory", "0"]);
    until("they are leased", || gateway.stands("leased") && late.stands("leased")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_under_the_key_are_replaced() {
    let redis = RedisServer::start();
    let gateway = Arc::new(Gateway::start("a", &at(redis.address())));
    let _load = gateway.load(TOKENS);
    until("it is leased", || gateway.stands("leased")).await;
    redis.cli(&["set", KEY, "nonsense"]);
    until("it is a hash again", || redis.cli(&["type", KEY]) == "hash").await;
    redis.cli(&["hset", KEY, "x", "nonsense", "y", "1 2", "z", "9999999999999 1 1"]);
    until("others' fields are gone", || redis.cli(&["hkeys", KEY]) == "a").await;
    // What Redis is told to answer is an error then, but none that asking again does not mend.
    redis.cli(&["script", "flush"]);
    tokio::time::sleep(TERM * 5).await;
    assert!(gateway.stands("leased"));
    assert_eq!(gateway.rate(), TOKENS as f64);
    assert_eq!(["away", "timeout", "error"].map(|reason| gateway.failures(reason)), [0.0; 3]);
}

#[test]
fn redis_knows_the_script_by_its_hash() {
    let redis = RedisServer::start();
    assert_eq!(redis.cli(&["script", "load", SCRIPT]), SHA1);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_quotas_go_together_also_to_a_cluster() {
    const MODELS: usize = TOGETHER + 100;
    let each = "{name: each, per: model, rate: 160/s, scope: region}";
    for mode in ["plain", "cluster"] {
        let redis = RedisServer::of(mode);
        let settings = RedisSettings { cluster: mode == "cluster", ..at(redis.address()) };
        let gateway = Gateway::of("a", &settings, each, 2 * TERM);
        until("all are leased", || {
            let admitted = (0..MODELS).filter(|number| gateway.admits(&format!("m{number}"))).count();
            admitted == MODELS && gateway.shares().len() == MODELS && gateway.stands("leased")
        })
        .await;
        until("they are counted", || gateway.metric("spillway_gateway_quotas ") == MODELS as f64).await;
        assert_eq!(["away", "error"].map(|reason| gateway.failures(reason)), [0.0; 2], "{mode}");
    }
}

#[tokio::test]
async fn quotas_beyond_what_redis_is_asked_for_have_an_equal_share_until_there_is_room() {
    let registry = Registry::new("test");
    let settings = QuotaSettings { term: TERM, gateways: 4 };
    let metrics = QuotaMetrics::new(&registry);
    let quotas = Quotas::new(settings, Clock::start(), None, &name("eu"), name("a"), metrics);
    let resources = resource::parse(&resources("{name: each, per: model, rate: 160/s, scope: region}")).unwrap();
    let tenant = resources.iter().find_map(|resource| match &resource.spec {
        Spec::Tenant(tenant) => Some(tenant),
        _ => None,
    });
    let limits = |number| {
        let limits = Arc::new(TenantLimits::new(name("acme"), number));
        limits.follow(tenant.unwrap(), settings, |_| true, &AtomicU32::new(1), 0);
        limits
    };
    let (first, second) = (limits(1), limits(2));
    let entities = EntityBuckets::new(&TableBounds::default());
    let admits = |limits: &Arc<TenantLimits>, model: &str| {
        let charge = Charge { model, class: Class::Normal, cost: 1, entity_cost: 1, entities: &[], now_ns: 1 };
        !limits.take(&charge, &entities, &quotas).refused
    };
    assert!((0..MOST).all(|number| admits(&first, &format!("m{number}"))));
    let beyond = || registry.encode().unwrap().contains("spillway_gateway_quota_beyond_total 2\n");
    assert!(admits(&second, "m") && !beyond() && admits(&second, "m") && beyond());
    let bucket = second.view(Duration::from_secs(1), &mut 9).remove(0).buckets.remove(0);
    assert_eq!(bucket.share.map(|share| (share.rate, share.standing)), Some((40.0, "local")));

    // The first tenant goes, and so do its quotas.
    let mut used = std::mem::take(&mut quotas.listed.lock().fresh);
    drop(first);
    assert!(quotas.round(&mut used).await.is_empty() && used.is_empty());
    assert!(admits(&second, "m"));
    let listed = quotas.listed.lock();
    assert_eq!((listed.count, listed.fresh[0].key.as_str()), (1, "spillway:eu:quota:acme:each:m"));
}
