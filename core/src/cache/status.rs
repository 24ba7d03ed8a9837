//! What an answer says about the cache: its `Cache-Status` (RFC 9211).
//!
//! The rule: what holds no number is a fixed text, so that most answers write nothing.

use std::fmt;

/// How the cache took part in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Answered from what was stored. `ttl` is the seconds left of its freshness, below 0 where it was stale.
    Hit { tier: Tier, ttl: i64 },
    /// The model was asked. `collapsed`: once for several requests. `stored`: the answer was kept.
    Forwarded { why: Forwarded, collapsed: bool, stored: bool },
    /// The model was asked and failed; a stale answer took its place.
    StaleIfError,
    /// The cache took no part.
    Bypass(Bypass),
    /// The request wanted nothing but a stored answer, and there is none.
    OnlyIfCached,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// This gateway's memory.
    L1,
    /// The region's Redis.
    L2,
}

/// Why the model was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// Nothing was stored.
    Miss,
    /// What was stored was stale.
    Stale,
    /// The request's wish did not allow what was stored.
    Request,
}

/// Why the cache took no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bypass {
    /// The model is not cached.
    Off,
    /// Looking up does not pay for this model now.
    Guard,
    /// The request's answer belongs to it alone: of a sequence, of a stream, of too many rows.
    Uncacheable,
    /// Feature changes are not heard.
    Deaf,
}

impl Status {
    /// The header's value where it holds no number; else it is written by [`fmt::Display`].
    pub fn fixed(self) -> Option<&'static str> {
        use Forwarded::{Miss, Request, Stale};
        Some(match self {
            Self::Hit { .. } => return None,
            Self::Forwarded { why, collapsed, stored } => match (why, collapsed, stored) {
                (Miss, false, false) => "spillway; fwd=miss",
                (Miss, false, true) => "spillway; fwd=miss; stored",
                (Miss, true, false) => "spillway; fwd=miss; collapsed",
                (Miss, true, true) => "spillway; fwd=miss; collapsed; stored",
                (Stale, false, false) => "spillway; fwd=stale",
                (Stale, false, true) => "spillway; fwd=stale; stored",
                (Stale, true, false) => "spillway; fwd=stale; collapsed",
                (Stale, true, true) => "spillway; fwd=stale; collapsed; stored",
                (Request, false, false) => "spillway; fwd=request",
                (Request, false, true) => "spillway; fwd=request; stored",
                (Request, true, false) => "spillway; fwd=request; collapsed",
                (Request, true, true) => "spillway; fwd=request; collapsed; stored",
            },
            Self::StaleIfError => "spillway; fwd=stale; detail=stale-if-error",
            Self::Bypass(Bypass::Off) => "spillway; fwd=bypass",
            Self::Bypass(Bypass::Guard) => "spillway; fwd=bypass; detail=guard",
            Self::Bypass(Bypass::Uncacheable) => "spillway; fwd=bypass; detail=uncacheable",
            Self::Bypass(Bypass::Deaf) => "spillway; fwd=bypass; detail=deaf",
            Self::OnlyIfCached => "spillway; detail=only-if-cached",
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hit { tier: Tier::L1, ttl } => write!(f, "spillway; hit; ttl={ttl}; detail=l1"),
            Self::Hit { tier: Tier::L2, ttl } => write!(f, "spillway; hit; ttl={ttl}; detail=l2"),
            other => f.write_str(other.fixed().unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Status> {
        let mut all = vec![Status::StaleIfError, Status::OnlyIfCached];
        for tier in [Tier::L1, Tier::L2] {
            all.extend([i64::MIN, -3, 0, 300, i64::MAX].map(|ttl| Status::Hit { tier, ttl }));
        }
        for why in [Forwarded::Miss, Forwarded::Stale, Forwarded::Request] {
            let flags = [(false, false), (false, true), (true, false), (true, true)];
            all.extend(flags.map(|(collapsed, stored)| Status::Forwarded { why, collapsed, stored }));
        }
        let bypasses = [Bypass::Off, Bypass::Guard, Bypass::Uncacheable, Bypass::Deaf];
        all.extend(bypasses.map(Status::Bypass));
        all
    }

    #[test]
    fn every_outcome_has_its_own_well_formed_value() {
        let all = all();
        let mut texts: Vec<String> = all.iter().map(Status::to_string).collect();
        for (status, text) in all.iter().zip(&texts) {
            let mut parts = text.split("; ");
            assert_eq!(parts.next(), Some("spillway"));
            let parameters: Vec<(&str, Option<&str>)> = parts
                .map(|part| part.split_once('=').map_or((part, None), |(name, value)| (name, Some(value))))
                .collect();
            let has = |name: &str| parameters.iter().any(|(known, _)| *known == name);
            assert!(!(has("hit") && has("fwd")), "one or the other (RFC 9211, 2.2): {text}");
            assert!(has("fwd") || !(has("stored") || has("collapsed")), "only where forwarded (2.5, 2.6): {text}");
            for (name, value) in parameters {
                let well_formed = match (name, value) {
                    ("hit" | "stored" | "collapsed", None) => true,
                    ("fwd", Some(value)) => ["bypass", "miss", "request", "stale"].contains(&value),
                    ("ttl", Some(value)) => value.parse::<i64>().is_ok(),
                    ("detail", Some(value)) => value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'),
                    _ => false,
                };
                assert!(well_formed, "{text}");
            }
            assert_eq!(status.fixed().is_none(), matches!(status, Status::Hit { .. }));
        }
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), all.len(), "no two outcomes look alike");
    }

    #[test]
    fn values_read_as_clients_expect() {
        assert_eq!(Status::Hit { tier: Tier::L1, ttl: 30 }.to_string(), "spillway; hit; ttl=30; detail=l1");
        let miss = Status::Forwarded { why: Forwarded::Miss, collapsed: false, stored: true };
        assert_eq!(miss.to_string(), "spillway; fwd=miss; stored");
        assert_eq!(Status::Bypass(Bypass::Off).to_string(), "spillway; fwd=bypass");
    }
}
