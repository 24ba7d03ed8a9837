//! Cached results: what a result is filed under, how long it holds, and when it must not be believed.
//!
//! The rule: a stored answer is given only to a request that would get the same one: the same tenant, model
//! version, policy and inputs, from features that have not been overwritten since.
//!
//! * [`key`]: what makes two requests the same, and which feature rows their answer depends on.
//! * [`control`]: what a request wishes (`Cache-Control`).
//! * [`freshness`]: which answers may be stored, for how long, and what an entry is worth at a time.
//! * [`coherence`]: which entries the feature changes heard so far leave standing.
//! * [`store`]: where entries are kept, within bytes and a fair share for each tenant.
//! * [`guard`]: whether looking up pays at all.
//! * [`status`]: what an answer says about it (`Cache-Status`).

pub mod coherence;
pub mod control;
pub mod freshness;
pub mod guard;
pub mod key;
pub mod status;
pub mod store;
