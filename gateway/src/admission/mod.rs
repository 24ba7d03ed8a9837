//! Who may pass now: what a request's tenant may ask for.
//!
//! The rule: every decision is core's; here is what they are made of, shared by all threads and kept across
//! Snapshots, and nothing that a caller can make up makes it grow without bound. What is decided here
//! does not wait.
//!
//! * [`class`]: how important a request is, and what it costs.
//! * [`limits`], [`limit`], [`entities`]: the token buckets of a tenant.

mod class;
mod entities;
mod limit;
mod limits;
mod metrics;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use spillway_core::inference::{Entities, InferRequest};
use spillway_core::limit::{Class, TableBounds};
use spillway_core::resource::Model;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::Metrics as Registry;

use crate::clock::Clock;
use entities::EntityBuckets;
pub use limit::{Charge, Standing};
use limits::{Taken, TenantLimits};
use metrics::AdmissionMetrics;

/// How often gauges are set.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// One of a process.
pub struct Admission {
    clock: Clock,
    accounts: ArcSwap<Accounts>,
    /// One follows at a time.
    following: Mutex<()>,
    /// Numbers of tenants and of limits.
    numbers: AtomicU32,
    entities: EntityBuckets,
    metrics: AdmissionMetrics,
}

/// The tenants of a Snapshot.
#[derive(Default)]
struct Accounts {
    /// `None` before the first.
    version: Option<u64>,
    tenants: HashMap<Name, Account>,
}

/// What is known of a tenant.
#[derive(Clone)]
struct Account {
    default_class: Class,
    highest_class: Class,
    limited: bool,
    limits: Arc<TenantLimits>,
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
    pub class: Class,
    pub taken: Taken,
}

impl Admission {
    pub fn new(clock: Clock, registry: &Registry) -> Self {
        Self {
            clock,
            accounts: ArcSwap::default(),
            following: Mutex::default(),
            numbers: AtomicU32::new(1),
            entities: EntityBuckets::new(&TableBounds::default()),
            metrics: AdmissionMetrics::new(registry),
        }
    }

    /// Takes in a Snapshot, before any request is judged that holds it. An older one changes nothing.
    pub fn follow(&self, snapshot: &Snapshot) {
        let _following = self.following.lock();
        let before = self.accounts.load();
        if before.version.is_some_and(|version| version >= snapshot.version) {
            return;
        }
        let now_ns = self.now_ns();
        let knows = |model: &str| snapshot.models.contains_key(model);
        let tenants = snapshot.tenants.iter().map(|(name, tenant)| {
            let limits = before.tenants.get(name).map_or_else(
                || Arc::new(TenantLimits::new(self.numbers.fetch_add(1, Ordering::Relaxed))),
                |account| account.limits.clone(),
            );
            limits.follow(tenant, knows, &self.numbers, now_ns);
            let account = Account {
                default_class: tenant.default_class,
                highest_class: tenant.highest_class,
                limited: !tenant.limits.is_empty(),
                limits,
            };
            (name.clone(), account)
        });
        let tenants = tenants.collect();
        self.accounts.store(Arc::new(Accounts { version: Some(snapshot.version), tenants }));
    }

    /// The request's class, and what it takes from its tenant's buckets.
    pub fn judge(&self, ask: &Ask<'_>) -> Verdict {
        let accounts = self.accounts.load();
        // Only a tenant that a newer Snapshot has not is not there: nothing is known of it any more.
        let Some(account) = accounts.tenants.get(ask.tenant) else {
            return Verdict { class: Class::Normal, taken: Taken::default() };
        };
        let class = class::of(ask.request, account.default_class, account.highest_class);
        if !account.limited {
            return Verdict { class, taken: Taken::default() };
        }
        let taken = account.limits.take(&self.charge(ask, class), &self.entities);
        self.metrics.overflowed.inc_by(taken.overflowed);
        if let Some(standing) = taken.standing.as_ref().filter(|_| taken.refused) {
            self.metrics.limited(standing.per);
        }
        Verdict { class, taken }
    }

    /// Looks after what no request does, until the drain is over.
    pub async fn watch(&self, drain: Drain) {
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
