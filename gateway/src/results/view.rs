//! What operators see of the cache, and what a request would find in it.

use serde::Serialize;
use spillway_core::cache::freshness::Verdict;
use spillway_core::cache::key::Dependencies;

use super::Results;
use super::changes::Truth;
use super::look::{Asked, LARGE, UNKNOWN, Worth, is_large};
use super::models::sample;
use super::region::hex;

/// Tenants that are named.
const TENANTS: usize = 10;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
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
#[serde(rename_all = "camelCase")]
pub struct TenantView {
    pub tenant: String,
    pub bytes: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelView {
    pub model: String,
    /// Tenants that use it, and those for whom its cache is off because it does not pay.
    pub tenants: usize,
    pub off: usize,
    /// How long its calls take, about.
    pub call_us: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RegionView {
    pub connected: bool,
    /// It failed, and is left alone for a while.
    pub rests: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FeaturesView {
    /// Whether results that depend on features are given: a channel tells of changes, or they live for a
    /// second.
    pub channel: bool,
    pub hears: bool,
    pub number: Option<u64>,
}

/// What a request would find.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WouldFind {
    pub finds: Finds,
    /// Why it is uncacheable, as in `spillway_cache_bypass_total`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'static str>,
    /// The key's hash; absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// Seconds of freshness left; below 0 where it is stale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<i64>,
    /// It would wait for a call that is under way.
    pub waits: bool,
    /// The region's Redis would be asked next; it may have what this gateway has not.
    pub asks_region: bool,
}

/// What lies under a request's key in this gateway's memory, and what that is worth to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finds {
    /// The model is not cached.
    Off,
    /// Its cache does not pay for this tenant, and is not asked.
    Guard,
    /// The request has no key, or its answer no lifetime.
    Uncacheable,
    /// Changes of the features are not heard.
    Deaf,
    /// Given.
    Fresh,
    /// Given, and replaced in the background.
    Stale,
    /// Not what the request's `cache-control` takes.
    Refused,
    /// Given if the model fails.
    IfError,
    Miss,
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

    /// What a request would find, for explanations: in the order of a look-up. Changes nothing, and does not
    /// ask Redis.
    pub fn would_find(&self, asked: &Asked<'_>) -> WouldFind {
        let none =
            |finds, why| WouldFind { finds, why, key: None, age_ms: None, ttl: None, waits: false, asks_region: false };
        let Some(lifetimes) = &asked.model.traffic.cache else { return none(Finds::Off, None) };
        let now = self.now();
        if self.models.would_skip(&asked.request.model, asked.tenant, now, sample(asked.request, asked.entities)) {
            return none(Finds::Guard, None);
        }
        if is_large(asked.request) {
            return none(Finds::Uncacheable, Some(LARGE));
        }
        if asked.names().is_none() {
            return none(Finds::Uncacheable, Some(UNKNOWN));
        }
        let key = match self.key(asked) {
            Ok(key) => key,
            Err(reason) => return none(Finds::Uncacheable, Some(reason.code())),
        };
        let mut would = WouldFind { key: Some(hex(&key.hash)), ..none(Finds::Miss, None) };
        if let Some(entry) = self.memory.peek(&key) {
            would.finds = match self.worth(&entry, now, lifetimes, &asked.wish) {
                Worth::Void(_) | Worth::Times(Verdict::Expired) => Finds::Miss,
                Worth::Deaf => Finds::Deaf,
                Worth::Times(Verdict::Fresh) => Finds::Fresh,
                Worth::Times(Verdict::Revalidate) => Finds::Stale,
                Worth::Times(Verdict::Refused) => Finds::Refused,
                Worth::Times(Verdict::IfError) => Finds::IfError,
            };
            if would.finds != Finds::Miss {
                would.age_ms = u64::try_from(entry.times.age(now).as_millis()).ok();
                would.ttl = Some(entry.times.ttl(now));
            }
        }
        match would.finds {
            Finds::Fresh | Finds::Deaf => return would,
            Finds::Stale => {}
            _ if asked.wish.only_if_cached => return would,
            _ => {}
        }
        match Dependencies::of(asked.snapshot, asked.model, asked.tenant, asked.request, asked.entities) {
            Err(reason) => return WouldFind { finds: Finds::Uncacheable, why: Some(reason.code()), ..would },
            Ok(dependencies) => {
                if self.changes.truth(&dependencies) == Truth::Numbered && !self.changes.hears(now) {
                    return WouldFind { finds: Finds::Deaf, ..would };
                }
            }
        }
        let together = matches!(would.finds, Finds::Miss | Finds::IfError) && !asked.wish.is_alone();
        would.waits = together && self.memory.is_called(&key);
        would.asks_region = together && !would.waits && self.region.is_some();
        would
    }
}
