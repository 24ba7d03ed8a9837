//! The models of this pod: which there are, which can answer, what they need to.
//!
//! ```text
//! wanted --facts agree, warm-up answered--> ready --probe fails--> unreachable --facts, warm-up--> ready
//!   |  \--server gone, slow or full--> waiting (tried again)
//!   \--facts differ, file unreadable, warm-up rejected--> refused (tried again, seldom)
//! ```
//!
//! The rule: a model is served as it was last found good. A changed manifest takes its place only when
//! it has passed the same checks; until then, or if it is refused, the old one goes on, with the
//! snapshot that it was read from. Each model has a task of its own, which only a change of its own
//! manifest replaces: no model waits for another, nor begins anew for what is not its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use spillway_core::resource::Model;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::snapshot::Subscription;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::Backend;
use super::breaker::ModelBreaker;
use super::start::{Backends, NotServed, PROBE_TIMEOUT};
use crate::join::Join;
use crate::metrics::{ByModel, SidecarMetrics};

/// How often a model that is not there yet is tried again, and a ready one asked whether it still is.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often a model that was refused is tried again without a new snapshot: only an operator's change helps it.
const REFUSED_INTERVAL: Duration = Duration::from_secs(30);

/// A model that has passed its checks, and everything that a request to it needs.
pub struct ServedModel {
    pub name: Name,
    pub manifest: Arc<Model>,
    pub snapshot: Arc<Snapshot>,
    pub join: Join,
    pub running: Running,
}

/// What outlives a change of the feature groups: a model as it was started.
#[derive(Clone)]
pub struct Running {
    pub backend: Arc<dyn Backend>,
    pub breaker: Arc<ModelBreaker>,
}

/// One model of the pool.
#[derive(Clone)]
struct Entry {
    wanted: Arc<Model>,
    served: Option<Arc<ServedModel>>,
    reachable: bool,
    /// Why the wanted manifest is not what is served.
    fault: Option<NotServed>,
}

impl Entry {
    fn wanted(wanted: &Arc<Model>) -> Self {
        Self { wanted: Arc::clone(wanted), served: None, reachable: false, fault: None }
    }

    fn ready(&self) -> bool {
        self.served.is_some() && self.reachable
    }

    /// Whether what is wanted is what is served.
    fn current(&self) -> bool {
        self.served.as_ref().is_some_and(|served| served.manifest == self.wanted)
    }

    /// Ready, or refused for good.
    fn settled(&self) -> bool {
        self.ready() || self.fault.as_ref().is_some_and(|fault| !fault.may_pass())
    }
}

#[derive(Clone, Default)]
struct Table {
    /// What those who start now are started with.
    snapshot: Option<Arc<Snapshot>>,
    models: BTreeMap<Name, Entry>,
}

/// Which models of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Those that the pool serves.
    Served,
    /// Those that stand in for them.
    Fallbacks,
}

/// The models of this pod. One task runs [`Models::follow`]; requests call [`Models::get`].
pub struct Models {
    pool: Name,
    part: Part,
    backends: Backends,
    metrics: SidecarMetrics,
    table: ArcSwap<Table>,
    /// Whether all models were once ready or refused. A model that comes later does not take the pod away.
    started: AtomicBool,
    /// Rises with every change of what is ready.
    changes: watch::Sender<u64>,
    /// The version of the snapshot that was taken over last.
    adopted: watch::Sender<u64>,
}

/// Whether a request can be served.
pub enum Lookup {
    Served(Arc<ServedModel>),
    /// Of this pool, but cannot answer yet.
    NotReady,
    Unknown,
}

impl Models {
    pub fn new(pool: Name, part: Part, backends: Backends, metrics: SidecarMetrics) -> Arc<Self> {
        Arc::new(Self {
            pool,
            part,
            backends,
            metrics,
            table: ArcSwap::default(),
            started: AtomicBool::new(false),
            changes: watch::Sender::new(0),
            adopted: watch::Sender::new(0),
        })
    }

    /// A model that was once ready is given also while its server is unreachable: the call finds out first.
    pub fn get(&self, name: &str) -> Lookup {
        match self.table.load().models.get(name) {
            None => Lookup::Unknown,
            Some(Entry { served: Some(served), .. }) => Lookup::Served(Arc::clone(served)),
            Some(Entry { served: None, .. }) => Lookup::NotReady,
        }
    }

