//! What operators ask for, before it counts.
//!
//! In reading order:
//!
//! * [`sources`]: files as one set of resources, or every fault in them.
//! * [`changes`]: what one set makes of another.
//! * [`orders`]: which overrides of regions are taken.

pub mod changes;
pub mod orders;
pub mod sources;

pub use changes::{Change, changes};
pub use orders::{Act, Order, Unfit};
pub use sources::{PlacedFault, Source, compile};
