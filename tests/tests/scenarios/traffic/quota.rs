//! Three gateways share one quota by way of Redis, and keep to it when Redis is gone.

use std::time::{Duration, Instant};

use spillway_core::limit::Class;
use spillway_core::limit::quota::{Quota, Upheaval};
use spillway_core::resource::{self, Spec};
use spillway_figures::{Goal, record};
use spillway_tests::harness::client::{Answer, Client};
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, cases, entity};
use spillway_tests::harness::load::open_loop;
use spillway_tests::harness::metrics::Metrics;
use spillway_tests::harness::region::Region;
use spillway_tests::harness::servers::{Redis, Server};

use super::SOON;

const GATEWAYS: usize = 3;
/// Of the region, in requests a second, and as many at once.
const RATE: u32 = 30;
const TERM: Duration = Duration::from_millis(500);
/// What each gateway is asked for: together three times the rate, and not in equal parts.
const ASKED: [f64; GATEWAYS] = [60.0, 20.0, 10.0];
const WINDOW: Duration = Duration::from_secs(10);

/// Sends for a while, and says how many were admitted, and in which time.
async fn admitted(clients: &[Client], during: Duration) -> (usize, Duration) {
    let begun = Instant::now();
    let case = cases().swap_remove(0);
    let make = |client: &Client, number: usize| (number, client.json(INFER, &entity(&case.entity)));
    let (one, two, three) = tokio::join!(
        open_loop(&clients[0], ASKED[0], during, |number| make(&clients[0], number)),
        open_loop(&clients[1], ASKED[1], during, |number| make(&clients[1], number)),
        open_loop(&clients[2], ASKED[2], during, |number| make(&clients[2], number)),
    );
    let shots = one.into_iter().chain(two).chain(three);
    let passed = shots.filter(|(_, _, answer)| {
        let answer = answer.as_ref().expect("an answer");
        assert!(answer.is_ok() || answer.error_code() == "rate-limited", "{answer:?}");
        answer.is_ok()
    });
    (passed.count(), begun.elapsed())
}

/// The quota as the gateways have read it.
fn quota(region: &Region) -> Quota {
    let tenants = resource::parse(&region.resources["tenants.yaml"]).expect("resources");
    let limit = tenants.into_iter().find_map(|resource| match resource.spec {
        Spec::Tenant(tenant) => tenant.limits.first().cloned(),
        _ => None,
    });
    Quota::new(&limit.expect("a limit").quota(Class::Normal)).expect("a quota")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_gateways_share_a_quota_and_keep_their_shares_without_redis() {
    let mut region = Region::new("traffic-quota");
    let redis = Server::redis(&region.folder, Redis::Plain);
    region.gateway_settings = format!("redis: {{ servers: [\"{}\"] }}\nquota: {{ term: 500ms }}\n", redis.address);
    region.edit(
        "tenants.yaml",
        "spec: { description: Uses the model }",
        &format!("spec: {{ limits: [{{ name: requests, per: tenant, rate: {RATE}/s, scope: region }}] }}"),
    );
    region.start().await;
    region.start_more_gateways(GATEWAYS - 1).await;
    let clients = region.clients("acme");
    let admins: Vec<_> = std::iter::once(region.gateway()).chain(&region.more_gateways).map(|g| g.admin).collect();
    let local =
        || -> f64 { admins.iter().map(|admin| Metrics::of(*admin).sum("spillway_gateway_quota_local", &[])).sum() };
    let quota = quota(&region);
    let quiet = Upheaval { gateways: GATEWAYS as u32, ..Upheaval::default() };
    // The slices settle.
    admitted(&clients, TERM * 8).await;
    assert_eq!(local(), 0.0);
    for (figure, gone) in [("shared", false), ("redis_gone", true)] {
        if gone {
            redis.kill();
            eventually("every gateway says that it is on its own", SOON, async || {
                (local() == GATEWAYS as f64).then_some(())
            })
            .await;
        }
        let (passed, window) = admitted(&clients, WINDOW).await;
        let most = quota.most_admitted(window, &quiet);
        let figure = |name: &str| format!("traffic.quota.{figure}.{name}");
        let holds = record(&figure("admitted"), passed as f64, "requests", Goal::AtMost(most));
        let used = passed as f64 / (f64::from(RATE) * window.as_secs_f64()) * 100.0;
        let enough = record(&figure("used"), used, "% of the rate", Goal::AtLeast(70.0));
        assert!(holds && enough, "gone: {gone}: {passed} in {window:?}, at most {most}");
    }
    redis.restart();
    eventually("the gateways share again", SOON * 3, async || {
        let answer: Option<Answer> = clients[0].post(INFER, &entity(&cases()[0].entity)).await.ok();
        (answer.is_some() && local() == 0.0).then_some(())
    })
    .await;
}
