//! What the plan has this region refuse, and what it asks of autoscalers.
//!
//! The rule: what the plan found no room for anywhere is refused at the gate, class by class, as overload; and no other
//! region is asked for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::limit::Class;
use spillway_core::units::Name;
use spillway_runtime::plan::Published;
use spillway_runtime::telemetry::Metrics as Registry;

use crate::shared::Shared;

/// How often gauges are set.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRegion {
    region: String,
}

/// What the plan says, as gauges.
pub struct PlanMetrics {
    factors: Family<ByRegion, Gauge<f64, AtomicU64>>,
}

impl PlanMetrics {
    pub fn new(registry: &Registry) -> Self {
        let help = "Capacity that a region's autoscaler is asked for, as a multiple of what it has, by the plan";
        Self { factors: registry.family("capacity_factor", help) }
    }

    /// Regions of `before` that the plan does not name any more are shown no more.
    fn show(&self, plan: Option<&Published>, before: &BTreeSet<Name>) -> BTreeSet<Name> {
        let label = |region: &Name| ByRegion { region: region.to_string() };
        let regions = plan.into_iter().flat_map(|published| &published.plan.regions);
        let mut shown = BTreeSet::new();
        for (region, allotment) in regions {
            self.factors.get_or_create(&label(region)).set(allotment.capacity_factor);
            shown.insert(region.clone());
        }
        for gone in before.difference(&shown) {
            self.factors.remove(&label(gone));
        }
        shown
    }
}

/// Whether the plan has a request of this class refused in this region. `random` in 0..1 spreads the refusals.
pub fn refuses(plan: Option<&Published>, region: &Name, class: Class, random: f64) -> bool {
    let allotment = plan.and_then(|published| published.plan.regions.get(region));
    allotment.is_some_and(|allotment| allotment.shed.refuses(class, random))
}

/// Follows the plan until the drain is over.
pub async fn follow(shared: Arc<Shared>) {
    let mut shown = BTreeSet::new();
    loop {
        shown = shared.plan_metrics.show(shared.plan().as_deref(), &shown);
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = shared.drain.stopped() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use spillway_core::failover::{Plan, Region, Traffic};

    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    /// `us` is lost, and `eu` can carry three quarters of the whole.
    fn published() -> Published {
        let region =
            |share| Region { planned: 100.0, share, capacity: Some(150.0), load: Some(100.0), overridden: None };
        let regions: BTreeMap<Name, Region> = [(name("eu"), region(1.0)), (name("us"), region(0.0))].into();
        let traffic = Traffic { demand: None, classes: [1.0, 1.0, 1.0, 1.0] };
        let plan = Plan::of(1, &regions, &traffic, Duration::ZERO).unwrap();
        Published { epoch: 1, plan, standings: BTreeMap::new() }
    }

    #[test]
    fn the_lowest_class_is_refused_where_the_plan_has_no_room_for_it() {
        let plan = published();
        let refused = |region: &str, class| {
            (0..100).filter(|n| refuses(Some(&plan), &name(region), class, f64::from(*n) / 1e2)).count()
        };
        assert_eq!(Class::ALL.map(|class| refused("eu", class)), [0, 0, 0, 100], "a quarter of all");
        assert_eq!(Class::ALL.map(|class| refused("us", class)), [0; 4]);
        assert_eq!(Class::ALL.map(|class| refused("ap", class)), [0; 4]);
        assert!(!refuses(None, &name("eu"), Class::Low, 0.0));
    }

    #[test]
    fn each_regions_factor_is_shown_while_the_plan_names_it() {
        let registry = Registry::new("test");
        let metrics = PlanMetrics::new(&registry);
        let shown = metrics.show(Some(&published()), &BTreeSet::new());
        let text = registry.encode().unwrap();
        assert!(text.contains("spillway_capacity_factor{region=\"eu\"} 1.5"), "{text}");
        let shown = metrics.show(None, &shown);
        assert!(shown.is_empty() && !registry.encode().unwrap().contains("region=\"eu\""));
    }
}
