//! One module per command.

pub mod audit;
pub mod cache;
pub mod check;
pub mod drill;
pub mod explain;
pub mod features;
pub mod pki;
pub mod process;
pub mod sidecar;
pub mod status;
