//! What operators see of limits and gates, and what a request would meet: read, never changed.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;
use spillway_core::limit::{Decision, Standing};
use spillway_core::resource::Unit;

use super::gate::{GateState, would_enter};
use super::lease::{Bucket, Report};
use super::limit::{Buckets, Limit};
use super::metrics::word;
use super::{Account, Admission, Ask, Doors, class};

/// Tenants, models, and buckets in all, that are shown; those beyond are counted.
const TENANTS: usize = 1_000;
const MODELS: usize = 1_000;
const BUCKETS: usize = 10_000;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// Those with limits or with a bound, by name.
    pub tenants: BTreeMap<String, TenantView>,
    pub tenants_left_out: usize,
    /// Entities of all tenants that have a bucket of their own.
    pub entity_keys: usize,
    pub models: BTreeMap<String, GateView>,
    pub models_left_out: usize,
    /// Those of the models that are shown.
    pub pools: BTreeMap<String, PoolGateView>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TenantView {
    /// Requests that wait or are served; counted where there is a bound.
    pub in_flight: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub most_in_flight: Option<usize>,
    pub limits: Vec<LimitView>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LimitView {
    pub name: String,
    pub per: &'static str,
    /// `requests` or `cost`.
    pub of: &'static str,
    /// Tokens a second; those of the whole region if the buckets have a share.
    pub rate: f64,
    pub burst: u32,
    /// For a limit per model those that were asked for; none for one per entity.
    pub buckets: Vec<BucketView>,
    pub buckets_left_out: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BucketView {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// All tokens, also those that only the tenant's highest class may take.
    pub remaining: u32,
    /// Of a slice, if it is one.
    pub burst: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<ShareView>,
}

/// A slice of a quota of the region, in tokens a second.
#[derive(Debug, Serialize)]
pub struct ShareView {
    pub rate: f64,
    pub demand: f64,
    /// `joining`: Redis has not answered yet, `leased`, `local`: Redis does not answer.
    pub standing: &'static str,
}

/// The places of a model.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GateView {
    pub pool: String,
    pub in_flight: u32,
    pub most_in_flight: u32,
    pub waiting: usize,
    pub most_waiting: u32,
    /// What the model usually takes; 0 until it is known.
    pub usual_us: u64,
    /// Classes that are not shed for the model's own bound, as in [`PoolGateView`].
    pub lets_in: f64,
}

/// What all models of a pool share.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolGateView {
    pub in_flight: u32,
    /// What its pods take at a time; absent until it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub room: Option<u32>,
    pub waiting: usize,
    /// Classes that are not shed, from critical down: 4 are all, 2.5 are critical, high and half of normal.
    pub lets_in: f64,
}

/// What a request would meet.
#[derive(Debug, Serialize)]
pub struct WouldAdmit {
    pub class: &'static str,
    /// All limits that apply; it passes if each says so.
    pub limits: Vec<WouldTake>,
    /// Absent where no pool of this region serves the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<WouldEnter>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WouldTake {
    pub limit: String,
    pub per: &'static str,
    /// Tokens; of a limit per entity what each entity pays each time that it is named.
    pub cost: u32,
    pub passes: bool,
    /// As `RateLimit` would say: after it, if it passes. Of several entities that of the tightest.
    pub remaining: u32,
    /// Absent where it passes, and where no time would help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<ShareView>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WouldEnter {
    /// `enter`, `wait`, or the reason of a refusal as in `spillway_gateway_gate_refused_total`.
    pub would: &'static str,
    /// The share of such requests of this tenant that are not shed, 0 to 1.
    pub let_in: f64,
    #[serde(flatten)]
    pub model: GateView,
    pub of_pool: PoolGateView,
}

impl Admission {
    pub fn view(&self) -> View {
        let (rules, now) = (self.rules.load(), self.clock.now());
        let mut room = BUCKETS;
        let mut accounts: Vec<_> =
            rules.tenants.iter().filter(|(_, account)| account.limited || account.most_present.is_some()).collect();
        accounts.sort_unstable_by_key(|(name, _)| *name);
        let mut doors: Vec<_> = rules.models.iter().collect();
        doors.sort_unstable_by_key(|(name, _)| *name);
        let tenants_left_out = accounts.len().saturating_sub(TENANTS);
        let models_left_out = doors.len().saturating_sub(MODELS);
        accounts.truncate(TENANTS);
        doors.truncate(MODELS);
        let mut pools = BTreeMap::new();
        for (_, doors) in &doors {
            pools.entry(doors.pool.to_string()).or_insert_with(|| doors.pool_view());
        }
        View {
            tenants: accounts
                .into_iter()
                .map(|(name, account)| (name.to_string(), account.view(now, &mut room)))
                .collect(),
            tenants_left_out,
            entity_keys: self.entities.len(),
            models: doors.into_iter().map(|(name, doors)| (name.to_string(), doors.view())).collect(),
            models_left_out,
            pools,
        }
    }

