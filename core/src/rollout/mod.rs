//! How a new version reaches the nodes of a fleet, and what each checks before it takes it.
//!
//! In reading order:
//!
//! * [`semantics`]: what a node asks of a version beyond that it compiles.
//! * [`comparison`]: whether those with the new version do worse than the others.
//! * `fleet`: what is known of each node.
//! * `change`: what a change is, and how it ends.
//! * [`stages`]: who gets which version now.
//! * [`status`]: that, for people.

mod change;
pub mod comparison;
mod fleet;
pub mod semantics;
pub mod stages;
pub mod status;

pub use change::{Change, Kind, NotNewer, Pace, Progress, RolloutSettings, Stage, Stop};
pub use comparison::{ComparisonSettings, Sample, Worse};
pub use fleet::Ack;
pub use semantics::{Confirmed, Contents, Held, Offer, PoolContents, Unsafe, check};
pub use stages::Rollout;
pub use status::{Refusal, Status};
