//! What is known of each cached model: whether its cache pays, and how long its calls take.

use std::collections::{BTreeMap, HashMap};
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
    judged: HashMap<Pair, Arc<Judged>>,
    /// The newest Snapshot that was asked with: of its models and tenants these are.
    version: u64,
}

/// A hash of a model and a tenant. Two that have the same one share a guard, which errs no worse than one guard for all.
type Pair = u64;

/// One model as one tenant uses it: a tenant whose requests never repeat switches off its own cache, and
/// nobody else's.
pub struct Judged {
    model: Name,
    /// The model's own name where it is all tenants that there was no more room for.
    tenant: Name,
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

    /// None: there is no such model.
    pub fn of(&self, snapshot: &Snapshot, model: &str, tenant: &Name) -> Option<Arc<Judged>> {
        {
            let known = self.known.read();
            // Without room, who is new stays so for as long as the same names are known.
            let is_settled = known.is_full() && known.version >= snapshot.version;
            if let Some(judged) = known.find(model, tenant, is_settled) {
                return Some(judged.clone());
            }
        }
        let (model, _) = snapshot.models.get_key_value(model)?;
        let mut known = self.known.write();
        // Requests that came before a Snapshot end after it.
        if known.version < snapshot.version {
            known.forget(snapshot, &self.metrics);
        }
        let tenant = if known.is_full() { model } else { tenant };
        let new = || {
            Arc::new(Judged {
                model: model.clone(),
                tenant: tenant.clone(),
                guard: Mutex::new(Guard::new(Settings::default())),
                call_us: AtomicU64::new(0),
                metrics: self.metrics.clone(),
            })
        };
        Some(known.judged.entry(pair(model.as_str(), tenant.as_str())).or_insert_with(new).clone())
    }

    /// Whether such a request would not be looked up. Changes nothing.
    pub fn would_skip(&self, model: &str, tenant: &Name, now: Duration, random: u64) -> bool {
        let known = self.known.read();
        known.find(model, tenant, known.is_full()).is_some_and(|judged| judged.decide(now, random) == Decision::Skip)
    }

    /// Every model, by name.
    pub fn all(&self) -> Vec<Summary> {
        let mut all: BTreeMap<Name, Summary> = BTreeMap::new();
        for judged in self.known.read().judged.values() {
            let model = judged.model.clone();
            let new = || Summary { model: judged.model.clone(), tenants: 0, off: 0, call: Duration::ZERO };
            let summary = all.entry(model).or_insert_with(new);
            summary.tenants += 1;
            summary.off += usize::from(judged.is_off());
            summary.call = summary.call.max(judged.call());
        }
        all.into_values().collect()
    }
}

impl Known {
    fn is_full(&self) -> bool {
        self.judged.len() >= MOST
    }

    /// `or_any`: else that of all tenants that there was no room for.
    fn find(&self, model: &str, tenant: &Name, or_any: bool) -> Option<&Arc<Judged>> {
        let any = || self.judged.get(&pair(model, model)).filter(|_| or_any);
        self.judged.get(&pair(model, tenant.as_str())).or_else(any)
    }

    /// Forgets those that are gone.
    fn forget(&mut self, snapshot: &Snapshot, metrics: &Metrics) {
        self.version = snapshot.version;
        self.judged.retain(|_, judged| {
            let model = snapshot.models.get(&judged.model).filter(|model| model.traffic.cache.is_some());
            let stays =
                model.is_some() && (judged.tenant == judged.model || snapshot.tenants.contains_key(&judged.tenant));
            if !stays && judged.is_off() {
                metrics.guarded.dec();
            }
            stays
        });
    }
}

fn pair(model: &str, tenant: &str) -> Pair {
    // The rotation tells a tenant's name from a model's.
    key_hash(model.as_bytes()).rotate_left(1) ^ key_hash(tenant.as_bytes())
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

#[cfg(test)]
mod tests {
    use spillway_runtime::telemetry::Metrics as Registry;

    use super::super::tests::{name, snapshot};
    use super::*;

    #[test]
    fn tenants_beyond_the_most_share_a_guard_until_others_are_gone() {
        let models = Models::new(Arc::new(Metrics::new(&Registry::new("test"))));
        let first = snapshot(1);
        let of = |snapshot: &Snapshot, tenant: &str| models.of(snapshot, "plain", &name(tenant)).unwrap();
        let acme = of(&first, "acme");
        for number in 1..MOST {
            of(&first, &format!("t{number}"));
        }
        let any = of(&first, "globex");
        assert!(Arc::ptr_eq(&any, &of(&first, "initech")) && !Arc::ptr_eq(&any, &acme));
        assert_eq!(models.all().iter().map(|model| model.tenants).sum::<usize>(), MOST + 1);
        // The Snapshot knows acme and globex.
        let second = snapshot(2);
        let globex = of(&second, "globex");
        assert!(Arc::ptr_eq(&acme, &of(&second, "acme")) && !Arc::ptr_eq(&any, &globex));
        assert!(models.of(&second, "none", &name("acme")).is_none());
    }
}
