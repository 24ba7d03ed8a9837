//! Queries by TCP (RFC 7766): who was told that an answer was cut comes here.
//!
//! The rule: a connection has one of a few places, of its network's few, and loses it when it is idle, slow or old.
//! Whoever finds none is closed at once and may come again. Queries of a connection are answered in order.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_runtime::drain::Drain;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::query::HEADER;
use super::server::{MOST_QUERY, Server};
use super::settings::TcpSettings;

/// The rest of a query that began, and an answer on its way.
const SLOWEST: Duration = Duration::from_secs(2);
/// The whole life of a connection: a resolver that stays comes again.
const LIFE: Duration = Duration::from_secs(120);
/// After a failure to accept: out of descriptors, most likely.
const PAUSE: Duration = Duration::from_millis(100);

/// Places of connections, of all listeners together.
#[derive(Clone, Debug)]
pub struct Places(Arc<Mutex<Taken>>);

#[derive(Debug)]
struct Taken {
    all: usize,
    by_network: HashMap<u64, usize>,
    most: usize,
    most_of_network: usize,
}

/// A place; free again when dropped.
#[derive(Debug)]
struct Place {
    places: Places,
    network: u64,
}

impl Places {
    pub fn of(settings: &TcpSettings) -> Self {
        let (most, most_of_network) = (settings.connections, settings.per_network);
        Self(Arc::new(Mutex::new(Taken { all: 0, by_network: HashMap::new(), most, most_of_network })))
    }

    fn take(&self, network: u64) -> Option<Place> {
        let mut taken = self.0.lock();
        let of_network = taken.by_network.get(&network).copied().unwrap_or(0);
        if taken.all >= taken.most || of_network >= taken.most_of_network {
            return None;
        }
        taken.all += 1;
        taken.by_network.insert(network, of_network + 1);
        Some(Place { places: self.clone(), network })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock();
        taken.all = taken.all.saturating_sub(1);
        let left = taken.by_network.get(&self.network).map_or(0, |count| count.saturating_sub(1));
        if left == 0 {
            taken.by_network.remove(&self.network);
        } else {
            taken.by_network.insert(self.network, left);
        }
    }
}

/// Accepts until draining begins; open connections end when they are idle or all is stopped.
pub async fn answer(listener: TcpListener, server: Arc<Server>, places: Places, idle: Duration, drain: Drain) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = drain.draining() => break,
        };
        let Ok((stream, from)) = accepted else {
            server.metrics.unreceived.inc();
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Some(place) = places.take(server.network(from.ip())) else {
            server.metrics.connections_refused.inc();
            continue;
        };
        let (server, drain) = (Arc::clone(&server), drain.clone());
        connections.spawn(async move {
            server.metrics.connections.inc();
            tokio::select! {
                _ = timeout(LIFE, converse(stream, from, &server, idle)) => {}
                // A stream has nothing to finish: its client asks another server.
                () = drain.draining() => {}
            }
            server.metrics.connections.dec();
            drop(place);
        });
    }
    while connections.join_next().await.is_some() {}
}

/// An error is a client that breaks off, or that is none.
async fn converse(mut stream: TcpStream, from: SocketAddr, server: &Server, idle: Duration) -> io::Result<()> {
    let _ = stream.set_nodelay(true);
    let mut message = Vec::new();
    let (mut out, mut framed) = (Vec::new(), Vec::new());
    loop {
        let mut length = [0; 2];
        timeout(idle, stream.read_exact(&mut length)).await??;
        let length = usize::from(u16::from_be_bytes(length));
        if !(HEADER..=MOST_QUERY).contains(&length) {
            server.metrics.oversized.inc();
            return Ok(());
        }
        message.resize(length, 0);
        timeout(SLOWEST, stream.read_exact(&mut message)).await??;
        server.stream(&message, from, &mut out);
        let Ok(length) = u16::try_from(out.len()) else { return Ok(()) };
        if length == 0 {
            return Ok(());
        }
        // One segment for both.
        framed.clear();
        framed.extend_from_slice(&length.to_be_bytes());
        framed.extend_from_slice(&out);
        timeout(SLOWEST, stream.write_all(&framed)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_in_all_and_by_network_and_come_back() {
        let places = Places::of(&TcpSettings { connections: 3, per_network: 2, idle: Duration::from_secs(1) });
        let (first, second) = (places.take(1).unwrap(), places.take(1).unwrap());
        assert!(places.take(1).is_none(), "its network has two");
        let third = places.take(2).unwrap();
        assert!(places.take(3).is_none(), "all three are taken");
        drop((first, second));
        assert!(places.take(3).is_some());
        drop(third);
        assert!(places.0.lock().by_network.is_empty());
    }
}
