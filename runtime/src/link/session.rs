//! One stream, from the connection to its end.
//!
//! The rule: one push is taken at a time, aside, while heartbeats go on; nothing more is read meanwhile, so that what
//! waits stays at the sender. Whatever ends it, a push that was begun is taken to its end.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::uri::PathAndQuery;
use prost::Message as _;
use spillway_core::identity::ExpectedPeer;
use spillway_proto::control;
use spillway_proto::control::ack::{Document, Step};
use spillway_proto::control::from_node::Message as FromNode;
use spillway_proto::control::to_node::Message as ToNode;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use super::codec::Frames;
use super::refusal::{Reason, Refusal};
use super::{BEAT, Link, MOST_MESSAGE};
use crate::dial::{DialError, dial};
use crate::telemetry::Chain;

/// TCP, TLS and the answer to the call, each.
const OPENING: Duration = Duration::from_secs(3);
/// Three pulses missed, less what the third may be late: with connecting, another stream stands within 15 s.
const SILENCE: Duration = Duration::from_secs(12);
/// Messages that wait to be sent. A server that does not read loses its stream.
const QUEUE: usize = 256;
/// How long a last word may take to be read.
const FAREWELL: Duration = Duration::from_millis(500);

/// Why there is no stream any more. A retry is safe, at another server best.
#[derive(Debug)]
pub(super) enum Ended {
    Unreachable(DialError),
    /// The call was refused, or not answered.
    Refused(Status),
    NotAnswered,
    /// The server closed it.
    Closed(Option<Status>),
    /// A message was too large to be read.
    TooLarge,
    /// Nothing was heard for too long.
    Silent,
    /// The server does not read.
    Stuck,
    /// Our certificate, or whom we trust, changed: the stream is to prove it.
    Renewed,
}

impl Ended {
    /// As in labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Refused(_) => "refused",
            Self::NotAnswered => "not_answered",
            Self::Closed(_) => "closed",
            Self::TooLarge => "too_large",
            Self::Silent => "silent",
            Self::Stuck => "stuck",
            Self::Renewed => "renewed",
        }
    }

    pub fn was_open(&self) -> bool {
        !matches!(self, Self::Unreachable(_) | Self::Refused(_) | Self::NotAnswered)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(error) => Chain(error).fmt(f),
            Self::Refused(status) | Self::Closed(Some(status)) => {
                write!(f, "{}: {}: {}", self.reason(), status.code(), status.message())
            }
            _ => f.write_str(self.reason()),
        }
    }
}

/// A push that is being taken.
struct Taking {
    document: Document,
    version: u64,
    task: JoinHandle<Result<(), Refusal>>,
}

impl Link {
    /// Follows one server until the stream ends.
    pub(super) async fn session(&self, server: &str) -> Ended {
        let generation = self.workload.generation();
        let expected = ExpectedPeer::ControlOf { trust_domain: self.workload.id().trust_domain };
        let channel = match dial(&self.workload, expected, server, OPENING).await {
            Ok(channel) => channel,
            Err(error) => return Ended::Unreachable(error),
        };
        let (out, mut outgoing) = mpsc::channel(QUEUE);
        let build = env!("CARGO_PKG_VERSION").to_owned();
        let hello = control::Hello { serving: Some(self.serving.now()), build };
        if send(&out, FromNode::Hello(hello)).is_err() {
            return Ended::Stuck;
        }
        let outgoing = stream::poll_fn(move |context| outgoing.poll_recv(context));
        let incoming = match tokio::time::timeout(OPENING, follow(channel, outgoing)).await {
            Ok(Ok(incoming)) => incoming,
            Ok(Err(status)) => return Ended::Refused(status),
            Err(_) => return Ended::NotAnswered,
        };
        self.metrics.open.set(1);
        tracing::info!(server, "the control plane is followed");
        let mut taking = None;
        let ended = self.exchange(generation, out, incoming, &mut taking).await;
        if let Some(Taking { task, .. }) = taking {
            // Bounded by the disk. Told to nobody: the next stream's Hello says what came of it.
            let _ = task.await;
        }
        ended
    }

