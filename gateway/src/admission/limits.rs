//! The token buckets of one tenant: for all that it asks, for each model, for each entity.
//!
//! The rule: a request takes from every bucket that applies to it, or from none; and no number of threads
//! takes more from a bucket than it has. So all buckets of a tenant are behind its one mutex: with atomics,
//! what one thread takes and gives back would be missing for another in between. It is held for some
//! 100 ns, and only requests of the same tenant meet there.
//!
//! Of a quota that the region's gateways share, a bucket has a slice ([`super::quota`]), from its first
//! request on.
//!
//! A request that a bucket of the tenant or the model refuses does not touch those of entities.
//! `Retry-After` is what the refusing bucket says that takes longest.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::limit::lease::{Ask, Grant};
use spillway_core::limit::{self, Class, Decision, InvalidLimit, Quota};
use spillway_core::resource::{LimitScope, Per, RateLimit, Tenant};
use spillway_core::units::Name;

use super::entities::{EntityBuckets, Keys, Payer};
use super::lease::{Bucket, Report};
use super::limit::{Buckets, Charge, Judgement, Limit, Size, Standing};
use super::quota::{QuotaName, Quotas};
use super::view::{LimitView, WouldTake};
use crate::settings::QuotaSettings;

/// Room for the keys of a large batch is not kept for the next request.
const KEPT_KEYS: usize = 1_024;

/// What the buckets say.
#[derive(Debug, Default)]
pub struct Taken {
    /// Nothing was taken.
    pub refused: bool,
    /// With the limit that refuses, or else would first; `None` where no limit applies.
    pub standing: Option<Standing>,
    /// Entities that found no place of their own.
    pub overflowed: u64,
}

/// The buckets of a tenant. They outlive Snapshots.
pub struct TenantLimits {
    pub tenant: Name,
    owner: u32,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    limits: Vec<Limit>,
    /// Room for the keys of a request.
    keys: Keys,
}

impl TenantLimits {
    pub fn new(tenant: Name, owner: u32) -> Self {
        Self { tenant, owner, inside: Mutex::default() }
    }

    /// Follows the tenant's limits: buckets stay under their limit's name. `knows`: the models that there are.
    pub fn follow(
        &self,
        tenant: &Tenant,
        quota: QuotaSettings,
        knows: impl Fn(&str) -> bool,
        numbers: &AtomicU32,
        now_ns: u64,
    ) {
        let mut inside = self.inside.lock();
        let mut before = std::mem::take(&mut inside.limits);
        for rule in &tenant.limits {
            let size = match size(rule, tenant.highest_class, quota) {
                Ok(size) => size,
                Err(problem) => {
                    // The resource's reader refuses such a limit.
                    tracing::error!(limit = %rule.name, %problem, "a limit cannot be kept");
                    continue;
                }
            };
            let same = |limit: &Limit| limit.rule.name == rule.name;
            let replaced = before.iter().position(same).map(|index| before.swap_remove(index));
            inside.limits.push(Limit::follow(replaced, rule, size, &knows, numbers, now_ns));
        }
    }

    /// Takes what a request costs from all buckets that apply to it, or from none.
    pub fn take(self: &Arc<Self>, charge: &Charge<'_>, entities: &EntityBuckets, quotas: &Quotas) -> Taken {
        let inside = &mut *self.inside.lock();
        let mut judgement = Judgement::default();
        for (index, limit) in inside.limits.iter_mut().enumerate().filter(|(_, limit)| limit.applies(charge)) {
            if limit.is_unlisted(charge.model) {
                self.begin(limit, charge, quotas);
            }
            let cost = limit.cost(charge);
            if !matches!(limit.buckets, Buckets::Entities { .. })
                && let Some(bucket) = limit.bucket(charge.model)
            {
                judgement.hear(index, bucket.decide(cost, charge), cost);
            }
        }
        let mut overflowed = 0;
        if !judgement.refuses() {
            overflowed = self.take_of_entities(inside, charge, entities, &mut judgement);
        }
        if !judgement.refuses() {
            for limit in inside.limits.iter_mut().filter(|limit| limit.applies(charge)) {
                if let Some(bucket) = limit.bucket(charge.model) {
                    bucket.state = bucket.next;
                }
            }
        }
        Taken { refused: judgement.refuses(), standing: judgement.standing(&inside.limits), overflowed }
    }

    /// Makes the bucket one of a slice, and has Redis asked for it, if it can be.
    fn begin(self: &Arc<Self>, limit: &mut Limit, charge: &Charge<'_>, quotas: &Quotas) {
        let Some(quota) = limit.quota else { return };
        let model = (limit.rule.per == Per::Model).then(|| charge.model.into());
        let listing = quotas.list(self, QuotaName { limit: limit.rule.name.clone(), model });
        let placed = listing.is_none() || !quotas.are_shared();
        if let Some(bucket) = limit.bucket(charge.model) {
            bucket.begin(quota, listing, placed, charge.now_ns);
        }
    }

