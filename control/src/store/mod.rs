//! What outlives a control node: small values by key, in etcd or in a SQLite file.
//!
//! The rule: a commit is whole or not at all, and carries the fence of its writer. A leader that was paused and does
//! not know that there is another one is refused by the store itself.
//!
//! Keys:
//!
//! ```text
//! intent/current          number of the newest version
//! intent/versions/N       header of version N; its content in parts, intent/versions/N/P, of at most 1 MiB
//! rollout                 the version that everyone may have
//! overrides/REGION        an operator's order
//! plan                    the plan, and what the next leader must know of each region
//! ```

use std::sync::Arc;

use bytes::Bytes;
use spillway_core::units::Name;
use tokio::sync::watch;

/// A value and the revision of the commit that wrote it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub bytes: Bytes,
    pub revision: u64,
}

/// What must hold for a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    Absent(String),
    /// The key was last written by the commit of this revision.
    At(String, u64),
}

/// A part of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    Put(String, Bytes),
    Delete(String),
}

/// Proof of an election that was won. Later elections have higher epochs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    pub epoch: u64,
    /// The key whose presence proves that the election still holds.
    pub(crate) key: Arc<str>,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    pub node: Name,
    /// Where its gRPC services are.
    pub address: String,
    pub epoch: u64,
}

/// This node leads, until `lost` says true. Dropped, it resigns.
#[derive(Debug)]
pub struct Leadership {
    pub fence: Fence,
    pub lost: watch::Receiver<bool>,
}

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It does not answer. Whether a commit was done is not known; all commits may be tried again with the same
    /// conditions.
    #[error("the store cannot be reached")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another node leads.
    #[error("the election of epoch {0} is over")]
    Fenced(u64),
    /// A condition does not hold.
    #[error("'{0}' was changed by somebody else")]
    Conflict(String),
    #[error("{0} bytes are too many for one commit")]
    TooLarge(usize),
    #[error("'{key}' holds something unreadable")]
    Corrupt { key: String },
}
