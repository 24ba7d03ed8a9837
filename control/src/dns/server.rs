//! The answers by UDP and TCP: what all sockets share, and their one owner.
//!
//! The rule: a message is answered from one view, whole. Nothing that strangers send takes memory or tasks beyond what
//! the settings say: datagrams are answered where they are read, one after the other, and streams have places.
//!
//! Why not hickory's own server (hickory-server 0.26): it spawns a task for each datagram, without bound, has none for
//! connections, writes log lines for each request, and reads a message before anybody may judge its sender. Measured
//! beside this one: docs/dns.md.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use spillway_core::limit::InvalidLimit;
use spillway_core::limit::sources::{Judged, Sources, network_hash};
use spillway_runtime::drain::Drain;
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinSet;

use super::answer::{Responder, Said, Via};
use super::metrics::DnsMetrics;
use super::settings::{RateLimitSettings, TcpSettings};
use super::view::{Served, View};
use super::zone::{Zone, ZoneSettings};
use super::{datagrams, streams};

/// A query that is longer is none of ours: the longest name with options is below 400 octets.
pub const MOST_QUERY: usize = 4_096;

/// Tables of networks, so that sockets seldom wait for each other.
const SHARDS: usize = 16;
/// What waits in the kernel while a datagram is answered. More would only let answers come later.
const RECEIVE_BUFFER: usize = 256 << 10;
const BACKLOG: i32 = 256;
/// For listeners of port 0: how often a UDP port is tried whose TCP port is taken.
const TRIES: usize = 16;

/// What all sockets answer from.
#[derive(Debug)]
pub struct Server {
    pub zone: Zone,
    pub metrics: DnsMetrics,
    /// None until the first view.
    served: ArcSwapOption<Served>,
    /// The last view that was offered, as it was.
    offered: Mutex<Option<View>>,
    limit: Limit,
}

#[derive(Debug)]
struct Limit {
    shards: Vec<Mutex<Sources>>,
    /// Secret, so that nobody can choose networks that share a place.
    seed: u64,
    began: Instant,
}

impl Server {
    pub fn new(zone: ZoneSettings, limit: &RateLimitSettings, metrics: DnsMetrics) -> Result<Self, InvalidLimit> {
        Ok(Self {
            zone: Zone::of(zone),
            metrics,
            served: ArcSwapOption::empty(),
            offered: Mutex::default(),
            limit: Limit::of(limit)?,
        })
    }

    /// Answers from this view from now on, or from the addresses of the last one if it has none (THREATS 66).
    /// Says whether it was taken as it is.
    pub fn take(&self, view: View) -> bool {
        *self.offered.lock() = Some(view.clone());
        let last = self.served.load_full();
        let (view, is_kept) = match last.as_deref() {
            Some(last) => view.keeping(&last.view),
            None => (view, false),
        };
        if is_kept {
            self.metrics.views_kept.inc();
        }
        if view.is_empty() {
            return false;
        }
        self.metrics.know(view.regions.keys());
        self.metrics.serial.set(i64::try_from(view.serial).unwrap_or(i64::MAX));
        self.served.store(Some(Arc::new(Served::of(view, &self.zone))));
        !is_kept
    }

    /// Whether this very view was the last one to be taken.
    pub fn offered(&self, view: &View) -> bool {
        self.offered.lock().as_ref() == Some(view)
    }

    /// None until the first view.
    pub fn served(&self) -> Option<Arc<Served>> {
        self.served.load_full()
    }

    /// Answers a datagram; `out` is empty if there is nothing to be sent.
    pub(super) fn datagram(&self, responder: &Responder<'_>, message: &[u8], from: SocketAddr, out: &mut Vec<u8>) {
        out.clear();
        if message.len() > MOST_QUERY {
            self.metrics.oversized.inc();
            return;
        }
        // Nobody receives at port 0.
        if from.port() == 0 {
            self.metrics.mute.inc();
            return;
        }
        let said = match self.limit.decide(from.ip()) {
            Judged::Answered => responder.respond(message, from.ip(), Via::Datagram, out),
            Judged::Slipped => {
                self.metrics.slipped.inc();
                responder.slip(message, out)
            }
            Judged::Dropped => {
                self.metrics.dropped.inc();
                return;
            }
        };
        self.count(said.as_ref());
    }

