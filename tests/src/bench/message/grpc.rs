//! The call over gRPC: `ModelInfer` with raw contents.

use std::collections::HashMap;

use bytes::Bytes;
use http::HeaderValue;
use prost::Message;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse};

use super::framing::{frame, unframed};
use super::{COLUMNS, DATATYPE, ID, INPUT, MODEL, OUTPUT, SCORES, VERSION, values};

pub const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
pub const PATH: &str = "/inference.GRPCInferenceService/ModelInfer";

/// The request's body with its gRPC prefix: 172 bytes.
pub fn request() -> Bytes {
    frame(&ModelInferRequest {
        model_name: MODEL.into(),
        id: ID.into(),
        inputs: vec![InferInputTensor {
            name: INPUT.into(),
            datatype: DATATYPE.into(),
            shape: vec![1, COLUMNS as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![values(COLUMNS)],
        ..Default::default()
    })
}

/// The answer's body with its gRPC prefix: 300 bytes, with what a sidecar says about it.
pub fn response() -> Bytes {
    frame(&expected())
}

/// Whether a body is the answer. A proxy may add parameters and encode it anew; the rest stays.
pub fn is_answer(body: &[u8]) -> bool {
    let Some(message) = unframed(body) else { return false };
    let expected = expected();
    ModelInferResponse::decode(message).is_ok_and(|answer| {
        let kept = |(name, value): (&String, &InferParameter)| answer.parameters.get(name) == Some(value);
        expected.parameters.iter().all(kept)
            && (answer.model_name, answer.model_version, answer.id, answer.outputs, answer.raw_output_contents)
                == (
                    expected.model_name,
                    expected.model_version,
                    expected.id,
                    expected.outputs,
                    expected.raw_output_contents,
                )
    })
}

fn expected() -> ModelInferResponse {
    let version = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(VERSION.into())) };
    ModelInferResponse {
        model_name: MODEL.into(),
        model_version: VERSION.into(),
        id: ID.into(),
        parameters: HashMap::from([("spillway-model-version".to_owned(), version)]),
        outputs: vec![InferOutputTensor {
            name: OUTPUT.into(),
            datatype: DATATYPE.into(),
            shape: vec![1, SCORES as i64],
            ..Default::default()
        }],
        raw_output_contents: vec![values(SCORES)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_call_has_the_size_that_the_goal_names() {
        assert_eq!(request().len(), 172);
        assert_eq!(response().len(), 300);
    }

    #[test]
    fn numbered_requests_differ_in_their_values_alone() {
        let numbered = super::super::numbered(&request(), 7);
        assert_eq!(numbered.len(), 172);
        let [plain, other] = [request(), numbered].map(|frame| ModelInferRequest::decode(&frame[5..]).unwrap());
        assert_ne!(plain.raw_input_contents, other.raw_input_contents);
        assert_eq!(ModelInferRequest { raw_input_contents: plain.raw_input_contents.clone(), ..other }, plain);
    }

    #[test]
    fn only_the_right_answer_passes() {
        assert!(is_answer(&response()));
        for at in 0..response().len() {
            let mut wrong = response().to_vec();
            wrong[at] ^= 0x40;
            assert!(!is_answer(&wrong), "byte {at}");
        }
        assert!(!is_answer(&response()[..299]));
        assert!(!is_answer(b""));
    }

    #[test]
    fn an_added_parameter_is_no_fault() {
        let mut answer = expected();
        let region = InferParameter { parameter_choice: Some(ParameterChoice::StringParam("eu".into())) };
        answer.parameters.insert("spillway-region".into(), region);
        assert!(is_answer(&frame(&answer)));
    }
}
