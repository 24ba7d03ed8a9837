//! The port for those who have a token and no certificate yet.
//!
//! The rule: nobody here is known, so each thing that a caller chooses is small and bounded: connections of an address
//! and of all, calls of a connection, its time. Of what the authority does only what a token proves is done.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use spillway_runtime::drain::Drain;
use spillway_runtime::tls::{Arrival, Arrivals, Handshakes};
use tokio::net::TcpListener;
use tonic::Status;
use tonic::codegen::Service as _;
use tonic::service::Routes;

use super::Authority;
use super::limit::{Limit, Pace};

/// Connections of one address and of all. A handshake and a signature take about 2 ms.
const OF_ONE: Pace = Pace { a_second: 5, at_once: 50 };
const OF_ALL: Pace = Pace { a_second: 50, at_once: 200 };
/// Who has a token calls once.
const CALLS: usize = 4;
const STREAMS: u32 = 4;
const HEADER_LIST: u32 = 16 << 10;
const WINDOW: u32 = 64 << 10;
/// How long a connection may be open.
const LONGEST: Duration = Duration::from_secs(10);

/// A bound port; nothing is answered before [`Newcomers::serve`].
#[derive(Debug)]
pub struct Newcomers {
    listener: TcpListener,
}

impl Newcomers {
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(address).await? })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts until draining.
    pub async fn serve(self, authority: Arc<Authority>, drain: Drain) {
        let routes = Routes::new(authority.service()).prepare();
        let limit = Limit::new(OF_ONE, OF_ALL);
        let arrivals = Arrivals::new(self.listener, Handshakes::default(), drain.clone());
        let refused = |reason| authority.metrics.connection_refused(reason);
        let serve = |arrival: Arrival| {
            if !limit.admits(arrival.holder()) {
                return refused("limited");
            }
            tokio::spawn(connection(authority.clone(), arrival, routes.clone(), drain.clone()));
        };
        arrivals.serve(serve, refused).await;
    }
}

async fn connection(authority: Arc<Authority>, arrival: Arrival, routes: Routes, drain: Drain) {
    let address = arrival.address;
    let (stream, _place) = match arrival.greet_newcomer(&authority.workload).await {
        Ok(greeted) => greeted,
        Err(error) => return authority.metrics.connection_refused(error.reason()),
    };
    let calls = Arc::new(AtomicUsize::new(0));
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (mut routes, calls) = (routes.clone(), calls.clone());
        async move {
            if calls.fetch_add(1, Ordering::Relaxed) >= CALLS {
                return Ok::<_, Infallible>(Status::resource_exhausted("busy").into_http());
            }
            request.extensions_mut().insert(address);
            routes.call(request).await
        }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADER_LIST)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_pending_accept_reset_streams(CALLS)
        .max_local_error_reset_streams(CALLS)
        .serve_connection(TokioIo::new(stream), service);
    // How it ends is its caller's affair: what mattered of it was counted.
    tokio::select! {
        _ = connection => {}
        () = tokio::time::sleep(LONGEST) => {}
        () = drain.stopped() => {}
    }
}
