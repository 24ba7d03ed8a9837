//! Who can sign here: the authorities in the folder, by their roots.
//!
//! ```text
//! FOLDER/root.pem, intermediate.pem, intermediate.key         one
//! FOLDER/2027/root.pem, intermediate.pem, intermediate.key    another, for the next root
//! ```
//!
//! The rule: one that cannot be read is left out and told; the others go on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use spillway_core::authority::rotation::RootId;
use spillway_core::identity::TrustDomain;
use spillway_runtime::authority::{Authority as Signer, AuthorityError};
use spillway_runtime::telemetry::Chain;

/// Folders within the folder that are looked at.
const MOST: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Signers {
    by_root: BTreeMap<RootId, Arc<Signer>>,
    /// Of the folder itself, or the only one.
    first: Option<RootId>,
    /// What is wrong with the others, for the log.
    pub faults: Vec<String>,
}

impl Signers {
    /// Reads the folder. Blocks on the file system.
    pub fn read(folder: &Path, trust_domain: &TrustDomain) -> Self {
        let mut signers = Self::default();
        let inner = std::fs::read_dir(folder).map(|entries| {
            let folders = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
            let mut folders: Vec<PathBuf> = folders.filter(|path| holds_one(path)).collect();
            folders.sort();
            folders
        });
        let inner = inner.unwrap_or_else(|problem| {
            signers.faults.push(format!("{}: {problem}", folder.display()));
            Vec::new()
        });
        if inner.len() > MOST {
            signers.faults.push(format!("{}: only {MOST} of its folders are looked at", folder.display()));
        }
        let own = Some(folder.to_owned()).filter(|folder| holds_one(folder));
        for path in own.into_iter().chain(inner.into_iter().take(MOST)) {
            match load(&path, trust_domain) {
                // Two intermediates of one root: the one that lasts longer.
                Ok(signer) => {
                    let root = signer.root_id();
                    signers.first.get_or_insert(root);
                    let known = signers.by_root.get(&root);
                    if known.is_none_or(|known| known.not_after() < signer.not_after()) {
                        signers.by_root.insert(root, Arc::new(signer));
                    }
                }
                Err(error) => signers.faults.push(Chain(&error).to_string()),
            }
        }
        signers
    }

    /// With what could be read before: while files are replaced, they do not fit for a moment.
    pub fn or_before(mut self, before: &Self) -> Self {
        if !self.faults.is_empty() {
            for (root, signer) in &before.by_root {
                self.by_root.entry(*root).or_insert_with(|| signer.clone());
            }
            self.first = before.first.or(self.first);
        }
        self
    }

    pub fn get(&self, root: RootId) -> Option<&Arc<Signer>> {
        self.by_root.get(&root)
    }

    pub fn first(&self) -> Option<&Arc<Signer>> {
        self.first.and_then(|root| self.get(root))
    }

    /// The one that there is, if there is one alone.
    pub fn only(&self) -> Option<&Arc<Signer>> {
        self.first().filter(|_| self.by_root.len() == 1)
    }

    pub fn roots(&self) -> impl Iterator<Item = RootId> {
        self.by_root.keys().copied()
    }

    /// The one whose id begins so, or, without digits, the only one but `signs`.
    pub fn find(&self, digits: &str, signs: RootId) -> Option<&Arc<Signer>> {
        let fits = |root: &RootId| {
            if digits.is_empty() { *root != signs } else { root.to_string().starts_with(&digits.to_ascii_lowercase()) }
        };
        let mut found = self.by_root.iter().filter(|(root, _)| fits(root)).map(|(_, signer)| signer);
        found.next().filter(|_| found.next().is_none())
    }
}

fn holds_one(folder: &Path) -> bool {
    folder.join("intermediate.pem").is_file()
}

fn load(folder: &Path, trust_domain: &TrustDomain) -> Result<Signer, AuthorityError> {
    let signer = Signer::load(folder)?;
    if signer.trust_domain() != trust_domain {
        return Err(AuthorityError::NotAnAuthority(folder.join("root.pem")));
    }
    Ok(signer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_root_has_a_signer_and_what_cannot_be_read_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, other) = (TrustDomain::parse("spillway.test").unwrap(), TrustDomain::parse("other.test").unwrap());
        let make = |domain: &TrustDomain, path: &str| {
            let signer = Signer::create(domain.clone()).unwrap();
            signer.save(folder.path().join(path)).unwrap();
            signer.root_id()
        };
        assert!(Signers::read(&folder.path().join("none"), &ours).only().is_none());
        let first = make(&ours, "");
        let signers = Signers::read(folder.path(), &ours);
        assert_eq!((signers.only().unwrap().root_id(), signers.faults.len()), (first, 0));
        assert!(signers.find("", first).is_none());
        let next = make(&ours, "next");
        make(&other, "foreign");
        std::fs::create_dir(folder.path().join("broken")).unwrap();
        std::fs::write(folder.path().join("broken/intermediate.pem"), "").unwrap();
        let signers = Signers::read(folder.path(), &ours);
        assert!(signers.only().is_none());
        assert_eq!(signers.first().unwrap().root_id(), first);
        assert_eq!((signers.roots().count(), signers.faults.len()), (2, 2), "{:?}", signers.faults);
        assert_eq!(signers.find("", first).unwrap().root_id(), next);
        assert_eq!(signers.find(&next.to_string()[..12], first).unwrap().root_id(), next);
        assert!(signers.find("zz", first).is_none());
        // Its key is replaced, its certificate is not yet.
        std::fs::write(folder.path().join("next/intermediate.key"), "").unwrap();
        let during = Signers::read(folder.path(), &ours);
        assert_eq!((during.roots().count(), during.or_before(&signers).roots().count()), (1, 2));
    }
}
