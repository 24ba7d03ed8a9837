//! Connections as they arrive at a server, until it drains.
//!
//! ```text
//! backlog --next()--> Arrival (a handshake under way) --greet()--> Accepted, counted as work
//! ```
//!
//! The rule: who has not proved who they are takes no place of those who have. Handshakes have their own
//! bound, and one address a share of it. What the kernel had accepted before the drain is served: its
//! client was told that the connection is there. It does not count what is open; its caller does.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use super::accept::{AcceptError, Accepted, Offer, accept};
use super::newcomer::greet_newcomer;
use super::workload::Workload;
use crate::drain::{Drain, Work};

/// A handshake must be done after this.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Handshakes under way. A silent peer holds one for 5 s, an honest one for a few milliseconds.
const HANDSHAKES: usize = 1_024;
/// Of these one address has at most an eighth: much for a NAT, and no address has them all.
const SHARE: usize = HANDSHAKES / 8;
/// The backlog is empty when nothing came out of it for so long.
const QUIET: Duration = Duration::from_millis(50);
/// But a drain is not held up by new connections for longer than this.
const LAST_CALL: Duration = Duration::from_secs(1);
/// How long accepting rests when the process has no file descriptors left.
const REST: Duration = Duration::from_millis(100);

/// The handshakes under way of one process. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Handshakes(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// Counts until dropped.
#[derive(Debug)]
struct Handshake {
    of: Handshakes,
    from: IpAddr,
}

impl Handshakes {
    fn begin(&self, from: IpAddr) -> Option<Handshake> {
        let from = holder(from);
        let mut counts = self.0.lock();
        if counts.all >= HANDSHAKES {
            return None;
        }
        let own = counts.by_address.entry(from).or_default();
        if *own >= SHARE {
            return None;
        }
        *own += 1;
        counts.all += 1;
        Some(Handshake { of: self.clone(), from })
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut counts = self.of.0.lock();
        counts.all -= 1;
        if let Some(own) = counts.by_address.get_mut(&self.from) {
            *own -= 1;
            if *own == 0 {
                counts.by_address.remove(&self.from);
            }
        }
    }
}

/// Whom an address belongs to: of IPv6 a network of 64 bits is one subscriber's.
fn holder(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
        v4 => v4,
    }
}

/// The connections of one listener.
pub struct Arrivals {
    listener: TcpListener,
    handshakes: Handshakes,
    drain: Drain,
    /// The drain is not over while the backlog is not empty.
    accepting: Work,
}

/// A connection whose peer is not known yet.
#[derive(Debug)]
pub struct Arrival {
    stream: TcpStream,
    pub address: SocketAddr,
    work: Work,
    handshake: Handshake,
}

/// A connection with somebody unknown: work, and a place.
#[derive(Debug)]
#[must_use = "the connection stops counting when this is dropped"]
pub struct Unknown {
    _work: Work,
    _handshake: Handshake,
}

impl Arrivals {
    pub fn new(listener: TcpListener, handshakes: Handshakes, drain: Drain) -> Self {
        let accepting = drain.work();
        Self { listener, handshakes, drain, accepting }
    }

    /// Calls `serve` for each connection, until the drain has begun and the backlog is empty; then the
    /// port is closed. `refused` is told why a connection was dropped.
    pub async fn serve(self, mut serve: impl FnMut(Arrival), mut refused: impl FnMut(&'static str)) {
        let Self { listener, handshakes, drain, accepting } = self;
        let (draining, stopped) = (drain.draining(), drain.stopped());
        tokio::pin!(draining, stopped);
        let mut last_call: Option<Instant> = None;
        loop {
            let quiet = async {
                match last_call {
                    Some(end) => tokio::time::sleep_until(end.min(Instant::now() + QUIET)).await,
                    None => std::future::pending().await,
                }
            };
            let accepted = tokio::select! {
                biased;
                () = &mut stopped => return,
                () = &mut draining, if last_call.is_none() => {
                    last_call = Some(Instant::now() + LAST_CALL);
                    continue;
                }
                accepted = listener.accept(), if last_call.is_none_or(|end| Instant::now() < end) => accepted,
                () = quiet => break,
            };
            match accepted {
                Ok((stream, address)) => match handshakes.begin(address.ip()) {
                    Some(handshake) => serve(Arrival { stream, address, work: drain.work(), handshake }),
                    None => refused("too-many-handshakes"),
                },
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(REST).await;
                }
            }
        }
        drop((listener, accepting));
    }
}

