//! What is counted about members.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use spillway_core::members::Round;
use spillway_core::units::Name;
use spillway_runtime::telemetry::Metrics as Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    pub outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

pub struct MembersMetrics {
    pub questions: Family<Outcome, Counter>,
    rounds: Family<Outcome, Counter>,
    ignored: Family<Reason, Counter>,
    pub changes: Counter,
    pools: Pools,
}

/// The pools that are followed.
#[derive(Clone, Debug, Default)]
struct Pools(Arc<Mutex<BTreeMap<Name, Followed>>>);

#[derive(Clone, Debug)]
struct Followed {
    /// When DNS answered last; before it has, when it was asked first.
    heard: Instant,
    members: usize,
}

impl MembersMetrics {
    pub fn register(registry: &Registry) -> Self {
        let pools = Pools::default();
        registry.registry().register_collector(Box::new(pools.clone()));
        Self {
            questions: registry.family("gateway_members_questions", "Questions to DNS, by what came of them"),
            rounds: registry.family(
                "gateway_members_rounds",
                "Rounds of questions about a pool: answered as a whole, in part, or the last answer kept",
            ),
            ignored: registry.family("gateway_members_ignored", "Records in answers that became no member, by reason"),
            changes: registry.register("gateway_members_changes", "Changes of a pool's members", Counter::default()),
            pools,
        }
    }

    pub fn began(&self, pool: &Name) {
        self.pools.0.lock().insert(pool.clone(), Followed { heard: Instant::now(), members: 0 });
    }

    /// Forgets pools that are followed no more.
    pub fn keep(&self, is_followed: impl Fn(&Name) -> bool) {
        self.pools.0.lock().retain(|pool, _| is_followed(pool));
    }

    pub fn asked(&self, outcome: &'static str) {
        self.rounds.get_or_create(&Outcome { outcome }).inc();
    }

    pub fn ignored(&self, round: &Round) {
        for (reason, count) in [("cut", round.cut), ("unusable", round.unusable)] {
            if count > 0 {
                self.ignored.get_or_create(&Reason { reason }).inc_by(count as u64);
            }
        }
    }

    /// DNS has said who is in a pool.
    pub fn heard(&self, pool: &Name, members: usize) {
        if let Some(followed) = self.pools.0.lock().get_mut(pool) {
            *followed = Followed { heard: Instant::now(), members };
        }
    }
}

impl Collector for Pools {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let pools = self.0.lock().clone();
        let help = "Time since DNS last said who is in a pool, or was first asked";
        gauge(&mut encoder, "gateway_members_age_seconds", help, &pools, |pool| pool.heard.elapsed().as_secs_f64())?;
        gauge(&mut encoder, "gateway_members", "Members that DNS gives a pool", &pools, |pool| {
            i64::try_from(pool.members).unwrap_or(i64::MAX)
        })
    }
}

fn gauge<V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    pools: &BTreeMap<Name, Followed>,
    value: impl Fn(&Followed) -> V,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (pool, followed) in pools {
        ConstGauge::new(value(followed)).encode(family.encode_family(&[("pool", pool.as_str())])?)?;
    }
    Ok(())
}
