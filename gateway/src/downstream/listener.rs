//! The door: own accept loop, own TLS, then Pingora.
//!
//! Each worker thread has its own socket on the one address (SO_REUSEPORT), so that a connection never
//! leaves its thread. The rule: a peer is identified before Pingora sees a byte of it; every wait has
//! an end; a connection ends when its certificate does.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use pingora_core::ErrorType;
use pingora_core::protocols::Stream;
use pingora_core::protocols::http::ServerSession;
use pingora_core::server::ShutdownWatch;
use socket2::{Domain, Protocol, Socket, Type};
use spillway_runtime::drain::{Drain, Work};
use spillway_runtime::telemetry::Chain;
use spillway_runtime::tls::{AcceptError, Arrival, Arrivals, Handshakes, Offer, Workload};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::audit::no_connection;
use crate::downstream::connection::{Connection, NextHead};
use crate::downstream::h2_connection;
use crate::edge::Edge;
use crate::exchange::Exchange;
use crate::shared::Shared;

/// What was asked to close may finish its answers within this.
const CLOSE_TIME: Duration = Duration::from_secs(5);
/// Waiting connections of one socket.
const BACKLOG: i32 = 1_024;
/// When we stop, an HTTP/1.1 connection may still bring a request within this: its answer says that it
/// was the last. HTTP/1.1 has no other farewell, and what is just being sent would meet a reset.
const LAST_REQUEST: Duration = Duration::from_secs(1);
/// The farthest that a timer is set; certificates are renewed long before.
const FAR: Duration = Duration::from_secs(365 * 86_400);

/// Binds one socket for each thread, all on the same address. Port 0 picks a free one.
pub fn bind(address: SocketAddr, threads: usize) -> std::io::Result<Vec<StdListener>> {
    let mut address = address;
    let mut sockets = Vec::with_capacity(threads);
    for _ in 0..threads {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = StdListener::from(socket);
        address = listener.local_addr()?;
        sockets.push(listener);
    }
    Ok(sockets)
}

/// What one worker thread accepts with.
pub struct Door {
    pub shared: Arc<Shared>,
    pub edge: Arc<Edge>,
    pub workload: Arc<Workload>,
    pub drain: Drain,
    /// Of all threads.
    pub places: Places,
}

/// Connections of all threads: those that are open, and those that are on their way to it.
#[derive(Clone, Default)]
pub struct Places {
    pub open: Arc<AtomicUsize>,
    pub handshakes: Handshakes,
}

/// Counts an open connection until it is dropped.
struct Place(Arc<Door>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.places.open.fetch_sub(1, Ordering::Relaxed);
        self.0.shared.metrics.connections.dec();
    }
}

impl Door {
    /// Accepts until draining begins.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let arrivals = Arrivals::new(listener, self.places.handshakes.clone(), self.drain.clone());
        let handle = |arrival| drop(tokio::spawn(self.clone().handle(arrival)));
        arrivals.serve(handle, |reason| self.shared.metrics.handshake_failed(reason)).await;
    }

    fn take_place(self: &Arc<Self>) -> Option<Place> {
        let before = self.places.open.fetch_add(1, Ordering::Relaxed);
        self.shared.metrics.connections.inc();
        let place = Place(self.clone());
        if before >= self.shared.limits.connections {
            self.shared.metrics.handshake_failed("too-many-connections");
            return None;
        }
        Some(place)
    }

    async fn handle(self: Arc<Self>, arrival: Arrival) {
        // The room that a handshake needs is given back when it is over.
        let Some((connection, _work, _place)) = Box::pin(self.greet(arrival)).await else { return };
        self.converse(connection).await;
    }

    /// Does the handshake. The connection has its place, and is work, until the other two are dropped.
    async fn greet(self: &Arc<Self>, arrival: Arrival) -> Option<(Box<Connection>, Work, Place)> {
        let address = arrival.address;
        let (accepted, work) = match arrival.greet(&self.workload, Offer::H2AndHttp1).await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%address, error = %Chain(&error), "no connection came to be");
                self.shared.metrics.handshake_failed(error.reason());
                if let AcceptError::Peer(error) = &error {
                    self.shared.audit.denied(|| no_connection(error, address));
                }
                return None;
            }
        };
        let place = self.take_place()?;
        let connection = Connection::new(accepted, address);
        let connection = connection.inspect_err(|error| tracing::error!(%error, "a connection could not be set up"));
        Some((Box::new(connection.ok()?), work, place))
    }

    /// Serves a connection to its end, or ends it: on drain, on request, or with its certificate.
    async fn converse(&self, connection: Box<Connection>) {
        let caller = connection.caller().clone();
        let (stop, stopping) = watch::channel(false);
        let serve = async {
            if connection.is_http2() {
                h2_connection::serve(&self.edge, connection, stopping).await;
            } else {
                self.converse_http1(connection, stopping).await;
            }
        };
        let draining = self.drain.draining();
        let stopped = self.drain.stopped();
        let left = caller.peer.not_after.duration_since(SystemTime::now()).unwrap_or_default().min(FAR);
        let end = sleep_until(Instant::now() + left);
        tokio::pin!(serve, draining, stopped, end);
        let mut closing = false;
        loop {
            tokio::select! {
                // What is served from now on is told of a drain that has begun already.
                biased;
                () = &mut draining, if !closing => {}
                () = caller.close.notified(), if !closing => end.as_mut().reset(Instant::now() + CLOSE_TIME),
                () = &mut end => {
                    if closing {
                        return;
                    }
                    end.as_mut().reset(Instant::now() + CLOSE_TIME);
                }
                () = &mut stopped => return,
                () = &mut serve => return,
            }
            closing = true;
            // Fails only when `serve` is over, which the next turn sees.
            let _ = stop.send(true);
        }
    }

    async fn converse_http1(&self, mut connection: Box<Connection>, mut stopping: ShutdownWatch) {
        loop {
            let stopped = async {
                let _ = stopping.wait_for(|stop| *stop).await;
                tokio::time::sleep(LAST_REQUEST).await;
            };
            let next = tokio::select! {
                next = connection.next_head() => next,
                () = stopped => return,
            };
            match next {
                NextHead::Ready => {}
                NextHead::Gone => return,
                NextHead::Fault(fault) => {
                    let caller = connection.caller().clone();
                    Exchange::record_fault(&self.shared, &caller, fault);
                    return connection.refuse(fault).await;
                }
            }
            let Some(stream) = self.answer_http1(connection, &stopping).await else { return };
            let Ok(back) = stream.into_any().downcast::<Connection>() else { return };
            connection = back;
            if !connection.is_between_requests() {
                return;
            }
        }
    }

    /// Has a request answered whose head was checked. Gives the connection back if it may bring another.
    async fn answer_http1(&self, connection: Box<Connection>, stopping: &ShutdownWatch) -> Option<Stream> {
        let mut session = ServerSession::new_http1(connection);
        match session.read_request().await {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => {
                if error.etype == ErrorType::InvalidHTTPHeader {
                    // The client may be gone already.
                    let _ = session.respond_error(400).await;
                }
                session.shutdown().await;
                return None;
            }
        }
        if *stopping.borrow() {
            session.set_keepalive(None);
        }
        // Between requests, and over HTTP/2, a connection's task has no room for one.
        Box::pin(self.edge.answer(&mut session)).await;
        // It was given this request's bytes alone, so that it has read nothing beyond them.
        session.finish().await.ok()?.map(|reusable| reusable.into_parts().0)
    }
}
