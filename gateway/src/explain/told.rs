//! What an explanation says, as JSON: one part for each step that a request takes, in that order. A part that
//! is absent was not reached, or does not apply.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use spillway_core::failover::MayLeave;
use spillway_core::resilience::Step;
use spillway_core::resource::Model;

use crate::admission::view::{WouldEnter, WouldTake};
use crate::errors::Refusal;
use crate::results::view::WouldFind;

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub region: String,
    pub gateway: String,
    /// The version of the Snapshot that decides.
    pub snapshot: u64,
    pub outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caller: Option<CallerPart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<AccessPart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelPart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<RequestPart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<ClassPart>,
    /// Of the tenant, all that apply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Vec<WouldTake>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<DeadlinePart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degradation: Option<DegradationPart>,
    /// The places of the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<WouldEnter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodPart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<PeersPart>,
}

/// Where the answer would come from.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    pub from: Source,
    /// Of the REST answer, if what is asked answers well.
    pub status: u16,
    /// The `spillway-error` code of a refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// In words.
    pub why: String,
    /// The level of degradation of the answer, if it is not 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A stored answer.
    Cache,
    /// Another request's call that is under way.
    Call,
    Pod,
    /// A gateway of another region.
    Peer,
    /// The gateway in place of pods.
    Gateway,
    /// Nowhere.
    #[default]
    Refused,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CallerPart {
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AccessPart {
    pub allowed: bool,
    /// The policies that allow it.
    pub by: Vec<String>,
    /// Those that name the tenant and do not.
    pub others: Vec<Unfit>,
    /// Policies beyond those that are named.
    pub left_out: usize,
}

#[derive(Debug, Serialize)]
pub struct Unfit {
    pub policy: String,
    /// What of it does not fit: `client`, `model`, `version`, `action`.
    pub unfit: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
pub struct ModelPart {
    pub name: String,
    /// That answers.
    pub version: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestPart {
    pub entities: usize,
    /// Bytes of its inputs.
    pub input_bytes: usize,
}

#[derive(Debug, Serialize)]
pub struct ClassPart {
    pub class: &'static str,
    /// `priority`: the request's, as far as the tenant may; `tenant`: its default.
    pub from: &'static str,
    /// The most important one that the tenant may ask for.
    pub highest: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadlinePart {
    pub us: u64,
    /// What decided it: `timeout` (the parameter), `grpc-timeout`, `x-request-timeout-ms`, or `deadline`,
    /// `maxDeadline` of the model.
    pub from: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CachePart {
    #[serde(flatten)]
    pub would: WouldFind,
    /// The request has a `cache-control` that its tenant may not have honoured.
    pub ignores_cache_control: bool,
}

#[derive(Debug, Serialize)]
pub struct DegradationPart {
    pub level: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Levels that the model allows.
    pub allowed: Vec<u8>,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodPart {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// How the model's requests find their pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<&'static str>,
    /// What places the request on the ring: `entity` or `address`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placed_by: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Why this one, as in `spillway_gateway_choices_total`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Whether the next such request may well get another.
    pub by_chance: bool,
    /// The pods after it on the ring.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub then: Vec<String>,
    /// Why there is none: `full`, `gone`, `no-pool`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub none: Option<&'static str>,
}

/// Where it would go if this region could not answer it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeersPart {
    /// The tenant's `mayLeaveRegion`: a boolean, or a list of regions.
    pub may_leave: Value,
    /// Why it goes there now, as in `spillway_gateway_spilled_total`; without it, it stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// Regions in the order in which they would be asked.
    pub to: Vec<String>,
    /// Why it may go to none: what the fittest one lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub none: Option<&'static str>,
    /// Every other region that has gateways.
    pub regions: Vec<PeerPart>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerPart {
    pub region: String,
    /// Why not there: `residence`, `not-served`, `unhealthy`, `full`, `deadline`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unfit: Option<&'static str>,
    /// The Region's own figure; the cheaper is asked first.
    pub cost: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round_trip_us: Option<u64>,
    /// Requests/s that the plan leaves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub headroom: Option<f64>,
    pub gateways: usize,
    /// Of these, not known to be unreachable.
    pub reachable: usize,
}

impl PeersPart {
    pub fn may_leave(may: &MayLeave) -> Value {
        match may {
            MayLeave::No => false.into(),
            MayLeave::Anywhere => true.into(),
            MayLeave::To(regions) => regions.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Outcome {
    pub fn of(from: Source, why: impl Into<String>) -> Self {
        Self { from, status: 200, code: None, why: why.into(), level: None }
    }

    pub fn refused(refusal: &Refusal) -> Self {
        let answer = refusal.answer();
        Self {
            from: Source::Refused,
            status: answer.status.as_u16(),
            code: Some(answer.code.into_owned()),
            why: refusal.to_string(),
            level: None,
        }
    }

    pub fn at(self, step: Step) -> Self {
        Self { level: Some(step.number()).filter(|level| *level > 0), ..self }
    }
}

impl DegradationPart {
    pub fn of(level: spillway_core::resilience::Level, model: &Model) -> Self {
        let allowed =
            [Step::StaleFeatures, Step::FallbackModel, Step::CachedPrediction, Step::StaticAnswer].into_iter();
        Self {
            level: level.step.number(),
            reason: level.reason.map(|reason| reason.as_str()),
            allowed: allowed.filter(|step| model.allows(*step)).map(Step::number).collect(),
        }
    }
}

impl DeadlinePart {
    pub fn of(time: Duration, from: &'static str) -> Self {
        Self { us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX), from }
    }
}
