//! Cached results are right: never another tenant's, another model version's, or older than a write that
//! its writer saw confirmed.
//!
//! Two tenants send equal requests through three gateways that share a Redis. Each tenant has features of its
//! own, so that a stranger's answer is a wrong number; a writer changes them all the time; half way the
//! model's default version changes. For each answer it is known which numbers would have been right.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use spillway_figures::{Goal, record};
use spillway_proto::feature::value::Kind;
use spillway_proto::feature::{Key, PutRequest, PutResponse, Row, Value};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::inference::{
    Asked, Case, INFER, cases, entity, features, message, message_scores, scores,
};
use spillway_tests::harness::metrics::Metrics;
use spillway_tests::harness::region::Region;
use spillway_tests::harness::servers::{Redis, Server};
use spillway_tests::harness::{eventually, grpc};

const REQUESTS: usize = 1_000_000;
const TENANTS: [&str; 2] = ["acme", "globex"];
const ENTITIES: usize = 2_000;
const WORKERS: usize = 8;
const WRITES_EVERY: Duration = Duration::from_millis(10);
const SITE: [&str; 5] = ["age_of_domain", "is_popular", "long_url", "ip_in_url", "https"];
const PAGE: [&str; 4] =
    ["empty_server_form_handler", "popup_window", "request_from_other_domain", "anchor_from_other_domain"];
const INFERENCE: &str = "/inference.GRPCInferenceService/ModelInfer";
const HITS: &str = "spillway_cache_hits_total";
const PUT: &str = "/spillway.feature.v1.FeatureService/Put";

/// What is known of one tenant's entity: each write gives it the features of another case.
#[derive(Default)]
struct Subject {
    begun: AtomicU32,
    confirmed: AtomicU32,
}

struct Truth {
    /// By tenant and entity.
    subjects: Vec<Vec<Subject>>,
    cases: Vec<Case>,
    /// By model version, from 1, and case.
    scores: Vec<Vec<f32>>,
    /// The default version of the model: the one that is on its way, and the one that all gateways have.
    asked: AtomicUsize,
    served: AtomicUsize,
    /// Answers that say that they are less than they should be.
    degraded: AtomicUsize,
}

impl Truth {
    fn case(&self, tenant: usize, entity: usize, write: u32) -> usize {
        (tenant * 31 + entity * 7 + write as usize * 13) % self.cases.len()
    }

