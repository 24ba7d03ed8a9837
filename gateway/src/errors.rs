//! Everything that a request can fail with, and the one place that says what the caller gets.
//!
//! The rule: a variant says whose fault it is; [`Refusal::answer`] is the only mapping to HTTP and gRPC;
//! its text is for the caller and names no address, path or pod.

use std::borrow::Cow;
use std::time::Duration;

use http::StatusCode;
use spillway_core::failover::NoPassage;
use spillway_core::inference::InvalidRequest;
use spillway_core::policy::Denied;
use spillway_core::units::Name;
use spillway_runtime::tls::PeerError;
use tonic::Code;

use crate::admission::Why;

/// The bytes of a request's head or of its framing are not acceptable. The caller's fault; the
/// connection is closed, since where the next request begins is not certain any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadFault {
    #[error("the request line is not METHOD /path HTTP/1.1")]
    RequestLine,
    #[error("a line ends without a carriage return")]
    BareLineFeed,
    #[error("a header is folded over lines")]
    ObsoleteFold,
    #[error("there is white space before a header's colon")]
    SpaceBeforeColon,
    #[error("a header's name is not a token")]
    HeaderName,
    #[error("a header's value has control characters")]
    HeaderValue,
    #[error("there must be exactly one host header")]
    Host,
    #[error("content-length must be one whole number, given once")]
    ContentLength,
    #[error("transfer-encoding must be 'chunked', given once, on HTTP/1.1")]
    TransferEncoding,
    #[error("the request's authority, host, path or length can be read in two ways")]
    Ambiguous,
    #[error("content-length and transfer-encoding are both given")]
    BothLengths,
    #[error("the chunked body is malformed")]
    Chunk,
    #[error("the body has more than 65536 chunks")]
    TooManyChunks,
    #[error("the head has more than 61440 bytes")]
    TooLarge,
    #[error("the head has more than 100 headers")]
    TooManyHeaders,
    #[error("the head took longer than 10 s to arrive")]
    TooSlow,
}

