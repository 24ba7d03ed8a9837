//! Processes die or are told to end while requests run.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use spillway_figures::{Goal, record};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::doubles::{Manner, TritonDouble};
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, assert_scores, cases, entity, features, scores};
use spillway_tests::harness::load::{Load, failures};
use spillway_tests::harness::region::{Region, wait_until_ready};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_sidecar_costs_clients_next_to_nothing() {
    let mut region = Region::new("failover-kill");
    region.start().await;
    let client = region.client("acme");
    let all = cases();
    let expected: Vec<f32> = all.iter().map(|case| case.score).collect();
    let make = move |client: &Client, number: usize| client.json(INFER, &entity(&all[number % all.len()].entity));
    let load = Load::start(&client, Protocol::H2, 16, Duration::from_millis(5), make, move |number, answer| {
        if answer.status != 200 {
            return Err(format!("{} {}", answer.status, answer.error_code()));
        }
        let (found, expected) = (scores(answer)[0], expected[number % expected.len()]);
        // Features of the pod that is gone lie in the shared store: nothing gets worse.
        let degraded = answer.header("spillway-degraded");
        if (found - expected).abs() <= 1e-5 && degraded.is_empty() {
            Ok(())
        } else {
            Err(format!("{found} for {expected} {degraded}"))
        }
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let killed = Instant::now();
    region.sidecars[0].kill();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let restarted = Instant::now();
    let again = region.spawn_sidecar(0);
    wait_until_ready(&again).await;
    region.sidecars[0] = again;
    let took_over = || {
        let sidecar = &region.sidecars[0];
        spillway_tests::harness::metrics::Metrics::of(sidecar.admin).sum("spillway_sidecar_requests_total", &[])
    };
    eventually("the new process gets its requests again", Duration::from_secs(20), async || {
        (took_over() > 10.0).then_some(())
    })
    .await;
    let shots = load.stop().await;

    let failed = failures(&shots);
    let last = shots.iter().filter(|shot| shot.outcome.is_err()).map(|shot| shot.ended).max();
    let recovery = last.map_or(Duration::ZERO, |last| last.saturating_duration_since(killed));
    let mut after: Vec<Duration> =
        shots.iter().filter(|shot| shot.ended > killed && shot.ended < restarted).map(|shot| shot.took).collect();
    record("path.kill_sidecar.requests", shots.len() as f64, "requests", Goal::None);
    record("path.kill_sidecar.recovery_ms", recovery.as_secs_f64() * 1e3, "ms", Goal::None);
    let slowest = after.iter().max().copied().unwrap_or_default();
    record("path.kill_sidecar.slowest_ms", slowest.as_secs_f64() * 1e3, "ms", Goal::None);
    let p99 = spillway_tests::harness::load::percentile(&mut after, 0.99);
    record("path.kill_sidecar.p99_ms", p99.as_secs_f64() * 1e3, "ms", Goal::None);
    // At most what was on its way to the pod as it died: one request of each worker.
    let holds = record("path.kill_sidecar.failures", failed.len() as f64, "requests", Goal::AtMost(16.0));
    assert!(holds, "{} of {}: {failed:?}", failed.len(), shots.len());
    assert!(recovery < Duration::from_secs(1), "{recovery:?}: {failed:?}");
    assert!(shots.len() > 1_000, "there was load: {}", shots.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_told_to_end_finishes_what_was_begun() {
    let triton = TritonDouble::start();
    let mut region = Region::new("failover-drain");
    region.use_triton(triton.address);
    region.start().await;
    let client = region.client("acme");
    let all = cases();
    triton.set(Manner::Late(Duration::from_millis(700)));
    let mut begun = tokio::task::JoinSet::new();
    for (number, case) in all.iter().take(24).cloned().enumerate() {
        let client = client.clone();
        begun.spawn(async move {
            let protocol = if number % 2 == 0 { Protocol::H1 } else { Protocol::H2 };
            let mut open = client.connect(protocol).await.expect("a connection");
            let answer = open.send(client.json(INFER, &features(std::slice::from_ref(&case)))).await;
            (open, answer.map(|answer| (case, answer)))
        });
    }
    eventually("all are on their way", Duration::from_secs(5), async || {
        let arrived = region.sidecars_sum("spillway_sidecar_requests_in_flight", &[]);
        (arrived >= 24.0 || triton.seen().len() >= 24 + 6).then_some(())
    })
    .await;
    region.gateway().signal(Signal::SIGTERM);
    let mut failed = 0;
    while let Some(ended) = begun.join_next().await {
        let (open, outcome) = ended.expect("it ran");
        match outcome {
            Ok((case, answer)) => assert_scores("begun before TERM", &scores(&answer), std::slice::from_ref(&case)),
            Err(error) => {
                eprintln!("{error:#}");
                failed += 1;
            }
        }
        drop(open);
    }
    let status = region.gateway.as_mut().expect("it was started").ended().await;
    assert!(status.success(), "{status}");
    let holds = record("path.drain_gateway.failures", f64::from(failed), "requests", Goal::AtMost(0.0));
    assert!(holds, "{failed} of 24 requests that were begun failed");
    assert!(client.get("/v2/health/live").await.is_err(), "nobody listens any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_gateway_sends_h2_clients_elsewhere_without_a_failure() {
    let mut region = Region::new("failover-goaway");
    region.start().await;
    let (first, second) = (region.spawn_gateway("gateway-1"), region.spawn_gateway("gateway-2"));
    for gateway in [&first, &second] {
        wait_until_ready(gateway).await;
    }
    // Open connections to the one that ends; what it does not take goes to the other, as clients with two addresses do.
    let ending = Client::new(first.address, &region.identity("acme"));
    let other = Client::new(second.address, &region.identity("acme"));
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..8 {
        let (ending, other, stop) = (ending.clone(), other.clone(), stop.clone());
        let protocol = if worker % 2 == 0 { Protocol::H1 } else { Protocol::H2 };
        workers.spawn(async move {
            let mut failed = Vec::new();
            let mut at = ending.clone();
            let mut open = ending.connect(protocol).await.expect("a connection");
            let mut sent = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                sent += 1;
                match open.send(at.json(INFER, &entity("site-0001"))).await {
                    Ok(answer) if answer.status == 200 => {}
                    Ok(answer) => failed.push(format!("{} {}", answer.status, answer.error_code())),
                    Err(error) if error.is::<spillway_tests::harness::client::NotSent>() => {
                        at = other.clone();
                        open = at.connect(protocol).await.expect("the other gateway");
                    }
                    Err(error) => {
                        failed.push(format!("{protocol:?} {error:#}"));
                        at = other.clone();
                        open = at.connect(protocol).await.expect("the other gateway");
                    }
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            (sent, failed)
        });
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut first = first;
    let status = first.stop().await;
    assert!(status.success(), "{status}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let outcomes = workers.join_all().await;
    let failed: Vec<String> = outcomes.iter().flat_map(|(_, failed)| failed.clone()).collect();
    record("path.goaway.failures", failed.len() as f64, "requests", Goal::AtMost(0.0));
    assert!(failed.is_empty(), "{failed:?}");
    assert!(outcomes.iter().map(|(sent, _)| sent).sum::<usize>() > 200);
}
