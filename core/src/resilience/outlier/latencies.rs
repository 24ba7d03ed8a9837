//! What good answers of a pool usually take, in a logarithmic histogram.

use std::time::Duration;

/// A bucket is a quarter of an octave, so a quantile is at most 2^(1/4), 19 %, too high.
const PER_OCTAVE: f64 = 4.0;
/// 1 µs to 2^27 µs = 134 s.
const BUCKETS: usize = 27 * PER_OCTAVE as usize;

/// The latencies of the last one to two windows.
#[derive(Clone, Debug)]
pub(super) struct Latencies {
    now: [u32; BUCKETS],
    before: [u32; BUCKETS],
    began: Duration,
}

/// What good answers of a pool take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usual {
    pub median: Duration,
    pub p99: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { now: [0; BUCKETS], before: [0; BUCKETS], began: Duration::ZERO }
    }
}

impl Latencies {
    pub fn add(&mut self, log2_micros: f64) {
        let bucket = ((log2_micros * PER_OCTAVE) as usize).min(BUCKETS - 1);
        self.now[bucket] = self.now[bucket].saturating_add(1);
    }

    /// Forgets what is older than two windows.
    pub fn rotate(&mut self, now: Duration, window: Duration) {
        let age = now.saturating_sub(self.began);
        if age >= window {
            let recent = age < window.saturating_mul(2);
            self.before = if recent { self.now } else { [0; BUCKETS] };
            self.now = [0; BUCKETS];
            self.began = now;
        }
    }

    /// `None` for less than `min_samples`.
    pub fn usual(&self, min_samples: u32) -> Option<Usual> {
        let all: u64 = self.counts().sum();
        let quantile = |hundredths: u64| {
            let rank = (all * hundredths).div_ceil(100);
            let bucket = self.counts().scan(0, |below, count| {
                *below += count;
                Some(*below)
            });
            let bucket = bucket.take_while(|up_to_here| *up_to_here < rank).count();
            Duration::from_micros(((bucket + 1) as f64 / PER_OCTAVE).exp2() as u64)
        };
        (all >= u64::from(min_samples.max(1))).then(|| Usual { median: quantile(50), p99: quantile(99) })
    }

    fn counts(&self) -> impl Iterator<Item = u64> + '_ {
        self.now.iter().zip(&self.before).map(|(now, before)| u64::from(*now) + u64::from(*before))
    }
}

/// 0 for a microsecond and less.
pub(super) fn log2_micros(time: Duration) -> f64 {
    (time.as_micros().max(1) as f64).log2()
}

/// Never panics: what is no duration is the longest one.
pub(super) fn scaled(time: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(time.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_at_most_a_bucket_too_high() {
        let mut latencies = Latencies::default();
        for micros in 1..=10_000 {
            latencies.add(log2_micros(Duration::from_micros(micros)));
        }
        let usual = latencies.usual(50).unwrap();
        for (quantile, exact) in [(usual.median, 5_000.0), (usual.p99, 9_900.0)] {
            let ratio = quantile.as_secs_f64() * 1e6 / exact;
            assert!((1.0..1.2).contains(&ratio), "{quantile:?} for {exact} µs");
        }
    }

    #[test]
    fn old_latencies_are_forgotten_after_two_windows() {
        let window = Duration::from_secs(10);
        let mut latencies = Latencies::default();
        (0..50).for_each(|_| latencies.add(10.0));
        latencies.rotate(Duration::from_secs(11), window);
        assert!(latencies.usual(50).is_some());
        assert!(latencies.usual(51).is_none(), "too few");
        latencies.rotate(Duration::from_secs(22), window);
        assert!(latencies.usual(1).is_none());
    }

    #[test]
    fn extremes_stay_in_range() {
        let mut latencies = Latencies::default();
        for time in [Duration::ZERO, Duration::MAX] {
            latencies.add(log2_micros(time));
        }
        assert!(latencies.usual(1).unwrap().p99 > Duration::from_secs(100));
        assert_eq!(scaled(Duration::MAX, 2.0), Duration::MAX);
        assert_eq!(scaled(Duration::from_secs(1), f64::NAN), Duration::MAX);
    }
}
