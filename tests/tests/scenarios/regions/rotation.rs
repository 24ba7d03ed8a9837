//! One root follows another while all regions are at work.

use std::time::{Duration, Instant};

use spillway_core::identity::TrustDomain;
use spillway_figures::{Goal, record};
use spillway_runtime::authority::Authority;
use spillway_tests::harness::crowd::{Call, Outcome};
use spillway_tests::harness::eventually;
use spillway_tests::harness::fleet::{Fleet, as_options};
use spillway_tests::harness::process::spillway;
use spillway_tests::harness::region::TRUST_DOMAIN;

use super::{crowd, on_etcd};

const LIFE: Duration = Duration::from_secs(20);
const NOTICE: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_under_load_in_all_regions_and_no_request_fails() {
    let (mut fleet, _run) = on_etcd("rotation");
    fleet.renew(LIFE, NOTICE);
    fleet.start().await;
    let next = Authority::create(TrustDomain::parse(TRUST_DOMAIN).expect("a trust domain")).expect("keys");
    next.save(fleet.folder.join("authority/next")).expect("a folder");
    let (old, new) = (fleet.authority.trust_bundle().to_owned(), next.trust_bundle().to_owned());
    let mut calls = Vec::new();

    let before = crowd(&fleet);
    let begun = Instant::now();
    assert_eq!(try_rotate(&fleet, &["--to"]).as_deref(), Some("announced"));
    let both = old + &new;
    certify_callers(&fleet, &both);
    // Clients read their files anew and connect again.
    let announced = crowd(&fleet);
    calls.extend(before.stop().await);
    until(&fleet, "signing").await;
    fleet.authority = next;
    certify_callers(&fleet, &both);
    let signing = crowd(&fleet);
    calls.extend(announced.stop().await);
    until(&fleet, "settled").await;
    let took = begun.elapsed();
    eventually("all processes trust the new root alone", 2 * NOTICE, async || {
        let sites = fleet.regions.iter().flat_map(|site| site.gateways.iter().chain(&site.sidecars));
        let mut nodes = fleet.controls.iter().chain(&fleet.dns).chain(sites);
        nodes.all(|node| bundle(&fleet, &node.name) == new).then_some(())
    })
    .await;
    // Connections of before are judged again.
    tokio::time::sleep(Duration::from_secs(3)).await;
    calls.extend(signing.stop().await);

    let is_right = |call: &&Call| matches!(call.outcome, Outcome::Right { .. });
    let failed: Vec<&Call> = calls.iter().filter(|call| !is_right(call)).collect();
    record("control.root_rotation.requests", calls.len() as f64, "requests", Goal::None);
    record("control.root_rotation.took", took.as_secs_f64(), "s", Goal::None);
    let holds = record("control.root_rotation.failures", failed.len() as f64, "requests", Goal::AtMost(0.0));
    assert!(holds && calls.len() > 1_000, "{:?}", failed.iter().take(5).collect::<Vec<_>>());
}

/// Callers renew nothing themselves.
fn certify_callers(fleet: &Fleet, bundle: &str) {
    for (name, path) in [("operator", "operator/test"), ("acme", "tenant/acme/client/web")] {
        let files = fleet.issue(name, path, &[]);
        std::fs::write(files.trust_bundle, bundle).expect("a trust bundle is written");
    }
}

fn bundle(fleet: &Fleet, name: &str) -> String {
    std::fs::read_to_string(fleet.identity(name).trust_bundle).expect("a trust bundle")
}

async fn until(fleet: &Fleet, stage: &str) {
    eventually(stage, LIFE + 4 * NOTICE, async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        (try_rotate(fleet, &[])? == stage).then_some(())
    })
    .await;
}

/// `spillway pki rotate`, wherever the leader is; the stage, if somebody leads.
fn try_rotate(fleet: &Fleet, arguments: &[&str]) -> Option<String> {
    let servers: Vec<String> = fleet.controls.iter().map(|node| node.listen.to_string()).collect();
    let (servers, files) = (servers.join(","), fleet.identity("operator"));
    let output = spillway(&[&["pki", "rotate"], arguments, &["--control", &servers], &as_options(&files)].concat());
    let shown = String::from_utf8(output.stdout).expect("text");
    let stage = shown.lines().find_map(|line| line.strip_prefix("stage  "));
    output.status.success().then(|| stage.unwrap_or_else(|| panic!("no stage in {shown}")).to_owned())
}
