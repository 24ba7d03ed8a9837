//! THREATS 46 to 48 and 51: who is not let in.

use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use spillway_core::identity::TrustDomain;
use tokio::io::AsyncWriteExt;

use super::*;

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[tokio::test]
async fn t46_a_malformed_spiffe_id_is_refused_in_the_handshake() {
    let domain = Domain::create();
    for bad in [
        "SPIFFE://spillway.test/tenant/acme/client/web",
        "spiffe://spillway.test/tenant//client/web",
        "spiffe://spillway.test/tenant/./client/web",
        "spiffe://spillway.test/tenant/../client/web",
        "spiffe://spillway.test/tenant/acme/client/web/",
        "spiffe://spillway.test/tenant/%61cme/client/web",
        "spiffe://spillway.test:443/tenant/acme/client/web",
        "spiffe://root@spillway.test/tenant/acme/client/web",
        "spiffe://spillway.test/tenant/acme/client/web?x=1",
        "spiffe://spillway.test",
        "https://spillway.test/tenant/acme/client/web",
    ] {
        let reason = refusal_of(&domain, |params| params.subject_alt_names = vec![uri(bad)]).await;
        assert_eq!(reason, "not-an-id", "{bad}");
    }
}

#[tokio::test]
async fn t47_zero_or_two_uri_names_and_signing_leaves_are_refused() {
    let domain = Domain::create();
    let dns = || SanType::DnsName("acme.test".try_into().unwrap());
    assert_eq!(refusal_of(&domain, |params| params.subject_alt_names = vec![dns()]).await, "uri-names");
    assert_eq!(refusal_of(&domain, |params| params.subject_alt_names.clear()).await, "uri-names");
    let second = uri("spiffe://spillway.test/tenant/globex/client/web");
    assert_eq!(refusal_of(&domain, |params| params.subject_alt_names.push(second)).await, "uri-names");
    assert_eq!(refusal_of(&domain, |params| params.subject_alt_names.push(uri(CLIENT))).await, "uri-names");
    let ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert_eq!(refusal_of(&domain, |params| params.is_ca = ca).await, "may-sign");
    for usage in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        assert_eq!(refusal_of(&domain, |params| params.key_usages.push(usage)).await, "may-sign");
    }
}

#[tokio::test]
async fn t48_a_leaf_outside_its_time_is_refused() {
    let domain = Domain::create();
    let now = std::time::SystemTime::now();
    let expired = refusal_of(&domain, |params| params.not_after = (now - Duration::from_secs(60)).into());
    assert_eq!(expired.await, "expired");
    assert_eq!(refusal_of(&domain, |params| params.not_before = (now + HOUR / 2).into()).await, "not-yet-valid");
}

#[tokio::test]
async fn t48_a_leaf_for_another_use_is_refused() {
    let domain = Domain::create();
    for usages in [
        vec![ExtendedKeyUsagePurpose::ServerAuth],
        vec![],
        vec![ExtendedKeyUsagePurpose::Any],
        vec![ExtendedKeyUsagePurpose::CodeSigning],
    ] {
        assert_eq!(refusal_of(&domain, |params| params.extended_key_usages = usages).await, "purpose");
    }
    let usage = vec![KeyUsagePurpose::KeyEncipherment];
    assert_eq!(refusal_of(&domain, |params| params.key_usages = usage).await, "purpose");
}

#[tokio::test]
async fn t48_another_trust_domain_is_refused_whoever_signed() {
    let domain = Domain::create();
    let other = uri("spiffe://other.test/tenant/acme/client/web");
    assert_eq!(refusal_of(&domain, |params| params.subject_alt_names = vec![other]).await, "trust-domain");
    // The same names, but another authority.
    let stranger = Domain::create();
    let server = domain.workload(GATEWAY);
    let config = client_config(&domain, Some(&stranger.issue(CLIENT)));
    assert_eq!(refusal_of_client(&server, config).await, "untrusted");
}

#[tokio::test]
async fn t51_no_client_certificate_is_refused() {
    let domain = Domain::create();
    let server = domain.workload(GATEWAY);
    assert_eq!(refusal_of_client(&server, client_config(&domain, None)).await, "no-certificate");
}

