//! Which roots are trusted, and under which of them is signed: how one root follows another.
//!
//! The rule: a root signs only after all nodes had the time to hear of it, and is trusted until its last leaf has
//! ended. So at every moment each leaf that may exist leads to a root that everyone trusts.
//!
//! ```text
//! settled --announce--> announced --notice has passed--> signing --overlap has passed--> settled
//!    ^                      |          (both are          (both are
//!    '------withdraw--------'           trusted, the       trusted, the
//!                                       old one signs)     new one signs)
//! ```
//!
//! An overlap is the longest life of a leaf and one notice more: for those who sign and hear of it late.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// SHA-256 of a root's DER.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId(pub [u8; 32]);

impl RootId {
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let digits: Vec<u8> = text.bytes().map(hex).collect::<Option<_>>()?;
        if digits.len() != 64 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Some(Self(bytes))
    }
}

fn hex(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for RootId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RootId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("no SHA-256 in 64 hexadecimal digits"))
    }
}

/// How long each stage takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Until the new root signs: nodes ask several times within it.
    pub notice: Duration,
    /// Of the leaves that are given.
    pub longest_life: Duration,
}

impl Pace {
    fn overlap(&self) -> Duration {
        self.longest_life.saturating_add(self.notice)
    }
}

/// Where a rotation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "kebab-case")]
pub enum Stage {
    Settled,
    /// `next` is trusted and does not sign yet.
    Announced {
        next: RootId,
        since: SystemTime,
    },
    /// `previous` is trusted and signs no more.
    Signing {
        previous: RootId,
        since: SystemTime,
    },
}

impl Stage {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Settled => "settled",
            Self::Announced { .. } => "announced",
            Self::Signing { .. } => "signing",
        }
    }
}

/// The roots of a trust domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// Leaves lead to it from now on.
    pub signs: RootId,
    #[serde(flatten)]
    pub stage: Stage,
}

/// The operator's fault: the rotation stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotNow {
    #[error("a rotation is under way: its stage is '{0}'")]
    UnderWay(&'static str),
    #[error("this root signs already")]
    SignsAlready,
    #[error("no root is announced; one that signs cannot be withdrawn")]
    NotAnnounced,
}

impl Rotation {
    pub fn settled(signs: RootId) -> Self {
        Self { signs, stage: Stage::Settled }
    }

    /// The other root that is trusted: the one to come, or the one that goes.
    pub fn other(&self) -> Option<RootId> {
        match self.stage {
            Stage::Settled => None,
            Stage::Announced { next, .. } => Some(next),
            Stage::Signing { previous, .. } => Some(previous),
        }
    }

    /// All that are trusted, the one that signs first.
    pub fn trusted(&self) -> impl Iterator<Item = RootId> {
        std::iter::once(self.signs).chain(self.other())
    }

    /// Another root is trusted from now on, and will sign.
    pub fn announce(&self, next: RootId, now: SystemTime) -> Result<Self, NotNow> {
        match self.stage {
            Stage::Settled if next == self.signs => Err(NotNow::SignsAlready),
            Stage::Settled => Ok(Self { stage: Stage::Announced { next, since: now }, ..*self }),
            stage => Err(NotNow::UnderWay(stage.name())),
        }
    }

    /// The announced root is not trusted any more.
    pub fn withdraw(&self) -> Result<Self, NotNow> {
        match self.stage {
            Stage::Announced { .. } => Ok(Self::settled(self.signs)),
            _ => Err(NotNow::NotAnnounced),
        }
    }

    /// When the next stage begins by itself.
    pub fn next_stage(&self, pace: &Pace) -> Option<SystemTime> {
        match self.stage {
            Stage::Settled => None,
            Stage::Announced { since, .. } => since.checked_add(pace.notice),
            Stage::Signing { since, .. } => since.checked_add(pace.overlap()),
        }
    }

    /// The next stage, if its time has come.
    pub fn advance(&self, now: SystemTime, pace: &Pace) -> Option<Self> {
        self.next_stage(pace).filter(|due| *due <= now)?;
        match self.stage {
            Stage::Settled => None,
            Stage::Announced { next, .. } => {
                Some(Self { signs: next, stage: Stage::Signing { previous: self.signs, since: now } })
            }
            Stage::Signing { .. } => Some(Self::settled(self.signs)),
        }
    }
}

#[cfg(test)]
#[path = "rotation_tests.rs"]
mod tests;
