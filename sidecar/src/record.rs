//! What one request leaves behind: its line in the access log, its counts, its span.
//!
//! The rule: written when the request ends, also when it is cancelled; never entity ids, features or
//! what callers sent beyond names of models, which are the snapshot's.

use std::time::{Duration, Instant};

use serde::Serialize;
use spillway_runtime::access_log::{AccessLog, Entry};
use spillway_runtime::telemetry::{Span, Status, Traces};

use crate::inference::Context;
use crate::metrics::{ByModel, ByOutcome, Counted, SidecarMetrics, UNKNOWN};
use crate::model::ModelError;

/// The outcome of a request that got its prediction.
pub const OK: &str = "ok";
/// The outcome of a request whose caller went away.
pub const CANCELLED: &str = "cancelled";

/// Begins records.
#[derive(Clone, Debug)]
pub struct Recorder {
    pub log: AccessLog,
    pub traces: Traces,
    pub metrics: SidecarMetrics,
}

/// One request's record; its drop is the request's end.
pub struct Record {
    line: Entry<Line>,
    traces: Traces,
    span: Span,
    metrics: SidecarMetrics,
    arrived: Instant,
    features: Option<Duration>,
    model: Option<Duration>,
    fallback: Option<Duration>,
    _in_flight: Counted,
}

#[derive(Debug, Serialize)]
struct Line {
    /// Unix milliseconds of the end.
    time_ms: u64,
    request_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    gateway: String,
    tenant: String,
    model: String,
    version: String,
    entities: usize,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    degraded: Option<&'static str>,
    /// Why the model gave no usable answer, for operators.
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    duration_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    features_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fallback_us: Option<u64>,
}

impl Recorder {
    pub fn begin(&self, context: &Context) -> Record {
        let line = Line {
            time_ms: 0,
            request_id: context.request_id.clone(),
            trace_id: context.trace.trace_id(),
            gateway: context.gateway.clone(),
            tenant: context.tenant.clone(),
            model: UNKNOWN.to_owned(),
            version: String::new(),
            entities: 0,
            outcome: CANCELLED,
            degraded: None,
            cause: None,
            duration_us: 0,
            features_us: None,
            model_us: None,
            fallback_us: None,
        };
        Record {
            line: self.log.entry(line),
            span: self.traces.span("infer", &context.trace),
            traces: self.traces.clone(),
            metrics: self.metrics.clone(),
            arrived: context.arrived,
            features: None,
            model: None,
            fallback: None,
            _in_flight: Counted::new(&self.metrics.in_flight),
        }
    }
}

impl Record {
    /// A model of the snapshot.
    pub fn model(&mut self, name: &str) {
        name.clone_into(&mut self.line.model);
        self.span.set("model", name.to_owned());
    }

    pub fn version(&mut self, version: &str) {
        version.clone_into(&mut self.line.version);
    }

    pub fn entities(&mut self, count: usize) {
        self.line.entities = count;
    }

    /// A step of this request, as a child of its span; ends when dropped.
    pub fn step(&self, name: &'static str) -> Span {
        self.traces.span(name, &self.span.as_parent())
    }

    pub fn features_took(&mut self, time: Duration) {
        self.features = Some(time);
    }

    pub fn model_took(&mut self, time: Duration) {
        self.model = Some(time);
    }

    pub fn fallback_took(&mut self, time: Duration) {
        self.fallback = Some(time);
    }

    pub fn degraded(&mut self, reason: &'static str) {
        self.line.degraded = Some(reason);
    }

    pub fn cause(&mut self, error: &ModelError) {
        self.line.cause = Some(error.to_string());
    }

    /// [`OK`] or the failure's code; a record without an end was cancelled.
    pub fn end(&mut self, outcome: &'static str) {
        self.line.outcome = outcome;
        self.span.status(if outcome == OK { Status::Ok } else { Status::Error(outcome) });
    }

    /// The value of `server-timing`, in milliseconds (W3C Server Timing).
    pub fn server_timing(&self) -> String {
        let part = |name: &str, time: Option<Duration>| {
            time.map(|time| format!("{name};dur={:.3}", time.as_secs_f64() * 1_000.0))
        };
        [part("features", self.features), part("model", self.model), part("fallback", self.fallback)]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let took = self.arrived.elapsed();
        self.line.time_ms = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        self.line.duration_us = micros(took);
        self.line.features_us = self.features.map(micros);
        self.line.model_us = self.model.map(micros);
        self.line.fallback_us = self.fallback.map(micros);
        let model = ByModel { model: self.line.model.clone() };
        self.metrics.duration.get_or_create(&model).observe(took.as_secs_f64());
        if let Some(time) = self.model {
            self.metrics.model_duration.get_or_create(&model).observe(time.as_secs_f64());
        }
        self.metrics.requests.get_or_create(&ByOutcome { model: model.model, outcome: self.line.outcome }).inc();
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
