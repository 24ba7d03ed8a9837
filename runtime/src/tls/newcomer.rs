//! Connections of those who have no certificate yet: the server proves itself, and the client by what it sends.
//!
//! The rule: such a connection is nobody's. Only the authority's own port for newcomers takes one.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;
use spillway_core::identity::{ExpectedPeer, TrustDomain};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::accept::{AcceptError, failed};
use super::peer::root_trust_domain;
use super::provider::provider;
use super::trust::{ExpectedServer, Trust};
use super::workload::{IdentityError, Workload};

/// Who has a trust bundle, and nothing else.
#[derive(Clone, Debug)]
pub struct Newcomer {
    trust: Arc<Trust>,
    trust_domain: TrustDomain,
}

impl Newcomer {
    /// Reads a bundle: PEM of roots, of which the first names the trust domain.
    pub fn new(trust_bundle: &[u8]) -> Result<Self, IdentityError> {
        let refused = |problem: &str| IdentityError::Bundle(problem.to_owned());
        let first = CertificateDer::from_pem_slice(trust_bundle).map_err(|_| refused("it is no PEM"))?;
        let named = root_trust_domain(&first).map_err(|error| IdentityError::Bundle(error.to_string()))?;
        let trust_domain = named.and_then(|named| TrustDomain::parse(&named).ok());
        let trust_domain = trust_domain.ok_or_else(|| refused("its first root names no trust domain"))?;
        let trust = Arc::new(Trust::read(trust_domain.clone(), trust_bundle)?);
        Ok(Self { trust, trust_domain })
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// For a client of a control node, whichever it is. It shows no certificate.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        let expected = ExpectedPeer::ControlOf { trust_domain: self.trust_domain.clone() };
        let verifier = ExpectedServer { trust: self.trust.clone(), expected };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider speaks TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Arc::new(config)
    }
}

/// Does the handshake of a server with a client that shows no certificate. They speak h2.
pub(super) async fn greet_newcomer<S>(
    workload: &Workload,
    stream: S,
    within: Duration,
) -> Result<TlsStream<S>, AcceptError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(workload.key())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    let handshake = TlsAcceptor::from(Arc::new(config)).accept(stream);
    let stream = tokio::time::timeout(within, handshake).await.map_err(|_| AcceptError::Timeout)?.map_err(failed)?;
    match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Ok(stream),
        _ => Err(AcceptError::Protocol),
    }
}
