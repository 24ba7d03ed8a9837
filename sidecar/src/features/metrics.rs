//! Counters of the feature tiers. Handles are looked up once.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use spillway_core::feature::Missing;

use super::lookup::Tier;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// What a tier said about one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Hit,
    Stale,
    Absent,
    Miss,
    Malformed,
    Error,
}

impl Outcome {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Hit, "hit"),
        (Self::Stale, "stale"),
        (Self::Absent, "absent"),
        (Self::Miss, "miss"),
        (Self::Malformed, "malformed"),
        (Self::Error, "error"),
    ];
}

#[derive(Debug)]
pub struct Metrics {
    reads: [[Counter; 6]; 3],
    malformed: Family<Labels<1>, Counter>,
    pub(super) l1_filled: Counter,
    pub(super) l1_refused: Counter,
    pub(super) l2_filled: Counter,
    pub(super) l2_fill_failed: Counter,
    /// The fill was left out because too many were under way.
    pub(super) l2_fill_skipped: Counter,
    pub(super) heard: Counter,
    pub(super) gaps: Counter,
    pub(super) lost: Counter,
    pub(super) written: [Counter; 2],
    pub(super) write_failed: [Counter; 2],
    /// What the durable store will not take, however often.
    pub(super) write_refused: Counter,
    /// Events already past their retention: nothing to keep.
    pub(super) write_expired: Counter,
    pub(super) repaired: Counter,
    pub(super) repair_dropped: Counter,
    pub(super) shared: Counter,
    pub(super) handed_over: Counter,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let reads = Family::<Labels<2>, Counter>::default();
        let malformed = Family::<Labels<1>, Counter>::default();
        let fills = Family::<Labels<2>, Counter>::default();
        let invalidations = Family::<Labels<1>, Counter>::default();
        let writes = Family::<Labels<2>, Counter>::default();
        let repairs = Family::<Labels<1>, Counter>::default();
        let flights = Family::<Labels<1>, Counter>::default();
        // The registry prefixes `spillway_`.
        let name = |name: &str| format!("sidecar_feature_{name}");
        registry.register(name("reads"), "Rows asked of a tier, by what it said", reads.clone());
        registry.register(name("malformed"), "Stored bytes that are no row of their group", malformed.clone());
        registry.register(name("fills"), "Rows copied into a nearer tier", fills.clone());
        registry.register(name("invalidations"), "Words about overwritten rows", invalidations.clone());
        registry.register(name("writes"), "Rows written or deleted, by tier", writes.clone());
        registry.register(name("repairs"), "Rows that Redis could not be told about in time", repairs.clone());
        registry.register(name("flights"), "Rows that shared another request's read", flights.clone());
        let one = |family: &Family<Labels<1>, Counter>, key, value| family.get_or_create(&[(key, value)]).clone();
        let two = |family: &Family<Labels<2>, Counter>, tier: Tier, outcome| {
            family.get_or_create(&[("tier", tier.name()), ("outcome", outcome)]).clone()
        };
        Self {
            reads: [Tier::L1, Tier::L2, Tier::L3]
                .map(|tier| Outcome::ALL.map(|(_, outcome)| two(&reads, tier, outcome))),
            l1_filled: two(&fills, Tier::L1, "filled"),
            l1_refused: two(&fills, Tier::L1, "refused"),
            l2_filled: two(&fills, Tier::L2, "filled"),
            l2_fill_failed: two(&fills, Tier::L2, "failed"),
            l2_fill_skipped: two(&fills, Tier::L2, "skipped"),
            heard: one(&invalidations, "kind", "heard"),
            gaps: one(&invalidations, "kind", "gap"),
            lost: one(&invalidations, "kind", "lost"),
            written: [two(&writes, Tier::L2, "written"), two(&writes, Tier::L3, "written")],
            write_failed: [two(&writes, Tier::L2, "failed"), two(&writes, Tier::L3, "failed")],
            write_refused: two(&writes, Tier::L3, "refused"),
            write_expired: two(&writes, Tier::L3, "expired"),
            repaired: one(&repairs, "outcome", "repaired"),
            repair_dropped: one(&repairs, "outcome", "dropped"),
            shared: one(&flights, "outcome", "shared"),
            handed_over: one(&flights, "outcome", "handed_over"),
            malformed,
        }
    }

    pub(super) fn read(&self, tier: Tier, outcome: Outcome) {
        self.reads[tier as usize][outcome as usize].inc();
    }

    pub(super) fn malformed(&self, missing: Missing) {
        self.malformed.get_or_create(&[("reason", missing.reason())]).inc();
    }
}
