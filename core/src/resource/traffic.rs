//! How a model's traffic is treated: cost, cache, routing, retries, bounds, degradation.
//!
//! Every part may be left out; its default stands beside each field of the settings that it makes.

use super::feature_group::FieldValue;
use super::model::TensorSpec;
use super::reader::{Field, Fields};
use crate::cache::freshness::Lifetimes;
use crate::resilience::{BreakerSettings, BudgetSettings, BulkheadSettings, DegradeSettings, RetrySettings};
use crate::routing::{MAX_SPREAD, Policy, RoutingSettings};
use crate::units::{InvalidUnit, Name, Percent, Rate, parse_duration};
use std::time::Duration;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// `cost`.
    pub cost: Cost,
    /// `cache`; absent: results are not kept.
    pub cache: Option<Lifetimes>,
    /// `routing`.
    pub routing: RoutingSettings,
    /// `retries`.
    pub retries: RetrySettings,
    pub budget: BudgetSettings,
    /// `hedge`: a second attempt where the first takes unusually long; default not.
    pub hedge: bool,
    /// `breaker`.
    pub breaker: BreakerSettings,
    /// `bulkhead`.
    pub bulkhead: BulkheadSettings,
    /// `degradation`; absent: the model answers as it should, or not at all.
    pub degradation: Option<Degradation>,
}

/// Tokens that a request costs where a limit counts cost: `request` and `row` for each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Default 1.
    pub request: u32,
    /// Default 0.
    pub row: u32,
}

impl Cost {
    pub fn of(self, rows: usize) -> u32 {
        let rows = u32::try_from(rows).unwrap_or(u32::MAX);
        self.request.saturating_add(self.row.saturating_mul(rows))
    }
}

impl Default for Cost {
    fn default() -> Self {
        Self { request: 1, row: 0 }
    }
}

/// What a model does when it cannot answer as it should.
#[derive(Clone, Debug, PartialEq)]
pub struct Degradation {
    pub settings: DegradeSettings,
    /// Level 2: another Model, which the sidecar serves itself.
    pub fallback: Option<Name>,
    /// Level 4: the values of one row of each output, in the model's order; empty: there is no such answer.
    pub fixed: Vec<Vec<FieldValue>>,
}

pub(super) fn read(fields: &Fields<'_>, outputs: &[TensorSpec]) -> Option<Traffic> {
    let cost = fields.optional("cost").map_or(Some(Cost::default()), |field| read_cost(&field));
    let cache = part(fields, "cache", read_cache);
    let routing = fields.optional("routing").map_or(Some(RoutingSettings::default()), |field| read_routing(&field));
    let default = (RetrySettings::default(), BudgetSettings::default());
    let retries = fields.optional("retries").map_or(Some(default), |field| read_retries(&field));
    let hedge = fields.optional("hedge").map_or(Some(false), |field| field.choice(&[("true", true), ("false", false)]));
    let breaker = fields.optional("breaker").map_or(Some(BreakerSettings::default()), |field| read_breaker(&field));
    let bulkhead = fields.optional("bulkhead").map_or(Some(BulkheadSettings::default()), |field| read_bulkhead(&field));
    let degradation =
        part(fields, "degradation", |field| read_degradation(field, outputs, fields.optional("cache").is_some()));
    let (retries, budget) = retries?;
    Some(Traffic {
        cost: cost?,
        cache: cache?,
        routing: routing?,
        retries,
        budget,
        hedge: hedge?,
        breaker: breaker?,
        bulkhead: bulkhead?,
        degradation: degradation?,
    })
}

