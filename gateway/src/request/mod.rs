//! One request, read strictly and within bounds.

pub mod body;
pub mod head;
pub mod inflate;
pub mod memory;
pub mod query;
pub mod route;
