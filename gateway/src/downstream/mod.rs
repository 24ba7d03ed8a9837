//! Towards the client: own accept loop and TLS under Pingora's HTTP.

pub mod connection;
pub mod framing;
mod h2_connection;
mod h2_frames;
pub mod listener;
