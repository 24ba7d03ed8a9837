//! A sidecar by itself: what its feature look-ups take, beside Feast, and what its process costs in front of a
//! model server.
//!
//! * [`lookup`]: look-ups tier by tier, with [`feast`] on the same Redis between them.
//! * [`cpu`]: CPU of a sidecar's process at a fixed rate, beside Envoy in its place.
//! * [`ground`]: where, also for [`super::path`]; [`callers`]: who asks; [`model_server`]: who answers;
//!   [`envoy`]: Envoy in a gateway's or a sidecar's place.

pub mod callers;
pub mod cpu;
pub mod envoy;
pub mod feast;
pub mod ground;
pub mod lookup;
pub mod model_server;

use std::time::Duration;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub repetitions: usize,
    /// What counts in each repetition.
    pub measure: Duration,
}

impl Extent {
    /// Only to see that everything runs and answers rightly.
    pub const SMOKE: Self = Self { repetitions: 1, measure: Duration::from_millis(200) };

    /// Before anything counts.
    pub fn warm_up(&self) -> Duration {
        self.measure / 4
    }
}

impl Default for Extent {
    fn default() -> Self {
        Self { repetitions: 5, measure: Duration::from_millis(1_600) }
    }
}

/// Whose turn it is, repetition by repetition. Who begins changes each time, so that a machine that slows down
/// slows all of them.
pub fn turns(subjects: usize, repetitions: usize) -> impl Iterator<Item = usize> {
    (0..repetitions).flat_map(move |repetition| {
        (0..subjects).map(move |place| if repetition % 2 == 0 { place } else { subjects - 1 - place })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_begins_changes_each_time() {
        assert_eq!(turns(3, 3).collect::<Vec<_>>(), [0, 1, 2, 2, 1, 0, 0, 1, 2]);
    }
}
