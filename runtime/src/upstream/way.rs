//! How a server is reached: over mTLS, or in the clear where no network lies between.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use http::uri::{Authority, Scheme};
use spillway_core::identity::ExpectedPeer;

use crate::tls::Workload;

/// A server of our own pod or host, which is reached without TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beside {
    /// `HOST:PORT`
    Tcp(Authority),
    Unix(PathBuf),
}

#[derive(Debug)]
pub(super) enum Way {
    Mutual { workload: Arc<Workload>, address: SocketAddr, expected: ExpectedPeer },
    Beside(Beside),
}

impl Way {
    pub(super) fn scheme(&self) -> Scheme {
        match self {
            Self::Mutual { .. } => Scheme::HTTPS,
            Self::Beside(_) => Scheme::HTTP,
        }
    }

    pub(super) fn authority(&self) -> Authority {
        match self {
            Self::Mutual { address, .. } => {
                address.to_string().try_into().expect("an address and port are an authority")
            }
            Self::Beside(Beside::Tcp(authority)) => authority.clone(),
            // What gRPC says of a unix socket.
            Self::Beside(Beside::Unix(_)) => Authority::from_static("localhost"),
        }
    }

    /// Of our own certificate; a connection of another one is not used for new calls.
    pub(super) fn generation(&self) -> u64 {
        match self {
            Self::Mutual { workload, .. } => workload.generation(),
            Self::Beside(_) => 0,
        }
    }
}

/// For the log: where, and who it must be.
impl fmt::Display for Way {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mutual { address, expected, .. } => write!(out, "{address}, {expected}"),
            Self::Beside(Beside::Tcp(authority)) => write!(out, "{authority}"),
            Self::Beside(Beside::Unix(path)) => write!(out, "{}", path.display()),
        }
    }
}
