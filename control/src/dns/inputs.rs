//! What a DNS node knows: resources and plan, from the control plane or from a file, and what its own probes see.
//!
//! The rule: each is the last good one, whoever is gone. A view is made anew whenever one of them changes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use spillway_core::failover::Standing;
use spillway_core::health::Vantage;
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_runtime::audit::Audit;
use spillway_runtime::drain::Drain;
use spillway_runtime::link::{Intake, Link};
use spillway_runtime::plan::Plans;
use spillway_runtime::snapshot::{Refused, Subscription};
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::Workload;
use spillway_runtime::vantage::{Post, Sources};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::server::Server;
use super::settings::DnsSettings;
use super::view::View;

/// What views are made of. Cheap to clone.
#[derive(Clone)]
pub struct Inputs {
    pub snapshots: Arc<Subscription>,
    pub plans: Arc<Plans>,
    /// Regions that are down as seen from here.
    pub down: watch::Receiver<BTreeSet<Name>>,
}

/// What keeps them fresh.
pub struct Feeds {
    post: Post,
    /// None: the snapshot's file is followed.
    link: Option<Link>,
}

impl Inputs {
    /// Takes up what is in the files. Blocks on them.
    pub fn load(
        settings: &DnsSettings,
        workload: &Arc<Workload>,
        metrics: &Metrics,
        audit: &Audit,
    ) -> Result<(Self, Feeds), Refused> {
        let path: &Path = &settings.common.snapshot;
        let (snapshots, plans, link) = match &settings.common.control {
            Some(control_plane) => {
                let intake = Intake::resume(path, metrics, audit);
                let (snapshots, plans) = (intake.snapshots(), intake.plans());
                let link = Link::new(control_plane.clone(), Arc::clone(workload), intake, None, metrics);
                (snapshots, plans, Some(link))
            }
            None => (Arc::new(Subscription::start(path, metrics, audit)?), Arc::new(Plans::none()), None),
        };
        let sources = Sources {
            // It answers for all regions, and so has a word of its own on each.
            us: Vantage::Dns { region: None, node: settings.node.clone() },
            region: &settings.region,
            snapshots: &snapshots,
            plans: &plans,
            sightings: link.as_ref().map(Link::sightings),
            pulses: link.as_ref().map(Link::pulses),
        };
        let post = Post::new(sources, Arc::clone(workload), metrics);
        let down = post.down();
        Ok((Self { snapshots, plans, down }, Feeds { post, link }))
    }

    pub fn view(&self) -> View {
        View::of(&self.snapshots.load(), self.plans.current().as_deref(), &self.down.borrow())
    }

    /// Gives the server a view whenever what it is made of changes.
    pub async fn follow(mut self, server: Arc<Server>) {
        let (mut snapshots, mut plans) = (self.snapshots.changed(), self.plans.changed());
        loop {
            snapshots.mark_unchanged();
            plans.mark_unchanged();
            self.down.mark_unchanged();
            take(&server, &self.view());
            let changed = tokio::select! {
                changed = snapshots.changed() => changed,
                changed = plans.changed() => changed,
                changed = self.down.changed() => changed,
            };
            if changed.is_err() {
                // The prober has ended, and so will we.
                return;
            }
        }
    }
}

impl Feeds {
    /// Tells the control plane what the server answers.
    pub fn tell_answers(self, server: &Arc<Server>) -> Self {
        let (server, last) = (Arc::clone(server), Mutex::new(BTreeMap::new()));
        let answers = move || {
            let counts = server.metrics.answers();
            let last = std::mem::replace(&mut *last.lock(), counts.clone());
            let since = |name: &Name, count: u64| count.saturating_sub(last.get(name).copied().unwrap_or_default());
            let regions = counts
                .iter()
                .map(|(name, count)| control::RegionAnswers { region: name.to_string(), answers: since(name, *count) });
            control::Answers { regions: regions.filter(|told| told.answers > 0).collect() }
        };
        Self { link: self.link.map(|link| link.with_answers(Box::new(answers))), ..self }
    }

    /// Runs them as tasks of the node's.
    pub fn start(self, tasks: &mut JoinSet<()>, inputs: &Inputs, drain: &Drain) {
        tasks.spawn(self.post.run(drain.clone()));
        match self.link {
            Some(link) => {
                tasks.spawn(link.follow(drain.clone()));
            }
            None => {
                tasks.spawn(Arc::clone(&inputs.snapshots).watch(drain.clone()));
            }
        }
    }
}

/// Has the server answer a view that is new.
pub fn take(server: &Server, view: &View) {
    if server.offered(view) {
        return;
    }
    let standings = |standing| {
        let regions = view.regions.iter().filter(move |(_, place)| place.standing == standing);
        regions.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" ")
    };
    let (unsteady, out) = (standings(Standing::Unsteady), standings(Standing::Out));
    if server.take(view.clone()) {
        tracing::info!(serial = view.serial, regions = view.regions.len(), unsteady, out, "answers follow a new view");
    } else {
        tracing::error!(serial = view.serial, "a view lacks addresses; the last ones are answered");
    }
}
