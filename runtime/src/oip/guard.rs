//! Walks the wire bytes of a `ModelInferRequest` before they are decoded.
//!
//! The rule: decoding allocates no more than a small multiple of the message: 8, where a number of one
//! byte becomes 64 bits. Two bytes of wire can make an empty sub-message of some hundred bytes in memory,
//! so what is repeated is counted here first.
//! Does not judge values; prost and the decoder do.

use prost::encoding::{WireType, decode_key, decode_varint};
use spillway_core::inference::{InvalidRequest, Limits};

/// A message of at most this many bytes may hold what it likes: it cannot become large.
const SMALL: usize = 4_096;

pub(super) fn malformed() -> InvalidRequest {
    InvalidRequest::Protobuf("the message is not a valid protobuf of an inference request".into())
}

pub(super) fn check(message: &[u8], limits: &Limits) -> Result<(), InvalidRequest> {
    if message.len() > limits.body {
        return Err(InvalidRequest::Limit { what: "bytes of the message", limit: limits.body });
    }
    if message.len() <= SMALL {
        return Ok(());
    }
    let mut parameters = Counter::new("parameters", limits.parameters);
    let mut inputs = Counter::new("inputs", limits.tensors);
    let mut outputs = Counter::new("outputs", limits.tensors);
    let mut raw = Counter::new("raw contents", limits.tensors);
    // Each becomes a handle of 32 bytes.
    let mut elements = Counter::new("typed BYTES elements", limits.body / 32);
    fields(message, |field, value| match field {
        4 => parameters.add(1),
        5 => inputs.add(1).and_then(|()| check_input(value, &mut elements, limits)),
        6 => outputs.add(1).and_then(|()| check_output(value, limits)),
        7 => raw.add(1),
        _ => Ok(()),
    })
}

fn check_input(message: &[u8], elements: &mut Counter, limits: &Limits) -> Result<(), InvalidRequest> {
    let mut dimensions = Counter::new("dimensions of one tensor", limits.dimensions);
    let mut parameters = Counter::new("parameters", limits.parameters);
    let mut contents = Counter::new("contents of one tensor", 1);
    fields(message, |field, value| match field {
        // Packed or not; each dimension is a varint, whose last byte alone is below 128.
        3 => dimensions.add(value.iter().filter(|byte| **byte < 128).count().max(1)),
        4 => parameters.add(1),
        5 => {
            contents.add(1)?;
            fields(value, |field, _| if field == 8 { elements.add(1) } else { Ok(()) })
        }
        _ => Ok(()),
    })
}

fn check_output(message: &[u8], limits: &Limits) -> Result<(), InvalidRequest> {
    let mut parameters = Counter::new("parameters", limits.parameters);
    fields(message, |field, _| if field == 2 { parameters.add(1) } else { Ok(()) })
}

struct Counter {
    what: &'static str,
    limit: usize,
    count: usize,
}

impl Counter {
    fn new(what: &'static str, limit: usize) -> Self {
        Self { what, limit, count: 0 }
    }

    fn add(&mut self, count: usize) -> Result<(), InvalidRequest> {
        self.count += count;
        if self.count > self.limit {
            return Err(InvalidRequest::Limit { what: self.what, limit: self.limit });
        }
        Ok(())
    }
}

/// Calls `visit` with the number of each field, in order, and its bytes where a length delimits them.
fn fields<'a>(
    mut message: &'a [u8],
    mut visit: impl FnMut(u32, &'a [u8]) -> Result<(), InvalidRequest>,
) -> Result<(), InvalidRequest> {
    while !message.is_empty() {
        let (field, wire_type) = decode_key(&mut message).map_err(|_| malformed())?;
        let length = match wire_type {
            WireType::Varint => {
                decode_varint(&mut message).map_err(|_| malformed())?;
                0
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => decode_varint(&mut message).map_err(|_| malformed())?,
            // No message of the protocol has groups.
            WireType::StartGroup | WireType::EndGroup => return Err(malformed()),
        };
        let length = usize::try_from(length).map_err(|_| malformed())?;
        let (value, rest) = message.split_at_checked(length).ok_or_else(malformed)?;
        message = rest;
        visit(field, if wire_type == WireType::LengthDelimited { value } else { &[] })?;
    }
    Ok(())
}
