//! A region's pods die, and its gateways live: requests cross to another region at once.

use std::time::{Duration, Instant};

use spillway_figures::{Goal, record};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::crowd::resolve;
use spillway_tests::harness::eventually;
use spillway_tests::harness::fleet::{Fleet, REGIONS, SERVICE, Store};
use spillway_tests::harness::inference::{INFER, assert_scores, cases, entity, scores};
use spillway_tests::harness::load::{Load, failures};

const STRANDED: &str = "eu-central";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_whose_pods_die_answers_from_another_one() {
    let mut fleet = Fleet::new("stranded", Store::Sqlite);
    fleet.start().await;
    let client = fleet.client("acme", STRANDED);
    eventually("the peers are known", Duration::from_secs(20), async || {
        client.post(INFER, &entity("site-0001")).await.ok().filter(|answer| answer.is_ok())
    })
    .await;
    let all = cases();
    let make = {
        let all = all.clone();
        move |client: &Client, number: usize| client.json(INFER, &entity(&all[number % all.len()].entity))
    };
    let judge = move |number: usize, answer: &spillway_tests::harness::client::Answer| {
        if !answer.is_ok() {
            return Err(format!("{} {}", answer.status, answer.error_code()));
        }
        assert_scores("stranded", &scores(answer), std::slice::from_ref(&all[number % all.len()]));
        Ok(())
    };
    let load = Load::start(&client, Protocol::H2, 8, Duration::from_millis(20), make, judge);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for pod in &mut fleet.region_mut(STRANDED).sidecars {
        pod.kill();
    }
    let killed = Instant::now();
    tokio::time::sleep(Duration::from_secs(15)).await;
    let shots = load.stop().await;

    let since = |from: u64, to: u64| {
        let [from, to] = [from, to].map(Duration::from_secs);
        let within =
            |shot: &&spillway_tests::harness::load::Shot| shot.ended > killed + from && shot.ended <= killed + to;
        shots.iter().filter(within).cloned().collect::<Vec<_>>()
    };
    let (first, later) = (since(0, 5), since(5, 15));
    let good = |shots: &[_]| 100.0 * (1.0 - failures(shots).len() as f64 / shots.len().max(1) as f64);
    assert!(later.len() > 200, "{} requests", later.len());
    record("control.pods_lost.first_5_s", good(&first), "%", Goal::None);
    assert!(
        record("control.pods_lost.success", good(&later), "%", Goal::AtLeast(99.0)),
        "{:?}",
        failures(&later).first()
    );

    let answer = client.post(INFER, &entity("site-0001")).await.expect("an answer");
    assert_ne!(answer.header("spillway-region"), STRANDED, "{answer:?}");

    nothing_is_well_and_all_answer(&mut fleet).await;
}

/// The other regions' pods die, too: names have addresses, and requests an answer that says what is wrong.
async fn nothing_is_well_and_all_answer(fleet: &mut Fleet) {
    for pod in fleet.regions.iter_mut().flat_map(|site| &mut site.sidecars) {
        pod.kill();
    }
    // Long enough for probes to fail and verdicts to fall.
    let begun = Instant::now();
    let (mut asked, mut empty, mut silent) = (0, 0, 0);
    while begun.elapsed() < Duration::from_secs(20) {
        for region in REGIONS {
            let client = fleet.client("acme", region);
            let answer = tokio::time::timeout(Duration::from_secs(5), client.post(INFER, &entity("site-0001"))).await;
            let told = matches!(&answer, Ok(Ok(answer)) if answer.status == 503 && !answer.error_code().is_empty());
            silent += usize::from(!told);
            asked += 1;
        }
        // As resolvers do: what is lost is asked again.
        let addresses = eventually("DNS answers", Duration::from_secs(5), async || {
            resolve(fleet.dns[0].listen, SERVICE, [10, 1, 1, 0].into()).await.ok()
        });
        empty += usize::from(addresses.await.0.is_empty());
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert!(asked > 30, "{asked}");
    let holds = [
        record("control.all_unhealthy.without_an_answer", silent as f64, "requests", Goal::AtMost(0.0)),
        record("control.all_unhealthy.empty_dns_answers", empty as f64, "answers", Goal::AtMost(0.0)),
    ];
    assert_eq!(holds, [true; 2]);
    for region in REGIONS {
        fleet.restart(region);
    }
    let client = fleet.client("acme", STRANDED);
    eventually("it comes back by itself", Duration::from_secs(60), async || {
        let answer = client.post(INFER, &entity("site-0001")).await.ok()?;
        (answer.is_ok() && answer.header("spillway-region") == STRANDED).then_some(())
    })
    .await;
    record("control.all_unhealthy.back", begun.elapsed().as_secs_f64() - 20.0, "s", Goal::None);
}
