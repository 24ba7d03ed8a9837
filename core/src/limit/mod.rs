//! How much a caller may ask for: token buckets, priority classes, one bucket for each of a million
//! keys, and quotas that a region's gateways share.
//!
//! The rule: a decision is exact for its bucket, memory is bounded, and no caller can take another
//! one's tokens or places. Buckets are single numbers, so that a process can keep one in an atomic.
//!
//! * [`gcra`]: one bucket; what each class must leave in it.
//! * [`headers`]: a decision as `RateLimit`, `RateLimit-Policy` and `Retry-After`.
//! * [`table`]: a bucket for each key, forgotten when full.
//! * [`sources`]: a bucket for each network, for answers to senders who may be forged.
//! * [`quota`]: a gateway's slice of a quota of its region, and what all slices admit at most.
//! * [`lease`]: how the slices are cut, as Redis does it.

pub mod gcra;
pub mod headers;
pub mod lease;
pub mod quota;
pub mod sources;
pub mod table;

pub use gcra::{Decision, Gcra, InvalidLimit, Rate, Reserves};
pub use quota::{Quota, QuotaSettings, Slice, Standing};
pub use table::{Judged, Key, Table, TableBounds};

use std::fmt;

/// How much a request matters, from the most important to the least: `Critical < Low`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    Critical,
    High,
    #[default]
    Normal,
    Low,
}

impl Class {
    pub const ALL: [Self; 4] = [Self::Critical, Self::High, Self::Normal, Self::Low];

    /// The class of a request with Triton's `priority` parameter: 0 is the tenant's `default`, 1 is
    /// critical, 2 high, 3 normal, anything above low. Never above the tenant's `maximum`.
    pub fn of_priority(priority: u64, default: Self, maximum: Self) -> Self {
        let asked = match priority {
            0 => default,
            1 => Self::Critical,
            2 => Self::High,
            3 => Self::Normal,
            _ => Self::Low,
        };
        asked.max(maximum)
    }

    /// The class that an operator writes as `critical`, `high`, `normal` or `low`.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == text)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_is_a_class_capped_by_the_tenant() {
        use Class::{Critical, High, Low, Normal};
        for (priority, default, maximum, class) in [
            (0, Normal, Critical, Normal),
            (0, Critical, High, High),
            (1, Normal, Critical, Critical),
            (1, Normal, Low, Low),
            (2, Normal, Critical, High),
            (3, Low, Critical, Normal),
            (3, Low, High, Normal),
            (4, Normal, Critical, Low),
            (u64::MAX, Normal, Critical, Low),
        ] {
            assert_eq!(Class::of_priority(priority, default, maximum), class, "{priority} {default} {maximum}");
        }
    }

    #[test]
    fn classes_are_ordered_and_read_back() {
        assert!(Class::ALL.is_sorted());
        assert!(Class::ALL.into_iter().all(|class| Class::parse(class.name()) == Some(class)));
        assert_eq!(Class::parse("Critical"), None);
    }
}
