//! What a certificate must look like to be a peer's, and the peer that it names.

use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use spillway_core::authority::renewal::Life;
use spillway_core::identity::{ExpectedPeer, InvalidId, Serial, SpiffeId};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The end of the connection that a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

/// A verified peer of an open connection. Ask [`super::Workload::still_trusted`] for each request.
#[derive(Debug)]
pub struct Peer {
    pub id: SpiffeId,
    pub serial: Serial,
    pub not_after: SystemTime,
    /// The leaf first, as the peer presented it.
    pub chain: Vec<CertificateDer<'static>>,
    pub side: Side,
    /// The newest generation of our trust bundle that the chain was verified against; 0 is none.
    pub(super) verified_in: AtomicU64,
}

/// Why a certificate is no peer's. Always the peer's fault, and a retry does not help.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PeerError {
    #[error("there is no certificate")]
    NoCertificate,
    #[error("the certificate cannot be read")]
    Malformed,
    #[error("the certificate has {0} URI names; expected exactly one, a SPIFFE id")]
    UriNames(usize),
    // No source: where TLS carries it, as an error of rustls, only the text arrives.
    #[error("the URI name is no identity: {0}")]
    NotAnId(InvalidId),
    #[error("the identity belongs to another trust domain")]
    TrustDomain,
    #[error("the certificate may sign others; a leaf must not")]
    MaySign,
    #[error("the certificate's key usages do not allow this use")]
    Purpose,
    #[error("the certificate is not valid yet")]
    NotYetValid,
    #[error("the certificate has expired")]
    Expired,
    #[error("the chain does not lead to a root that is trusted now")]
    Untrusted(#[source] rustls::Error),
    #[error("the certificate or its identity is revoked")]
    Revoked,
    #[error("the peer is '{found}'; expected '{expected}'")]
    Unexpected { found: Box<SpiffeId>, expected: Box<ExpectedPeer> },
}

impl PeerError {
    /// A stable word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no-certificate",
            Self::Malformed => "malformed",
            Self::UriNames(_) => "uri-names",
            Self::NotAnId(_) => "not-an-id",
            Self::TrustDomain => "trust-domain",
            Self::MaySign => "may-sign",
            Self::Purpose => "purpose",
            Self::NotYetValid => "not-yet-valid",
            Self::Expired => "expired",
            Self::Untrusted(_) => "untrusted",
            Self::Revoked => "revoked",
            Self::Unexpected { .. } => "unexpected-peer",
        }
    }
}

/// What a leaf says about itself, its form checked, its signature not.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    pub id: SpiffeId,
    pub serial: Serial,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub for_client: bool,
    pub for_server: bool,
}

impl Leaf {
    /// Checks a leaf as the X509-SVID specification has it (sections 3, 4.2 to 4.4, 5.2): one URI SAN,
    /// no CA, no right to sign certificates or revocation lists, and key usages that name its use.
    pub fn read(der: &[u8]) -> Result<Self, PeerError> {
        let (rest, leaf) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
        if !rest.is_empty() {
            return Err(PeerError::Malformed);
        }
        let constraints = leaf.basic_constraints().map_err(|_| PeerError::Malformed)?;
        if constraints.is_some_and(|constraints| constraints.value.ca) {
            return Err(PeerError::MaySign);
        }
        if let Some(usage) = leaf.key_usage().map_err(|_| PeerError::Malformed)? {
            if usage.value.key_cert_sign() || usage.value.crl_sign() {
                return Err(PeerError::MaySign);
            }
            if !usage.value.digital_signature() {
                return Err(PeerError::Purpose);
            }
        }
        let extended = leaf.extended_key_usage().map_err(|_| PeerError::Malformed)?;
        let extended = extended.ok_or(PeerError::Purpose)?.value;
        let uris = uri_names(&leaf)?;
        let [uri] = uris[..] else { return Err(PeerError::UriNames(uris.len())) };
        Ok(Self {
            id: SpiffeId::parse(uri).map_err(PeerError::NotAnId)?,
            serial: Serial::new(leaf.raw_serial()),
            not_before: time(leaf.validity().not_before.timestamp()),
            not_after: time(leaf.validity().not_after.timestamp()),
            for_client: extended.client_auth,
            for_server: extended.server_auth,
        })
    }

    pub fn check_time(&self, now: SystemTime) -> Result<(), PeerError> {
        if now < self.not_before {
            return Err(PeerError::NotYetValid);
        }
        if now > self.not_after {
            return Err(PeerError::Expired);
        }
        Ok(())
    }
}

/// When a certificate of any kind is valid.
pub(super) fn life(der: &[u8]) -> Result<Life, PeerError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
    let validity = certificate.validity();
    Ok(Life { not_before: time(validity.not_before.timestamp()), not_after: time(validity.not_after.timestamp()) })
}

/// A root of a trust bundle: may sign, and if it names a trust domain, which.
pub(super) fn root_trust_domain(der: &[u8]) -> Result<Option<String>, PeerError> {
    let (_, root) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
    if !root.is_ca() {
        return Err(PeerError::Purpose);
    }
    match uri_names(&root)?[..] {
        [] => Ok(None),
        [uri] => {
            let domain = uri.strip_prefix("spiffe://").ok_or(PeerError::NotAnId(InvalidId::Scheme))?;
            Ok(Some(domain.to_owned()))
        }
        ref several => Err(PeerError::UriNames(several.len())),
    }
}

fn uri_names<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, PeerError> {
    let names = certificate.subject_alternative_name().map_err(|_| PeerError::Malformed)?;
    let names = names.map(|names| names.value.general_names.iter()).into_iter().flatten();
    let uri = |name: &'a GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some(Ok(*uri)),
        GeneralName::Invalid(..) => Some(Err(PeerError::Malformed)),
        _ => None,
    };
    names.filter_map(uri).collect()
}

fn time(seconds: i64) -> SystemTime {
    // A time before 1970 is long gone, whichever it was.
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