#[tokio::test]
async fn t51_wrong_or_missing_alpn_is_refused() {
    let domain = Domain::create();
    let server = domain.workload(GATEWAY);
    let leaf = domain.issue(CLIENT);
    for asked in [vec![b"http/1.1".to_vec()], vec![b"h3".to_vec()], vec![]] {
        let mut config = client_config(&domain, Some(&leaf));
        config.alpn_protocols = asked;
        assert_eq!(refusal_of_client(&server, config).await, "protocol");
    }
    let mut config = client_config(&domain, Some(&leaf));
    config.alpn_protocols = vec![b"spdy/3".to_vec()];
    let (accepted, _) = handshake(&server, Arc::new(config), Offer::H2AndHttp1).await;
    assert_eq!(accepted.unwrap_err().reason(), "protocol");
}

#[tokio::test]
async fn t51_tls_1_2_and_older_are_refused() {
    let domain = Domain::create();
    let server = domain.workload(GATEWAY);
    for version in [[3, 1], [3, 2], [3, 3]] {
        let (mut client, link) = tokio::io::duplex(4_096);
        client.write_all(&old_client_hello(version)).await.unwrap();
        let refused = accept(&server, link, Offer::H2AndHttp1, WITHIN).await.unwrap_err();
        assert_eq!(refused.reason(), "handshake");
        let mut alert = Vec::new();
        client.read_to_end(&mut alert).await.unwrap();
        // A fatal alert, protocol_version (RFC 8446, section 6).
        assert_eq!((alert[0], &alert[alert.len() - 2..]), (21, &[2, 70][..]));
    }
}

/// A ClientHello as TLS 1.2 and older send it: no supported_versions (RFC 5246, section 7.4.1.2).
fn old_client_hello(version: [u8; 2]) -> Vec<u8> {
    let mut extensions = Vec::new();
    extensions.extend([0, 10, 0, 4, 0, 2, 0, 29]); // supported_groups: x25519
    extensions.extend([0, 13, 0, 4, 0, 2, 4, 3]); // signature_algorithms: ecdsa_secp256r1_sha256
    let mut hello = version.to_vec();
    hello.extend([7; 32]); // random
    hello.push(0); // no session
    hello.extend([0, 2, 0xc0, 0x2b]); // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
    hello.extend([1, 0]); // no compression
    hello.extend((extensions.len() as u16).to_be_bytes());
    hello.extend(extensions);
    let mut record = vec![22, 3, 1];
    record.extend((hello.len() as u16 + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend((hello.len() as u16).to_be_bytes());
    record.extend(hello);
    record
}

#[test]
fn a_bundle_that_is_not_wholly_good_is_refused() {
    let domain = Domain::create();
    let ours = TrustDomain::parse("spillway.test").unwrap();
    let read = |pem: &str| Trust::read(ours.clone(), pem.as_bytes()).map(|_| ()).map_err(|error| error.to_string());
    let good = domain.authority.trust_bundle();
    assert_eq!(read(good), Ok(()));
    let foreign = crate::authority::Authority::create(TrustDomain::parse("other.test").unwrap()).unwrap();
    for (pem, problem) in [
        (String::new(), "no certificate"),
        ("rubbish".into(), "no certificate"),
        (format!("{good}{}", foreign.trust_bundle()), "another trust domain"),
        (format!("{good}{}", domain.issue(CLIENT).certificate), "key usages"),
        (format!("{good}-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "cannot be read"),
        (format!("{good}-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"), "no PEM"),
    ] {
        assert!(read(&pem).unwrap_err().contains(problem), "{problem}: {:?}", read(&pem));
    }
}

#[test]
fn no_changed_byte_of_a_leaf_is_accepted_and_none_panics() {
    let domain = Domain::create();
    let server = domain.workload(GATEWAY);
    let issued = domain.issue(CLIENT);
    let chain: Vec<_> = CertificateDer::pem_slice_iter(issued.certificate.as_bytes()).map(Result::unwrap).collect();
    assert!(server.peer(&chain).is_ok());
    for at in 0..chain[0].len() {
        let mut changed = chain.clone();
        let mut leaf = chain[0].to_vec();
        leaf[at] ^= 1 << (at % 8);
        changed[0] = leaf.into();
        assert!(server.peer(&changed).is_err(), "byte {at}");
    }
    for length in [0, 1, chain[0].len() / 2, chain[0].len() - 1] {
        let cut = CertificateDer::from(chain[0][..length].to_vec());
        assert!(server.peer(&[cut, chain[1].clone()]).is_err());
    }
    assert_eq!(server.peer(&[]).unwrap_err().reason(), "no-certificate");
    assert_eq!(server.peer(&chain[..1]).unwrap_err().reason(), "untrusted");
}
