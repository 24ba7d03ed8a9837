//! What the authority is asked for over the wire, and what it says.

use std::time::SystemTime;

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, IsCa, KeyPair, KeyUsagePurpose, SanType};
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_proto::control::{BundleRequest, CreateTokenRequest, IssueRequest};
use spillway_runtime::authority::{LeafRequest, names_of};
use spillway_runtime::dial::dial_as;
use spillway_runtime::tls::{Newcomer, examine};
use tonic::Code;

use super::stand::{GATEWAY, HOUR, OPERATOR, SECOND, SIDECAR, Stand, id};

fn csr(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    change(&mut params);
    params.serialize_request(key).unwrap().der().to_vec()
}

fn names(params: &mut CertificateParams, uri: &str, dns: &[&str]) {
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.subject_alt_names.extend(dns.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())));
}

#[tokio::test]
async fn t52_who_asks_for_more_than_its_own_is_denied_and_audited() {
    let stand = Stand::start(HOUR, HOUR).await;
    let mut client = stand.client(&stand.issued(GATEWAY)).await;
    let key = KeyPair::generate().unwrap();
    let plain = csr(&key, |params| names(params, GATEWAY, &[]));
    let mut forged = plain.clone();
    let at = forged.windows(4).position(|window| window == b"gw-0").unwrap();
    forged[at + 3] = b'1';
    let ca = csr(&key, |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let signs = csr(&key, |params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
    let rsa = csr(&KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap(), |params| names(params, GATEWAY, &[]));
    let day = 86_400;
    for (csr, life_seconds, reason) in [
        (csr(&key, |params| names(params, SIDECAR, &[])), 0, "other-identity"),
        (csr(&key, |params| names(params, GATEWAY, &["bank.example"])), 0, "other-names"),
        (ca, 0, "may-sign"),
        (signs, 0, "may-sign"),
        (plain.clone(), day, "life"),
        (plain.clone(), u64::MAX, "life"),
        (forged, 0, "signature"),
        (rsa, 0, "key"),
        (b"garbage".to_vec(), 0, "malformed"),
        (Vec::new(), 0, "malformed"),
    ] {
        let refused =
            client.issue(IssueRequest { csr: csr.into(), token: String::new(), life_seconds }).await.unwrap_err();
        assert_eq!(refused.message(), reason);
        assert!(matches!(refused.code(), Code::PermissionDenied | Code::InvalidArgument), "{refused}");
        assert!(stand.counted(&format!("spillway_authority_refused_total{{reason=\"{reason}\"}}")), "{reason}");
    }
    // The next request of the same connection is right.
    let request = IssueRequest { csr: plain.into(), token: String::new(), life_seconds: 60 };
    let issued = client.issue(request).await.unwrap().into_inner();
    let texts = [issued.chain, key.serialize_pem(), issued.trust_bundle].map(String::into_bytes);
    let (found, life) = examine(&texts, SystemTime::now()).unwrap();
    assert_eq!(found, id(GATEWAY));
    assert!(life.not_after <= SystemTime::now() + 60 * SECOND);
    assert_eq!(stand.audited(&["\"event\":\"certificate-issued\"", "gw-0", "\"proof\":\"certificate\""]).await, 1);
    for reason in ["other-identity", "other-names", "may-sign", "life", "signature", "key", "malformed"] {
        let denied = stand.audited(&["\"event\":\"denied\"", "certificate-denied", "gw-0", reason]).await;
        assert!(denied >= 1, "{reason}");
    }
}

#[tokio::test]
async fn names_of_a_certificate_are_carried_on() {
    let stand = Stand::start(HOUR, HOUR).await;
    let request = LeafRequest::new(id(GATEWAY), HOUR).dialled_locally();
    let leaf = stand.signer.issue(&request).unwrap();
    let identity = leaf.save_workload(stand.folder.path().join("gateway"), stand.signer.trust_bundle()).unwrap();
    let mut client = stand.client(&identity).await;
    let key = KeyPair::generate().unwrap();
    let request = IssueRequest { csr: csr(&key, |_| {}).into(), token: String::new(), life_seconds: 0 };
    let issued = client.issue(request).await.unwrap().into_inner();
    let leaf = rcgen_leaf(&issued.chain);
    let names = names_of(&leaf).unwrap();
    assert_eq!((names.dns.len(), names.addresses.len()), (1, 2));
}

fn rcgen_leaf(chain: &str) -> Vec<u8> {
    let body: String = chain.lines().skip(1).take_while(|line| !line.starts_with('-')).collect();
    decode(&body)
}

/// Base64, of PEM alone.
fn decode(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'=').map(digit).collect();
    let bytes = digits.chunks(4).flat_map(|four| {
        let bits = four.iter().fold(0u32, |bits, digit| bits << 6 | u32::from(*digit)) << (6 * (4 - four.len()));
        bits.to_be_bytes()[1..four.len()].to_vec()
    });
    bytes.collect()
}

#[tokio::test]
async fn who_has_no_certificate_and_no_token_gets_nothing() {
    let stand = Stand::start(HOUR, HOUR).await;
    let newcomer = Newcomer::new(stand.signer.trust_bundle().as_bytes()).unwrap();
    let config = newcomer.client_config();
    let channel = dial_as(move || config.clone(), &stand.newcomers.to_string(), 5 * SECOND).await.unwrap();
    let mut client = AuthorityClient::new(channel);
    let key = KeyPair::generate().unwrap();
    let plain = csr(&key, |params| names(params, GATEWAY, &[]));
    let with = |token: &str| IssueRequest { csr: plain.clone().into(), token: token.into(), life_seconds: 0 };
    assert_eq!(client.issue(with("")).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(client.issue(with(&"0".repeat(64))).await.unwrap_err().message(), "token-unknown");
    assert_eq!(client.bundle(BundleRequest {}).await.unwrap_err().code(), Code::Unauthenticated);
    let order = CreateTokenRequest { id: GATEWAY.into(), ..CreateTokenRequest::default() };
    assert_eq!(client.create_token(order.clone()).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(client.create_token(order).await.unwrap_err().code(), Code::ResourceExhausted, "four calls, no more");
}

#[tokio::test]
async fn a_node_that_does_not_lead_issues_by_certificates_and_not_by_tokens() {
    let stand = Stand::start(HOUR, HOUR).await;
    let order = CreateTokenRequest { id: SIDECAR.into(), ..CreateTokenRequest::default() };
    let mut operator = stand.client(&stand.issued(OPERATOR)).await;
    let token = operator.create_token(order.clone()).await.unwrap().into_inner().token;
    stand.leading.send_replace(None);
    let refused = operator.create_token(order).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "not-leading"));
    let key = KeyPair::generate().unwrap();
    let by_certificate = |uri| IssueRequest {
        csr: csr(&key, |params| names(params, uri, &[])).into(),
        token: String::new(),
        life_seconds: 0,
    };
    let mut gateway = stand.client(&stand.issued(GATEWAY)).await;
    gateway.issue(by_certificate(GATEWAY)).await.unwrap();
    // Who has a certificate becomes nobody else by a token, and does not use it up.
    let with_token = IssueRequest { token, ..by_certificate(SIDECAR) };
    assert_eq!(gateway.issue(with_token.clone()).await.unwrap_err().message(), "other-identity");
    let mut sidecar = stand.client(&stand.issued(SIDECAR)).await;
    assert_eq!(sidecar.issue(with_token).await.unwrap_err().message(), "not-leading");
}

#[tokio::test]
async fn one_identity_cannot_keep_the_authority_busy_and_others_go_on() {
    let stand = Stand::start(HOUR, HOUR).await;
    let key = KeyPair::generate().unwrap();
    let request = IssueRequest { csr: csr(&key, |_| {}).into(), token: String::new(), life_seconds: 0 };
    let mut gateway = stand.client(&stand.issued(GATEWAY)).await;
    let mut refused = 0;
    for _ in 0..40 {
        if let Err(status) = gateway.issue(request.clone()).await {
            assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "busy"));
            refused += 1;
        }
    }
    assert!(refused >= 10, "{refused}");
    stand.client(&stand.issued(SIDECAR)).await.issue(request).await.unwrap();
}
