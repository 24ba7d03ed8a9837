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
//! snapshot that it was read from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::join_all;
use spillway_core::inference::{InferRequest, Limits, Parameters, RequestedOutput, Tensor, check};
use spillway_core::resource::{self, Model, TensorSpec};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::snapshot::Subscription;
use spillway_runtime::telemetry::TraceParent;
use tokio::sync::watch;

use super::facts::Mismatch;
use super::onnx::{Compute, LoadError, Onnx};
use super::triton::Server;
use super::{Backend, Call, ModelError};
use crate::join::Join;
use crate::metrics::{ByModel, SidecarMetrics};

/// How often a model that is not there yet is tried again, and a ready one asked whether it still is.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often a model that was refused is tried again: only an operator's change helps it.
const REFUSED_INTERVAL: Duration = Duration::from_secs(30);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// First runs compile, allocate and load; they may take far longer than any request.
const WARM_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// Where models come from.
pub struct Backends {
    /// Triton's repository layout: `<models>/<model>/<version>/model.onnx`.
    pub models: Option<PathBuf>,
    pub triton: Option<Server>,
    pub compute: Arc<Compute>,
}

/// A model that has passed its checks, and everything that a request to it needs.
pub struct ServedModel {
    pub name: Name,
    pub manifest: Arc<Model>,
    pub snapshot: Arc<Snapshot>,
    pub join: Join,
    pub backend: Arc<dyn Backend>,
}

/// Why a model is not served. The operator's fault, or the model server's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotServed {
    #[error("the settings name no folder of models, which the backend onnx needs")]
    NoFolder,
    #[error("the settings name no Triton server, which the backend triton needs")]
    NoTriton,
    #[error("the snapshot lacks a feature that the model binds")]
    Features,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("version '{version}': {mismatch}")]
    Mismatch { version: Name, mismatch: Mismatch },
    #[error("version '{version}': {error}")]
    Model { version: Name, error: ModelError },
    #[error("version '{version}': the warm-up was not answered: {error}")]
    WarmUp { version: Name, error: ModelError },
}

impl NotServed {
    /// Whether it may pass by itself.
    fn may_pass(&self) -> bool {
        match self {
            Self::NoFolder | Self::NoTriton | Self::Features | Self::Load(_) | Self::Mismatch { .. } => false,
            Self::Model { error, .. } | Self::WarmUp { error, .. } => error.may_pass(),
        }
    }
}

/// One model of the pool.
#[derive(Clone)]
struct Entry {
    wanted: Arc<Model>,
    served: Option<Arc<ServedModel>>,
    reachable: bool,
    /// Why the wanted manifest is not what is served.
    fault: Option<NotServed>,
    next_try: Instant,
}

impl Entry {
    fn ready(&self) -> bool {
        self.served.is_some() && self.reachable
    }

    fn current(&self) -> bool {
        self.ready() && self.served.as_ref().is_some_and(|served| served.manifest == self.wanted)
    }

    /// Ready, or refused for good.
    fn settled(&self) -> bool {
        self.ready() || self.fault.as_ref().is_some_and(|fault| !fault.may_pass())
    }
}

type Table = BTreeMap<Name, Entry>;

/// The models of this pod. One task runs [`Models::follow`]; requests call [`Models::get`].
pub struct Models {
    pool: Name,
    backends: Backends,
    metrics: SidecarMetrics,
    table: ArcSwap<Table>,
    /// Whether all models were once ready or refused. A model that comes later does not take the pod away.
    started: AtomicBool,
    /// Rises with every change of what is ready.
    changes: watch::Sender<u64>,
}

/// Whether a request can be served.
pub enum Lookup {
    Served(Arc<ServedModel>),
    /// Of this pool, but cannot answer yet.
    NotReady,
    Unknown,
}

impl Models {
    pub fn new(pool: Name, backends: Backends, metrics: SidecarMetrics) -> Arc<Self> {
        Arc::new(Self {
            pool,
            backends,
            metrics,
            table: ArcSwap::default(),
            started: AtomicBool::new(false),
            changes: watch::Sender::new(0),
        })
    }

    /// A model that was once ready is given also while its server is unreachable: the call finds out first.
    pub fn get(&self, name: &str) -> Lookup {
        match self.table.load().get(name) {
            None => Lookup::Unknown,
            Some(Entry { served: Some(served), .. }) => Lookup::Served(Arc::clone(served)),
            Some(Entry { served: None, .. }) => Lookup::NotReady,
        }
    }

