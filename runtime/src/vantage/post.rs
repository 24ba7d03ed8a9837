//! A vantage in a process that follows the control plane: it tells what it sees, and hears whom to probe soon.

use std::collections::BTreeSet;
use std::sync::Arc;

use spillway_core::failover::Standing;
use spillway_core::health::{Vantage, VerdictSettings};
use spillway_core::units::Name;
use spillway_proto::control;
use tokio::sync::watch;

use super::{Lookout, Nudges, Prober, Surroundings};
use crate::drain::Drain;
use crate::link::SightingLog;
use crate::plan::Plans;
use crate::snapshot::Subscription;
use crate::telemetry::Metrics;
use crate::tls::Workload;

/// The prober, and its ways to and from the control plane.
pub struct Post {
    prober: Prober,
    nudges: Nudges,
    pulses: Option<watch::Receiver<control::Pulse>>,
    down: watch::Receiver<BTreeSet<Name>>,
}

/// What a post goes by.
pub struct Sources<'a> {
    /// Whose word it is.
    pub us: Vantage,
    /// Where it stands: of this region nothing is told, since who stands beside it is no witness.
    pub region: &'a Name,
    pub snapshots: &'a Arc<Subscription>,
    pub plans: &'a Arc<Plans>,
    /// None: there is no control plane.
    pub sightings: Option<SightingLog>,
    pub pulses: Option<watch::Receiver<control::Pulse>>,
}

impl Post {
    pub fn new(sources: Sources<'_>, workload: Arc<Workload>, metrics: &Metrics) -> Self {
        let Sources { us, region, snapshots, plans, sightings, pulses } = sources;
        let (region, snapshots, plans) = (region.clone(), snapshots.clone(), plans.clone());
        let surroundings = Surroundings {
            snapshot: Box::new(move || snapshots.current()),
            out: Box::new(move || planned_out(&plans)),
            sighted: Box::new(move |sighting| {
                if let Some(sightings) = sightings.as_ref().filter(|_| sighting.region != region.as_str()) {
                    sightings.record([sighting]);
                }
            }),
        };
        // Core's default interval: control nodes count on it, since reports that come less often are stale to them.
        let (prober, Lookout { down, nudges }) =
            Prober::new(workload, us, surroundings, VerdictSettings::default(), metrics);
        Self { prober, nudges, pulses, down }
    }

    /// Regions that are down as seen from here.
    pub fn down(&self) -> watch::Receiver<BTreeSet<Name>> {
        self.down.clone()
    }

    /// For those who find that a gateway may be gone.
    pub fn nudges(&self) -> Nudges {
        self.nudges.clone()
    }

    /// Probes until the drain is over.
    pub async fn run(self, drain: Drain) {
        let Self { prober, nudges, pulses, .. } = self;
        let hear = async {
            if let Some(mut pulses) = pulses {
                while pulses.changed().await.is_ok() {
                    let nudged = pulses.borrow_and_update().nudged.clone();
                    nudged.iter().for_each(|gateway| nudges.hear(gateway));
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            () = prober.run(drain) => {}
            () = hear => {}
        }
    }
}

fn planned_out(plans: &Plans) -> BTreeSet<Name> {
    let Some(published) = plans.current() else { return BTreeSet::new() };
    let out = published.standings.iter().filter(|(_, (standing, _))| *standing == Standing::Out);
    out.map(|(name, _)| name.clone()).collect()
}
