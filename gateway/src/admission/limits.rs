//! The token buckets of one tenant: for all that it asks, for each model, for each entity.
//!
//! The rule: a request takes from every bucket that applies to it, or from none; and no number of threads
//! takes more from a bucket than it has. So all buckets of a tenant are behind its one mutex: with atomics,
//! what one thread takes and gives back would be missing for another in between. It is held for some
//! 100 ns, and only requests of the same tenant meet there.
//!
//! A request that a bucket of the tenant or the model refuses does not touch those of entities.
//! `Retry-After` is what the refusing bucket says that takes longest.

use std::sync::atomic::AtomicU32;

use parking_lot::Mutex;
use spillway_core::limit::Decision;
use spillway_core::resource::Tenant;

use super::entities::{EntityBuckets, Keys, Payer};
use super::limit::{Buckets, Charge, Judgement, Limit, Standing};

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
    pub fn new(owner: u32) -> Self {
        Self { owner, inside: Mutex::default() }
    }

    /// Follows the tenant's limits: buckets stay under their limit's name. `knows`: the models that there are.
    pub fn follow(&self, tenant: &Tenant, knows: impl Fn(&str) -> bool, numbers: &AtomicU32, now_ns: u64) {
        let mut inside = self.inside.lock();
        let mut before = std::mem::take(&mut inside.limits);
        for rule in &tenant.limits {
            let gcra = match rule.bucket(tenant.highest_class) {
                Ok(gcra) => gcra,
                Err(problem) => {
                    // The resource's reader refuses such a limit.
                    tracing::error!(limit = %rule.name, %problem, "a limit cannot be kept");
                    continue;
                }
            };
            let same = |limit: &Limit| limit.rule.name == rule.name;
            let replaced = before.iter().position(same).map(|index| before.swap_remove(index));
            inside.limits.push(Limit::follow(replaced, rule, gcra, &knows, numbers, now_ns));
        }
    }

    /// Takes what a request costs from all buckets that apply to it, or from none.
    pub fn take(&self, charge: &Charge<'_>, entities: &EntityBuckets) -> Taken {
        let inside = &mut *self.inside.lock();
        let mut judgement = Judgement::default();
        for (index, limit) in inside.limits.iter_mut().enumerate().filter(|(_, limit)| limit.applies(charge)) {
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

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
