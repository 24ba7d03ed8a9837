//! Real handshakes over loopback, between our own configs and with leaves that must be refused.

mod refusals;
mod resumption;
mod rotation;

use std::sync::Arc;
use std::time::Duration;

use rcgen::CertificateParams;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::{CipherSuite, ClientConfig, NamedGroup, ProtocolVersion};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use spillway_core::identity::ExpectedPeer;
use spillway_core::units::Name;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsConnector, client};

use super::trust::ExpectedServer;
use super::*;
use crate::authority::{IssuedLeaf, LeafRequest};
use crate::fixture::*;

const WITHIN: Duration = Duration::from_secs(5);

type Client = std::io::Result<client::TlsStream<TcpStream>>;

/// One handshake, both ends' views of it.
async fn handshake(
    server: &Workload,
    config: Arc<ClientConfig>,
    offer: Offer,
) -> (Result<Accepted<TcpStream>, AcceptError>, Client) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        TlsConnector::from(config).connect(ServerName::IpAddress(address.ip().into()), stream).await
    };
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        accept(server, stream, offer, WITHIN).await
    };
    tokio::join!(serve, connect)
}

/// A client with this leaf, or without one, that wants the gateway.
fn client_config(domain: &Domain, leaf: Option<&IssuedLeaf>) -> ClientConfig {
    client_config_by((*provider()).clone(), domain, leaf)
}

fn client_config_by(provider: CryptoProvider, domain: &Domain, leaf: Option<&IssuedLeaf>) -> ClientConfig {
    let bundle = domain.authority.trust_bundle().as_bytes();
    let trust = Arc::new(Trust::read(id(GATEWAY).trust_domain, bundle).unwrap());
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectedServer { trust, expected: id(GATEWAY).into() }));
    let mut config = match leaf {
        Some(leaf) => {
            let chain = CertificateDer::pem_slice_iter(leaf.certificate.as_bytes()).map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap();
            config.with_client_auth_cert(chain, key).unwrap()
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// How a gateway answers a client whose leaf was changed; afterwards an honest client is let in.
async fn refusal_of(domain: &Domain, change: impl FnOnce(&mut CertificateParams)) -> &'static str {
    let server = domain.workload(GATEWAY);
    let leaf = domain.authority.issue_with(&LeafRequest::new(id(CLIENT), HOUR), change).unwrap();
    let reason = refusal_of_client(&server, client_config(domain, Some(&leaf))).await;
    let honest = client_config(domain, Some(&domain.issue(CLIENT)));
    assert!(handshake(&server, Arc::new(honest), Offer::H2).await.0.is_ok());
    reason
}

async fn refusal_of_client(server: &Workload, config: ClientConfig) -> &'static str {
    let (accepted, client) = handshake(server, Arc::new(config), Offer::H2).await;
    let reason = accepted.expect_err("the handshake must fail").reason();
    // A TLS 1.3 client may believe itself connected until it reads the server's alert.
    if let Ok(mut client) = client {
        assert!(client.read_u8().await.is_err());
    }
    reason
}

#[tokio::test]
async fn both_ends_know_each_other_and_prefer_post_quantum_key_exchange() {
    let domain = Domain::create();
    let (gateway, sidecar) = (domain.workload(GATEWAY), domain.workload(SIDECAR));
    let (accepted, client) = handshake(&sidecar, gateway.client_config(id(SIDECAR)), Offer::H2).await;
    let (accepted, client) = (accepted.unwrap(), client.unwrap());
    assert_eq!((&accepted.peer.id, accepted.protocol), (&id(GATEWAY), Protocol::H2));
    assert_eq!(accepted.peer.chain.len(), 2);
    let (_, connection) = client.get_ref();
    assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
}

#[test]
fn the_provider_is_aws_lc_rs_and_prefers_post_quantum_key_exchange() {
    install_provider();
    install_provider();
    let expected = rustls::crypto::aws_lc_rs::default_provider();
    let names = |provider: &CryptoProvider| provider.kx_groups.iter().map(|group| group.name()).collect::<Vec<_>>();
    assert_eq!(names(&provider()), names(&expected));
    assert_eq!(names(&provider())[0], NamedGroup::X25519MLKEM768);
    let suites = |provider: &CryptoProvider| provider.cipher_suites.len();
    assert_eq!(suites(&provider()), suites(&expected));
    assert!(format!("{:?}", provider().key_provider).contains("AwsLc"));
}

