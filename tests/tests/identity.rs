//! Certificates and roots change under load.

use std::time::Duration;

use spillway_core::identity::TrustDomain;
use spillway_runtime::authority::Authority;
use spillway_tests::figures::{Goal, record};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, cases, entity, scores};
use spillway_tests::harness::load::{Load, failures};
use spillway_tests::harness::metrics::Metrics;
use spillway_tests::harness::region::{Region, TRUST_DOMAIN};

const HOUR: Duration = Duration::from_secs(3_600);
const MINUTE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t49_certificates_are_renewed_under_load_without_a_failure() {
    let mut region = Region::new("identity-rotation");
    region.start().await;
    let client = region.client("acme");
    let all = cases();
    let entities: Vec<String> = all.iter().map(|case| case.entity.clone()).collect();
    let start = |protocol| {
        let (entities, all) = (entities.clone(), all.clone());
        let make =
            move |client: &Client, number: usize| client.json(INFER, &entity(&entities[number % entities.len()]));
        Load::start(&client, protocol, 4, Duration::from_millis(2), make, move |number, answer| {
            if answer.status != 200 {
                return Err(format!("{} {}", answer.status, answer.error_code()));
            }
            let (found, expected) = (scores(answer)[0], all[number % all.len()].score);
            if (found - expected).abs() <= 1e-5 { Ok(()) } else { Err(format!("{found} for {expected}")) }
        })
    };
    // Open connections, and new ones all the time.
    let (h1, h2) = (start(Protocol::H1), start(Protocol::H2));
    let fresh = tokio::spawn({
        let client = client.clone();
        async move {
            let mut failed = Vec::new();
            for _ in 0..200 {
                match client.get("/v2/health/live").await {
                    Ok(answer) if answer.status == 200 => {}
                    other => failed.push(format!("{other:?}")),
                }
            }
            failed
        }
    });
    let workloads = [
        ("gateway-0", "region/eu-west/gateway/gateway-0"),
        ("pod-0", "region/eu-west/sidecar/scorers/pod-0"),
        ("pod-1", "region/eu-west/sidecar/scorers/pod-1"),
    ];
    const ROUNDS: u32 = 5;
    let admins: Vec<_> = std::iter::once(region.gateway()).chain(&region.sidecars).map(|one| one.admin).collect();
    let expiry = |admin| Metrics::of(admin).sum("spillway_identity_expiry_seconds", &[]);
    for round in 1..=ROUNDS {
        let before: Vec<f64> = admins.iter().map(|admin| expiry(*admin)).collect();
        for (name, path) in workloads {
            region.issue(name, path, HOUR + MINUTE * round);
        }
        eventually("all three took their new certificates", SOON, async || {
            admins.iter().zip(&before).all(|(admin, before)| expiry(*admin) > before + 30.0).then_some(())
        })
        .await;
    }
    let fresh = fresh.await.expect("it ran");
    let shots = [h1.stop().await, h2.stop().await].concat();
    let failed = failures(&shots);
    let count = failed.len() + fresh.len();
    record("path.rotation.requests", (shots.len() + 200) as f64, "requests", Goal::None);
    let holds = record("path.rotation.failures", count as f64, "requests", Goal::AtMost(0.0));
    assert!(holds, "{failed:?} {fresh:?}");
    assert!(shots.len() > 200, "there was load: {}", shots.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t50_a_client_of_a_removed_root_is_refused_at_once_on_every_connection() {
    let mut region = Region::new("identity-removed");
    let partner = Authority::create(TrustDomain::parse(TRUST_DOMAIN).expect("a trust domain")).expect("an authority");
    let identity = region.issue_by(&partner, "partner", "tenant/acme/client/partner", HOUR);
    region.start().await;
    // The region trusts two roots.
    let bundle = region.identity("gateway-0").trust_bundle;
    let both = [region.authority.trust_bundle(), partner.trust_bundle()].concat();
    replace(&bundle, &both);
    let client = Client::new(region.gateway().address, &identity);
    let asked = entity("site-0001");
    eventually("the second root is trusted", SOON, async || {
        client.post(INFER, &asked).await.is_ok_and(|answer| answer.status == 200).then_some(())
    })
    .await;
    let mut h2 = client.connect(Protocol::H2).await.expect("a connection");
    let mut h1 = client.connect(Protocol::H1).await.expect("a connection");
    let acme = region.client("acme");
    let mut ours = acme.connect(Protocol::H2).await.expect("a connection");
    for open in [&mut h2, &mut h1, &mut ours] {
        assert_eq!(open.send(client.json(INFER, &asked)).await.expect("an answer").status, 200);
    }
    let reloads = || region.gateway_metrics().sum("spillway_identity_reloads_total", &["outcome=\"accepted\""]);
    let before = reloads();
    replace(&bundle, region.authority.trust_bundle());
    eventually("the gateway took the new bundle", SOON, async || (reloads() > before).then_some(())).await;
    for (what, open) in [("h2", &mut h2), ("h1", &mut h1)] {
        // A refusal, or the end of the connection: never an answer.
        if let Ok(answer) = open.send(client.json(INFER, &asked)).await {
            assert_eq!((answer.status.as_u16(), answer.error_code()), (403, "untrusted-certificate"), "{what}");
        }
    }
    let fresh = client.post(INFER, &asked).await;
    assert!(fresh.is_err(), "a new connection: {fresh:?}");
    assert_eq!(scores(&ours.send(acme.json(INFER, &asked)).await.expect("an answer")).len(), 1, "others go on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t49_an_open_connection_ends_with_its_certificate() {
    let mut region = Region::new("identity-expiry");
    region.start().await;
    let identity = region.issue("brief", "tenant/acme/client/brief", Duration::from_secs(3));
    let client = Client::new(region.gateway().address, &identity);
    let asked = entity("site-0001");
    for protocol in [Protocol::H1, Protocol::H2] {
        let identity = region.issue("brief", "tenant/acme/client/brief", Duration::from_secs(3));
        let client = Client::new(client.address, &identity);
        let mut open = client.connect(protocol).await.expect("a connection");
        assert_eq!(open.send(client.json(INFER, &asked)).await.expect("an answer").status, 200);
        eventually("the certificate is expired", SOON, async || match open.send(client.json(INFER, &asked)).await {
            Ok(answer) if answer.status == 200 => None,
            Ok(answer) => {
                assert_eq!((answer.status.as_u16(), answer.error_code()), (403, "untrusted-certificate"));
                Some(())
            }
            Err(_) => Some(()),
        })
        .await;
    }
    assert!(client.post(INFER, &asked).await.is_err(), "a new connection");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_certificate_file_is_refused_and_the_last_good_one_serves() {
    let mut region = Region::new("identity-broken");
    region.start().await;
    let client = region.client("acme");
    let files = region.identity("gateway-0");
    let refused = || region.gateway_metrics().sum("spillway_identity_reloads_total", &["outcome=\"refused\""]);
    let good = std::fs::read_to_string(&files.certificate).expect("a certificate");
    for broken in ["", "not a certificate", &good[..good.len() / 2]] {
        let before = refused();
        replace(&files.certificate, broken);
        eventually("the file is refused", SOON, async || (refused() > before).then_some(())).await;
        assert_eq!(client.post(INFER, &entity("site-0001")).await.expect("an answer").status, 200);
    }
    replace(&files.certificate, &good);
    assert_eq!(client.post(INFER, &entity("site-0001")).await.expect("an answer").status, 200);
}

/// As operators' tools do it: written beside, renamed.
fn replace(path: &std::path::Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).expect("it is written");
    std::fs::rename(&beside, path).expect("it is renamed");
}
