//! The small brain: it keeps intent, judges health, pushes both, and answers DNS.
//!
//! The rule: it decides what should be; gateways, sidecars and DNS nodes act on that and on what they see themselves,
//! and go on without it. Every write to the store carries the fence of the election that its writer won.
//!
//! In reading order:
//!
//! * [`store`]: versions, overrides, verdicts and the plan, in etcd or in a SQLite file. [`leading`]: who writes to it.
//! * [`trail`]: the leaders' audit records, in the store.
//! * [`server`]: the gRPC port; who may come in.
//! * [`intent`]: what operators ask for, version by version.
//! * [`distribution`]: the streams to all nodes, and who gets which version when.
//! * [`verdicts`]: from what vantages see to the plan.
//! * [`evidence`]: what followers see, told to the leader, and what it hears, told to them.
//! * [`fleet`]: how these three hear of each other.
//! * [`dns`]: the plan as answers.
//! * [`authority`]: certificates for workloads.
//!
//! [`settings`] are read at start; [`control`] binds and runs it all.

pub mod authority;
pub mod control;
pub mod distribution;
pub mod dns;
pub mod evidence;
pub mod fleet;
pub mod intent;
pub mod leading;
pub mod metrics;
pub mod server;
pub mod settings;
pub mod store;
pub mod trail;
pub mod verdicts;

pub use control::{Control, StartError, run};
pub use settings::ControlSettings;
