//! A request's body, read whole: within its limit, and not slower than a minimum.
//!
//! The rule: a declared length over the limit is refused before a byte is read, an undeclared one as
//! soon as it is passed. What is kept is counted ([`crate::request::memory`]). A body in one piece is not copied.

use std::time::Duration;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pingora_core::protocols::http::ServerSession;
use spillway_runtime::oip::{self, FRAME_HEADER, NoMessage, frame_header};
use tokio::time::{Instant, timeout_at};

use crate::downstream::connection::caller;
use crate::errors::Refusal;
use crate::exchange::Exchange;
use crate::infer::gone;
use crate::request::head::{Content, Head};
use crate::request::memory::{Memory, counted};

/// A body may take this long whatever its size.
const GRACE: Duration = Duration::from_secs(5);
/// And beyond that as long as it comes with this many bytes a second on average.
const MINIMUM_RATE: u64 = 32 << 10;
/// But no longer than this in all.
const TOTAL: Duration = Duration::from_secs(60);

/// Reads the body of a request, of at most `limit` bytes, which the exchange keeps count of.
pub async fn read(
    session: &mut ServerSession,
    exchange: &mut Exchange,
    head: &Head,
    limit: usize,
) -> Result<Bytes, Refusal> {
    if head.content_length.is_some_and(|length| length > limit) {
        return Err(Refusal::BodyTooLarge { limit });
    }
    let began = Instant::now();
    if head.expects_continue && session.as_http2().is_none() && !session.is_body_empty() {
        session.write_continue_response().await.map_err(|_| Refusal::Cancelled)?;
    }
    let mut whole = Bytes::new();
    let mut pieces = BytesMut::new();
    loop {
        let received = (whole.len() + pieces.len()) as u64;
        let earned = Duration::from_millis(received * 1_000 / MINIMUM_RATE);
        let until = began + (GRACE + earned).min(TOTAL);
        let piece = match timeout_at(until, session.read_request_body()).await {
            Err(_) => return Err(Refusal::BodyTooSlow),
            Ok(Err(_)) => return Err(broken(session)),
            Ok(Ok(None)) => break,
            Ok(Ok(Some(piece))) => piece,
        };
        if whole.len() + pieces.len() + piece.len() > limit {
            return Err(Refusal::BodyTooLarge { limit });
        }
        exchange.keep(piece.len())?;
        if whole.is_empty() && pieces.is_empty() {
            whole = piece;
        } else {
            if pieces.is_empty() {
                // A declared length within the limit is believed; without one, memory grows with what arrives.
                let declared =
                    head.content_length.or_else(|| grpc_length(head, &whole).filter(|length| *length <= limit));
                pieces.reserve(declared.unwrap_or(whole.len() + piece.len()));
                pieces.extend_from_slice(&std::mem::take(&mut whole));
            }
            pieces.extend_from_slice(&piece);
        }
    }
    Ok(if pieces.is_empty() { whole } else { pieces.freeze() })
}

/// What the first bytes of a gRPC request say of its length, where it is one message.
fn grpc_length(head: &Head, first: &[u8]) -> Option<usize> {
    let (_, length) = frame_header(first).filter(|_| head.content == Content::Grpc)?;
    Some(length.saturating_add(FRAME_HEADER))
}

/// The next bytes of a client's stream; while they are not wanted, only whether it is still there.
pub async fn from_client(session: &mut ServerSession, wanted: bool) -> Result<Option<Bytes>, Refusal> {
    if wanted {
        return session.read_request_body().await.map_err(|_| Refusal::Cancelled);
    }
    gone(session).await;
    Err(Refusal::Cancelled)
}

/// Takes in what is left of a body that nobody wants, if that is little. Over HTTP/2 a refusal is
/// followed by a reset where the body has not ended, and some clients (curl 7.88) then drop the answer.
pub async fn discard(session: &mut ServerSession) {
    const MOST: usize = 64 << 10;
    const LONGEST: Duration = Duration::from_millis(250);
    let until = Instant::now() + LONGEST;
    let mut taken = 0;
    while taken <= MOST && session.as_http2().is_some() {
        match timeout_at(until, session.read_request_body()).await {
            Ok(Ok(Some(piece))) => taken += piece.len(),
            _ => return,
        }
    }
}

