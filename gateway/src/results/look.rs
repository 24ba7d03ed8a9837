//! One request and the cache: what is looked at, in which order, and who asks the model.
//!
//! ```text
//! no policy, guard, not cacheable, deaf --> the model alone
//! this gateway's memory --fresh--> given
//!                       --stale, may be given--> given, and refreshed in the background
//!   | nothing, or too old
//!   v
//! a call under way --> waited for, within the request's own deadline
//!   | none: this request leads
//!   v
//! the region's Redis --fresh--> given, to all who wait too
//!   | nothing, and the lease
//!   v
//! the model (Permit)
//! ```
//! The rule: the caller was authorized before; a wish can only narrow; nothing here is an error to the
//! client but a failure that it would have had anyway.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::CACHE_CONTROL;
use http::{HeaderMap, HeaderValue};
use spillway_core::cache::control::Wish;
use spillway_core::cache::freshness::{Lifetimes, Verdict};
use spillway_core::cache::guard::{Decision, Observation};
use spillway_core::cache::key::{Dependencies, Identity, Key, Uncacheable};
use spillway_core::cache::status::{Bypass, Forwarded, Status, Tier};
use spillway_core::inference::{Entities, InferRequest};
use spillway_core::limit::Class;
use spillway_core::resource::Model;
use spillway_core::routing::key_hash;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

use super::Results;
use super::changes::{LONGEST_UNHEARD, Truth};
use super::entry::{About, Entry, Kept};
use super::memory::Entered;
use super::models::{Judged, sample};
use super::permit::{Pending, Permit};
use super::refresh::CLASS;
use crate::errors::Refusal;

/// Bytes of inputs beyond which a request is not looked up: hashing them would keep a thread for longer than
/// 1 ms, and they hardly ever come twice.
const MOST_INPUT: usize = 1 << 20;
/// Why such a request is not looked up, for metrics.
pub(super) const LARGE: &str = "large-request";
/// The same of a request for a model or version that the Snapshot does not name.
pub(super) const UNKNOWN: &str = "unknown";

/// A request, authorized and checked against its model.
pub struct Asked<'a> {
    pub snapshot: &'a Snapshot,
    pub tenant: &'a Name,
    pub model: &'a Model,
    pub request: &'a InferRequest,
    pub entities: &'a Entities,
    pub wish: Wish,
    pub class: Class,
    pub until: Instant,
}

impl<'a> Asked<'a> {
    /// The model's name, and the version that will answer.
    pub(super) fn names(&self) -> Option<(&'a Name, &'a Name)> {
        let (name, _) = self.snapshot.models.get_key_value(self.request.model.as_str())?;
        Some((name, self.model.version(&self.request.version)?))
    }
}

/// What the answer says about the cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct Said {
    pub status: Option<Status>,
    /// Of a stored answer.
    pub age: Option<Duration>,
    /// Looking up, waiting for another's call, and storing.
    pub took: Duration,
}

/// What a request does.
pub enum Look {
    /// It has its answer. With a permit, a stale one: whoever holds the permit fetches the next.
    Kept(Kept, Option<Permit>),
    /// It asks the model, and hands what comes of it to the permit.
    Ask(Permit),
}

/// What an entry is worth to a request, beyond its times.
pub(super) enum Worth {
    Times(Verdict),
    /// It depends on rows whose changes are not heard.
    Deaf,
    /// It was purged or flushed; which, for metrics.
    Void(&'static str),
}

impl Results {
    pub async fn look(self: &Arc<Self>, asked: &Asked<'_>, said: &mut Said) -> Result<Look, Refusal> {
        let Some(lifetimes) = &asked.model.traffic.cache else {
            said.status = Some(Status::Bypass(Bypass::Off));
            return Ok(Look::Ask(Permit::none()));
        };
        let began = Instant::now();
        let look = self.search(asked, lifetimes, began, said).await;
        if said.status != Some(Status::Bypass(Bypass::Guard)) {
            said.took = began.elapsed();
        }
        if matches!(&look, Ok(Look::Ask(permit)) if permit.was_looked_up()) {
            self.metrics.misses.inc();
        }
        look
    }

    /// What a request is filed under.
    pub fn key(&self, asked: &Asked<'_>) -> Result<Key, Uncacheable> {
        let (model, version) = asked.names().ok_or(Uncacheable::UnknownRows)?;
        // Hashes of texts that are never the same: together they stand for both.
        let mut epoch = asked.snapshot.grants(asked.tenant).map(|grants| grants.epoch).unwrap_or_default();
        let other = asked.snapshot.model_epoch(model.as_str()).copied().unwrap_or_default();
        epoch.iter_mut().zip(other).for_each(|(byte, other)| *byte ^= other);
        // The model's epoch covers its feature groups.
        let identity = Identity { tenant: asked.tenant, model, version, policy_epoch: epoch, feature_epoch: 0 };
        Key::of(&identity, asked.request)
    }

