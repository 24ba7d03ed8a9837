//! The roots that we trust now, and the verification of peers against them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use spillway_core::identity::{ExpectedPeer, Revoked, TrustDomain};

use super::chains::VerifiedChains;
use super::peer::{Leaf, PeerError, Side, root_trust_domain};
use super::provider::provider;
use super::workload::IdentityError;

/// The root store of one trust domain. Ids of other domains are refused, whoever signed them.
#[derive(Clone, Debug)]
pub struct Trust {
    domain: TrustDomain,
    roots: RootCertStore,
    clients: Arc<dyn ClientCertVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
    /// What is refused all the same.
    revoked: Arc<Revoked>,
    /// What led to these roots before.
    chains: Arc<VerifiedChains>,
}

impl Trust {
    /// Reads a bundle: PEM of the roots of `domain`. One bad root refuses the whole bundle.
    pub fn read(domain: TrustDomain, pem: &[u8]) -> Result<Self, IdentityError> {
        let refused = |problem: &str| IdentityError::Bundle(problem.to_owned());
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(pem) {
            let root = root.map_err(|_| refused("it is no PEM"))?;
            let named = root_trust_domain(&root).map_err(|error| IdentityError::Bundle(error.to_string()))?;
            if named.is_some_and(|named| named != domain.as_str()) {
                return Err(refused("a root belongs to another trust domain"));
            }
            roots.add(root).map_err(|_| refused("a root cannot be read"))?;
        }
        if roots.is_empty() {
            return Err(refused("there is no certificate in it"));
        }
        let algorithms = provider().signature_verification_algorithms;
        // Without hints: a client whose library compares them with its chain would present no
        // certificate when the chain's issuers are not the roots themselves.
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), provider())
            .clear_root_hint_subjects()
            .build()
            .map_err(|_| refused("no root can be used"))?;
        Ok(Self { domain, roots, clients, algorithms, revoked: Arc::default(), chains: Arc::default() })
    }

    /// The same roots, and these refused.
    pub(super) fn revoking(self, revoked: Arc<Revoked>) -> Self {
        Self { revoked, ..self }
    }

    pub(super) fn revoked(&self) -> &Arc<Revoked> {
        &self.revoked
    }

    /// Verifies a chain, leaf first, for the use of its peer's side.
    pub(super) fn verify(&self, chain: &[CertificateDer<'_>], side: Side, now: SystemTime) -> Result<Leaf, PeerError> {
        let (end_entity, intermediates) = chain.split_first().ok_or(PeerError::NoCertificate)?;
        self.verify_parts(end_entity, intermediates, side, now)
    }

    fn verify_parts(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        side: Side,
        now: SystemTime,
    ) -> Result<Leaf, PeerError> {
        let key = VerifiedChains::key(end_entity, intermediates, side);
        let before = self.chains.get(&key);
        let verified = before.as_ref().is_some_and(|before| before.holds(now));
        let leaf = before.map_or_else(|| Leaf::read(end_entity), |before| Ok(before.leaf))?;
        if leaf.id.trust_domain != self.domain {
            return Err(PeerError::TrustDomain);
        }
        if self.revoked.includes(&leaf.id, &leaf.serial) {
            return Err(PeerError::Revoked);
        }
        leaf.check_time(now)?;
        if verified {
            return Ok(leaf);
        }
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let now = UnixTime::since_unix_epoch(since_epoch);
        let verified = match side {
            Side::Client if !leaf.for_client => return Err(PeerError::Purpose),
            Side::Server if !leaf.for_server => return Err(PeerError::Purpose),
            Side::Client => self.clients.verify_client_cert(end_entity, intermediates, now).map(|_| ()),
            Side::Server => ParsedCertificate::try_from(end_entity).and_then(|parsed| {
                let algorithms = self.algorithms.all;
                verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)
            }),
        };
        verified.map_err(PeerError::Untrusted)?;
        self.chains.remember(key, &leaf, intermediates);
        Ok(leaf)
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

/// A server's view: any client of our trust domain; who may do what is decided per request.
///
/// Both views ask the clock themselves: rustls gives whole seconds, by which a certificate would open
/// connections for up to a second after it had expired for requests.
#[derive(Debug)]
pub(super) struct Clients(pub Arc<Trust>);

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.verify_parts(end_entity, intermediates, Side::Client, SystemTime::now()).map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.algorithms.supported_schemes()
    }
}

/// A client's view: only the expected server will do, whatever names and addresses it goes by.
#[derive(Debug)]
pub(super) struct ExpectedServer {
    pub trust: Arc<Trust>,
    pub expected: ExpectedPeer,
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let now = SystemTime::now();
        let leaf = self.trust.verify_parts(end_entity, intermediates, Side::Server, now).map_err(refused)?;
        if !self.expected.includes(&leaf.id) {
            let expected = Box::new(self.expected.clone());
            return Err(refused(PeerError::Unexpected { found: Box::new(leaf.id), expected }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.trust.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

/// The alert that the peer gets says what it may know; the error carries the rest to our log.
fn refused(error: PeerError) -> rustls::Error {
    match error {
        PeerError::Untrusted(error) => error,
        PeerError::Expired => CertificateError::Expired.into(),
        PeerError::NotYetValid => CertificateError::NotValidYet.into(),
        PeerError::Malformed => CertificateError::BadEncoding.into(),
        PeerError::Purpose => CertificateError::InvalidPurpose.into(),
        PeerError::NoCertificate => rustls::Error::NoCertificatesPresented,
        PeerError::Revoked => CertificateError::Revoked.into(),
        PeerError::UriNames(_)
        | PeerError::NotAnId(_)
        | PeerError::TrustDomain
        | PeerError::MaySign
        | PeerError::Unexpected { .. } => CertificateError::Other(OtherError(Arc::new(error))).into(),
    }
}

/// The reason in a handshake's error, if it is about the peer's certificate.
pub(super) fn refusal(error: &rustls::Error) -> Option<PeerError> {
    match error {
        rustls::Error::NoCertificatesPresented => Some(PeerError::NoCertificate),
        rustls::Error::InvalidCertificate(certificate) => Some(match certificate {
            CertificateError::Other(OtherError(inner)) => {
                inner.downcast_ref::<PeerError>().cloned().unwrap_or_else(|| PeerError::Untrusted(error.clone()))
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => PeerError::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => PeerError::NotYetValid,
            CertificateError::Revoked => PeerError::Revoked,
            CertificateError::BadEncoding => PeerError::Malformed,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => PeerError::Purpose,
            _ => PeerError::Untrusted(error.clone()),
        }),
        _ => None,
    }
}

fn only_tls13() -> rustls::Error {
    rustls::Error::General("only TLS 1.3 is spoken".into())
}