    async fn exchange(
        &self,
        generation: u64,
        out: mpsc::Sender<control::FromNode>,
        mut incoming: Streaming<Bytes>,
        taking: &mut Option<Taking>,
    ) -> Ended {
        let mut beats = tokio::time::interval_at(Instant::now() + BEAT, BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                message = incoming.message(), if taking.is_none() => {
                    heard = Instant::now();
                    match message {
                        Ok(Some(message)) => match self.hear(message, &out) {
                            Ok(begun) => *taking = begun,
                            Err(Stuck) => return Ended::Stuck,
                        },
                        Ok(None) => return Ended::Closed(None),
                        Err(status) if status.code() == Code::OutOfRange => {
                            self.refuse_unread(&status, out).await;
                            return Ended::TooLarge;
                        }
                        Err(status) => return Ended::Closed(Some(status)),
                    }
                }
                taken = taken(taking) => {
                    heard = Instant::now();
                    if self.answer(taken, &out).is_err() {
                        return Ended::Stuck;
                    }
                }
                _ = beats.tick() => {
                    if self.workload.generation() != generation {
                        return Ended::Renewed;
                    }
                    let traffic = self.traffic.as_ref().map(|source| source.since_last());
                    let answers = self.answers.as_ref().map(|since_last| since_last());
                    let heartbeat = control::Heartbeat { serving: Some(self.serving.now()), traffic, answers };
                    if send(&out, FromNode::Heartbeat(heartbeat)).is_err() {
                        return Ended::Stuck;
                    }
                }
                sightings = self.sightings.take() => {
                    if send(&out, FromNode::Sightings(control::Sightings { sightings })).is_err() {
                        return Ended::Stuck;
                    }
                }
                () = tokio::time::sleep_until(heard + SILENCE), if taking.is_none() => return Ended::Silent,
            }
        }
    }

    /// Begins to take a push, if this is one.
    fn hear(&self, message: Bytes, out: &mpsc::Sender<control::FromNode>) -> Result<Option<Taking>, Stuck> {
        let message = match control::ToNode::decode(message) {
            Ok(control::ToNode { message }) => message,
            Err(error) => {
                self.refuse(Refusal::new(Reason::Malformed, error), out)?;
                return Ok(None);
            }
        };
        let (intake, acks) = (self.intake.clone(), out.clone());
        let tell = move |document: Document, version: u64| {
            move |step: Step| {
                let ack = control::Ack { document: document.into(), version, step: step.into() };
                // Its stream may have ended; the next one begins with what is served.
                let _ = send(&acks, FromNode::Ack(ack));
            }
        };
        Ok(match message {
            // Of a later protocol, which must not depend on it.
            None => None,
            Some(ToNode::Delta(delta)) => {
                let (document, version) = (Document::Snapshot, delta.target);
                let tell = tell(document, version);
                let task = tokio::task::spawn_blocking(move || intake.lock().take_delta(delta, tell));
                Some(Taking { document, version, task })
            }
            Some(ToNode::Plan(plan)) => {
                let (document, version) = (Document::Plan, crate::plan::version_of(&plan));
                let tell = tell(document, version);
                let task = tokio::task::spawn_blocking(move || intake.lock().take_plan(plan, tell));
                Some(Taking { document, version, task })
            }
            Some(ToNode::Pulse(pulse)) => {
                self.metrics.heard();
                self.pulses.send_replace(pulse);
                None
            }
        })
    }

    fn answer(&self, taken: Taken, out: &mpsc::Sender<control::FromNode>) -> Result<(), Stuck> {
        let Taken { document, version, outcome } = taken;
        match outcome {
            Ok(()) => Ok(()),
            Err(refusal) => self.nack(document, version, refusal, out),
        }
    }

    fn nack(
        &self,
        document: Document,
        version: u64,
        refusal: Refusal,
        out: &mpsc::Sender<control::FromNode>,
    ) -> Result<(), Stuck> {
        let Refusal { reason, errors } = refusal;
        let (document, reason, serving) = (document.into(), reason.as_str().to_owned(), Some(self.serving.now()));
        send(out, FromNode::Nack(control::Nack { document, version, reason, errors, serving }))
    }

    /// Refuses a message that says not even what it is.
    fn refuse(&self, refusal: Refusal, out: &mpsc::Sender<control::FromNode>) -> Result<(), Stuck> {
        self.snapshots.tell_refused(refusal.reason.as_str(), &refusal.errors.join("; "));
        self.nack(Document::Snapshot, 0, refusal, out)
    }

    /// Refuses a message that was not read. The stream cannot go on behind it, so that this is its last word.
    async fn refuse_unread(&self, status: &Status, out: mpsc::Sender<control::FromNode>) {
        if self.refuse(Refusal::new(Reason::TooLarge, status.message()), &out).is_ok() {
            // The connection's own task takes it from the queue, and sends it.
            let sent = async {
                while out.capacity() < out.max_capacity() {
                    tokio::time::sleep(FAREWELL / 20).await;
                }
                tokio::time::sleep(FAREWELL / 20).await;
            };
            let _ = tokio::time::timeout(FAREWELL, sent).await;
        }
    }
}

/// What came of a push.
struct Taken {
    document: Document,
    version: u64,
    outcome: Result<(), Refusal>,
}

/// Waits for the push that is being taken; for ever if none is.
async fn taken(taking: &mut Option<Taking>) -> Taken {
    let Some(Taking { document, version, task }) = taking else { return std::future::pending().await };
    let lost = |_| Err(Refusal::new(Reason::Invalid, "it could not be judged"));
    let outcome = task.await.unwrap_or_else(lost);
    let taken = Taken { document: *document, version: *version, outcome };
    *taking = None;
    taken
}

/// The queue is full, or nobody takes from it.
struct Stuck;

fn send(out: &mpsc::Sender<control::FromNode>, message: FromNode) -> Result<(), Stuck> {
    out.try_send(control::FromNode { message: Some(message) }).map_err(|_| Stuck)
}

async fn follow(
    channel: Channel,
    outgoing: impl Stream<Item = control::FromNode> + Send + 'static,
) -> Result<Streaming<Bytes>, Status> {
    let mut grpc = Grpc::new(channel).max_decoding_message_size(MOST_MESSAGE);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let method = PathAndQuery::from_static("/spillway.control.v1.Distribution/Follow");
    Ok(grpc.streaming(Request::new(outgoing), method, Frames).await?.into_inner())
}