    /// Whether an answer could have been right between two moments.
    fn allows(&self, tenant: usize, entity: usize, writes: (u32, u32), versions: (usize, usize), score: f32) -> bool {
        (versions.0..=versions.1).any(|version| {
            (writes.0..=writes.1)
                .any(|write| (self.scores[version - 1][self.case(tenant, entity, write)] - score).abs() <= 1e-5)
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_cached_answers_are_right_for_their_tenant_version_and_features() {
    let mut region = Region::new("traffic-results");
    let redis = Server::redis(&region.folder, Redis::Plain);
    lay_out(&mut region, &redis);
    region.start_sidecars().await;
    let writer = region.caller_of_pod("loader", 0);
    region.start_gateway().await;
    region.start_more_gateways(2).await;
    let (cases, scores) = learn(&region).await;
    let truth = Arc::new(Truth {
        subjects: TENANTS.map(|_| (0..ENTITIES).map(|_| Subject::default()).collect()).into(),
        cases,
        scores,
        asked: 1.into(),
        served: 1.into(),
        degraded: 0.into(),
    });
    let everything = (0..TENANTS.len()).flat_map(|tenant| (0..ENTITIES).map(move |entity| (tenant, entity, 0)));
    let rows: Vec<Row> = everything.flat_map(|subject| [page(&truth, subject), site(&truth, subject)]).collect();
    for rows in rows.chunks(1_000) {
        put(&writer, rows.to_vec()).await;
    }
    let begun = Instant::now();
    let left = Arc::new(AtomicU64::new(REQUESTS as u64));
    let mut workers = tokio::task::JoinSet::new();
    for (tenant, name) in TENANTS.iter().enumerate() {
        for (gateway, client) in region.clients(name).into_iter().enumerate() {
            for worker in 0..WORKERS {
                let seed = (tenant * 100 + gateway * 10 + worker) as u64;
                workers.spawn(ask(truth.clone(), left.clone(), client.clone(), tenant, seed));
            }
        }
    }
    let writing = tokio::spawn(write(truth.clone(), left.clone(), writer));
    eventually("half of the requests are answered", Duration::from_secs(900), async || {
        (left.load(Ordering::Relaxed) < REQUESTS as u64 / 2).then_some(())
    })
    .await;
    truth.asked.store(2, Ordering::SeqCst);
    region.edit("model.yaml", "versions: [\"1\", \"2\"]", "versions: [\"2\", \"1\"]");
    region.apply();
    let gateways: Vec<_> = std::iter::once(region.gateway()).chain(&region.more_gateways).collect();
    eventually("all gateways have the new default version", super::SOON, async || {
        let has_it = |admin| Metrics::of(admin).sum("spillway_snapshot_version", &[]) == 2.0;
        gateways.iter().all(|gateway| has_it(gateway.admin)).then_some(())
    })
    .await;
    region.sidecars_serve(2).await;
    // The gateways' threads take it up at their next turn.
    tokio::time::sleep(Duration::from_secs(2)).await;
    truth.served.store(2, Ordering::SeqCst);
    let wrong: Vec<String> = workers.join_all().await.into_iter().flatten().collect();
    let (writes, unconfirmed) = writing.await.expect("the writer ends");
    let sum = |name: &str, labels: &[&str]| -> f64 {
        gateways.iter().map(|gateway| Metrics::of(gateway.admin).sum(name, labels)).sum()
    };
    let hits = sum(HITS, &[]);
    let shared = gateways.iter().map(|gateway| Metrics::of(gateway.admin).sum(HITS, &["tier=\"l2\""]));
    let shared: Vec<f64> = shared.collect();
    let invalidated = sum("spillway_cache_invalidated_total", &[]);
    let rate = REQUESTS as f64 / begun.elapsed().as_secs_f64();
    record("traffic.results.requests", REQUESTS as f64, "requests", Goal::None);
    record("traffic.results.rate", rate, "requests/s", Goal::None);
    record("traffic.results.hits", hits / REQUESTS as f64 * 100.0, "%", Goal::None);
    record("traffic.results.writes", f64::from(writes), "writes", Goal::None);
    record("traffic.results.unconfirmed_writes", f64::from(unconfirmed), "writes", Goal::None);
    let degraded = truth.degraded.load(Ordering::Relaxed) as f64 / REQUESTS as f64 * 100.0;
    record("traffic.results.shared_hits", shared.iter().sum(), "requests", Goal::None);
    let few = record("traffic.results.degraded", degraded, "%", Goal::AtMost(0.01));
    let right = record("traffic.results.wrong", wrong.len() as f64, "answers", Goal::AtMost(0.0));
    assert!(right, "{} wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(10)]);
    assert!(few, "{degraded} % of the answers are degraded");
    assert!(hits > REQUESTS as f64 / 4.0, "{hits} of them came from the cache");
    assert!(shared.iter().all(|hits| *hits > 0.0), "each gateway took some from Redis: {shared:?}");
    assert!(invalidated > 0.0, "writes ended results");
    assert!(writes > 500 && unconfirmed == 0, "{writes} writes, {unconfirmed} unconfirmed");
}

fn lay_out(region: &mut Region, redis: &Server) {
    let address = redis.address;
    region.features = format!(
        "  memory: 64MiB\n  redis: {{ servers: [\"{address}\"], timeout: 50ms }}\n  sqlite: {{ path: {}, timeout: 400ms }}\n",
        region.folder.join("features.sqlite").display()
    );
    region.gateway_settings = format!("redis: {{ servers: [\"{address}\"], timeout: 50ms }}\n");
    region.edit("features.yaml", "  schemaVersion: 1\n", "  scope: tenant\n  schemaVersion: 1\n");
    region.edit("model.yaml", "versions: [\"1\"]", "versions: [\"1\", \"2\"]");
    region.edit("model.yaml", "  entityInput: site_id\n", "  entityInput: site_id\n  cache: { ttl: 5m }\n");
    region.edit("tenants.yaml", "actions: [metadata]", "actions: [infer, metadata]");
    // The second version: the first layer's weights at two thirds.
    let first = std::fs::read(region.folder.join("models/phishing/1/model.onnx")).expect("the model");
    const WEIGHTS: [u8; 3] = [0x4a, 0xc0, 0x04];
    let at = first.windows(3).position(|bytes| bytes == WEIGHTS).expect("raw data of 576 bytes") + WEIGHTS.len();
    let mut second = first;
    for bytes in second[at..at + 576].chunks_exact_mut(4) {
        let weight = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        bytes.copy_from_slice(&(weight / 1.5).to_le_bytes());
    }
    let folder = region.folder.join("models/phishing/2");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("model.onnx"), second).expect("the second version");
}

/// Cases that differ in the features of the site alone, so that each write is one row and no answer is a
/// mixture; and their scores by both versions of the model, which can be told apart.
async fn learn(region: &Region) -> (Vec<Case>, Vec<Vec<f32>>) {
    let mut all = cases();
    let page = all[0].features[SITE.len()..].to_vec();
    for case in &mut all {
        case.features.truncate(SITE.len());
        case.features.extend(&page);
    }
    let client = region.client(TENANTS[0]);
    let mut learned = Vec::new();
    for version in ["1", "2"] {
        let path = format!("/v2/models/phishing/versions/{version}/infer");
        learned.push(scores(&client.post(&path, &features(&all)).await.expect("an answer")));
    }
    let mut chosen: Vec<usize> = Vec::new();
    for candidate in 0..all.len() {
        let apart = |one: f32, other: f32| (one - other).abs() > 1e-4;
        let mine = learned.iter().map(|scores| scores[candidate]);
        let others = || chosen.iter().flat_map(|case| learned.iter().map(|scores| scores[*case]));
        if apart(learned[0][candidate], learned[1][candidate])
            && mine.into_iter().all(|mine| others().all(|other| apart(mine, other)))
        {
            chosen.push(candidate);
        }
    }
    assert!(chosen.len() >= 5, "{} cases can be told apart", chosen.len());
    let pick = |scores: &Vec<f32>| chosen.iter().map(|case| scores[*case]).collect();
    (chosen.iter().map(|case| all[*case].clone()).collect(), learned.iter().map(pick).collect())
}

/// Asks until nothing is left, and says what was wrong.
async fn ask(truth: Arc<Truth>, left: Arc<AtomicU64>, client: Client, tenant: usize, seed: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut connection = client.connect(Protocol::H2).await.expect("a connection");
    let mut random = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // A few are asked for often.
        let share = (random >> 11) as f64 / (1_u64 << 53) as f64;
        let number = (share.powi(3) * ENTITIES as f64) as usize;
        let name = format!("e-{number}");
        let subject = &truth.subjects[tenant][number];
        let before = (subject.confirmed.load(Ordering::SeqCst), truth.served.load(Ordering::SeqCst));
        // One in eight by REST, which costs this machine more.
        let answered = if random & 7 == 0 {
            connection.send(client.json(INFER, &entity(&name))).await.map(|answer| match answer.status.as_u16() {
                200 => Ok((scores(&answer)[0], how(&answer.headers))),
                status => Err(format!("{status} {}", answer.error_code())),
            })
        } else {
            grpc::call(&mut connection, &client, INFERENCE, &message(&Asked::Entity(&name)), None).await.map(|answer| {
                match answer.code {
                    tonic::Code::Ok => Ok((message_scores(&answer.decode())[0], how(&answer.metadata))),
                    code => Err(format!("{code:?} {}", answer.error_code())),
                }
            })
        };
        let after = (subject.begun.load(Ordering::SeqCst), truth.asked.load(Ordering::SeqCst));
        let problem = match answered {
            Ok(Ok((score, _))) if truth.allows(tenant, number, (before.0, after.0), (before.1, after.1), score) => {
                continue;
            }
            // A sidecar that got no features in time says so, and nobody keeps its answer.
            Ok(Ok((_, said))) if said.degraded && !said.is_hit => {
                truth.degraded.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Ok(Ok((score, said))) => format!("{score} {said:?}"),
            Ok(Err(refused)) => refused,
            Err(lost) => {
                connection = client.connect(Protocol::H2).await.expect("a connection");
                format!("{lost:#}")
            }
        };
        wrong.push(format!("tenant {tenant}, {name}, writes {before:?} to {after:?}: {problem}"));
    }
    wrong
}

/// What an answer says about how it was made.
#[derive(Debug)]
struct Said {
    is_hit: bool,
    degraded: bool,
}

fn how(headers: &http::HeaderMap) -> Said {
    let said = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    Said { is_hit: said("cache-status").contains("hit"), degraded: !said("spillway-degraded").is_empty() }
}

/// Changes features until nothing is left to ask; how many writes, and how many were not confirmed.
async fn write(truth: Arc<Truth>, left: Arc<AtomicU64>, client: Client) -> (u32, u32) {
    let (mut writes, mut unconfirmed) = (0, 0);
    while left.load(Ordering::Relaxed) > 0 {
        let tenant = writes as usize % TENANTS.len();
        // Mostly those that are asked for.
        let entity = (writes as usize * 7_919) % (ENTITIES / 20);
        let subject = &truth.subjects[tenant][entity];
        let next = subject.begun.fetch_add(1, Ordering::SeqCst) + 1;
        if put(&client, vec![site(&truth, (tenant, entity, next))]).await.confirmed {
            subject.confirmed.store(next, Ordering::SeqCst);
        } else {
            unconfirmed += 1;
        }
        writes += 1;
        tokio::time::sleep(WRITES_EVERY).await;
    }
    (writes, unconfirmed)
}

async fn put(client: &Client, rows: Vec<Row>) -> PutResponse {
    let answer = grpc::call_once(client, PUT, &PutRequest { rows }).await.expect("an answer");
    let answer: PutResponse = answer.decode();
    assert!(answer.rejections.is_empty(), "{answer:?}");
    answer
}

/// What a write gives a subject.
fn site(truth: &Truth, subject: (usize, usize, u32)) -> Row {
    row(truth, subject, "site", &SITE)
}

fn page(truth: &Truth, subject: (usize, usize, u32)) -> Row {
    row(truth, subject, "page", &PAGE)
}

fn row(truth: &Truth, (tenant, entity, write): (usize, usize, u32), group: &str, names: &[&str]) -> Row {
    let features = &truth.cases[truth.case(tenant, entity, write)].features;
    let values = if group == "site" { &features[..SITE.len()] } else { &features[SITE.len()..] };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let field =
        |(name, value): (&&str, &f32)| ((*name).to_owned(), Value { kind: Some(Kind::DoubleValue(f64::from(*value))) });
    Row {
        key: Some(Key { group: group.into(), entity: format!("e-{entity}").into(), tenant: TENANTS[tenant].into() }),
        event_time_micros: i64::try_from(now.as_micros()).expect("a time"),
        fields: names.iter().zip(values).map(field).collect::<HashMap<_, _>>(),
    }
}
