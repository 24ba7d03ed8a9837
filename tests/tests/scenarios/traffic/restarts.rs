//! Gateways and sidecars are replaced one after the other while requests run.

use std::time::Duration;

use spillway_figures::{Goal, record};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::inference::{INFER, cases, entity, scores};
use spillway_tests::harness::load::{Load, failures};
use spillway_tests::harness::region::{Region, wait_until_ready};

const ROUNDS: usize = 10;

/// Ten restarts of gateways and ten of sidecars. Clients send again only what a connection never took:
/// HTTP/1.1 and HTTP/2 say so by how they close (GOAWAY).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_rolling_restarts_cost_no_request() {
    let mut region = Region::new("traffic-restarts");
    region.set_pods(3);
    region.start().await;
    let all = cases();
    let expected: Vec<f32> = all.iter().map(|case| case.score).collect();
    let make = move |client: &Client, number: usize| client.json(INFER, &entity(&all[number % all.len()].entity));
    let judge = move |number: usize, answer: &spillway_tests::harness::client::Answer| {
        if answer.status != 200 {
            return Err(format!("{} {}", answer.status, answer.error_code()));
        }
        let (found, expected) = (scores(answer)[0], expected[number % expected.len()]);
        if (found - expected).abs() <= 1e-5 { Ok(()) } else { Err(format!("{found} for {expected}")) }
    };
    let loads: Vec<Load> = [Protocol::H1, Protocol::H2]
        .into_iter()
        .map(|protocol| {
            Load::start(&region.client("acme"), protocol, 4, Duration::from_millis(5), make.clone(), judge.clone())
        })
        .collect();
    for round in 0..ROUNDS {
        let pod = round % region.pods.len();
        region.sidecars[pod].stop().await;
        let again = region.spawn_sidecar(pod);
        wait_until_ready(&again).await;
        region.sidecars[pod] = again;
        region.replace_gateway().await;
    }
    let mut shots = Vec::new();
    for load in loads {
        shots.extend(load.stop().await);
    }
    let failed = failures(&shots);
    record("traffic.rolling_restarts.requests", shots.len() as f64, "requests", Goal::None);
    let moved = shots.iter().map(|shot| shot.moved).sum::<usize>();
    record("traffic.rolling_restarts.moved_to_another_connection", moved as f64, "requests", Goal::None);
    let none = record("traffic.rolling_restarts.failures", failed.len() as f64, "requests", Goal::AtMost(0.0));
    assert!(none, "{} of {}: {:?}", failed.len(), shots.len(), &failed[..failed.len().min(5)]);
    assert!(shots.len() > 1_000, "there was load: {}", shots.len());
}
