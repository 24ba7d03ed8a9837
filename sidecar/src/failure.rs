//! Everything that can go wrong with a request, and the one place that says how callers see it.
//!
//! The rule: one exhaustive match maps each failure to a gRPC status, a stable `spillway-error` code
//! and a text without addresses, paths or entity ids. The log gets the cause in full elsewhere.

use spillway_core::inference::InvalidRequest;
use spillway_runtime::tls::PeerError;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::features::FeatureError;
use crate::join::JoinError;
use crate::model::ModelError;

/// The metadata key of the stable code.
pub const ERROR: &str = "spillway-error";

/// Why a request got no prediction.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The caller's fault: sending it again unchanged is of no use.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    #[error("the model is not served here")]
    UnknownModel,
    #[error("the model has no such version")]
    UnknownVersion,
    /// A retry elsewhere, or later, may help.
    #[error("the model is not ready")]
    NotReady,
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The time was over before the model was called.
    #[error("the deadline passed before the model was called")]
    DeadlineExceeded,
    /// The peer may not call this sidecar.
    #[error("only a gateway of this region may call")]
    NotAGateway,
    #[error("this peer may not call the feature service")]
    NotForFeatures,
    #[error("the peer's certificate is not trusted any more")]
    Untrusted(#[source] PeerError),
}

impl Failure {
    /// Status, stable code and what the caller reads.
    fn seen(&self) -> (Code, &'static str, String) {
        let text = self.to_string();
        match self {
            Self::Invalid(fault) => (Code::InvalidArgument, fault.code(), text),
            Self::UnknownModel => (Code::NotFound, "unknown-model", text),
            Self::UnknownVersion => (Code::NotFound, "unknown-version", text),
            Self::NotReady => (Code::Unavailable, "model-unavailable", text),
            Self::DeadlineExceeded => (Code::DeadlineExceeded, "deadline-exceeded", text),
            Self::NotAGateway => (Code::PermissionDenied, "not-a-gateway", text),
            Self::NotForFeatures => (Code::PermissionDenied, "permission-denied", text),
            Self::Untrusted(_) => {
                (Code::PermissionDenied, "untrusted", "the certificate is not trusted any more".into())
            }
            Self::Join(JoinError::Missing(_)) => (Code::FailedPrecondition, "missing-feature", text),
            Self::Join(JoinError::Unreachable(_) | JoinError::NoStore) => {
                (Code::Unavailable, "features-unavailable", text)
            }
            Self::Join(JoinError::Features(error)) => seen_feature_error(error),
            Self::Model(error) => match error {
                ModelError::Unavailable(_) => {
                    (Code::Unavailable, "model-unavailable", "the model cannot be reached".into())
                }
                ModelError::Refused(_) => {
                    (Code::ResourceExhausted, "model-overloaded", "the model has too much to do".into())
                }
                ModelError::DeadlineExceeded => (Code::DeadlineExceeded, "deadline-exceeded", text),
                ModelError::Rejected(_) => (Code::InvalidArgument, "model-rejected", text),
                ModelError::Failed(_) => (Code::Internal, "model-failed", text),
                ModelError::BadAnswer(_) => {
                    (Code::Internal, "bad-model-answer", "the model's answer was not usable".into())
                }
            },
        }
    }

    /// The stable code, also for metrics and the access log.
    pub fn code(&self) -> &'static str {
        self.seen().1
    }

    pub fn status(&self) -> Status {
        let (code, name, text) = self.seen();
        let mut status = Status::new(code, text);
        status.metadata_mut().insert(ERROR, MetadataValue::from_static(name));
        status
    }
}

fn seen_feature_error(error: &FeatureError) -> (Code, &'static str, String) {
    let status = match error {
        // Snapshot and model disagree: nothing that the caller can mend.
        FeatureError::UnknownGroup(_) => Code::Unavailable,
        FeatureError::Key { .. } | FeatureError::TooMany { .. } => Code::InvalidArgument,
    };
    (status, error.code(), error.to_string())
}