impl HeadFault {
    pub fn code(self) -> &'static str {
        match self {
            Self::RequestLine => "invalid-request-line",
            Self::BareLineFeed | Self::ObsoleteFold | Self::SpaceBeforeColon | Self::HeaderName | Self::HeaderValue => {
                "invalid-header"
            }
            Self::Host => "invalid-host",
            Self::Ambiguous => "ambiguous-request",
            Self::ContentLength | Self::TransferEncoding | Self::BothLengths => "invalid-framing",
            Self::Chunk => "invalid-chunk",
            Self::TooManyChunks => "too-many-chunks",
            Self::TooLarge | Self::TooManyHeaders => "headers-too-large",
            Self::TooSlow => "head-too-slow",
        }
    }

    pub fn status(self) -> StatusCode {
        match self {
            Self::TooLarge | Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Why a request gets no prediction.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    // The caller's fault; again unchanged is of no use.
    #[error(transparent)]
    Head(#[from] HeadFault),
    #[error("the path is not in its normal form: no '%', '//', ';', '\\' or dot segments")]
    Path,
    #[error("there is nothing here")]
    NotFound,
    #[error("this method of the Open Inference Protocol is not offered here")]
    NotOffered,
    #[error("this method is not implemented")]
    NotImplemented,
    #[error("there is no such service here")]
    UnknownService,
    #[error("the method is not allowed here")]
    Method { allow: &'static str },
    #[error("protocol upgrades are not offered")]
    Upgrade,
    #[error("the connection header may only say close or keep-alive")]
    ConnectionHeader,
    #[error("header '{0}' is given twice")]
    DuplicateHeader(&'static str),
    #[error("the content type must be {expected}")]
    ContentType { expected: &'static str },
    #[error(
        "this compression is not accepted; REST inference takes gzip and deflate, all else no content-encoding and no grpc-encoding"
    )]
    Compressed,
    #[error("the body has more than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the body is not what its content-encoding says")]
    Coding,
    #[error("the body arrived too slowly")]
    BodyTooSlow,
    #[error("a gRPC message must be one whole length-prefixed frame")]
    Frame,
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),

    // The caller's identity or rights.
    #[error("the certificate is expired or its issuer is not trusted any more")]
    Untrusted(#[source] PeerError),
    #[error(transparent)]
    Denied(#[from] Denied),
    /// Another region's gateway sent it.
    #[error(transparent)]
    NoPassage(NoPassage),
    #[error("there is no model '{0}' here")]
    UnknownModel(String),
    #[error("this stream serves another pool than model '{0}' is in; open a stream for it")]
    OtherPool(String),
    #[error("model '{model}' has no version '{version}'")]
    UnknownVersion { model: String, version: String },

    // The caller's: it asks for more than it may. Later is another matter.
    #[error("{}", limited(.limit, .after.as_ref()))]
    Limited { limit: Name, after: Option<Duration> },

    // Nobody's fault, or ours; again may help.
    #[error("the deadline passed")]
    Deadline,
    #[error("not ready")]
    NotReady,
    #[error("too many bytes of requests and answers are in memory")]
    Overloaded,
    /// Level 4 of degradation.
    #[error("the model is in trouble, and requests of the lowest class are not served now")]
    LowestClass,
    #[error("{}", busy(*.why))]
    Busy { why: Why, after: Duration },
    #[error("no pod that serves this model can be reached")]
    NoPod,
    #[error("every pod that serves this model has as many requests as it can take")]
    PodsBusy,
    #[error("the pod that had the request went away")]
    PodLost,
    #[error("the pod's answer could not be read")]
    BadAnswer,
    #[error("the request wants nothing but a stored answer, and there is none")]
    NotCached,
    #[error("{message}")]
    Sidecar { status: Code, code: Cow<'static, str>, message: String },
    /// The client is gone: nobody reads this.
    #[error("the client went away")]
    Cancelled,
}

/// When the same request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    Unsaid,
    After(Duration),
    Never,
}

fn limited(limit: &Name, after: Option<&Duration>) -> String {
    match after {
        Some(after) => format!("the limit '{limit}' is reached; again in {} ms", after.as_nanos().div_ceil(1_000_000)),
        None => format!("the request costs more than the limit '{limit}' ever holds"),
    }
}

fn busy(why: Why) -> &'static str {
    match why {
        Why::Shed | Why::Share | Why::Planned => "there are too many requests, and others come first",
        Why::Full => "too many requests wait for this model",
        Why::TenantFull => "too many requests of this tenant wait or are being served",
        Why::TooLate => "its turn did not come in time",
        Why::TooShort => "the model usually takes longer than the request has left",
    }
}

/// What a refusal looks like on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: StatusCode,
    pub grpc: Code,
    /// The stable `spillway-error` code.
    pub code: Cow<'static, str>,
}

impl From<NoPassage> for Refusal {
    fn from(fault: NoPassage) -> Self {
        match fault {
            NoPassage::Denied(denied) => denied.into(),
            fault => Self::NoPassage(fault),
        }
    }
}

impl Refusal {
    /// It cannot be served now. Those who are told so together do not all come back together.
    pub fn busy(why: Why) -> Self {
        let after = Duration::from_millis(rand::random_range(500..1_500));
        Self::Busy { why, after }
    }

    pub fn answer(&self) -> Answer {
        let (status, grpc, code): (u16, Code, Cow<'static, str>) = match self {
            Self::Head(fault) => (fault.status().as_u16(), Code::InvalidArgument, fault.code().into()),
            Self::Path => (400, Code::InvalidArgument, "invalid-path".into()),
            Self::NotFound => (404, Code::Unimplemented, "not-found".into()),
            Self::NotOffered => (403, Code::PermissionDenied, "not-offered".into()),
            Self::Method { .. } => (405, Code::Unimplemented, "method-not-allowed".into()),
            Self::Upgrade => (400, Code::InvalidArgument, "upgrade-refused".into()),
            Self::ConnectionHeader => (400, Code::InvalidArgument, "invalid-connection-header".into()),
            Self::DuplicateHeader(_) => (400, Code::InvalidArgument, "duplicate-header".into()),
            Self::ContentType { .. } => (415, Code::InvalidArgument, "unsupported-content-type".into()),
            Self::Compressed => (415, Code::Unimplemented, "unsupported-encoding".into()),
            Self::BodyTooLarge { .. } => (413, Code::ResourceExhausted, "body-too-large".into()),
            Self::Invalid(fault @ InvalidRequest::TooLarge { .. }) => {
                (413, Code::ResourceExhausted, fault.code().into())
            }
            Self::Coding => (400, Code::InvalidArgument, "invalid-encoding".into()),
            Self::BodyTooSlow => (408, Code::DeadlineExceeded, "body-too-slow".into()),
            Self::Frame => (400, Code::InvalidArgument, "invalid-frame".into()),
            Self::Invalid(fault) => (400, Code::InvalidArgument, fault.code().into()),
            Self::Untrusted(_) => (403, Code::PermissionDenied, "untrusted-certificate".into()),
            Self::Denied(fault) => (403, Code::PermissionDenied, fault.code().into()),
            Self::NoPassage(fault) => (403, Code::PermissionDenied, fault.code().into()),
            Self::UnknownModel(_) => (404, Code::NotFound, "unknown-model".into()),
            Self::UnknownVersion { .. } => (404, Code::NotFound, "unknown-version".into()),
            Self::OtherPool(_) => (400, Code::FailedPrecondition, "other-pool".into()),
            Self::Limited { after: Some(_), .. } => (429, Code::ResourceExhausted, "rate-limited".into()),
            Self::Limited { after: None, .. } => (429, Code::ResourceExhausted, "rate-limit-never".into()),
            Self::Deadline | Self::Busy { why: Why::TooShort, .. } => {
                (504, Code::DeadlineExceeded, "deadline-exceeded".into())
            }
            Self::Busy { .. } => (503, Code::Unavailable, "overloaded".into()),
            // RFC 9111, 5.2.1.7.
            Self::NotCached => (504, Code::FailedPrecondition, "not-cached".into()),
            Self::NotReady => (503, Code::Unavailable, "not-ready".into()),
            Self::Overloaded => (503, Code::ResourceExhausted, "overloaded".into()),
            Self::NotImplemented => (501, Code::Unimplemented, "not-implemented".into()),
            Self::UnknownService => (404, Code::NotFound, "unknown-service".into()),
            Self::LowestClass => (503, Code::Unavailable, "lowest-class".into()),
            Self::NoPod => (503, Code::Unavailable, "no-pod".into()),
            Self::PodsBusy => (503, Code::ResourceExhausted, "pods-busy".into()),
            Self::PodLost => (503, Code::Unavailable, "pod-lost".into()),
            Self::BadAnswer => (502, Code::Internal, "bad-model-answer".into()),
            Self::Sidecar { status, code, .. } => (http_status(*status), *status, code.clone()),
            Self::Cancelled => (499, Code::Cancelled, "cancelled".into()),
        };
        // Every number above is a valid status.
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Answer { status, grpc, code }
    }

    /// What the caller is told about sending it again.
    pub fn again(&self) -> Again {
        match self {
            Self::Limited { after, .. } => after.map_or(Again::Never, Again::After),
            Self::Busy { why: Why::TooShort, .. } => Again::Unsaid,
            Self::Busy { after, .. } => Again::After(*after),
            // Health checks come each second: that is when it may be different.
            _ if self.answer().status == StatusCode::SERVICE_UNAVAILABLE => Again::After(Duration::from_secs(1)),
            _ => Again::Unsaid,
        }
    }

    /// The bounded word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self.answer().code {
            Cow::Borrowed(code) => code,
            // A code that is not of the list: what a sidecar says is not to make series.
            Cow::Owned(_) => "sidecar",
        }
    }

    /// Whether the connection must not be used again after this.
    pub fn ends_connection(&self) -> bool {
        match self {
            Self::Head(_) | Self::Upgrade | Self::ConnectionHeader | Self::Untrusted(_) | Self::BodyTooSlow => true,
            Self::Path
            | Self::NotFound
            | Self::NotOffered
            | Self::Method { .. }
            | Self::DuplicateHeader(_)
            | Self::ContentType { .. }
            | Self::Compressed
            | Self::BodyTooLarge { .. }
            | Self::Coding
            | Self::Frame
            | Self::Invalid(_)
            | Self::Denied(_)
            | Self::NoPassage(_)
            | Self::UnknownModel(_)
            | Self::UnknownVersion { .. }
            | Self::OtherPool(_)
            | Self::Limited { .. }
            | Self::Busy { .. }
            | Self::Deadline
            | Self::NotReady
            | Self::Overloaded
            | Self::NotImplemented
            | Self::UnknownService
            | Self::LowestClass
            | Self::NoPod
            | Self::PodsBusy
            | Self::PodLost
            | Self::BadAnswer
            | Self::NotCached
            | Self::Sidecar { .. }
            | Self::Cancelled => false,
        }
    }
}

