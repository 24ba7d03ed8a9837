//! What a call sends and what comes back.
//!
//! The rule: segments that are known go to h2 as they are, uncopied and at once: it holds them until the peer's window
//! has room. A streamed body is pumped by a task of its own, piece by piece, each when there is room for it.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;

use super::{InFlight, UpstreamError};

/// Messages that may wait for the connection in a streamed call.
const QUEUE: usize = 4;

/// The body of a request.
#[derive(Debug)]
pub struct OipBody(Source);

#[derive(Debug)]
enum Source {
    Segments(Vec<Bytes>),
    Stream(mpsc::Receiver<Piece>),
}

#[derive(Debug)]
enum Piece {
    Data(Bytes),
    End,
}

impl OipBody {
    pub fn empty() -> Self {
        Self(Source::Segments(Vec::new()))
    }

    /// A body whose end is known: its last segment ends the stream.
    pub fn segments(segments: impl Into<Vec<Bytes>>) -> Self {
        let mut segments: Vec<Bytes> = segments.into();
        segments.retain(|segment| !segment.is_empty());
        Self(Source::Segments(segments))
    }

    /// A body that is sent while the answer comes.
    pub fn stream() -> (OipSender, Self) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (OipSender(sender), Self(Source::Stream(receiver)))
    }

    /// Whether the head is all that there is to send.
    pub(super) fn is_empty(&self) -> bool {
        matches!(&self.0, Source::Segments(segments) if segments.is_empty())
    }

    /// Sends all of it, after a head that did not end the stream.
    pub(super) fn send(self, mut to: SendStream<Bytes>) -> Result<(), h2::Error> {
        match self.0 {
            Source::Segments(segments) => {
                let last = segments.len().saturating_sub(1);
                segments.into_iter().enumerate().try_for_each(|(index, segment)| to.send_data(segment, index == last))
            }
            Source::Stream(pieces) => {
                tokio::spawn(pump(pieces, to));
                Ok(())
            }
        }
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

/// Passes the pieces on until the last, or until the stream ends. Whoever sends them learns of the end by the channel.
async fn pump(mut pieces: mpsc::Receiver<Piece>, mut to: SendStream<Bytes>) {
    loop {
        let piece = tokio::select! {
            biased;
            _ = poll_fn(|context| to.poll_reset(context)) => return,
            piece = pieces.recv() => piece,
        };
        // What fails here has ended the stream.
        let sent = match piece {
            Some(Piece::Data(data)) => send_piece(data, &mut to).await,
            Some(Piece::End) => return drop(to.send_data(Bytes::new(), true)),
            None => return to.send_reset(Reason::CANCEL),
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn send_piece(mut data: Bytes, to: &mut SendStream<Bytes>) -> Result<(), Aborted> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let room = match poll_fn(|context| to.poll_capacity(context)).await {
            Some(Ok(room)) => room.min(data.len()),
            Some(Err(_)) | None => return Err(Aborted),
        };
        to.send_data(data.split_to(room), false).map_err(|_| Aborted)?;
    }
    Ok(())
}

/// The body of an answer. The call counts as in flight until it is dropped.
#[derive(Debug)]
pub struct UpstreamBody {
    stream: RecvStream,
    data_ended: bool,
    _counted: InFlight,
}

impl UpstreamBody {
    pub(super) fn new(stream: RecvStream, counted: InFlight) -> Self {
        Self { stream, data_ended: false, _counted: counted }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        if !self.data_ended {
            if let Some(data) = ready!(self.stream.poll_data(context)) {
                let taken =
                    data.and_then(|data| self.stream.flow_control().release_capacity(data.len()).map(|()| data));
                return Poll::Ready(Some(taken.map(Frame::data).map_err(UpstreamError::of)));
            }
            self.data_ended = true;
        }
        let trailers = ready!(self.stream.poll_trailers(context)).map_err(UpstreamError::of);
        Poll::Ready(trailers.transpose().map(|trailers| trailers.map(Frame::trailers)))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}
