//! A certificate authority in a folder: root, intermediate and leaves.
//!
//! ```text
//! FOLDER/root.pem          what others trust. Its key, root.key, is needed only to make another intermediate
//! FOLDER/intermediate.pem  what signs leaves, with intermediate.key
//! FOLDER/trust-bundle.pem  the root again, for who needs a bundle
//! ```
//!
//! The rule: a leaf names one SPIFFE id, may not sign, and never outlives its issuers. Keys are readable
//! by their owner alone. It does not judge who may have which id: [`spillway_core::authority`] does.
//!
//! * [`Authority`]: the folder, used by `spillway pki`, by tests, and by the control plane.
//! * [`Csr`]: a request for a leaf, read and its signature checked.

mod csr;
mod leaf;
mod signer;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{KeyPair, PublicKeyData};
use spillway_core::authority::rotation::RootId;
use spillway_core::identity::{SpiffeId, TrustDomain};

pub use self::csr::{BadCsr, Csr, PublicKey, names_of};
pub use self::leaf::{Certified, IssuedLeaf, LeafRequest};
use self::signer::{Signer, root_id, signer_params};
use crate::file::write_atomic;

const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// Clocks of a fleet differ; a certificate is valid from a little before it was made.
const BACKDATED: Duration = Duration::from_secs(300);

/// Root and intermediate of one trust domain. The root's key may be elsewhere.
#[derive(Debug)]
pub struct Authority {
    trust_domain: TrustDomain,
    root: String,
    root_key: Option<String>,
    root_id: RootId,
    intermediate: Signer,
    /// When root or intermediate ends.
    not_after: SystemTime,
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
    #[error("{}: the root beside it has not signed it", .0.display())]
    OtherRoot(PathBuf),
    #[error("{}: it is not the key of the certificate beside it", .0.display())]
    OtherKey(PathBuf),
    #[error("'{0}' does not belong to the authority's trust domain")]
    TrustDomain(Box<SpiffeId>),
    #[error("the root's key is not here")]
    NoRootKey,
    #[error("the authority's certificates expire before the leaf would begin")]
    Expired,
    #[error("the certificate cannot be made")]
    Certificate(#[from] rcgen::Error),
}

impl Authority {
    /// Makes a new root (10 years) and intermediate (1 year).
    pub fn create(trust_domain: TrustDomain) -> Result<Self, AuthorityError> {
        let now = SystemTime::now();
        let key = KeyPair::generate()?;
        let params = signer_params(&trust_domain, "root", 1, now, now + 10 * YEAR)?;
        let certificate = params.self_signed(&key)?;
        let root_id = root_id(certificate.der());
        let root = Signer::new(certificate.pem(), key, now + 10 * YEAR)?;
        let intermediate = root.sign_intermediate(&trust_domain, now, now + YEAR)?;
        let not_after = intermediate.not_after();
        let (root, root_key) = (root.certificate().to_owned(), Some(root.key_pem()));
        Ok(Self { trust_domain, root, root_key, root_id, intermediate, not_after })
    }

    /// The same root with a new intermediate (1 year). Needs the root's key.
    pub fn with_new_intermediate(self) -> Result<Self, AuthorityError> {
        let key = self.root_key.as_ref().ok_or(AuthorityError::NoRootKey)?;
        let now = SystemTime::now();
        let root_end = signer::read(&self.root).map_or(now, |facts| facts.not_after);
        let root = Signer::new(self.root.clone(), KeyPair::from_pem(key)?, root_end)?;
        let not_after = root_end.min(now + YEAR);
        let intermediate = root.sign_intermediate(&self.trust_domain, now, not_after)?;
        Ok(Self { intermediate, not_after, ..self })
    }

