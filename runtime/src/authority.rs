//! A certificate authority in a folder: root, intermediate and leaves, for development and tests.
//!
//! The rule: a leaf names one SPIFFE id, may not sign, and never outlives its issuers. Keys are readable
//! by their owner alone. It does not judge who may have which id.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls_pki_types::CertificateDer;
use spillway_core::identity::{SpiffeId, TrustDomain};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::file::write_atomic;
use crate::tls::IdentitySettings;

const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// Clocks of a fleet differ; a certificate is valid from a little before it was made.
const BACKDATED: Duration = Duration::from_secs(300);

/// Root and intermediate of one trust domain, with their keys.
#[derive(Debug)]
pub struct Authority {
    trust_domain: TrustDomain,
    root: Signer,
    intermediate: Signer,
}

#[derive(Debug)]
struct Signer {
    certificate: String,
    key: String,
    not_after: SystemTime,
}

/// What a leaf shall say.
#[derive(Clone, Debug)]
pub struct LeafRequest {
    pub id: SpiffeId,
    /// Names that clients dial; they do not identify anyone.
    pub dns_names: Vec<String>,
    /// Addresses that clients dial.
    pub addresses: Vec<IpAddr>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// A leaf, its chain and its key, as PEM.
#[derive(Clone, Debug)]
pub struct IssuedLeaf {
    /// The leaf, then the intermediate.
    pub certificate: String,
    /// PKCS#8.
    pub key: String,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("{}", path.display())]
    File {
        path: PathBuf,
        #[source]
        problem: io::Error,
    },
    #[error("{}: it is no certificate of an authority with one trust domain", .0.display())]
    NotAnAuthority(PathBuf),
    #[error("'{0}' does not belong to the authority's trust domain")]
    TrustDomain(Box<SpiffeId>),
    #[error("the authority's certificates expire before the leaf would begin")]
    Expired,
    #[error("the certificate cannot be made")]
    Certificate(#[from] rcgen::Error),
}

impl LeafRequest {
    /// A leaf that is valid from now for this long.
    pub fn new(id: SpiffeId, life: Duration) -> Self {
        let now = SystemTime::now();
        let (not_before, not_after) = (now - BACKDATED, now + life);
        Self { id, dns_names: Vec::new(), addresses: Vec::new(), not_before, not_after }
    }

    /// Adds what clients dial in development: `localhost`, 127.0.0.1 and ::1.
    pub fn dialled_locally(mut self) -> Self {
        self.dns_names.push("localhost".into());
        self.addresses.extend([IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]);
        self
    }
}

impl Authority {
    /// Makes a new root (10 years) and intermediate (1 year).
    pub fn create(trust_domain: TrustDomain) -> Result<Self, AuthorityError> {
        let now = SystemTime::now();
        let root_key = KeyPair::generate()?;
        let root_params = signer_params(&trust_domain, "root", 1, now, now + 10 * YEAR)?;
        let root = root_params.self_signed(&root_key)?;
        let root = Signer { certificate: root.pem(), key: root_key.serialize_pem(), not_after: now + 10 * YEAR };
        let intermediate = root.sign_intermediate(&trust_domain, now, now + YEAR)?;
        Ok(Self { trust_domain, root, intermediate })
    }

    /// Reads `root.{pem,key}` and `intermediate.{pem,key}`.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self, AuthorityError> {
        let folder = folder.as_ref();
        let (root, trust_domain) = Signer::load(folder, "root")?;
        let (intermediate, named) = Signer::load(folder, "intermediate")?;
        if named != trust_domain {
            return Err(AuthorityError::NotAnAuthority(folder.join("intermediate.pem")));
        }
        Ok(Self { trust_domain, root, intermediate })
    }

    /// Writes `root.{pem,key}`, `intermediate.{pem,key}` and `trust-bundle.pem`.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), AuthorityError> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|problem| AuthorityError::File { path: folder.to_owned(), problem })?;
        for (name, signer) in [("root", &self.root), ("intermediate", &self.intermediate)] {
            write(&folder.join(format!("{name}.key")), &signer.key, 0o600)?;
            write(&folder.join(format!("{name}.pem")), &signer.certificate, 0o644)?;
        }
        write(&folder.join("trust-bundle.pem"), self.trust_bundle(), 0o644)
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The root, as PEM. Bundles of several roots are such texts one after the other.
    pub fn trust_bundle(&self) -> &str {
        &self.root.certificate
    }

    /// A leaf for both ends of a connection. Its life is cut at the intermediate's.
    pub fn issue(&self, request: &LeafRequest) -> Result<IssuedLeaf, AuthorityError> {
        if request.id.trust_domain != self.trust_domain {
            return Err(AuthorityError::TrustDomain(Box::new(request.id.clone())));
        }
        let mut params = leaf_params(request)?;
        let end = request.not_after.min(self.intermediate.not_after).min(self.root.not_after);
        if end <= request.not_before {
            return Err(AuthorityError::Expired);
        }
        set_life(&mut params, request.not_before, end);
        self.sign(params)
    }

