//! More requests than the pods can serve: what is admitted is served in time, the important first, and no
//! tenant starves another.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use http::Request;
use http_body_util::Full;
use serde_json::json;
use spillway_figures::{Goal, record};
use spillway_tests::harness::client::{Answer, Client, Protocol};
use spillway_tests::harness::doubles::{Manner, TritonDouble};
use spillway_tests::harness::inference::{INFER, cases};
use spillway_tests::harness::load::{Load, open_loop, percentile};
use spillway_tests::harness::region::Region;

/// Two pods, each eight requests at a time for 160 ms each: not quite 100 a second, so that ten times as many leave
/// this machine time to answer them.
const PODS: usize = 2;
const AT_ONCE: usize = 8;
const EACH: Duration = Duration::from_millis(160);
const DURING: Duration = Duration::from_secs(60);
/// The gateway learns the pods' capacity within this.
const ADAPTING: Duration = Duration::from_secs(10);
const DEADLINE: Duration = Duration::from_secs(1);
/// For the way there and back, on a machine that is busy.
const WAY: Duration = Duration::from_millis(50);
/// Percent of the capacity by which its measurement differs from run to run on a machine that others use, too: the
/// figure says whether the goal held, the test fails only beyond this.
const NOISE: f64 = 5.0;

/// Of 100 requests: the `priority` of each, the most important first.
fn priority(number: usize) -> u64 {
    // Spread, not in blocks.
    match number * 61 % 100 {
        0..5 => 1,
        5..20 => 2,
        20..70 => 3,
        _ => 4,
    }
}

fn request(client: &Client, entity: &str, priority: u64) -> Request<Full<bytes::Bytes>> {
    let body = json!({ "parameters": { "entity_id": entity, "priority": priority }, "inputs": [] });
    let mut request = client.json(INFER, &body);
    request.headers_mut().insert("x-request-timeout-ms", DEADLINE.as_millis().to_string().parse().expect("a number"));
    request
}

/// Pods of a bounded capacity, and tenants that differ so much from the usual.
async fn region(name: &str, tenants: &str, instead: &str) -> (Region, Vec<TritonDouble>) {
    let mut region = Region::new(name);
    region.set_pods(PODS);
    let doubles = region.use_doubles();
    region.edit("tenants.yaml", tenants, instead);
    region.edit(
        "model.yaml",
        "  entityInput: site_id\n",
        "  entityInput: site_id\n  routing: { policy: least_request }\n",
    );
    region.start().await;
    doubles.iter().for_each(|double| double.set(Manner::Busy { at_once: AT_ONCE, each: EACH }));
    (region, doubles)
}

/// What the pods serve in a second while half as many again as they take at a time are asked of them.
async fn capacity(client: &Client) -> f64 {
    let entities: Vec<String> = cases().into_iter().map(|case| case.entity).collect();
    let make = move |client: &Client, number: usize| request(client, &entities[number % entities.len()], 1);
    let judge = |_: usize, answer: &Answer| if answer.is_ok() { Ok(()) } else { Err(answer.error_code().to_owned()) };
    let load = Load::start(client, Protocol::H2, PODS * AT_ONCE * 3 / 2, Duration::ZERO, make, judge);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (begun, during) = (Instant::now(), Duration::from_secs(8));
    tokio::time::sleep(during).await;
    let shots = load.stop().await;
    let counted =
        shots.iter().filter(|shot| shot.outcome.is_ok() && shot.ended >= begun && shot.ended < begun + during);
    counted.count() as f64 / during.as_secs_f64()
}

