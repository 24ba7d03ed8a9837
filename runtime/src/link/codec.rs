//! The stream's messages as gRPC frames.
//!
//! What comes in is left as bytes: a message that is none must be refused with a word, and is no reason to lose the
//! stream.

use bytes::{Buf, Bytes};
use prost::Message;
use spillway_proto::control;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Frames;

impl Codec for Frames {
    type Encode = control::FromNode;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Frames {
    type Item = control::FromNode;
    type Error = Status;

    fn encode(&mut self, message: control::FromNode, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Frames {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
