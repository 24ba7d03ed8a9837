//! What probes saw, until it is sent: the newest, bounded.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use spillway_proto::control::Sighting;
use tokio::sync::Notify;

/// Gateways of a large fleet, three times each.
const MOST: usize = 4_096;
/// Sightings of one message.
const BATCH: usize = 1_024;

/// Takes sightings from whoever probes. Where nobody takes them away, the oldest are dropped. Cheap to clone; all
/// clones are the same.
#[derive(Clone, Debug)]
pub struct SightingLog(Arc<Waiting>);

#[derive(Debug)]
struct Waiting {
    sightings: Mutex<VecDeque<Sighting>>,
    /// Somebody added to them.
    added: Notify,
    dropped: Counter,
}

impl SightingLog {
    /// `dropped` counts those that nobody took away in time.
    pub fn new(dropped: Counter) -> Self {
        Self(Arc::new(Waiting { sightings: Mutex::default(), added: Notify::new(), dropped }))
    }

    pub fn record(&self, new: impl IntoIterator<Item = Sighting>) {
        let mut sightings = self.0.sightings.lock();
        sightings.extend(new);
        let beyond = sightings.len().saturating_sub(MOST);
        sightings.drain(..beyond);
        drop(sightings);
        self.0.dropped.inc_by(beyond as u64);
        self.0.added.notify_one();
    }

    /// The oldest that wait, at least one and at most 1,024. Loses none if it is given up.
    pub async fn take(&self) -> Vec<Sighting> {
        loop {
            let added = self.0.added.notified();
            {
                let mut sightings = self.0.sightings.lock();
                let batch = sightings.len().min(BATCH);
                if batch > 0 {
                    return sightings.drain(..batch).collect();
                }
            }
            added.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_are_kept_and_those_dropped_are_counted() {
        let log = SightingLog::new(Counter::default());
        let seen = |number: usize| Sighting { round_trip_us: number as u64, ..Sighting::default() };
        log.record((0..MOST + 10).map(seen));
        assert_eq!(log.0.dropped.get(), 10);
        let first = log.take().await;
        assert_eq!((first.len(), first[0].round_trip_us), (BATCH, 10));
        for _ in 1..MOST / BATCH {
            assert_eq!(log.take().await.len(), BATCH);
        }
        let waiting = tokio::spawn({
            let log = log.clone();
            async move { log.take().await.len() }
        });
        tokio::task::yield_now().await;
        log.record([seen(1), seen(2)]);
        assert_eq!(waiting.await.unwrap(), 2);
    }
}
