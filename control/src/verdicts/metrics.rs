//! What operators and autoscalers see of verdicts. Labels are bounded by the Snapshot's regions.

use std::collections::BTreeSet;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::health::{Event, Phase, What};
use spillway_core::units::Name;
use spillway_runtime::plan::Published;
use spillway_runtime::telemetry::Metrics;

use super::judge::Judge;
use super::stored::phase_word;

type Level = Gauge<f64, std::sync::atomic::AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RegionLabels {
    region: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    region: String,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

const PHASES: [Phase; 5] = [Phase::Up, Phase::Suspect, Phase::Down, Phase::Probation, Phase::Ramp { percent: 1 }];

pub(super) struct VerdictMetrics {
    phase: Family<PhaseLabels, Gauge>,
    weight: Family<RegionLabels, Level>,
    capacity_factor: Family<RegionLabels, Level>,
    moves: Family<PhaseLabels, Counter>,
    withheld: Family<RegionLabels, Counter>,
    isolated: Gauge,
    version: Gauge,
    writes: Family<Outcome, Counter>,
    ignored: Counter,
    disbelieved: Counter,
}

impl VerdictMetrics {
    pub(super) fn register(metrics: &Metrics) -> Self {
        Self {
            phase: metrics.family("control_region_phase", "1 for the phase that a region is in"),
            weight: metrics.family("control_region_weight", "The part of all traffic that a region gets by the plan"),
            capacity_factor: metrics.family(
                "control_capacity_factor",
                "Capacity that a region's autoscaler is asked for, as a multiple of what it has",
            ),
            moves: metrics.family("control_region_moves", "Changes of a region's phase, by the one that it came to"),
            withheld: metrics.family("control_verdicts_withheld", "Times that a region stayed though it should go out"),
            isolated: metrics.register(
                "control_vantages_isolated",
                "Vantages that see nothing, and so count for nothing",
                Gauge::default(),
            ),
            version: metrics.register("control_plan_version", "The plan in force", Gauge::default()),
            writes: metrics.family("control_plan_writes", "Writes of the plan to the store, by outcome"),
            ignored: metrics.register(
                "control_sightings_ignored",
                "Sightings of or by nobody that the snapshot names",
                Counter::default(),
            ),
            disbelieved: metrics.register(
                "control_heartbeats_disbelieved",
                "Heartbeats that were ignored, as no gateway can count so much",
                Counter::default(),
            ),
        }
    }

    pub(super) fn ignored(&self, count: usize) {
        self.ignored.inc_by(count as u64);
    }

    pub(super) fn disbelieved(&self) {
        self.disbelieved.inc();
    }

    pub(super) fn written(&self, outcome: &'static str) {
        self.writes.get_or_create(&Outcome { outcome }).inc();
    }

    pub(super) fn published(&self, published: &Published) {
        self.version.set(i64::try_from(published.plan.version).unwrap_or(i64::MAX));
        for (name, allotment) in &published.plan.regions {
            let labels = RegionLabels { region: name.to_string() };
            self.weight.get_or_create(&labels).set(allotment.weight);
            self.capacity_factor.get_or_create(&labels).set(allotment.capacity_factor);
        }
    }

    pub(super) fn happened(&self, event: &Event) {
        let region = event.region.to_string();
        match &event.what {
            What::Moved(moved) => {
                self.moves.get_or_create(&PhaseLabels { region, phase: phase_word(moved.to) }).inc();
            }
            What::Withheld(..) => {
                self.withheld.get_or_create(&RegionLabels { region }).inc();
            }
            What::Ended(_) => {}
        }
    }

    pub(super) fn judged(&self, judge: &Judge) {
        for seen in judge.seen() {
            let now = phase_word(seen.region.phase());
            for phase in PHASES.map(phase_word) {
                let labels = PhaseLabels { region: seen.name.to_string(), phase };
                self.phase.get_or_create(&labels).set(i64::from(phase == now));
            }
        }
        self.isolated.set(i64::try_from(judge.judgement().isolated.len()).unwrap_or(i64::MAX));
    }

    /// These regions are gone.
    pub(super) fn forget(&self, regions: &BTreeSet<Name>) {
        for region in regions {
            let labels = RegionLabels { region: region.to_string() };
            self.weight.remove(&labels);
            self.capacity_factor.remove(&labels);
            self.withheld.remove(&labels);
            for phase in PHASES.map(phase_word) {
                let labels = PhaseLabels { region: region.to_string(), phase };
                self.phase.remove(&labels);
                self.moves.remove(&labels);
            }
        }
    }

    /// This node does not lead: others say what is so.
    pub(super) fn resign(&self) {
        self.phase.clear();
    }
}
