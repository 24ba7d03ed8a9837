//! Calls and answers that name their model and entity: no two look alike to a gateway.

use std::collections::HashMap;

use anyhow::{Context, Result};
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse};

pub const INPUT: &str = "features";
pub const OUTPUT: &str = "score";
/// Columns of the one input row.
pub const COLUMNS: usize = 28;
/// Columns of the one output row.
pub const SCORES: usize = 52;
/// Bytes before a gRPC message: whether it is compressed, and its length.
const PREFIX: usize = 5;

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

fn values(count: usize) -> Bytes {
    let mut raw = BytesMut::with_capacity(count * 4);
    for at in 0..count {
        raw.put_f32_le(at as f32 / 8.0);
    }
    raw.freeze()
}

fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    framed.put_slice(&message.encode_to_vec());
    framed.freeze()
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
