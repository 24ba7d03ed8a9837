//! Real processes and real servers, as clients and operators meet them. One binary, so that it is linked once.

mod architecture;
mod bench;
mod dev;
mod failover;
mod faults;
mod features;
mod identity;
mod models;
mod path;
mod policy;
mod regions;
mod snapshot;
mod threats;
mod traffic;