    /// Whether this pod should get requests at all.
    pub fn ready(&self) -> bool {
        let models = &self.table.load().models;
        self.started.load(Ordering::Acquire) && (models.is_empty() || models.values().any(Entry::ready))
    }

    pub fn model_ready(&self, name: &str) -> bool {
        self.table.load().models.get(name).is_some_and(Entry::ready)
    }

    /// Each model and whether it is ready, in name order.
    pub fn states(&self) -> Vec<(Name, bool)> {
        self.table.load().models.iter().map(|(name, entry)| (name.clone(), entry.ready())).collect()
    }

    /// What a model is served as: the last manifest that passed its checks, with the snapshot that it goes by.
    pub fn served(&self, name: &str) -> Option<Arc<ServedModel>> {
        self.table.load().models.get(name).and_then(|entry| entry.served.clone())
    }

    /// The models that are not ready and why, for the operator.
    pub fn waiting_for(&self) -> String {
        let table = self.table.load();
        let waiting = table.models.iter().filter(|(_, entry)| !entry.ready()).map(|(name, entry)| match &entry.fault {
            Some(fault) => format!("{name}: {fault}"),
            None => format!("{name}: starting"),
        });
        waiting.collect::<Vec<_>>().join("; ")
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Follows the snapshot for ever. The caller drops it to stop it, and the models' tasks with it.
    pub async fn follow(self: Arc<Self>, snapshots: &Subscription) {
        let mut changed = snapshots.changed();
        let mut tasks = JoinSet::new();
        let mut tended: BTreeMap<Name, (Arc<Model>, AbortHandle)> = BTreeMap::new();
        loop {
            changed.mark_unchanged();
            let snapshot = snapshots.current();
            self.adopt(&snapshot);
            let wanted = self.wanted(&snapshot);
            tended.retain(|name, (manifest, task)| {
                // One that has ended by itself has panicked: it is begun anew.
                let stays = wanted.get(name).is_some_and(|wanted| *wanted == manifest) && !task.is_finished();
                if !stays {
                    task.abort();
                }
                stays
            });
            for (name, manifest) in wanted {
                if !tended.contains_key(name) {
                    let task = tasks.spawn(Arc::clone(&self).tend(name.clone(), Arc::clone(manifest)));
                    tended.insert(name.clone(), (Arc::clone(manifest), task));
                }
            }
            loop {
                tokio::select! {
                    // Never fails: the subscription, which we hold, is the sender.
                    _ = changed.changed() => break,
                    Some(ended) = tasks.join_next() => if ended.is_err_and(|error| error.is_panic()) {
                        sleep(INTERVAL).await;
                        break;
                    },
                }
            }
        }
    }

    fn wanted<'a>(&self, snapshot: &'a Snapshot) -> BTreeMap<&'a Name, &'a Arc<Model>> {
        match self.part {
            Part::Served => snapshot.models_of(&self.pool).collect(),
            Part::Fallbacks => snapshot.fallbacks_of(&self.pool).collect(),
        }
    }

    /// Takes over which models there are. What does not change goes on, with the new feature groups.
    fn adopt(&self, snapshot: &Arc<Snapshot>) {
        let all = self.wanted(snapshot);
        let adopted = |table: &Arc<Table>| {
            let entry = |(name, wanted): (&&Name, &&Arc<Model>)| {
                let (name, wanted) = (*name, *wanted);
                let mut entry = match table.models.get(name).cloned() {
                    Some(old) if old.wanted == *wanted => old,
                    Some(old) => Entry { wanted: Arc::clone(wanted), fault: None, ..old },
                    None => Entry::wanted(wanted),
                };
                if let Some(served) = entry.served.as_ref().filter(|served| served.manifest == *wanted)
                    && let Some(served) = ServedModel::of(name, wanted, snapshot, &served.running)
                {
                    entry.served = Some(Arc::new(served));
                }
                (name.clone(), entry)
            };
            let models = all.iter().map(entry).collect();
            Table { snapshot: Some(Arc::clone(snapshot)), models }
        };
        let old = self.table.rcu(adopted);
        for name in old.models.keys().filter(|name| !all.contains_key(name)) {
            tracing::info!(model = %name, "the model is no longer served here");
        }
        self.adopted.send_replace(snapshot.version);
        self.changed();
    }

