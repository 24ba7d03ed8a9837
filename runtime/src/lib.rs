//! The hands that all Spillway processes share: what touches the network, the disk and the clock.
//!
//! In reading order:
//!
//! * [`settings`]: a process's own file.
//! * [`tls`]: who we are, who may talk to us, replaced while serving.
//! * [`authority`]: certificates for development and tests.
//! * [`snapshot`]: what to serve, sealed in a file and followed.
//! * [`plan`]: what is decided of all regions. [`link`]: the stream that both are pushed on.
//! * [`oip`]: gRPC messages and core's form. [`forwarding`]: what gateways say of requests that they forward.
//! * [`upstream`]: the way to one sidecar or peer. [`dial`]: the way to one of our gRPC services. [`store`]: the way to Redis.
//! * [`vantage`]: what is seen of other regions from here.
//! * [`feature_changes`]: hearing what others have written, and waiting until all have heard.
//! * [`telemetry`], [`access_log`]: what operators see. [`audit`]: what auditors do.
//! * [`admin`]: the port that they look at.
//! * [`drain`]: the end of a process.
//! * [`file`]: files that change under us. [`generations`]: files of which two are kept.

pub mod access_log;
pub mod admin;
pub mod audit;
pub mod authority;
pub mod dial;
pub mod drain;
pub mod feature_changes;
pub mod file;
pub mod forwarding;
pub mod generations;
pub mod link;
pub mod oip;
pub mod plan;
pub mod settings;
pub mod snapshot;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod upstream;
pub mod vantage;

#[cfg(test)]
mod fixture;
