//! Cached results of the gateway.

pub mod store;
