//! What operators see of the stream to the control plane.

use std::time::{Duration, SystemTime};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::telemetry::Metrics;

#[derive(Clone, Debug)]
pub(super) struct LinkMetrics {
    /// 1 while a stream is open.
    pub open: Gauge,
    pub last_pulse: Gauge,
    pub sightings_dropped: Counter,
    ended: Family<Reason, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

impl LinkMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let pulse = "When the control plane was heard last, Unix time; 0 for never";
        let dropped = "Sightings that were not sent in time and are lost";
        Self {
            open: metrics.register("control_connected", "Whether a control node is followed", Gauge::default()),
            last_pulse: metrics.register("control_last_pulse_seconds", pulse, Gauge::default()),
            sightings_dropped: metrics.register("control_sightings_dropped", dropped, Counter::default()),
            ended: metrics.family("control_streams_ended", "Streams to control nodes that ended, or did not begin"),
        }
    }

    pub fn ended(&self, reason: &'static str) {
        self.open.set(0);
        self.ended.get_or_create(&Reason { reason }).inc();
    }

    pub fn heard(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.last_pulse.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    }
}
