//! Kept answers as messages: what is left out before they are kept, and what each request adds.
//!
//! The rule: a gRPC answer is the kept bytes and a few behind them, not decoded. Protobuf lets a message
//! be written in parts: a field that comes again takes the place of the first, and so does an entry of a
//! map.

use std::collections::HashMap;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint};
use spillway_core::inference::{InferResponse, InvalidAnswer, Limits, Parameter};
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{InferParameter, ModelInferResponse};
use spillway_runtime::oip::{self, FRAME_HEADER};

use super::entry::Kept;

pub const FEATURE_AGE: &str = "spillway-feature-age-ms";

/// `id` of a `ModelInferResponse`.
const ID: u32 = 3;
/// A longer message is a segment of its own; copying a shorter one costs less than one more write.
const OWN_SEGMENT: usize = 16 << 10;

/// A copy of a `ModelInferResponse` without its id. `None` where it is no message.
pub fn without_id(message: &[u8]) -> Option<Bytes> {
    let mut kept = Vec::with_capacity(message.len());
    let mut rest = message;
    while !rest.is_empty() {
        let before = rest;
        let (field, wire_type) = decode_key(&mut rest).ok()?;
        let length = match wire_type {
            WireType::Varint => decode_varint(&mut rest).map(|_| 0).ok()?,
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            // No message of the protocol has groups.
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        rest = rest.get(length..)?;
        if field != ID {
            kept.extend_from_slice(before.get(..before.len() - rest.len())?);
        }
    }
    Some(kept.into_boxed_slice().into())
}

/// The length-prefixed message for a gRPC request.
pub fn frame(kept: &Kept, id: &str) -> Vec<Bytes> {
    let age = kept.entry.feature_age_ms(kept.age);
    let age = age.map(|age| {
        let value = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(age)) };
        (FEATURE_AGE.to_owned(), value)
    });
    let own = ModelInferResponse { id: id.to_owned(), parameters: HashMap::from_iter(age), ..Default::default() };
    let message = &kept.entry.message;
    let own_length = own.encoded_len();
    // Limits on answers keep every message far below 4 GiB.
    let length = u32::try_from(message.len() + own_length).unwrap_or(u32::MAX);
    let whole = if message.len() < OWN_SEGMENT { message.len() } else { 0 };
    let mut buffer = BytesMut::with_capacity(FRAME_HEADER + whole + own_length);
    buffer.put_u8(0);
    buffer.put_u32(length);
    if message.len() < OWN_SEGMENT {
        buffer.put_slice(message);
        own.encode_raw(&mut buffer);
        return vec![buffer.freeze()];
    }
    let head = buffer.split().freeze();
    own.encode_raw(&mut buffer);
    vec![head, message.clone(), buffer.freeze()]
}

/// The answer for a REST request.
pub fn response(kept: &Kept, id: &str, limits: &Limits) -> Result<InferResponse, InvalidAnswer> {
    let mut response = oip::decode_response_message(kept.entry.message.clone(), limits)?;
    id.clone_into(&mut response.id);
    if let Some(age) = kept.entry.feature_age_ms(kept.age) {
        response.parameters.set(FEATURE_AGE, Parameter::Int(age));
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::results::tests::entry;

    fn text(value: &str) -> InferParameter {
        InferParameter { parameter_choice: Some(ParameterChoice::StringParam(value.into())) }
    }

    fn answer(id: &str, raw: usize) -> ModelInferResponse {
        let age = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(250)) };
        ModelInferResponse {
            model_name: "double".into(),
            model_version: "1".into(),
            id: id.into(),
            parameters: HashMap::from([(FEATURE_AGE.into(), age), ("a".into(), text("b"))]),
            raw_output_contents: vec![vec![7; raw].into()],
            ..Default::default()
        }
    }

    fn kept(raw: usize) -> Kept {
        let message = without_id(&answer("of the leader", raw).encode_to_vec()).unwrap();
        let mut entry = entry("k", message);
        entry.made.feature_age_ms = Some(250);
        Kept { entry: entry.into(), age: Duration::from_millis(1_500) }
    }

    #[test]
    fn the_id_goes_and_all_else_stays() {
        for raw in [0, 1, 300] {
            let kept = without_id(&answer("of the leader", raw).encode_to_vec()).unwrap();
            assert_eq!(ModelInferResponse::decode(kept).unwrap(), answer("", raw));
        }
        assert_eq!(without_id(&[]).unwrap(), Bytes::new());
        for broken in [&[0x1a][..], &[0x1a, 5, b'a'], &[0xff; 16], &[0x0b], &[0x21, 1]] {
            assert_eq!(without_id(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn a_frame_is_the_kept_answer_with_the_callers_id_and_the_features_age_of_now() {
        for (raw, segments) in [(8, 1), (20_000, 3)] {
            let frame = frame(&kept(raw), "mine");
            assert_eq!(frame.len(), segments);
            let whole = frame.concat();
            assert_eq!(u32::from_be_bytes(whole[1..5].try_into().unwrap()) as usize, whole.len() - 5);
            let read = ModelInferResponse::decode(&whole[5..]).unwrap();
            let mut expected = answer("mine", raw);
            let age = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(1_750)) };
            expected.parameters.insert(FEATURE_AGE.into(), age);
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn rest_reads_the_same_answer() {
        let message = ModelInferResponse { raw_output_contents: vec![], ..answer("", 0) };
        let mut entry = entry("k", message.encode_to_vec().into());
        entry.made.feature_age_ms = Some(250);
        let kept = Kept { entry: entry.into(), age: Duration::from_millis(1_500) };
        let response = response(&kept, "mine", &Limits::OF_SIDECARS).unwrap();
        assert_eq!((response.id.as_str(), response.parameters.integer(FEATURE_AGE)), ("mine", Some(1_750)));
        assert_eq!(response.parameters.text("a"), Some("b"));
    }
}
