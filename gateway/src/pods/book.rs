//! What is known of the region's pools, models and pods, shared by all threads.
//!
//! The rule: it outlives Snapshots as far as they name the same things. Only what the newest one names
//! counts: threads that still look at an older one keep the entries of what is gone, and nobody asks
//! those any more. Every map is bounded by what Snapshots name.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use spillway_core::resilience::outlier::{Change, PodId};
use spillway_core::resilience::{Budget, BudgetSettings, Latencies, OutlierSettings, Outliers, Standing};
use spillway_core::resource::Model;
use spillway_core::routing::{HotEntities, HotSettings};
use spillway_core::units::Name;

use crate::clock::Clock;
use crate::pods::breaker::SharedBreaker;
use crate::pods::fleet::Fleet;
use crate::pods::metrics::{PodMetrics, Standings};
use crate::pods::pod::{PodKey, PodState};

/// Breakers of all models on all pods, about 16 MiB. Models on pods beyond it have none.
const MOST_BREAKERS: usize = 65_536;

/// The time, and where to count and tell what happens to pods.
pub struct Recorder {
    pub clock: Clock,
    pub metrics: PodMetrics,
}

impl Recorder {
    /// Acts on what an outlier detector found of a pod, and tells operators.
    pub fn tell(&self, pod: &PodState, change: &Change, now: Duration) {
        self.metrics.changed(change);
        let (pool, name) = (&pod.key.pool, &pod.key.pod);
        match change {
            Change::Ejected { reason, until, .. } => {
                let for_ms = until.saturating_sub(now).as_millis() as u64;
                tracing::warn!(%pool, pod = %name, ?reason, for_ms, "pod ejected");
            }
            Change::Held { reason, .. } => {
                tracing::warn!(%pool, pod = %name, ?reason, "pod should be ejected, but too many are");
            }
            Change::Restored { .. } => {
                pod.healed(now);
                tracing::info!(%pool, pod = %name, "pod restored");
            }
        }
    }
}

/// One pool.
pub struct PoolState {
    pub outliers: Mutex<Outliers>,
}

/// One model on its pool.
pub struct ModelState {
    pub traffic: Mutex<Traffic>,
    /// Of weighted round robin.
    pub turn: AtomicU64,
}

/// What a model's requests showed and may still cost.
pub struct Traffic {
    pub latencies: Latencies,
    pub budget: Budget,
    budget_settings: BudgetSettings,
    pub hot: HotEntities,
    hot_settings: HotSettings,
}

impl ModelState {
    fn new(model: &Model) -> Self {
        let (budget_settings, hot_settings) = (model.traffic.budget.clone(), model.traffic.routing.hot.clone());
        let traffic = Traffic {
            latencies: Latencies::new(Latencies::DEFAULT_WINDOW),
            budget: Budget::new(&budget_settings),
            budget_settings,
            hot: HotEntities::new(&hot_settings),
            hot_settings,
        };
        Self { traffic: Mutex::new(traffic), turn: AtomicU64::new(0) }
    }

    /// Takes other settings; what they govern begins anew if they are others.
    fn set(&self, model: &Model) {
        let traffic = &mut *self.traffic.lock();
        if traffic.budget_settings != model.traffic.budget {
            traffic.budget_settings = model.traffic.budget.clone();
            traffic.budget = Budget::new(&traffic.budget_settings);
        }
        if traffic.hot_settings != model.traffic.routing.hot {
            traffic.hot_settings = model.traffic.routing.hot.clone();
            traffic.hot = HotEntities::new(&traffic.hot_settings);
        }
    }
}

/// All that is known.
pub struct Book {
    pub recorder: Arc<Recorder>,
    entries: Mutex<Entries>,
    newest: ArcSwapOption<Fleet>,
}

#[derive(Default)]
struct Entries {
    last_id: PodId,
    pods: HashMap<PodKey, Arc<PodState>>,
    pools: HashMap<Name, Arc<PoolState>>,
    models: HashMap<(Name, Name), Arc<ModelState>>,
    breakers: HashMap<(PodId, Name), Arc<SharedBreaker>>,
}

impl Book {
    pub fn new(clock: Clock, metrics: PodMetrics) -> Self {
        let recorder = Arc::new(Recorder { clock, metrics });
        Self { recorder, entries: Mutex::default(), newest: ArcSwapOption::empty() }
    }

    pub fn pod(&self, key: &PodKey) -> Arc<PodState> {
        let Entries { last_id, pods, .. } = &mut *self.entries.lock();
        let new = || {
            *last_id = last_id.wrapping_add(1);
            Arc::new(PodState::new(key.clone(), *last_id, rand::random(), self.recorder.clock.now()))
        };
        pods.entry(key.clone()).or_insert_with(new).clone()
    }

