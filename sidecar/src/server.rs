//! The port of this pod: TLS, who may come in, HTTP/2 within bounds, the end of a connection.
//!
//! The rule: a connection is a verified peer from its first byte, and the peer is judged again for
//! every call, before its body is read: its certificate against the bundle of now, its role against the
//! service it calls. Who is not trusted any more, or may call nothing at all, loses the connection too.
//! Every count, size and silence that a peer chooses has a bound here.

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
use spillway_core::identity::{Role, SpiffeId};
use spillway_runtime::audit::Audit;
use spillway_runtime::drain::Drain;
use spillway_runtime::tls::{AcceptError, Arrival, Arrivals, Handshakes, Offer, Peer, Workload};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::service::Routes;

use crate::audit::{denial, no_connection};
use crate::failure::Failure;
use crate::feature_service::may_call as may_call_features;
use crate::load::Load;
use crate::metrics::{ByRefusal, Counted, SidecarMetrics};
use crate::service::text;

/// Gateways of one region keep a few connections each.
const CONNECTIONS: usize = 1_024;
/// A large tensor in few frames: at h2's own 16 KiB each costs its reader and its writer a call of the kernel.
const FRAME: u32 = 64 << 10;
/// Calls at once on one connection; more wait at the gateway.
const STREAMS: u32 = 1_024;
const HEADER_LIST: u32 = 16 << 10;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const SEND_BUFFER: usize = 1 << 20;
/// A gateway that vanished is noticed after the sum of both.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a call for so long gives its slot back, also one that never began to speak HTTP/2.
/// Gateways ask for our health each second.
const IDLE: Duration = Duration::from_secs(60);
/// A refused peer reads why before its connection ends: a GOAWAY at the heels of an answer can overtake it
/// within the peer's own process.
const READ_WHY: Duration = Duration::from_secs(1);
/// How long a connection that is to end may take to say goodbye.
const FAREWELL: Duration = Duration::from_secs(5);
/// Resets that we make, or that come before we accepted: more end the connection (CVE-2023-44487, CVE-2025-8671).
const RESETS: usize = 64;

/// Its answers say how busy this pod is.
const MODEL_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
/// Its peers are others than those of inference.
const FEATURE_SERVICE: &str = "/spillway.feature.v1.FeatureService/";

/// A bound port; nothing is answered before [`Server::serve`].
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
}

/// What every connection needs.
#[derive(Clone)]
pub struct Guard {
    pub workload: Arc<Workload>,
    pub load: Arc<Load>,
    pub metrics: SidecarMetrics,
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
                    self.audit.denied(|| no_connection(error, address));
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
                    let (response, load) = guard.call(request, peer, address, &mut routes, &unwelcome).await;
                    // Open until the last of its answer, or its reset.
                    let held = move |mut frame: Frame<Bytes>| {
                        let _open = &call;
                        if let (Some(load), Some(trailers)) = (&load, frame.trailers_mut()) {
                            load.report_in(trailers);
                        }
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
            .max_frame_size(FRAME)
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

    /// The answer, and what its trailers are to say of the load.
    async fn call(
        &self,
        mut request: Request<Incoming>,
        peer: Arc<Peer>,
        address: SocketAddr,
        routes: &mut Routes,
        unwelcome: &Notify,
    ) -> (Response<Body>, Option<Arc<Load>>) {
        if let Err(failure) = self.judge(&peer, request.uri().path()) {
            self.metrics.calls_refused.get_or_create(&ByRefusal { reason: failure.code() }).inc();
            let action = if request.uri().path().starts_with(FEATURE_SERVICE) { "features" } else { "infer" };
            self.audit.denied(|| {
                let request_id = text(request.headers(), "x-request-id");
                denial(&peer.id, &failure, action, &request_id, Some(address))
            });
            if matches!(failure, Failure::Untrusted(_)) || !may_call_anything(&self.workload.id(), &peer.id) {
                unwelcome.notify_one();
            }
            return (failure.status().into_http(), None);
        }
        let load = (request.uri().path() == MODEL_INFER).then(|| Arc::clone(&self.load));
        request.extensions_mut().insert(peer);
        let mut response = match routes.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        // An error has no other trailers than its head.
        if let Some(load) = load.as_ref().filter(|_| response.headers().contains_key(Status::GRPC_STATUS)) {
            load.report_in(response.headers_mut());
        }
        (response, load)
    }

    fn judge(&self, peer: &Peer, path: &str) -> Result<(), Failure> {
        self.workload.still_trusted(peer, SystemTime::now()).map_err(Failure::Untrusted)?;
        let own = self.workload.id();
        if path.starts_with(FEATURE_SERVICE) {
            return if may_call_features(&own, &peer.id) { Ok(()) } else { Err(Failure::NotForFeatures) };
        }
        if is_own_gateway(&own, &peer.id) { Ok(()) } else { Err(Failure::NotAGateway) }
    }

    fn refused_connection(&self, reason: &'static str) {
        self.metrics.connections_refused.get_or_create(&ByRefusal { reason }).inc();
    }
}

/// Whether the peer is a gateway of our own region and trust domain.
fn is_own_gateway(own: &SpiffeId, peer: &SpiffeId) -> bool {
    match (&own.role, &peer.role) {
        (Role::Sidecar { region: own_region, .. }, Role::Gateway { region, .. }) => {
            own.trust_domain == peer.trust_domain && own_region == region
        }
        _ => false,
    }
}

fn may_call_anything(own: &SpiffeId, peer: &SpiffeId) -> bool {
    is_own_gateway(own, peer) || may_call_features(own, peer)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_idle_when_no_call_was_open_for_the_time() {
        let (calls, time) = (Calls::default(), Duration::from_millis(50));
        let began = std::time::Instant::now();
        let call = calls.begin();
        let idle = calls.idle(time);
        let end = async {
            tokio::time::sleep(2 * time).await;
            drop((calls.begin(), call));
        };
        tokio::join!(idle, end);
        assert!(began.elapsed() >= 3 * time, "{:?}", began.elapsed());
    }

    #[test]
    fn only_gateways_of_the_own_region_and_trust_domain_may_call() {
        let own = SpiffeId::parse("spiffe://spillway.test/region/eu/sidecar/scorers/pod-0").unwrap();
        let is = |id: &str| is_own_gateway(&own, &SpiffeId::parse(id).unwrap());
        assert!(is("spiffe://spillway.test/region/eu/gateway/gw-0"));
        for other in [
            "spiffe://spillway.test/region/us/gateway/gw-0",
            "spiffe://other.test/region/eu/gateway/gw-0",
            "spiffe://spillway.test/region/eu/sidecar/scorers/pod-1",
            "spiffe://spillway.test/region/eu/control/c-0",
            "spiffe://spillway.test/tenant/acme/client/web",
        ] {
            assert!(!is(other), "{other}");
        }
    }
}
