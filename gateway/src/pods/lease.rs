//! One call under way: what it holds of its pod, and what it tells those who judge pods by their calls.
//!
//! The rule: it comes back exactly once, with its outcome or on drop. One that is dropped at its deadline, or
//! when it was overdue, is a timeout: that a client or a quicker pod ended the wait does not excuse a pod
//! that hangs. Any other that is dropped was cancelled, which says nothing.

use std::sync::Arc;
use std::time::Duration;

use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::resilience::breaker::Permit;
use spillway_core::resilience::{Outcome, outlier};

use crate::pods::fleet::PodLink;
use crate::pods::lane::Lane;

pub struct Lease {
    lane: Arc<Lane>,
    /// Of the pod in the lane's pool.
    index: usize,
    under_way: Option<UnderWay>,
    /// Counts as a stream until dropped.
    streams: bool,
}

struct UnderWay {
    call: outlier::Call,
    /// None: it is made although the breaker is open.
    permit: Option<Permit>,
    /// Calls there were before it.
    beside: u32,
    began: Duration,
    overdue_at: Option<Duration>,
    deadline: Duration,
}

/// When a call without an answer has had the time that it needs.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Unusual for the model; none while it is not known what is usual.
    pub overdue_after: Option<Duration>,
    pub deadline: Duration,
}

impl Lease {
    /// Begins a call that the lane has decided on.
    pub(super) fn begin(
        lane: &Arc<Lane>,
        index: usize,
        call: outlier::Call,
        patience: Patience,
        now: Duration,
    ) -> Self {
        let beside = lane.pool.pods[index].state.begin();
        let permit = lane.breakers[index].as_ref().and_then(|breaker| {
            let (permit, changed) = breaker.permit(now);
            if let Some(state) = changed {
                lane.recorder.metrics.breaker(state);
            }
            permit
        });
        let overdue_at = patience.overdue_after.map(|after| now.saturating_add(after));
        let under_way = UnderWay { call, permit, beside, began: now, overdue_at, deadline: patience.deadline };
        Self { lane: lane.clone(), index, under_way: Some(under_way), streams: false }
    }

    pub fn link(&self) -> &Arc<PodLink> {
        &self.lane.pool.pods[self.index]
    }

    /// Whether the time is over in which an answer would have been of use.
    pub fn is_due(&self) -> bool {
        let Some(under_way) = &self.under_way else { return false };
        self.lane.recorder.clock.now() + SHORTEST_USEFUL >= under_way.deadline
    }

    /// The call ended. How long it took.
    pub fn end(mut self, outcome: Outcome) -> Duration {
        self.record(outcome)
    }

    /// A stream's first answer came. The call is over for those who judge; the stream goes on.
    pub fn answered(&mut self) {
        if self.under_way.is_some() {
            self.record(Outcome::Success);
            self.link().state.open_stream();
            self.streams = true;
        }
    }

    /// A stream ended. A failure after its first answer is one of its own.
    pub fn close(mut self, outcome: Outcome) {
        if self.under_way.is_some() {
            self.record(outcome);
        } else if outcome.is_failure() {
            let now = self.lane.recorder.clock.now();
            let link = self.link();
            let mut outliers = self.lane.pool.state.outliers.lock();
            let call = outliers.begin(link.state.id, now);
            let change = outliers.record(call, Outcome::Failure, now);
            drop(outliers);
            self.lane.recorder.metrics.ended(Outcome::Failure);
            change.iter().for_each(|change| self.lane.recorder.tell(&link.state, change, now));
        }
    }

    fn record(&mut self, outcome: Outcome) -> Duration {
        let Some(UnderWay { call, permit, beside, began, .. }) = self.under_way.take() else { return Duration::ZERO };
        let recorder = &self.lane.recorder;
        let (now, pod) = (recorder.clock.now(), &self.link().state);
        let mut outliers = self.lane.pool.state.outliers.lock();
        let judged = outliers.judged(&call, outcome, now);
        let change = outliers.record(call, outcome, now);
        drop(outliers);
        let took = now.saturating_sub(began);
        pod.end(took, beside, judged, now);
        if let (Some(permit), Some(breaker)) = (permit, &self.lane.breakers[self.index])
            && let Some(state) = breaker.record(permit, judged, now)
        {
            recorder.metrics.breaker(state);
            tracing::warn!(pool = %pod.key.pool, pod = %pod.key.pod, model = %self.lane.name, ?state, "circuit breaker changed");
        }
        recorder.metrics.ended(outcome);
        change.iter().for_each(|change| recorder.tell(pod, change, now));
        took
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.streams {
            self.link().state.close_stream();
        }
        if let Some(UnderWay { overdue_at, deadline, .. }) = &self.under_way {
            let now = self.lane.recorder.clock.now();
            let waited_enough = now >= *deadline || overdue_at.is_some_and(|overdue| now >= overdue);
            self.record(if waited_enough { Outcome::Timeout } else { Outcome::Cancelled });
        }
    }
}
