//! Whether the nodes with a new version do worse than those without.
//!
//! The rule: worse is what is both noticeable and no accident, on enough requests of either side; on fewer, nothing is
//! said. What is overload's fault is left out by whoever measures.
//!
//! ```text
//! errors:  p1 - p2 > errors_more  and  p1 - p2 > confidence x sqrt(p (1 - p) (1/n1 + 1/n2))   p: of both together
//! latency: l1 > latency_factor x l2 + latency_more     l: mean of the samples' p99, weighted by their requests
//! ```
//!
//! The first is the two-proportion z-test, one-sided: 3 standard errors are passed by chance once in 700 looks.

use std::time::Duration;

/// When a canary counts as worse.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparisonSettings {
    /// Requests of either side without which nothing is said. Default 200.
    pub samples: u64,
    /// Share of errors more than the peers'. Default 0.01.
    pub errors_more: f64,
    /// Standard errors of the difference. Default 3.
    pub confidence: f64,
    /// Multiple of the peers' p99. Default 1.5.
    pub latency_factor: f64,
    /// And so much more. Default 10 ms.
    pub latency_more: Duration,
}

impl Default for ComparisonSettings {
    fn default() -> Self {
        Self {
            samples: 200,
            errors_more: 0.01,
            confidence: 3.0,
            latency_factor: 1.5,
            latency_more: Duration::from_millis(10),
        }
    }
}

/// What a node measured between two heartbeats, all of it with one version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    pub requests: u64,
    /// Of these, those that failed by the fleet's own fault.
    pub errors: u64,
    pub p99: Option<Duration>,
}

/// How the new version is worse.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Worse {
    #[error("{:.2} % errors, its peers {:.2} %", .canary * 100.0, .peers * 100.0)]
    Errors { canary: f64, peers: f64 },
    #[error("p99 {canary:?}, its peers {peers:?}")]
    Latency { canary: Duration, peers: Duration },
}

/// Samples added up. 32 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Tally {
    requests: u64,
    errors: u64,
    /// Of the requests, those of samples with a p99, and these p99 times the requests, in seconds.
    timed: u64,
    time: f64,
}

impl Tally {
    pub fn add_sample(&mut self, sample: &Sample) {
        let timed = sample.p99.map(|p99| (sample.requests, p99.as_secs_f64() * sample.requests as f64));
        let (timed, time) = timed.unwrap_or_default();
        self.add(&Self { requests: sample.requests, errors: sample.errors.min(sample.requests), timed, time });
    }

