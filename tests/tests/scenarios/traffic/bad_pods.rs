//! One of four pods misbehaves in each way that a pod can, and then all of them do.

use std::time::{Duration, Instant};

use spillway_figures::{Goal, record};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::doubles::Manner;
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, cases, entity, scores};
use spillway_tests::harness::load::{Load, Shot, failures};
use spillway_tests::harness::region::Region;
use spillway_tests::harness::relay::Link;

use super::SOON;

/// Sets a fault, or takes it away.
type Fault<'a> = Box<dyn Fn(bool) + 'a>;

const POOL: usize = 4;
/// Out of service after this, and in service again this long after the pod has healed.
const EJECTED_WITHIN: Duration = Duration::from_secs(1);
const BACK_WITHIN: Duration = Duration::from_secs(15);

/// Right predictions for many entities, each answered within a second or not at all.
fn predictions(client: &Client) -> Load {
    let all = cases();
    let expected: Vec<f32> = all.iter().map(|case| case.score).collect();
    let make = move |client: &Client, number: usize| client.json(INFER, &entity(&all[number % all.len()].entity));
    Load::start(client, Protocol::H2, 8, Duration::from_millis(4), make, move |number, answer| {
        if answer.status != 200 {
            return Err(format!("{} {}", answer.status, answer.error_code()));
        }
        let (found, expected) = (scores(answer)[0], expected[number % expected.len()]);
        if (found - expected).abs() <= 1e-5 { Ok(()) } else { Err(format!("{found} for {expected}")) }
    })
}

fn failed_since(shots: &[Shot], since: Instant) -> Vec<&String> {
    shots.iter().filter(|shot| shot.ended >= since).filter_map(|shot| shot.outcome.as_ref().err()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_pod_of_four_costs_at_most_five_failures() {
    let mut region = Region::new("traffic-bad-pod");
    region.set_pods(POOL);
    let doubles = region.use_doubles();
    let links = region.relay_pods().await;
    region.start().await;
    let client = region.client("acme");
    // By the calls that it failed, or by a health check where it cannot be reached at all.
    let out = || {
        let metrics = region.gateway_metrics();
        let of = |state: &str| metrics.sum("spillway_gateway_pods", &[&format!("state=\"{state}\"")]);
        of("ejected") + of("failed")
    };
    let served = |pod: usize| doubles[pod].seen().len();
    let faults: [(&str, Fault<'_>); 4] = [
        ("resets", Box::new(|bad| links[0].set(if bad { Link::Resets } else { Link::Good }))),
        ("hangs", Box::new(|bad| links[1].set(if bad { Link::Silent } else { Link::Good }))),
        ("fails", Box::new(|bad| doubles[2].set(if bad { Manner::Fails } else { Manner::Right }))),
        ("answers_garbage", Box::new(|bad| doubles[3].set(if bad { Manner::WrongShape } else { Manner::Right }))),
    ];
    for (pod, (fault, set)) in faults.iter().enumerate() {
        let load = predictions(&client);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let broken = Instant::now();
        set(true);
        eventually(&format!("the pod that {fault} is ejected"), SOON, async || (out() >= 1.0).then_some(())).await;
        let took = broken.elapsed();
        tokio::time::sleep(Duration::from_secs(4)).await;
        set(false);
        let healed = Instant::now();
        let before = served(pod);
        eventually(&format!("the pod that {fault} serves again"), BACK_WITHIN * 2, async || {
            (out() == 0.0 && served(pod) > before + 20).then_some(())
        })
        .await;
        let back = healed.elapsed();
        let shots = load.stop().await;
        let failed = failed_since(&shots, broken);
        let figure = |name: &str| format!("traffic.one_bad_pod.{fault}.{name}");
        record(&figure("requests"), shots.len() as f64, "requests", Goal::None);
        let few = record(&figure("failures"), failed.len() as f64, "requests", Goal::AtMost(5.0));
        let quick =
            record(&figure("ejected_after"), took.as_secs_f64(), "s", Goal::AtMost(EJECTED_WITHIN.as_secs_f64()));
        let returned = record(&figure("back_after"), back.as_secs_f64(), "s", Goal::AtMost(BACK_WITHIN.as_secs_f64()));
        assert!(few && quick && returned, "{fault}: {failed:?}, ejected after {took:?}, back after {back:?}");
        assert!(shots.len() > 1_000, "there was load: {}", shots.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t54_a_pool_that_fails_gets_few_attempts_more_than_requests() {
    let mut region = Region::new("traffic-bad-pool");
    region.set_pods(POOL);
    let doubles = region.use_doubles();
    let links = region.relay_pods().await;
    region.start().await;
    let client = region.client("acme");
    let attempts = || region.gateway_metrics().sum("spillway_gateway_attempts_total", &[]);
    let fails = |bad| doubles.iter().for_each(|double| double.set(if bad { Manner::Fails } else { Manner::Right }));
    let resets = |bad| links.iter().for_each(|link| link.set(if bad { Link::Resets } else { Link::Good }));
    let faults: [(&str, Fault<'_>); 2] = [("fails", Box::new(fails)), ("resets", Box::new(resets))];
    for (fault, set) in faults {
        let load = predictions(&client);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(failures(&load.stop().await).is_empty(), "all is well at first");
        set(true);
        let before = attempts();
        let load = predictions(&client);
        tokio::time::sleep(Duration::from_secs(10)).await;
        let shots = load.stop().await;
        let ratio = (attempts() - before) / shots.len() as f64;
        let figure = |name: &str| format!("traffic.bad_pool.{fault}.{name}");
        record(&figure("requests"), shots.len() as f64, "requests", Goal::None);
        assert!(record(&figure("attempts_per_request"), ratio, "attempts", Goal::AtMost(1.1)), "{fault}: {ratio}");
        assert!(shots.len() > 500, "there was load: {}", shots.len());
        set(false);
        let healed = Instant::now();
        eventually("the pool serves again", BACK_WITHIN * 3, async || {
            let answer = client.post(INFER, &entity("site-0001")).await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
        record(&figure("back_after"), healed.elapsed().as_secs_f64(), "s", Goal::None);
        // The next fault finds all of them well.
        let usable = || region.gateway_metrics().sum("spillway_gateway_pods", &["state=\"usable\""]);
        let load = predictions(&client);
        eventually("all pods are back", BACK_WITHIN * 3, async || (usable() == POOL as f64).then_some(())).await;
        load.stop().await;
    }
}
