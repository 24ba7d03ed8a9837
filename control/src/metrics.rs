//! What operators see of a control node's port.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_runtime::telemetry::Metrics;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByReason {
    pub reason: &'static str,
}

/// Handles; cheap to clone.
#[derive(Clone, Debug)]
pub struct ControlMetrics {
    pub connections: Gauge,
    pub connections_refused: Family<ByReason, Counter>,
    pub calls_refused: Family<ByReason, Counter>,
}

impl ControlMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        Self {
            connections: metrics.register("control_connections", "Open connections", Gauge::default()),
            connections_refused: metrics.family("control_connections_refused", "Connections refused, by reason"),
            calls_refused: metrics.family("control_calls_refused", "Calls refused for who called, by reason"),
        }
    }
}

/// Counts until dropped.
#[derive(Debug)]
pub struct Counted(Gauge);

impl Counted {
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
