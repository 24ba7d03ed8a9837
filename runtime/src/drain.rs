//! One signal for the end of a process: serving, then draining, then stopped.
//!
//! ```text
//! Serving --start()--> Draining(until) --work done, or `until`, or stop()--> Stopped
//! Serving --------------------------------stop()---------------------------> Stopped
//! ```
//!
//! The rule: phases only go forward, and draining is bounded. It does not close anything itself:
//! whoever listens stops accepting on [`Drain::draining`] and gives up on [`Drain::stopped`].

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Serving,
    /// No new work is taken; what began may go on until then.
    Draining {
        until: Instant,
    },
    Stopped,
}

/// Cheap to clone; all clones are the same signal.
#[derive(Clone, Debug)]
pub struct Drain {
    phase: Arc<watch::Sender<Phase>>,
    work: TaskTracker,
    timeout: Duration,
}

/// Work that draining waits for. It counts until dropped.
#[derive(Debug)]
#[must_use = "the work counts as done when this is dropped"]
pub struct Work(#[expect(dead_code, reason = "it is held to be dropped")] TaskTrackerToken);

impl Drain {
    /// `timeout`: how long draining may take at most.
    pub fn new(timeout: Duration) -> Self {
        Self { phase: Arc::new(watch::Sender::new(Phase::Serving)), work: TaskTracker::new(), timeout }
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub fn is_serving(&self) -> bool {
        self.phase() == Phase::Serving
    }

    /// Serving becomes Draining; later phases stay.
    pub fn start(&self) {
        let until = Instant::now() + self.timeout;
        let started = self.phase.send_if_modified(|phase| {
            let serving = *phase == Phase::Serving;
            if serving {
                *phase = Phase::Draining { until };
            }
            serving
        });
        if started {
            tracing::info!(timeout_ms = self.timeout.as_millis() as u64, in_flight = self.work.len(), "draining");
        }
    }

    /// Ends at once.
    pub fn stop(&self) {
        self.phase.send_if_modified(|phase| std::mem::replace(phase, Phase::Stopped) != Phase::Stopped);
    }

    /// Returns when no new work is to be taken: draining, or stopped.
    pub async fn draining(&self) {
        self.reach(|phase| *phase != Phase::Serving).await;
    }

    /// Returns when everything still open is to be closed.
    pub async fn stopped(&self) {
        self.reach(|phase| *phase == Phase::Stopped).await;
    }

    /// Counts a piece of work until the value is dropped.
    pub fn work(&self) -> Work {
        Work(self.work.token())
    }

    pub fn in_flight(&self) -> usize {
        self.work.len()
    }

    /// Waits for draining to begin, then for all work to end, at most until its time is over; then the
    /// phase is Stopped. Returns how many pieces of work were cut off.
    pub async fn finish(&self) -> usize {
        self.draining().await;
        self.work.close();
        if let Phase::Draining { until } = self.phase() {
            tokio::select! {
                () = self.work.wait() => {}
                () = tokio::time::sleep_until(until) => {}
                () = self.stopped() => {}
            }
        }
        let left = self.work.len();
        self.stop();
        tracing::info!(cut_off = left, "stopped");
        left
    }

    /// Listens to the process's signals until stopped: the first TERM or INT starts draining, the
    /// second ends at once.
    pub async fn on_signals(&self) -> std::io::Result<()> {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                () = self.stopped() => return Ok(()),
            }
            if self.is_serving() { self.start() } else { self.stop() }
        }
    }

    async fn reach(&self, reached: impl FnMut(&Phase) -> bool) {
        // Fails only when all senders are gone, and `self` is one.
        let _ = self.phase.subscribe().wait_for(reached).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_ends_when_the_work_does() {
        let drain = Drain::new(Duration::from_secs(30));
        let work = drain.work();
        drain.start();
        let finish = tokio::spawn({
            let drain = drain.clone();
            async move { drain.finish().await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!finish.is_finished() && drain.in_flight() == 1);
        drop(work);
        assert_eq!(finish.await.unwrap(), 0);
        assert_eq!(drain.phase(), Phase::Stopped);
    }

    #[tokio::test]
    async fn draining_is_bounded() {
        let drain = Drain::new(Duration::from_millis(50));
        let _work = drain.work();
        let began = Instant::now();
        drain.start();
        assert_eq!(drain.finish().await, 1);
        assert!(began.elapsed() >= Duration::from_millis(50));
    }

    #[tokio::test]
    async fn phases_never_go_back() {
        let drain = Drain::new(Duration::from_secs(30));
        let _work = drain.work();
        drain.start();
        let Phase::Draining { until } = drain.phase() else { panic!("draining") };
        tokio::time::sleep(Duration::from_millis(5)).await;
        drain.start();
        assert_eq!(drain.phase(), Phase::Draining { until });
        drain.stop();
        drain.start();
        assert_eq!(drain.phase(), Phase::Stopped);
        assert_eq!(drain.finish().await, 1);
    }

    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_ends() {
        let drain = Drain::new(Duration::from_secs(30));
        let signals = tokio::spawn({
            let drain = drain.clone();
            async move { drain.on_signals().await }
        });
        // The listener is in place once the task has been polled; before, TERM would end the tests.
        tokio::task::yield_now().await;
        let _installed = (signal(SignalKind::terminate()).unwrap(), signal(SignalKind::interrupt()).unwrap());
        let send = |name: &str| {
            let process = std::process::id().to_string();
            assert!(std::process::Command::new("kill").args([name, &process]).status().unwrap().success());
        };
        send("-TERM");
        crate::fixture::eventually("draining", || matches!(drain.phase(), Phase::Draining { .. })).await;
        send("-INT");
        crate::fixture::eventually("stopped", || drain.phase() == Phase::Stopped).await;
        signals.await.unwrap().unwrap();
    }
}
