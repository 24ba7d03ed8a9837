//! Settings of the outlier rules.

use std::time::Duration;

/// When a pod is out, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierSettings {
    /// Failures in a row that eject at once. 5, as Envoy; 0: never.
    pub consecutive_failures: u32,
    /// How far back the share of successes and the latency look. 10 s.
    pub window: Duration,
    /// Calls within `window` before a pod's share of successes or latency says anything. 50.
    pub min_samples: u32,
    /// A share of successes this many standard deviations below the mean of the other pods ejects. 1.9, as Envoy.
    pub success_deviations: f64,
    /// ... but only if it is also below that mean by this share: equal pods deviate by next to nothing. 0.1.
    pub success_margin: f64,
    /// A share of successes below this ejects, whatever the others have. 0.5.
    pub success_floor: f64,
    /// A mean latency of more than this many times the median of the other pods ejects. 3; 0: never.
    pub latency_factor: f64,
    /// Mean latencies up to this never eject. 20 ms.
    pub latency_min: Duration,
    /// A pod is suspect when it owes an answer for longer than this many times the pool's p99. 3.
    pub suspect_factor: f64,
    /// ... and for longer than this. 50 ms.
    pub suspect_min: Duration,
    /// A pod is ejected when it owes an answer for longer than this many times the pool's p99. 10.
    pub silence_factor: f64,
    /// ... and for longer than this. 500 ms.
    pub silence_min: Duration,
    /// The first ejection. 1 s; each further one is twice as long.
    pub base_ejection: Duration,
    /// The longest ejection. 8 s, so that a healed pod is back within 15 s.
    pub max_ejection: Duration,
    /// A pod that is in for this long has one ejection forgotten. 10 s.
    pub forgive_after: Duration,
    /// Good probes in a row that bring a pod back. 3.
    pub probe_successes: u32,
    /// The largest share of the pool that may be out. 0.5, which is also the most.
    pub max_ejected: f64,
}

impl Default for OutlierSettings {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            window: Duration::from_secs(10),
            min_samples: 50,
            success_deviations: 1.9,
            success_margin: 0.1,
            success_floor: 0.5,
            latency_factor: 3.0,
            latency_min: Duration::from_millis(20),
            suspect_factor: 3.0,
            suspect_min: Duration::from_millis(50),
            silence_factor: 10.0,
            silence_min: Duration::from_millis(500),
            base_ejection: Duration::from_secs(1),
            max_ejection: Duration::from_secs(8),
            forgive_after: Duration::from_secs(10),
            probe_successes: 3,
            max_ejected: 0.5,
        }
    }
}

/// Slots of the sliding window.
pub(super) const SLOTS: usize = 10;

impl OutlierSettings {
    /// The number of the tenth of a window in which `now` lies.
    pub(super) fn slot(&self, now: Duration) -> u64 {
        micros(now) / (micros(self.window) / SLOTS as u64).max(1)
    }

    /// How long a pod is out that was out `before` times: doubled each time.
    pub(super) fn ejection_time(&self, before: u32) -> Duration {
        self.base_ejection.saturating_mul(1 << before.min(31)).min(self.max_ejection)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
