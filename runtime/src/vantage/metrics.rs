//! What operators see of a vantage. Labels are bounded by the Snapshot's regions and gateways.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use spillway_core::health::{Gateway, Judgement, Outcome, View};

use super::probe::Probed;
use crate::telemetry::Metrics;

/// Seconds: from a neighbouring region to the timeout.
const SECONDS: [f64; 10] = [0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProbeLabels {
    region: String,
    gateway: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RegionLabels {
    region: String,
}

pub(super) struct ProbeMetrics {
    probes: Family<ProbeLabels, Counter>,
    seconds: Family<RegionLabels, Histogram, fn() -> Histogram>,
    nudges: Counter,
    down: Family<RegionLabels, Gauge>,
    isolated: Gauge,
}

impl ProbeMetrics {
    pub(super) fn register(metrics: &Metrics) -> Self {
        let seconds: Family<_, _, fn() -> Histogram> = Family::new_with_constructor(|| Histogram::new(SECONDS));
        Self {
            probes: metrics.family("vantage_probes", "Probes of other regions' gateways, by outcome"),
            seconds: metrics.register("vantage_probe_seconds", "Time of probes that were answered, by region", seconds),
            nudges: metrics.register(
                "vantage_nudges",
                "Probes hurried because a gateway may be gone",
                Counter::default(),
            ),
            down: metrics.family("vantage_down", "1 while a region is down as seen from here"),
            isolated: metrics.register(
                "vantage_isolated",
                "1 while no other region answers, so that this process is taken to be cut off",
                Gauge::default(),
            ),
        }
    }

    pub(super) fn probed(&self, gateway: &Gateway, probed: &Probed) {
        self.probes.get_or_create(&labels(gateway, probed.outcome)).inc();
        if !probed.outcome.is_failure() {
            let region = RegionLabels { region: gateway.region.to_string() };
            self.seconds.get_or_create(&region).observe(probed.took.as_secs_f64());
        }
    }

    pub(super) fn nudged(&self) {
        self.nudges.inc();
    }

    pub(super) fn show(&self, judgement: &Judgement, isolated: bool) {
        for (region, evidence) in &judgement.regions {
            let down = i64::from(evidence.view == View::Down);
            self.down.get_or_create(&RegionLabels { region: region.to_string() }).set(down);
        }
        self.isolated.set(isolated.into());
    }

    /// It is probed no more.
    pub(super) fn forget(&self, gateway: &Gateway) {
        for outcome in [Outcome::Good, Outcome::Overloaded, Outcome::Failed, Outcome::Refused] {
            self.probes.remove(&labels(gateway, outcome));
        }
        let region = RegionLabels { region: gateway.region.to_string() };
        self.seconds.remove(&region);
        self.down.remove(&region);
    }
}

fn labels(gateway: &Gateway, outcome: Outcome) -> ProbeLabels {
    let outcome = match outcome {
        Outcome::Good => "good",
        Outcome::Overloaded => "overloaded",
        Outcome::Failed => "failed",
        Outcome::Refused => "refused",
    };
    ProbeLabels { region: gateway.region.to_string(), gateway: gateway.node.to_string(), outcome }
}