    /// Starts one model and asks it whether it is there, as long as its manifest stays.
    async fn tend(self: Arc<Self>, name: Name, wanted: Arc<Model>) {
        let mut adopted = self.adopted.subscribe();
        loop {
            adopted.mark_unchanged();
            let Some(entry) = self.table.load().models.get(&name).cloned() else { return };
            let mut refused = false;
            if !(entry.current() && entry.reachable) {
                refused = self.start(&name, &wanted, &entry).await.is_err_and(|fault| !fault.may_pass());
            }
            if let Some(served) = &entry.served
                && (entry.reachable || !entry.current())
            {
                self.probe(&name, served, entry.reachable).await;
            }
            sleep(INTERVAL).await;
            if refused {
                let _ = timeout(REFUSED_INTERVAL, adopted.changed()).await;
            }
        }
    }

    async fn probe(&self, name: &Name, served: &Arc<ServedModel>, reachable: bool) {
        let deadline = Instant::now() + PROBE_TIMEOUT;
        let mut fault = None;
        for version in &served.manifest.versions {
            if let Err(error) = served.running.backend.ready(version, deadline).await {
                fault = Some(NotServed::Model { version: version.clone(), error });
                break;
            }
        }
        if fault.is_none() == reachable {
            return;
        }
        match &fault {
            Some(fault) => tracing::warn!(model = %name, reason = %fault, "the model is not ready any more"),
            None => tracing::info!(model = %name, "the model is ready again"),
        }
        self.update(name, |_, entry| {
            // What was started meanwhile speaks for itself.
            if entry.served.as_ref().is_some_and(|now| Arc::ptr_eq(&now.running.backend, &served.running.backend)) {
                entry.reachable = fault.is_none();
                // Of one that is to be replaced, the fault is why it is not yet.
                if entry.current() {
                    entry.fault.clone_from(&fault);
                }
            }
        });
    }

    async fn start(&self, name: &Name, wanted: &Arc<Model>, entry: &Entry) -> Result<(), NotServed> {
        let running = self
            .backends
            .start(name, wanted)
            .await
            .map(|backend| Running { backend, breaker: ModelBreaker::new(wanted.traffic.breaker.clone()) });
        let mut outcome = running.as_ref().map(|_| ()).map_err(Clone::clone);
        self.update(name, |snapshot, entry| {
            // With the groups of now: the snapshot may have changed since the start began.
            let served = running.as_ref().map_err(Clone::clone).and_then(|running| {
                let served = snapshot.and_then(|snapshot| ServedModel::of(name, wanted, snapshot, running));
                served.ok_or(NotServed::Features)
            });
            outcome = served.as_ref().map(|_| ()).map_err(Clone::clone);
            match served {
                Ok(served) => {
                    *entry = Entry { served: Some(Arc::new(served)), reachable: true, fault: None, ..entry.clone() };
                }
                Err(fault) => entry.fault = Some(fault),
            }
        });
        match &outcome {
            Ok(()) => tracing::info!(model = %name, versions = wanted.versions.len(), "the model is ready"),
            // Said once, not at every try.
            Err(fault) if entry.fault.as_ref() == Some(fault) => {}
            Err(fault) => {
                self.metrics.models_refused.get_or_create(&ByModel { model: name.to_string() }).inc();
                let kept = entry.served.is_some();
                if fault.may_pass() {
                    tracing::warn!(model = %name, reason = %fault, kept, "the model is not ready yet");
                } else {
                    tracing::error!(model = %name, reason = %fault, kept, "the model is refused");
                }
            }
        }
        outcome
    }

    fn update(&self, name: &Name, mut change: impl FnMut(Option<&Arc<Snapshot>>, &mut Entry)) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            if let Some(entry) = table.models.get_mut(name) {
                change(table.snapshot.as_ref(), entry);
            }
            table
        });
        self.changed();
    }

    fn changed(&self) {
        if self.table.load().models.values().all(Entry::settled) {
            self.started.store(true, Ordering::Release);
        }
        self.changes.send_modify(|count| *count += 1);
    }
}

impl ServedModel {
    /// `None` if the snapshot lacks a feature that the model binds; a checked one does not.
    fn of(name: &Name, manifest: &Arc<Model>, snapshot: &Arc<Snapshot>, running: &Running) -> Option<Self> {
        let join = Join::of(manifest, snapshot)?;
        let (manifest, snapshot) = (Arc::clone(manifest), Arc::clone(snapshot));
        Some(Self { name: name.clone(), manifest, snapshot, join, running: running.clone() })
    }
}
