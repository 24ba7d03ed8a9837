//! What keeps the good traffic right while pods misbehave.
//!
//! * [`outcome`]: how a call ended, as all of these see it.
//! * [`outlier`]: pods that are out of the pool, or come last, because of how their calls end.
//! * [`breaker`]: one pod and model that is left alone for a while.
//! * [`concurrency`]: how many calls a pod takes at a time.

pub mod breaker;
pub mod concurrency;
pub mod outcome;
pub mod outlier;

pub use breaker::{Breaker, BreakerSettings};
pub use concurrency::{ConcurrencyLimit, ConcurrencySettings};
pub use outcome::Outcome;
pub use outlier::{OutlierSettings, Outliers, Standing};
