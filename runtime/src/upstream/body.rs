//! What a call sends: a few segments that are known, or messages that come one by one.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

/// Messages that may wait for the connection in a streamed call.
const QUEUE: usize = 4;

/// The body of a request. Segments go out as they are, uncopied.
#[derive(Debug)]
pub struct OipBody(Source);

#[derive(Debug)]
enum Source {
    Segments { left: VecDeque<Bytes>, length: u64 },
    Stream(Option<mpsc::Receiver<Piece>>),
}

#[derive(Debug)]
enum Piece {
    Data(Bytes),
    End,
}

impl OipBody {
    pub fn empty() -> Self {
        Self(Source::Segments { left: VecDeque::new(), length: 0 })
    }

    /// A body whose end is known: its last segment ends the stream.
    pub fn segments(segments: impl Into<Vec<Bytes>>) -> Self {
        let mut segments: Vec<Bytes> = segments.into();
        segments.retain(|segment| !segment.is_empty());
        let length = segments.iter().map(|segment| segment.len() as u64).sum();
        Self(Source::Segments { left: segments.into(), length })
    }

    /// A body that is sent while the answer comes.
    pub fn stream() -> (OipSender, Self) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (OipSender(sender), Self(Source::Stream(Some(receiver))))
    }
}

impl From<Bytes> for OipBody {
    fn from(bytes: Bytes) -> Self {
        Self::segments([bytes])
    }
}

/// Feeds a streamed body. Dropped without [`OipSender::finish`], it resets the stream: the server must
/// not take half a call for a whole one.
#[derive(Debug)]
pub struct OipSender(mpsc::Sender<Piece>);

/// The call is over: the server or the link ended it, or its sender was dropped unfinished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the streamed call has ended")]
pub struct Aborted;

impl OipSender {
    /// Waits for room, so that a slow server slows its client down.
    pub async fn send(&self, message: Bytes) -> Result<(), Aborted> {
        self.0.send(Piece::Data(message)).await.map_err(|_| Aborted)
    }

    pub async fn finish(self) -> Result<(), Aborted> {
        self.0.send(Piece::End).await.map_err(|_| Aborted)
    }
}

impl Body for OipBody {
    type Data = Bytes;
    type Error = Aborted;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Aborted>>> {
        match &mut self.0 {
            Source::Segments { left, length } => {
                let segment = left.pop_front();
                *length -= segment.as_ref().map_or(0, |segment| segment.len() as u64);
                Poll::Ready(segment.map(|segment| Ok(Frame::data(segment))))
            }
            Source::Stream(source) => {
                let Some(receiver) = source else { return Poll::Ready(None) };
                let piece = std::task::ready!(receiver.poll_recv(context));
                if !matches!(piece, Some(Piece::Data(_))) {
                    *source = None;
                }
                Poll::Ready(match piece {
                    Some(Piece::Data(data)) => Some(Ok(Frame::data(data))),
                    Some(Piece::End) => None,
                    None => Some(Err(Aborted)),
                })
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Segments { left, .. } => left.is_empty(),
            Source::Stream(source) => source.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Segments { length, .. } => SizeHint::with_exact(*length),
            Source::Stream(Some(_)) => SizeHint::default(),
            Source::Stream(None) => SizeHint::with_exact(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn segments_go_out_as_they_are_and_the_last_one_ends() {
        let segments = [Bytes::from_static(b"head"), Bytes::new(), Bytes::from_static(b"tensor")];
        let addresses = [segments[0].as_ptr(), segments[2].as_ptr()];
        let mut body = OipBody::segments(segments);
        assert_eq!(body.size_hint().exact(), Some(10));
        for address in addresses {
            assert!(!body.is_end_stream());
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().as_ptr(), address);
        }
        assert!(body.is_end_stream() && OipBody::empty().is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
    }

    #[tokio::test]
    async fn a_stream_ends_only_when_finished() {
        let (sender, body) = OipBody::stream();
        sender.send(Bytes::from_static(b"one")).await.unwrap();
        sender.finish().await.unwrap();
        assert_eq!(body.collect().await.unwrap().to_bytes(), "one");
        let (sender, body) = OipBody::stream();
        sender.send(Bytes::from_static(b"half")).await.unwrap();
        drop(sender);
        assert_eq!(body.collect().await.unwrap_err(), Aborted);
    }
}
