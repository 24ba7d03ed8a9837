//! `make bench`: what a call costs, measured beside others on the same machine in the same run.
//!
//! The rule: nothing is compared that was not answered rightly, every answer is checked, and each
//! figure says on which machine and from which commit it comes. In reading order:
//!
//! * [`compare`]: the small unary call through Spillway's gateway and through Envoy.
//! * [`cache`]: through the gateway with its result cache and without. [`stand`]: where both are measured.
//! * [`proxy`]: how each of them is set up; [`identities`]: whom they trust.
//! * [`load`], [`upstream`], [`message`]: who asks, who answers, and what is said.
//! * [`lookup`]: a sidecar's feature look-ups, tier by tier.
//! * [`process`], [`statistics`], [`machine`], [`results`]: accounting and writing down.

pub mod cache;
pub mod compare;
pub mod identities;
pub mod load;
pub mod lookup;
pub mod machine;
pub mod message;
pub mod process;
pub mod proxy;
pub mod results;
pub mod stand;
pub mod statistics;
pub mod upstream;