    /// Signs any leaf with the intermediate and hands out the chain.
    fn sign(&self, params: CertificateParams) -> Result<IssuedLeaf, AuthorityError> {
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.intermediate.issuer()?)?;
        let certificate = leaf.pem() + &self.intermediate.certificate;
        Ok(IssuedLeaf { certificate, key: key.serialize_pem() })
    }

    /// For tests of what must be refused: a leaf with anything changed.
    #[cfg(test)]
    pub(crate) fn issue_with(
        &self,
        request: &LeafRequest,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<IssuedLeaf, AuthorityError> {
        let mut params = leaf_params(request)?;
        set_life(&mut params, request.not_before, request.not_after);
        change(&mut params);
        self.sign(params)
    }
}

impl IssuedLeaf {
    /// Replaces certificate and key, each as a whole; the key first. In between they do not match, which
    /// a reader notices and looks again.
    pub fn save(&self, certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Result<(), AuthorityError> {
        write(key.as_ref(), &self.key, 0o600)?;
        write(certificate.as_ref(), &self.certificate, 0o644)
    }

    /// Writes a workload's folder: `certificate.pem`, `key.pem` and `trust-bundle.pem`.
    pub fn save_workload(
        &self,
        folder: impl AsRef<Path>,
        trust_bundle: &str,
    ) -> Result<IdentitySettings, AuthorityError> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|problem| AuthorityError::File { path: folder.to_owned(), problem })?;
        let settings = IdentitySettings {
            certificate: folder.join("certificate.pem"),
            key: folder.join("key.pem"),
            trust_bundle: folder.join("trust-bundle.pem"),
        };
        write(&settings.trust_bundle, trust_bundle, 0o644)?;
        self.save(&settings.certificate, &settings.key)?;
        Ok(settings)
    }
}

impl Signer {
    fn load(folder: &Path, name: &str) -> Result<(Self, TrustDomain), AuthorityError> {
        let read = |extension: &str| {
            let path = folder.join(format!("{name}.{extension}"));
            std::fs::read_to_string(&path).map_err(|problem| AuthorityError::File { path, problem })
        };
        let (certificate, key) = (read("pem")?, read("key")?);
        let (trust_domain, not_after) = read_signer(&certificate)
            .ok_or_else(|| AuthorityError::NotAnAuthority(folder.join(format!("{name}.pem"))))?;
        let signer = Self { certificate, key, not_after };
        signer.issuer()?;
        Ok((signer, trust_domain))
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, AuthorityError> {
        Ok(Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?)
    }

    fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        from: SystemTime,
        to: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let params = signer_params(trust_domain, "intermediate", 0, from, to)?;
        let certificate: Certificate = params.signed_by(&key, &self.issuer()?)?;
        Ok(Self { certificate: certificate.pem(), key: key.serialize_pem(), not_after: to })
    }
}

fn signer_params(
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

fn leaf_params(request: &LeafRequest) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    // An empty subject, as SPIFFE allows, would make the SAN critical; some clients then refuse it.
    params.distinguished_name.push(DnType::OrganizationName, "spillway");
    params.subject_alt_names.push(SanType::URI(request.id.to_string().try_into()?));
    for name in &request.dns_names {
        params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    params.subject_alt_names.extend(request.addresses.iter().map(|address| SanType::IpAddress(*address)));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn set_life(params: &mut CertificateParams, from: SystemTime, to: SystemTime) {
    params.not_before = from.into();
    params.not_after = to.into();
}

/// The trust domain and the end of an authority's certificate.
fn read_signer(pem: &str) -> Option<(TrustDomain, SystemTime)> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let [GeneralName::URI(uri)] = names.value.general_names[..] else { return None };
    let trust_domain = TrustDomain::parse(uri.strip_prefix("spiffe://")?).ok()?;
    let end = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    certificate.is_ca().then_some((trust_domain, SystemTime::UNIX_EPOCH + Duration::from_secs(end)))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    write_atomic(path, text.as_bytes(), mode).map_err(|problem| AuthorityError::File { path: path.to_owned(), problem })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn id(text: &str) -> SpiffeId {
        SpiffeId::parse(text).unwrap()
    }

    #[test]
    fn a_saved_authority_issues_after_loading_and_its_keys_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let made = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        made.save(folder.path()).unwrap();
        let loaded = Authority::load(folder.path()).unwrap();
        assert_eq!(loaded.trust_domain().as_str(), "spillway.test");
        assert_eq!(loaded.trust_bundle(), made.trust_bundle());
        let request = LeafRequest::new(id("spiffe://spillway.test/tenant/acme/client/web"), YEAR);
        let leaf = loaded.issue(&request).unwrap();
        assert_eq!(leaf.certificate.matches("BEGIN CERTIFICATE").count(), 2);
        let settings = leaf.save_workload(folder.path().join("web"), loaded.trust_bundle()).unwrap();
        for key in [folder.path().join("root.key"), folder.path().join("intermediate.key"), settings.key] {
            assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn a_leaf_of_another_trust_domain_is_not_issued() {
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        let request = LeafRequest::new(id("spiffe://other.test/tenant/acme/client/web"), YEAR);
        assert!(matches!(authority.issue(&request), Err(AuthorityError::TrustDomain(_))));
    }

    #[test]
    fn a_leaf_never_outlives_its_issuer() {
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        let request = LeafRequest::new(id("spiffe://spillway.test/tenant/acme/client/web"), 5 * YEAR);
        let leaf = authority.issue(&request).unwrap();
        let der = CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap();
        let (_, read) = X509Certificate::from_der(&der).unwrap();
        let end = u64::try_from(read.validity().not_after.timestamp()).unwrap();
        let limit = authority.intermediate.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!(end <= limit);
    }
}
