//! L3: what the durable tier must do, whichever it is.

use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use spillway_core::feature::{RowKey, Stored};
use spillway_core::resource::Consistency;

/// What a tier holds under one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Found(Bytes),
    Absent,
    /// It could not be asked, or did not answer in time.
    Failed,
}

/// A row to be read.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub key: RowKey,
    pub consistency: Consistency,
}

/// An event to be kept, unless a later one is there.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub key: RowKey,
    pub stored: Stored,
    pub consistency: Consistency,
    pub schema_version: u16,
    /// Unix microseconds; not kept beyond.
    pub expires_us: i64,
}

/// The durable tier. One round for all rows of a call; the last event wins; both calls may be repeated.
#[async_trait]
pub(super) trait Store: Send + Sync {
    /// The most that a read should take.
    fn timeout(&self) -> std::time::Duration;

    /// Comes back when the first attempt to reach it has ended, either way.
    async fn attempted(&self) {}

    /// Whether there is somebody to ask.
    fn is_reached(&self) -> bool {
        true
    }

    /// One answer for each row, in order, before `deadline`.
    async fn read(&self, rows: &[Wanted], deadline: Instant) -> Vec<Answer>;

    /// For each change, in order: `Found` or `Absent` is what the store holds after it, `None` that it
    /// holds the last event but could not be asked which. An error means that the change may be lost.
    async fn write(&self, changes: &[Change]) -> Vec<Result<Option<Answer>, WriteFailed>>;
}

/// The store did not take a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteFailed {
    /// It was away, too slow or too busy: the same change may be sent again.
    Unreached,
    /// It looked at the statement and said no, as it will again until an operator changes something.
    Refused,
}
