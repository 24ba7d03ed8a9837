//! The program's commands as an operator runs them.

mod audit;
mod cache;
mod control;
mod drill;
mod explain;
mod starting;
mod status;
mod support;
