//! Who may send how much.

/// How important a request is, from most to least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    Critical,
    High,
    Normal,
    Low,
}
