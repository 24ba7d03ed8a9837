//! Who we are and who may talk to us: TLS 1.3 with certificates on both sides, replaced while serving.
//!
//! The rule: a peer is the one SPIFFE id in its verified certificate and nothing else; DNS names say
//! nothing here. Certificate, key and trust bundle are one value behind one swap. A client of a server of ours may come
//! back with a ticket instead of a signature, within an hour and while that value stays; its chain is judged all the same.
//! There is no early data.

mod accept;
mod arrivals;
mod chains;
mod newcomer;
mod peer;
mod provider;
mod tickets;
mod trust;
mod workload;

pub use accept::{AcceptError, Accepted, Offer, Protocol, accept};
pub use arrivals::{Arrival, Arrivals, Handshakes, Unknown};
pub use newcomer::Newcomer;
pub use peer::{Peer, PeerError, Side};
pub use provider::{install_provider, provider};
pub use trust::Trust;
pub use workload::{IdentityError, IdentitySettings, Workload, examine};

#[cfg(test)]
mod tests;