#[tokio::test]
async fn aes_128_is_chosen_and_a_client_that_offers_aes_256_alone_gets_it() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    let (aes_128, aes_256) = (CipherSuite::TLS13_AES_128_GCM_SHA256, CipherSuite::TLS13_AES_256_GCM_SHA384);
    for (offered, chosen) in [(vec![aes_256, aes_128], aes_128), (vec![aes_256], aes_256)] {
        let all = rustls::crypto::aws_lc_rs::default_provider();
        let find = |name| *all.cipher_suites.iter().find(|suite| suite.suite() == name).unwrap();
        let cipher_suites = offered.into_iter().map(find).collect();
        let theirs = CryptoProvider { cipher_suites, ..all.clone() };
        let config = client_config_by(theirs, &domain, Some(&domain.issue(CLIENT)));
        let (accepted, _client) = handshake(&gateway, Arc::new(config), Offer::H2).await;
        let accepted = accepted.unwrap();
        assert_eq!(accepted.stream.get_ref().1.negotiated_cipher_suite().unwrap().suite(), chosen);
    }
}

#[tokio::test]
async fn a_client_without_alpn_gets_http1_where_that_is_spoken() {
    let domain = Domain::create();
    let gateway = domain.workload(GATEWAY);
    for (asked, expected) in [(vec![], Protocol::Http1), (vec![b"http/1.1".to_vec()], Protocol::Http1)] {
        let mut config = client_config(&domain, Some(&domain.issue(CLIENT)));
        config.alpn_protocols = asked;
        let (accepted, _) = handshake(&gateway, Arc::new(config), Offer::H2AndHttp1).await;
        assert_eq!(accepted.unwrap().protocol, expected);
    }
}

#[tokio::test]
async fn a_server_that_is_someone_else_is_refused() {
    let domain = Domain::create();
    let (gateway, sidecar) = (domain.workload(GATEWAY), domain.workload(SIDECAR));
    let other = id("spiffe://spillway.test/region/eu/sidecar/scorers/pod-1");
    let (_, client) = handshake(&sidecar, gateway.client_config(other), Offer::H2).await;
    assert!(client.unwrap_err().to_string().contains("expected"));
}

#[tokio::test]
async fn any_sidecar_of_a_pool_is_let_in_where_that_is_expected_and_nobody_else() {
    let domain = Domain::create();
    let (gateway, sidecar) = (domain.workload(GATEWAY), domain.workload(SIDECAR));
    for (pool, known) in [("scorers", true), ("rankers", false)] {
        let expected = ExpectedPeer::SidecarOf {
            trust_domain: id(SIDECAR).trust_domain,
            region: Name::parse("eu").unwrap(),
            pool: Name::parse(pool).unwrap(),
        };
        let (_, client) = handshake(&sidecar, gateway.client_config(expected.clone()), Offer::H2).await;
        assert_eq!(client.is_ok(), known, "{expected}");
    }
}

#[tokio::test]
async fn a_server_whose_leaf_is_for_clients_alone_is_refused() {
    let domain = Domain::create();
    let settings = domain.settings(SIDECAR, None);
    let purpose = |params: &mut CertificateParams| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    };
    let leaf = domain.authority.issue_with(&LeafRequest::new(id(SIDECAR), HOUR), purpose).unwrap();
    leaf.save(&settings.certificate, &settings.key).unwrap();
    let (sidecar, gateway) = (Workload::load(&settings).unwrap(), domain.workload(GATEWAY));
    assert!(handshake(&sidecar, gateway.client_config(id(SIDECAR)), Offer::H2).await.1.is_err());
}

#[tokio::test]
async fn a_silent_client_is_given_up() {
    let domain = Domain::create();
    let (_client, server) = tokio::io::duplex(1_024);
    let workload = domain.workload(GATEWAY);
    let accepted = accept(&workload, server, Offer::H2, Duration::from_millis(50)).await;
    assert_eq!(accepted.unwrap_err().reason(), "timeout");
}