/// `None` only after a fault was added, `Some(None)` when absent.
#[allow(clippy::option_option)]
fn part<T>(fields: &Fields<'_>, name: &'static str, read: impl FnOnce(&Field<'_>) -> Option<T>) -> Option<Option<T>> {
    fields.optional(name).map_or(Some(None), |field| read(&field).map(Some))
}

fn read_cost(field: &Field<'_>) -> Option<Cost> {
    let fields = field.map();
    let request = number(&fields, "request", 1, 0..=1_000_000);
    let row = number(&fields, "row", 0, 0..=1_000_000);
    fields.finish();
    Some(Cost { request: request?, row: row? })
}

fn read_cache(field: &Field<'_>) -> Option<Lifetimes> {
    const LONGEST: Duration = Duration::from_secs(86_400);
    let default = Lifetimes::default();
    let fields = field.map();
    let ttl = duration(&fields, "ttl", default.ttl, LONGEST);
    let revalidate = duration(&fields, "staleWhileRevalidate", default.stale_while_revalidate, LONGEST);
    let error = duration(&fields, "staleIfError", default.stale_if_error, LONGEST);
    fields.finish();
    let ttl = ttl?;
    if ttl.is_zero() {
        field.fault("the ttl is 0; expected more than 0, or no cache");
        return None;
    }
    Some(Lifetimes { ttl, stale_while_revalidate: revalidate?, stale_if_error: error? })
}

fn read_routing(field: &Field<'_>) -> Option<RoutingSettings> {
    const FACTOR: InvalidUnit = InvalidUnit("a factor from 1.05 to 10, such as 1.25");
    let default = RoutingSettings::default();
    let fields = field.map();
    let policy = fields.optional("policy").map_or(Some(default.policy), |field| {
        field.choice(&[
            ("ring", Policy::Ring),
            ("least_request", Policy::LeastRequest),
            ("weighted_round_robin", Policy::WeightedRoundRobin),
            ("source_address", Policy::SourceAddress),
        ])
    });
    let load_factor = fields.optional("loadFactor").map_or(Some(default.load_factor), |field| {
        field.parse(|text| text.parse().ok().filter(|factor| (1.05..=10.0).contains(factor)).ok_or(FACTOR))
    });
    let slow_start = duration(&fields, "slowStart", default.slow_start, Duration::from_secs(3_600));
    let mut hot = default.hot;
    let mut spread = Some(default.spread);
    if let Some(field) = fields.optional("hotEntity") {
        let fields = field.map();
        if let Some(field) = fields.optional("rate")
            && let Some(rate) = field.parse(Rate::parse)
        {
            if rate.per_second() < 1.0 {
                field.fault("an entity is hot from 1/s on at least; expected 1/s or more");
            }
            hot.threshold = rate.per_second() as u32;
        }
        spread = fields
            .optional("pods")
            .map_or(spread, |field| field.number(1..=MAX_SPREAD as i64).and_then(|pods| usize::try_from(pods).ok()));
        fields.finish();
    }
    fields.finish();
    Some(RoutingSettings {
        policy: policy?,
        load_factor: load_factor?,
        slow_start: slow_start?,
        spread: spread?,
        hot,
        ..default
    })
}

fn read_retries(field: &Field<'_>) -> Option<(RetrySettings, BudgetSettings)> {
    let (retries, budget) = (RetrySettings::default(), BudgetSettings::default());
    let fields = field.map();
    let most = number(&fields, "most", retries.retries, 0..=RetrySettings::MOST.into());
    let base = duration(&fields, "backoff", retries.base, Duration::from_secs(60));
    let cap = duration(&fields, "longestBackoff", retries.cap, Duration::from_secs(60));
    let ratio = percent(&fields, "budget", budget.ratio);
    fields.finish();
    Some((
        RetrySettings { retries: most?, base: base?, cap: cap?, ..retries },
        BudgetSettings { ratio: ratio?, ..budget },
    ))
}

fn read_breaker(field: &Field<'_>) -> Option<BreakerSettings> {
    let default = BreakerSettings::default();
    let fields = field.map();
    let window = number(&fields, "window", default.window, 10..=128);
    let failures = percent(&fields, "failures", default.failure_ratio);
    let open_for = duration(&fields, "openFor", default.open_for, Duration::from_secs(3_600));
    let probes = number(&fields, "probes", default.probes, 1..=100);
    fields.finish();
    let window = window?;
    Some(BreakerSettings {
        window,
        minimum: default.minimum.min(window),
        failure_ratio: failures?,
        open_for: open_for?,
        probes: probes?,
        ..default
    })
}

fn read_bulkhead(field: &Field<'_>) -> Option<BulkheadSettings> {
    const MOST: i64 = 100_000;
    let default = BulkheadSettings::default();
    let fields = field.map();
    let in_flight = number(&fields, "inFlight", default.in_flight, 1..=MOST);
    let queue = number(&fields, "queue", default.queue, 0..=MOST);
    // Left out, a tenant's share follows the whole.
    let share = |whole: Option<u32>, percent: u32| {
        whole.map_or(1, |whole| (whole / 100 * percent + whole % 100 * percent / 100).max(1))
    };
    let tenant_in_flight = number(&fields, "tenantInFlight", share(in_flight, 80), 1..=MOST);
    let tenant_queue = number(&fields, "tenantQueue", share(queue, 50), 0..=MOST);
    fields.finish();
    Some(BulkheadSettings {
        in_flight: in_flight?,
        queue: queue?,
        tenant_in_flight: tenant_in_flight?,
        tenant_queue: tenant_queue?,
    })
}

fn read_degradation(field: &Field<'_>, outputs: &[TensorSpec], cached: bool) -> Option<Degradation> {
    const LONGEST: Duration = Duration::from_secs(3_600);
    let default = DegradeSettings::default();
    let fields = field.map();
    let mut allowed = [false; 4];
    if let Some(levels) = fields.required("levels") {
        let items = levels.items();
        if items.is_empty() {
            levels.fault("no level is allowed; expected some of 1, 2, 3, 4");
        }
        for item in items {
            if let Some(level) = item.number(1..=4).and_then(|level| allowed.get_mut(usize::try_from(level - 1).ok()?))
            {
                *level = true;
            }
        }
    }
    let feature_p95 = duration(&fields, "featureP95", default.feature_p95, LONGEST);
    let prediction_p95 = duration(&fields, "predictionP95", default.prediction_p95, LONGEST);
    let errors = percent(&fields, "errors", default.errors);
    let many_errors = percent(&fields, "manyErrors", default.many_errors);
    let enter_after = duration(&fields, "enterAfter", default.enter_after, LONGEST);
    let leave_after = duration(&fields, "leaveAfter", default.leave_after, LONGEST);
    let fallback = part(&fields, "fallback", |field| field.parse(Name::parse));
    let fixed = part(&fields, "static", |field| read_static(field, outputs));
    fields.finish();
    let (fallback, fixed) = (fallback?, fixed?.unwrap_or_default());
    if allowed[1] && fallback.is_none() {
        field.fault("level 2 is the fallback model, but none is given; expected fallback");
        return None;
    }
    if allowed[2] && !cached {
        field.fault("level 3 is the last cached prediction, but the model has no cache; expected cache");
    }
    Some(Degradation {
        settings: DegradeSettings {
            allowed,
            feature_p95: feature_p95?,
            prediction_p95: prediction_p95?,
            errors: errors?,
            many_errors: many_errors?,
            enter_after: enter_after?,
            leave_after: leave_after?,
            ..default
        },
        fallback,
        fixed,
    })
}

/// The values of one row of every output, by name.
fn read_static(field: &Field<'_>, outputs: &[TensorSpec]) -> Option<Vec<Vec<FieldValue>>> {
    let names: Vec<(String, Field<'_>)> = field.entries();
    for (name, field) in &names {
        if !outputs.iter().any(|output| output.name == *name) {
            field.fault("the model has no such output");
        }
    }
    let mut rows = Vec::with_capacity(outputs.len());
    for output in outputs {
        let Some((_, field)) = names.iter().find(|(name, _)| *name == output.name) else {
            field.fault(format!("the output '{}' is missing", output.name));
            return None;
        };
        let width = output.shape.iter().skip(usize::from(output.shape.first() == Some(&-1)));
        let width: Option<i64> =
            width.copied().try_fold(1_i64, |width, size| (size > 0).then(|| width.saturating_mul(size)));
        let Some(width) = width.filter(|_| output.datatype.width().is_some()) else {
            field.fault("only outputs of a fixed width, but for the rows, and of no BYTES can have a static answer");
            return None;
        };
        let values: Vec<FieldValue> = field
            .items()
            .iter()
            .filter_map(|item| item.parse(|text| FieldValue::parse(text, output.datatype)))
            .collect();
        if i64::try_from(values.len()).ok() != Some(width) {
            field.fault(format!("expected {width} values, one row, found {}", values.len()));
            return None;
        }
        rows.push(values);
    }
    Some(rows)
}

fn number(fields: &Fields<'_>, name: &'static str, default: u32, bounds: std::ops::RangeInclusive<i64>) -> Option<u32> {
    let Some(field) = fields.optional(name) else { return Some(default) };
    field.number(bounds).and_then(|number| u32::try_from(number).ok())
}

fn percent(fields: &Fields<'_>, name: &'static str, default: f64) -> Option<f64> {
    let Some(field) = fields.optional(name) else { return Some(default) };
    field.parse(Percent::parse).map(Percent::ratio)
}

fn duration(fields: &Fields<'_>, name: &'static str, default: Duration, most: Duration) -> Option<Duration> {
    let Some(field) = fields.optional(name) else { return Some(default) };
    let duration = field.parse(parse_duration)?;
    if duration > most {
        field.fault(format!("is too long; expected at most {}s", most.as_secs()));
        return None;
    }
    Some(duration)
}