    pub fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.errors = self.errors.saturating_add(other.errors);
        self.timed = self.timed.saturating_add(other.timed);
        self.time += other.time;
    }

    pub fn is_enough(&self, settings: &ComparisonSettings) -> bool {
        self.requests >= settings.samples.max(1)
    }

    /// How this is worse than what the peers measured, if it is.
    pub fn worse_than(&self, peers: &Self, settings: &ComparisonSettings) -> Option<Worse> {
        if !self.is_enough(settings) || !peers.is_enough(settings) {
            return None;
        }
        let ([canary, of_peers], [n1, n2]) = ([self, peers].map(Self::error_share), [self, peers].map(Self::count));
        let both = (canary * n1 + of_peers * n2) / (n1 + n2);
        let chance = settings.confidence * (both * (1.0 - both) * (1.0 / n1 + 1.0 / n2)).max(0.0).sqrt();
        if canary - of_peers > settings.errors_more.max(chance) {
            return Some(Worse::Errors { canary, peers: of_peers });
        }
        let [canary, of_peers] = [self.p99(settings)?, peers.p99(settings)?];
        let most = settings.latency_factor * of_peers + settings.latency_more.as_secs_f64();
        let time = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        (canary > most).then(|| Worse::Latency { canary: time(canary), peers: time(of_peers) })
    }

    fn count(&self) -> f64 {
        self.requests as f64
    }

    fn error_share(&self) -> f64 {
        self.errors as f64 / self.requests as f64
    }

    /// In seconds, if enough requests were timed.
    fn p99(&self, settings: &ComparisonSettings) -> Option<f64> {
        (self.timed >= settings.samples.max(1)).then(|| self.time / self.timed as f64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tally(requests: u64, errors: u64, p99: u64) -> Tally {
        let mut tally = Tally::default();
        tally.add_sample(&Sample { requests, errors, p99: Some(Duration::from_millis(p99)) });
        tally
    }

    fn judge(canary: Tally, peers: Tally) -> Option<&'static str> {
        canary.worse_than(&peers, &ComparisonSettings::default()).map(|worse| match worse {
            Worse::Errors { .. } => "errors",
            Worse::Latency { .. } => "latency",
        })
    }

    #[test]
    fn worse_is_noticeable_no_accident_and_on_enough_requests() {
        for (canary, peers, verdict) in [
            (tally(1_000, 0, 20), tally(9_000, 0, 20), None),
            (tally(1_000, 50, 20), tally(9_000, 90, 20), Some("errors")),
            (tally(199, 199, 20), tally(9_000, 0, 20), None),
            (tally(200, 200, 20), tally(199, 0, 20), None),
            (tally(200, 200, 20), tally(200, 0, 20), Some("errors")),
            // Three standard errors of 200 at 2 % are 4 %.
            (tally(200, 7, 20), tally(200, 2, 20), None),
            (tally(200, 16, 20), tally(200, 2, 20), Some("errors")),
            // 0.5 % more is no accident on so many, but not noticeable.
            (tally(1_000_000, 6_000, 20), tally(1_000_000, 1_000, 20), None),
            (tally(1_000_000, 12_000, 20), tally(1_000_000, 1_000, 20), Some("errors")),
            (tally(1_000, 0, 20), tally(9_000, 9_000, 20), None),
            (tally(1_000, 0, 39), tally(9_000, 0, 20), None),
            (tally(1_000, 0, 41), tally(9_000, 0, 20), Some("latency")),
            (tally(1_000, 0, 2_000), tally(199, 0, 20), None),
            (tally(u64::MAX, u64::MAX, u64::MAX), tally(u64::MAX, 0, 0), Some("errors")),
        ] {
            assert_eq!(judge(canary, peers), verdict, "{canary:?} {peers:?}");
        }
    }

    #[test]
    fn samples_add_up_by_their_requests() {
        let mut sum = tally(300, 3, 10);
        sum.add(&tally(100, 1, 50));
        sum.add_sample(&Sample { requests: 600, errors: 900, p99: None });
        assert_eq!((sum.requests, sum.errors, sum.timed), (1_000, 604, 400));
        assert!((sum.p99(&ComparisonSettings::default()).unwrap() - 0.020).abs() < 1e-9);
        assert_eq!(judge(Tally::default(), sum), None);
        let slow = Tally { timed: 199, ..tally(1_000, 0, 9_000) };
        assert_eq!(judge(slow, tally(1_000, 0, 1)), None, "too few were timed");
    }

    #[test]
    fn people_are_told_both_figures() {
        let worse = tally(1_000, 50, 20).worse_than(&tally(9_000, 90, 20), &ComparisonSettings::default()).unwrap();
        assert_eq!(worse.to_string(), "5.00 % errors, its peers 1.00 %");
        let worse = tally(1_000, 0, 100).worse_than(&tally(9_000, 0, 20), &ComparisonSettings::default()).unwrap();
        assert_eq!(worse.to_string(), "p99 100ms, its peers 20ms");
    }

    proptest! {
        #[test]
        fn no_measurement_is_too_odd_and_more_errors_never_look_better(
            canary: [u64; 3], peers: [u64; 3], more: u64, confidence in prop::num::f64::ANY,
        ) {
            let settings = ComparisonSettings { confidence, ..ComparisonSettings::default() };
            let [canary, peers] = [canary, peers].map(|[requests, errors, p99]| tally(requests, errors, p99));
            canary.worse_than(&peers, &settings);
            let worse = Tally { errors: canary.errors.saturating_add(more).min(canary.requests), ..canary };
            let found = judge(canary, peers) == Some("errors");
            // The chance of an accident is the greatest at a half.
            prop_assert!(!found || judge(worse, peers) == Some("errors"), "{canary:?} {worse:?} {peers:?}");
        }
    }
}
