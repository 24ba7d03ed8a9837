//! What decides for the fleet, and how its parts hear of each other: the vantage, the verdicts, the distribution, other
//! control nodes.
//!
//! ```text
//! own probes ─────────┐
//! streams ────────────┼─▶ reports ─▶ verdicts ─▶ plan ─▶ streams
//! other control nodes ┘                 │ └─▶ nudges ─▶ own probes, and streams' pulses
//!             ▲                         │
//!             └──────── evidence ◀──────┴── own probes
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;

use spillway_core::failover::Standing as RegionStanding;
use spillway_core::health::Vantage;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::control::SealedPlan;
use spillway_proto::control::distribution_server::DistributionServer;
use spillway_proto::control::evidence_server::EvidenceServer;
use spillway_runtime::drain::Drain;
use spillway_runtime::plan;
use spillway_runtime::vantage::{Lookout, Nudges, Prober, Surroundings as Sight};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;

use crate::control::Parts;
use crate::distribution::{Distribution, Report, Service, Standing, Surroundings};
use crate::evidence::{Follower, Service as Evidence};
use crate::intent::{StatusSource, Version};
use crate::leading::Leading;
use crate::settings::ControlSettings;
use crate::verdicts::{Inputs, Judging, Verdicts};

/// What nodes said and nobody has judged yet.
const REPORTS: usize = 4_096;
/// Nudges that wait for streams.
const NUDGES: usize = 256;
/// Reports that wait for control nodes that follow.
const SHARED: usize = 4_096;

/// The parts, before they run.
pub struct Fleet {
    distribution: Distribution,
    served: watch::Receiver<Option<Arc<Version>>>,
    verdicts: Verdicts,
    judging: Judging,
    prober: Prober,
    evidence: EvidenceServer<Evidence>,
    follower: Follower,
    nudges: Nudges,
    told: broadcast::Receiver<String>,
    standing: watch::Sender<Standing>,
    leading: Arc<Leading>,
}

impl Fleet {
    pub fn new(settings: &ControlSettings, parts: &Parts) -> Self {
        let Parts { workload, store, leading, versions, events, drills, audit, metrics, .. } = parts;
        let (reports, reported) = mpsc::channel(REPORTS);
        let (standing, stands) = watch::channel(Standing::Alone);
        let (told, shared) = (broadcast::Sender::new(NUDGES), broadcast::Sender::new(SHARED));
        let (serve, served) = watch::channel(None::<Arc<Version>>);
        let us = Vantage::Control { region: Some(settings.region.clone()), node: settings.name.clone() };
        let inputs = Inputs {
            us: us.clone(),
            reports: reported,
            snapshot: Box::new({
                let versions = versions.clone();
                move || versions.current().map(|current| current.snapshot.clone())
            }),
            served: Box::new({
                let served = served.clone();
                move || served.borrow().as_ref().map(|version| version.snapshot.clone())
            }),
            store: store.clone(),
            leading: leading.fences(),
            nudges: told.clone(),
            shared: shared.clone(),
            audit: audit.clone(),
            events: events.clone(),
            drills: drills.clone(),
        };
        let verdict = settings.health.verdict.clone();
        let (judging, verdicts) = Judging::new(inputs, settings.health.clone(), metrics);
        let follower = Follower::new(workload.clone(), stands.clone(), reports.clone(), metrics);
        let sight = Sight {
            snapshot: Box::new({
                let (versions, nothing) = (versions.clone(), Arc::new(Snapshot::default()));
                move || versions.current().map_or_else(|| nothing.clone(), |current| current.snapshot.clone())
            }),
            out: Box::new({
                let plan = verdicts.plan();
                move || planned_out(plan.borrow().as_deref())
            }),
            sighted: Box::new({
                let (reports, own, log, leading) = (reports.clone(), workload.id(), follower.log(), leading.clone());
                move |sighting| {
                    if leading.fence().is_none() {
                        log.record([sighting.clone()]);
                    }
                    // Full: there are newer ones soon.
                    let _ = reports.try_send(Report::Sightings(own.clone(), vec![sighting]));
                }
            }),
        };
        let (prober, Lookout { nudges, .. }) = Prober::new(workload.clone(), us, sight, verdict, metrics);
        let evidence = Evidence::new(workload.clone(), leading.clone(), reports.clone(), shared);
        let around = Surroundings {
            node: settings.name.clone(),
            workload: workload.clone(),
            store: store.clone(),
            library: versions.clone(),
            standing: stands,
            plan: verdicts.plan(),
            nudges: told.clone(),
            served: serve,
            reports,
        };
        let distribution = Distribution::new(settings.rollout.clone(), around);
        Self {
            distribution,
            served,
            verdicts,
            judging,
            prober,
            evidence: evidence.into_server(),
            follower,
            nudges,
            told: told.subscribe(),
            standing,
            leading: leading.clone(),
        }
    }

    pub fn service(&self) -> DistributionServer<Service> {
        self.distribution.service()
    }

    /// The plan in force.
    pub fn plan(&self) -> watch::Receiver<Option<Arc<SealedPlan>>> {
        self.verdicts.plan()
    }

    /// What all nodes may serve, while this node leads.
    pub fn served(&self) -> watch::Receiver<Option<Arc<Version>>> {
        self.served.clone()
    }

    /// For other control nodes.
    pub fn evidence(&self) -> EvidenceServer<Evidence> {
        self.evidence.clone()
    }

    pub fn status(&self) -> Vec<Arc<dyn StatusSource>> {
        vec![Arc::new(self.distribution.clone()), Arc::new(self.verdicts.clone())]
    }

    /// Runs them as tasks of the process's.
    pub fn start(self, tasks: &mut JoinSet<()>, drain: &Drain) {
        let Self { distribution, judging, prober, follower, nudges, told, standing, leading, .. } = self;
        tasks.spawn(distribution.run(drain.clone()));
        tasks.spawn(hear(told, nudges));
        tasks.spawn(judging.run(drain.clone()));
        tasks.spawn(prober.run(drain.clone()));
        tasks.spawn(follower.run(drain.clone()));
        tasks.spawn(async move { Standing::follow(&leading, standing).await });
    }
}

/// Our own vantage hears, as those at the streams' other ends do.
async fn hear(mut told: broadcast::Receiver<String>, nudges: Nudges) {
    loop {
        match told.recv().await {
            Ok(gateway) => nudges.hear(&gateway),
            // They were of the same few gateways.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

fn planned_out(sealed: Option<&SealedPlan>) -> BTreeSet<Name> {
    let Some(published) = sealed.and_then(|sealed| plan::open(sealed).ok()) else { return BTreeSet::new() };
    let out = published.standings.into_iter().filter(|(_, (standing, _))| *standing == RegionStanding::Out);
    out.map(|(name, _)| name).collect()
}
