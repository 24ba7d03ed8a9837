//! Quantiles of recent latencies in fixed memory.
//!
//! A log-linear histogram in the manner of HdrHistogram: latencies below 16 us are counted by the
//! microsecond, each octave above in 16 buckets of equal width, up to 60 s. A quantile is the middle of its
//! bucket, so it is off by at most half a width: 1 / 32 = 3.2 % of the true one, or 1 us.
//!
//! Two halves take turns: the one that fills and the one before it. What is older than the window is
//! never seen, what is younger than half of it always. A half counts 65,535 to a bucket; before that
//! overflows, all its counts are halved, which keeps the shape and so the quantiles.
//!
//! About 1.5 KiB; no allocation. [`Latencies::record`] is O(1), a quantile O([`BUCKETS`]).

use std::time::Duration;

/// Buckets per octave.
const WIDTHS: u32 = 16;
const LONGEST_US: u32 = 60_000_000;
/// 16 single microseconds, 21 full octaves from 2^4 us, and of the octave of 2^25 us what 60 s reaches.
pub const BUCKETS: usize = bucket(LONGEST_US) + 1;
/// How old [`Latencies::recent`] may be.
const REFRESH: Duration = Duration::from_millis(100);

/// Recent latencies, at one look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// Latencies that this is made from.
    pub samples: u32,
    pub p50: Duration,
    pub p95: Duration,
    pub p99: Duration,
}

/// The latencies of the last window.
#[derive(Clone, Debug)]
pub struct Latencies {
    halves: Halves,
    filling: Histogram,
    before: Histogram,
    recent: Recent,
    looked: Option<Duration>,
}

impl Latencies {
    pub const DEFAULT_WINDOW: Duration = Duration::from_secs(10);

    /// None yet. Latencies count for half of `window` at least, for all of it at most.
    pub fn new(window: Duration) -> Self {
        Self {
            halves: Halves::new(window),
            filling: Histogram::EMPTY,
            before: Histogram::EMPTY,
            recent: Recent::default(),
            looked: None,
        }
    }

    /// Counts one. Longer than 60 s counts as 60 s.
    pub fn record(&mut self, latency: Duration, now: Duration) {
        self.advance(now);
        self.filling.record(bucket(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX)));
    }

    /// The smallest latency that at least the share `q` of the samples do not exceed. `None` without samples.
    pub fn quantile(&mut self, q: f64, now: Duration) -> Option<Duration> {
        self.advance(now);
        let [found] = self.find([q]);
        found
    }

    /// Samples in the window; a lower bound once a bucket has overflowed.
    pub fn samples(&mut self, now: Duration) -> u32 {
        self.advance(now);
        self.filling.total + self.before.total
    }

    /// The usual quantiles, at most 100 ms old: cheap enough for every request.
    pub fn recent(&mut self, now: Duration) -> Recent {
        let current = self.looked.is_some_and(|looked| now.saturating_sub(looked) < REFRESH);
        if !current {
            self.advance(now);
            let [p50, p95, p99] = self.find([0.5, 0.95, 0.99]).map(Option::unwrap_or_default);
            self.recent = Recent { samples: self.filling.total + self.before.total, p50, p95, p99 };
            self.looked = Some(now);
        }
        self.recent
    }

    fn advance(&mut self, now: Duration) {
        match self.halves.advance(now) {
            Turned::Not => {}
            Turned::Once => self.before = std::mem::replace(&mut self.filling, Histogram::EMPTY),
            Turned::Over => (self.before, self.filling) = (Histogram::EMPTY, Histogram::EMPTY),
        }
    }

    /// The quantiles, which ascend, in one pass.
    fn find<const N: usize>(&self, quantiles: [f64; N]) -> [Option<Duration>; N] {
        let total = self.filling.total + self.before.total;
        let counts = self.filling.counts.iter().zip(&self.before.counts);
        let mut sums = counts.scan(0_u32, |sum, (one, other)| {
            *sum += u32::from(*one) + u32::from(*other);
            Some(*sum)
        });
        let mut at = sums.next().map(|sum| (0, sum));
        quantiles.map(|q| {
            // The nearest rank; what is not a number is the least.
            let rank = ((q * f64::from(total)).ceil() as u32).clamp(1, total.max(1));
            while let Some((index, sum)) = at
                && sum < rank
            {
                at = sums.next().map(|sum| (index + 1, sum));
            }
            at.map(|(index, _)| middle(index))
        })
    }
}

#[derive(Clone, Debug)]
struct Histogram {
    counts: [u16; BUCKETS],
    total: u32,
}

impl Histogram {
    const EMPTY: Self = Self { counts: [0; BUCKETS], total: 0 };

    fn record(&mut self, bucket: usize) {
        if self.counts.get(bucket) == Some(&u16::MAX) {
            self.counts.iter_mut().for_each(|count| *count = count.div_ceil(2));
            self.total = self.counts.iter().map(|count| u32::from(*count)).sum();
        }
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
            self.total += 1;
        }
    }
}

/// Where a latency is counted.
const fn bucket(us: u32) -> usize {
    let us = if us > LONGEST_US { LONGEST_US } else { us };
    if us < WIDTHS {
        return us as usize;
    }
    let octave = us.ilog2() - WIDTHS.ilog2();
    (octave * WIDTHS + (us >> octave)) as usize
}

/// The middle of a bucket.
fn middle(bucket: usize) -> Duration {
    let bucket = bucket as u32;
    let octave = (bucket / WIDTHS).saturating_sub(1);
    let least = (bucket - octave * WIDTHS) << octave;
    Duration::from_micros(u64::from(least + (1 << octave) / 2))
}

