//! The pods of this region: where they are, what is known of them, a call to one.
//!
//! What calls show is shared by all threads and outlives Snapshots ([`book`]); how a thread gets to the
//! pods is its own and made from one Snapshot ([`fleet`]).
//!
//! ```text
//! Fleet (a thread, a Snapshot) -> Lane (a model) -> PoolLinks -> PodLink
//!                                  | ModelState      | PoolState   | PodState    <- Book (the process)
//! ```
//!
//! In reading order:
//!
//! * [`fleet`]: the pods of one Snapshot and the ways to them.
//! * [`lane`]: which of them gets a request of a model, and whether it may be sent again.
//! * [`lease`]: one call under way, as those see it who judge pods by their calls.
//! * [`call`]: a unary call: attempts until one brings an answer. [`attempt`]: one of them.
//! * [`judge`]: what an attempt's end means.
//! * [`book`], [`pod`], [`breaker`], [`load`]: what is known of pools and models, of a pod, of a model on a pod, of its load.
//! * [`health`]: what goes on without requests. [`view`], [`metrics`]: what operators see.

pub mod attempt;
pub mod book;
pub mod breaker;
pub mod call;
pub mod fleet;
pub mod health;
pub mod judge;
pub mod lane;
pub mod lease;
pub mod load;
pub mod metrics;
pub mod pod;
pub mod view;
