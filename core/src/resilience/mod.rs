//! What keeps the good traffic right while others fail.

pub mod budget;
pub mod bulkhead;
pub mod degrade;
pub mod hedge;
pub mod latency;
pub mod shed;

pub use budget::{Budget, BudgetSettings, Failed, Failure, NoRetry, RetrySettings};
pub use bulkhead::{Answer, Bulkhead, BulkheadSettings, Entry, Refusal, Ticket, Turn};
pub use degrade::{DegradeSettings, Ladder, Level, Reason, Sample, Serve, Step};
pub use hedge::{HedgeSettings, NoHedge};
pub use latency::{Latencies, Recent};
pub use shed::{ShedSettings, Shedder};
