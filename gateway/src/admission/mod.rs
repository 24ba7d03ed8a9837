//! Who may pass now: what a request's tenant may ask for, and what can be served.
//!
//! The rule: every decision is core's; here is what they are made from, shared by all threads and kept across
//! Snapshots, and nothing that a caller can make up lets it grow without bound.
//!
//! * [`class`]: how important a request is, and what it costs.
//! * [`limits`], [`limit`], [`entities`]: the token buckets of a tenant.
//! * [`quota`], [`lease`]: rates that the gateways of a region share.
//! * [`shed`]: who is let in to wait. [`gate`]: the places of a model and of its pool, and who waits for one.
//! * [`view`]: what operators see of all this.

mod class;
mod entities;
mod gate;
mod lease;
mod limit;
mod limits;
mod metrics;
mod quota;
mod shed;
pub mod view;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use spillway_core::inference::{Entities, InferRequest};
use spillway_core::limit::{Class, TableBounds};
use spillway_core::resource::{Model, Tenant};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::drain::Drain;
use spillway_runtime::plan::Published;
use spillway_runtime::store::Redis;
use spillway_runtime::telemetry::Metrics as Registry;

use crate::clock::Clock;
use crate::peers::shed::refuses;
use crate::settings::QuotaSettings;
pub use class::priority;
use entities::EntityBuckets;
use gate::{Gate, Place, PoolGate, TenantBound};
pub use gate::{Guest, Why};
use limit::Charge;
pub use limit::Standing;
use limits::{Taken, TenantLimits};
use metrics::{AdmissionMetrics, GateMetrics, QuotaMetrics};
use quota::Quotas;

/// How often gauges are set.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// One of a process.
pub struct Admission {
    clock: Clock,
    region: Name,
    rules: ArcSwap<Rules>,
    /// One follows at a time.
    following: Mutex<()>,
    /// Numbers of tenants and of limits.
    numbers: AtomicU32,
    entities: EntityBuckets,
    quotas: Quotas,
    metrics: AdmissionMetrics,
    gate_metrics: Arc<GateMetrics>,
}

/// What a Snapshot says.
#[derive(Default)]
struct Rules {
    /// `None` before the first.
    version: Option<u64>,
    tenants: HashMap<Name, Account>,
    models: HashMap<Name, Doors>,
}

/// What stands before a model.
#[derive(Clone)]
struct Doors {
    gate: Arc<Gate>,
    /// The name of the pool that serves it in this region.
    pool: Name,
    pool_gate: Arc<PoolGate>,
}

/// What is known of a tenant.
#[derive(Clone)]
struct Account {
    default_class: Class,
    highest_class: Class,
    limited: bool,
    /// The tenant's number, which stays.
    number: u32,
    limits: Arc<TenantLimits>,
    /// Its requests that wait or are served.
    present: Arc<AtomicUsize>,
    most_present: Option<usize>,
}

/// A valid request of a caller who may make it.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    pub tenant: &'a Name,
    pub name: &'a str,
    pub model: &'a Model,
    pub request: &'a InferRequest,
    pub entities: &'a Entities,
}

/// What the tenant's buckets say to it.
pub struct Verdict {
    pub guest: Guest,
    pub taken: Taken,
}

impl Admission {
    /// `name`: of this gateway, among those of the region that share quotas by `redis`.
    pub fn new(
        clock: Clock,
        region: Name,
        name: Name,
        quota: QuotaSettings,
        redis: Option<Arc<Redis>>,
        registry: &Registry,
    ) -> Self {
        let quotas = Quotas::new(quota, clock, redis, &region, name, QuotaMetrics::new(registry));
        Self {
            clock,
            region,
            quotas,
            rules: ArcSwap::default(),
            following: Mutex::default(),
            numbers: AtomicU32::new(1),
            entities: EntityBuckets::new(&TableBounds::default()),
            metrics: AdmissionMetrics::new(registry),
            gate_metrics: Arc::new(GateMetrics::new(registry)),
        }
    }

    /// Takes in a Snapshot, before any request is judged that holds it. An older one changes nothing.
    pub fn follow(&self, snapshot: &Snapshot) {
        let _following = self.following.lock();
        let before = self.rules.load();
        if before.version.is_some_and(|version| version >= snapshot.version) {
            return;
        }
        let tenants = self.tenants(snapshot, &before);
        let models = self.models(snapshot, &before);
        self.rules.store(Arc::new(Rules { version: Some(snapshot.version), tenants, models }));
    }

    fn tenants(&self, snapshot: &Snapshot, before: &Rules) -> HashMap<Name, Account> {
        let now_ns = self.now_ns();
        let knows = |model: &str| snapshot.models.contains_key(model);
        let account = |(name, tenant): (&Name, &Arc<Tenant>)| {
            let (number, limits, present) = match before.tenants.get(name) {
                Some(Account { number, limits, present, .. }) => (*number, limits.clone(), present.clone()),
                None => {
                    let number = self.numbers.fetch_add(1, Ordering::Relaxed);
                    (number, Arc::new(TenantLimits::new(name.clone(), number)), Arc::default())
                }
            };
            limits.follow(tenant, self.quotas.settings, knows, &self.numbers, now_ns);
            let account = Account {
                default_class: tenant.default_class,
                highest_class: tenant.highest_class,
                limited: !tenant.limits.is_empty(),
                number,
                limits,
                present,
                most_present: tenant.in_flight,
            };
            (name.clone(), account)
        };
        snapshot.tenants.iter().map(account).collect()
    }

