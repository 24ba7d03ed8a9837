//! Typed contents into raw bytes.

use bytes::{BufMut, Bytes, BytesMut};
use spillway_core::inference::{Datatype, InvalidRequest, Limits, Tensor};
use spillway_proto::inference::InferTensorContents;

/// Turns the contents into raw bytes. Only the field that the datatype names may be filled.
pub(super) fn to_raw(
    name: &str,
    datatype: Datatype,
    shape: &[i64],
    contents: InferTensorContents,
    limits: &Limits,
) -> Result<Bytes, InvalidRequest> {
    let elements = Tensor::elements(name, shape)?;
    let InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = contents;
    let lengths = [
        bool_contents.len(),
        int_contents.len(),
        int64_contents.len(),
        uint_contents.len(),
        uint64_contents.len(),
        fp32_contents.len(),
        fp64_contents.len(),
        bytes_contents.len(),
    ];
    let field = match datatype {
        Datatype::Bool => 0,
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => 1,
        Datatype::Int64 => 2,
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => 3,
        Datatype::Uint64 => 4,
        Datatype::Fp32 => 5,
        Datatype::Fp64 => 6,
        Datatype::Bytes => 7,
        Datatype::Fp16 | Datatype::Bf16 => {
            let problem = format!("{datatype} has no typed contents; send it as raw contents");
            return Err(InvalidRequest::Element { tensor: name.to_owned(), problem });
        }
    };
    let found = lengths[field];
    if lengths.iter().sum::<usize>() != found {
        return Err(InvalidRequest::MixedContents(name.to_owned()));
    }
    if found != elements {
        return Err(InvalidRequest::Length { tensor: name.to_owned(), expected: elements as u64, found: found as u64 });
    }
    let size = match datatype.width() {
        Some(width) => found.saturating_mul(width),
        None => bytes_contents.iter().fold(0, |sum: usize, element| sum.saturating_add(4 + element.len())),
    };
    if size > limits.tensor {
        return Err(InvalidRequest::Limit { what: "bytes of one tensor", limit: limits.tensor });
    }
    let mut out = BytesMut::with_capacity(size);
    let narrow = |index: usize| InvalidRequest::Element {
        tensor: name.to_owned(),
        problem: format!("element {index}: the datatype cannot hold this number"),
    };
    match datatype {
        Datatype::Bool => bool_contents.iter().for_each(|value| out.put_u8((*value).into())),
        Datatype::Int8 => {
            for (index, value) in int_contents.iter().enumerate() {
                out.put_i8(i8::try_from(*value).map_err(|_| narrow(index))?);
            }
        }
        Datatype::Int16 => {
            for (index, value) in int_contents.iter().enumerate() {
                out.put_i16_le(i16::try_from(*value).map_err(|_| narrow(index))?);
            }
        }
        Datatype::Uint8 => {
            for (index, value) in uint_contents.iter().enumerate() {
                out.put_u8(u8::try_from(*value).map_err(|_| narrow(index))?);
            }
        }
        Datatype::Uint16 => {
            for (index, value) in uint_contents.iter().enumerate() {
                out.put_u16_le(u16::try_from(*value).map_err(|_| narrow(index))?);
            }
        }
        Datatype::Int32 => int_contents.iter().for_each(|value| out.put_i32_le(*value)),
        Datatype::Int64 => int64_contents.iter().for_each(|value| out.put_i64_le(*value)),
        Datatype::Uint32 => uint_contents.iter().for_each(|value| out.put_u32_le(*value)),
        Datatype::Uint64 => uint64_contents.iter().for_each(|value| out.put_u64_le(*value)),
        Datatype::Fp32 => fp32_contents.iter().for_each(|value| out.put_f32_le(*value)),
        Datatype::Fp64 => fp64_contents.iter().for_each(|value| out.put_f64_le(*value)),
        Datatype::Bytes => {
            for (index, element) in bytes_contents.iter().enumerate() {
                out.put_u32_le(u32::try_from(element.len()).map_err(|_| narrow(index))?);
                out.put_slice(element);
            }
        }
        // Refused above.
        Datatype::Fp16 | Datatype::Bf16 => {}
    }
    Ok(out.freeze())
}
