//! What operators see of the cache, and what a request would find in it.

use serde::Serialize;
use spillway_core::cache::control::Wish;
use spillway_core::cache::freshness::{Lifetimes, Verdict};
use spillway_core::cache::key::Key;

use super::Results;
use super::look::{Asked, Worth};
use super::region::hex;

/// Tenants that are named.
const TENANTS: usize = 10;

#[derive(Debug, Serialize)]
pub struct View {
    pub entries: i64,
    pub bytes: i64,
    pub capacity: u64,
    /// Calls under way that others may wait for.
    pub flights: usize,
    /// Those that hold most.
    pub tenants: Vec<TenantView>,
    pub models: Vec<ModelView>,
    /// Absent without a Redis.
    pub region: Option<RegionView>,
    pub features: FeaturesView,
    /// The number of the last purge.
    pub last_purge: u64,
}

#[derive(Debug, Serialize)]
pub struct TenantView {
    pub tenant: String,
    pub bytes: u64,
}

#[derive(Debug, Serialize)]
pub struct ModelView {
    pub model: String,
    /// Tenants that use it, and those for whom its cache is off because it does not pay.
    pub tenants: usize,
    pub off: usize,
    /// How long its calls take, about.
    pub call_us: u64,
}

#[derive(Debug, Serialize)]
pub struct RegionView {
    pub connected: bool,
    /// It failed, and is left alone for a while.
    pub rests: bool,
}

#[derive(Debug, Serialize)]
pub struct FeaturesView {
    /// Whether results that depend on features are given: a channel tells of changes, or they live for a
    /// second.
    pub channel: bool,
    pub hears: bool,
    pub number: Option<u64>,
}

/// What a request would find.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct WouldFind {
    /// The key's hash; absent where the request cannot be cached.
    pub key: Option<String>,
    /// `off`, `uncacheable`, `fresh`, `stale`, `refused`, `deaf`, `called` or `miss`.
    pub finds: &'static str,
    pub age_ms: Option<u64>,
    /// Seconds of freshness left; below 0 where it is stale.
    pub ttl: Option<i64>,
}

impl Results {
    pub fn view(&self) -> View {
        let models = self.models.all().into_iter().map(|summary| ModelView {
            model: summary.model.to_string(),
            tenants: summary.tenants,
            off: summary.off,
            call_us: u64::try_from(summary.call.as_micros()).unwrap_or(u64::MAX),
        });
        let tenants = self.memory.largest_tenants(TENANTS).into_iter();
        View {
            entries: self.metrics.entries.get(),
            bytes: self.metrics.bytes.get(),
            capacity: self.memory.capacity(),
            flights: self.memory.flights(),
            tenants: tenants.map(|(tenant, bytes)| TenantView { tenant: tenant.to_string(), bytes }).collect(),
            models: models.collect(),
            region: self
                .region
                .as_ref()
                .map(|region| RegionView { connected: region.is_connected(), rests: region.rests() }),
            features: FeaturesView {
                channel: self.changes.is_numbered(),
                hears: self.changes.hears(self.now()),
                number: self.changes.coherence.lock().number(),
            },
            last_purge: self.purges.mark(),
        }
    }

    /// What a request would find, for explanations. Changes nothing, and does not ask Redis.
    #[cfg_attr(not(test), expect(dead_code, reason = "`spillway explain` is to ask for it"))]
    pub fn would_find(&self, asked: &Asked<'_>) -> WouldFind {
        let nothing = |finds| WouldFind { key: None, finds, age_ms: None, ttl: None };
        let Some(lifetimes) = &asked.model.traffic.cache else { return nothing("off") };
        match self.key(asked) {
            Ok(key) => self.would_hit(&key, lifetimes, &asked.wish),
            Err(_) => nothing("uncacheable"),
        }
    }

    /// What lies under a key.
    pub fn would_hit(&self, key: &Key, lifetimes: &Lifetimes, wish: &Wish) -> WouldFind {
        let mut would = WouldFind { key: Some(hex(&key.hash)), finds: "miss", age_ms: None, ttl: None };
        let now = self.now();
        let called = if self.memory.is_called(key) { "called" } else { "miss" };
        let Some(entry) = self.memory.peek(key) else { return WouldFind { finds: called, ..would } };
        would.finds = match self.worth(&entry, now, lifetimes, wish) {
            Worth::Void(_) => return WouldFind { finds: called, ..would },
            Worth::Deaf => "deaf",
            Worth::Times(Verdict::Fresh) => "fresh",
            Worth::Times(Verdict::Revalidate) => "stale",
            Worth::Times(Verdict::Refused) => "refused",
            Worth::Times(Verdict::IfError | Verdict::Expired) => called,
        };
        would.age_ms = u64::try_from(entry.times.age(now).as_millis()).ok();
        would.ttl = Some(entry.times.ttl(now));
        would
    }
}
