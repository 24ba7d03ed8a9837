//! What an attempt's end means: to those who judge the pod, to the retry, to the caller.
//!
//! The rule: it is judged once, here, and a pod's own word decides whose fault it was. What the gateway has
//! checked before it called (the model, its version, its own right to call) is the pod's fault if the pod
//! says otherwise.

use std::borrow::Cow;

use http::StatusCode;
use spillway_core::resilience::{Failure, Outcome};
use spillway_runtime::upstream::UpstreamError;
use tonic::Code;

use crate::errors::Refusal;

/// The code of a sidecar that has too much to do.
const OVERLOADED: &str = "model-overloaded";

/// How an attempt ended that brought no answer.
#[derive(Debug)]
pub enum Ended {
    /// The call failed below gRPC.
    Call(UpstreamError),
    /// No gRPC: an HTTP status.
    Http(StatusCode),
    /// Not an answer of this protocol, too large, or without outputs.
    Unreadable,
    /// The pod's own refusal.
    Said { status: Code, code: Cow<'static, str>, message: String },
    /// This gateway has no room for the answer.
    NoRoom,
}

/// What it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// To those who judge the pod.
    pub outcome: Outcome,
    /// To the retry.
    pub failure: Failure,
}

impl Ended {
    /// What it means for an attempt that may be repeated without harm, or not.
    pub fn verdict(&self, idempotent: bool) -> Verdict {
        let died = Failure::Died { idempotent };
        let (outcome, failure) = match self {
            Self::Call(UpstreamError::Unreachable(_) | UpstreamError::Refused) => (Outcome::Failure, Failure::Unseen),
            Self::Call(UpstreamError::Lost(_)) | Self::Unreadable => (Outcome::Failure, died),
            Self::Call(UpstreamError::Deadline { .. }) => (Outcome::Timeout, Failure::Deadline),
            Self::Http(status) if is_overload(*status) => (Outcome::Overload, Failure::Overload),
            Self::Http(_) => (Outcome::Failure, died),
            Self::NoRoom => (Outcome::Cancelled, Failure::Cancelled),
            Self::Said { status, code, .. } => match status {
                Code::ResourceExhausted => (Outcome::Overload, Failure::Overload),
                Code::Unavailable if code == OVERLOADED => (Outcome::Overload, Failure::Overload),
                Code::DeadlineExceeded => (Outcome::Timeout, Failure::Deadline),
                Code::Unavailable | Code::Internal | Code::Unknown | Code::DataLoss => (Outcome::Failure, died),
                // The gateway has checked these: the pod has other resources, or does not trust us.
                Code::NotFound | Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => {
                    (Outcome::Failure, died)
                }
                // Nobody but this gateway can cancel, and it did not; and a refusal is not OK.
                Code::Cancelled | Code::Ok => (Outcome::Failure, died),
                Code::InvalidArgument
                | Code::OutOfRange
                | Code::FailedPrecondition
                | Code::AlreadyExists
                | Code::Aborted => (Outcome::ClientError, Failure::Client),
            },
        };
        Verdict { outcome, failure }
    }

    /// The same, when the time is over: a pod that gives the call up by itself has met the deadline that it was told,
    /// a moment before us. tonic's servers say CANCELLED then.
    pub fn at_deadline(self) -> Self {
        match self {
            Self::Said { status: Code::Cancelled, message, .. } => {
                Self::Said { status: Code::DeadlineExceeded, code: "deadline-exceeded".into(), message }
            }
            other => other,
        }
    }

    /// What the caller gets if nothing better comes.
    pub fn refusal(self) -> Refusal {
        match self {
            Self::Call(UpstreamError::Unreachable(_) | UpstreamError::Refused) => Refusal::NoPod,
            Self::Call(UpstreamError::Lost(_)) => Refusal::PodLost,
            Self::Call(UpstreamError::Deadline { .. }) => Refusal::Deadline,
            Self::Http(status) if is_overload(status) => Refusal::Sidecar {
                status: Code::ResourceExhausted,
                code: OVERLOADED.into(),
                message: "the model has too much to do".into(),
            },
            Self::Http(_) | Self::Unreadable => Refusal::BadAnswer,
            Self::Said { status, code, message } => Refusal::Sidecar { status, code, message },
            Self::NoRoom => Refusal::Overloaded,
        }
    }
}

/// What stands before a pod says so, such as a proxy.
fn is_overload(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: Code, code: &'static str) -> Ended {
        Ended::Said { status, code: code.into(), message: String::new() }
    }

    #[test]
    fn whose_fault_it_was() {
        let died = Failure::Died { idempotent: true };
        for (ended, outcome, failure) in [
            (said(Code::Internal, "model-failed"), Outcome::Failure, died),
            (said(Code::Unavailable, "model-unavailable"), Outcome::Failure, died),
            (said(Code::Unavailable, "features-unavailable"), Outcome::Failure, died),
            (said(Code::NotFound, "unknown-model"), Outcome::Failure, died),
            (said(Code::PermissionDenied, "not-a-gateway"), Outcome::Failure, died),
            (said(Code::Cancelled, "sidecar-error"), Outcome::Failure, died),
            (said(Code::Cancelled, "sidecar-error").at_deadline(), Outcome::Timeout, Failure::Deadline),
            (said(Code::Internal, "sidecar-error").at_deadline(), Outcome::Failure, died),
            (said(Code::Unavailable, "model-overloaded"), Outcome::Overload, Failure::Overload),
            (said(Code::ResourceExhausted, "model-overloaded"), Outcome::Overload, Failure::Overload),
            (said(Code::DeadlineExceeded, "deadline-exceeded"), Outcome::Timeout, Failure::Deadline),
            (said(Code::InvalidArgument, "model-rejected"), Outcome::ClientError, Failure::Client),
            (said(Code::FailedPrecondition, "missing-feature"), Outcome::ClientError, Failure::Client),
            (Ended::Http(StatusCode::INTERNAL_SERVER_ERROR), Outcome::Failure, died),
            (Ended::Http(StatusCode::SERVICE_UNAVAILABLE), Outcome::Overload, Failure::Overload),
            (Ended::Http(StatusCode::TOO_MANY_REQUESTS), Outcome::Overload, Failure::Overload),
            (Ended::Unreadable, Outcome::Failure, died),
            (Ended::NoRoom, Outcome::Cancelled, Failure::Cancelled),
            (Ended::Call(UpstreamError::Refused), Outcome::Failure, Failure::Unseen),
        ] {
            assert_eq!(ended.verdict(true), Verdict { outcome, failure }, "{ended:?}");
        }
        let lost = Ended::Unreadable.verdict(false);
        assert_eq!(lost.failure, Failure::Died { idempotent: false });
    }
}
