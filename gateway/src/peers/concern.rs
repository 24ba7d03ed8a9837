//! Whom a refusal concerns, as one region's gateway tells another's.
//!
//! The rule: what comes of one tenant's bound or share, or of one request's time, shuts the region to nobody else. What
//! says nothing of this is everybody's. Clients are not told.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::admission::Why;
use crate::errors::Refusal;

const CONCERNS: HeaderName = HeaderName::from_static("spillway-refusal-concerns");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// Its tenant, which asks for more than its share of what its class gets.
    Share,
    /// Its tenant, which has as many requests there as it may have.
    Bound,
    /// Itself: it was too short of time to wait for its turn.
    Time,
}

impl Concern {
    const ALL: [Self; 3] = [Self::Share, Self::Bound, Self::Time];

    fn of(refusal: &Refusal) -> Option<Self> {
        let Refusal::Busy { why, .. } = refusal else { return None };
        match why {
            Why::Share => Some(Self::Share),
            Why::TenantFull => Some(Self::Bound),
            Why::TooLate => Some(Self::Time),
            // That it came with too little is what its status says.
            Why::Shed | Why::Planned | Why::Full | Why::TooShort => None,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Share => "share",
            Self::Bound => "bound",
            Self::Time => "time",
        }
    }

    /// A header of the refusal, if it does not concern everybody.
    pub fn header(refusal: &Refusal) -> Option<(HeaderName, HeaderValue)> {
        Self::of(refusal).map(|concern| (CONCERNS, HeaderValue::from_static(concern.word())))
    }

    /// What the head of a refusal says. None: everybody.
    pub fn read(head: &HeaderMap) -> Option<Self> {
        let word = head.get(CONCERNS)?;
        Self::ALL.into_iter().find(|concern| word == concern.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tenant_or_a_request_is_the_reason_for_is_told_apart_from_what_is_everybodys() {
        let told = |refusal: Refusal| Concern::read(&HeaderMap::from_iter(Concern::header(&refusal)));
        for (why, concern) in [
            (Why::Shed, None),
            (Why::Planned, None),
            (Why::Full, None),
            (Why::Share, Some(Concern::Share)),
            (Why::TenantFull, Some(Concern::Bound)),
            (Why::TooLate, Some(Concern::Time)),
            (Why::TooShort, None),
        ] {
            assert_eq!(told(Refusal::busy(why)), concern, "{why:?}");
        }
        assert_eq!(told(Refusal::NoPod), None);
        let strange = HeaderMap::from_iter([(CONCERNS, HeaderValue::from_static("nobody"))]);
        assert_eq!(Concern::read(&strange), None);
    }
}
