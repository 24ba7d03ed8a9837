//! The gRPC port of a control node: TLS, who may come in, HTTP/2 within bounds, the end of a connection.
//!
//! The rule: a connection is a verified peer from its first byte, and the peer is judged again for every call, before
//! its body is read: its certificate against the bundle of now, its role against the [`Door`] of the service that it
//! calls. Who is not trusted any more, or may call nothing at all, loses the connection too. Every count, size and
//! silence that a peer chooses has a bound here.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use spillway_core::identity::SpiffeId;
use spillway_runtime::audit::{Audit, Denial};
use spillway_runtime::drain::Drain;
use spillway_runtime::tls::{AcceptError, Arrival, Arrivals, Handshakes, Offer, Peer, Workload};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::metadata::MetadataValue;
use tonic::service::Routes;

use crate::metrics::{ByReason, ControlMetrics, Counted};

/// A node keeps one or two, an operator one; descriptors are for other things as well.
const CONNECTIONS: usize = 16_384;
/// Calls at once on one connection.
const STREAMS: u32 = 64;
const HEADER_LIST: u32 = 16 << 10;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const SEND_BUFFER: usize = 1 << 20;
/// A node that vanished is noticed after the sum of both.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a call for so long gives its slot back, also one that never began to speak HTTP/2.
const IDLE: Duration = Duration::from_secs(60);
/// A refused peer reads why before its connection ends: a GOAWAY at the heels of an answer can overtake it
/// within the peer's own process.
const READ_WHY: Duration = Duration::from_secs(1);
/// How long a connection that is to end may take to say goodbye.
const FAREWELL: Duration = Duration::from_secs(5);
/// Resets that we make, or that come before we accepted: more end the connection (CVE-2023-44487, CVE-2025-8671).
const RESETS: usize = 64;
/// The `spillway-error` code of a certificate that is refused.
const UNTRUSTED: &str = "untrusted-identity";

/// A service, and who may call it.
#[derive(Clone, Copy)]
pub struct Door {
    /// Its path, between slashes: `/spillway.control.v1.Intent/`.
    pub service: &'static str,
    /// What it is for, in the audit log.
    pub action: &'static str,
    /// Whether a node of the first identity lets the second one call.
    pub may_call: fn(&SpiffeId, &SpiffeId) -> bool,
}

/// A bound port; nothing is answered before [`Server::serve`].
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
}

/// What every connection needs.
#[derive(Clone)]
pub struct Guard {
    pub workload: Arc<Workload>,
    pub doors: Arc<[Door]>,
    pub metrics: ControlMetrics,
    pub audit: Audit,
    pub drain: Drain,
}

impl Server {
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(address).await? })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts until draining; connections go on until their calls end or the drain's time is over.
    pub async fn serve(self, routes: Routes, guard: Guard) {
        let routes = routes.prepare();
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        let arrivals = Arrivals::new(self.listener, Handshakes::default(), guard.drain.clone());
        let serve = |arrival| {
            let (routes, guard, slots) = (routes.clone(), guard.clone(), Arc::clone(&slots));
            tokio::spawn(async move { guard.connection(arrival, routes, &slots).await });
        };
        arrivals.serve(serve, |reason| guard.refused_connection(reason)).await;
    }
}

