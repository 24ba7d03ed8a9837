//! The pods as `/config` and `explain` show them: read, never changed.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use spillway_core::resilience::Standing;
use spillway_core::resilience::breaker::BreakerState;
use spillway_core::resilience::outlier::PodReport;
use spillway_core::routing::Reported;

use crate::pods::fleet::{Fleet, PodLink, PoolLinks};
use crate::pods::lane::Lane;
use crate::pods::metrics::{RULES, rule};

/// All pools of the region, by name.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct PodsView(BTreeMap<String, PoolView>);

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolView {
    /// Places on the ring: pods.
    pub ring_pods: usize,
    /// Whether so many pods are out that none is left out.
    pub panic: bool,
    /// Calls that the pods may have at a time.
    pub capacity: u32,
    pub pods: BTreeMap<String, PodView>,
    pub models: BTreeMap<String, ModelView>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodView {
    pub address: String,
    /// What its calls say: `usable`, `suspect`, `probing`, `ejected`.
    pub standing: &'static str,
    /// The rule that it broke.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'static str>,
    /// How long that lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
    /// What its health checks say: `unknown`, `serving`, `failed`.
    pub health: &'static str,
    /// Its recent share of failures, 0 to 1.
    pub failing: f64,
    pub in_flight: usize,
    /// Calls that it may have at a time.
    pub limit: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadView>,
    /// The breakers that are not closed, by model.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub breakers: BTreeMap<String, BreakerView>,
}

/// What the pod last said of itself.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadView {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub utilisation: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<usize>,
    pub age_ms: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BreakerView {
    /// `open` or `half_open`.
    pub state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelView {
    pub policy: &'static str,
    /// Retries and hedges that the budget has left.
    pub budget_left: f64,
    pub hot_entities: usize,
    /// Of the last seconds, and what they took.
    pub answers: u32,
    pub p50_us: u64,
    pub p95_us: u64,
    pub p99_us: u64,
    /// The weights of pods that have not all of theirs: slow start.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<String, f64>,
}

impl Fleet {
    pub fn view(&self, now: Duration) -> PodsView {
        let pools = self.pools().map(|pool| {
            let lanes: Vec<&Lane> =
                self.lanes().map(|lane| &**lane).filter(|lane| lane.pool.name == pool.name).collect();
            (pool.name.to_string(), pool_view(pool, &lanes, now))
        });
        PodsView(pools.collect())
    }
}

fn pool_view(pool: &PoolLinks, lanes: &[&Lane], now: Duration) -> PoolView {
    let outliers = pool.state.outliers.lock();
    let reports: Vec<PodReport> = outliers.pods(now).collect();
    let panic = outliers.panic();
    drop(outliers);
    let pods = pool.pods.iter().enumerate().map(|(index, pod)| {
        let report = reports.iter().find(|report| report.pod == pod.state.id);
        let breakers = lanes.iter().filter_map(|lane| {
            let state = lane.breakers.get(index)?.as_ref()?.state();
            Some((lane.name.to_string(), breaker_view(state, now)?))
        });
        (pod.key().pod.to_string(), pod_view(pod, report, breakers.collect(), now))
    });
    let models = lanes.iter().map(|lane| (lane.name.to_string(), model_view(lane, now)));
    PoolView {
        ring_pods: pool.ring.pods(),
        panic,
        capacity: pool.capacity(),
        pods: pods.collect(),
        models: models.collect(),
    }
}

fn pod_view(
    pod: &PodLink,
    report: Option<&PodReport>,
    breakers: BTreeMap<String, BreakerView>,
    now: Duration,
) -> PodView {
    let state = &pod.state;
    let load = state.reported(now).map(|report| {
        let (utilisation, requests) = match report.reported {
            Reported::Utilisation(utilisation) => (Some(utilisation), None),
            Reported::Requests(requests) => (None, Some(requests)),
        };
        LoadView { utilisation, requests, age_ms: milliseconds(report.age) }
    });
    PodView {
        address: state.key.address.to_string(),
        standing: match report.map_or(Standing::Usable, |report| report.standing) {
            Standing::Usable => "usable",
            Standing::Suspect => "suspect",
            Standing::Probe => "probing",
            Standing::Ejected => "ejected",
        },
        why: report.and_then(|report| report.reason).map(|reason| RULES[rule(reason)]),
        for_ms: report.and_then(|report| report.until).map(|until| milliseconds(until.saturating_sub(now))),
        health: match (state.health.is_serving(), state.health.may_serve()) {
            (true, _) => "serving",
            (false, true) => "unknown",
            (false, false) => "failed",
        },
        failing: report.map_or(0.0, |report| report.penalty),
        in_flight: state.in_flight(),
        limit: state.limit(),
        load,
        breakers,
    }
}

fn model_view(lane: &Lane, now: Duration) -> ModelView {
    let routing = &lane.model.traffic.routing;
    let shares = lane.pool.pods.iter().map(|pod| (pod, pod.state.share(routing.slow_start, now)));
    let weights = shares.filter(|(_, share)| *share < 1.0).map(|(pod, share)| (pod.key().pod.to_string(), share));
    let weights = weights.collect();
    let recent = lane.recent();
    let traffic = &mut *lane.state.traffic.lock();
    ModelView {
        policy: routing.policy.as_str(),
        budget_left: traffic.budget.left(now),
        hot_entities: traffic.hot.count(now),
        answers: recent.samples,
        p50_us: recent.p50.as_micros() as u64,
        p95_us: recent.p95.as_micros() as u64,
        p99_us: recent.p99.as_micros() as u64,
        weights,
    }
}

fn breaker_view(state: BreakerState, now: Duration) -> Option<BreakerView> {
    match state {
        BreakerState::Closed { .. } => None,
        BreakerState::Open { until } => {
            Some(BreakerView { state: "open", for_ms: Some(milliseconds(until.saturating_sub(now))) })
        }
        BreakerState::HalfOpen { .. } => Some(BreakerView { state: "half_open", for_ms: None }),
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
