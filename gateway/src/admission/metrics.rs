//! What admission counts. Labels are of our own lists: neither tenants, models nor entities make series.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use spillway_core::limit::Class;
use spillway_core::resource::Per;
use spillway_runtime::telemetry::Metrics as Registry;

use super::gate::Why;

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

/// Seconds: from a wake-up to the longest deadlines.
const SECONDS: [f64; 11] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0];

/// Of all gates together.
pub struct GateMetrics {
    refused: [Counter; 5],
    shed: [Counter; 4],
    pub waiting: Gauge,
    seconds: Histogram,
}

impl GateMetrics {
    pub fn new(registry: &Registry) -> Self {
        let refused: Family<Label, Counter> =
            registry.family("gateway_gate_refused", "Requests that could not be served then, by reason");
        let shed: Family<Label, Counter> = registry.family("gateway_shed", "Requests that were shed, by class");
        let seconds = Histogram::new(SECONDS);
        Self {
            refused: Why::ALL.map(|why| refused.get_or_create(&[("reason", why.word())]).clone()),
            shed: Class::ALL.map(|class| shed.get_or_create(&[("class", class.name())]).clone()),
            waiting: registry.register("gateway_gate_waiting", "Requests that wait for a place", Gauge::default()),
            seconds: registry.register(
                "gateway_gate_wait_seconds",
                "How long requests waited that did not get a place at once",
                seconds,
            ),
        }
    }

    pub fn refused(&self, why: Why, class: Class) {
        self.refused[why as usize].inc();
        if why == Why::Shed {
            self.shed[class as usize].inc();
        }
    }

    pub fn waited(&self, wait: Duration) {
        self.waiting.dec();
        self.seconds.observe(wait.as_secs_f64());
    }
}
