//! The port of this pod: TLS, who may come in, HTTP/2 within bounds, the end of a connection.
//!
//! The rule: a connection is a verified peer from its first byte, and the peer is judged again for
//! every call: its certificate against the bundle of now, its role against the service it calls. Every
//! count and size that a peer chooses has a bound here.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use spillway_core::identity::{Role, SpiffeId};
use spillway_runtime::drain::Drain;
use spillway_runtime::tls::{Offer, Peer, Workload, accept};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::service::Routes;

use crate::failure::Failure;
use crate::metrics::{ByRefusal, Counted, SidecarMetrics};

/// Gateways of one region keep a few connections each.
const CONNECTIONS: usize = 1_024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls at once on one connection; more wait at the gateway.
const STREAMS: u32 = 1_024;
const HEADER_LIST: u32 = 16 << 10;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const SEND_BUFFER: usize = 1 << 20;
/// A gateway that vanished is noticed after the sum of both.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Resets that we make, or that come before we accepted: more end the connection (CVE-2023-44487, CVE-2025-8671).
const RESETS: usize = 64;

/// Service paths that judge their peer themselves.
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
    pub metrics: SidecarMetrics,
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
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = guard.drain.draining() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                guard.refused_connection("too-many-connections");
                continue;
            };
            let (routes, guard) = (routes.clone(), guard.clone());
            tokio::spawn(async move {
                guard.connection(stream, routes).await;
                drop(slot);
            });
        }
    }
}

impl Guard {
    async fn connection(&self, stream: TcpStream, routes: Routes) {
        // Refused only by a socket that is closed already; the handshake then says so.
        let _ = stream.set_nodelay(true);
        let accepted = match accept(&self.workload, stream, Offer::H2, HANDSHAKE_TIMEOUT).await {
            Ok(accepted) => accepted,
            Err(error) => {
                self.refused_connection(error.reason());
                tracing::debug!(reason = error.reason(), "connection refused");
                return;
            }
        };
        let _work = self.drain.work();
        let _counted = Counted::new(&self.metrics.connections);
        let guard = self.clone();
        let peer = accepted.peer;
        let service = service_fn(move |request: Request<Incoming>| {
            let (guard, peer, mut routes) = (guard.clone(), Arc::clone(&peer), routes.clone());
            async move { Ok::<_, Infallible>(guard.call(request, peer, &mut routes).await) }
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
        tokio::select! {
            _ = connection.as_mut() => return,
            () = self.drain.draining() => connection.as_mut().graceful_shutdown(),
        }
        tokio::select! {
            _ = connection.as_mut() => {}
            () = self.drain.stopped() => {}
        }
    }

    async fn call(&self, mut request: Request<Incoming>, peer: Arc<Peer>, routes: &mut Routes) -> Response<Body> {
        if let Err(failure) = self.judge(&peer, request.uri().path()) {
            self.metrics.calls_refused.get_or_create(&ByRefusal { reason: failure.code() }).inc();
            return failure.status().into_http();
        }
        request.extensions_mut().insert(peer);
        match routes.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }

    fn judge(&self, peer: &Peer, path: &str) -> Result<(), Failure> {
        self.workload.still_trusted(peer, SystemTime::now()).map_err(Failure::Untrusted)?;
        if path.starts_with(FEATURE_SERVICE) || is_own_gateway(&self.workload.id(), &peer.id) {
            return Ok(());
        }
        Err(Failure::NotAGateway)
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

#[cfg(test)]
mod tests {
    use super::*;

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
