//! The pods of this region: the ways to them, whether they live, a call to one.

pub mod call;
pub mod fleet;
pub mod health;
