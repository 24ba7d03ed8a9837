//! One request and its answer: what is gathered on the way, and the access record that it leaves.
//!
//! The rule: an exchange is recorded once, when it is dropped; one without an outcome was cancelled.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderValue, StatusCode};
use serde::Serialize;
use spillway_core::cache::status::Status as CacheStatus;
use spillway_core::limit::Class;
use spillway_core::policy::Principal;
use spillway_core::resilience::Step;
use spillway_core::units::Name;
use spillway_runtime::telemetry::{Span, Status};
use tonic::Code;

use crate::admission::Standing;
use crate::audit::denial;
use crate::downstream::connection::Caller;
use crate::errors::{Answer, HeadFault, Refusal};
use crate::peers::visit::Visit;
use crate::pods::attempt::PodAnswer;
use crate::request::memory::{self, Memory, Part};
use crate::results::{self, Kept, Said};
use crate::shared::Shared;
use crate::traffic::{Blame, Ended, blame};

/// The route of requests for one prediction, in both protocols.
const INFER: &str = "infer";
/// That of such requests that another region sent.
pub const FORWARDED: &str = "forwarded";

/// What the client speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    #[default]
    Rest,
    Grpc,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::Rest => "rest",
            Self::Grpc => "grpc",
        }
    }
}

/// How it ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub status: StatusCode,
    pub grpc: Code,
    /// The `spillway-error` code; empty on success.
    pub code: Cow<'static, str>,
}

/// What the answer says about how it was made.
#[derive(Clone, Debug, Default)]
pub struct Making {
    pub model_version: Option<HeaderValue>,
    pub degraded: Option<HeaderValue>,
    pub feature_age_ms: Option<i64>,
    /// `features;dur=…, model;dur=…` as the sidecar measured them.
    pub sidecar_timing: Option<HeaderValue>,
    /// The feature changes that the sidecar knew of when it looked up the rows; `None` where it says none.
    pub feature_sequence: Option<u64>,
    /// How long the row that ends first is still fresh.
    pub feature_fresh: Option<Duration>,
    /// The region that it comes from, if it is another one.
    pub region: Option<HeaderValue>,
}

pub struct Exchange {
    pub shared: Arc<Shared>,
    pub began: Instant,
    pub protocol: Protocol,
    pub route: &'static str,
    pub caller: Option<Arc<Caller>>,
    pub principal: Option<Principal>,
    pub request_id: Option<HeaderValue>,
    pub trace_id: Option<String>,
    pub model: String,
    pub version: String,
    pub pod: Option<Name>,
    pub retries: u32,
    /// The level that pods are asked to serve at.
    pub degrade: Option<Step>,
    pub received: usize,
    pub sent: usize,
    /// From the beginning until the request was judged.
    pub auth: Duration,
    /// What the pod's answer took, network and waiting included.
    pub upstream: Duration,
    pub making: Making,
    /// How old an answer was that another region had kept.
    pub peer_age: Option<Duration>,
    /// Whose request it is.
    pub visit: Visit,
    /// How important it is, once that is judged.
    pub class: Option<Class>,
    /// Where the request stands with its tenant's limits.
    pub limit: Option<Standing>,
    /// That limit refuses it.
    pub limited: bool,
    /// What the result cache had to do with it.
    pub cached: Said,
    pub outcome: Option<Outcome>,
    /// Why it was not answered, once that is known.
    blame: Option<Blame>,
    /// It ends with the exchange.
    pub span: Option<Span>,
    kept: memory::Kept,
}

impl Exchange {
    pub fn begin(shared: Arc<Shared>) -> Self {
        shared.metrics.in_flight.inc();
        Self {
            shared,
            began: Instant::now(),
            protocol: Protocol::Rest,
            route: "-",
            caller: None,
            principal: None,
            request_id: None,
            trace_id: None,
            model: String::new(),
            version: String::new(),
            pod: None,
            retries: 0,
            degrade: None,
            received: 0,
            sent: 0,
            auth: Duration::ZERO,
            upstream: Duration::ZERO,
            making: Making::default(),
            peer_age: None,
            visit: Visit::Client,
            class: None,
            limit: None,
            limited: false,
            cached: Said::default(),
            outcome: None,
            blame: None,
            span: None,
            kept: memory::Kept::default(),
        }
    }