    /// The last answer to this request, however stale, for when there is no other.
    pub fn last_cached(&self, asked: &Asked<'_>) -> Option<Kept> {
        asked.model.traffic.cache.as_ref()?;
        if asked.wish.no_cache || asked.wish.max_age.is_some() || is_large(asked.request) {
            return None;
        }
        let entry = self.memory.peek(&self.key(asked).ok()?)?;
        let now = self.now();
        let stands =
            !matches!(self.worth(&entry, now, &Lifetimes::default(), &Wish::default()), Worth::Deaf | Worth::Void(_));
        stands.then(|| Kept { age: entry.times.age(now), entry })
    }

    async fn search(
        self: &Arc<Self>,
        asked: &Asked<'_>,
        lifetimes: &Lifetimes,
        began: Instant,
        said: &mut Said,
    ) -> Result<Look, Refusal> {
        let now = began.saturating_duration_since(self.origin);
        let Some(judged) = self.models.of(asked.snapshot, &asked.request.model, asked.tenant) else {
            return Ok(self.bypass(said, Bypass::Uncacheable, UNKNOWN));
        };
        if judged.decide(now, sample(asked.request, asked.entities)) == Decision::Skip {
            self.metrics.guarded_off.inc();
            said.status = Some(Status::Bypass(Bypass::Guard));
            return Ok(Look::Ask(Permit::none()));
        }
        if is_large(asked.request) {
            return Ok(self.bypass(said, Bypass::Uncacheable, LARGE));
        }
        let Some((name, version)) = asked.names() else {
            return Ok(self.bypass(said, Bypass::Uncacheable, UNKNOWN));
        };
        let key = match self.key(asked) {
            Ok(key) => key,
            Err(reason) => return Ok(self.bypass(said, Bypass::Uncacheable, reason.code())),
        };
        let found = self.memory.get(&key).map(|entry| (self.worth(&entry, now, lifetimes, &asked.wish), entry));
        let (verdict, stale) = match found {
            None => (None, None),
            Some((Worth::Deaf, _)) => return Ok(self.bypass(said, Bypass::Deaf, "deaf")),
            Some((Worth::Void(reason), entry)) => {
                self.metrics.invalidated(reason, self.memory.remove(&entry));
                (None, None)
            }
            Some((Worth::Times(Verdict::Fresh), entry)) => {
                let kept = self.hit(entry, Tier::L1, now, began.elapsed(), &judged, said);
                return Ok(Look::Kept(kept, None));
            }
            Some((Worth::Times(verdict), entry)) => (Some(verdict), Some(entry)),
        };
        if verdict != Some(Verdict::Revalidate) && asked.wish.only_if_cached {
            said.status = Some(Status::OnlyIfCached);
            return Err(Refusal::NotCached);
        }
        let dependencies =
            match Dependencies::of(asked.snapshot, asked.model, asked.tenant, asked.request, asked.entities) {
                Ok(dependencies) => dependencies,
                Err(reason) => return Ok(self.bypass(said, Bypass::Uncacheable, reason.code())),
            };
        let truth = self.changes.truth(&dependencies);
        if truth == Truth::Numbered && !self.changes.hears(now) {
            return Ok(self.bypass(said, Bypass::Deaf, "deaf"));
        }
        let about = About {
            tenant: asked.tenant.clone(),
            model: name.clone(),
            entities: asked.entities.ids().iter().map(|id| key_hash(id)).collect(),
        };
        let why = match verdict {
            _ if asked.wish.no_cache => Forwarded::Request,
            None => Forwarded::Miss,
            Some(Verdict::Refused) => Forwarded::Request,
            Some(_) => Forwarded::Stale,
        };
        let pending = Pending {
            key,
            about: Arc::new(about),
            dependencies,
            truth,
            class: asked.class,
            began: self.begin(truth, asked.class),
            version: version.clone(),
            lifetimes: lifetimes.clone(),
            wish: asked.wish,
            why,
            lead: None,
            stale: stale.filter(|_| matches!(verdict, Some(Verdict::Revalidate | Verdict::IfError))),
            judged,
            spent: began.elapsed(),
        };
        if verdict == Some(Verdict::Revalidate)
            && let Some(entry) = pending.stale.clone()
        {
            return Ok(self.stale_hit(entry, pending, now, said));
        }
        let alone = asked.wish.is_alone() || why == Forwarded::Request;
        if alone {
            return Ok(self.ask(pending));
        }
        // What a hit does not need takes no room in every request's future.
        Box::pin(self.together(pending, asked.until, said)).await
    }

