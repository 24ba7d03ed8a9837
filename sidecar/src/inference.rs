//! One request's way: decode, check, join features, call the model, check the answer, say how it was made.
//!
//! The rule: the model and the snapshot are taken once and kept to the end; before each step the
//! deadline is looked at, and expired work never reaches the model. The unary call and each request of
//! a stream go the same way: [`Inference::prepare`], the model, [`Prepared::finish`].

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use spillway_core::deadline::{self, Asked, SHORTEST_USEFUL};
use spillway_core::inference::synthetic::all_outputs;
use spillway_core::inference::{InferRequest, InferResponse, Limits, Parameter, check};
use spillway_core::resilience::Step;
use spillway_core::units::Name;
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse};
use spillway_runtime::oip;
use spillway_runtime::telemetry::TraceParent;

use crate::failure::Failure;
use crate::fallback::Fallbacks;
use crate::features::{Features, Reach};
use crate::join::{For, JoinError, Joined};
use crate::metrics::{ByModel, ByReason, SidecarMetrics};
use crate::model::ModelError;
use crate::model::served::{Lookup, Models, ServedModel};
use crate::record::{OK, Record, Recorder};

/// Triton's parameter, in microseconds. Read here, and written anew by the backend.
const TIMEOUT: &str = "timeout";
/// Parameters that speak to a hop before the model, not to the model.
const TRANSPORT: [&str; 5] = [check::ENTITY_ID, TIMEOUT, "binary_data", "binary_data_output", "binary_data_size"];
const OWN: &str = "spillway-";

/// What the call itself says, beside the message.
#[derive(Clone, Debug)]
pub struct Context {
    pub arrived: Instant,
    /// What is left of the deadline, as the gateway saw it.
    pub grpc_timeout: Option<Duration>,
    /// The caller's tenant; the gateway sets it from the caller's certificate.
    pub tenant: String,
    pub request_id: String,
    pub trace: TraceParent,
    /// The gateway's name, for the log.
    pub gateway: String,
    /// The level that the gateway asks for; where the model does not allow it, it is served as it should be.
    pub degrade: Option<Step>,
}

/// Serves inference for all models of this pod.
pub struct Inference {
    /// Where this pod is, for the answers to say.
    pub region: Name,
    pub models: Arc<Models>,
    pub fallbacks: Fallbacks,
    /// None: requests must bring all inputs.
    pub features: Option<Arc<Features>>,
    pub metrics: SidecarMetrics,
    pub recorder: Recorder,
    pub limits: Limits,
}

/// A request that is ready for its model.
pub struct Prepared {
    pub served: Arc<ServedModel>,
    pub request: InferRequest,
    pub deadline: Instant,
    /// What the gateway asks for and the model allows.
    pub degrade: Option<Step>,
    /// Whether the fallback gave the answer.
    pub by_fallback: bool,
    /// Rows that the answer must have.
    rows: Option<usize>,
    joined: Joined,
}

impl Inference {
    /// The answer with what was joined for it, and the steps' durations for `server-timing`.
    pub async fn infer(
        &self,
        message: ModelInferRequest,
        context: &Context,
    ) -> (Result<(ModelInferResponse, Joined), Failure>, String) {
        let mut record = self.recorder.begin(context);
        let result = self.answer(message, context, &mut record).await;
        record.end(result.as_ref().err().map_or(OK, Failure::code));
        (result, record.server_timing())
    }

    async fn answer(
        &self,
        message: ModelInferRequest,
        context: &Context,
        record: &mut Record,
    ) -> Result<(ModelInferResponse, Joined), Failure> {
        let mut prepared = self.prepare(message, context, record).await?;
        let answer = self.fallbacks.infer(&mut prepared, record).await;
        Ok((prepared.finish(answer, self, record)?, prepared.joined))
    }

    /// Everything before the model.
    pub async fn prepare(
        &self,
        message: ModelInferRequest,
        context: &Context,
        record: &mut Record,
    ) -> Result<Prepared, Failure> {
        let mut request = oip::decode_request(message, &self.limits)?;
        let served = match self.models.get(&request.model) {
            Lookup::Served(served) => served,
            Lookup::NotReady => return Err(Failure::NotReady),
            Lookup::Unknown => return Err(Failure::UnknownModel),
        };
        let model = &*served.manifest;
        record.model(served.name.as_str());
        request.version = model.version(&request.version).ok_or(Failure::UnknownVersion)?.to_string();
        record.version(&request.version);
        let deadline = deadline_of(&request, &served, context);
        let entities = check::entities(model, &request)?;
        record.entities(entities.len());
        check::check_against(model, &request, &entities)?;
        let rows = check::rows(model, &request, &entities);
        in_time(deadline, Duration::ZERO)?;
        let asked = Instant::now();
        let span = record.step("features");
        let degrade = context.degrade.filter(|step| model.allows(*step));
        let reach = if degrade == Some(Step::StaleFeatures) { Reach::Near } else { Reach::All };
        let whom = For { tenant: &context.tenant, entities: entities.ids(), deadline, reach };
        let joined = served.join.fill(&mut request, model, self.features.as_deref(), &served.snapshot, whom).await;
        drop(span);
        record.features_took(asked.elapsed());
        let joined = joined.inspect_err(|error| {
            if matches!(error, JoinError::Missing(_)) {
                self.metrics.missing_features.get_or_create(&ByModel { model: served.name.to_string() }).inc();
            }
        })?;
        strip(&mut request, &served);
        in_time(deadline, SHORTEST_USEFUL)?;
        Ok(Prepared { served, request, deadline, degrade, by_fallback: false, rows, joined })
    }
}

