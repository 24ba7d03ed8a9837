//! `make bench`: what a call costs, measured beside others on the same machine in the same run.
//!
//! The rule: nothing is compared that was not answered rightly, every answer is checked, and each
//! figure says on which machine and from which commit it comes. In reading order:
//!
//! * [`works`]: what is measured. [`stand`]: where, and how proxies take turns.
//! * [`peers`]: the proxies and how each is set up; [`identities`]: whom they trust.
//! * [`load`], [`upstream`], [`message`]: who asks, who answers, and what is said.
//! * [`lookup`]: a sidecar's feature look-ups, tier by tier.
//! * [`process`], [`statistics`], [`machine`], [`results`]: accounting and writing down. [`smoke`]: that all of it runs.

pub mod identities;
pub mod load;
pub mod lookup;
pub mod machine;
pub mod message;
pub mod peers;
pub mod process;
pub mod results;
pub mod smoke;
pub mod stand;
pub mod statistics;
pub mod upstream;
pub mod works;
