//! What can go wrong on the way to a server, told by whether the server may have seen the call.

use std::sync::Arc;

use h2::Reason;

/// No connection came to be. The server's or the link's fault. Its text stands by itself in a log line's field,
/// so it holds the cause, which is no source.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("the connect took too long")]
    Timeout,
    #[error("the connect failed: {0}")]
    Tcp(std::io::Error),
    #[error("the TLS handshake failed: {0}")]
    Tls(std::io::Error),
    #[error("the server does not speak h2")]
    Protocol,
    #[error("the h2 preface failed: {0}")]
    Http(h2::Error),
    /// Most likely our certificate was refused: in TLS 1.3 the server says so after the handshake.
    #[error("the server closed the connection before it said anything")]
    Closed,
    /// The runtime that was connecting has ended.
    #[error("the connect was given up")]
    GivenUp,
}

impl ConnectError {
    /// A stable word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Tcp(_) => "tcp",
            Self::Tls(_) => "tls",
            Self::Protocol => "protocol",
            Self::Http(_) => "http",
            Self::Closed => "closed",
            Self::GivenUp => "given-up",
        }
    }
}

/// A call failed. The text is for the log: it may hold what callers must not see.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// There is no connection; the call was never sent.
    #[error("the upstream cannot be reached")]
    Unreachable(#[source] Arc<ConnectError>),
    /// The server closed or refused the stream before it looked at the call.
    #[error("the upstream refused the stream unprocessed")]
    Refused,
    /// The caller's deadline.
    #[error("the deadline is over")]
    Deadline { sent: bool },
    /// The server reset the stream, or the connection broke.
    #[error("the call was lost")]
    Lost(#[source] h2::Error),
}

impl UpstreamError {
    /// The server cannot have acted on the call, so it may be made again whatever it does.
    pub fn never_processed(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Refused => true,
            Self::Deadline { sent } => !sent,
            Self::Lost(_) => false,
        }
    }

    /// The server gave up a call that it had taken.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Lost(error) if error.is_remote() && error.reason() == Some(Reason::CANCEL))
    }

    /// A stable word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable(error) => error.reason(),
            Self::Refused => "refused",
            Self::Deadline { .. } => "deadline",
            Self::Lost(_) => "lost",
        }
    }

    pub(super) fn of(error: h2::Error) -> Self {
        // REFUSED_STREAM, and a graceful GOAWAY for a stream above its last one, promise that nothing was processed
        // (RFC 9113, sections 6.8 and 8.7).
        let refused = match error.reason() {
            Some(Reason::NO_ERROR) => error.is_go_away(),
            reason => reason == Some(Reason::REFUSED_STREAM),
        };
        if refused && error.is_remote() { Self::Refused } else { Self::Lost(error) }
    }
}
