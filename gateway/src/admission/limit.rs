//! One limit of a tenant: its rule, and the buckets under it.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use spillway_core::limit::{Class, Decision, Gcra, Quota, headers};
use spillway_core::resource::{Per, RateLimit, Unit};
use spillway_core::units::Name;

use super::lease::Bucket;

/// What a request asks of its tenant's buckets.
#[derive(Clone, Copy)]
pub struct Charge<'a> {
    pub model: &'a str,
    pub class: Class,
    /// Of the whole request, where a limit counts cost.
    pub cost: u32,
    /// Of each of its entities, there.
    pub entity_cost: u32,
    pub entities: &'a [Bytes],
    pub now_ns: u64,
}

/// Where a request stands with one limit: what the `RateLimit` headers say.
#[derive(Clone, Debug)]
pub struct Standing {
    pub limit: Name,
    pub per: Per,
    pub policy: HeaderValue,
    pub remaining: u32,
    /// Until the bucket is full after an admission, until the request would be admitted after a refusal;
    /// `None`: it never will be.
    pub reset: Option<Duration>,
}

impl Standing {
    /// The value of `RateLimit`.
    pub fn header(&self) -> HeaderValue {
        value(headers::service_limit(self.limit.as_str(), self.remaining.into(), self.reset))
    }
}

/// A rule and its buckets.
pub(super) struct Limit {
    pub rule: RateLimit,
    policy: HeaderValue,
    /// Of the whole rate.
    pub gcra: Gcra,
    /// If the region's gateways share the rate: each bucket is of a slice, once it is used.
    pub quota: Option<Quota>,
    pub buckets: Buckets,
}

/// A limit's rate and burst, checked.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub gcra: Gcra,
    pub quota: Option<Quota>,
}

pub(super) enum Buckets {
    One(Bucket),
    /// By name; only models of the Snapshot are asked for.
    Models(HashMap<Box<str>, Bucket>),
    Entities {
        /// Tells this limit's keys from those of others.
        number: u32,
        /// Of the entities without a place of their own.
        overflow: Bucket,
    },
}

impl Limit {
    /// The limit of a rule, going on from the one that it replaces: with the same fraction used. Entities'
    /// buckets are full again if the rate or the burst changed.
    pub fn follow(
        before: Option<Self>,
        rule: &RateLimit,
        size: Size,
        knows: impl Fn(&str) -> bool,
        numbers: &AtomicU32,
        now_ns: u64,
    ) -> Self {
        let Size { gcra, quota } = size;
        let same_size = |other: &Gcra| (other.burst(), other.window()) == (gcra.burst(), gcra.window());
        let kept = before.as_ref().is_some_and(|before| same_size(&before.gcra));
        let buckets = match (before.map(|before| before.buckets), rule.per) {
            (Some(Buckets::One(bucket)), Per::Tenant) => Buckets::One(bucket.follow(gcra, quota, now_ns)),
            (Some(Buckets::Models(models)), Per::Model) => {
                let models = models.into_iter().filter(|(model, _)| knows(model) && rule.applies_to(model));
                Buckets::Models(models.map(|(model, bucket)| (model, bucket.follow(gcra, quota, now_ns))).collect())
            }
            (Some(Buckets::Entities { number, overflow }), Per::Entity) if kept => {
                Buckets::Entities { number, overflow: overflow.follow(gcra, None, now_ns) }
            }
            (_, Per::Tenant) => Buckets::One(Bucket::full(gcra)),
            (_, Per::Model) => Buckets::Models(HashMap::new()),
            (_, Per::Entity) => {
                let number = numbers.fetch_add(1, Ordering::Relaxed);
                Buckets::Entities { number, overflow: Bucket::full(gcra) }
            }
        };
        let policy = value(headers::policy(rule.name.as_str(), gcra.burst().into(), gcra.window()));
        Self { rule: rule.clone(), policy, gcra, quota, buckets }
    }

    pub fn applies(&self, charge: &Charge<'_>) -> bool {
        self.rule.applies_to(charge.model) && (self.rule.per != Per::Entity || !charge.entities.is_empty())
    }

    /// What the request costs here; for entities, what each of them pays.
    pub fn cost(&self, charge: &Charge<'_>) -> u32 {
        match (self.rule.unit, self.rule.per) {
            (Unit::Request, _) => 1,
            (Unit::Cost, Per::Entity) => charge.entity_cost,
            (Unit::Cost, Per::Tenant | Per::Model) => charge.cost,
        }
    }

    /// Whether the bucket of this model is to become one of a slice.
    pub fn is_unlisted(&self, model: &str) -> bool {
        self.quota.is_some() && !self.held(model).is_some_and(Bucket::is_listed)
    }

    /// The bucket of this model, if there is one.
    pub fn held(&self, model: &str) -> Option<&Bucket> {
        match &self.buckets {
            Buckets::One(bucket) | Buckets::Entities { overflow: bucket, .. } => Some(bucket),
            Buckets::Models(models) => models.get(model),
        }
    }

    /// The bucket of a quota.
    pub fn leased(&mut self, model: Option<&str>) -> Option<&mut Bucket> {
        match (&mut self.buckets, model) {
            (Buckets::One(bucket), None) => Some(bucket),
            (Buckets::Models(models), Some(model)) => models.get_mut(model),
            _ => None,
        }
    }

    /// The bucket that a request for this model takes from; for entities, the one of those without a place.
    /// Always there.
    pub fn bucket(&mut self, model: &str) -> Option<&mut Bucket> {
        match &mut self.buckets {
            Buckets::One(bucket) | Buckets::Entities { overflow: bucket, .. } => Some(bucket),
            Buckets::Models(models) => {
                if !models.contains_key(model) {
                    models.insert(model.into(), Bucket::full(self.gcra));
                }
                models.get_mut(model)
            }
        }
    }
}

/// The worst that any bucket said: never, the longest wait, or the fewest such requests left.
#[derive(Default)]
pub(super) struct Judgement {
    worst: Option<(Rank, usize, Decision)>,
}

type Rank = (u8, Reverse<u32>, Duration);

impl Judgement {
    /// Takes in what the limit at `index` says to a cost.
    pub fn hear(&mut self, index: usize, decision: Decision, cost: u32) {
        let rank = match decision {
            Decision::Admitted { remaining, full_after, .. } => (0, Reverse(remaining / cost.max(1)), full_after),
            Decision::Refused { retry_after, .. } => (1, Reverse(0), retry_after),
            Decision::Never { .. } => (2, Reverse(0), Duration::ZERO),
        };
        if self.worst.is_none_or(|(worst, ..)| rank > worst) {
            self.worst = Some((rank, index, decision));
        }
    }

    pub fn refuses(&self) -> bool {
        self.worst.is_some_and(|(_, _, decision)| !matches!(decision, Decision::Admitted { .. }))
    }

    pub fn decision(&self) -> Option<Decision> {
        self.worst.map(|(_, _, decision)| decision)
    }

    pub fn standing(&self, limits: &[Limit]) -> Option<Standing> {
        let (_, index, decision) = self.worst?;
        let limit = limits.get(index)?;
        Some(Standing {
            limit: limit.rule.name.clone(),
            per: limit.rule.per,
            policy: limit.policy.clone(),
            remaining: decision.remaining(),
            reset: decision.reset(),
        })
    }
}

fn value(text: String) -> HeaderValue {
    // Printable ASCII.
    HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or(HeaderValue::from_static(""))
}
