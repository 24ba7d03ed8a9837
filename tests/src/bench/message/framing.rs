//! gRPC messages behind their prefix: whether they are compressed, which they never are here, and their length.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

/// Bytes before a message.
pub const PREFIX: usize = 5;

/// The length that a gRPC prefix announces.
pub fn length(framed: &[u8]) -> Option<usize> {
    let prefix: &[u8; PREFIX] = framed.first_chunk()?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] == 0 { usize::try_from(length).ok() } else { None }
}

/// The one whole message behind its prefix.
pub fn unframed(framed: &[u8]) -> Option<&[u8]> {
    let message = framed.get(PREFIX..)?;
    (length(framed)? == message.len()).then_some(message)
}

/// A gRPC message: not compressed, its length, itself.
pub fn frame(message: &impl Message) -> Bytes {
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
    fn only_a_whole_frame_is_unframed() {
        assert_eq!(unframed(&[0, 0, 0, 0, 2, 8, 1]), Some(&[8, 1][..]));
        for wrong in [&[0, 0, 0, 0, 2, 8][..], &[1, 0, 0, 0, 2, 8, 1], &[0, 0, 0, 0], &[]] {
            assert_eq!(unframed(wrong), None, "{wrong:?}");
        }
    }
}