    /// What a request would meet that is due at `until`, for explanations. Changes nothing.
    pub fn would_admit(&self, ask: &Ask<'_>, until: Instant) -> WouldAdmit {
        let (rules, now) = (self.rules.load(), self.clock.now());
        let (guest, limits) = match rules.tenants.get(ask.tenant) {
            None => (Account::unknown(), Vec::new()),
            Some(account) => {
                let class = class::of(ask.request, account.default_class, account.highest_class);
                let charge = self.charge(ask, class);
                (account.guest(class), account.limits.would_take(&charge, &self.entities, &self.quotas))
            }
        };
        let deadline = now.saturating_add(until.saturating_duration_since(Instant::now()));
        let gate = rules.models.get(ask.name).map(|doors| {
            let (would, let_in) = would_enter(&doors.gate, &doors.pool_gate, &guest, deadline);
            WouldEnter { would, let_in, model: doors.view(), of_pool: doors.pool_view() }
        });
        WouldAdmit { class: guest.class.name(), limits, gate }
    }
}

impl Account {
    fn view(&self, now: Duration, room: &mut usize) -> TenantView {
        TenantView {
            in_flight: self.present.load(Ordering::Relaxed),
            most_in_flight: self.most_present,
            limits: self.limits.view(now, room),
        }
    }
}

impl Doors {
    fn view(&self) -> GateView {
        let GateState { in_flight, waiting, settings, expected, lets_in } = self.gate.state();
        GateView {
            pool: self.pool.to_string(),
            in_flight,
            most_in_flight: settings.in_flight,
            waiting,
            most_waiting: settings.queue,
            usual_us: u64::try_from(expected.as_micros()).unwrap_or(u64::MAX),
            lets_in,
        }
    }

    fn pool_view(&self) -> PoolGateView {
        let GateState { in_flight, waiting, settings, lets_in, .. } = self.pool_gate.state();
        let room = Some(settings.in_flight).filter(|room| *room < u32::MAX);
        PoolGateView { in_flight, room, waiting, lets_in }
    }
}

impl LimitView {
    /// Shows no more than `room` buckets, and takes them from it.
    pub(super) fn of(limit: &Limit, now: Duration, room: &mut usize) -> Self {
        let mut buckets: Vec<(Option<&str>, &Bucket)> = match &limit.buckets {
            Buckets::One(bucket) => vec![(None, bucket)],
            Buckets::Models(models) => models.iter().map(|(model, bucket)| (Some(&**model), bucket)).collect(),
            Buckets::Entities { .. } => Vec::new(),
        };
        buckets.sort_unstable_by_key(|(model, _)| *model);
        let shown = buckets.len().min(*room);
        *room -= shown;
        Self {
            name: limit.rule.name.to_string(),
            per: word(limit.rule.per),
            of: match limit.rule.unit {
                Unit::Request => "requests",
                Unit::Cost => "cost",
            },
            rate: limit.rule.rate.per_second(),
            burst: limit.rule.burst,
            buckets_left_out: buckets.len() - shown,
            buckets: buckets
                .into_iter()
                .take(shown)
                .map(|(model, bucket)| BucketView::of(model, bucket, now))
                .collect(),
        }
    }
}

impl BucketView {
    fn of(model: Option<&str>, bucket: &Bucket, now: Duration) -> Self {
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        Self {
            model: model.map(str::to_owned),
            remaining: bucket.remaining(now_ns),
            burst: bucket.burst(),
            share: bucket.report(now).map(ShareView::of),
        }
    }
}

impl ShareView {
    fn of(report: Report) -> Self {
        let tokens = |milli: u64| milli as f64 / 1_000.0;
        let standing = match report.standing {
            Standing::Joining => "joining",
            Standing::Leased => "leased",
            Standing::Local => "local",
        };
        Self { rate: tokens(report.rate), demand: tokens(report.demand), standing }
    }
}

impl WouldTake {
    pub(super) fn of(limit: &Limit, cost: u32, decision: Decision, share: Option<Report>) -> Self {
        let retry_after = match decision {
            Decision::Refused { retry_after, .. } => Some(retry_after),
            Decision::Admitted { .. } | Decision::Never { .. } => None,
        };
        Self {
            limit: limit.rule.name.to_string(),
            per: word(limit.rule.per),
            cost,
            passes: matches!(decision, Decision::Admitted { .. }),
            remaining: decision.remaining(),
            retry_after_ms: retry_after.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            share: share.map(ShareView::of),
        }
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
