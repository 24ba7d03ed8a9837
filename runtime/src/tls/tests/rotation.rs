//! Certificates and roots that change while connections are open.

use std::time::SystemTime;

use spillway_core::identity::Revoked;

use super::*;
use crate::audit::Audit;
use crate::authority::Authority;
use crate::drain::Drain;
use crate::file::write_atomic;
use crate::telemetry::{Chain, Metrics};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn t49_a_new_pair_is_taken_and_open_connections_go_on() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    let config = Arc::new(client_config(&domain, Some(&domain.issue(CLIENT))));
    let (open, old) = handshake(&gateway, config.clone(), Offer::H2).await;
    let open = open.unwrap();
    assert!(!gateway.reload().unwrap());
    domain.issue(GATEWAY).save(&settings.certificate, &settings.key).unwrap();
    assert!(gateway.reload().unwrap());
    assert_eq!(gateway.generation(), 2);
    assert_eq!(gateway.still_trusted(&open.peer, SystemTime::now()), Ok(()));
    let (accepted, new) = handshake(&gateway, config, Offer::H2).await;
    assert!(accepted.is_ok());
    let leaf = |client: Client| client.unwrap().get_ref().1.peer_certificates().unwrap()[0].clone();
    assert_ne!(leaf(old), leaf(new));
}

#[tokio::test]
async fn t50_a_revoked_id_or_serial_is_refused_on_open_connections_and_new_ones() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    let leaf = domain.issue(CLIENT);
    let config = Arc::new(client_config(&domain, Some(&leaf)));
    let (open, _client) = handshake(&gateway, config.clone(), Offer::H2).await;
    let open = open.unwrap();
    let now = SystemTime::now();
    let by_id = Revoked { ids: [open.peer.id.clone()].into(), ..Revoked::default() };
    let by_serial = Revoked { serials: [open.peer.serial.clone()].into(), ..Revoked::default() };
    for revoked in [by_id, by_serial] {
        let revoked = Arc::new(revoked);
        assert!(gateway.revoke(&revoked));
        assert!(!gateway.revoke(&revoked), "told twice is one change");
        assert_eq!(gateway.still_trusted(&open.peer, now), Err(PeerError::Revoked));
        let (refused, _client) = handshake(&gateway, config.clone(), Offer::H2).await;
        assert_eq!(refused.err().map(|error| error.reason()), Some("revoked"));
        // A new pair of ours forgets nothing.
        domain.issue(GATEWAY).save(&settings.certificate, &settings.key).unwrap();
        assert!(gateway.reload().unwrap());
        assert_eq!(gateway.still_trusted(&open.peer, now), Err(PeerError::Revoked));
    }
    assert!(gateway.revoke(&Arc::default()));
    assert_eq!(gateway.still_trusted(&open.peer, now), Ok(()));
}

#[tokio::test]
async fn a_bad_pair_or_bundle_is_refused_counted_and_the_last_good_one_stays() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    let metrics = Metrics::new("test");
    gateway.register(&metrics);
    let drain = Drain::new(Duration::ZERO);
    let watch = tokio::spawn(gateway.clone().watch(Audit::off(), drain.clone()));
    let refused = |count: u32| {
        let line = format!("spillway_identity_reloads_total{{outcome=\"refused\"}} {count}\n");
        metrics.encode().unwrap().contains(&line)
    };
    let good = std::fs::read(&settings.key).unwrap();
    write_atomic(&settings.key, domain.issue(GATEWAY).key.as_bytes(), 0o600).unwrap();
    eventually("the mismatch is counted", || refused(1)).await;
    write_atomic(&settings.key, &good, 0o600).unwrap();
    write_atomic(&settings.trust_bundle, b"rubbish", 0o644).unwrap();
    eventually("the bundle is counted", || refused(2)).await;
    std::fs::remove_file(&settings.trust_bundle).unwrap();
    eventually("the missing file is counted", || refused(3)).await;
    assert_eq!(gateway.generation(), 1);
    let config = Arc::new(client_config(&domain, Some(&domain.issue(CLIENT))));
    assert!(handshake(&gateway, config, Offer::H2).await.0.is_ok());
    // All good again: taken, whatever was refused before.
    write_atomic(&settings.trust_bundle, domain.authority.trust_bundle().as_bytes(), 0o644).unwrap();
    domain.issue(GATEWAY).save(&settings.certificate, &settings.key).unwrap();
    eventually("the good files are taken", || gateway.generation() == 2).await;
    assert!(refused(3));
    drain.stop();
    watch.await.unwrap();
}

#[tokio::test]
async fn a_pair_that_is_renamed_slowly_is_no_refusal() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    let metrics = Metrics::new("test");
    gateway.register(&metrics);
    let leaf = domain.issue(GATEWAY);
    write_atomic(&settings.key, leaf.key.as_bytes(), 0o600).unwrap();
    let drain = Drain::new(Duration::ZERO);
    let watch = tokio::spawn(gateway.clone().watch(Audit::off(), drain.clone()));
    // The first look, after 500 ms, sees the new key and the old certificate.
    tokio::time::sleep(Duration::from_millis(600)).await;
    write_atomic(&settings.certificate, leaf.certificate.as_bytes(), 0o644).unwrap();
    eventually("the pair is taken", || gateway.generation() == 2).await;
    assert!(!metrics.encode().unwrap().contains("outcome=\"refused\""));
    drain.stop();
    watch.await.unwrap();
}

