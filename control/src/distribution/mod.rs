//! The streams to all nodes: what each is to serve, and what it says of itself.

use spillway_core::identity::SpiffeId;
use spillway_proto::control;

/// What nodes say, for [`crate::verdicts`].
#[derive(Debug)]
pub enum Report {
    /// A node's stream began.
    Joined(SpiffeId),
    /// It ended.
    Left(SpiffeId),
    Heartbeat(SpiffeId, control::Heartbeat),
    Sightings(SpiffeId, Vec<control::Sighting>),
}