impl Arrival {
    /// Whom the connection is counted for.
    pub fn holder(&self) -> IpAddr {
        holder(self.address.ip())
    }

    /// Does the server's handshake. The connection is work until the second value is dropped.
    pub async fn greet(self, workload: &Workload, offer: Offer) -> Result<(Accepted<TcpStream>, Work), AcceptError> {
        let Self { stream, work, handshake, .. } = self;
        // Small answers leave at once; a socket that refuses this option still works.
        let _ = stream.set_nodelay(true);
        let accepted = accept(workload, stream, offer, HANDSHAKE_TIME).await?;
        drop(handshake);
        Ok((accepted, work))
    }

    /// The same with a client that shows no certificate. It keeps its place among those whom nobody knows until the
    /// second value is dropped.
    pub async fn greet_newcomer(self, workload: &Workload) -> Result<(TlsStream<TcpStream>, Unknown), AcceptError> {
        let Self { stream, work, handshake, .. } = self;
        // As above.
        let _ = stream.set_nodelay(true);
        let stream = greet_newcomer(workload, stream, HANDSHAKE_TIME).await?;
        Ok((stream, Unknown { _work: work, _handshake: handshake }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_a_share_of_the_handshakes() {
        let handshakes = Handshakes::default();
        let v4 = |last: u8| IpAddr::from([10, 0, 0, last]);
        let mut under_way: Vec<Handshake> = (0..SHARE).map(|_| handshakes.begin(v4(1)).unwrap()).collect();
        assert!(handshakes.begin(v4(1)).is_none());
        assert!(handshakes.begin("::ffff:10.0.0.1".parse().unwrap()).is_none(), "it is the same address");
        under_way.pop();
        under_way.push(handshakes.begin(v4(1)).unwrap());
        for address in 2..=8 {
            under_way.extend((0..SHARE).map(|_| handshakes.begin(v4(address)).unwrap()));
        }
        assert!(handshakes.begin(v4(9)).is_none(), "all are taken");
        drop(under_way);
        let counts = handshakes.0.lock();
        assert_eq!((counts.all, counts.by_address.len()), (0, 0));
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let handshakes = Handshakes::default();
        let v6 = |network: u16, host: u16| IpAddr::from([0x2001, 0xdb8, 0, network, 0, 0, 0, host]);
        let _taken: Vec<Handshake> =
            (0..SHARE).map(|host| handshakes.begin(v6(1, u16::try_from(host).unwrap())).unwrap()).collect();
        assert!(handshakes.begin(v6(1, 9_999)).is_none());
        assert!(handshakes.begin(v6(2, 1)).is_some());
    }

    #[tokio::test]
    async fn what_waits_when_the_drain_begins_is_served_and_counts_as_work() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut clients = Vec::new();
        for _ in 0..5 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let drain = Drain::new(Duration::from_secs(30));
        let arrivals = Arrivals::new(listener, Handshakes::default(), drain.clone());
        drain.start();
        let finish = tokio::spawn({
            let drain = drain.clone();
            async move { drain.finish().await }
        });
        let mut arrived = Vec::new();
        arrivals.serve(|arrival| arrived.push(arrival), |reason| panic!("{reason}")).await;
        assert_eq!(arrived.len(), 5);
        assert!(TcpStream::connect(address).await.is_err(), "the port is closed");
        assert!(!finish.is_finished() && drain.in_flight() == 5);
        drop(arrived);
        assert_eq!(finish.await.unwrap(), 0);
    }

    #[tokio::test]
    async fn new_connections_do_not_hold_a_drain_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let drain = Drain::new(Duration::from_secs(30));
        drain.start();
        let arrivals = Arrivals::new(listener, Handshakes::default(), drain.clone());
        let flood = tokio::spawn(async move { while TcpStream::connect(address).await.is_ok() {} });
        let began = Instant::now();
        arrivals.serve(drop, |_| {}).await;
        assert!(began.elapsed() < 3 * LAST_CALL, "{:?}", began.elapsed());
        flood.await.unwrap();
    }
}