    /// A request that did not get as far as Pingora.
    pub fn record_fault(shared: &Arc<Shared>, caller: &Arc<Caller>, fault: HeadFault) {
        let mut exchange = Self::begin(shared.clone());
        exchange.caller = Some(caller.clone());
        exchange.refuse(&Refusal::Head(fault));
    }

    /// Counts bytes of a body that stay in memory until the end of the exchange.
    pub fn keep(&mut self, bytes: usize) -> Result<(), Refusal> {
        self.kept.add(&self.shared.memory, bytes)
    }

    /// Counts bytes of a part that may end before the exchange does.
    pub fn part<'a>(&mut self, memory: &'a Memory) -> Part<'a> {
        Part::of(&mut self.kept, memory)
    }

    /// Keeps what a part kept.
    pub fn join(&mut self, part: Part<'_>) {
        part.join(&mut self.kept);
    }

    /// Counts a refusal, audits one that is a matter of rights, and makes it the outcome.
    pub fn refuse(&mut self, refusal: &Refusal) -> Answer {
        let answer = refusal.answer();
        match self.visit {
            Visit::Probe => self.shared.peer_metrics.probed(Some(refusal.reason())),
            Visit::Client | Visit::Forwarded(_) => self.shared.metrics.rejected(refusal.reason()),
        }
        self.blame = Some(blame(refusal));
        if answer.status == StatusCode::FORBIDDEN {
            self.shared.audit.denied(|| denial(self, refusal, &answer));
        }
        self.outcome = Some(Outcome { status: answer.status, grpc: answer.grpc, code: answer.code.clone() });
        answer
    }

    /// The answer is a kept one: it was made then, in its way. It stays in memory until it is written, also
    /// if the cache lets go of it.
    pub fn made(&mut self, kept: &Kept) -> Result<(), Refusal> {
        self.keep(kept.entry.message.len())?;
        let made = &kept.entry.made;
        self.making.model_version.clone_from(&made.model_version);
        self.making.degraded.clone_from(&made.degraded);
        self.making.feature_age_ms = kept.entry.feature_age_ms(kept.age);
        self.making.region.clone_from(&made.region);
        Ok(())
    }

    /// Takes in what an answer says about how it was made.
    pub fn describe(&mut self, answer: &PodAnswer) {
        let (parameters, making) = (&answer.response.parameters, &mut self.making);
        let version = parameters.text("spillway-model-version").unwrap_or(&answer.response.version);
        making.model_version = HeaderValue::from_str(version).ok();
        let degraded = parameters.text("spillway-degraded");
        making.degraded = degraded.and_then(|degraded| HeaderValue::from_str(degraded).ok());
        making.feature_age_ms = parameters.integer("spillway-feature-age-ms");
        making.feature_sequence = answer.said.feature_sequence;
        making.feature_fresh = answer.said.feature_fresh;
    }

    /// Another region answered, after so long.
    pub fn answered_by_peer(&mut self, answer: &PodAnswer, took: Duration) {
        self.making = Making::default();
        (self.pod, self.degrade, self.upstream) = (None, None, took);
        self.describe(answer);
    }

    /// Whether a pod or another region had it.
    pub fn was_sent_on(&self) -> bool {
        self.pod.is_some() || self.making.region.is_some()
    }

    pub fn succeed(&mut self) {
        self.blame = None;
        self.outcome = Some(Outcome { status: StatusCode::OK, grpc: Code::Ok, code: "".into() });
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.kept.give_back(&self.shared.memory);
        if self.outcome.is_none() {
            self.refuse(&Refusal::Cancelled);
        }
        describe(self);
        let Some(Outcome { status, grpc, code }) = self.outcome.take() else { return };
        let shared = &self.shared;
        let took = self.began.elapsed();
        let label = match self.protocol {
            Protocol::Rest => status.as_u16(),
            // 0 to 16.
            Protocol::Grpc => grpc as u16,
        };
        shared.metrics.in_flight.dec();
        if let Some(ended) = self.ended(took) {
            shared.traffic.count(&ended);
        }
        match &self.visit {
            Visit::Client => shared.metrics.answered(self.protocol, self.route, label, took.as_secs_f64()),
            Visit::Forwarded(passage) => {
                shared.metrics.answered(self.protocol, self.route, label, took.as_secs_f64());
                shared.peer_metrics.came(&passage.from, status.as_u16());
            }
            Visit::Probe if status == StatusCode::OK => shared.peer_metrics.probed(None),
            Visit::Probe => {}
        }
        shared.access_log.write(&Record {
            time_ms: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64),
            region: shared.region.as_str(),
            gateway: shared.name.as_str(),
            request_id: text(&self.request_id),
            trace_id: self.trace_id.as_deref(),
            client_address: self.caller.as_ref().map(|caller| caller.address),
            tenant: self.principal.as_ref().map(|principal| principal.tenant.as_str()),
            client: self.principal.as_ref().map(|principal| principal.client.as_str()),
            protocol: self.protocol.name(),
            method: self.route,
            model: &self.model,
            version: &self.version,
            status: status.as_u16(),
            grpc_status: (self.protocol == Protocol::Grpc).then_some(grpc as u8),
            class: self.class.map(Class::name),
            error: &code,
            limit: self.limit.as_ref().filter(|_| self.limited).map(|standing| standing.limit.as_str()),
            cancelled: grpc == Code::Cancelled,
            pod: self.pod.as_ref().map(Name::as_str),
            spilled: text(&self.making.region),
            forwarded: match &self.visit {
                Visit::Forwarded(passage) => Some(passage.from.as_str()),
                Visit::Client | Visit::Probe => None,
            },
            cache: self.cached.status.map(results::word),
            retries: self.retries,
            degraded: text(&self.making.degraded),
            feature_age_ms: self.making.feature_age_ms,
            received: self.received,
            sent: self.sent,
            duration_us: took.as_micros() as u64,
            auth_us: self.auth.as_micros() as u64,
            upstream_us: self.upstream.as_micros() as u64,
        });
    }
}

