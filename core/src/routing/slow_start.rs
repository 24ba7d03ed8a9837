//! How much of its weight a pod has that is new, or healed: a share that rises with its age, so that
//! cold caches and lazy set-up meet few requests.

use std::time::Duration;

/// How long a pod's weight rises unless configured otherwise.
pub const SLOW_START: Duration = Duration::from_secs(30);

/// The share that a pod begins with: enough that it is not forgotten. Envoy's default.
const MIN_SHARE: f64 = 0.1;

/// The share of its weight that a pod has at an age: max(10 %, age / window), and all of it from
/// `window` on. A window of zero switches slow start off.
///
/// Envoy, "Slow start mode", with aggression 1.0.
pub fn slow_start(age: Duration, window: Duration) -> f64 {
    if age >= window { 1.0 } else { age.div_duration_f64(window).max(MIN_SHARE) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_share_rises_in_a_line_from_a_tenth() {
        let at = |seconds| slow_start(Duration::from_secs(seconds), SLOW_START);
        assert_eq!([at(0), at(2), at(3), at(15), at(29)], [0.1, 0.1, 0.1, 0.5, 29.0 / 30.0]);
        assert_eq!([at(30), at(31), at(u64::MAX)], [1.0; 3]);
    }

    #[test]
    fn a_window_of_zero_switches_it_off() {
        assert_eq!(slow_start(Duration::ZERO, Duration::ZERO), 1.0);
        assert_eq!(slow_start(Duration::ZERO, Duration::from_nanos(1)), 0.1);
        assert_eq!(slow_start(Duration::ZERO, Duration::MAX), 0.1);
    }

    proptest! {
        #[test]
        fn an_older_pod_never_has_less(age: Duration, more: Duration, window: Duration) {
            let (young, old) = (slow_start(age, window), slow_start(age.saturating_add(more), window));
            prop_assert!(0.1 <= young && young <= old && old <= 1.0);
        }
    }
}