/// The `spillway-error` codes of sidecars, and what stands in for a code that is missing.
const SIDECAR_CODES: [&str; 42] = [
    "bad-model-answer",
    "binary-size-mismatch",
    "body-too-large",
    "data-length-mismatch",
    "deadline-exceeded",
    "duplicate-tensor",
    "features-unavailable",
    "invalid-element",
    "invalid-entity-id",
    "invalid-frame",
    "invalid-header-length",
    "invalid-json",
    "invalid-parameter",
    "invalid-protobuf",
    "invalid-request",
    "invalid-shape",
    "json-too-deep",
    "limit-exceeded",
    "missing-entity",
    "missing-feature",
    "missing-input",
    "mixed-contents",
    "model-failed",
    "model-overloaded",
    "model-rejected",
    "model-unavailable",
    "not-a-gateway",
    "not-ready",
    "output-not-json",
    "permission-denied",
    "raw-count-mismatch",
    "shared-memory",
    "sidecar-error",
    "tensor-mismatch",
    "two-entities",
    "unknown-datatype",
    "unknown-feature-group",
    "unknown-model",
    "unknown-tensor",
    "unknown-version",
    "unnamed-tensor",
    "untrusted",
];

/// A sidecar's code, as one of the list where it is one.
pub fn sidecar_code(code: &str) -> Cow<'static, str> {
    SIDECAR_CODES.into_iter().find(|known| *known == code).map_or_else(|| Cow::Owned(code.to_owned()), Cow::Borrowed)
}

