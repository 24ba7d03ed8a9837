//! Calls and answers that name their model and entity: no two look alike to a gateway.

use std::collections::HashMap;

use anyhow::{Context, Result};
use bytes::Bytes;
use prost::Message;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse};

use crate::bench::message::{PREFIX, frame, values};

pub const INPUT: &str = "features";
pub const OUTPUT: &str = "score";
/// Columns of the one input row.
pub const COLUMNS: usize = 28;
/// Columns of the one output row.
pub const SCORES: usize = 52;

/// A gRPC message that asks a model about an entity.
pub fn request(model: &str, entity: &str) -> Bytes {
    let entity_id = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(entity.into())) };
    frame(&ModelInferRequest {
        model_name: model.into(),
        id: entity.into(),
        parameters: HashMap::from([("entity_id".to_owned(), entity_id)]),
        inputs: vec![InferInputTensor {
            name: INPUT.into(),
            datatype: "FP32".into(),
            shape: vec![1, COLUMNS as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![values(COLUMNS)],
        ..Default::default()
    })
}

/// The answer to such a request.
pub fn answer(request: &[u8]) -> Result<Bytes> {
    let request = ModelInferRequest::decode(request.get(PREFIX..).context("no gRPC message")?)?;
    Ok(frame(&ModelInferResponse {
        model_name: request.model_name,
        model_version: "1".into(),
        id: request.id,
        outputs: vec![InferOutputTensor {
            name: OUTPUT.into(),
            datatype: "FP32".into(),
            shape: vec![1, SCORES as i64],
            ..Default::default()
        }],
        raw_output_contents: vec![values(SCORES)],
        ..Default::default()
    }))
}

/// Whether a body answers for this model and entity. A gateway may add parameters.
pub fn is_answer(body: &[u8], model: &str, entity: &str) -> bool {
    let Some(message) = body.get(PREFIX..) else { return false };
    ModelInferResponse::decode(message).is_ok_and(|answer| {
        let outputs =
            answer.outputs.first().is_some_and(|output| output.name == OUTPUT && output.shape == [1, SCORES as i64]);
        (answer.model_name.as_str(), answer.id.as_str()) == (model, entity)
            && outputs
            && answer.raw_output_contents == [values(SCORES)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_for_its_model_and_entity_alone() {
        let answer = answer(&request("m-1", "e-1")).unwrap();
        assert!(is_answer(&answer, "m-1", "e-1"));
        assert!(!is_answer(&answer, "m-2", "e-1") && !is_answer(&answer, "m-1", "e-2"));
        assert!(!is_answer(&answer[..answer.len() - 1], "m-1", "e-1"));
    }
}