    /// Those that a pool of this region serves.
    fn models(&self, snapshot: &Snapshot, before: &Rules) -> HashMap<Name, Doors> {
        let mut pools: HashMap<Name, Arc<PoolGate>> =
            before.models.values().map(|doors| (doors.pool.clone(), doors.pool_gate.clone())).collect();
        let doors = |(name, model): (&Name, &Arc<Model>)| {
            let (pool, _) = snapshot.pool_of(model, &self.region)?;
            let new = || Arc::new(PoolGate::new(self.clock, self.gate_metrics.clone()));
            let pool_gate = pools.entry(pool.clone()).or_insert_with(new).clone();
            let bounds = model.traffic.bulkhead.clone();
            let gate = match before.models.get(name) {
                Some(doors) => {
                    doors.gate.resize(bounds);
                    doors.gate.clone()
                }
                None => Arc::new(Gate::new(self.clock, self.gate_metrics.clone(), bounds)),
            };
            Some((name.clone(), Doors { gate, pool: pool.clone(), pool_gate }))
        };
        snapshot.models.iter().filter_map(doors).collect()
    }

    /// Says how many requests the pods of a pool take at a time: more wait here instead.
    pub fn fit(&self, pool: &Name, room: u32) {
        let rules = self.rules.load();
        if let Some(doors) = rules.models.values().find(|doors| doors.pool == *pool) {
            doors.pool_gate.fit(room);
        }
    }

    /// The request's class, and what it takes from its tenant's buckets.
    pub fn judge(&self, ask: &Ask<'_>) -> Verdict {
        let rules = self.rules.load();
        // Only a tenant that a newer Snapshot has not is not there: nothing is known of it any more.
        let Some(account) = rules.tenants.get(ask.tenant) else {
            return Verdict { guest: Account::unknown(), taken: Taken::default() };
        };
        let class = class::of(ask.request, account.default_class, account.highest_class);
        let guest = account.guest(class);
        if !account.limited {
            return Verdict { guest, taken: Taken::default() };
        }
        let taken = account.limits.take(&self.charge(ask, class), &self.entities, &self.quotas);
        self.metrics.overflowed.inc_by(taken.overflowed);
        if let Some(standing) = taken.standing.as_ref().filter(|_| taken.refused) {
            self.metrics.limited(standing.per);
        }
        Verdict { guest, taken }
    }

    /// One whose limits another region's gateway has asked already, with the class that it was granted there. Of a
    /// stream that was its first request's: others may ask for less.
    pub fn guest(&self, tenant: &Name, request: &InferRequest, granted: Class) -> Guest {
        let rules = self.rules.load();
        rules.tenants.get(tenant).map_or_else(Account::unknown, |account| {
            account.guest(granted.max(class::of(request, account.default_class, account.highest_class)))
        })
    }

    /// Refuses what the plan of all regions has no room for.
    pub fn refuse_planned(&self, guest: &Guest, plan: Option<&Published>) -> Result<(), Why> {
        if !refuses(plan, &self.region, guest.class, rand::random()) {
            return Ok(());
        }
        self.gate_metrics.refused(Why::Planned, guest.class);
        Err(Why::Planned)
    }

    /// Waits for a place of a model until `until`. `None`: no pool of this region serves it, so that
    /// there is nothing to wait for.
    pub async fn enter(&self, guest: &Guest, model: &str, until: Instant) -> Result<Option<Place>, Why> {
        let doors = |doors: &Doors| (doors.gate.clone(), doors.pool_gate.clone());
        let Some((gate, pool_gate)) = self.rules.load().models.get(model).map(doors) else { return Ok(None) };
        let deadline = self.clock.now().saturating_add(until.saturating_duration_since(Instant::now()));
        let entered = gate::enter(&gate, &pool_gate, guest, deadline).await;
        entered.map(Some).inspect_err(|why| self.gate_metrics.refused(*why, guest.class))
    }

    /// Whether a request of a stream is passed on: it takes no place, but may be shed.
    pub fn pass(&self, guest: &Guest, model: &str) -> Result<(), Why> {
        let rules = self.rules.load();
        let Some(doors) = rules.models.get(model) else { return Ok(()) };
        let passed = doors.pool_gate.admit_placeless(guest, self.clock.now());
        passed.inspect_err(|why| self.gate_metrics.refused(*why, guest.class))
    }

    /// Looks after what no request does, until the drain is over.
    pub async fn watch(&self, drain: Drain) {
        tokio::join!(self.quotas.run(&drain), self.look(&drain));
    }

    async fn look(&self, drain: &Drain) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = drain.stopped() => return,
            }
            self.metrics.keys.set(i64::try_from(self.entities.len()).unwrap_or(i64::MAX));
        }
    }

    fn charge<'a>(&self, ask: &Ask<'a>, class: Class) -> Charge<'a> {
        let (cost, entity_cost) = class::costs(ask);
        let entities = ask.entities.ids();
        Charge { model: ask.name, class, cost, entity_cost, entities, now_ns: self.now_ns() }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.clock.now().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Account {
    fn guest(&self, class: Class) -> Guest {
        let bound = self.most_present.map(|most| TenantBound { present: self.present.clone(), most });
        Guest { class, tenant: self.number, bound }
    }

    /// Of a tenant that is not there.
    fn unknown() -> Guest {
        Guest { class: Class::Low, tenant: 0, bound: None }
    }
}
