//! What the result cache counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::cache::status::Tier;
use spillway_core::cache::store::Removed;
use spillway_runtime::telemetry::Metrics as Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByTier {
    tier: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

pub struct Metrics {
    hits: [Counter; 2],
    pub misses: Counter,
    pub coalesced: Counter,
    pub revalidating: Counter,
    pub stale_if_error: Counter,
    pub stored: Counter,
    pub stored_in_region: Counter,
    pub handed_over: Counter,
    pub evicted: Counter,
    invalidated: Family<ByReason, Counter>,
    bypassed: Family<ByReason, Counter>,
    /// One of them, which many requests meet.
    pub guarded_off: Counter,
    not_stored: Family<ByReason, Counter>,
    region_failures: Family<ByReason, Counter>,
    refreshes: Family<ByReason, Counter>,
    pub bytes: Gauge,
    pub entries: Gauge,
    pub guarded: Gauge,
    pub purges: Counter,
}

impl Metrics {
    pub fn new(registry: &Registry) -> Self {
        let counter = |name, help| registry.register(name, help, Counter::default());
        let gauge = |name, help| registry.register(name, help, Gauge::default());
        let hits: Family<ByTier, Counter> = registry.family("cache_hits", "Requests answered from fresh results");
        let stale: Family<ByReason, Counter> =
            registry.family("cache_stale", "Requests answered from stale results: while revalidating, or for an error");
        let stored: Family<ByTier, Counter> = registry.family("cache_stored", "Results stored");
        let bypassed: Family<ByReason, Counter> =
            registry.family("cache_bypass", "Requests for cached models that the cache had no part in");
        let tier = |family: &Family<ByTier, Counter>, tier| family.get_or_create(&ByTier { tier }).clone();
        let reason = |family: &Family<ByReason, Counter>, reason| family.get_or_create(&ByReason { reason }).clone();
        Self {
            hits: [tier(&hits, "l1"), tier(&hits, "l2")],
            misses: counter("cache_misses", "Requests that nothing fresh was found for and that went to the model"),
            coalesced: counter("cache_coalesced", "Requests answered by the call that another one made"),
            revalidating: reason(&stale, "revalidate"),
            stale_if_error: reason(&stale, "error"),
            stored: tier(&stored, "l1"),
            stored_in_region: tier(&stored, "l2"),
            handed_over: counter(
                "cache_handed_over",
                "Calls whose maker failed or left, made again by one that waited",
            ),
            evicted: counter("cache_evicted", "Results that gave way to others"),
            invalidated: registry.family("cache_invalidated", "Results removed before their time, by reason"),
            guarded_off: reason(&bypassed, "guard"),
            bypassed,
            not_stored: registry
                .family("cache_not_stored", "Answers for cached models that were not stored, by reason"),
            region_failures: registry.family("cache_l2_failures", "Rounds to Redis that gave nothing, by reason"),
            refreshes: registry.family("cache_refreshes", "Background calls for stale results, by outcome"),
            bytes: gauge("cache_bytes", "What the results in memory take"),
            entries: gauge("cache_entries", "Results in memory"),
            guarded: gauge("cache_guarded", "Models, each for one tenant, whose cache is off because it does not pay"),
            purges: counter("cache_purges", "Purges applied, this gateway's and others'"),
        }
    }

    pub fn hit(&self, tier: Tier) {
        self.hits[usize::from(tier == Tier::L2)].inc();
    }

    pub fn invalidated(&self, reason: &'static str, removed: Removed) {
        if removed.entries > 0 {
            self.invalidated.get_or_create(&ByReason { reason }).inc_by(removed.entries);
        }
    }

    pub fn bypassed(&self, reason: &'static str) {
        self.bypassed.get_or_create(&ByReason { reason }).inc();
    }

    pub fn not_stored(&self, reason: &'static str) {
        self.not_stored.get_or_create(&ByReason { reason }).inc();
    }

    pub fn region_failed(&self, reason: &'static str) {
        self.region_failures.get_or_create(&ByReason { reason }).inc();
    }

    #[cfg(test)]
    pub fn region_failures(&self, reason: &'static str) -> u64 {
        self.region_failures.get_or_create(&ByReason { reason }).get()
    }

    pub fn refreshed(&self, reason: &'static str) {
        self.refreshes.get_or_create(&ByReason { reason }).inc();
    }
}