impl Prepared {
    /// Everything after the model: the answer checked and labelled, or the failure counted.
    pub fn finish(
        &self,
        answer: Result<InferResponse, ModelError>,
        Inference { region, metrics, .. }: &Inference,
        record: &mut Record,
    ) -> Result<ModelInferResponse, Failure> {
        let name = self.served.name.as_str();
        let checked = answer.and_then(|answer| {
            let fault = check::check_answer(&self.served.manifest, &self.request, &answer, self.rows).err();
            fault.map_or(Ok(answer), |fault| Err(ModelError::BadAnswer(fault.to_string())))
        });
        let mut answer = checked.inspect_err(|error| {
            let reason = ByReason { model: name.to_owned(), reason: error.outcome() };
            metrics.model_errors.get_or_create(&reason).inc();
            record.cause(error);
        })?;
        name.clone_into(&mut answer.model);
        answer.version.clone_from(&self.request.version);
        answer.id.clone_from(&self.request.id);
        // What is said about how the answer was made is ours to say.
        answer.parameters.0.retain(|(name, _)| !name.starts_with(OWN));
        answer.parameters.set("spillway-region", Parameter::Text(region.to_string()));
        answer.parameters.set("spillway-model-version", Parameter::Text(self.request.version.clone()));
        if let Some((step, reason)) = self.degraded() {
            let text = format!("{} {reason}", step.number());
            answer.parameters.set("spillway-degraded", Parameter::Text(text));
            metrics.degraded.get_or_create(&ByReason { model: name.to_owned(), reason }).inc();
            record.degraded(reason);
        }
        if self.joined.defaults > 0 {
            let defaults = u64::try_from(self.joined.defaults).unwrap_or(u64::MAX);
            metrics.default_features.get_or_create(&ByModel { model: name.to_owned() }).inc_by(defaults);
        }
        if let Some(event_us) = self.joined.oldest_event_us {
            let age = now_us().saturating_sub(event_us).max(0) / 1_000;
            answer.parameters.set("spillway-feature-age-ms", Parameter::Int(age));
        }
        Ok(oip::encode_response(&answer))
    }

    /// Of which level the answer is and why, the more telling reason first.
    fn degraded(&self) -> Option<(Step, &'static str)> {
        if self.by_fallback {
            Some((Step::FallbackModel, "fallback-model"))
        } else if self.joined.defaults > 0 {
            Some((Step::StaleFeatures, "default-feature"))
        } else {
            self.joined.stale.then_some((Step::StaleFeatures, "stale-feature"))
        }
    }
}

/// When the request must be answered: from what it asks for, what is left of the gateway's time, and the model's limit.
fn deadline_of(request: &InferRequest, served: &ServedModel, context: &Context) -> Instant {
    let asked = Asked {
        parameter: request.parameters.integer(TIMEOUT).and_then(deadline::parse_timeout_parameter),
        grpc_timeout: context.grpc_timeout,
        header: None,
    };
    context.arrived + deadline::allowed(asked, served.manifest.deadline, served.manifest.max_deadline)
}

fn in_time(deadline: Instant, at_least: Duration) -> Result<(), Failure> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() || left < at_least { Err(Failure::DeadlineExceeded) } else { Ok(()) }
}

/// Leaves what is the model's own: its inputs and its parameters.
fn strip(request: &mut InferRequest, served: &ServedModel) {
    if let Some(entity_input) = &served.manifest.entity_input {
        request.inputs.retain(|input| input.name != entity_input.as_str());
    }
    let stays = |name: &str| !TRANSPORT.contains(&name) && !name.starts_with(OWN);
    request.parameters.0.retain(|(name, _)| stays(name));
    for input in &mut request.inputs {
        input.parameters.0.retain(|(name, _)| stays(name));
    }
    for output in &mut request.outputs {
        output.parameters.0.retain(|(name, _)| stays(name));
    }
    if request.outputs.is_empty() {
        request.outputs = all_outputs(&served.manifest);
    }
}

fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
