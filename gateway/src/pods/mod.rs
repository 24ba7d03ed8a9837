//! The pods of this region: where they are, whether they live, a call to one.

pub mod call;
pub mod fleet;
pub mod health;
