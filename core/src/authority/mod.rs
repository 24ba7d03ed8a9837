//! Certificates: who gets which, when a node asks for the next, and how one root follows another.
//!
//! In reading order:
//!
//! * [`request`]: what a leaf may say, held against what its asker proved.
//! * [`renewal`]: when the next leaf is asked for.
//! * [`rotation`]: which roots are trusted, and under which of them is signed.
//!
//! Keys, signatures and the form of requests are not looked at here.

pub mod renewal;
pub mod request;
pub mod rotation;