#[test]
fn a_leaf_that_comes_too_early_is_refused_once_and_taken_when_its_time_comes() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    let now = SystemTime::now();
    let request = LeafRequest { not_before: now + 30 * SECOND, ..LeafRequest::new(id(GATEWAY), HOUR) };
    domain.authority.issue(&request).unwrap().save(&settings.certificate, &settings.key).unwrap();
    let early = gateway.reload_at(now).unwrap_err();
    assert!(matches!(early, IdentityError::Certificate(PeerError::NotYetValid)), "{early}");
    assert!(!gateway.reload_at(now + 10 * SECOND).unwrap(), "refused once");
    assert!(gateway.reload_at(now + 31 * SECOND).unwrap());
    assert_eq!(gateway.generation(), 2);
    assert!(!gateway.reload_at(now + 32 * SECOND).unwrap());
}

#[tokio::test]
async fn a_client_of_a_removed_root_is_refused_on_an_open_connection() {
    let (domain, other) = (Domain::create(), Domain::create());
    let both = format!("{}{}", domain.authority.trust_bundle(), other.authority.trust_bundle());
    let settings = domain.settings(GATEWAY, Some(&both));
    let gateway = Workload::load(&settings).unwrap();
    let (stays, _) =
        handshake(&gateway, Arc::new(client_config(&domain, Some(&domain.issue(CLIENT)))), Offer::H2).await;
    let leaving = client_config(&domain, Some(&other.issue(CLIENT)));
    let (goes, _) = handshake(&gateway, Arc::new(leaving.clone()), Offer::H2).await;
    let (stays, goes) = (stays.unwrap().peer, goes.unwrap().peer);
    let now = SystemTime::now();
    assert_eq!((gateway.still_trusted(&stays, now), gateway.still_trusted(&goes, now)), (Ok(()), Ok(())));
    write_atomic(&settings.trust_bundle, domain.authority.trust_bundle().as_bytes(), 0o644).unwrap();
    assert!(gateway.reload().unwrap());
    for _ in 0..2 {
        assert_eq!(gateway.still_trusted(&stays, now), Ok(()));
        assert_eq!(gateway.still_trusted(&goes, now).unwrap_err().reason(), "untrusted");
    }
    assert_eq!(refusal_of_client(&gateway, leaving).await, "untrusted");
    // The root comes back, and so does the client.
    write_atomic(&settings.trust_bundle, both.as_bytes(), 0o644).unwrap();
    assert!(gateway.reload().unwrap());
    assert_eq!(gateway.still_trusted(&goes, now), Ok(()));
}

#[tokio::test]
async fn t49_an_open_connection_ends_with_its_certificate() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let config = client_config(&domain, Some(&domain.issue(CLIENT)));
    let peer = handshake(&gateway, Arc::new(config), Offer::H2).await.0.unwrap().peer;
    assert_eq!(gateway.still_trusted(&peer, peer.not_after), Ok(()));
    let later = peer.not_after + Duration::from_secs(1);
    assert_eq!(gateway.still_trusted(&peer, later), Err(PeerError::Expired));
    // The same for who reads the chain himself.
    let again = gateway.peer(&peer.chain).unwrap();
    assert_eq!((&again.id, again.not_after), (&peer.id, peer.not_after));
}

#[test]
fn a_removed_root_goes_even_when_our_own_leaf_hangs_on_it() {
    let (domain, other) = (Domain::create(), Domain::create());
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    write_atomic(&settings.trust_bundle, other.authority.trust_bundle().as_bytes(), 0o644).unwrap();
    assert!(gateway.reload().unwrap());
    assert!(gateway.peer(&chain(&domain.issue(CLIENT))).is_err());
    assert!(gateway.peer(&chain(&other.issue(CLIENT))).is_ok());
}

#[test]
fn a_process_never_becomes_someone_else() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    domain.issue(SIDECAR).save(&settings.certificate, &settings.key).unwrap();
    assert!(matches!(gateway.reload(), Err(IdentityError::OtherId { .. })));
    assert_eq!((gateway.id(), gateway.generation()), (id(GATEWAY), 1));
}

#[test]
fn an_unusable_identity_is_a_clear_error_at_start() {
    let domain = Domain::create();
    let settings = domain.settings(GATEWAY, None);
    let problem = || Chain(&Workload::load(&settings).unwrap_err()).to_string();
    let request = LeafRequest::new(id(GATEWAY), HOUR);
    let expire = |params: &mut CertificateParams| params.not_after = (SystemTime::now() - HOUR).into();
    let expired = domain.authority.issue_with(&request, expire).unwrap();
    expired.save(&settings.certificate, &settings.key).unwrap();
    assert!(problem().contains("expired"));
    std::fs::write(&settings.certificate, "").unwrap();
    assert!(problem().contains("no PEM with at least one certificate"));
    domain.issue(GATEWAY).save(&settings.certificate, &settings.key).unwrap();
    std::fs::write(&settings.key, "").unwrap();
    assert!(problem().contains("key file"));
    std::fs::remove_file(&settings.key).unwrap();
    assert!(problem().contains("cannot be read"));
    let stranger = Authority::create(spillway_core::identity::TrustDomain::parse("other.test").unwrap()).unwrap();
    domain.issue(GATEWAY).save(&settings.certificate, &settings.key).unwrap();
    std::fs::write(&settings.trust_bundle, stranger.trust_bundle()).unwrap();
    assert!(problem().contains("another trust domain"));
}

pub(super) fn chain(leaf: &IssuedLeaf) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(leaf.certificate.as_bytes()).map(Result::unwrap).collect()
}
