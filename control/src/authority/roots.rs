//! The roots that all control nodes agree on: the rotation and the bundle, in the store under `authority`.
//!
//! The rule: every node gives the same bundle and signs under the same root, whatever lies in its folder. Without a
//! store a node goes on with what it knew last; one that was started without knows only its folder, and says so where
//! that is not enough ([`Roots::of_folder`]).

use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use spillway_core::authority::rotation::{NotNow, Pace, RootId, Rotation};

use super::signers::Signers;

pub(super) const KEY: &str = "authority";

/// What is agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Agreed {
    rotation: Rotation,
    /// PEM of the roots that are trusted.
    roots: BTreeMap<RootId, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Roots {
    agreed: Agreed,
    /// Of the commit that wrote it; `None`: it is this node's own view.
    pub revision: Option<u64>,
}

impl Roots {
    /// What a node without a store believes: its only authority. With several in its folder it cannot know.
    pub fn of_folder(signers: &Signers) -> Option<Self> {
        signers.only().map(|signer| Self::first(signer.root_id(), signer.trust_bundle()))
    }

    /// How it all begins.
    pub fn first(root: RootId, pem: &str) -> Self {
        let roots = BTreeMap::from([(root, pem.to_owned())]);
        Self { agreed: Agreed { rotation: Rotation::settled(root), roots }, revision: None }
    }

    pub fn read(bytes: &[u8], revision: u64) -> Option<Self> {
        let agreed: Agreed = serde_json::from_slice(bytes).ok()?;
        let whole = agreed.rotation.trusted().all(|root| agreed.roots.contains_key(&root));
        whole.then_some(Self { agreed, revision: Some(revision) })
    }

    /// The same where the store has lost it.
    pub fn unwritten(&self) -> Self {
        Self { revision: None, ..self.clone() }
    }

    pub fn encode(&self) -> Bytes {
        serde_json::to_vec(&self.agreed).expect("texts, numbers and times after 1970 are JSON").into()
    }

    pub fn rotation(&self) -> &Rotation {
        &self.agreed.rotation
    }

    /// PEM of all roots that are trusted, the one that signs first.
    pub fn bundle(&self) -> String {
        self.agreed.rotation.trusted().filter_map(|root| self.agreed.roots.get(&root)).map(String::as_str).collect()
    }

    pub fn announce(&self, root: RootId, pem: &str, now: SystemTime) -> Result<Self, NotNow> {
        let mut next = self.with(self.agreed.rotation.announce(root, now)?);
        next.agreed.roots.insert(root, pem.to_owned());
        Ok(next)
    }

    pub fn withdraw(&self) -> Result<Self, NotNow> {
        Ok(self.with(self.agreed.rotation.withdraw()?))
    }

    pub fn advance(&self, now: SystemTime, pace: &Pace) -> Option<Self> {
        Some(self.with(self.agreed.rotation.advance(now, pace)?))
    }

    fn with(&self, rotation: Rotation) -> Self {
        let trusted: Vec<RootId> = rotation.trusted().collect();
        let mut roots = self.agreed.roots.clone();
        roots.retain(|root, _| trusted.contains(root));
        Self { agreed: Agreed { rotation, roots }, revision: self.revision }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_bundle_has_the_root_that_signs_first_and_loses_what_is_not_trusted() {
        let (old, new) = (RootId([1; 32]), RootId([2; 32]));
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(1_000 + seconds);
        let pace = Pace { notice: Duration::from_secs(10), longest_life: Duration::from_secs(100) };
        let first = Roots::first(old, "old\n");
        let announced = first.announce(new, "new\n", at(0)).unwrap();
        assert_eq!((first.bundle().as_str(), announced.bundle().as_str()), ("old\n", "old\nnew\n"));
        assert_eq!(announced.withdraw().unwrap(), first);
        let signing = announced.advance(at(10), &pace).unwrap();
        assert_eq!(signing.bundle(), "new\nold\n");
        let read = Roots::read(&signing.encode(), 7).unwrap();
        assert_eq!((read.bundle(), read.revision), (signing.bundle(), Some(7)));
        let settled = signing.advance(at(120), &pace).unwrap();
        assert_eq!(settled.bundle(), "new\n");
        assert_eq!(Roots::read(b"{}", 1), None);
        let without = String::from_utf8(signing.encode().to_vec()).unwrap().replace("old\\n", "");
        assert!(Roots::read(without.as_bytes(), 1).is_some(), "a PEM text is not looked at");
    }
}
