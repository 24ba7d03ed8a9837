//! Answers that no pod gave: the last cached prediction (level 3), the model's static answer (level 4).
//!
//! The rule: the better one that the model allows and that there is; each says what it is.

use std::time::Instant;

use http::HeaderValue;
use spillway_core::inference::fixed::fixed_answer;
use spillway_core::inference::{Entities, InferRequest, InferResponse, Parameter};
use spillway_core::limit::Class;
use spillway_core::resilience::Step;
use spillway_core::resource::Model;

use super::reserve;
use crate::exchange::{Exchange, Making};

/// A request that has passed its checks.
pub struct Question<'a> {
    pub model: &'a Model,
    pub request: &'a InferRequest,
    pub entities: &'a Entities,
    pub class: Class,
    /// An answer of this gateway's own may be given: it is for whom the request first came to.
    pub here: bool,
}

impl Question<'_> {
    /// Whether there may be an answer without a pod.
    pub fn may_be_answered_here(&self) -> bool {
        self.here && (self.model.allows(Step::CachedPrediction) || self.has_static_answer())
    }

    /// Until when another's answer is waited for: some time is left for an answer from here.
    pub fn wait_until(&self, until: Instant) -> Instant {
        if self.may_be_answered_here() { until - 2 * reserve(until) } else { until }
    }

    pub fn has_static_answer(&self) -> bool {
        let degradation = self.model.traffic.degradation.as_ref();
        self.model.allows(Step::StaticAnswer) && degradation.is_some_and(|degradation| !degradation.fixed.is_empty())
    }

    /// The level of the answer that there would be here; a static one may still turn out too large.
    pub fn would_answer(&self, has_cached: bool) -> Option<Step> {
        if has_cached && self.model.allows(Step::CachedPrediction) {
            return Some(Step::CachedPrediction);
        }
        self.has_static_answer().then_some(Step::StaticAnswer)
    }

    /// `cached`: the last prediction for the same question, however old. `most`: bytes of an answer.
    fn answer(&self, cached: Option<InferResponse>, most: usize) -> Option<(Step, InferResponse)> {
        if !self.here {
            return None;
        }
        if let Some(cached) = cached.filter(|_| self.model.allows(Step::CachedPrediction)) {
            return Some((Step::CachedPrediction, InferResponse { id: self.request.id.clone(), ..cached }));
        }
        let fixed = self.has_static_answer().then(|| fixed_answer(self.model, self.request, self.entities, most));
        Some((Step::StaticAnswer, fixed.flatten()?))
    }
}

/// Answers without a pod, if that is possible, and has the exchange say so.
pub fn answer_here(
    exchange: &mut Exchange,
    question: &Question<'_>,
    cached: Option<InferResponse>,
) -> Option<InferResponse> {
    let (step, mut response) = question.answer(cached, exchange.shared.limits.answer)?;
    exchange.keep(response.outputs.iter().map(|output| output.data.len()).sum()).ok()?;
    let said = match step {
        Step::CachedPrediction => "3 cached-prediction",
        _ => "4 static-answer",
    };
    if response.version.is_empty() {
        response.version.clone_from(&exchange.version);
    }
    // It was the age when the prediction was made.
    response.parameters.remove("spillway-feature-age-ms");
    response.parameters.set("spillway-region", Parameter::Text(exchange.shared.region.to_string()));
    response.parameters.set("spillway-model-version", Parameter::Text(response.version.clone()));
    response.parameters.set("spillway-degraded", Parameter::Text(said.to_owned()));
    exchange.making = Making {
        model_version: HeaderValue::from_str(&response.version).ok(),
        degraded: Some(HeaderValue::from_static(said)),
        ..Making::default()
    };
    Some(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use spillway_core::resource::{self, Spec};

    fn model(degradation: &str) -> Model {
        let text = format!(
            "apiVersion: spillway/v1\nkind: Model\nmetadata: {{name: m}}\nspec:\n  pools: [p]\n  versions: [1]\n  backend: onnx\n  \
             deadline: 1s\n  inputs: [{{name: x, datatype: FP32, shape: [1]}}]\n  outputs: [{{name: y, datatype: FP32, shape: [1]}}]\n  \
             cache: {{ttl: 1m}}\n  degradation: {degradation}\n"
        );
        let Spec::Model(model) = resource::parse(&text).unwrap().remove(0).spec else { panic!("a model") };
        *model
    }

    #[test]
    fn the_best_answer_that_is_allowed_and_there_is_given() {
        let cached = || Some(InferResponse { id: "then".into(), version: "1".into(), ..InferResponse::default() });
        let request = InferRequest { id: "now".into(), ..InferRequest::default() };
        let none = || None;
        for (degradation, kept, step) in [
            ("{levels: [3, 4], static: {y: [1]}}", cached(), Some(Step::CachedPrediction)),
            ("{levels: [3, 4], static: {y: [1]}}", none(), Some(Step::StaticAnswer)),
            ("{levels: [4], static: {y: [1]}}", cached(), Some(Step::StaticAnswer)),
            ("{levels: [3], static: {y: [1]}}", none(), None),
            ("{levels: [4]}", cached(), None),
            ("{levels: [1]}", cached(), None),
        ] {
            let model = model(degradation);
            let question = Question {
                model: &model,
                request: &request,
                entities: &Entities::None,
                class: Class::Normal,
                here: true,
            };
            let answer = question.answer(kept, 1 << 20);
            assert_eq!(answer.as_ref().map(|(step, _)| *step), step, "{degradation}");
            assert!(answer.is_none_or(|(_, response)| response.id == "now"));
            assert!(step.is_none() || question.may_be_answered_here());
        }
    }
}
