//! What is counted of degraded answers. Models are the snapshot's, so that their number is bounded.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::resilience::Step;
use spillway_runtime::telemetry::Metrics as Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByLevel {
    level: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByModel {
    model: String,
}

pub struct Metrics {
    /// Of the levels 1 to 4.
    degraded: [Counter; 4],
    levels: Family<ByModel, Gauge>,
    pub probes: Counter,
    pub probes_failed: Counter,
}

impl Metrics {
    pub fn new(registry: &Registry) -> Self {
        let degraded: Family<ByLevel, Counter> =
            registry.family("gateway_degraded", "Answers that were given with less than they should, by level");
        Self {
            degraded: [1, 2, 3, 4].map(|level| degraded.get_or_create(&ByLevel { level }).clone()),
            levels: registry.family("gateway_degradation_level", "The level that a model is served at, 0 to 4"),
            probes: registry.register(
                "gateway_degradation_probes",
                "Requests served as at level 0 while their model is at another",
                Counter::default(),
            ),
            probes_failed: registry.register(
                "gateway_degradation_probes_failed",
                "Of these, those that failed and were answered at their model's level",
                Counter::default(),
            ),
        }
    }

    /// An answer went out that says this level.
    pub fn answered(&self, step: Step) {
        if let Some(counter) = usize::from(step.number()).checked_sub(1).and_then(|index| self.degraded.get(index)) {
            counter.inc();
        }
    }

    pub fn level(&self, model: &str) -> Gauge {
        self.levels.get_or_create(&ByModel { model: model.to_owned() }).clone()
    }

    pub fn forget(&self, model: &str) {
        self.levels.remove(&ByModel { model: model.to_owned() });
    }
}
