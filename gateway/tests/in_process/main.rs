//! A gateway in this process, with real sockets and TLS. One binary, so that it is linked once.

mod allocations;
mod audit;
mod bounds;
mod control;
mod degrade;
mod explain;
mod inference;
mod lifetime;
mod limits;
mod members;
mod overload;
mod pods;
mod results;
mod routing;
mod spillover;
mod streams;
mod support;
mod threats;
mod writes;

/// Counts, for [`allocations`].
#[global_allocator]
static ALLOCATOR: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;