/// Why a body could not be read: the framing was wrong, or the client is gone.
fn broken(session: &ServerSession) -> Refusal {
    match caller(session).and_then(|caller| caller.fault.get()) {
        Some(fault) => Refusal::Head(*fault),
        None => Refusal::Cancelled,
    }
}

/// The message of a gRPC request that must be one frame.
pub fn message(frame: &Bytes) -> Result<Bytes, Refusal> {
    oip::message(frame).map_err(|problem| match problem {
        NoMessage::Compressed => Refusal::Compressed,
        NoMessage::Length => Refusal::Frame,
    })
}

/// Cuts a stream of bytes into gRPC frames. Its bytes are counted, and those of its frames until each
/// is dropped.
#[derive(Debug)]
pub struct Frames {
    buffer: BytesMut,
    memory: Arc<Memory>,
}

impl Frames {
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { buffer: BytesMut::new(), memory }
    }

    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.memory.take(bytes.len())?;
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next whole frame, its header included.
    pub fn next(&mut self, limit: usize) -> Result<Option<Bytes>, Refusal> {
        let Some((flag, length)) = frame_header(&self.buffer) else { return Ok(None) };
        if flag != 0 {
            return Err(Refusal::Compressed);
        }
        if length > limit {
            return Err(Refusal::BodyTooLarge { limit });
        }
        let whole = FRAME_HEADER + length;
        let there = self.buffer.len() >= whole;
        Ok(there.then(|| counted(self.buffer.split_to(whole).freeze(), self.memory.clone())))
    }

    /// Whether a frame has begun and not ended.
    pub fn is_cut(&self) -> bool {
        !self.buffer.is_empty()
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.memory.give_back(self.buffer.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unary_message_is_exactly_one_frame() {
        let code = |frame: &'static [u8]| message(&Bytes::from_static(frame)).map_err(|refusal| refusal.answer().code);
        assert_eq!(code(&[0, 0, 0, 0, 2, 7, 8]), Ok(Bytes::from_static(&[7, 8])));
        for bad in [&[][..], &[0, 0, 0, 0], &[0, 0, 0, 0, 2, 7], &[0, 0, 0, 0, 1, 7, 8]] {
            assert_eq!(code(bad), Err("invalid-frame".into()), "{bad:?}");
        }
        assert_eq!(code(&[1, 0, 0, 0, 0]), Err("unsupported-encoding".into()));
    }

    #[test]
    fn frames_come_out_whole_however_they_arrive() {
        let wire = [0, 0, 0, 0, 1, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 5, 6];
        for piece in 1..wire.len() {
            let mut frames = Frames::new(Arc::new(Memory::new(wire.len())));
            let mut lengths = Vec::new();
            for part in wire.chunks(piece) {
                frames.push(part).unwrap();
                while let Some(frame) = frames.next(10).unwrap() {
                    lengths.push(frame.len());
                }
            }
            assert_eq!(lengths, [6, 5, 7], "in pieces of {piece}");
            assert!(!frames.is_cut());
        }
    }

    #[test]
    fn t25_a_frame_that_declares_too_much_is_refused_at_its_header() {
        let mut frames = Frames::new(Arc::new(Memory::new(100)));
        frames.push(&[0, 0xff, 0xff, 0xff, 0xff]).unwrap();
        assert!(matches!(frames.next(1 << 20), Err(Refusal::BodyTooLarge { .. })));
    }

    #[test]
    fn a_streams_bytes_are_counted_until_its_frames_are_dropped() {
        let memory = Arc::new(Memory::new(16));
        let mut frames = Frames::new(memory.clone());
        frames.push(&[0, 0, 0, 0, 2, 7, 8, 0, 0, 0]).unwrap();
        let frame = frames.next(10).unwrap().unwrap();
        assert_eq!(memory.taken(), 10);
        assert!(matches!(frames.push(&[0; 7]), Err(Refusal::Overloaded)));
        drop(frame);
        assert_eq!(memory.taken(), 3);
        drop(frames);
        assert_eq!(memory.taken(), 0);
    }
}
