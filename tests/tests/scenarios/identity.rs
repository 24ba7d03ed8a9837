//! Certificates and roots change under load.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use spillway_core::identity::TrustDomain;
use spillway_figures::{Goal, record};
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::tls::{IdentitySettings, Workload};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::eventually;
use spillway_tests::harness::inference::{INFER, cases, entity, scores};
use spillway_tests::harness::load::{Load, failures};
use spillway_tests::harness::metrics::Metrics;
use spillway_tests::harness::process::{spillway, spillway_ok};
use spillway_tests::harness::region::{Region, TRUST_DOMAIN, id, text};
use spillway_tests::harness::run_folder::RunFolder;

const HOUR: Duration = Duration::from_secs(3_600);
const MINUTE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);
const WORKLOADS: [(&str, &str); 3] = [
    ("gateway-0", "region/eu-west/gateway/gateway-0"),
    ("pod-0", "region/eu-west/sidecar/scorers/pod-0"),
    ("pod-1", "region/eu-west/sidecar/scorers/pod-1"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t49_certificates_are_renewed_under_load_without_a_failure() {
    let mut region = Region::new("identity-rotation");
    region.start().await;
    let client = region.client("acme");
    // Open connections, and new ones all the time.
    let (h1, h2) = (right_predictions(&client, Protocol::H1), right_predictions(&client, Protocol::H2));
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
    const ROUNDS: u32 = 5;
    let admins: Vec<_> = std::iter::once(region.gateway()).chain(&region.sidecars).map(|one| one.admin).collect();
    let expiry = |admin| Metrics::of(admin).sum("spillway_identity_expiry_seconds", &[]);
    for round in 1..=ROUNDS {
        let before: Vec<f64> = admins.iter().map(|admin| expiry(*admin)).collect();
        for (name, path) in WORKLOADS {
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

/// The overlap that operators are told: trust both, issue by the new one, trust the new one alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t49_the_root_is_replaced_under_load_without_a_failure() {
    let mut region = Region::new("identity-root");
    region.start().await;
    let next = Authority::create(TrustDomain::parse(TRUST_DOMAIN).expect("a trust domain")).expect("an authority");
    let both = [region.authority.trust_bundle(), next.trust_bundle()].concat();
    let admins: Vec<_> = std::iter::once(region.gateway()).chain(&region.sidecars).map(|one| one.admin).collect();
    let reloads = |admin| Metrics::of(admin).sum("spillway_identity_reloads_total", &["outcome=\"accepted\""]);
    let all_took = async |what: &str, before: &[f64]| {
        eventually(what, SOON, async || {
            admins.iter().zip(before).all(|(admin, before)| reloads(*admin) > *before).then_some(())
        })
        .await;
    };
    let counts = || admins.iter().map(|admin| reloads(*admin)).collect::<Vec<_>>();
    let write_bundles = |bundle: &str| {
        for (name, _) in WORKLOADS {
            replace(&region.identity(name).trust_bundle, bundle);
        }
    };
    // Clients come first: they must trust what they will meet.
    let old = region.identity("acme");
    replace(&old.trust_bundle, &both);
    let old = Client::new(region.gateway().address, &old);
    let of_old = [right_predictions(&old, Protocol::H1), right_predictions(&old, Protocol::H2)];

    let before = counts();
    write_bundles(&both);
    all_took("all three trust both roots", &before).await;
    for (name, path) in WORKLOADS {
        let leaf = next.issue(&LeafRequest::new(id(path), HOUR + MINUTE).dialled_locally()).expect("a leaf");
        let files = region.identity(name);
        leaf.save(&files.certificate, &files.key).expect("they are written");
    }
    let issued = |admin| Metrics::of(admin).sum("spillway_identity_expiry_seconds", &[]);
    let longer = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let longer = (longer + HOUR + MINUTE / 2).as_secs_f64();
    eventually("all three have leaves of the new root", SOON, async || {
        admins.iter().all(|admin| issued(*admin) > longer).then_some(())
    })
    .await;
    let identity = region.issue_by(&next, "renewed", "tenant/acme/client/renewed", HOUR);
    replace(&identity.trust_bundle, &both);
    let new = Client::new(region.gateway().address, &identity);
    let of_new = [right_predictions(&new, Protocol::H1), right_predictions(&new, Protocol::H2)];
    let mut shots = Vec::new();
    for load in of_old {
        shots.extend(load.stop().await);
    }

    let before = counts();
    write_bundles(next.trust_bundle());
    all_took("all three trust the new root alone", &before).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    for load in of_new {
        shots.extend(load.stop().await);
    }
    let failed = failures(&shots);
    record("path.root_rotation.requests", shots.len() as f64, "requests", Goal::None);
    let holds = record("path.root_rotation.failures", failed.len() as f64, "requests", Goal::AtMost(0.0));
    assert!(holds, "{failed:?}");
    assert!(old.get("/v2/health/live").await.is_err(), "the old root is trusted by nobody");
}

/// What `spillway pki` writes is what a process starts from.
#[test]
fn certificates_of_the_command_line_are_identities_and_an_authority_is_never_overwritten() {
    let folder = RunFolder::new("identity-pki");
    let dir = text(&folder).to_owned() + "/pki";
    spillway_ok(&["pki", "init", &dir, "--trust-domain", "example.test"]);
    let again = spillway(&["pki", "init", &dir]);
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("already"), "{again:?}");
    let id = "spiffe://example.test/region/eu/gateway/gw-1";
    let printed =
        spillway_ok(&["pki", "issue", &dir, id, "--dial", "api.example.test", "--dial", "127.0.0.1", "--life", "1h"]);
    let files: Vec<&str> = printed.lines().collect();
    assert_eq!(files, [format!("{dir}/gw-1.pem"), format!("{dir}/gw-1.key")]);
    spillway_runtime::tls::install_provider();
    let settings = IdentitySettings {
        certificate: files[0].into(),
        key: files[1].into(),
        trust_bundle: format!("{dir}/trust-bundle.pem").into(),
    };
    let workload = Workload::load(&settings).expect("a workload's files");
    assert_eq!(workload.id().to_string(), id);
    let key = std::fs::metadata(files[1]).expect("the key").permissions().mode();
    assert_eq!(key & 0o077, 0, "the key is its owner's alone");
    for (arguments, problem) in [
        (["pki", "issue", &dir, "spiffe://example.test/region/eu"], "spiffe://example.test/region/eu"),
        (["pki", "issue", &dir, "spiffe://other.test/region/eu/gateway/gw-1"], "other.test"),
        (["pki", "issue", "nowhere", id], "nowhere"),
    ] {
        let refused = spillway(&arguments);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(problem), "{arguments:?}: {said}");
    }
}

/// Calls that go on, each judged by the score that belongs to its entity.
fn right_predictions(client: &Client, protocol: Protocol) -> Load {
    let all = cases();
    let entities: Vec<String> = all.iter().map(|case| case.entity.clone()).collect();
    let make = move |client: &Client, number: usize| client.json(INFER, &entity(&entities[number % entities.len()]));
    Load::start(client, protocol, 4, Duration::from_millis(2), make, move |number, answer| {
        if answer.status != 200 {
            return Err(format!("{} {}", answer.status, answer.error_code()));
        }
        let (found, expected) = (scores(answer)[0], all[number % all.len()].score);
        if (found - expected).abs() <= 1e-5 { Ok(()) } else { Err(format!("{found} for {expected}")) }
    })
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t50_a_revoked_certificate_is_refused_on_open_connections_and_nobody_else_notices() {
    let mut region = Region::new("identity-revoked");
    for name in ["by-id", "by-serial", "stays"] {
        region.issue(name, &format!("tenant/acme/client/{name}"), HOUR);
    }
    region.start().await;
    let load = right_predictions(&region.client("stays"), Protocol::H2);
    let serial = {
        let pem = std::fs::read(region.identity("by-serial").certificate).expect("a certificate");
        let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).expect("PEM");
        pem.parse_x509().expect("a certificate").raw_serial_as_string()
    };
    for (name, revoked) in [
        ("by-id", format!("ids: ['{}']", id("tenant/acme/client/by-id"))),
        ("by-serial", format!("serials: ['{serial}']")),
    ] {
        let client = region.client(name);
        let mut open = Vec::new();
        for protocol in [Protocol::H1, Protocol::H2] {
            let mut connection = client.connect(protocol).await.expect("a connection");
            let answer = connection.send(client.json(INFER, &entity("site-0001"))).await.expect("an answer");
            assert_eq!(answer.status, 200, "{name} before");
            open.push(connection);
        }
        let resource = format!(
            "apiVersion: spillway/v1\nkind: Revocation\nmetadata: {{ name: {name} }}\nspec: {{ {revoked}, reason: lost }}\n"
        );
        region.resources.insert(format!("revoke-{name}.yaml"), resource);
        region.apply();
        eventually("new connections are refused", SOON, async || {
            client.get("/v2/health/live").await.is_err().then_some(())
        })
        .await;
        for mut connection in open {
            let answer = connection.send(client.json(INFER, &entity("site-0001"))).await.expect("an answer");
            assert_eq!((answer.status.as_u16(), answer.error_code()), (403, "untrusted-certificate"), "{name} after");
            eventually("the connection is ended", SOON, async || connection.is_closed().then_some(())).await;
        }
    }
    let refused = region.gateway_metrics().sum("spillway_gateway_handshake_failures_total", &["reason=\"revoked\""]);
    assert!(refused >= 2.0, "{refused} counted");
    let shots = load.stop().await;
    assert!(failures(&shots).is_empty() && shots.len() > 50, "{:?} of {}", failures(&shots), shots.len());
}