/// The HTTP status of a sidecar's refusal.
fn http_status(status: Code) -> u16 {
    match status {
        Code::Ok => 200,
        Code::InvalidArgument | Code::OutOfRange => 400,
        Code::Unauthenticated | Code::PermissionDenied => 403,
        Code::NotFound => 404,
        Code::Aborted | Code::AlreadyExists => 409,
        Code::FailedPrecondition => 422,
        Code::ResourceExhausted | Code::Unavailable => 503,
        Code::DeadlineExceeded => 504,
        Code::Cancelled => 499,
        Code::Unimplemented => 501,
        Code::Internal | Code::DataLoss | Code::Unknown => 502,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sidecar_refusals_keep_their_code_and_status() {
        for (status, http) in [
            (Code::FailedPrecondition, 422),
            (Code::DeadlineExceeded, 504),
            (Code::Unavailable, 503),
            (Code::Internal, 502),
            (Code::ResourceExhausted, 503),
        ] {
            let answer = Refusal::Sidecar { status, code: "x".into(), message: String::new() }.answer();
            assert_eq!((answer.status.as_u16(), answer.grpc, &*answer.code), (http, status, "x"));
        }
    }

    #[test]
    fn t56_a_sidecars_codes_are_counted_by_name_and_others_as_one() {
        let reason = |code: &str| {
            let refusal = Refusal::Sidecar { status: Code::Internal, code: sidecar_code(code), message: String::new() };
            assert_eq!(refusal.answer().code, code, "the caller sees it as it is");
            refusal.reason()
        };
        assert_eq!(reason("missing-feature"), "missing-feature");
        assert_eq!(reason("model-unavailable"), "model-unavailable");
        assert_eq!(reason("made-up-17"), "sidecar");
    }

    #[test]
    fn texts_for_callers_are_one_line() {
        for refusal in [Refusal::Path, Refusal::NoPod, Refusal::Head(HeadFault::Chunk), Refusal::Compressed] {
            assert!(!refusal.to_string().contains('\n'));
        }
    }
}
