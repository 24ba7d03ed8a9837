//! The leader's end.
//!
//! The rule: a node speaks for itself, and is believed and told as long as its certificate is. What it says and what it
//! is told are one stream, which ends as a whole: with either of them, with the leadership, and when nothing more is
//! heard of it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::{Stream, StreamExt, stream};
use spillway_core::identity::SpiffeId;
use spillway_proto::control::evidence_server::{Evidence, EvidenceServer};
use spillway_proto::control::{Heard, Sightings};
use spillway_runtime::tls::{Peer, Workload};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};

use super::{BEAT, SILENCE, encode};
use crate::distribution::Report;
use crate::leading::Leading;

/// Control nodes that follow at a time.
const MOST: usize = 64;

type Outgoing = Pin<Box<dyn Stream<Item = Result<Heard, Status>> + Send>>;

/// The tonic service. Each request needs an `Arc<Peer>` among its extensions: whom the connection is with.
pub struct Service {
    workload: Arc<Workload>,
    leading: Arc<Leading>,
    reports: mpsc::Sender<Report>,
    shared: broadcast::Sender<Arc<Report>>,
    places: Arc<Semaphore>,
}

impl Service {
    /// `reports`: where what followers saw goes. `shared`: what they are told.
    pub fn new(
        workload: Arc<Workload>,
        leading: Arc<Leading>,
        reports: mpsc::Sender<Report>,
        shared: broadcast::Sender<Arc<Report>>,
    ) -> Self {
        Self { workload, leading, reports, shared, places: Arc::new(Semaphore::new(MOST)) }
    }

    pub fn into_server(self) -> EvidenceServer<Self> {
        EvidenceServer::new(self)
    }

    /// Ends when this election does.
    fn over(&self, epoch: u64) -> impl Future<Output = ()> + Send + 'static {
        let mut fences = self.leading.fences();
        async move {
            // An error is the end of the process.
            let _ = fences.wait_for(|fence| fence.as_ref().is_none_or(|fence| fence.epoch != epoch)).await;
        }
    }
}

#[tonic::async_trait]
impl Evidence for Service {
    type ShareStream = Outgoing;

    async fn share(&self, request: Request<Streaming<Sightings>>) -> Result<Response<Outgoing>, Status> {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("there is no certificate"))?;
        let fence = self.leading.fence().ok_or_else(|| Status::unavailable("another node leads, or none yet"))?;
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| Status::resource_exhausted("there are too many control nodes"))?;
        let ended = CancellationToken::new();
        let told = Told {
            shared: self.shared.subscribe(),
            beats: beats(),
            node: peer.id.clone(),
            _ended: ended.clone().drop_guard(),
            _place: place,
        };
        let (workload, reports) = (self.workload.clone(), self.reports.clone());
        let hearing = Hearing { workload, peer, reports, ended: ended.clone() };
        // Ends with the answer, with the leadership or by itself; and the answer with it.
        tokio::spawn(hearing.run(request.into_inner(), self.over(fence.epoch)));
        let told = stream::unfold(told, |mut told| async move { Some((Ok(told.next().await?), told)) });
        Ok(Response::new(Box::pin(told.take_until(ended.cancelled_owned()))))
    }
}

/// What a follower says.
struct Hearing {
    workload: Arc<Workload>,
    peer: Arc<Peer>,
    reports: mpsc::Sender<Report>,
    /// The stream did, as a whole.
    ended: CancellationToken,
}

impl Hearing {
    async fn run(self, incoming: Streaming<Sightings>, over: impl Future<Output = ()>) {
        let node = &self.peer.id;
        Report::Joined(node.clone()).give(&self.reports).await;
        tokio::select! {
            why = self.listen(incoming) => tracing::info!(%node, why, "a control node is not heard any more"),
            () = over => {}
            () = self.ended.cancelled() => {}
        }
        self.ended.cancel();
        Report::Left(node.clone()).give(&self.reports).await;
    }

    /// Takes what it says until it says nothing more, or is not believed any more; why.
    async fn listen(&self, mut incoming: Streaming<Sightings>) -> String {
        let (mut heard, mut beats) = (Instant::now(), beats());
        loop {
            let message = tokio::select! {
                message = incoming.message() => Some(message),
                _ = beats.tick() => None,
                () = tokio::time::sleep_until(heard + SILENCE) => {
                    return format!("it was silent for {} s", SILENCE.as_secs());
                }
            };
            if let Err(error) = self.workload.still_trusted(&self.peer, SystemTime::now()) {
                return error.to_string();
            }
            let Some(message) = message else { continue };
            heard = Instant::now();
            match message {
                Ok(Some(Sightings { sightings })) if sightings.is_empty() => {}
                Ok(Some(Sightings { sightings })) => {
                    Report::Sightings(self.peer.id.clone(), sightings).give(&self.reports).await;
                }
                Ok(None) => return "it closed the stream".into(),
                Err(status) => return format!("{}: {}", status.code(), status.message()),
            }
        }
    }
}

/// What a follower is told.
struct Told {
    shared: broadcast::Receiver<Arc<Report>>,
    beats: Interval,
    /// Of whom it knows better.
    node: SpiffeId,
    /// Nobody reads it any more: then nothing is heard either.
    _ended: DropGuard,
    _place: OwnedSemaphorePermit,
}

impl Told {
    async fn next(&mut self) -> Option<Heard> {
        loop {
            tokio::select! {
                report = self.shared.recv() => match report {
                    Ok(report) if *report.node() != self.node => return Some(encode(&report)),
                    // It is slow, and there is newer.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                },
                _ = self.beats.tick() => return Some(Heard::default()),
            }
        }
    }
}

fn beats() -> Interval {
    let mut beats = tokio::time::interval(BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beats
}
