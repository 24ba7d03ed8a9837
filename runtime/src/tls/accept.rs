//! The server's handshake: bounded in time, and out of it comes a peer.
//!
//! The rule: there is one door. rustls verifies a chain in a full handshake only, and of a ticket it takes the chain that lies
//! in it. So whoever comes, by a signature or by a ticket, is judged here by their chain and the bundle of now, and is told
//! apart no further.

use std::sync::Arc;
use std::time::Duration;

use rustls::HandshakeKind;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::peer::{Peer, PeerError};
use super::trust::refusal;
use super::workload::Workload;

/// What a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// A client that does not ask for h2 by ALPN is refused.
    H2,
    /// A client that asks for nothing gets HTTP/1.1; one that asks for something else is refused.
    H2AndHttp1,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    H2,
    Http1,
}

/// A connection whose client is known.
#[derive(Debug)]
pub struct Accepted<S> {
    pub stream: TlsStream<S>,
    pub peer: Arc<Peer>,
    pub protocol: Protocol,
}

/// The client's fault, or the link's: no connection came to be.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    #[error("the handshake took too long")]
    Timeout,
    #[error("the client's certificate was refused")]
    Peer(#[source] PeerError),
    #[error("the client did not ask for a protocol that is spoken here")]
    Protocol,
    #[error("the handshake failed")]
    Handshake(#[source] std::io::Error),
}

impl AcceptError {
    /// A stable word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Peer(error) => error.reason(),
            Self::Protocol => "protocol",
            Self::Handshake(_) => "handshake",
        }
    }
}

/// Does the handshake of a server on a new connection.
pub async fn accept<S>(
    workload: &Workload,
    stream: S,
    offer: Offer,
    within: Duration,
) -> Result<Accepted<S>, AcceptError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = TlsAcceptor::from(workload.handshake_config(offer)).accept(stream);
    let stream = tokio::time::timeout(within, handshake).await.map_err(|_| AcceptError::Timeout)?.map_err(failed)?;
    let (_, connection) = stream.get_ref();
    let protocol = match (connection.alpn_protocol(), offer) {
        (Some(b"h2"), _) => Protocol::H2,
        (None | Some(b"http/1.1"), Offer::H2AndHttp1) => Protocol::Http1,
        _ => return Err(AcceptError::Protocol),
    };
    let chain = connection.peer_certificates().unwrap_or_default();
    let peer = workload.peer(chain).map_err(AcceptError::Peer)?;
    workload.count_handshake(connection.handshake_kind() == Some(HandshakeKind::Resumed));
    Ok(Accepted { stream, peer: Arc::new(peer), protocol })
}

pub(super) fn failed(error: std::io::Error) -> AcceptError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::NoApplicationProtocol) => AcceptError::Protocol,
        Some(tls) => refusal(tls).map_or(AcceptError::Handshake(error), AcceptError::Peer),
        None => AcceptError::Handshake(error),
    }
}
