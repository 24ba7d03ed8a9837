//! What operators see of this process's own work. Labels are models of the snapshot and words of ours.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use spillway_runtime::telemetry::Metrics;

/// The model label of a request whose model is not served here: callers must not make series.
pub const UNKNOWN: &str = "-";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByModel {
    pub model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByOutcome {
    pub model: String,
    /// `ok` or a `spillway-error` code.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByReason {
    pub model: String,
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByRefusal {
    pub reason: &'static str,
}

/// Seconds, from a small model in this process to a large one on a busy GPU.
#[derive(Clone, Copy, Debug)]
pub struct Seconds;

impl MetricConstructor<Histogram> for Seconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new([
            0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
        ])
    }
}

/// Handles; cheap to clone.
#[derive(Clone, Debug)]
pub struct SidecarMetrics {
    pub requests: Family<ByOutcome, Counter>,
    pub duration: Family<ByModel, Histogram, Seconds>,
    pub model_duration: Family<ByModel, Histogram, Seconds>,
    pub degraded: Family<ByReason, Counter>,
    pub default_features: Family<ByModel, Counter>,
    pub missing_features: Family<ByModel, Counter>,
    pub model_errors: Family<ByReason, Counter>,
    pub models_refused: Family<ByModel, Counter>,
    pub model_ready: Family<ByModel, Gauge>,
    pub in_flight: Gauge,
    pub compute_waiting: Gauge,
    pub fallbacks: Family<ByReason, Counter>,
    pub fallback_errors: Family<ByReason, Counter>,
    pub fallback_ready: Family<ByModel, Gauge>,
    pub fallback_waiting: Gauge,
    pub load_polls_failed: Counter,
    pub streams: Gauge,
    pub connections: Gauge,
    pub connections_refused: Family<ByRefusal, Counter>,
    pub calls_refused: Family<ByRefusal, Counter>,
}

impl SidecarMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        Self {
            requests: metrics.family("sidecar_requests", "Inference requests by model and outcome"),
            duration: metrics.register(
                "sidecar_request_duration_seconds",
                "From a request's arrival to its answer",
                Family::new_with_constructor(Seconds),
            ),
            model_duration: metrics.register(
                "sidecar_model_duration_seconds",
                "Time that the model took",
                Family::new_with_constructor(Seconds),
            ),
            degraded: metrics.family("sidecar_degraded", "Answers made with less than they should, by reason"),
            default_features: metrics
                .family("sidecar_default_features", "Tensor elements filled with a declared default"),
            missing_features: metrics
                .family("sidecar_missing_features", "Requests refused because a feature was missing"),
            model_errors: metrics.family("sidecar_model_errors", "Model calls without a usable answer, by reason"),
            models_refused: metrics.family("sidecar_models_refused", "Times that a model was not taken into service"),
            model_ready: metrics.family("sidecar_model_ready", "1 while the model can answer"),
            in_flight: metrics.register(
                "sidecar_requests_in_flight",
                "Inference requests now worked on",
                Gauge::default(),
            ),
            compute_waiting: metrics.register(
                "sidecar_compute_waiting",
                "Requests that wait for a place to compute in this process",
                Gauge::default(),
            ),
            fallbacks: metrics.family("sidecar_fallbacks", "Answers of a model's fallback, by why it was asked"),
            fallback_errors: metrics
                .family("sidecar_fallback_errors", "Calls of a model's fallback without a usable answer, by reason"),
            fallback_ready: metrics.family("sidecar_fallback_ready", "1 while the fallback can answer"),
            fallback_waiting: metrics.register(
                "sidecar_fallback_waiting",
                "Requests that wait for a place to compute a fallback",
                Gauge::default(),
            ),
            load_polls_failed: metrics.register(
                "sidecar_load_polls_failed",
                "Times that the model server did not tell its statistics",
                Counter::default(),
            ),
            streams: metrics.register("sidecar_streams_open", "Inference streams now open", Gauge::default()),
            connections: metrics.register("sidecar_connections_open", "Connections now open", Gauge::default()),
            connections_refused: metrics.family("sidecar_connections_refused", "Connections refused, by reason"),
            calls_refused: metrics.family("sidecar_calls_refused", "Calls refused for who the peer is, by reason"),
        }
    }
}

/// Counts something for as long as it lives, also when it is cancelled.
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
