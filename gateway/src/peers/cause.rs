//! Why a request is stranded: this region has no usable capacity for it.
//!
//! The rule: what another region cannot do better is not sent there. A tenant's own limits, a client's fault, time
//! that is over, and a model that fails where it is well are no reasons; nor is what the plan refuses, for which
//! there is no room anywhere.

use tonic::Code;

use crate::admission::Why;
use crate::errors::Refusal;

/// The code of a sidecar that has too much to do.
const MODEL_OVERLOADED: &str = "model-overloaded";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// No pool of this region serves the model.
    NoPool,
    /// Every pod of its pool is known to be bad: it fails its checks, is ejected, or its breaker is open.
    Unusable,
    /// No pod could be reached.
    NoPod,
    /// The gate sheds requests of this class.
    Shed,
    /// All places to wait are taken.
    Full,
    /// Every pod has as many calls as it takes.
    PodsBusy,
    /// A pod said that it has too much to do.
    Overloaded,
    /// A pod said that its model, or the features that it needs, are not there.
    Unavailable,
    /// The model is at level 2 or beyond of its ladder: what is answered here is less than another region's answer.
    Degraded,
}

impl Cause {
    /// For a metric's label.
    pub fn word(self) -> &'static str {
        match self {
            Self::NoPool => "no-pool",
            Self::Unusable => "unusable",
            Self::NoPod => "no-pod",
            Self::Shed => "shed",
            Self::Full => "queue-full",
            Self::PodsBusy => "pods-busy",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Degraded => "degraded",
        }
    }

    /// Why a request is stranded that was refused here. `usable`: some pod of the pool is not known to be bad.
    pub fn of(refusal: &Refusal, usable: impl FnOnce() -> bool) -> Option<Self> {
        match refusal {
            Refusal::NoPod => Some(Self::NoPod),
            Refusal::PodsBusy => Some(Self::PodsBusy),
            Refusal::Busy { why: Why::Shed | Why::Share, .. } => Some(Self::Shed),
            Refusal::Busy { why: Why::Full, .. } => Some(Self::Full),
            Refusal::Sidecar { status: Code::ResourceExhausted, .. } => Some(Self::Overloaded),
            Refusal::Sidecar { status: Code::Unavailable, code, .. } if code == MODEL_OVERLOADED => {
                Some(Self::Overloaded)
            }
            Refusal::Sidecar { status: Code::Unavailable, .. } => Some(Self::Unavailable),
            // Alone it may be the request that its pods do not survive; where none is left, it is the region.
            Refusal::PodLost if !usable() => Some(Self::Unusable),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_another_region_can_do_better_is_stranded() {
        let sidecar =
            |status, code: &'static str| Refusal::Sidecar { status, code: code.into(), message: String::new() };
        let limited = Refusal::Limited { limit: spillway_core::units::Name::parse("all").unwrap(), after: None };
        for (refusal, usable, cause) in [
            (Refusal::NoPod, true, Some(Cause::NoPod)),
            (Refusal::PodsBusy, true, Some(Cause::PodsBusy)),
            (Refusal::busy(Why::Shed), true, Some(Cause::Shed)),
            (Refusal::busy(Why::Share), true, Some(Cause::Shed)),
            (Refusal::busy(Why::Full), true, Some(Cause::Full)),
            (Refusal::busy(Why::Planned), true, None),
            (Refusal::busy(Why::TenantFull), true, None),
            (Refusal::busy(Why::TooLate), true, None),
            (Refusal::busy(Why::TooShort), true, None),
            (sidecar(Code::ResourceExhausted, "model-overloaded"), true, Some(Cause::Overloaded)),
            (sidecar(Code::Unavailable, "model-overloaded"), true, Some(Cause::Overloaded)),
            (sidecar(Code::Unavailable, "model-unavailable"), true, Some(Cause::Unavailable)),
            (sidecar(Code::Unavailable, "features-unavailable"), true, Some(Cause::Unavailable)),
            (sidecar(Code::Internal, "model-failed"), false, None),
            (sidecar(Code::InvalidArgument, "model-rejected"), false, None),
            (Refusal::PodLost, true, None),
            (Refusal::PodLost, false, Some(Cause::Unusable)),
            (Refusal::BadAnswer, false, None),
            (Refusal::Deadline, false, None),
            (Refusal::Overloaded, false, None),
            (Refusal::LowestClass, false, None),
            (limited, false, None),
            (Refusal::Cancelled, false, None),
        ] {
            assert_eq!(Cause::of(&refusal, || usable), cause, "{refusal:?}");
        }
    }
}
