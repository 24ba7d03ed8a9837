//! The gateway keeps good traffic right while pods, callers and stores misbehave.

mod bad_pods;
mod hit_rate;
mod overload;
mod quota;
mod restarts;
mod results;

use std::time::Duration;

const SOON: Duration = Duration::from_secs(10);
