//! Which pod gets a request.
//!
//! In reading order:
//!
//! * [`choose()`]: the one decision that a gateway calls, by the model's [`Policy`].
//! * [`Ring`]: which pods a key prefers, and in which order.
//! * `bounded`: the ring's order with a bound on each pod's load.
//! * [`HotEntities`]: which keys are too much for one pod.
//! * `weighted`: whose turn it is, in proportion to weights.
//! * [`slow_start()`]: how much of its weight a new pod has.

mod bounded;
mod choose;
mod heavy;
mod ring;
mod slow_start;
mod weighted;

pub use bounded::{Fresh, Totals};
pub use choose::{Call, Candidate, Choice, MAX_SPREAD, Policy, Reason, Report, Reported, RoutingSettings, choose};
pub use heavy::{HotEntities, HotSettings};
pub use ring::{Ring, address_hash, key_hash};
pub use slow_start::slow_start;

/// A weight as it counts: what is not a positive, finite number is no weight at all.
fn weight_of(weight: f64) -> f64 {
    if weight.is_finite() && weight > 0.0 { weight } else { 0.0 }
}

/// A share as it counts: within 0..=1; what is not a number is 0.
fn share_of(share: f64) -> f64 {
    if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) }
}
