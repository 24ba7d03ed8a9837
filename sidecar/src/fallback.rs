//! Who answers a request that is ready: its model, or the one that stands in for it (level 2).
//!
//! The rule: the gateway decides. This pod falls back by itself only where no other would do better in time: its
//! model server cannot be reached, or failed so often that it is left alone for a while. A fallback is run in this
//! process, in a place of its own: neither it nor the models that it stands in for can starve the other.
//!
//! ```text
//! level 2 asked for ------------------------> fallback --its error--> the caller
//! model left alone (breaker), or unreachable-> fallback --its error--> the model's own error, to the caller
//! no fallback is ready ---------------------> model
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use spillway_core::deadline::SHORTEST_USEFUL;
use spillway_core::inference::{InferRequest, InferResponse};
use spillway_core::resilience::Step;

use crate::inference::Prepared;
use crate::metrics::{ByReason, SidecarMetrics};
use crate::model::breaker::is_patient;
use crate::model::served::{Lookup, Models, ServedModel};
use crate::model::{Call, ModelError};
use crate::record::{CANCELLED, Record};

/// The models that stand in for those of this pod.
pub struct Fallbacks {
    models: Arc<Models>,
    metrics: SidecarMetrics,
}

impl Fallbacks {
    pub fn new(models: Arc<Models>, metrics: SidecarMetrics) -> Self {
        Self { models, metrics }
    }

    pub fn models(&self) -> &Arc<Models> {
        &self.models
    }

    /// Calls the model, or its fallback, and says in `prepared` which of the two answered.
    pub async fn infer(&self, prepared: &mut Prepared, record: &mut Record) -> Result<InferResponse, ModelError> {
        let Some(fallback) = self.of(prepared) else { return self.primary(prepared, record).await };
        if prepared.degrade == Some(Step::FallbackModel) {
            return self.stand_in(&fallback, "asked", prepared, record).await;
        }
        let served = Arc::clone(&prepared.served);
        let Some(trial) = served.running.breaker.try_call() else {
            let error = || ModelError::Unavailable("it is left alone after many failures".into());
            return self.stand_in(&fallback, "breaker-open", prepared, record).await.map_err(|_| error());
        };
        let time = prepared.deadline.saturating_duration_since(Instant::now());
        let answer = self.primary(prepared, record).await;
        trial.ended(&answer, is_patient(time, served.manifest.deadline));
        match answer {
            Err(error @ ModelError::Unavailable(_)) => {
                self.stand_in(&fallback, "unreachable", prepared, record).await.map_err(|_| error)
            }
            answer => answer,
        }
    }

    /// The fallback of the model, if it has one that is ready.
    fn of(&self, prepared: &Prepared) -> Option<Arc<ServedModel>> {
        match self.models.get(prepared.served.manifest.fallback()?.as_str()) {
            Lookup::Served(fallback) => Some(fallback),
            Lookup::NotReady | Lookup::Unknown => None,
        }
    }

    async fn stand_in(
        &self,
        fallback: &ServedModel,
        why: &'static str,
        prepared: &mut Prepared,
        record: &mut Record,
    ) -> Result<InferResponse, ModelError> {
        let began = Instant::now();
        if prepared.deadline.saturating_duration_since(began) < SHORTEST_USEFUL {
            return Err(ModelError::DeadlineExceeded);
        }
        let version = fallback.manifest.versions.first().map(ToString::to_string).unwrap_or_default();
        let request = InferRequest { version, ..prepared.request.clone() };
        let span = record.step("fallback");
        let call = Call { deadline: prepared.deadline, trace: span.as_parent() };
        let answer = fallback.running.backend.infer(&request, &call).await;
        drop(span);
        record.fallback_took(began.elapsed());
        let model = prepared.served.name.to_string();
        match &answer {
            Ok(_) => {
                prepared.by_fallback = true;
                self.metrics.fallbacks.get_or_create(&ByReason { model, reason: why }).inc();
            }
            Err(error) => {
                self.metrics.fallback_errors.get_or_create(&ByReason { model, reason: error.outcome() }).inc();
            }
        }
        answer
    }

    async fn primary(&self, prepared: &Prepared, record: &mut Record) -> Result<InferResponse, ModelError> {
        let called = Instant::now();
        let span = record.step("model");
        let call = Call { deadline: prepared.deadline, trace: span.as_parent() };
        let pending =
            Pending { metrics: &self.metrics, model: prepared.served.name.as_str(), deadline: prepared.deadline };
        let answer = prepared.served.running.backend.infer(&prepared.request, &call).await;
        std::mem::forget(pending);
        drop(span);
        record.model_took(called.elapsed());
        answer
    }
}

/// A model call whose end is not known yet. Dropped before it (the gateway reset the call, mostly because its time was
/// over a moment before ours), it counts as a call without a usable answer.
struct Pending<'a> {
    metrics: &'a SidecarMetrics,
    model: &'a str,
    deadline: Instant,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        /// What the way from the gateway and its timer may take.
        const SLACK: Duration = Duration::from_millis(50);
        let late = Instant::now() + SLACK >= self.deadline;
        let reason = if late { ModelError::DeadlineExceeded.outcome() } else { CANCELLED };
        self.metrics.model_errors.get_or_create(&ByReason { model: self.model.to_owned(), reason }).inc();
    }
}
