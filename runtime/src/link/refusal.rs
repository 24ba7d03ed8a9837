//! Why a push was not taken, in words that do not change.

use spillway_core::rollout::Unsafe;

use crate::plan::Unreadable;
use crate::snapshot::Refused;

/// Texts of one refusal that are sent, and how many characters each may have.
const MOST_ERRORS: usize = 33;
const MOST_ERROR: usize = 512;

/// Whose fault it is: of `base` and `checksum`, the sender's view of us; of `unwritable`, ours; else the sender's.
/// What is `base` or `checksum` may come again, whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It cannot be read.
    Malformed,
    /// What came of it is not what its sender said.
    Checksum,
    /// It is made for somebody who serves something else.
    Base,
    /// It is older than what is served.
    Version,
    /// Its sender does not lead any more.
    Epoch,
    TooLarge,
    /// It would leave nothing, or too little.
    Unsafe,
    /// Its resources have faults.
    Invalid,
    /// It could not be kept.
    Unwritable,
}

impl Reason {
    /// As in messages and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Checksum => "checksum",
            Self::Base => "base",
            Self::Version => "version",
            Self::Epoch => "epoch",
            Self::TooLarge => "too_large",
            Self::Unsafe => "unsafe",
            Self::Invalid => "invalid",
            Self::Unwritable => "unwritable",
        }
    }
}

/// A push that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    /// Each fault that was found; bounded.
    pub errors: Vec<String>,
}

impl Refusal {
    pub fn new(reason: Reason, error: impl ToString) -> Self {
        Self::of(reason, [error.to_string()])
    }

    /// At least one error, of which too many are cut.
    pub fn of(reason: Reason, errors: impl IntoIterator<Item = String>) -> Self {
        let cut = |error: String| error.chars().take(MOST_ERROR).collect();
        let errors = errors.into_iter().take(MOST_ERRORS).map(cut).collect();
        Self { reason, errors }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        let reason = match refused {
            Refused::Unreadable(_) | Refused::Malformed => Reason::Malformed,
            Refused::Checksum => Reason::Checksum,
            Refused::Version { .. } => Reason::Version,
            Refused::Invalid(faults) => {
                return Self::of(Reason::Invalid, faults.iter().map(ToString::to_string));
            }
        };
        Self::new(reason, refused)
    }
}

impl From<Vec<Unsafe>> for Refusal {
    fn from(faults: Vec<Unsafe>) -> Self {
        // The first that applies to the version as a whole names the refusal.
        let has = |of: fn(&Unsafe) -> bool| faults.iter().any(of);
        let reason = if has(|fault| matches!(fault, Unsafe::StaleLeader { .. })) {
            Reason::Epoch
        } else if has(|fault| matches!(fault, Unsafe::Older { .. })) {
            Reason::Version
        } else if has(|fault| matches!(fault, Unsafe::TooLarge { .. })) {
            Reason::TooLarge
        } else {
            Reason::Unsafe
        };
        Self::of(reason, faults.iter().map(ToString::to_string))
    }
}

impl From<Unreadable> for Refusal {
    fn from(unreadable: Unreadable) -> Self {
        let reason = match unreadable {
            Unreadable::Malformed => Reason::Malformed,
            Unreadable::Checksum => Reason::Checksum,
            Unreadable::Region(_) => Reason::Invalid,
        };
        Self::new(reason, unreadable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_the_words_of_the_protocol() {
        let words = [
            Reason::Malformed,
            Reason::Checksum,
            Reason::Base,
            Reason::Version,
            Reason::Epoch,
            Reason::TooLarge,
            Reason::Unsafe,
            Reason::Invalid,
            Reason::Unwritable,
        ]
        .map(Reason::as_str);
        let proto = include_str!("../../../proto/proto/control.proto");
        assert!(proto.contains(&format!("a stable word: {}", words.join(", "))));
    }

    #[test]
    fn errors_are_bounded() {
        let refusal = Refusal::of(Reason::Invalid, (0..100).map(|_| "ä".repeat(1_000)));
        assert_eq!((refusal.errors.len(), refusal.errors[0].chars().count()), (MOST_ERRORS, MOST_ERROR));
    }
}