    pub(super) fn stream(&self, message: &[u8], from: SocketAddr, out: &mut Vec<u8>) {
        out.clear();
        let served = self.served();
        let responder = Responder::of(&self.zone, served.as_deref());
        self.count(responder.respond(message, from.ip(), Via::Stream, out).as_ref());
    }

    /// Stands for the network of an address, in this process.
    pub(super) fn network(&self, from: IpAddr) -> u64 {
        network_hash(from, self.limit.seed)
    }

    fn count(&self, said: Option<&Said<'_>>) {
        match said {
            Some(said) => self.metrics.said(said),
            None => {
                self.metrics.mute.inc();
            }
        }
    }
}

impl Limit {
    fn of(settings: &RateLimitSettings) -> Result<Self, InvalidLimit> {
        let gcra = settings.gcra()?;
        let places = settings.networks.div_ceil(SHARDS);
        let shards = (0..SHARDS).map(|_| Mutex::new(Sources::new(gcra, settings.slip, places))).collect();
        Ok(Self { shards, seed: rand::random(), began: Instant::now() })
    }

    fn decide(&self, from: IpAddr) -> Judged {
        let hash = network_hash(from, self.seed);
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let shard = self.shards.get((hash >> 32) as usize % SHARDS);
        // There is always one.
        shard.map_or(Judged::Answered, |shard| shard.lock().decide(hash, now))
    }
}

/// Bound sockets, from which nothing is read yet.
#[derive(Debug)]
pub struct Sockets {
    datagrams: Vec<UdpSocket>,
    streams: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
}

impl Sockets {
    /// Binds UDP and TCP at each address; for UDP `readers` sockets, among which the kernel shares out senders.
    pub fn bind(listen: &[SocketAddr], readers: usize) -> Result<Self, (SocketAddr, io::Error)> {
        let mut bound = Self { datagrams: Vec::new(), streams: Vec::new(), addresses: Vec::new() };
        for address in listen {
            bound.bind_one(*address, readers.max(1)).map_err(|error| (*address, error))?;
        }
        Ok(bound)
    }

    /// Where they are bound, in the order of `listen`.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Answers until draining begins; then what already came, and open streams until they are idle or stopped.
    pub async fn serve(self, server: Arc<Server>, tcp: TcpSettings, drain: Drain) {
        let mut tasks = JoinSet::new();
        let places = streams::Places::of(&tcp);
        for socket in self.datagrams {
            tasks.spawn(datagrams::answer(socket, Arc::clone(&server), drain.clone()));
        }
        for listener in self.streams {
            let (server, places) = (Arc::clone(&server), places.clone());
            tasks.spawn(streams::answer(listener, server, places, tcp.idle, drain.clone()));
        }
        while tasks.join_next().await.is_some() {}
    }

    fn bind_one(&mut self, address: SocketAddr, readers: usize) -> io::Result<()> {
        let tries = if address.port() == 0 { TRIES } else { 1 };
        let mut tried = 0;
        let (first, stream, bound) = loop {
            tried += 1;
            let first = datagram_socket(address)?;
            let bound = first.local_addr()?;
            match stream_socket(bound) {
                Ok(stream) => break (first, stream, bound),
                Err(error) if tried == tries => return Err(error),
                Err(_) => {}
            }
        };
        self.datagrams.push(first);
        for _ in 1..readers {
            self.datagrams.push(datagram_socket(bound)?);
        }
        self.streams.push(stream);
        self.addresses.push(bound);
        Ok(())
    }
}

fn datagram_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // What the kernel grants of it is enough.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

fn stream_socket(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
