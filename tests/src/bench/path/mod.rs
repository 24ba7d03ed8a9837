//! The whole path, all of it real processes over mTLS: client, gateway, sidecar, model.
//!
//! * [`latency`]: an answer out of the result cache, and one made of cached features by the embedded model, at 70 %
//!   of what the path takes.
//! * [`tensor`]: a tensor of 1 MiB through both hops to a model server, beside two Envoys in a row.

pub mod latency;
pub mod tensor;
