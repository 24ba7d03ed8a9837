//! Fresh, stale or expired, judged by event time alone.

use std::time::Duration;

/// How far a producer's clock may be ahead of ours.
pub const MAX_SKEW: Duration = Duration::from_secs(5);

/// Event times beyond this (the year 2255) are refused: Redis compares them as doubles, which are
/// exact below 2^53.
pub const MAX_EVENT_US: i64 = 1 << 53;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    Fresh,
    /// Past `freshFor`: served, and said to be stale.
    Stale,
    /// Past `retainFor`: no tier gives it any more.
    Expired,
}

impl Freshness {
    /// All times in Unix microseconds.
    pub fn at(event_us: i64, fresh_for: Duration, retain_for: Duration, now_us: i64) -> Self {
        if now_us >= until(event_us, retain_for) {
            Self::Expired
        } else if now_us >= until(event_us, fresh_for) {
            Self::Stale
        } else {
            Self::Fresh
        }
    }
}

/// `event_us` plus a duration, never wrapping.
pub fn until(event_us: i64, span: Duration) -> i64 {
    event_us.saturating_add(i64::try_from(span.as_micros()).unwrap_or(i64::MAX))
}

/// Whether an event's time may be believed.
pub fn check_event_time(event_us: i64, now_us: i64) -> Result<(), InvalidEvent> {
    if event_us <= 0 || event_us >= MAX_EVENT_US {
        Err(InvalidEvent::Range)
    } else if event_us > until(now_us, MAX_SKEW) {
        Err(InvalidEvent::Future)
    } else {
        Ok(())
    }
}

/// The producer's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEvent {
    #[error("the event time must be Unix microseconds, more than 0 and less than 2^53")]
    Range,
    #[error("the event time is more than 5 s in the future")]
    Future,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_is_counted_from_the_event() {
        let at = |now| Freshness::at(1_000_000, Duration::from_secs(1), Duration::from_secs(3), now);
        assert_eq!(at(1_999_999), Freshness::Fresh);
        assert_eq!(at(2_000_000), Freshness::Stale);
        assert_eq!(at(3_999_999), Freshness::Stale);
        assert_eq!(at(4_000_000), Freshness::Expired);
        assert_eq!(Freshness::at(i64::MAX, Duration::MAX, Duration::MAX, 5), Freshness::Fresh);
    }

    #[test]
    fn events_from_the_future_are_refused_beyond_a_small_skew() {
        let now = 1_700_000_000_000_000;
        assert_eq!(check_event_time(now + 5_000_000, now), Ok(()));
        assert_eq!(check_event_time(now + 5_000_001, now), Err(InvalidEvent::Future));
        for event in [0, -1, i64::MIN, MAX_EVENT_US, i64::MAX] {
            assert_eq!(check_event_time(event, now), Err(InvalidEvent::Range), "{event}");
        }
    }
}
