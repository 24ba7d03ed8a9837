//! The one call that the bench makes, a small inference of one row, and its answer, as each protocol says them.
//!
//! The rule: an answer passes only if all of its values are right; a proxy may add to it, not take away.

pub mod framing;
pub mod grpc;
pub mod rest;

use bytes::{BufMut, Bytes, BytesMut};
use clap::ValueEnum;
use http::HeaderMap;
use serde::{Deserialize, Serialize};

pub use framing::{PREFIX, frame, length, unframed};
pub use grpc::PATH;

pub const MODEL: &str = "scorer";
pub const INPUT: &str = "features";
pub const OUTPUT: &str = "score";
/// Columns of the one input row.
pub const COLUMNS: usize = 28;
/// Columns of the one output row.
pub const SCORES: usize = 52;
const VERSION: &str = "1";
const ID: &str = "bench-000000000000001";
const DATATYPE: &str = "FP32";

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
pub enum Protocol {
    /// `ModelInfer` over HTTP/2.
    Grpc,
    /// REST with binary tensors over HTTP/2.
    H2,
    /// The same over HTTP/1.1 with keep-alive.
    H1,
}

impl Protocol {
    /// Its name on the command line and in the results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::H2 => "h2",
            Self::H1 => "h1",
        }
    }

    /// Its name for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Grpc => "gRPC",
            Self::H2 => "REST over HTTP/2",
            Self::H1 => "REST over HTTP/1.1",
        }
    }

    pub fn path(self) -> &'static str {
        match self {
            Self::Grpc => PATH,
            Self::H2 | Self::H1 => rest::PATH,
        }
    }

    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Grpc | Self::H2 => b"h2",
            Self::H1 => b"http/1.1",
        }
    }

    /// The request's body. The row's values come last.
    pub fn request(self) -> Bytes {
        match self {
            Self::Grpc => grpc::request(),
            Self::H2 | Self::H1 => rest::request(),
        }
    }

    /// The answer's body as the upstream sends it.
    pub fn response(self) -> Bytes {
        match self {
            Self::Grpc => grpc::response(),
            Self::H2 | Self::H1 => rest::response(),
        }
    }

    /// Whether head and body are the answer.
    pub fn is_answer(self, head: &HeaderMap, body: &[u8]) -> bool {
        match self {
            Self::Grpc => grpc::is_answer(body),
            Self::H2 | Self::H1 => rest::is_answer(head, body),
        }
    }
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

/// FP32 of their own, as raw contents.
pub fn values(count: usize) -> Bytes {
    let mut raw = BytesMut::with_capacity(count * 4);
    for at in 0..count {
        raw.put_f32_le(at as f32 / 8.0);
    }
    raw.freeze()
}