    pub fn pool(&self, name: &Name) -> Arc<PoolState> {
        let new = || Arc::new(PoolState { outliers: Mutex::new(Outliers::new(OutlierSettings::default())) });
        self.entries.lock().pools.entry(name.clone()).or_insert_with(new).clone()
    }

    pub fn model(&self, pool: &Name, name: &Name, model: &Model) -> Arc<ModelState> {
        let key = (pool.clone(), name.clone());
        self.entries.lock().models.entry(key).or_insert_with(|| Arc::new(ModelState::new(model))).clone()
    }

    /// None beyond [`MOST_BREAKERS`].
    pub fn breaker(&self, pod: PodId, name: &Name, model: &Model) -> Option<Arc<SharedBreaker>> {
        let breakers = &mut self.entries.lock().breakers;
        let (room, key) = (breakers.len() < MOST_BREAKERS, (pod, name.clone()));
        if !room && !breakers.contains_key(&key) {
            return None;
        }
        let new = || Arc::new(SharedBreaker::new(model.traffic.breaker.clone()));
        Some(breakers.entry(key).or_insert_with(new).clone())
    }

    /// Says what the newest Snapshot names: it gets its settings, and the rest is forgotten once no thread
    /// looks at it.
    pub fn keep(&self, fleet: &Arc<Fleet>) {
        self.newest.store(Some(fleet.clone()));
        for lane in fleet.lanes() {
            lane.state.set(&lane.model);
            lane.breakers.iter().flatten().for_each(|breaker| breaker.set(&lane.model.traffic.breaker));
        }
        let now = self.recorder.clock.now();
        for pool in fleet.pools() {
            let ids: Vec<PodId> = pool.pods.iter().map(|pod| pod.state.id).collect();
            let changes = pool.state.outliers.lock().keep(&ids);
            pool.tell(&self.recorder, &changes, now);
        }
        let entries = &mut *self.entries.lock();
        forget(&mut entries.breakers);
        forget(&mut entries.models);
        forget(&mut entries.pools);
        forget(&mut entries.pods);
        if entries.breakers.len() >= MOST_BREAKERS {
            tracing::warn!(most = MOST_BREAKERS, "too many models on too many pods: some have no circuit breaker");
        }
    }

    /// Applies the outlier rules of time and of comparison.
    pub fn sweep(&self) {
        let Some(fleet) = self.newest.load_full() else { return };
        let now = self.recorder.clock.now();
        for pool in fleet.pools() {
            let changes = pool.state.outliers.lock().sweep(now);
            pool.tell(&self.recorder, &changes, now);
        }
    }

    /// Sets the gauges of pods.
    pub fn show_pods(&self) {
        let Some(fleet) = self.newest.load_full() else { return };
        let now = self.recorder.clock.now();
        let mut standings = Standings::default();
        let (mut least, mut sum, mut pods) = (f64::INFINITY, 0.0, 0.0);
        for pool in fleet.pools() {
            let outliers = pool.state.outliers.lock();
            for pod in &pool.pods {
                let limit = f64::from(pod.state.limit());
                (least, sum, pods) = (limit.min(least), sum + limit, pods + 1.0);
                let count = match outliers.may_take(pod.state.id, now) {
                    _ if !pod.state.health.may_serve() => &mut standings.failed,
                    Standing::Usable => &mut standings.usable,
                    Standing::Suspect => &mut standings.suspect,
                    Standing::Probe => &mut standings.probing,
                    Standing::Ejected => &mut standings.ejected,
                };
                *count += 1;
            }
        }
        let limits = if pods > 0.0 { (least, sum / pods) } else { (0.0, 0.0) };
        self.recorder.metrics.show_pods(standings, limits);
    }

    /// Sets the gauge of breakers. Asks each: models by pods.
    pub fn show_breakers(&self) {
        let Some(fleet) = self.newest.load_full() else { return };
        let open = fleet.lanes().flat_map(|lane| lane.breakers.iter().flatten()).filter(|breaker| breaker.is_open());
        self.recorder.metrics.breakers_open.set(i64::try_from(open.count()).unwrap_or(i64::MAX));
    }

    /// The fleet of the newest Snapshot that the checks have seen.
    pub fn newest(&self) -> Option<Arc<Fleet>> {
        self.newest.load_full()
    }

    /// Whether a pod of the newest Snapshot answered its last check.
    pub fn any_serving(&self) -> bool {
        self.newest.load().as_ref().is_some_and(|fleet| fleet.pools().any(|pool| pool.any_serving()))
    }

    /// Pods of the newest Snapshot whose last check failed.
    pub fn failed(&self) -> usize {
        let Some(fleet) = self.newest.load_full() else { return 0 };
        fleet.links().filter(|link| !link.state.health.may_serve()).count()
    }
}

/// Drops what only the book holds.
fn forget<K: Eq + Hash, V>(entries: &mut HashMap<K, Arc<V>>) {
    entries.retain(|_, entry| Arc::strong_count(entry) > 1);
}