    /// A stale answer, and the permit to fetch the next if nobody does.
    fn stale_hit(self: &Arc<Self>, entry: Arc<Entry>, mut pending: Pending, now: Duration, said: &mut Said) -> Look {
        let kept = Kept { age: entry.times.age(now), entry };
        self.metrics.revalidating.inc();
        pending.judged.observe(now, Observation::Hit { cost: pending.spent });
        said.age = Some(kept.age);
        said.status = Some(Status::Hit { tier: Tier::L1, ttl: kept.entry.times.ttl(now) });
        pending.class = CLASS;
        let refresh = match self.enter(&pending, false) {
            Some(Entered::Leads(lead)) => {
                pending.lead = Some(lead);
                Some(Permit::of(pending))
            }
            _ => None,
        };
        Look::Kept(kept, refresh)
    }

    /// A stale answer for a failure of the model, where its times and wishes allow one.
    pub(super) fn if_error(
        &self,
        stale: Option<&Arc<Entry>>,
        pending: &Pending,
        refusal: &Refusal,
        said: &mut Said,
    ) -> Option<Kept> {
        let kept = self.replacement(stale, pending, refusal)?;
        self.metrics.stale_if_error.inc();
        (said.status, said.age) = (Some(Status::StaleIfError), Some(kept.age));
        Some(kept)
    }

    pub(super) fn replacement(&self, stale: Option<&Arc<Entry>>, pending: &Pending, refusal: &Refusal) -> Option<Kept> {
        let (entry, now) = (stale?, self.now());
        let worth = self.worth(entry, now, &pending.lifetimes, &pending.wish);
        // It may have been removed since, by a change that no generation tells of.
        let stands = self.memory.peek(&entry.key).is_some_and(|found| Arc::ptr_eq(&found, entry));
        let given = matches!(worth, Worth::Times(Verdict::Fresh | Verdict::Revalidate | Verdict::IfError));
        let replaces = refusal.answer().status.is_server_error() && given && stands;
        replaces.then(|| Kept { age: entry.times.age(now), entry: entry.clone() })
    }

    pub(super) fn hit(
        &self,
        entry: Arc<Entry>,
        tier: Tier,
        now: Duration,
        cost: Duration,
        judged: &Judged,
        said: &mut Said,
    ) -> Kept {
        let kept = Kept { age: entry.times.age(now), entry };
        self.metrics.hit(tier);
        said.age = Some(kept.age);
        said.status = Some(Status::Hit { tier, ttl: kept.entry.times.ttl(now) });
        judged.observe(now, Observation::Hit { cost });
        kept
    }

    fn bypass(&self, said: &mut Said, bypass: Bypass, reason: &'static str) -> Look {
        said.status = Some(Status::Bypass(bypass));
        self.metrics.bypassed(reason);
        Look::Ask(Permit::none())
    }

    /// `now` was read after the request came.
    pub(super) fn worth(&self, entry: &Entry, now: Duration, lifetimes: &Lifetimes, wish: &Wish) -> Worth {
        if self.purges.cover(&entry.about, entry.mark) {
            return Worth::Void("purge");
        }
        if let Some(generation) = entry.generation {
            if generation != self.changes.generation() {
                return Worth::Void("gap");
            }
            if !self.changes.hears(now) {
                return Worth::Deaf;
            }
            if !self.changes.is_numbered() && entry.times.age(now) >= LONGEST_UNHEARD {
                return Worth::Times(Verdict::Expired);
            }
        }
        Worth::Times(entry.times.verdict(now, lifetimes, wish))
    }
}

pub(super) fn is_large(request: &InferRequest) -> bool {
    request.inputs.iter().map(|input| input.data.len()).sum::<usize>() > MOST_INPUT
}

/// A request's `Cache-Control`, if its tenant may have a wish and the model is cached at all.
pub fn wish(snapshot: &Snapshot, tenant: &Name, model: &Model, headers: &HeaderMap) -> Wish {
    if model.traffic.cache.is_none() || !headers.contains_key(CACHE_CONTROL) {
        return Wish::default();
    }
    let allowed = snapshot.tenants.get(tenant).is_some_and(|tenant| tenant.honours_cache_control);
    Wish::read(headers.get_all(CACHE_CONTROL).iter().map(HeaderValue::as_bytes)).if_allowed(allowed)
}

/// The cache's part in an answer, for the access log.
pub fn word(status: Status) -> &'static str {
    match status {
        Status::Hit { tier: Tier::L1, ttl: ..0 } | Status::StaleIfError => "stale",
        Status::Hit { tier: Tier::L1, .. } => "l1",
        Status::Hit { tier: Tier::L2, .. } => "l2",
        Status::Forwarded { collapsed: true, .. } => "collapsed",
        Status::Forwarded { .. } => "miss",
        Status::Bypass(_) => "bypass",
        Status::OnlyIfCached => "only-if-cached",
    }
}
