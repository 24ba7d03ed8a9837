//! The first certificate of a node that has nothing but a token and a trust bundle.

use std::os::unix::fs::PermissionsExt;

use spillway_core::identity::Role;
use spillway_proto::control::CreateTokenRequest;
use spillway_runtime::authority::Authority as Signer;
use spillway_runtime::renewal::{RenewalError, prepare};
use spillway_runtime::tls::{IdentitySettings, Workload};

use super::stand::{GATEWAY, HOUR, Node, OPERATOR, SECOND, SIDECAR, Stand, eventually, id};

fn role(uri: &str) -> Role {
    id(uri).role
}

impl Stand {
    pub async fn token(&self, uri: &str) -> String {
        let mut operator = self.client(&self.issued(OPERATOR)).await;
        let order = CreateTokenRequest {
            id: uri.into(),
            dns_names: vec!["Edge.example".into()],
            addresses: vec!["127.0.0.1".into()],
            life_seconds: 60,
        };
        operator.create_token(order).await.unwrap().into_inner().token
    }

    /// What a new machine has: a bundle and a token.
    pub fn machine(&self, name: &str, token: &str) -> (IdentitySettings, std::path::PathBuf) {
        let folder = self.folder.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let at = |file: &str| folder.join(file);
        std::fs::write(at("trust-bundle.pem"), self.signer.trust_bundle()).unwrap();
        std::fs::write(at("token"), format!("{token}\n")).unwrap();
        let identity = IdentitySettings {
            certificate: at("certificate.pem"),
            key: at("key.pem"),
            trust_bundle: at("trust-bundle.pem"),
        };
        (identity, at("token"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_certificate_gets_one_by_its_token_and_renews_it() {
    let stand = Stand::start(4 * SECOND, SECOND).await;
    let (identity, token) = stand.machine("new", &stand.token(GATEWAY).await);
    let renew = stand.renewal(Some(token));
    prepare(&identity, Some(&renew), &role(GATEWAY)).await.unwrap();
    assert_eq!(std::fs::metadata(&identity.key).unwrap().permissions().mode() & 0o777, 0o600);
    let first = std::fs::read(&identity.key).unwrap();
    assert_eq!(Workload::load(&identity).unwrap().id(), id(GATEWAY));
    // What is there is not asked for again.
    prepare(&identity, Some(&renew), &role(GATEWAY)).await.unwrap();
    assert_eq!(std::fs::read(&identity.key).unwrap(), first);
    let node = Node::start(identity, renew);
    eventually("it has renewed twice", || node.renewed() >= 2).await;
    assert_ne!(std::fs::read(&node.identity.key).unwrap(), first, "each certificate has a key of its own");
    assert_eq!(stand.audited(&["\"event\":\"certificate-issued\"", "gw-0", "\"proof\":\"token\""]).await, 1);
    assert_eq!(stand.audited(&["\"event\":\"token-created\"", "gw-0", "operator/ada", "edge.example"]).await, 1);
}

#[tokio::test]
async fn a_token_of_another_or_one_that_was_used_gives_nothing() {
    let stand = Stand::start(HOUR, HOUR).await;
    let denied = |outcome: Result<(), RenewalError>| match outcome.unwrap_err() {
        RenewalError::Denied(reason) => reason,
        other => panic!("{other:?}"),
    };
    let text = stand.token(GATEWAY).await;
    let (other, token) = stand.machine("other", &text);
    let renew = stand.renewal(Some(token));
    assert_eq!(denied(prepare(&other, Some(&renew), &role(SIDECAR)).await), "other-identity");
    // That has not used it up.
    let (first, token) = stand.machine("first", &text);
    prepare(&first, Some(&stand.renewal(Some(token))), &role(GATEWAY)).await.unwrap();
    let (second, token) = stand.machine("second", &text);
    assert_eq!(denied(prepare(&second, Some(&stand.renewal(Some(token))), &role(GATEWAY)).await), "token-used");
    assert!(!second.certificate.exists());
    let (third, token) = stand.machine("third", "nothing");
    assert_eq!(denied(prepare(&third, Some(&stand.renewal(Some(token))), &role(GATEWAY)).await), "token-unknown");
    assert_eq!(stand.audited(&["\"event\":\"denied\"", "token-used", "127.0.0.1"]).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_machines_with_one_token_one_gets_in() {
    let stand = Stand::start(HOUR, HOUR).await;
    let token = stand.token(GATEWAY).await;
    let machines: Vec<_> = (0..8)
        .map(|index| {
            let (identity, token) = stand.machine(&format!("machine-{index}"), &token);
            let renew = stand.renewal(Some(token));
            tokio::spawn(async move { prepare(&identity, Some(&renew), &role(GATEWAY)).await })
        })
        .collect();
    let mut in_by_now = 0;
    for machine in machines {
        in_by_now += usize::from(machine.await.unwrap().is_ok());
    }
    assert_eq!(in_by_now, 1);
}

#[tokio::test]
async fn a_control_node_that_the_bundle_does_not_know_gets_no_token() {
    let stand = Stand::start(HOUR, HOUR).await;
    let text = stand.token(GATEWAY).await;
    let (identity, token) = stand.machine("new", &text);
    let stranger = Signer::create(id(GATEWAY).trust_domain).unwrap();
    std::fs::write(&identity.trust_bundle, stranger.trust_bundle()).unwrap();
    let renew = stand.renewal(Some(token));
    let outcome = tokio::time::timeout(3 * SECOND, prepare(&identity, Some(&renew), &role(GATEWAY))).await;
    assert!(outcome.is_err(), "it goes on trying: {outcome:?}");
    assert_eq!(stand.audited(&["\"event\":\"certificate-issued\""]).await, 0);
}

#[tokio::test]
async fn only_operators_make_tokens_and_only_of_the_own_trust_domain() {
    let stand = Stand::start(HOUR, HOUR).await;
    let order = |id: &str| CreateTokenRequest { id: id.into(), ..CreateTokenRequest::default() };
    let mut gateway = stand.client(&stand.issued(GATEWAY)).await;
    assert_eq!(gateway.create_token(order(SIDECAR)).await.unwrap_err().message(), "not-an-operator");
    let mut operator = stand.client(&stand.issued(OPERATOR)).await;
    for bad in ["", "gw-0", "spiffe://other.test/region/eu/gateway/gw-0"] {
        assert!(operator.create_token(order(bad)).await.unwrap_err().message().starts_with("argument"), "{bad}");
    }
    let names = CreateTokenRequest { dns_names: vec!["*.example".into()], ..order(GATEWAY) };
    assert!(operator.create_token(names).await.unwrap_err().message().starts_with("argument"));
    let long = CreateTokenRequest { life_seconds: 90_000, ..order(GATEWAY) };
    assert!(operator.create_token(long).await.unwrap_err().message().starts_with("argument"));
    assert!(operator.create_token(order(GATEWAY)).await.is_ok());
}
