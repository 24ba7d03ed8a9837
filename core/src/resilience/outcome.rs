//! How a call to a pod ended, in the one form that all who judge pods understand.

/// How a call to a pod ended, said once to all that judge by it.
///
/// | | outliers | breaker | concurrency limit |
/// |---|---|---|---|
/// | `Success` | good | good | a latency |
/// | `Failure` | bad | bad | ignored |
/// | `Timeout` | bad if the pod had the time ([`super::Outliers::judged`]) | bad | too many |
/// | `Overload` | ignored | ignored | too many |
/// | `ClientError`, `Cancelled` | ignored | ignored | ignored |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A good answer.
    Success,
    /// The pod's fault: refused, reset, 5xx, an answer that cannot be read.
    Failure,
    /// No answer in the time that the call had.
    Timeout,
    /// The pod said that it has too much to do: 429, 503.
    Overload,
    /// The pod said that the caller is wrong.
    ClientError,
    /// Given up for a reason that is not the pod's: the client left, another pod was quicker.
    Cancelled,
}

impl Outcome {
    /// Whether it counts against the pod.
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Failure | Self::Timeout)
    }

    /// Whether the pod, or its host, said anything at all.
    pub fn is_answer(self) -> bool {
        !matches!(self, Self::Timeout | Self::Cancelled)
    }
}
