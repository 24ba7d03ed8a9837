//! The ends of streamed answers that have no more parts.
//!
//! The rule: a sidecar ends every request in band; where no answer is left to carry the end, it sends a
//! response without outputs whose `triton_final_response` is true. As with Triton, a client sees that
//! only if its request said `triton_enable_empty_final_response`.

use std::collections::VecDeque;

use bytes::Bytes;
use prost::Message;
use spillway_core::inference::{InferRequest, Parameter};
use spillway_proto::inference::ModelStreamInferResponse;
use spillway_proto::inference::infer_parameter::ParameterChoice;

use crate::request::body::message;

const WANTED: &str = "triton_enable_empty_final_response";
const FINAL: &str = "triton_final_response";
/// An end has a name, a version, an id and a few parameters; what is longer is an answer.
const LONGEST: usize = 8 << 10;
/// Requests that are remembered; a sidecar has fewer of one stream open.
const MOST: usize = 256;

/// Whose ends the client wants, by request id. The latest request of an id decides.
#[derive(Debug, Default)]
pub struct Finals {
    wanted: VecDeque<String>,
}

impl Finals {
    /// Takes note of what a request asks for.
    pub fn asked(&mut self, request: &InferRequest) {
        let wants = request.parameters.get(WANTED) == Some(&Parameter::Bool(true));
        if !wants && self.wanted.is_empty() {
            return;
        }
        self.wanted.retain(|id| *id != request.id);
        if wants {
            if self.wanted.len() == MOST {
                self.wanted.pop_front();
            }
            self.wanted.push_back(request.id.clone());
        }
    }

    /// Whether a frame of the pod is for the client.
    pub fn passes(&self, frame: &Bytes) -> bool {
        if frame.len() > LONGEST || !frame.windows(FINAL.len()).any(|window| window == FINAL.as_bytes()) {
            return true;
        }
        // What cannot be read is the client's to judge.
        let Ok(message) = message(frame) else { return true };
        let Ok(answer) = ModelStreamInferResponse::decode(message) else { return true };
        let Some(response) = answer.infer_response.filter(|_| answer.error_message.is_empty()) else { return true };
        let last = response.parameters.get(FINAL).and_then(|last| last.parameter_choice.as_ref());
        let is_end = response.outputs.is_empty() && last == Some(&ParameterChoice::BoolParam(true));
        !is_end || self.wanted.contains(&response.id)
    }
}

#[cfg(test)]
mod tests {
    use spillway_core::inference::Parameters;
    use spillway_proto::inference::model_infer_response::InferOutputTensor;
    use spillway_proto::inference::{InferParameter, ModelInferResponse};

    use super::*;
    use crate::local::frame;

    fn request(id: &str, wants: Option<bool>) -> InferRequest {
        let parameters = wants.map(|wants| (WANTED.to_owned(), Parameter::Bool(wants)));
        InferRequest {
            id: id.into(),
            parameters: Parameters(parameters.into_iter().collect()),
            ..InferRequest::default()
        }
    }

    fn answer(id: &str, last: bool, outputs: usize, error: &str) -> Bytes {
        let last = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(last)) };
        frame(&ModelStreamInferResponse {
            error_message: error.into(),
            infer_response: Some(ModelInferResponse {
                id: id.into(),
                parameters: [(FINAL.to_owned(), last)].into(),
                outputs: vec![InferOutputTensor::default(); outputs],
                ..ModelInferResponse::default()
            }),
        })
    }

    #[test]
    fn only_who_asked_for_an_end_gets_it() {
        let mut finals = Finals::default();
        finals.asked(&request("a", None));
        finals.asked(&request("b", Some(true)));
        finals.asked(&request("c", Some(false)));
        assert!(!finals.passes(&answer("a", true, 0, "")));
        assert!(finals.passes(&answer("b", true, 0, "")));
        assert!(!finals.passes(&answer("c", true, 0, "")));
        finals.asked(&request("b", None));
        assert!(!finals.passes(&answer("b", true, 0, "")));
    }

    #[test]
    fn what_is_more_than_an_end_always_passes() {
        let finals = Finals::default();
        assert!(finals.passes(&answer("a", true, 1, "")));
        assert!(finals.passes(&answer("a", false, 0, "")));
        assert!(finals.passes(&answer("a", true, 0, "it failed")));
        assert!(finals.passes(&frame(&ModelStreamInferResponse::default())));
        assert!(finals.passes(&Bytes::from_static(FINAL.as_bytes())));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut finals = Finals::default();
        for id in 0..=MOST {
            finals.asked(&request(&id.to_string(), Some(true)));
            finals.asked(&request(&id.to_string(), Some(true)));
        }
        assert_eq!(finals.wanted.len(), MOST);
        assert!(!finals.passes(&answer("0", true, 0, "")));
        assert!(finals.passes(&answer(&MOST.to_string(), true, 0, "")));
    }
}
