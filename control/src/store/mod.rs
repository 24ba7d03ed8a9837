//! What outlives a control node: small values by key, in etcd or in a SQLite file.
//!
//! The rule: a commit is whole or not at all, and carries the fence of its writer. A leader that was paused and does
//! not know that there is another one is refused by the store itself.
//!
//! Keys:
//!
//! ```text
//! intent/current          number of the newest version
//! intent/versions/N       header of version N
//! intent/content/N/P      its content, in parts of at most 1 MiB
//! rollout                 the version that everyone may have
//! overrides/REGION        an operator's order
//! leader                  who won the election; not for others to write
//! authority               which roots are trusted, and which signs
//! tokens/HASH             a one-time token, by its SHA-256
//! plan                    the plan, and what the next leader must know of each region
//! audit/EPOCH-N           a record of the audit trail: the Nth of the leader of that epoch
//! ```

mod etcd;
mod settings;
mod sqlite;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use spillway_core::units::Name;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use self::etcd::Etcd;
pub use self::settings::{EtcdSettings, StoreSettings};
use self::sqlite::Sqlite;

/// The longest that any call takes.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// Keys and values of one commit: etcd takes 1.5 MiB in a request unless told otherwise.
pub const MOST_BYTES: usize = (1 << 20) + (256 << 10);
/// Writes of one commit, and its conditions: etcd takes 128 unless told otherwise.
pub const MOST_WRITES: usize = 100;

/// Where intent, orders and the plan are kept. Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub enum Store {
    Etcd(Etcd),
    Sqlite(Sqlite),
}

impl Store {
    /// Opens what the settings name. A store that does not answer now is no fault of theirs.
    pub async fn open(settings: &StoreSettings) -> Result<Self, OpenError> {
        match settings {
            StoreSettings::Sqlite(path) => Ok(Self::Sqlite(Sqlite::open(path).await?)),
            StoreSettings::Etcd(settings) => Ok(Self::Etcd(Etcd::open(settings)?)),
        }
    }

    pub async fn get(&self, key: &str) -> Result<Option<Value>, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.get(key).await,
            Self::Sqlite(sqlite) => sqlite.get(key).await,
        }
    }

    /// All keys that begin so, in their order.
    pub async fn list(&self, prefix: &str) -> Result<Vec<(String, Value)>, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.list(prefix).await,
            Self::Sqlite(sqlite) => sqlite.list(prefix).await,
        }
    }

    /// The last of the keys that begin so, the very last first. For small values alone: all come in one answer.
    pub async fn last(&self, prefix: &str, most: usize) -> Result<Vec<(String, Value)>, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.last(prefix, most).await,
            Self::Sqlite(sqlite) => sqlite.last(prefix, most).await,
        }
    }

    /// Does all writes if all conditions hold and the fence's election is the newest; the commit's revision.
    pub async fn commit(&self, fence: &Fence, conditions: &[Condition], writes: Vec<Write>) -> Result<u64, StoreError> {
        let bytes = writes.iter().map(Write::size).sum();
        if bytes > MOST_BYTES {
            return Err(StoreError::TooLarge(bytes));
        }
        if writes.len().max(conditions.len()) > MOST_WRITES {
            return Err(StoreError::TooMany(writes.len().max(conditions.len())));
        }
        match self {
            Self::Etcd(etcd) => etcd.commit(fence, conditions, writes).await,
            Self::Sqlite(sqlite) => sqlite.commit(fence, conditions, writes).await,
        }
    }

    /// Tells that something under the prefix may have changed: its number rises. Who is told reads again. It goes on
    /// through losses of the store, and tells once more after each.
    pub fn watch(&self, prefix: &str) -> watch::Receiver<u64> {
        match self {
            Self::Etcd(etcd) => etcd.watch(prefix),
            Self::Sqlite(sqlite) => sqlite.watch(prefix),
        }
    }

    /// Stands for election, and returns when it is won. `address` is where the node's gRPC services are.
    /// Where the store cannot
    /// be reached, trying again after a while is the caller's affair.
    pub async fn campaign(&self, node: &Name, address: &str) -> Result<Leadership, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.campaign(node, address).await,
            Self::Sqlite(sqlite) => sqlite.campaign(node, address).await,
        }
    }

    pub async fn leader(&self) -> Result<Option<Leader>, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.leader().await,
            Self::Sqlite(sqlite) => sqlite.leader().await,
        }
    }
}

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

impl Write {
    pub(crate) fn key(&self) -> &str {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Put(key, value) => key.len() + value.len(),
            Self::Delete(key) => key.len(),
        }
    }
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
    /// How long its lease is believed in now, if it has one.
    until: Option<Arc<Mutex<Instant>>>,
    /// Ends with this value, and who keeps it up gives it back.
    held: oneshot::Sender<()>,
}

impl Leadership {
    /// Also true between the end of the lease's time and the word of it.
    pub fn is_lost(&self) -> bool {
        *self.lost.borrow() || self.until.as_ref().is_some_and(|until| *until.lock() <= Instant::now())
    }

    /// Lets another node lead, and returns when it may: at most [`DEADLINE`] later.
    pub async fn resign(self) {
        let Self { mut lost, held, .. } = self;
        drop(held);
        // An end of the sender is the end that is waited for, too.
        let _ = tokio::time::timeout(DEADLINE, lost.wait_for(|lost| *lost)).await;
    }
}

/// The settings are at fault.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: is no store of a control node", path.display())]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    #[error("the identity for etcd cannot be read")]
    Etcd(#[source] std::io::Error),
    #[error("opening it came to no end")]
    Lost(#[source] tokio::task::JoinError),
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
    #[error("{0} writes and conditions are too many for one commit")]
    TooMany(usize),
    #[error("'{key}' holds something unreadable")]
    Corrupt { key: String },
}
