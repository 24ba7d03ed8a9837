//! Feature groups: how a row is keyed, stored, judged and gathered into a tensor.
//!
//! The rule: bytes from a store become values only if their fingerprint and length are the group's;
//! everything else is [`Missing`], with a reason. A value's age is always its event time, whichever
//! tier it came from, so staleness never adds up.
//!
//! * [`key`]: the one form of a row's key in every tier.
//! * [`layout`]: where each field lies; [`Row`], the stored form.
//! * [`freshness`]: fresh, stale or expired; which of two events wins.
//! * [`assemble`]: rows into a tensor.
//! * [`coherence`]: which fills and which invalidations an in-process tier may believe.
//! * [`hearing`]: when it may be believed itself, and when a change is confirmed.

pub mod assemble;
pub mod coherence;
pub mod freshness;
pub mod hearing;
pub mod key;
pub mod layout;

pub use assemble::{Cell, Gather, Gathered, MissingFields};
pub use coherence::{Channel, Heard, may_fill};
pub use freshness::{Freshness, InvalidEvent, check_event_time};
pub use hearing::{Audience, Ear, Verdict};
pub use key::{InvalidKey, RowKey};
pub(crate) use layout::value_bytes;
pub use layout::{InvalidRow, Layout, Missing, Row, Stored};
