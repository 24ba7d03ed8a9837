//! Leaves: what they say, and their files.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType, SerialNumber};
use spillway_core::authority::request::Approved;
use spillway_core::identity::{Serial, SpiffeId};

use super::{AuthorityError, BACKDATED, write};
use crate::tls::IdentitySettings;

/// A leaf that lives for less than an hour begins this part of its life early, not five minutes.
const BACKDATED_PART: u32 = 12;

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

impl LeafRequest {
    /// A leaf that is valid from now for this long.
    pub fn new(id: SpiffeId, life: Duration) -> Self {
        let now = SystemTime::now();
        let (not_before, not_after) = (now - BACKDATED.min(life / BACKDATED_PART), now + life);
        Self { id, dns_names: Vec::new(), addresses: Vec::new(), not_before, not_after }
    }

    /// Adds what clients dial in development: `localhost`, 127.0.0.1 and ::1.
    pub fn dialled_locally(mut self) -> Self {
        self.dns_names.push("localhost".into());
        self.addresses.extend([IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]);
        self
    }
}

impl From<Approved> for LeafRequest {
    fn from(approved: Approved) -> Self {
        let Approved { id, names, life } = approved;
        let dns_names = names.dns.iter().map(ToString::to_string).collect();
        Self { dns_names, addresses: names.addresses.into_iter().collect(), ..Self::new(id, life) }
    }
}

/// A leaf, its chain and its key, as PEM.
#[derive(Clone, Debug)]
pub struct IssuedLeaf {
    /// The leaf, then the intermediate.
    pub certificate: String,
    /// PKCS#8.
    pub key: String,
}

/// A leaf whose key is elsewhere.
#[derive(Clone, Debug)]
pub struct Certified {
    /// PEM: the leaf, then the intermediate.
    pub chain: String,
    pub serial: Serial,
    pub not_after: SystemTime,
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

/// All but the time, and the leaf's serial number.
pub(super) fn params(request: &LeafRequest) -> Result<(CertificateParams, Serial), AuthorityError> {
    let serial = serial();
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
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
    Ok((params, Serial::new(&serial)))
}

/// 126 random bits in 16 bytes: positive, and without a zero in front.
fn serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x3f | 0x40;
    serial
}

pub(super) fn set_life(params: &mut CertificateParams, from: SystemTime, to: SystemTime) {
    params.not_before = from.into();
    params.not_after = to.into();
}
