//! The plan as answers: an authoritative server for the service zone, and the process that runs it.
//!
//! The rule: it goes on without the control plane. Answers come from the last good plan and from what this node's own
//! probes say now, and there is always one.
//!
//! ```text
//! snapshot, plan, own probes ─▶ view ─▶ served ─┐ swapped whole
//! datagram ─▶ limit ─▶ query ─▶ answer ─▶ reply ┘
//! ```
//!
//! In reading order:
//!
//! * [`settings`]: a DNS node's file. [`zone`]: the names that it makes.
//! * [`view`]: what the zone says of regions.
//! * [`query`], [`answer`], [`reply`]: from a message's bytes to those of its answer; no sockets, no clock.
//! * [`server`]: the answers by UDP ([`datagrams`]) and TCP ([`streams`]), within bounds.
//! * [`metrics`], [`shares`]: what operators see.
//! * [`route53`]: the same as records of Route 53.
//! * [`inputs`]: where resources, plan and health come from. [`node`]: load, bind, run.

pub mod answer;
mod datagrams;
pub mod inputs;
pub mod metrics;
pub mod node;
pub mod query;
pub mod reply;
pub mod route53;
pub mod server;
pub mod settings;
pub mod shares;
mod streams;
pub mod view;
pub mod zone;

#[cfg(test)]
mod conformance_tests;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod flood_tests;

pub use node::{DnsNode, StartError, run};
pub use settings::DnsSettings;
