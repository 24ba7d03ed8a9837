//! What is known of each cached model: whether its cache pays, and how long its calls take.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use spillway_core::cache::guard::{Decision, Guard, Observation, Settings, State};
use spillway_core::inference::{Entities, InferRequest};
use spillway_core::routing::key_hash;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

use super::metrics::Metrics;

/// A call's time that is guessed before there was one.
const FIRST_GUESS: Duration = Duration::from_millis(60);
/// Of an input's bytes, what tells requests without an entity apart.
const SAMPLED: usize = 256;

/// Guards that are kept; beyond it all tenants of a model share one.
const MOST: usize = 16_384;

pub struct Models {
    known: RwLock<Known>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Known {
    /// By model and tenant.
    judged: HashMap<Name, HashMap<Name, Arc<Judged>>>,
    count: usize,
}

/// One model as one tenant uses it: a tenant whose requests never repeat switches off its own cache, and
/// nobody else's.
pub struct Judged {
    guard: Mutex<Guard>,
    /// Exponentially weighted, the last call counts for an eighth; microseconds.
    call_us: AtomicU64,
    metrics: Arc<Metrics>,
}

/// What is known of a model.
pub struct Summary {
    pub model: Name,
    pub tenants: usize,
    /// Those for whom its cache is off.
    pub off: usize,
    /// The longest mean call of any tenant.
    pub call: Duration,
}

impl Models {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { known: RwLock::default(), metrics }
    }

    pub fn of(&self, snapshot: &Snapshot, model: &Name, tenant: &Name) -> Arc<Judged> {
        if let Some(judged) = self.known.read().judged.get(model).and_then(|tenants| tenants.get(tenant)) {
            return judged.clone();
        }
        let mut known = self.known.write();
        known.forget(snapshot, &self.metrics);
        // The model's own name stands for all tenants that there is no more room for.
        let tenant = if known.count < MOST { tenant } else { model };
        let Known { judged, count } = &mut *known;
        let tenants = judged.entry(model.clone()).or_default();
        let new = || {
            *count += 1;
            Arc::new(Judged {
                guard: Mutex::new(Guard::new(Settings::default())),
                call_us: AtomicU64::new(0),
                metrics: self.metrics.clone(),
            })
        };
        tenants.entry(tenant.clone()).or_insert_with(new).clone()
    }

    /// Whether such a request would not be looked up. Changes nothing.
    pub fn would_skip(&self, model: &Name, tenant: &Name, now: Duration, random: u64) -> bool {
        let known = self.known.read();
        // As in [`Self::of`]: where there was no room for the tenant, all of the model are judged together.
        let judged = known
            .judged
            .get(model)
            .and_then(|tenants| tenants.get(tenant).or_else(|| tenants.get(model).filter(|_| known.count >= MOST)));
        judged.is_some_and(|judged| judged.decide(now, random) == Decision::Skip)
    }

    /// Every model, by name.
    pub fn all(&self) -> Vec<Summary> {
        let known = self.known.read();
        let summary = |(model, tenants): (&Name, &HashMap<Name, Arc<Judged>>)| Summary {
            model: model.clone(),
            tenants: tenants.len(),
            off: tenants.values().filter(|judged| judged.is_off()).count(),
            call: tenants.values().map(|judged| judged.call()).max().unwrap_or_default(),
        };
        let mut all: Vec<_> = known.judged.iter().map(summary).collect();
        all.sort_unstable_by(|one, other| one.model.cmp(&other.model));
        all
    }
}

impl Known {
    /// A new pair may be a new Snapshot's: the time to forget those that are gone.
    fn forget(&mut self, snapshot: &Snapshot, metrics: &Metrics) {
        let mut off = 0;
        self.judged.retain(|name, tenants| {
            let stays = snapshot.models.get(name).is_some_and(|model| model.traffic.cache.is_some());
            tenants.retain(|tenant, judged| {
                let stays = stays && (tenant == name || snapshot.tenants.contains_key(tenant));
                off += i64::from(!stays && judged.is_off());
                stays
            });
            !tenants.is_empty()
        });
        self.count = self.judged.values().map(HashMap::len).sum();
        metrics.guarded.dec_by(off);
    }
}

impl Judged {
    pub fn decide(&self, now: Duration, random: u64) -> Decision {
        self.guard.lock().decide(now, random)
    }

    pub fn observe(&self, now: Duration, observation: Observation) {
        if let Observation::Miss { call, .. } = observation {
            let call = u64::try_from(call.as_micros()).unwrap_or(u64::MAX);
            let before = self.call_us.load(Ordering::Relaxed);
            let mean = if before == 0 { call } else { before - before / 8 + call / 8 };
            self.call_us.store(mean.max(1), Ordering::Relaxed);
        }
        let mut guard = self.guard.lock();
        let was_off = is_off(guard.state());
        if guard.observe(now, observation).is_some() {
            match (was_off, is_off(guard.state())) {
                (false, true) => self.metrics.guarded.inc(),
                (true, false) => self.metrics.guarded.dec(),
                _ => 0,
            };
        }
    }

    /// How long a call takes, about.
    pub fn call(&self) -> Duration {
        match self.call_us.load(Ordering::Relaxed) {
            0 => FIRST_GUESS,
            micros => Duration::from_micros(micros),
        }
    }

    fn is_off(&self) -> bool {
        is_off(self.guard.lock().state())
    }
}

fn is_off(state: State) -> bool {
    matches!(state, State::Off { .. })
}

/// The same for all requests of one key, so that a sample of it sees its repeats; and cheap.
pub fn sample(request: &InferRequest, entities: &Entities) -> u64 {
    match entities.ids() {
        [] => request.inputs.iter().fold(0_u64, |sum, input| {
            let prefix = input.data.get(..SAMPLED).unwrap_or(&input.data);
            // The order of inputs is not keyed.
            sum.wrapping_add(key_hash(prefix))
        }),
        ids => ids.iter().fold(0, |sum: u64, id| sum.wrapping_add(key_hash(id))),
    }
}