/// How many requests of each kind ended in each way.
fn outcomes(shots: &[(u64, Duration, Result<Answer, String>)]) -> BTreeMap<(u64, String), usize> {
    let mut outcomes = BTreeMap::new();
    for (kind, took, answer) in shots {
        let end = match answer {
            Ok(answer) if answer.is_ok() && *took <= DEADLINE => "served".to_owned(),
            Ok(answer) if answer.is_ok() => "late".to_owned(),
            Ok(answer) => answer.error_code().to_owned(),
            Err(_) => "lost".to_owned(),
        };
        *outcomes.entry((*kind, end)).or_default() += 1;
    }
    outcomes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_leaves_goodput_and_what_is_critical() {
    let (first, then) = ("spec: { description: Uses the model }", "spec: { priority: { highest: critical } }");
    let (region, _doubles) = region("traffic-overload", first, then).await;
    let client = region.client("acme");
    let entities: Vec<String> = cases().into_iter().map(|case| case.entity).collect();
    let capacity = capacity(&client).await;
    record("traffic.overload.capacity", capacity, "requests/s", Goal::None);
    for (times, goodput_goal) in [(2.0, 95.0), (10.0, 90.0)] {
        let make = |number: usize| {
            let priority = priority(number);
            (priority, request(&client, &entities[number % entities.len()], priority))
        };
        // The first seconds teach; they are not counted.
        open_loop(&client, capacity * times, ADAPTING, make).await;
        let shots = open_loop(&client, capacity * times, DURING, make).await;
        let served = |shot: &&(u64, Duration, Result<Answer, String>)| {
            shot.1 <= DEADLINE && shot.2.as_ref().is_ok_and(Answer::is_ok)
        };
        let good = shots.iter().filter(served).count() as f64;
        let critical: Vec<_> = shots.iter().filter(|shot| shot.0 == 1).collect();
        let critical_served = critical.iter().copied().filter(served).count() as f64 / critical.len() as f64 * 100.0;
        // Of all, the refused too: nobody waits for longer than the deadline.
        let mut took: Vec<Duration> = shots.iter().map(|shot| shot.1).collect();
        let p99 = percentile(&mut took, 0.99);
        let lost: Vec<&String> = shots.iter().filter_map(|shot| shot.2.as_ref().err()).collect();
        let figure = |name: &str| format!("traffic.overload_{times}x.{name}");
        record(&figure("requests"), shots.len() as f64, "requests", Goal::None);
        let goodput = good / (capacity * DURING.as_secs_f64()) * 100.0;
        record(&figure("goodput"), goodput, "% of capacity", Goal::AtLeast(goodput_goal));
        let enough = goodput >= goodput_goal - NOISE;
        let first = record(&figure("critical_served"), critical_served, "%", Goal::AtLeast(99.9));
        let quick =
            record(&figure("p99"), p99.as_secs_f64() * 1e3, "ms", Goal::AtMost((DEADLINE + WAY).as_secs_f64() * 1e3));
        let ends = outcomes(&shots);
        assert!(
            enough && first && quick,
            "{times}x of {capacity}/s: {goodput} %, {critical_served} %, {p99:?}, {ends:?}"
        );
        assert!(lost.is_empty(), "refused, not dropped: {:?}", &lost[..lost.len().min(3)]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_greedy_tenant_does_not_starve_another() {
    let (region, _doubles) = region("traffic-fairness", "actions: [metadata]", "actions: [infer, metadata]").await;
    let (greedy, modest) = (region.client("acme"), region.client("globex"));
    let capacity = capacity(&greedy).await;
    let entities: Vec<String> = cases().into_iter().map(|case| case.entity).collect();
    let make = |client: &Client, number: usize| (number, request(client, &entities[number % entities.len()], 3));
    let during = ADAPTING + DURING / 3;
    let (_, shots) = tokio::join!(
        open_loop(&greedy, capacity * 4.0, during, |number| make(&greedy, number)),
        open_loop(&modest, capacity / 4.0, during, |number| make(&modest, number)),
    );
    let first = (ADAPTING.as_secs_f64() * capacity / 4.0) as usize;
    let counted: Vec<_> = shots.iter().filter(|shot| shot.0 >= first).collect();
    let good = counted.iter().filter(|shot| shot.2.as_ref().is_ok_and(Answer::is_ok)).count();
    let share = good as f64 / counted.len() as f64 * 100.0;
    let holds = record("traffic.greedy_tenant.others_served", share, "%", Goal::AtLeast(95.0));
    assert!(holds, "{share} % of {}", counted.len());
}
