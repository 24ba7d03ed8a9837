//! What operators see: metrics, logs and traces.
//!
//! The rule: telemetry never blocks a request and never grows without bound; what is lost is counted.

mod chain;
mod logging;
mod metrics;
mod process;
mod traces;

pub use chain::Chain;
pub use logging::init_logging;
pub use metrics::{CONTENT_TYPE as METRICS_CONTENT_TYPE, Metrics};
pub use prometheus_client;
pub use traces::{OtlpSettings, Span, Status, TraceParent, Traces, TracesError};
