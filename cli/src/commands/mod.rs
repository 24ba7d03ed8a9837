//! One module per command.

pub mod apply;
pub mod audit;
pub mod cache;
pub mod check;
pub mod explain;
pub mod features;
pub mod intent;
pub mod overrides;
pub mod pki;
pub mod process;
pub mod sidecar;
pub mod status;
