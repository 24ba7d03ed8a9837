//! A writer's wait: until every listener has applied its change, or is known to give nothing any more.
//!
//! The rule: all waits of a process share one question to Redis at a time, and none lasts longer than
//! [`PATIENCE`]. A listener that crashed is waited for until its lease has run out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::feature::hearing::LEASE;
use spillway_core::feature::{Audience, Verdict};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{Changes, Metrics, pace};

/// The longest wait: a lease that was renewed a moment ago, and some time to notice its end.
pub const PATIENCE: Duration = LEASE.saturating_add(Duration::from_secs(1));

/// Listeners need about as long for a message and their word about it.
const FIRST: Duration = Duration::from_millis(1);
/// Between two questions: an eighth of the shortest wait so far, within these.
const OFTEN: Duration = Duration::from_millis(2);
const SELDOM: Duration = Duration::from_millis(20);

/// Waits at once; a write beyond is answered unconfirmed.
const MOST: usize = 65_536;

/// Why a change is not confirmed. It is kept all the same, and the same may be written again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unconfirmed {
    /// A listener that holds a lease did not say that it has applied the change.
    Late,
    /// Redis could not be told or asked, or has lost what it was told.
    Unreached,
    /// Too many writes wait already.
    Crowded,
}

/// The waits of one process. Dropping it ends them, unconfirmed.
pub struct Confirmations {
    waits: Arc<Waits>,
    metrics: Metrics,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Waits {
    open: Mutex<Vec<Wait>>,
    joined: Notify,
    /// Whether Redis answered the last question.
    reached: AtomicBool,
}

struct Wait {
    number: u64,
    began: Instant,
    end: oneshot::Sender<bool>,
}

impl Confirmations {
    pub fn start(changes: Arc<Changes>, metrics: Metrics) -> Self {
        let waits = Arc::new(Waits::default());
        let task = tokio::spawn(ask(changes, waits.clone(), metrics.clone()));
        Self { waits, metrics, _task: AbortOnDropHandle::new(task) }
    }

    /// Comes back when the change of this number is confirmed, and with why not otherwise. `None`: Redis
    /// could not be told of the change.
    pub async fn confirm(&self, number: Option<u64>) -> Result<(), Unconfirmed> {
        let began = Instant::now();
        let confirmed = match number {
            Some(number) => self.wait(number, began).await,
            None => Err(Unconfirmed::Unreached),
        };
        match confirmed {
            Ok(()) => self.metrics.confirmation.observe(began.elapsed().as_secs_f64()),
            Err(reason) => self.metrics.unconfirmed(reason),
        }
        confirmed
    }

    async fn wait(&self, number: u64, began: Instant) -> Result<(), Unconfirmed> {
        let (end, ended) = oneshot::channel();
        {
            let mut open = self.waits.open.lock();
            if open.len() >= MOST {
                return Err(Unconfirmed::Crowded);
            }
            open.push(Wait { number, began, end });
        }
        self.waits.joined.notify_one();
        match timeout(PATIENCE, ended).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false) | Err(_)) => Err(Unconfirmed::Unreached),
            Err(_) if self.waits.reached.load(Ordering::Relaxed) => Err(Unconfirmed::Late),
            Err(_) => Err(Unconfirmed::Unreached),
        }
    }
}

async fn ask(changes: Arc<Changes>, waits: Arc<Waits>, metrics: Metrics) {
    let mut next = None;
    // When Redis may be asked again.
    let mut free = Instant::now();
    loop {
        match next {
            // Whoever joins is not kept waiting by those who wait for long.
            Some(next) => tokio::select! {
                () = sleep_until(next) => {}
                () = waits.joined.notified() => sleep_until(free.max(Instant::now() + FIRST)).await,
            },
            None => {
                waits.joined.notified().await;
                sleep_until(free.max(Instant::now() + FIRST)).await;
            }
        }
        let audience = changes.audience().await.ok();
        waits.reached.store(audience.is_some(), Ordering::Relaxed);
        let listeners = audience.map_or(0, |audience| audience.listeners);
        if audience.is_some() {
            metrics.listed(listeners);
        }
        free = Instant::now() + pace(listeners);
        next = waits.settle(audience).map(|waited| free.max(Instant::now() + (waited / 8).clamp(OFTEN, SELDOM)));
    }
}

impl Waits {
    /// Ends those whose answer is known or that nobody waits for; how long the last of the others has waited.
    fn settle(&self, audience: Option<Audience>) -> Option<Duration> {
        let mut open = self.open.lock();
        let ended = open.extract_if(.., |wait| {
            wait.end.is_closed() || audience.is_some_and(|audience| audience.judge(wait.number) != Verdict::NotYet)
        });
        for Wait { number, end, .. } in ended {
            let confirmed = audience.is_some_and(|audience| audience.judge(number) == Verdict::Confirmed);
            // Nobody waits for it: then it does not matter.
            let _ = end.send(confirmed);
        }
        open.iter().map(|wait| wait.began.elapsed()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_ends_with_its_own_number_and_the_dropped_are_forgotten() {
        let waits = Waits::default();
        let mut ends = Vec::new();
        for number in [5, 10, 11, 20] {
            let (end, ended) = oneshot::channel();
            waits.open.lock().push(Wait { number, began: Instant::now(), end });
            ends.push(ended);
        }
        let audience = Audience { listed: LEASE, since: 6, listeners: 2, lowest: Some(10) };
        assert!(waits.settle(None).is_some());
        assert!(waits.settle(Some(audience)).is_some());
        assert_eq!(ends[0].try_recv(), Ok(false), "told to a Redis that is gone");
        assert_eq!(ends[1].try_recv(), Ok(true));
        assert!(ends[2].try_recv().is_err() && ends[3].try_recv().is_err());
        drop(ends);
        assert_eq!(waits.settle(None), None);
    }
}
