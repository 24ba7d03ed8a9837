//! The plan as records of Route 53, for zones that are served there.
//!
//! The rule: what is written is what the DNS nodes would say, as near as weighted records come to it, without what a
//! single node's probes see. The leader alone writes, and only a plan of its own epoch.
//!
//! * [`settings`]: where the records are. [`credentials`]: who may write them.
//! * [`records`]: pure. [`writer`]: reads, compares, corrects. [`keeping`]: what the leader wants to be there.
//!
//! All but the settings is in the feature `route53`: AWS's SDK is 25 crates.

#[cfg(feature = "route53")]
pub mod credentials;
#[cfg(feature = "route53")]
pub mod keeping;
#[cfg(all(test, feature = "route53"))]
mod moto;
#[cfg(feature = "route53")]
pub mod records;
pub mod settings;
#[cfg(all(test, feature = "route53"))]
mod strict;
#[cfg(feature = "route53")]
pub mod writer;

pub use settings::Route53Settings;
