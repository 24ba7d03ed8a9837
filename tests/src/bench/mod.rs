//! `make bench`: what a call costs, measured beside others on the same machine in the same run.
//!
//! The rule: nothing is compared that was not answered rightly, every answer is checked, and each
//! figure says on which machine and from which commit it comes. In reading order:
//!
//! * [`works`]: what is measured. [`stand`]: where, and how proxies take turns.
//! * [`peers`]: the proxies and how each is set up; [`identities`]: whom they trust.
//! * [`load`], [`upstream`], [`message`]: who asks, who answers, and what is said.
//! * [`sidecar`], [`path`]: a sidecar by itself, and the whole path. [`growth`]: what grows with the world.
//! * [`process`], [`statistics`], [`machine`], [`results`]: accounting and writing down. [`smoke`]: that all of it runs.

pub mod growth;
pub mod identities;
pub mod load;
pub mod machine;
pub mod message;
pub mod path;
pub mod peers;
pub mod process;
pub mod results;
pub mod sidecar;
pub mod smoke;
pub mod stand;
pub mod statistics;
pub mod upstream;
pub mod works;