    /// Reads `root.pem` and `intermediate.{pem,key}`, and `root.key` if it is there.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self, AuthorityError> {
        let folder = folder.as_ref();
        let at = |name: &str| folder.join(name);
        let root = read(&at("root.pem"))?;
        let root_key = match read(&at("root.key")) {
            Err(AuthorityError::File { problem, .. }) if problem.kind() == io::ErrorKind::NotFound => None,
            key => Some(key?),
        };
        let facts = signer::read(&root).ok_or_else(|| AuthorityError::NotAnAuthority(at("root.pem")))?;
        let path = at("intermediate.pem");
        let intermediate = read(&path)?;
        let own = signer::read(&intermediate).ok_or_else(|| AuthorityError::NotAnAuthority(path.clone()))?;
        if own.trust_domain != facts.trust_domain {
            return Err(AuthorityError::NotAnAuthority(path));
        }
        if !signer::has_signed(&root, &intermediate) {
            return Err(AuthorityError::OtherRoot(path));
        }
        let key = KeyPair::from_pem(&read(&at("intermediate.key"))?)?;
        if key.subject_public_key_info() != own.public_key {
            return Err(AuthorityError::OtherKey(at("intermediate.key")));
        }
        let not_after = own.not_after.min(facts.not_after);
        let intermediate = Signer::new(intermediate, key, own.not_after)?;
        let trust_domain = facts.trust_domain;
        Ok(Self { trust_domain, root, root_key, root_id: facts.id, intermediate, not_after })
    }

    /// Writes `root.{pem,key}`, `intermediate.{pem,key}` and `trust-bundle.pem`.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), AuthorityError> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|problem| AuthorityError::File { path: folder.to_owned(), problem })?;
        if let Some(key) = &self.root_key {
            write(&folder.join("root.key"), key, 0o600)?;
        }
        write(&folder.join("root.pem"), &self.root, 0o644)?;
        write(&folder.join("intermediate.key"), &self.intermediate.key_pem(), 0o600)?;
        write(&folder.join("intermediate.pem"), self.intermediate.certificate(), 0o644)?;
        write(&folder.join("trust-bundle.pem"), self.trust_bundle(), 0o644)
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The root, as PEM. Bundles of several roots are such texts one after the other.
    pub fn trust_bundle(&self) -> &str {
        &self.root
    }

    pub fn root_id(&self) -> RootId {
        self.root_id
    }

    /// When it can sign no more.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// A leaf for both ends of a connection, with a key made here. Its life is cut at the intermediate's.
    pub fn issue(&self, request: &LeafRequest) -> Result<IssuedLeaf, AuthorityError> {
        self.issue_again(request, &KeyPair::generate()?.serialize_pem())
    }

    /// The same for a key, PKCS#8 in PEM, that is there already: its holder replaces one file, so that whoever reads
    /// them, in whatever order, finds what belongs together.
    pub fn issue_again(&self, request: &LeafRequest, key: &str) -> Result<IssuedLeaf, AuthorityError> {
        let key = KeyPair::from_pem(key)?;
        let certified = self.certify(request, &key)?;
        Ok(IssuedLeaf { certificate: certified.chain, key: key.serialize_pem() })
    }

    /// The same for a key whose other half is elsewhere.
    pub fn certify(&self, request: &LeafRequest, key: &impl PublicKeyData) -> Result<Certified, AuthorityError> {
        if request.id.trust_domain != self.trust_domain {
            return Err(AuthorityError::TrustDomain(Box::new(request.id.clone())));
        }
        let end = request.not_after.min(self.not_after);
        if end <= request.not_before {
            return Err(AuthorityError::Expired);
        }
        let (mut params, serial) = leaf::params(request)?;
        leaf::set_life(&mut params, request.not_before, end);
        let chain = self.intermediate.sign(&params, key)?;
        Ok(Certified { chain, serial, not_after: end })
    }

    /// For tests of what must be refused: a leaf with anything changed.
    #[cfg(test)]
    pub(crate) fn issue_with(
        &self,
        request: &LeafRequest,
        change: impl FnOnce(&mut rcgen::CertificateParams),
    ) -> Result<IssuedLeaf, AuthorityError> {
        let (mut params, _) = leaf::params(request)?;
        leaf::set_life(&mut params, request.not_before, request.not_after);
        change(&mut params);
        let key = KeyPair::generate()?;
        Ok(IssuedLeaf { certificate: self.intermediate.sign(&params, &key)?, key: key.serialize_pem() })
    }
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    std::fs::read_to_string(path).map_err(|problem| AuthorityError::File { path: path.to_owned(), problem })
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    write_atomic(path, text.as_bytes(), mode).map_err(|problem| AuthorityError::File { path: path.to_owned(), problem })
}

#[cfg(test)]
mod tests;
