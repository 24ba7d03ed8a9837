//! The controller of a drill: it asks an injector to break things, and watches as clients do.
//!
//! The rule: it decides nothing; [`spillway_core::drill`] does. Every call has a deadline, and when this process dies
//! in mid-fault, the injector takes the fault away by itself.
//!
//! In reading order:
//!
//! * [`place`]: whom a drill is about: addresses and identities.
//! * [`run`]: one run, from the preflight to its report. [`keep`]: what stays of it.
//! * [`control`]: what the control plane says. [`notice`]: what it is told. [`injector`]: the way to who breaks things.
//! * [`resolver`], [`client`]: synthetic clients, each in a subnet of its own.
//! * [`heartbeat`]: what a loss of the region would lose.
//! * [`channel`]: mTLS to gRPC services.

pub mod channel;
pub mod client;
pub mod control;
pub mod heartbeat;
pub mod injector;
pub mod keep;
pub mod notice;
pub mod place;
pub mod resolver;
pub mod run;

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod run_tests;
#[cfg(test)]
pub mod support;
