//! Who signs: a certificate of an authority and its key.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use spillway_core::authority::rotation::RootId;
use spillway_core::identity::TrustDomain;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::leaf::set_life;
use super::{AuthorityError, BACKDATED};

pub(super) struct Signer {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
    not_after: SystemTime,
}

impl std::fmt::Debug for Signer {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("issuer", &self.issuer).field("not_after", &self.not_after).finish()
    }
}

/// What a certificate of an authority says.
pub(super) struct Facts {
    pub id: RootId,
    pub trust_domain: TrustDomain,
    pub not_after: SystemTime,
    /// SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
}

impl Signer {
    pub fn new(certificate: String, key: KeyPair, not_after: SystemTime) -> Result<Self, AuthorityError> {
        let issuer = Issuer::from_ca_cert_pem(&certificate, key)?;
        Ok(Self { certificate, issuer, not_after })
    }

    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The certificate and our own behind it, as PEM.
    pub fn sign(&self, params: &CertificateParams, key: &impl PublicKeyData) -> Result<String, AuthorityError> {
        Ok(params.signed_by(key, &self.issuer)?.pem() + &self.certificate)
    }

    pub fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        from: SystemTime,
        to: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let params = signer_params(trust_domain, "intermediate", 0, from, to)?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Self::new(certificate, key, to)
    }
}

pub(super) fn signer_params(
    trust_domain: &TrustDomain,
    name: &str,
    may_sign_further: u8,
    from: SystemTime,
    to: SystemTime,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("{trust_domain} {name}"));
    // The trust domain alone, as the X509-SVID specification wants it for signing certificates.
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(may_sign_further));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    set_life(&mut params, from - BACKDATED, to);
    Ok(params)
}

pub(super) fn root_id(der: &[u8]) -> RootId {
    RootId(Sha256::digest(der).into())
}

/// Reads the first certificate of a PEM text, if it is an authority's.
pub(super) fn read(pem: &str) -> Option<Facts> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let [GeneralName::URI(uri)] = names.value.general_names[..] else { return None };
    let trust_domain = TrustDomain::parse(uri.strip_prefix("spiffe://")?).ok()?;
    let end = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(end);
    let public_key = certificate.public_key().raw.to_vec();
    certificate.is_ca().then(|| Facts { id: root_id(&der), trust_domain, not_after, public_key })
}

/// Whether the one certificate is signed by the other's key.
pub(super) fn has_signed(root: &str, intermediate: &str) -> bool {
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).ok();
    let (Some(root), Some(intermediate)) = (der(root), der(intermediate)) else { return false };
    match (X509Certificate::from_der(&root), X509Certificate::from_der(&intermediate)) {
        (Ok((_, root)), Ok((_, intermediate))) => {
            intermediate.issuer() == root.subject() && intermediate.verify_signature(Some(root.public_key())).is_ok()
        }
        _ => false,
    }
}
