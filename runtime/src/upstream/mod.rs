//! The way to one server: a few h2 connections, over mTLS unless it is beside us, and many calls on each.
//!
//! The rule: an error says whether the server may have seen the call, so that the one retry layer above
//! can judge. There is no retry here: a connection is looked at before each call, and one that closes gets no
//! more of them. Dropping a call resets its stream.
//!
//! ```text
//! none --call--> connecting --handshake--> ready --closed, GOAWAY, new generation--> none
//!                    |--failed--> resting --its time is over--> none
//! ```

mod body;
mod connection;
mod error;
mod way;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use h2::client::ResponseFuture;
use http::uri::{Authority, PathAndQuery};
use http::{Request, Response, Uri};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use spillway_core::identity::ExpectedPeer;
use tokio::time::Instant;

pub use body::{Aborted, OipBody, OipSender, UpstreamBody};
pub use error::{ConnectError, UpstreamError};
pub use way::Beside;

use crate::telemetry::Metrics;
use crate::tls::Workload;
use connection::Slot;
use way::Way;

/// Each field's default is [`UpstreamSettings::default`]'s.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// Connections kept at a time. Default 1.
    pub connections: usize,
    /// TCP and TLS together. Default 1 s.
    pub connect_timeout: Duration,
    /// What a stream may receive unread. Default 4 MiB.
    pub stream_window: u32,
    /// What a connection may receive unread. Default 16 MiB.
    pub connection_window: u32,
    /// How often a silent peer is pinged. Default 5 s; none: never.
    pub ping_every: Option<Duration>,
    /// How long a ping may take before the peer counts as gone. Default 3 s.
    pub ping_timeout: Duration,
    /// The first rest after a failed connect; it doubles. Default 50 ms.
    pub rest: Duration,
    /// The longest rest. Default 1 s: one attempt per second costs the server next to nothing.
    pub longest_rest: Duration,
}

impl Default for UpstreamSettings {
    fn default() -> Self {
        Self {
            connections: 1,
            connect_timeout: Duration::from_secs(1),
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            ping_every: Some(Duration::from_secs(5)),
            ping_timeout: Duration::from_secs(3),
            rest: Duration::from_millis(50),
            longest_rest: Duration::from_secs(1),
        }
    }
}

/// Counts over all upstreams of a process.
#[derive(Clone, Debug, Default)]
pub struct UpstreamMetrics {
    connects: Family<Outcome, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl UpstreamMetrics {
    /// Shows `spillway_upstream_connects_total{outcome}`.
    pub fn register(metrics: &Metrics) -> Self {
        Self { connects: metrics.family("upstream_connects", "Connects to upstreams, by what became of them") }
    }

    fn connected(&self, outcome: &'static str) {
        self.connects.get_or_create(&Outcome { outcome }).inc();
    }
}

/// Cheap to clone; all clones are the same upstream.
#[derive(Clone, Debug)]
pub struct Upstream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    way: Way,
    authority: Authority,
    settings: UpstreamSettings,
    metrics: UpstreamMetrics,
    slots: Vec<Slot>,
    next: AtomicUsize,
    in_flight: AtomicUsize,
    /// Of the last TCP connect for mTLS, in microseconds; 0: there was none.
    round_trip_us: AtomicU64,
}

impl Upstream {
    /// A server at this address that must be `expected`. Connects with the first call.
    pub fn new(workload: Arc<Workload>, address: SocketAddr, expected: impl Into<ExpectedPeer>) -> Self {
        Self::with(workload, address, expected, UpstreamSettings::default(), UpstreamMetrics::default())
    }

    pub fn with(
        workload: Arc<Workload>,
        address: SocketAddr,
        expected: impl Into<ExpectedPeer>,
        settings: UpstreamSettings,
        metrics: UpstreamMetrics,
    ) -> Self {
        Self::by(Way::Mutual { workload, address, expected: expected.into() }, settings, metrics)
    }

    /// A server beside us. Connects with the first call.
    pub fn beside(server: Beside, settings: UpstreamSettings, metrics: UpstreamMetrics) -> Self {
        Self::by(Way::Beside(server), settings, metrics)
    }

    fn by(way: Way, settings: UpstreamSettings, metrics: UpstreamMetrics) -> Self {
        let slots = (0..settings.connections.max(1)).map(|_| Slot::default()).collect();
        Self(Arc::new(Inner {
            authority: way.authority(),
            way,
            settings,
            metrics,
            slots,
            next: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            round_trip_us: AtomicU64::new(0),
        }))
    }

