//! What admission counts. Labels are of our own lists: neither tenants, models nor entities make series.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use spillway_core::limit::{Class, Standing};
use spillway_core::resource::Per;
use spillway_runtime::telemetry::Metrics as Registry;

use super::gate::Why;
use super::lease::Report;

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

/// Of all quotas together.
pub struct QuotaMetrics {
    in_use: Gauge,
    local: Gauge,
    rate: Gauge<f64, AtomicU64>,
    demand: Gauge<f64, AtomicU64>,
    failures: [Counter; 3],
    pub beyond: Counter,
}

/// Why Redis did not grant a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoGrant {
    /// There was no connection.
    Away,
    /// No answer came in time.
    Timeout,
    /// The answer was an error, or made no sense.
    Error,
}

impl NoGrant {
    const ALL: [Self; 3] = [Self::Away, Self::Timeout, Self::Error];

    fn word(self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Timeout => "timeout",
            Self::Error => "error",
        }
    }
}

impl QuotaMetrics {
    pub fn new(registry: &Registry) -> Self {
        let failures: Family<Label, Counter> =
            registry.family("gateway_quota_failures", "Slices of quotas that Redis was asked for in vain, by reason");
        Self {
            in_use: registry.register("gateway_quotas", "Quotas of the region in use here", Gauge::default()),
            local: registry.register(
                "gateway_quota_local",
                "Quotas of the region that have a share here which Redis does not grant now",
                Gauge::default(),
            ),
            rate: registry.register(
                "gateway_quota_rate",
                "Tokens a second that the slices of all quotas give here",
                Gauge::default(),
            ),
            demand: registry.register(
                "gateway_quota_demand",
                "Tokens a second of all quotas that were asked for here lately",
                Gauge::default(),
            ),
            failures: NoGrant::ALL.map(|why| failures.get_or_create(&[("reason", why.word())]).clone()),
            beyond: registry.register(
                "gateway_quota_beyond",
                "Requests by quotas that Redis is not asked for, since too many others are in use",
                Counter::default(),
            ),
        }
    }

    /// Counts slices that were asked for in vain.
    pub fn failed(&self, why: NoGrant, slices: usize) {
        self.failures[why as usize].inc_by(slices as u64);
    }

    /// Says how all quotas in use are.
    pub fn set(&self, reports: &[Report]) {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let tokens = |of: fn(&Report) -> u64| reports.iter().map(|report| of(report) as f64 / 1_000.0).sum();
        self.in_use.set(count(reports.len()));
        self.local.set(count(reports.iter().filter(|report| report.standing == Standing::Local).count()));
        self.rate.set(tokens(|report| report.rate));
        self.demand.set(tokens(|report| report.demand));
    }
}

/// Seconds: from a wake-up to the longest deadlines.
const SECONDS: [f64; 11] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0];

/// Of all gates together.
pub struct GateMetrics {
    refused: [Counter; 7],
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
        if matches!(why, Why::Shed | Why::Share | Why::Planned) {
            self.shed[class as usize].inc();
        }
    }

    pub fn waited(&self, wait: Duration) {
        self.waiting.dec();
        self.seconds.observe(wait.as_secs_f64());
    }
}
