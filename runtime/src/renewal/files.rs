//! The files of an identity that is made here.
//!
//! The rule: at every moment, also after a crash, what lies there makes one identity: the old one or the new one.
//! Certificate and key are two files. The new key waits in a third one, beside the key, until its certificate is in
//! place; who starts in between finds it there.
//!
//! ```text
//! key, certificate --make--> + key.next --certificate replaced--> key.next renamed to key
//!                                              a start here takes key.next
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData, SanType};
use rustls::pki_types::pem::PemObject;
use rustls_pki_types::CertificateDer;
use spillway_core::identity::SpiffeId;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::file::{with_path, write_atomic};
use crate::tls::IdentitySettings;

/// A key that no certificate is for yet, in its file.
pub(super) struct NextKey {
    path: PathBuf,
    key: KeyPair,
}

/// Where the key waits whose certificate is asked for.
fn next(key: &Path) -> PathBuf {
    let mut path = key.as_os_str().to_owned();
    path.push(".next");
    path.into()
}

/// Ends what a crash cut. Blocks on the file system.
pub(super) fn recover(identity: &IdentitySettings) -> io::Result<()> {
    let next = next(&identity.key);
    let Some(next_key) = read(&next)? else { return Ok(()) };
    let (Some(certificate), key) = (read(&identity.certificate)?, read(&identity.key)?) else { return Ok(()) };
    if !key.is_some_and(|key| belong(&certificate, &key)) && belong(&certificate, &next_key) {
        fs::rename(&next, &identity.key).map_err(|error| with_path(&next, &error))?;
    }
    Ok(())
}

impl NextKey {
    /// The key that was made for an attempt before, or a new one. Attempts share it, so that an authority which is
    /// asked again with the same token sees the same asker. Blocks on the file system.
    pub fn make(identity: &IdentitySettings) -> io::Result<Self> {
        let path = next(&identity.key);
        if let Some(key) = read(&path)?.and_then(|pem| KeyPair::from_pem(&pem).ok()) {
            return Ok(Self { path, key });
        }
        let key = KeyPair::generate().map_err(io::Error::other)?;
        write(&path, &key.serialize_pem(), 0o600)?;
        Ok(Self { path, key })
    }

    /// A request for a leaf of this id, with all names that it may have.
    pub fn request(&self, id: &SpiffeId) -> Result<Vec<u8>, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        Ok(params.serialize_request(&self.key)?.der().to_vec())
    }

    pub fn pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// Puts certificate, key and bundle in their places. Blocks on the file system.
    pub fn install(&self, identity: &IdentitySettings, chain: &str, trust_bundle: &str) -> io::Result<()> {
        // First: who has the new certificate must trust its root.
        save_bundle(identity, trust_bundle)?;
        if identity.certificate == identity.key {
            write(&identity.key, &(chain.to_owned() + &self.pem()), 0o600)?;
            return fs::remove_file(&self.path).map_err(|error| with_path(&self.path, &error));
        }
        write(&identity.certificate, chain, 0o644)?;
        fs::rename(&self.path, &identity.key).map_err(|error| with_path(&self.path, &error))
    }
}

/// Whether the bundle is another one than that in its file, which it then is. Blocks on the file system.
pub(super) fn save_bundle(identity: &IdentitySettings, trust_bundle: &str) -> io::Result<bool> {
    if read(&identity.trust_bundle)?.as_deref() == Some(trust_bundle) {
        return Ok(false);
    }
    write(&identity.trust_bundle, trust_bundle, 0o644)?;
    Ok(true)
}

/// A text file, if it is there.
pub(super) fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(with_path(path, &error)),
    }
}

fn write(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    write_atomic(path, text.as_bytes(), mode).map_err(|error| with_path(path, &error))
}

/// Whether the key is that of the first certificate.
fn belong(chain: &str, key: &str) -> bool {
    let Ok(leaf) = CertificateDer::from_pem_slice(chain.as_bytes()) else { return false };
    match (X509Certificate::from_der(&leaf), KeyPair::from_pem(key)) {
        (Ok((_, leaf)), Ok(key)) => leaf.public_key().raw == key.subject_public_key_info(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::authority::{Csr, LeafRequest};
    use crate::fixture::{Domain, GATEWAY, HOUR, id};
    use crate::tls::Workload;

    fn certify(domain: &Domain, next: &NextKey) -> String {
        let csr = Csr::read(&next.request(&id(GATEWAY)).unwrap()).unwrap();
        domain.authority.certify(&LeafRequest::new(id(GATEWAY), HOUR), &csr.key).unwrap().chain
    }

    #[test]
    fn a_crash_at_any_step_leaves_an_identity_that_loads() {
        let domain = Domain::create();
        let identity = domain.settings(GATEWAY, None);
        let bundle = domain.authority.trust_bundle();
        let loads = |when: &str| {
            recover(&identity).unwrap();
            Workload::load(&identity).unwrap_or_else(|error| panic!("{when}: {error}")).life()
        };
        let old = fs::read(&identity.key).unwrap();
        let key = NextKey::make(&identity).unwrap();
        assert_eq!(fs::metadata(&key.path).unwrap().permissions().mode() & 0o777, 0o600);
        loads("the key is made");
        let again = NextKey::make(&identity).unwrap();
        assert_eq!(again.pem(), key.pem(), "attempts share a key");
        fs::write(&identity.certificate, certify(&domain, &key)).unwrap();
        loads("only the certificate is in place");
        assert_eq!(fs::read_to_string(&identity.key).unwrap(), key.pem());
        let second = NextKey::make(&identity).unwrap();
        assert_ne!(second.pem(), key.pem(), "each certificate has a key of its own");
        second.install(&identity, &certify(&domain, &second), bundle).unwrap();
        loads("all is in place");
        assert_ne!(fs::read(&identity.key).unwrap(), old);
        assert!(!next(&identity.key).exists());
        // A key that waits for a certificate which never came changes nothing.
        fs::write(next(&identity.key), "rubbish").unwrap();
        loads("rubbish waits");
        assert!(NextKey::make(&identity).is_ok());
    }

    #[test]
    fn certificate_and_key_may_be_one_file() {
        let domain = Domain::create();
        let mut identity = domain.settings(GATEWAY, None);
        identity.key.clone_from(&identity.certificate);
        let key = NextKey::make(&identity).unwrap();
        key.install(&identity, &certify(&domain, &key), domain.authority.trust_bundle()).unwrap();
        assert_eq!(fs::metadata(&identity.key).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Workload::load(&identity).is_ok() && !next(&identity.key).exists());
    }
}