    /// What to ask of Redis for a quota under its listing; `None`: it has ended.
    pub fn ask(&self, name: &QuotaName, listing: u64, now: Duration) -> Option<Ask> {
        self.inside.lock().leased(name)?.ask(listing, now)
    }

    /// Takes the answer to what was asked at `sent`, or that there is none.
    pub fn answer(
        &self,
        name: &QuotaName,
        listing: u64,
        sent: Duration,
        now: Duration,
        grant: Option<Grant>,
    ) -> Option<Report> {
        self.inside.lock().leased(name)?.answer(listing, sent, now, grant)
    }

    /// What each limit that applies would say. Changes nothing.
    pub fn would_take(&self, charge: &Charge<'_>, entities: &EntityBuckets, quotas: &Quotas) -> Vec<WouldTake> {
        let inside = &*self.inside.lock();
        let would = |limit: &Limit| {
            let (cost, mut judgement) = (limit.cost(charge), Judgement::default());
            let mut bucket = limit.held(charge.model).cloned().unwrap_or_else(|| Bucket::full(limit.gcra));
            if let Buckets::Entities { number, .. } = limit.buckets {
                let mut keys = Keys::new();
                entities.keys(&mut keys, number, charge.entities, cost);
                let payer = self.payer(limit, charge);
                entities.would_take(&keys, &payer, bucket.state, |decision, cost| judgement.hear(0, decision, cost));
            } else {
                if let Some(quota) = limit.quota.filter(|_| !bucket.is_listed()) {
                    bucket.begin(quota, None, !quotas.are_shared(), charge.now_ns);
                }
                judgement.hear(0, bucket.decide(cost, charge), cost);
            }
            let share = bucket.report(Duration::from_nanos(charge.now_ns));
            judgement.decision().map(|decision| WouldTake::of(limit, cost, decision, share))
        };
        inside.limits.iter().filter(|limit| limit.applies(charge)).filter_map(would).collect()
    }

    /// Each limit and its buckets, no more than `room` of these.
    pub fn view(&self, now: Duration, room: &mut usize) -> Vec<LimitView> {
        self.inside.lock().limits.iter().map(|limit| LimitView::of(limit, now, room)).collect()
    }

    /// Takes from the entities' own buckets, and sets `next` of those without a place. Counts these.
    fn take_of_entities(
        &self,
        inside: &mut Inside,
        charge: &Charge<'_>,
        entities: &EntityBuckets,
        judgement: &mut Judgement,
    ) -> u64 {
        let Inside { limits, keys } = inside;
        let mut overflowed = 0;
        for index in 0..limits.len() {
            let Some(limit) = limits.get_mut(index).filter(|limit| limit.applies(charge)) else { continue };
            let (cost, payer) = (limit.cost(charge), self.payer(limit, charge));
            let Buckets::Entities { number, overflow } = &mut limit.buckets else { continue };
            entities.keys(keys, *number, charge.entities, cost);
            overflow.next = overflow.state;
            let hear = |decision: Decision, cost| judgement.hear(index, decision, cost);
            let taken = entities.take(keys, &payer, &mut overflow.next, hear);
            overflowed += taken.overflowed;
            if taken.refused {
                keys.truncate(taken.keys);
                entities.give_back(keys, &payer);
                self.give_back(&limits[..index], keys, charge, entities);
                break;
            }
        }
        keys.shrink_to(KEPT_KEYS);
        overflowed
    }

    /// Undoes what a request took from the entities of these limits.
    fn give_back(&self, limits: &[Limit], keys: &mut Keys, charge: &Charge<'_>, entities: &EntityBuckets) {
        for limit in limits.iter().filter(|limit| limit.applies(charge)) {
            let (cost, payer) = (limit.cost(charge), self.payer(limit, charge));
            if let Buckets::Entities { number, .. } = limit.buckets {
                entities.keys(keys, number, charge.entities, cost);
                entities.give_back(keys, &payer);
            }
        }
    }

    fn payer(&self, limit: &Limit, charge: &Charge<'_>) -> Payer {
        Payer { owner: self.owner, gcra: limit.gcra, now_ns: charge.now_ns, class: charge.class }
    }
}

impl Inside {
    fn leased(&mut self, name: &QuotaName) -> Option<&mut Bucket> {
        let limit = self.limits.iter_mut().find(|limit| limit.rule.name == name.limit)?;
        limit.leased(name.model.as_deref())
    }
}

fn size(rule: &RateLimit, highest: Class, settings: QuotaSettings) -> Result<Size, InvalidLimit> {
    let QuotaSettings { term, gateways } = settings;
    let quota = match rule.scope {
        LimitScope::Gateway => None,
        LimitScope::Region => Some(Quota::new(&limit::QuotaSettings { term, gateways, ..rule.quota(highest) })?),
    };
    Ok(Size { gcra: rule.bucket(highest)?, quota })
}

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
