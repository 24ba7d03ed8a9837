//! When a node asks for its next leaf.
//!
//! The rule: at about half of the leaf's life, each node at a moment of its own, and early enough that an authority
//! which is away for half of a life is not noticed.
//!
//! ```text
//! first attempt = begin + life × (0.45 + 0.025 × draw)              draw: uniform, 0 to 1
//! rest(n)       = min(2^n s, 0.015 × life) × (0.5 + 0.5 × draw)     after n failures, at least 10 ms
//! ```
//!
//! The band is the lower part of half of a life ± 10 %: with the longest rest the last first attempt leaves
//! 1 − 0.475 − 0.015 = 0.51 of the life for an authority to come back. Of 24 h, the band is 36 minutes wide.

use std::time::{Duration, SystemTime};

const EARLIEST: f64 = 0.45;
const SPREAD: f64 = 0.025;
/// Of a life.
const LONGEST_REST: f64 = 0.015;
const SHORTEST_REST: Duration = Duration::from_millis(10);
/// After that, doubling has long met the longest rest.
const DOUBLINGS: u32 = 20;

/// When a leaf is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Life {
    /// When the next leaf is first asked for; `draw` is uniform from 0 to 1.
    pub fn first_attempt(&self, draw: f64) -> SystemTime {
        self.not_before + self.length().mul_f64(EARLIEST + SPREAD * draw.clamp(0.0, 1.0))
    }

    /// How long the next attempt waits after so many failures in a row; `draw` is uniform from 0 to 1.
    pub fn rest(&self, failures: u32, draw: f64) -> Duration {
        let doubled = Duration::from_secs(1 << failures.min(DOUBLINGS));
        let longest = self.length().mul_f64(LONGEST_REST);
        doubled.min(longest).mul_f64(0.5 + 0.5 * draw.clamp(0.0, 1.0)).max(SHORTEST_REST)
    }

    fn length(&self) -> Duration {
        self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3_600;

    fn life(seconds: u64) -> Life {
        let not_before = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        Life { not_before, not_after: not_before + Duration::from_secs(seconds) }
    }

    #[test]
    fn the_first_attempt_is_at_half_of_a_life_less_up_to_a_tenth() {
        let day = life(24 * HOUR);
        for (draw, minutes) in [(-1.0, 648), (0.0, 648), (0.5, 666), (1.0, 684), (f64::INFINITY, 684)] {
            assert_eq!(day.first_attempt(draw), day.not_before + Duration::from_secs(minutes * 60), "{draw}");
        }
    }

    #[test]
    fn rests_double_up_to_a_share_of_the_life() {
        let rests = |seconds: u64| [0, 1, 2, 5, 10, 50].map(|failures| life(seconds).rest(failures, 1.0).as_millis());
        assert_eq!(rests(24 * HOUR), [1_000, 2_000, 4_000, 32_000, 1_024_000, 1_296_000]);
        assert_eq!(rests(HOUR), [1_000, 2_000, 4_000, 32_000, 54_000, 54_000]);
        assert_eq!(rests(4), [60; 6]);
        assert_eq!(rests(0), [10; 6], "a life that is none does not make its node spin");
    }

    proptest! {
        #[test]
        fn an_authority_that_is_away_for_half_of_a_life_is_not_noticed(
            seconds in 10u64..400 * 24 * HOUR,
            begin in 0.0f64..1.0,
            draws in proptest::collection::vec(0.0f64..=1.0, 8),
        ) {
            let life = life(seconds);
            let away_from = life.not_before + life.length().mul_f64(begin);
            let away_to = away_from + life.length() / 2;
            let mut now = life.first_attempt(draws[0]);
            let mut failures = 0;
            while now >= away_from && now < away_to {
                let draw = draws[(failures as usize + 1) % draws.len()];
                now += life.rest(failures, draw);
                failures += 1;
            }
            prop_assert!(now < life.not_after, "{:?} late", now.duration_since(life.not_after));
            // Nor do nodes flood it while it is away.
            prop_assert!(failures < 100, "{} attempts", failures);
        }
    }
}
