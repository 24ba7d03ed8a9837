//! Whole gRPC messages as segments to send: the 5-byte prefix, the message, large tensors uncopied.
//!
//! The raw contents have the highest field number of both messages, so they may follow a head that
//! was encoded without them: that is what prost itself would write.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use spillway_core::inference::{InferRequest, InferResponse, Parameter, Tensor};

use super::{encode_parameter, request_head, response_head};

/// Copying less than this costs less than one more segment.
const OWN_SEGMENT: usize = 4_096;

/// Bytes before a message: compression flag and length.
pub const FRAME_HEADER: usize = 5;

const RAW_INPUT_CONTENTS: u32 = 7;
const RAW_OUTPUT_CONTENTS: u32 = 6;

/// The length-prefixed `ModelInferRequest`.
///
/// gRPC cannot say more than 4 GiB; limits on tensors keep every message far below.
pub fn frame(request: &InferRequest) -> Vec<Bytes> {
    segments(&request_head(request), RAW_INPUT_CONTENTS, &request.inputs)
}

/// The same with one parameter more.
pub fn frame_with(request: &InferRequest, name: &str, value: &Parameter) -> Vec<Bytes> {
    let mut head = request_head(request);
    head.parameters.insert(name.to_owned(), encode_parameter(value));
    segments(&head, RAW_INPUT_CONTENTS, &request.inputs)
}

/// The length-prefixed `ModelInferResponse`.
pub fn frame_response(response: &InferResponse) -> Vec<Bytes> {
    segments(&response_head(response), RAW_OUTPUT_CONTENTS, &response.outputs)
}

/// The flag and the length of a frame, once they are there.
pub fn frame_header(buffer: &[u8]) -> Option<(u8, usize)> {
    let (header, _) = buffer.split_first_chunk::<FRAME_HEADER>()?;
    let [flag, length @ ..] = *header;
    Some((flag, usize::try_from(u32::from_be_bytes(length)).ok()?))
}

/// Bytes that are no frame with a message that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoMessage {
    #[error("the message is compressed, which was not asked for")]
    Compressed,
    #[error("the body is not one whole length-prefixed message")]
    Length,
}

/// The message of a body that must be one frame.
pub fn message(frame: &Bytes) -> Result<Bytes, NoMessage> {
    let (flag, length) = frame_header(frame).ok_or(NoMessage::Length)?;
    if flag != 0 {
        return Err(NoMessage::Compressed);
    }
    if frame.len() - FRAME_HEADER != length {
        return Err(NoMessage::Length);
    }
    Ok(frame.slice(FRAME_HEADER..))
}

fn segments(head: &impl Message, field: u32, tensors: &[Tensor]) -> Vec<Bytes> {
    let head_length = head.encoded_len();
    let key = |data: &Bytes| key_len(field) + encoded_len_varint(data.len() as u64);
    let length = head_length + tensors.iter().map(|tensor| key(&tensor.data) + tensor.data.len()).sum::<usize>();
    let copied = |data: &Bytes| if is_large(data) { 0 } else { data.len() };
    let copied: usize = tensors.iter().map(|tensor| key(&tensor.data) + copied(&tensor.data)).sum();
    let mut buffer = BytesMut::with_capacity(FRAME_HEADER + head_length + copied);
    buffer.put_u8(0);
    buffer.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    head.encode_raw(&mut buffer);
    let mut segments = Vec::with_capacity(1 + 2 * tensors.len());
    for Tensor { data, .. } in tensors {
        encode_key(field, WireType::LengthDelimited, &mut buffer);
        encode_varint(data.len() as u64, &mut buffer);
        if is_large(data) {
            segments.push(buffer.split().freeze());
            segments.push(data.clone());
        } else {
            buffer.put_slice(data);
        }
    }
    if !buffer.is_empty() {
        segments.push(buffer.freeze());
    }
    segments
}

/// Whether a tensor gets its own segment.
fn is_large(data: &Bytes) -> bool {
    data.len() >= OWN_SEGMENT
}
