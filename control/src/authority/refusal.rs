//! Why somebody gets no certificate: one enum, and what each is to its caller.

use spillway_core::authority::request::Denied;
use spillway_core::authority::rotation::NotNow;
use spillway_core::units::InvalidUnit;
use spillway_runtime::authority::{AuthorityError, BadCsr};
use spillway_runtime::tls::PeerError;
use tonic::{Code, Status};

use crate::store::StoreError;

/// Why the authority does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The caller's fault.
    #[error("the request is none")]
    Csr(#[from] BadCsr),
    /// The caller's fault.
    #[error("the request asks for too much")]
    Denied(#[from] Denied),
    /// The caller's fault.
    #[error("neither a certificate nor a token proves who asks")]
    NoProof,
    /// The caller's fault: its certificate is not trusted any more.
    #[error("the caller's certificate")]
    Untrusted(#[source] PeerError),
    /// The caller's fault.
    #[error("the identity is revoked")]
    Revoked,
    /// The caller's fault.
    #[error("the token")]
    Token(#[from] BadToken),
    /// The caller's fault.
    #[error("only operators may do this")]
    NotAnOperator,
    /// The operator's fault.
    #[error("{0}")]
    Argument(String),
    /// The operator's fault.
    #[error("the rotation stays as it is")]
    Rotation(#[from] NotNow),
    /// Nobody's fault: another node can.
    #[error("this node does not lead")]
    NotLeading,
    /// The operator's fault: the root that signs now is not in this node's folder. Another node may have it.
    #[error("this node has no key under the root that signs")]
    NoSigner,
    /// Nobody's fault; a retry helps.
    #[error("too many at once")]
    Busy,
    /// A retry helps.
    #[error("the store")]
    Store(#[from] StoreError),
    /// Ours.
    #[error("the certificate cannot be made")]
    Certificate(#[from] AuthorityError),
}

/// Why a token proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    #[error("nobody made it, or it has expired")]
    Unknown,
    #[error("it was used already")]
    Used,
}

impl From<InvalidUnit> for Refusal {
    fn from(invalid: InvalidUnit) -> Self {
        Self::Argument(invalid.to_string())
    }
}

impl Refusal {
    /// A stable word for metrics, the audit log and callers.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Csr(bad) => bad.reason(),
            Self::Denied(denied) => denied.reason(),
            Self::NoProof => "no-proof",
            Self::Untrusted(error) => error.reason(),
            Self::Revoked => "revoked",
            Self::Token(BadToken::Unknown) => "token-unknown",
            Self::Token(BadToken::Used) => "token-used",
            Self::NotAnOperator => "not-an-operator",
            Self::Argument(_) => "argument",
            Self::Rotation(_) => "rotation",
            Self::NotLeading => "not-leading",
            Self::NoSigner => "no-signer",
            Self::Busy => "busy",
            Self::Store(_) => "store",
            Self::Certificate(_) => "certificate",
        }
    }

    /// Whether it is a decision against somebody, for the audit log.
    pub fn is_denial(&self) -> bool {
        matches!(self.code(), Code::PermissionDenied | Code::Unauthenticated) || matches!(self, Self::Csr(_))
    }

    /// What the caller is told: the reason, and no more of ours than it needs.
    pub fn status(&self) -> Status {
        let told = match self {
            Self::Argument(told) => format!("argument: {told}"),
            Self::Rotation(not_now) => format!("rotation: {not_now}"),
            _ => self.reason().to_owned(),
        };
        Status::new(self.code(), told)
    }

    fn code(&self) -> Code {
        match self {
            Self::Csr(_) | Self::Argument(_) => Code::InvalidArgument,
            Self::Denied(_) | Self::Revoked | Self::Token(_) | Self::NotAnOperator => Code::PermissionDenied,
            Self::NoProof | Self::Untrusted(_) => Code::Unauthenticated,
            Self::Rotation(_) => Code::FailedPrecondition,
            Self::Busy => Code::ResourceExhausted,
            Self::NotLeading | Self::NoSigner | Self::Store(_) | Self::Certificate(_) => Code::Unavailable,
        }
    }
}