    /// Who the server must be; anybody beside us.
    pub fn expected(&self) -> Option<&ExpectedPeer> {
        match &self.0.way {
            Way::Mutual { expected, .. } => Some(expected),
            Way::Beside(_) => None,
        }
    }

    /// Calls that have begun and whose answers' bodies are not dropped yet.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.load(Ordering::Relaxed)
    }

    /// Whether a call would fail at once: the last connect did, and no other is begun yet.
    pub fn is_resting(&self) -> bool {
        self.0.slots.iter().all(Slot::is_resting)
    }

    /// To the server's host and back, as the last connect measured it; none beside us.
    pub fn round_trip(&self) -> Option<Duration> {
        let micros = self.0.round_trip_us.load(Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros))
    }

    /// Counts as a call until dropped: for work that is decided on but not called yet.
    pub fn hold(&self) -> InFlight {
        self.0.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(self.0.clone())
    }

    /// Sends a request and waits for the head of its answer. Scheme and authority are filled in where
    /// they are missing. Not bounded in time beyond the connect: drop it, or use [`Upstream::call_by`].
    pub async fn call(&self, request: Request<OipBody>) -> Result<Response<UpstreamBody>, UpstreamError> {
        let (sender, request) = (self.0.sender(), self.0.complete(request));
        let counted = self.hold();
        Inner::send(sender.await?, request, counted, None).await
    }

    /// Like [`Upstream::call`], until a deadline. The deadline bounds the head of the answer, not its
    /// body.
    pub async fn call_by(
        &self,
        request: Request<OipBody>,
        deadline: std::time::Instant,
    ) -> Result<Response<UpstreamBody>, UpstreamError> {
        let deadline = Instant::from_std(deadline);
        let request = self.0.complete(request);
        let counted = self.hold();
        let sender = within(Some(deadline), false, self.0.sender()).await?;
        Inner::send(sender, request, counted, Some(deadline)).await
    }

    /// Connects if there is no connection: for a health check or to be warm before the first call.
    pub async fn connect(&self) -> Result<(), UpstreamError> {
        self.0.sender().await.map(drop)
    }

    /// The next calls go over connections of their own; streams on those that are open go on to their ends.
    pub fn forget(&self) {
        self.0.slots.iter().for_each(Slot::forget);
    }

    /// Returns when one of the connections that are open now has ended, whoever ended it; at once if none is open.
    pub async fn ended(&self) {
        let mut open: FuturesUnordered<_> = self
            .0
            .slots
            .iter()
            .filter_map(Slot::ended)
            // An error says that the other side is gone, which is what is waited for.
            .map(|mut ended| async move { while ended.changed().await.is_ok() {} })
            .collect();
        open.next().await;
    }
}

impl Inner {
    async fn send(
        sender: connection::Sender,
        request: Request<OipBody>,
        counted: InFlight,
        deadline: Option<Instant>,
    ) -> Result<Response<UpstreamBody>, UpstreamError> {
        let answered = Self::begin(sender, request)?;
        let answered = async { answered.await.map_err(UpstreamError::of) };
        let response = within(deadline, true, answered).await?;
        Ok(response.map(|stream| UpstreamBody::new(stream, counted)))
    }

    /// Hands a call to the connection. If that has just closed, nothing was sent.
    fn begin(mut sender: connection::Sender, request: Request<OipBody>) -> Result<ResponseFuture, UpstreamError> {
        let (head, body) = request.into_parts();
        let sent = sender.send_request(Request::from_parts(head, ()), body.is_empty());
        let (answered, stream) = sent.map_err(|_| UpstreamError::Refused)?;
        if !body.is_empty() {
            body.send(stream).map_err(UpstreamError::of)?;
        }
        Ok(answered)
    }

    fn complete(&self, mut request: Request<OipBody>) -> Request<OipBody> {
        if request.uri().authority().is_none() {
            let mut parts = std::mem::take(request.uri_mut()).into_parts();
            parts.scheme = Some(self.way.scheme());
            parts.authority = Some(self.authority.clone());
            parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
            // All three parts are there, which is all that can be wrong.
            *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        }
        request
    }
}

async fn within<T>(
    deadline: Option<Instant>,
    sent: bool,
    work: impl Future<Output = Result<T, UpstreamError>>,
) -> Result<T, UpstreamError> {
    match deadline {
        Some(deadline) => {
            tokio::time::timeout_at(deadline, work).await.unwrap_or(Err(UpstreamError::Deadline { sent }))
        }
        None => work.await,
    }
}

/// One call that counts for [`Upstream::in_flight`] until dropped.
#[derive(Debug)]
#[must_use = "the call stops counting when this is dropped"]
pub struct InFlight(Arc<Inner>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
