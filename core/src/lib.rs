//! The decisions of Spillway. Data in, data out: no sockets, files, clock, randomness or threads,
//! so that everything that matters can be tested in a table.
//!
//! In reading order:
//!
//! * [`units`]: durations, sizes and names as operators write them.
//! * [`identity`]: SPIFFE ids, the only thing that says who a peer is.
//! * [`resource`]: what operators write, checked.
//! * [`snapshot`]: all resources as one consistent value.
//! * [`members`]: who is in a pool, as DNS says.
//! * [`inference`]: the Open Inference Protocol in one form, whatever the client spoke.
//! * [`policy`]: who may do what.
//! * [`limit`]: how much they may ask for.
//! * [`deadline`]: how long a request may take.
//! * [`routing`]: which pod gets it.
//! * [`resilience`]: what keeps good traffic right while pods, models and callers misbehave.
//! * [`feature`]: groups, stored values, freshness.
//! * [`cache`]: results that are given again.
//! * [`intent`]: what operators ask for, before it counts.
//! * [`health`]: which regions get traffic.
//! * [`failover`]: where traffic goes while a region cannot take it.
//! * [`rollout`]: how a new version reaches all nodes.
//! * [`line`]: JSON on one line that misleads nobody. [`audit`]: lines that cannot be changed unseen.

pub mod audit;
pub mod cache;
pub mod deadline;
pub mod failover;
pub mod feature;
pub mod health;
pub mod identity;
pub mod inference;
pub mod intent;
pub mod limit;
pub mod line;
pub mod members;
pub mod policy;
pub mod resilience;
pub mod resource;
pub mod rollout;
pub mod routing;
pub mod snapshot;
pub mod units;