impl Exchange {
    /// What the control plane is told of it; `None` for all but predictions.
    fn ended(&self, took: Duration) -> Option<Ended> {
        let forwarded = match self.visit {
            Visit::Client if self.route == INFER => false,
            Visit::Forwarded(_) if self.route == FORWARDED => true,
            Visit::Client | Visit::Forwarded(_) | Visit::Probe => return None,
        };
        // One that is kept here may have come from another region at first.
        let is_kept = matches!(self.cached.status, Some(CacheStatus::Hit { .. } | CacheStatus::StaleIfError));
        let spilled = self.making.region.is_some() && !is_kept;
        Some(Ended { forwarded, class: self.class, spilled, took, blame: self.blame })
    }
}

/// A span says how its request ended, also when that was in the middle.
fn describe(exchange: &mut Exchange) {
    let Some(mut span) = exchange.span.take().filter(Span::is_recording) else { return };
    span.set("rpc.system", exchange.protocol.name());
    span.set("rpc.method", exchange.route);
    span.set("spillway.model", exchange.model.clone());
    if let Some(pod) = &exchange.pod {
        span.set("spillway.pod", pod.to_string());
    }
    if let Some(outcome) = &exchange.outcome {
        span.set("http.response.status_code", i64::from(outcome.status.as_u16()));
        if !outcome.code.is_empty() {
            span.set("spillway.error", outcome.code.to_string());
        }
        span.status(if outcome.status.is_server_error() { Status::Error("server error") } else { Status::Ok });
    }
}

fn text(value: &Option<HeaderValue>) -> Option<&str> {
    value.as_ref().and_then(|value| value.to_str().ok())
}

/// One line of the access log. Names no entity, feature or body.
#[derive(Serialize)]
struct Record<'a> {
    time_ms: u64,
    region: &'a str,
    gateway: &'a str,
    request_id: Option<&'a str>,
    trace_id: Option<&'a str>,
    client_address: Option<SocketAddr>,
    tenant: Option<&'a str>,
    client: Option<&'a str>,
    protocol: &'static str,
    method: &'static str,
    model: &'a str,
    version: &'a str,
    status: u16,
    grpc_status: Option<u8>,
    class: Option<&'static str>,
    error: &'a str,
    /// The limit that refused it.
    limit: Option<&'a str>,
    cancelled: bool,
    pod: Option<&'a str>,
    /// The region that answered it, if it is another one.
    spilled: Option<&'a str>,
    /// The region that sent it here.
    forwarded: Option<&'a str>,
    cache: Option<&'static str>,
    retries: u32,
    degraded: Option<&'a str>,
    feature_age_ms: Option<i64>,
    received: usize,
    sent: usize,
    duration_us: u64,
    auth_us: u64,
    upstream_us: u64,
}