    /// Whether this pod should get requests at all.
    pub fn ready(&self) -> bool {
        let table = self.table.load();
        self.started.load(Ordering::Acquire) && (table.is_empty() || table.values().any(Entry::ready))
    }

    pub fn model_ready(&self, name: &str) -> bool {
        self.table.load().get(name).is_some_and(Entry::ready)
    }

    /// Each model and whether it is ready, in name order.
    pub fn states(&self) -> Vec<(Name, bool)> {
        self.table.load().iter().map(|(name, entry)| (name.clone(), entry.ready())).collect()
    }

    /// The models that are not ready and why, for the operator.
    pub fn waiting_for(&self) -> String {
        let table = self.table.load();
        let waiting = table.iter().filter(|(_, entry)| !entry.ready()).map(|(name, entry)| match &entry.fault {
            Some(fault) => format!("{name}: {fault}"),
            None => format!("{name}: starting"),
        });
        waiting.collect::<Vec<_>>().join("; ")
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Follows the snapshot for ever: begins anew whenever it changes. The caller drops it to stop it.
    pub async fn follow(&self, snapshots: &Subscription) {
        let mut changed = snapshots.changed();
        loop {
            changed.mark_unchanged();
            let snapshot = snapshots.current();
            tokio::select! {
                () = self.serve(&snapshot) => {}
                // Never fails: the subscription, which we hold, is the sender.
                _ = changed.changed() => {}
            }
        }
    }

    /// Serves one snapshot until dropped.
    async fn serve(&self, snapshot: &Arc<Snapshot>) {
        self.adopt(snapshot);
        loop {
            let now = Instant::now();
            let table = self.table.load_full();
            let work = table.iter().map(|(name, entry)| async move {
                if entry.current() {
                    self.probe(name, entry).await;
                } else if entry.next_try <= now {
                    self.start(name, entry, snapshot).await;
                }
            });
            join_all(work).await;
            if !self.started.load(Ordering::Acquire) && self.table.load().values().all(Entry::settled) {
                self.started.store(true, Ordering::Release);
                self.changes.send_modify(|count| *count += 1);
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Takes over which models there are. What does not change goes on, with the new feature groups.
    fn adopt(&self, snapshot: &Arc<Snapshot>) {
        let old = self.table.load_full();
        let entry = |(name, wanted): (&Name, &Arc<Model>)| {
            let fresh = Entry {
                wanted: Arc::clone(wanted),
                served: None,
                reachable: false,
                fault: None,
                next_try: Instant::now(),
            };
            let mut entry = old.get(name).cloned().map_or(fresh, |old| Entry {
                wanted: Arc::clone(wanted),
                next_try: Instant::now(),
                ..old
            });
            if let Some(served) = entry.served.as_ref().filter(|served| served.manifest == *wanted)
                && let Some(join) = Join::of(wanted, snapshot)
            {
                entry.served = Some(Arc::new(ServedModel {
                    name: name.clone(),
                    manifest: Arc::clone(wanted),
                    snapshot: Arc::clone(snapshot),
                    join,
                    backend: Arc::clone(&served.backend),
                }));
                entry.fault = None;
            }
            (name.clone(), entry)
        };
        let table: Table = snapshot.models_of(&self.pool).map(entry).collect();
        for name in old.keys().filter(|name| !table.contains_key(*name)) {
            tracing::info!(model = %name, "the model is no longer served here");
        }
        self.table.store(Arc::new(table));
        self.changes.send_modify(|count| *count += 1);
    }

    async fn probe(&self, name: &Name, entry: &Entry) {
        let Some(served) = &entry.served else { return };
        let deadline = Instant::now() + PROBE_TIMEOUT;
        for version in &served.manifest.versions {
            if let Err(error) = served.backend.ready(version, deadline).await {
                let fault = NotServed::Model { version: version.clone(), error };
                tracing::warn!(model = %name, reason = %fault, "the model is not ready any more");
                self.update(name, |entry| {
                    entry.reachable = false;
                    entry.fault = Some(fault.clone());
                });
                return;
            }
        }
    }

    async fn start(&self, name: &Name, entry: &Entry, snapshot: &Arc<Snapshot>) {
        match self.backends.start(name, &entry.wanted, snapshot).await {
            Ok(served) => {
                tracing::info!(model = %name, versions = served.manifest.versions.len(), "the model is ready");
                self.update(name, |entry| {
                    *entry = Entry { served: Some(Arc::clone(&served)), reachable: true, fault: None, ..entry.clone() };
                });
            }
            Err(fault) => {
                let wait = if fault.may_pass() { INTERVAL } else { REFUSED_INTERVAL };
                // Said once, not at every try.
                if entry.fault.as_ref() != Some(&fault) {
                    self.metrics.models_refused.get_or_create(&ByModel { model: name.to_string() }).inc();
                    let kept = entry.served.is_some();
                    if fault.may_pass() {
                        tracing::warn!(model = %name, reason = %fault, kept, "the model is not ready yet");
                    } else {
                        tracing::error!(model = %name, reason = %fault, kept, "the model is refused");
                    }
                }
                self.update(name, |entry| {
                    entry.fault = Some(fault.clone());
                    entry.next_try = Instant::now() + wait;
                });
            }
        }
    }

    fn update(&self, name: &Name, change: impl Fn(&mut Entry)) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            if let Some(entry) = table.get_mut(name) {
                change(entry);
            }
            table
        });
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Backends {
    /// Loads or connects, holds the model's facts against the manifest, warms up.
    async fn start(
        &self,
        name: &Name,
        manifest: &Arc<Model>,
        snapshot: &Arc<Snapshot>,
    ) -> Result<Arc<ServedModel>, NotServed> {
        let join = Join::of(manifest, snapshot).ok_or(NotServed::Features)?;
        let backend: Arc<dyn Backend> = match manifest.backend {
            resource::Backend::Onnx => {
                let folder = self.models.as_deref().ok_or(NotServed::NoFolder)?;
                Arc::new(Onnx::load(folder, name, manifest, &self.compute).await?)
            }
            resource::Backend::Triton => Arc::new(self.triton.as_ref().ok_or(NotServed::NoTriton)?.model(name)),
        };
        for version in &manifest.versions {
            let model = |error| NotServed::Model { version: version.clone(), error };
            let deadline = Instant::now() + PROBE_TIMEOUT;
            backend.ready(version, deadline).await.map_err(model)?;
            let facts = backend.facts(version, deadline).await.map_err(model)?;
            facts.check(manifest).map_err(|mismatch| NotServed::Mismatch { version: version.clone(), mismatch })?;
            warm_up(&*backend, name, version, manifest)
                .await
                .map_err(|error| NotServed::WarmUp { version: version.clone(), error })?;
        }
        Ok(Arc::new(ServedModel {
            name: name.clone(),
            manifest: Arc::clone(manifest),
            snapshot: Arc::clone(snapshot),
            join,
            backend,
        }))
    }
}

async fn warm_up(backend: &dyn Backend, name: &Name, version: &Name, manifest: &Model) -> Result<(), ModelError> {
    let inputs: Option<Vec<Tensor>> =
        manifest.inputs.iter().map(|input| zeros(&input.tensor, manifest.warm_up.batch)).collect();
    let inputs = inputs.ok_or_else(|| ModelError::Rejected("a tensor of the warm-up would be too large".into()))?;
    let request = InferRequest {
        model: name.to_string(),
        version: version.to_string(),
        id: "warm-up".into(),
        parameters: Parameters::default(),
        inputs,
        outputs: all_outputs(manifest),
    };
    for _ in 0..manifest.warm_up.requests {
        let call = Call { deadline: Instant::now() + WARM_UP_TIMEOUT, trace: TraceParent::none() };
        let answer = backend.infer(&request, &call).await?;
        let checked = check::check_answer(manifest, &request, &answer, None);
        checked.map_err(|fault| ModelError::BadAnswer(fault.to_string()))?;
    }
    Ok(())
}

/// What a request asks for that names no outputs: those of the manifest, as more would be a wrong answer.
pub fn all_outputs(manifest: &Model) -> Vec<RequestedOutput> {
    let output = |spec: &TensorSpec| RequestedOutput { name: spec.name.clone(), parameters: Parameters::default() };
    manifest.outputs.iter().map(output).collect()
}

/// A tensor of zeros, or of empty texts; `None` if it would be larger than any request may be.
fn zeros(spec: &TensorSpec, batch: u32) -> Option<Tensor> {
    let shape: Vec<i64> = spec.shape.iter().map(|&size| if size == -1 { i64::from(batch) } else { size }).collect();
    // An empty element of BYTES is its length alone.
    let width = spec.datatype.width().unwrap_or(size_of::<u32>());
    let bytes = shape.iter().try_fold(width, |bytes, &size| bytes.checked_mul(usize::try_from(size).ok()?))?;
    (bytes <= Limits::default().tensor).then(|| Tensor {
        name: spec.name.clone(),
        datatype: spec.datatype,
        shape,
        parameters: Parameters::default(),
        data: Bytes::from(vec![0; bytes]),
    })
}
