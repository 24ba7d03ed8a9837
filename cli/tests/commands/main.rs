//! The program's commands as an operator runs them.

mod audit;
mod cache;
mod control;
mod explain;
mod starting;
mod status;
mod support;