impl Guard {
    async fn connection(&self, arrival: Arrival, routes: Routes, slots: &Semaphore) {
        let address = arrival.address;
        let (accepted, _work) = match arrival.greet(&self.workload, Offer::H2).await {
            Ok(accepted) => accepted,
            Err(error) => {
                self.refused_connection(error.reason());
                tracing::debug!(reason = error.reason(), "connection refused");
                if let AcceptError::Peer(error) = error {
                    self.audit.denied(|| Denial {
                        code: UNTRUSTED.into(),
                        reason: Some(error.reason()),
                        address: Some(address),
                        ..Denial::default()
                    });
                }
                return;
            }
        };
        let Ok(_slot) = slots.try_acquire() else { return self.refused_connection("too-many-connections") };
        let _counted = Counted::new(&self.metrics.connections);
        let (calls, unwelcome) = (Calls::default(), Arc::new(Notify::new()));
        let guard = self.clone();
        let peer = accepted.peer;
        let service = service_fn({
            let (calls, unwelcome) = (calls.clone(), Arc::clone(&unwelcome));
            move |request: Request<Incoming>| {
                let (guard, peer, mut routes) = (guard.clone(), Arc::clone(&peer), routes.clone());
                let (call, unwelcome) = (calls.begin(), Arc::clone(&unwelcome));
                async move {
                    let response = guard.call(request, peer, address, &mut routes, &unwelcome).await;
                    // Open until the last of its answer, or its reset.
                    let held = move |frame: Frame<Bytes>| {
                        let _open = &call;
                        frame
                    };
                    Ok::<_, Infallible>(response.map(|body| Body::new(body.map_frame(held))))
                }
            }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(HEADER_LIST)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(RESETS)
            .max_local_error_reset_streams(RESETS)
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .serve_connection(TokioIo::new(accepted.stream), service);
        let mut connection = std::pin::pin!(connection);
        // How a connection ends is its peer's affair; what mattered of it was counted per call.
        let refused = async {
            unwelcome.notified().await;
            tokio::time::sleep(READ_WHY).await;
        };
        let unwelcome = tokio::select! {
            _ = connection.as_mut() => return,
            () = self.drain.draining() => false,
            () = calls.idle(IDLE) => false,
            () = refused => true,
        };
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            _ = connection.as_mut() => {}
            () = self.drain.stopped() => {}
            () = calls.idle(FAREWELL) => {}
            () = tokio::time::sleep(FAREWELL), if unwelcome => {}
        }
    }

    async fn call(
        &self,
        mut request: Request<Incoming>,
        peer: Arc<Peer>,
        address: SocketAddr,
        routes: &mut Routes,
        unwelcome: &Notify,
    ) -> Response<Body> {
        if let Err((code, reason)) = self.judge(&peer, request.uri().path()) {
            self.metrics.calls_refused.get_or_create(&ByReason { reason: code }).inc();
            self.audit.denied(|| Denial {
                id: Some(peer.id.to_string()),
                action: self.door(request.uri().path()).map(|door| door.action),
                code: code.into(),
                reason,
                address: Some(address),
                ..Denial::default()
            });
            if code == UNTRUSTED || !self.may_call_anything(&peer.id) {
                unwelcome.notify_one();
            }
            let mut status = Status::permission_denied("this identity may not call this");
            status.metadata_mut().insert("spillway-error", MetadataValue::from_static(code));
            return status.into_http();
        }
        request.extensions_mut().insert(peer);
        match routes.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }

    /// The code of a refusal, and what is wrong with the certificate.
    fn judge(&self, peer: &Peer, path: &str) -> Result<(), (&'static str, Option<&'static str>)> {
        let trusted = self.workload.still_trusted(peer, SystemTime::now());
        trusted.map_err(|error| (UNTRUSTED, Some(error.reason())))?;
        let allowed = match self.door(path) {
            Some(door) => (door.may_call)(&self.workload.id(), &peer.id),
            // Whoever has business here may hear that there is no such service.
            None => self.may_call_anything(&peer.id),
        };
        if allowed { Ok(()) } else { Err(("not-allowed", None)) }
    }

    fn door(&self, path: &str) -> Option<&Door> {
        self.doors.iter().find(|door| path.starts_with(door.service))
    }

    fn may_call_anything(&self, peer: &SpiffeId) -> bool {
        let own = self.workload.id();
        self.doors.iter().any(|door| (door.may_call)(&own, peer))
    }

    fn refused_connection(&self, reason: &'static str) {
        self.metrics.connections_refused.get_or_create(&ByReason { reason }).inc();
    }
}

/// How many calls of one connection are open.
#[derive(Clone, Debug, Default)]
struct Calls(Arc<watch::Sender<usize>>);

/// Open until dropped.
#[derive(Debug)]
struct OpenCall(Arc<watch::Sender<usize>>);

impl Calls {
    fn begin(&self) -> OpenCall {
        self.0.send_modify(|open| *open += 1);
        OpenCall(Arc::clone(&self.0))
    }

    /// Returns when no call has been open for so long.
    async fn idle(&self, time: Duration) {
        let mut open = self.0.subscribe();
        loop {
            // Fails only without a sender, and `self` is one.
            let _ = open.wait_for(|open| *open == 0).await;
            if tokio::time::timeout(time, open.changed()).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}
