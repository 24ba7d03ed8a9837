//! Requests for leaves (PKCS#10, RFC 2986): read, and the asker's key proved.
//!
//! The rule: what is read here is only what was asked for. A request that does not prove that its asker has the key,
//! or whose key is of a kind that nobody here uses, is none.

use std::net::IpAddr;

use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PublicKeyData, SignatureAlgorithm,
    SubjectPublicKeyInfo,
};
use sha2::{Digest, Sha256};
use spillway_core::authority::request::{Asked, Names};
use spillway_core::units::DnsName;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{ExtendedKeyUsage, KeyUsage, ParsedExtension};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// A request with a P-384 key and 64 names takes a third of it.
const MOST_BYTES: usize = 16 << 10;

/// A request whose asker has the key.
#[derive(Debug)]
pub struct Csr {
    pub key: PublicKey,
    pub asked: Asked,
}

/// A key on P-256, P-384 or Ed25519.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(SubjectPublicKeyInfo);

/// Why a request is none. The asker's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCsr {
    #[error("the request is no PKCS#10 in DER")]
    Malformed,
    #[error("the key is not on P-256, P-384 or Ed25519")]
    Key,
    #[error("the request is not signed with the key that it is for")]
    Signature,
}

impl BadCsr {
    /// A stable word for a metric's label and the audit log.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Key => "key",
            Self::Signature => "signature",
        }
    }
}

impl PublicKey {
    fn read(der: &[u8]) -> Option<Self> {
        let key = SubjectPublicKeyInfo::from_der(der).ok()?;
        let known = [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519];
        known.contains(&PublicKeyData::algorithm(&key)).then_some(Self(key))
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(self.0.subject_public_key_info()).into()
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl Csr {
    /// Reads a request. It says nothing of the life that is asked for.
    pub fn read(der: &[u8]) -> Result<Self, BadCsr> {
        if der.len() > MOST_BYTES {
            return Err(BadCsr::Malformed);
        }
        let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| BadCsr::Malformed)?;
        if !rest.is_empty() {
            return Err(BadCsr::Malformed);
        }
        let info = &csr.certification_request_info;
        // The kind of the key comes before its signature: verifying a huge RSA key's would be work.
        let key = PublicKey::read(info.subject_pki.raw).ok_or(BadCsr::Key)?;
        csr.verify_signature().map_err(|_| BadCsr::Signature)?;
        let mut asked = Asked::default();
        for attribute in info.iter_attributes() {
            match attribute.parsed_attribute() {
                ParsedCriAttribute::ExtensionRequest(request) => {
                    for extension in &request.extensions {
                        ask(&mut asked, extension.parsed_extension());
                    }
                }
                // A password between the asker and an authority that wants one.
                ParsedCriAttribute::ChallengePassword(_) => {}
                // There are other ways to ask for extensions, such as Microsoft's.
                ParsedCriAttribute::UnsupportedAttribute => asked.other_extension = true,
            }
        }
        Ok(Self { key, asked })
    }
}

/// The names that a leaf carries beside its identity; `None` if there are any that could not be granted again.
pub fn names_of(leaf: &[u8]) -> Option<Names> {
    let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
    let mut asked = Asked::default();
    if let Some(names) = leaf.subject_alternative_name().ok()? {
        ask_for_names(&mut asked, &names.value.general_names);
    }
    (!asked.other_names).then(|| asked.names.unwrap_or_default())
}

fn ask(asked: &mut Asked, extension: &ParsedExtension<'_>) {
    match extension {
        ParsedExtension::SubjectAlternativeName(names) => ask_for_names(asked, &names.general_names),
        ParsedExtension::BasicConstraints(constraints) => asked.may_sign |= constraints.ca,
        ParsedExtension::KeyUsage(usage) => {
            asked.may_sign |= usage.key_cert_sign() || usage.crl_sign();
            asked.other_use |= is_other_usage(usage);
        }
        ParsedExtension::ExtendedKeyUsage(usage) => asked.other_use |= is_other_purpose(usage),
        _ => asked.other_extension = true,
    }
}

fn ask_for_names(asked: &mut Asked, names: &[GeneralName<'_>]) {
    for name in names {
        let granted = asked.names.get_or_insert_default();
        match name {
            GeneralName::URI(uri) => asked.uris.push((*uri).to_owned()),
            GeneralName::DNSName(name) => match DnsName::host(name) {
                Ok(name) => _ = granted.dns.insert(name),
                Err(_) => asked.other_names = true,
            },
            GeneralName::IPAddress(bytes) => match address(bytes) {
                Some(address) => _ = granted.addresses.insert(address),
                None => asked.other_names = true,
            },
            _ => asked.other_names = true,
        }
    }
    asked.names.take_if(|names| names.is_empty());
    asked.other_names |= asked.names.as_ref().is_some_and(|names| names.len() > Names::MOST);
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Anything but what keys of workloads are used for; signing others has a reason of its own.
fn is_other_usage(usage: &KeyUsage) -> bool {
    let others = [usage.non_repudiation(), usage.data_encipherment(), usage.encipher_only(), usage.decipher_only()];
    others.contains(&true)
}

fn is_other_purpose(usage: &ExtendedKeyUsage<'_>) -> bool {
    let others = [
        usage.any,
        usage.code_signing,
        usage.email_protection,
        usage.time_stamping,
        usage.ocsp_signing,
        !usage.other.is_empty(),
    ];
    others.contains(&true)
}

#[cfg(test)]
#[path = "csr_tests.rs"]
mod tests;
