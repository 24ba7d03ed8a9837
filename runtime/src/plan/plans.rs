//! The plan that holds now, and what was kept of it.

use std::path::Path;
use std::sync::Arc;

use arc_swap::{ArcSwapOption, Guard};
use bytes::Bytes;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prost::Message;
use spillway_core::failover::UnfitPlan;
use spillway_proto::control;
use tokio::sync::watch;

use super::{Published, Unreadable, open};
use crate::generations::{Found, Generations};
use crate::telemetry::{Chain, Metrics};

/// More bytes than this are no plan: it has a few hundred for each region.
pub(crate) const MOST_BYTES: usize = 1 << 20;

/// The newest plan that was accepted. Without a control plane there is none, ever.
#[derive(Debug)]
pub struct Plans {
    current: ArcSwapOption<Published>,
    /// Says that `current` was replaced; carries the version, 0 for none.
    changed: watch::Sender<u64>,
    version: Gauge,
    accepted: Counter,
    rejected: Family<Reason, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// What stays of a plan beside its compiled form.
#[derive(Debug)]
pub(crate) struct KeptPlan {
    pub generations: Generations,
    /// Of the encoded plan that is served; none for none.
    pub sha256: Option<Bytes>,
}

/// What was kept is no plan.
#[derive(Debug, thiserror::Error)]
enum NoPlan {
    #[error("the plan file cannot be read")]
    File(#[from] std::io::Error),
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Unfit(Vec<UnfitPlan>),
}

impl Plans {
    /// None: a process without a control plane.
    pub fn none() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            changed: watch::Sender::new(0),
            version: Gauge::default(),
            accepted: Counter::default(),
            rejected: Family::default(),
        }
    }

    /// What was kept when the process ran last. Blocks on the file system.
    pub(crate) fn resume(path: &Path, metrics: &Metrics) -> (Self, KeptPlan) {
        let plans = Self {
            version: metrics.register("plan_version", "The version of the plan that holds", Gauge::default()),
            accepted: metrics.register("plan_accepted", "Plans that were taken", Counter::default()),
            rejected: metrics.family("plan_rejected", "Plans refused; the last good one stayed"),
            ..Self::none()
        };
        let mut generations = Generations::new(path, 2 * MOST_BYTES as u64);
        let found = generations.read(|content| {
            let sealed = control::SealedPlan::decode(content).map_err(|_| Unreadable::Malformed)?;
            let published = open(&sealed)?;
            published.plan.check(None, |_| true).map_err(NoPlan::Unfit)?;
            Ok::<_, NoPlan>((published, sealed.sha256))
        });
        let (good, bad) = match found {
            Found::Newest(good) => (Some(good), Vec::new()),
            Found::Previous { value, newest } => (Some(value), vec![newest]),
            Found::Neither { newest, previous } => (None, vec![newest, previous]),
            Found::Nothing => (None, Vec::new()),
        };
        for problem in bad {
            plans.tell_refused("unreadable", &Chain(&problem).to_string());
        }
        let sha256 = good.map(|(published, sha256)| {
            plans.replace(published);
            sha256
        });
        (plans, KeptPlan { generations, sha256 })
    }

    /// The plan that holds. A request asks once and keeps it to its end.
    pub fn current(&self) -> Option<Arc<Published>> {
        self.current.load_full()
    }

    /// The same for one look, which costs no count that threads share. Not to be kept over anything that waits.
    pub fn look(&self) -> Guard<Option<Arc<Published>>> {
        self.current.load()
    }

    /// 0 for none.
    pub fn version(&self) -> u64 {
        *self.changed.borrow()
    }

    /// Tells of each replacement, with the version; 0 for none.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Has a plan hold that was checked.
    pub fn replace(&self, published: Published) {
        let version = published.plan.version;
        self.current.store(Some(Arc::new(published)));
        self.accepted.inc();
        self.version.set(i64::try_from(version).unwrap_or(i64::MAX));
        self.changed.send_replace(version);
        tracing::info!(version, "plan taken");
    }

    /// Counts that something was not taken.
    pub(crate) fn tell_refused(&self, reason: &'static str, problem: &str) {
        self.rejected.get_or_create(&Reason { reason }).inc();
        tracing::error!(reason, problem, holding = self.version(), "plan refused, the last good one stays");
    }
}
