//! Calling a model: one trait, two backends.
//!
//! The rule: a backend never outlives a call's deadline, and no answer leaves this module that was not
//! checked against the request and the manifest. A call that is dropped is cancelled at the model.
//!
//! * [`triton`]: a Triton server beside the sidecar, over gRPC.
//! * [`onnx`]: ONNX files in this process (tract).
//! * [`occupancy`]: how busy its places are. [`breaker`]: a model that is left alone for a while.
//! * [`facts`]: what a model says about itself against what its manifest says.
//! * [`start`]: loaded or connected, checked, warmed up; [`served`]: the models of this pod, tended and swapped.

pub mod breaker;
pub mod facts;
pub mod occupancy;
pub mod onnx;
pub mod served;
pub mod start;
pub mod triton;

use std::net::IpAddr;
use std::time::Instant;

use async_trait::async_trait;
use spillway_core::inference::{InferRequest, InferResponse};
use spillway_core::units::Name;
use spillway_runtime::telemetry::TraceParent;
use tokio::sync::mpsc;

use facts::Facts;

/// What a call carries beside its tensors.
#[derive(Clone, Debug)]
pub struct Call {
    pub deadline: Instant,
    /// The caller's place in its trace.
    pub trace: TraceParent,
}

/// One request of a stream. The key is ours, as clients may give equal ids or none.
#[derive(Debug)]
pub struct StreamRequest {
    pub key: u64,
    pub request: InferRequest,
    pub deadline: Instant,
}

/// One answer of a stream.
#[derive(Debug)]
pub struct StreamAnswer {
    pub key: u64,
    pub answer: Result<InferResponse, ModelError>,
    /// No further answer to this request follows.
    pub last: bool,
}

/// Where a model runs. One value serves all versions of one model.
#[async_trait]
pub trait Backend: Send + Sync {
    /// What the model itself says that it takes and gives.
    async fn facts(&self, version: &Name, deadline: Instant) -> Result<Facts, ModelError>;

    /// Whether this version would answer now.
    async fn ready(&self, version: &Name, deadline: Instant) -> Result<(), ModelError>;

    /// Runs the model once. `request.version` is one of the manifest's.
    async fn infer(&self, request: &InferRequest, call: &Call) -> Result<InferResponse, ModelError>;

    /// Answers requests until their channel closes and each has its last answer, or until the stream as a whole
    /// fails; then no request in it is answered any more. `call.deadline` is that of the whole stream.
    async fn stream(
        &self,
        requests: mpsc::Receiver<StreamRequest>,
        answers: mpsc::Sender<StreamAnswer>,
        call: &Call,
    ) -> Result<(), ModelError>;
}

/// A model gave no usable answer. Texts are for the log unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// Nothing answers there, or the connection broke. Another pod may do better.
    #[error("the model server cannot be reached: {0}")]
    Unavailable(String),
    /// Overload: the model's queue is full. Another pod may do better, this one needs rest.
    #[error("the model server refused the request: {0}")]
    Refused(String),
    /// The time ran out. A retry would be too late.
    #[error("the model did not answer in time")]
    DeadlineExceeded,
    /// The caller's fault by the model's own judgement. A retry is of no use. The text is for the caller, too.
    #[error("the model rejected the request: {0}")]
    Rejected(String),
    /// The model failed on this request. The text is for the caller, too.
    #[error("the model failed: {0}")]
    Failed(String),
    /// The answer does not belong to the request or contradicts the manifest.
    #[error("the model's answer is not usable: {0}")]
    BadAnswer(String),
}

impl ModelError {
    /// The label of metrics and the access log.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "model-unavailable",
            Self::Refused(_) => "model-overloaded",
            Self::DeadlineExceeded => "deadline-exceeded",
            Self::Rejected(_) => "model-rejected",
            Self::Failed(_) => "model-failed",
            Self::BadAnswer(_) => "bad-model-answer",
        }
    }

    /// Whether waiting and trying again may help a model that is being started.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::Refused(_) | Self::DeadlineExceeded => true,
            Self::Rejected(_) | Self::Failed(_) | Self::BadAnswer(_) => false,
        }
    }
}

/// A model's own message as a caller may read it: one line, short, without paths, addresses or control characters.
fn for_caller(message: &str) -> String {
    const LONGEST: usize = 256;
    let line = message.lines().next().unwrap_or_default();
    let words = line.split_whitespace().map(|word| if names_a_place(word) { "…" } else { word });
    let text: String = words.collect::<Vec<_>>().join(" ");
    text.chars().filter(|character| !character.is_control()).take(LONGEST).collect()
}

/// Whether a word holds a path, a URL, an IP address or `host:port`. Rather one too many: what is left out is in no way
/// needed to mend a request.
fn names_a_place(word: &str) -> bool {
    let outside = |character: char| !character.is_alphanumeric() && !".:-_[]%".contains(character);
    let is_address = |part: &str| {
        let part = part.trim_end_matches(['.', ':']);
        let port = |(host, port): (&str, &str)| !host.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        part.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() || part.rsplit_once(':').is_some_and(port)
    };
    word.contains(['/', '\\']) || word.split(outside).any(is_address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_message_reaches_callers_without_paths_or_further_lines() {
        let message = "cannot run '/models/a/1/model.py' today\n\nAt:\n  /models/a/1/model.py(9): execute";
        assert_eq!(for_caller(message), "cannot run … today");
        for place in [
            "path=/models/x.py",
            "file:/srv/x",
            "file:///srv/x",
            "(models/a/config.pbtxt)",
            "C:\\models\\a",
            "10.0.0.3:8001",
            "<10.0.0.3>",
            "peer=ipv4:10.0.0.3:8001,",
            "[::1]:8001;",
            "fe80::1",
            "localhost:8001",
            "'triton-0.models.svc:8001'.",
            "http://triton",
        ] {
            assert_eq!(for_caller(&format!("no answer of {place} today")), "no answer of … today", "{place}");
        }
        let plain = "input 'x': expected [1,9], got [1, 8]; see: 3.5 (FP32), a-b_c.";
        assert_eq!(for_caller(plain), plain);
        assert_eq!(for_caller("\u{1b}[31mred"), "[31mred");
        assert_eq!(for_caller(&"x".repeat(9_000)).len(), 256);
    }
}
