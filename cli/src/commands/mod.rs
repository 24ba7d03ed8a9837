//! One module per command.

pub mod apply;
pub mod audit;
pub mod cache;
pub mod check;
pub mod drill;
pub mod explain;
pub mod features;
pub mod intent;
pub mod overrides;
pub mod pki;
pub mod process;
pub mod sidecar;
pub mod status;
pub mod token;

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    Text,
    Json,
}
