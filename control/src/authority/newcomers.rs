//! The port for those who have a token and no certificate yet.
//!
//! The rule: nobody here is known, so each thing that a caller chooses is small and bounded: connections of an address
//! and of all, calls of a connection, its time. Of what the authority does only what a token proves is done.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use spillway_core::limit::{Class, Decision, Gcra, Key, Rate, Reserves, Table, TableBounds};
use spillway_runtime::drain::Drain;
use spillway_runtime::tls::{Arrival, Arrivals, Handshakes};
use tokio::net::TcpListener;
use tonic::Status;
use tonic::codegen::Service as _;
use tonic::service::Routes;

use super::Authority;

/// Connections a second, and at once, of one address and of all. A handshake and a signature take about 2 ms.
const OF_ONE: (u64, u32) = (5, 50);
const OF_ALL: (u64, u32) = (50, 200);
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
        let limit = Limit::new();
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

/// How often connections are taken.
struct Limit {
    seed: RandomState,
    began: Instant,
    of_one: Gcra,
    of_all: Gcra,
    state: Mutex<State>,
}

struct State {
    addresses: Table,
    /// The bucket of addresses that found no room, and that of all.
    overflow: u64,
    all: u64,
}

impl Limit {
    fn new() -> Self {
        let bucket = |(tokens, burst): (u64, u32)| {
            let rate = Rate { tokens, per: Duration::from_secs(1) };
            Gcra::new(rate, burst, Reserves::default()).expect("a rate and a burst above 0")
        };
        let state = State { addresses: Table::new(TableBounds::default()), overflow: 0, all: 0 };
        Self {
            seed: RandomState::new(),
            began: Instant::now(),
            of_one: bucket(OF_ONE),
            of_all: bucket(OF_ALL),
            state: Mutex::new(state),
        }
    }

    fn admits(&self, from: IpAddr) -> bool {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let hash = u128::from(self.seed.hash_one(from)) << 64 | u128::from(self.seed.hash_one((from, 1)));
        let mut state = self.state.lock();
        let State { addresses, overflow, all } = &mut *state;
        let key = Key { hash, owner: 0 };
        let own = addresses.decide(key, &self.of_one, now, 1, Class::Critical, overflow);
        if !matches!(own.decision, Decision::Admitted { .. }) {
            return false;
        }
        match self.of_all.decide(*all, now, 1, Class::Critical) {
            Decision::Admitted { state, .. } => {
                *all = state;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_uses_up_its_own_connections_and_all_together_theirs() {
        let limit = Limit::new();
        let from = |last: u8| IpAddr::from([192, 0, 2, last]);
        let admitted = |last: u8| (0..100).filter(|_| limit.admits(from(last))).count();
        assert!((50..55).contains(&admitted(1)));
        assert!((50..55).contains(&admitted(2)), "another address has its own");
        let rest: usize = (3..100).map(admitted).sum();
        assert!((100..150).contains(&rest), "{rest}");
    }
}
