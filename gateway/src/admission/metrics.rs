//! What admission counts. Labels are of our own lists: neither tenants, models nor entities make series.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::resource::Per;
use spillway_runtime::telemetry::Metrics as Registry;

type Label = [(&'static str, &'static str); 1];

pub struct AdmissionMetrics {
    limited: [Counter; 3],
    pub overflowed: Counter,
    pub keys: Gauge,
}

impl AdmissionMetrics {
    pub fn new(registry: &Registry) -> Self {
        let limited: Family<Label, Counter> =
            registry.family("gateway_limited", "Requests refused by a token bucket, by what the bucket is for");
        Self {
            limited: PERS.map(|per| limited.get_or_create(&[("per", word(per))]).clone()),
            overflowed: registry.register(
                "gateway_limit_overflowed",
                "Entities that found no place for a bucket of their own and shared their tenant's",
                Counter::default(),
            ),
            keys: registry.register("gateway_limit_keys", "Entities with a bucket of their own", Gauge::default()),
        }
    }

    pub fn limited(&self, per: Per) {
        self.limited[per as usize].inc();
    }
}

const PERS: [Per; 3] = [Per::Tenant, Per::Model, Per::Entity];

pub fn word(per: Per) -> &'static str {
    match per {
        Per::Tenant => "tenant",
        Per::Model => "model",
        Per::Entity => "entity",
    }
}
