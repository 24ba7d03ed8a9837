//! Feature groups.
