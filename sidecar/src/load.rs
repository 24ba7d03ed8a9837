//! How busy this pod is, as gateways are told in the trailer of every answer (ORCA, native text form).
//!
//! The rule: said with each answer, made anew at most every 100 ms. What is not known is left out.
//!
//! | figure                            | embedded models                   | Triton, over the last second                     |
//! |-----------------------------------|-----------------------------------|--------------------------------------------------|
//! | `application_utilization`, 0 to 1 | taken places, waiting ones too    | share of the requests' time that went to waiting |
//! | `named_metrics.queue`             | requests that wait for a place    | the mean, by Little's law                        |
//! | `named_metrics.model_queue_us`    |                                   | mean wait of a request                           |
//!
//! The larger utilization of both is said, and the sum of the queues. `named_metrics.in_flight` is what this
//! process works on.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::sleep;

use crate::metrics::SidecarMetrics;
use crate::model::onnx::Compute;
use crate::model::triton::{Server, Totals};

/// ORCA's name for it where it is not binary.
pub const LOAD_METRICS: HeaderName = HeaderName::from_static("endpoint-load-metrics");
/// How old what is said may be.
const RENEW: Duration = Duration::from_millis(100);
/// How often Triton is asked, and how long it may take to answer.
const POLL: Duration = Duration::from_secs(1);

pub struct Load {
    compute: Arc<Compute>,
    waiting: Gauge,
    in_flight: Gauge,
    poll_failed: prometheus_client::metrics::counter::Counter,
    triton: Mutex<Option<Backlog>>,
    report: Mutex<Report>,
}

/// What is said, and until when.
struct Report {
    until: Instant,
    value: HeaderValue,
}

/// What waits at Triton.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Backlog {
    /// Share of the requests' time that they waited for.
    waited: f64,
    /// Requests waiting at a time.
    queue: f64,
    /// Mean wait of a request.
    wait_us: u64,
}

impl Load {
    pub fn new(compute: Arc<Compute>, metrics: &SidecarMetrics) -> Arc<Self> {
        let report = Report { until: Instant::now(), value: HeaderValue::from_static("TEXT") };
        Arc::new(Self {
            compute,
            waiting: metrics.compute_waiting.clone(),
            in_flight: metrics.in_flight.clone(),
            poll_failed: metrics.load_polls_failed.clone(),
            triton: Mutex::new(None),
            report: Mutex::new(report),
        })
    }

    pub fn report_in(&self, trailers: &mut HeaderMap) {
        trailers.insert(LOAD_METRICS, self.report(Instant::now()));
    }

    fn report(&self, now: Instant) -> HeaderValue {
        let mut report = self.report.lock();
        if now >= report.until {
            *report = Report { until: now + RENEW, value: self.measure() };
        }
        report.value.clone()
    }

    fn measure(&self) -> HeaderValue {
        let backlog = *self.triton.lock();
        let Backlog { waited, queue, wait_us } = backlog.unwrap_or_default();
        let utilization = self.compute.load().max(waited).clamp(0.0, 1.0);
        let queue = self.waiting.get() as f64 + queue;
        let mut text = BytesMut::with_capacity(128);
        // Writing to memory cannot fail.
        let _ = write!(
            text,
            "TEXT application_utilization={utilization:.3}, named_metrics.queue={queue:.0}, named_metrics.in_flight={}",
            self.in_flight.get()
        );
        if backlog.is_some() {
            let _ = write!(text, ", named_metrics.model_queue_us={wait_us}");
        }
        HeaderValue::from_maybe_shared(text.freeze()).unwrap_or(HeaderValue::from_static("TEXT"))
    }

    /// Asks a Triton server for ever; the caller drops it to stop it.
    pub async fn follow(self: Arc<Self>, triton: Server) {
        let mut before: Option<(Totals, Instant)> = None;
        let mut told = false;
        loop {
            let asked = Instant::now();
            match triton.totals(asked + POLL).await {
                Ok(totals) => {
                    let backlog = before.and_then(|(before, at)| Backlog::between(before, totals, asked - at));
                    *self.triton.lock() = backlog;
                    before = Some((totals, asked));
                    told = false;
                }
                Err(error) => {
                    *self.triton.lock() = None;
                    before = None;
                    self.poll_failed.inc();
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(%error, "the model server does not tell its load");
                    }
                }
            }
            sleep(POLL.saturating_sub(asked.elapsed())).await;
        }
    }
}

impl Backlog {
    /// `None` if the server began anew or unloaded a model in between.
    fn between(before: Totals, after: Totals, time: Duration) -> Option<Self> {
        let requests = after.requests.checked_sub(before.requests)?;
        let queued = after.queued_ns.checked_sub(before.queued_ns)?;
        let computed = after.computed_ns.checked_sub(before.computed_ns)?;
        Some(Self {
            waited: queued as f64 / queued.saturating_add(computed).max(1) as f64,
            // Little's law: the mean number of those who wait is the wait of all of them, over the time.
            queue: queued as f64 / (time.as_nanos() as f64).max(1.0),
            wait_us: queued / requests.max(1) / 1_000,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn totals(requests: u64, queued_ns: u64, computed_ns: u64) -> Totals {
        Totals { requests, queued_ns, computed_ns }
    }

    #[test]
    fn a_backlog_is_what_came_on_top() {
        let before = totals(100, 5_000_000, 90_000_000);
        assert_eq!(Backlog::between(before, before, SECOND), Some(Backlog::default()));
        // 50 requests waited 40 ms and computed 10 ms each.
        let after = totals(150, before.queued_ns + 2_000_000_000, before.computed_ns + 500_000_000);
        let backlog = Backlog::between(before, after, SECOND).unwrap();
        assert_eq!(backlog, Backlog { waited: 0.8, queue: 2.0, wait_us: 40_000 });
        assert_eq!(Backlog::between(after, before, SECOND), None, "it began anew");
        assert!(Backlog::between(Totals::default(), totals(u64::MAX, u64::MAX, u64::MAX), Duration::ZERO).is_some());
    }

    #[tokio::test]
    async fn a_report_is_made_anew_only_when_it_is_old() {
        let metrics = SidecarMetrics::register(&spillway_runtime::telemetry::Metrics::new("test"));
        let load = Load::new(Compute::new(1, 1, metrics.compute_waiting.clone()), &metrics);
        let now = Instant::now();
        metrics.in_flight.set(3);
        metrics.compute_waiting.set(2);
        let said = load.report(now);
        assert_eq!(said, "TEXT application_utilization=0.000, named_metrics.queue=2, named_metrics.in_flight=3");
        metrics.in_flight.set(4);
        *load.triton.lock() = Some(Backlog { waited: 0.42, queue: 1.4, wait_us: 120 });
        assert_eq!(load.report(now + RENEW / 2), said);
        assert_eq!(
            load.report(now + RENEW),
            "TEXT application_utilization=0.420, named_metrics.queue=3, named_metrics.in_flight=4, \
             named_metrics.model_queue_us=120"
        );
    }
}
