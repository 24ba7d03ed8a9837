//! Connections to databases that processes share: Redis, and TLS towards any of them.
//!
//! The rule: a store is never waited for longer than it is given, and what is wrong with it is said
//! once, not at each statement.
//!
//! * [`settings`]: where a store is and how it is reached. [`redis`]: a connection that stays.
//! * [`tls`], [`fault_log`]: for Redis here, for Cassandra in the sidecar.

pub mod fault_log;
pub mod redis;
pub mod settings;
pub mod tls;

pub use fault_log::FaultLog;
pub use redis::{Connected, Redis, RedisFailed};
pub use settings::{InvalidStore, RedisSettings, TlsSettings};
