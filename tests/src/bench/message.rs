//! The one call that the bench makes: a small `ModelInfer` of one row, and its answer.

use std::collections::HashMap;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse};

pub const PATH: &str = "/inference.GRPCInferenceService/ModelInfer";
pub const MODEL: &str = "scorer";
pub const INPUT: &str = "features";
pub const OUTPUT: &str = "score";
/// Columns of the one input row.
pub const COLUMNS: usize = 28;
/// Columns of the one output row.
pub const SCORES: usize = 52;
const ID: &str = "bench-000000000000001";

/// The request's body with its gRPC prefix: 172 bytes.
pub fn request() -> Bytes {
    frame(&ModelInferRequest {
        model_name: MODEL.into(),
        id: ID.into(),
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

/// The request with another last pair of values: one of its own for each number.
pub fn numbered(request: &[u8], number: u64) -> Bytes {
    let mut bytes = BytesMut::from(request);
    let length = bytes.len();
    // Any eight bytes are two FP32; the raw values come last in the message.
    if let Some(last) = bytes.get_mut(length.saturating_sub(8)..) {
        last.copy_from_slice(&number.to_le_bytes());
    }
    bytes.freeze()
}

/// The answer's body with its gRPC prefix: 300 bytes, with what a sidecar says about it.
pub fn response() -> Bytes {
    frame(&expected())
}

/// Whether a body is the answer. A proxy may add parameters and encode it anew; the rest stays.
pub fn is_answer(body: &[u8]) -> bool {
    let Some((prefix, message)) = body.split_first_chunk::<5>() else { return false };
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || length as usize != message.len() {
        return false;
    }
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
    let version = InferParameter { parameter_choice: Some(ParameterChoice::StringParam("1".into())) };
    ModelInferResponse {
        model_name: MODEL.into(),
        model_version: "1".into(),
        id: ID.into(),
        parameters: HashMap::from([("spillway-model-version".to_owned(), version)]),
        outputs: vec![InferOutputTensor {
            name: OUTPUT.into(),
            datatype: "FP32".into(),
            shape: vec![1, SCORES as i64],
            ..Default::default()
        }],
        raw_output_contents: vec![values(SCORES)],
    }
}

fn values(count: usize) -> Bytes {
    let mut raw = BytesMut::with_capacity(count * 4);
    for at in 0..count {
        raw.put_f32_le(at as f32 / 8.0);
    }
    raw.freeze()
}

/// A gRPC message: not compressed, its length, itself.
fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    framed.put_slice(&message.encode_to_vec());
    framed.freeze()
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
        let numbered = numbered(&request(), 7);
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
