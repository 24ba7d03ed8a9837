//! What operators see of changes and who hears them.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::confirm::Unconfirmed;

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) leases_lost: Counter,
    listeners: Gauge,
    pub(super) confirmation: Histogram,
    late: Counter,
    unreached: Counter,
    crowded: Counter,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let leases_lost = Counter::default();
        let listeners = Gauge::default();
        // Seconds: from a network's round trip to a lease that runs out.
        let confirmation =
            Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0]);
        let unconfirmed = Family::<[(&'static str, &'static str); 1], Counter>::default();
        // The registry prefixes `spillway_`.
        let name = |name: &str| format!("feature_{name}");
        registry.register(name("leases_lost"), "Times that this process stopped hearing changes", leases_lost.clone());
        registry.register(name("listeners"), "Leases listed in the region", listeners.clone());
        let help = "Seconds from a write that was told to its confirmation";
        registry.register(name("confirmation_seconds"), help, confirmation.clone());
        let help = "Writes that were answered without every listener's word";
        registry.register(name("writes_unconfirmed"), help, unconfirmed.clone());
        let reason = |reason| unconfirmed.get_or_create(&[("reason", reason)]).clone();
        Self {
            leases_lost,
            listeners,
            confirmation,
            late: reason("listener"),
            unreached: reason("redis"),
            crowded: reason("crowded"),
        }
    }

    pub(super) fn listed(&self, listeners: u64) {
        self.listeners.set(i64::try_from(listeners).unwrap_or(i64::MAX));
    }

    pub(super) fn unconfirmed(&self, reason: Unconfirmed) {
        match reason {
            Unconfirmed::Late => self.late.inc(),
            Unconfirmed::Unreached => self.unreached.inc(),
            Unconfirmed::Crowded => self.crowded.inc(),
        };
    }
}
