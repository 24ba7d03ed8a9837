//! What operators ask for: every version of all resources, and overrides that end.
//!
//! The rule: a version is checked by the same code as in `spillway check`, is never changed, and numbers only rise. A
//! rollback is a new version with old content.

use std::sync::Arc;

use bytes::Bytes;
use spillway_core::snapshot::Snapshot;
use spillway_proto::control;

/// Why there is a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Applied,
    RolledBack { to: u64 },
}

/// One version of all resources.
#[derive(Debug)]
pub struct Version {
    pub number: u64,
    pub origin: Origin,
    /// An encoded `control::Snapshot`, and its SHA-256.
    pub encoded: Bytes,
    pub sha256: [u8; 32],
    /// Sorted by kind and name, as in the Snapshot.
    pub resources: Vec<control::Resource>,
    pub snapshot: Arc<Snapshot>,
    /// Pools and Regions that the operator let be without pods.
    pub confirmed_empty: Vec<control::ResourceName>,
}