/// Time cut into halves of a window.
#[derive(Clone, Debug)]
pub(super) struct Halves {
    length_us: u64,
    current: u64,
}

/// What has passed since the last look.
pub(super) enum Turned {
    /// The same half fills.
    Not,
    /// It is the one before now.
    Once,
    /// Both are too old.
    Over,
}

impl Halves {
    pub(super) fn new(window: Duration) -> Self {
        Self { length_us: (micros(window) / 2).max(1), current: 0 }
    }

    pub(super) fn advance(&mut self, now: Duration) -> Turned {
        let half = micros(now) / self.length_us;
        let passed = half.saturating_sub(self.current);
        self.current = self.current.max(half);
        match passed {
            0 => Turned::Not,
            1 => Turned::Once,
            _ => Turned::Over,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Latencies::DEFAULT_WINDOW;

    fn us(value: u64) -> Duration {
        Duration::from_micros(value)
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        let mut last = 0;
        for value in (0..5_000).chain((5_000..=60_000_000).step_by(997)) {
            let index = bucket(value);
            assert!(index == last || index == last + 1 || value >= 5_000 && index > last, "{value} us");
            let error = middle(index).as_micros().abs_diff(u128::from(value));
            assert!(error * 32 <= u128::from(value), "{value} us is {:?}", middle(index));
            last = index;
        }
        assert_eq!(bucket(u32::MAX), BUCKETS - 1);
        assert!(size_of::<Latencies>() <= 2_048, "{} bytes", size_of::<Latencies>());
    }

    #[test]
    fn no_latency_has_no_quantile() {
        let mut latencies = Latencies::new(WINDOW);
        assert_eq!(latencies.quantile(0.5, WINDOW), None);
        assert_eq!(latencies.recent(WINDOW), Recent::default());
    }

    #[test]
    fn latencies_count_for_the_window_at_most_and_half_of_it_at_least() {
        let mut latencies = Latencies::new(WINDOW);
        latencies.record(us(10), Duration::from_millis(4_999));
        assert_eq!(latencies.samples(Duration::from_millis(9_999)), 1);
        assert_eq!(latencies.samples(Duration::from_millis(1_000)), 1, "time may step back");
        assert_eq!(latencies.samples(Duration::from_millis(10_000)), 0);
        latencies.record(us(10), Duration::from_millis(10_000));
        assert_eq!(latencies.samples(Duration::from_secs(3_600)), 0);
    }

    #[test]
    fn extreme_values_are_taken() {
        let mut latencies = Latencies::new(Duration::ZERO);
        latencies.record(Duration::MAX, Duration::MAX);
        let longest = latencies.quantile(1.0, Duration::MAX).unwrap();
        assert!(longest.abs_diff(Duration::from_secs(60)) <= Duration::from_secs(60) / 32);
        latencies.record(Duration::ZERO, Duration::MAX);
        for least in [0.0, -1.0, f64::NAN, f64::NEG_INFINITY] {
            assert_eq!(latencies.quantile(least, Duration::MAX), Some(Duration::ZERO));
        }
        assert_eq!(latencies.quantile(f64::INFINITY, Duration::MAX), Some(longest));
    }

    #[test]
    fn an_overflow_keeps_the_quantiles() {
        let mut latencies = Latencies::new(WINDOW);
        for index in 0..300_000_u64 {
            latencies.record(us(if index % 50 == 0 { 1_000 } else { 100 }), WINDOW);
        }
        assert_eq!(latencies.quantile(0.97, WINDOW), Some(middle(bucket(100))));
        assert_eq!(latencies.quantile(0.99, WINDOW), Some(middle(bucket(1_000))));
        assert!(latencies.samples(WINDOW) >= 32_768);
    }

    #[test]
    fn the_usual_quantiles_are_refreshed() {
        let mut latencies = Latencies::new(WINDOW);
        (1..=100).for_each(|value| latencies.record(us(value * 1_000), WINDOW));
        let recent = latencies.recent(WINDOW);
        assert_eq!(recent.samples, 100);
        for (found, exact) in [(recent.p50, 50), (recent.p95, 95), (recent.p99, 99)] {
            assert!(found.abs_diff(us(exact * 1_000)) <= us(exact * 1_000) / 32, "{found:?}");
        }
        latencies.record(us(1), WINDOW);
        assert_eq!(latencies.recent(WINDOW + REFRESH / 2).samples, 100);
        assert_eq!(latencies.recent(WINDOW + REFRESH).samples, 101);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn quantiles_are_within_the_stated_error_of_the_exact_ones(
            recorded in proptest::collection::vec((0_u64..200, 0_u32..26, 0.0_f64..1.0), 1..400),
            q in 0.0_f64..=1.0,
        ) {
            let (mut latencies, mut now, mut log) = (Latencies::new(WINDOW), Duration::ZERO, Vec::new());
            for (pause, octave, share) in recorded {
                now += Duration::from_millis(pause);
                let latency = Duration::from_secs_f64(f64::from(1 << octave) * (1.0 + share) / 1e6);
                latencies.record(latency, now);
                log.push((now.as_secs() / 5, latency.min(Duration::from_secs(60))));
            }
            let half = now.as_secs() / 5;
            let mut exact: Vec<_> = log.iter().filter(|(at, _)| at + 1 >= half).map(|(_, latency)| *latency).collect();
            exact.sort_unstable();
            let rank = ((q * exact.len() as f64).ceil() as usize).max(1);
            let (found, exact) = (latencies.quantile(q, now).unwrap(), exact[rank - 1]);
            prop_assert!(found.abs_diff(exact) <= (exact / 32).max(us(1)), "{:?} for {:?}", found, exact);
        }
    }
}
