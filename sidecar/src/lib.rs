//! The sidecar: beside each model server, it joins features into requests and calls the model.
//!
//! One request's way, in reading order:
//!
//! * [`server`]: the port; who may come in.
//! * [`service`]: the gRPC service, translated; [`stream`]: many requests on one stream, in order ([`turns`]).
//! * [`inference`]: what happens to a request; [`join`]: features into it; [`features`]: their tiers.
//! * [`model`]: the model's backend, its manifest checked, warmed up.
//! * [`failure`]: what callers see when it fails; [`record`], [`metrics`]: what operators see.
//!
//! [`settings`] are read at start; [`feature_service`] takes features in; [`sidecar`] binds and runs it all.

mod audit;
pub mod failure;
pub mod feature_service;
pub mod features;
pub mod inference;
pub mod join;
pub mod metrics;
pub mod model;
pub mod record;
pub mod server;
pub mod service;
pub mod settings;
pub mod sidecar;
pub mod stream;
pub mod turns;

pub use settings::SidecarSettings;
pub use sidecar::{Sidecar, StartError, run};
