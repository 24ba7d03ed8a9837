//! Medians and how sure they are.

use serde::Serialize;

/// A median and the interval that holds it with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Median {
    #[serde(rename = "median")]
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl std::fmt::Display for Median {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = f.precision().unwrap_or(2);
        let Self { value, low, high } = self;
        write!(f, "{value:.digits$} [{low:.digits$}, {high:.digits$}]")
    }
}

/// The median of repetitions; its interval by the percentile bootstrap (Efron 1979), 10,000 resamples
/// from a fixed seed, so that the same samples give the same interval.
///
/// # Panics
/// If there are no samples.
pub fn median(samples: &[f64]) -> Median {
    const RESAMPLES: usize = 10_000;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let resample: Vec<f64> = (0..samples.len())
                .map(|_| {
                    // xorshift64 (Marsaglia 2003, triple 13, 7, 17).
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    samples[usize::try_from(random >> 33).unwrap_or_default() % samples.len()]
                })
                .collect();
            middle(resample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Median { value: middle(samples.to_vec()), low: quantile(&medians, 0.025), high: quantile(&medians, 0.975) }
}

/// The nearest-rank quantile of sorted, non-empty samples.
pub fn quantile<T: Copy>(sorted: &[T], share: f64) -> T {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

fn middle(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let half = samples.len() / 2;
    if samples.len() % 2 == 1 { samples[half] } else { f64::midpoint(samples[half - 1], samples[half]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let samples: Vec<u32> = (1..=100).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|share| quantile(&samples, share)), [1, 50, 99, 100]);
        assert_eq!(quantile(&[7], 0.99), 7);
    }

    #[test]
    fn the_median_lies_in_its_interval() {
        let found = median(&[3.0, 1.0, 2.0, 100.0, 2.5]);
        assert_eq!(found.value, 2.5);
        assert!(found.low >= 1.0 && found.low < 2.5 && found.high > 2.5 && found.high <= 100.0, "{found:?}");
    }

    #[test]
    fn equal_samples_leave_no_doubt() {
        assert_eq!(median(&[4.0; 5]), Median { value: 4.0, low: 4.0, high: 4.0 });
    }
}
