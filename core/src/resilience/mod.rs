//! What keeps the good traffic right while pods, models and callers misbehave.
//!
//! Of one pod:
//!
//! * [`outcome`]: how a call ended, as all of these see it.
//! * [`outlier`]: pods that are out of the pool, or come last, because of how their calls end.
//! * [`breaker`]: one pod and model that is left alone for a while.
//! * [`concurrency`]: how many calls a pod takes at a time.
//!
//! Of one request:
//!
//! * [`bulkhead`]: who may be served now, who waits, who is refused.
//! * [`shed`]: which classes are refused while there is too much of everything.
//! * [`share`]: whose of a class.
//! * [`latency`]: how long calls took lately.
//! * [`budget`], [`hedge`]: whether it is sent once more.
//! * [`degrade`]: what is given instead of the right answer.

pub mod breaker;
pub mod budget;
pub mod bulkhead;
pub mod concurrency;
pub mod degrade;
pub mod hedge;
pub mod latency;
pub mod outcome;
pub mod outlier;
pub mod share;
pub mod shed;

pub use breaker::{Breaker, BreakerSettings};
pub use budget::{Budget, BudgetSettings, Failed, Failure, NoRetry, RetrySettings};
pub use bulkhead::{Answer, Bulkhead, BulkheadSettings, Entry, Refusal, Ticket, Turn};
pub use concurrency::{ConcurrencyLimit, ConcurrencySettings};
pub use degrade::{DegradeSettings, Ladder, Level, Reason, Sample, Serve, Step};
pub use hedge::{HedgeSettings, NoHedge};
pub use latency::{Latencies, Recent};
pub use outcome::Outcome;
pub use outlier::{OutlierSettings, Outliers, Standing};
pub use share::Shares;
pub use shed::{ShedSettings, Shedder};
