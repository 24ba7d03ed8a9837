//! Chains whose signatures were verified already.
//!
//! Signatures under the same bytes by the same roots stay what they are, and verifying them is most of what a chain costs. The
//! rule: nothing else is remembered. Revocations and time are looked at each time, and other roots begin with nothing.

use std::time::SystemTime;

use quick_cache::sync::Cache;
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use spillway_core::authority::renewal::Life;

use super::peer::{Leaf, Side, life};

/// Peers whose chains are remembered. One is about 400 bytes; whoever is forgotten is verified anew.
const CHAINS: usize = 4_096;

/// Of one set of roots, for both sides.
#[derive(Debug)]
pub(super) struct VerifiedChains(Cache<Key, Verified>);

/// The SHA-256 of the chain and the side that it was verified for.
pub(super) type Key = [u8; 32];

/// A chain that leads to one of the roots.
#[derive(Clone, Debug)]
pub(super) struct Verified {
    pub leaf: Leaf,
    /// When all of its certificates are valid.
    life: Life,
}

impl Default for VerifiedChains {
    fn default() -> Self {
        Self(Cache::new(CHAINS))
    }
}

impl VerifiedChains {
    pub fn key(end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], side: Side) -> Key {
        let mut hash = Sha256::new();
        hash.update([match side {
            Side::Client => 0,
            Side::Server => 1,
        }]);
        for certificate in std::iter::once(end_entity).chain(intermediates) {
            // The lengths tell where one certificate ends.
            hash.update((certificate.len() as u64).to_be_bytes());
            hash.update(certificate);
        }
        hash.finalize().into()
    }

    pub fn get(&self, key: &Key) -> Option<Verified> {
        self.0.get(key)
    }

    /// Call it when the chain of this leaf was verified. A chain that carries what cannot be read is not remembered.
    pub fn remember(&self, key: Key, leaf: &Leaf, intermediates: &[CertificateDer<'_>]) {
        let mut all = Life { not_before: leaf.not_before, not_after: leaf.not_after };
        for intermediate in intermediates {
            let Ok(life) = life(intermediate) else { return };
            all.not_before = all.not_before.max(life.not_before);
            all.not_after = all.not_after.min(life.not_after);
        }
        self.0.insert(key, Verified { leaf: leaf.clone(), life: all });
    }
}

impl Verified {
    /// Whether verifying the chain anew would come to the same. Outside of this time it may still be valid: a chain may carry
    /// a certificate that it does not need.
    pub fn holds(&self, now: SystemTime) -> bool {
        self.life.not_before <= now && now <= self.life.not_after
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fixture::{CLIENT, Domain, HOUR};
    use rustls::pki_types::pem::PemObject;

    fn chain(domain: &Domain) -> Vec<CertificateDer<'static>> {
        let leaf = domain.issue(CLIENT);
        CertificateDer::pem_slice_iter(leaf.certificate.as_bytes()).map(Result::unwrap).collect()
    }

    #[test]
    fn each_chain_and_each_side_is_another_key() {
        let chain = chain(&Domain::create());
        let (leaf, root) = (&chain[0], &chain[1]);
        let joined: CertificateDer<'static> = [&leaf[..], &root[..]].concat().into();
        let keys = [
            VerifiedChains::key(leaf, &chain[1..], Side::Client),
            VerifiedChains::key(leaf, &chain[1..], Side::Server),
            VerifiedChains::key(leaf, &[], Side::Client),
            VerifiedChains::key(leaf, &[root.clone(), root.clone()], Side::Client),
            VerifiedChains::key(root, &chain[..1], Side::Client),
            VerifiedChains::key(&joined, &[], Side::Client),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key), "{index}");
        }
        assert_eq!(keys[0], VerifiedChains::key(leaf, &chain[1..], Side::Client));
    }

    #[test]
    fn a_chain_holds_while_all_of_it_is_valid() {
        let chain = chain(&Domain::create());
        let leaf = Leaf::read(&chain[0]).unwrap();
        let chains = VerifiedChains::default();
        let key = VerifiedChains::key(&chain[0], &chain[1..], Side::Client);
        assert!(chains.get(&key).is_none());
        chains.remember(key, &leaf, &chain[1..]);
        let verified = chains.get(&key).unwrap();
        assert_eq!(verified.leaf.id, leaf.id);
        assert!(verified.holds(leaf.not_before) && verified.holds(leaf.not_after));
        let instant = Duration::from_nanos(1);
        assert!(!verified.holds(leaf.not_before - instant) && !verified.holds(leaf.not_after + instant));
        // A leaf that outlives its issuer holds no longer than that one.
        let end = life(&chain[1]).unwrap().not_after;
        let long = Leaf { not_after: end + HOUR, ..leaf };
        chains.remember(key, &long, &chain[1..]);
        let verified = chains.get(&key).unwrap();
        assert!(verified.holds(end) && !verified.holds(end + instant));
    }

    #[test]
    fn what_cannot_be_read_is_not_remembered() {
        let chain = chain(&Domain::create());
        let leaf = Leaf::read(&chain[0]).unwrap();
        let rubbish = [CertificateDer::from(vec![0; 8])];
        let chains = VerifiedChains::default();
        let key = VerifiedChains::key(&chain[0], &rubbish, Side::Client);
        chains.remember(key, &leaf, &rubbish);
        assert!(chains.get(&key).is_none());
    }
}
