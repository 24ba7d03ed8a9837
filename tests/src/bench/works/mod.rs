//! What is measured, one work a file: each runs its peers in turn and adds its section to the results.

pub mod cache;
pub mod constant;
pub mod cores;
pub mod handshake;
pub mod idle;
pub mod open_loop;
pub mod table;
pub mod turns;
pub mod unary;
