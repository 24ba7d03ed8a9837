//! What operators ask for: every version of all resources, and overrides that end.
//!
//! The rule: a version is checked by the same code as in `spillway check`, is never changed, and numbers only rise. A
//! rollback is a new version with old content.
//!
//! In reading order:
//!
//! * [`service`]: the gRPC service, translated; [`forward`]: to the leader, if this node does not lead.
//! * [`desk`]: what is done with what is asked for. [`overrides`]: the orders that hold.
//! * [`versions`]: all versions, out of the store. [`content`]: how the store holds one.
//! * [`drills`]: the drill that runs, for everybody to know.
//! * [`status`]: how all of it stands, for people.

pub mod content;
pub mod desk;
pub mod drills;
pub mod forward;
pub mod overrides;
pub mod service;
pub mod status;
pub mod versions;

use std::sync::Arc;

use bytes::Bytes;
use spillway_core::snapshot::Snapshot;
use spillway_proto::control;

pub use self::desk::{Desk, IntentError};
pub use self::drills::Drills;
pub use self::overrides::Overrides;
pub use self::service::{IntentService, Operators};
pub use self::status::{Events, StatusSource};
pub use self::versions::Versions;

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
