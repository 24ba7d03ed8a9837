//! Where a process's Snapshot comes from: a file that is followed, or pushes.

use std::sync::Arc;

use spillway_proto::control;
use tokio::sync::watch;

use super::{ControlSettings, Intake, Link, SightingLog, TrafficSource};
use crate::audit::Audit;
use crate::drain::Drain;
use crate::plan::Plans;
use crate::settings::CommonSettings;
use crate::snapshot::{Refused, Subscription};
use crate::telemetry::Metrics;
use crate::tls::Workload;

/// What is served at first. Without a control plane there is a snapshot, and never a plan; with one, what was kept.
#[derive(Debug)]
pub struct Source {
    pub snapshots: Arc<Subscription>,
    pub plans: Arc<Plans>,
    pushes: Option<(ControlSettings, Intake)>,
}

/// What replaces it.
pub enum Feed {
    File(Arc<Subscription>),
    Pushes(Box<Link>),
}

impl Source {
    /// Blocks on the file system.
    pub fn open(settings: &CommonSettings, metrics: &Metrics, audit: &Audit) -> Result<Self, Refused> {
        let Some(control) = &settings.control else {
            let snapshots = Arc::new(Subscription::start(&settings.snapshot, metrics, audit)?);
            return Ok(Self { snapshots, plans: Arc::new(Plans::none()), pushes: None });
        };
        let intake = Intake::resume(&settings.snapshot, metrics, audit);
        let (snapshots, plans) = (intake.snapshots(), intake.plans());
        Ok(Self { snapshots, plans, pushes: Some((control.clone(), intake)) })
    }

    /// `traffic`: of a gateway, what it tells the control plane.
    pub fn feed(self, workload: Arc<Workload>, traffic: Option<Arc<dyn TrafficSource>>, metrics: &Metrics) -> Feed {
        match self.pushes {
            None => Feed::File(self.snapshots),
            Some((control, intake)) => Feed::Pushes(Box::new(Link::new(control, workload, intake, traffic, metrics))),
        }
    }
}

impl Feed {
    /// As [`Link::pulses`]; none without a control plane.
    pub fn pulses(&self) -> Option<watch::Receiver<control::Pulse>> {
        match self {
            Self::File(_) => None,
            Self::Pushes(link) => Some(link.pulses()),
        }
    }

    /// As [`Link::sightings`]; none without a control plane.
    pub fn sightings(&self) -> Option<SightingLog> {
        match self {
            Self::File(_) => None,
            Self::Pushes(link) => Some(link.sightings()),
        }
    }

    /// Follows the file, or the control plane, until stopped.
    pub async fn follow(self, drain: Drain) {
        match self {
            Self::File(snapshots) => snapshots.watch(drain).await,
            Self::Pushes(link) => link.follow(drain).await,
        }
    }
}
