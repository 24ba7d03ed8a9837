//! New connections, one after the other: full mTLS handshakes, or resumed ones.
//!
//! The rule: a handshake counts when it is of the kind and the key exchange that was asked for and the server
//! has answered an HTTP/2 PING over it: only then has it verified the client. Before anything is counted, each
//! worker makes one checked call over a connection of that kind, so that the identity is there, too; newcomers
//! make none, since nginx knows clients by their certificates' fingerprints alone.

use std::cell::Cell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{Ping, PingPong};
use rustls::client::Resumption;
use rustls::crypto::SupportedKxGroup;
use rustls::crypto::aws_lc_rs::kx_group::{X25519, X25519MLKEM768};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind};
use serde::{Deserialize, Serialize};
use spillway_runtime::authority::Authority;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{Caller, Sender};
use crate::bench::identities::Identities;
use crate::bench::message::Protocol;
use crate::bench::process::{self, Core};

/// Connections that are being made at a time: enough that the proxy never waits for the load.
const WORKERS: usize = 4;
/// Tickets kept by each worker. It uses the newest one, and a server gives one or two on each connection.
const TICKETS: usize = 8;
/// How long the first connection of each worker, and the call on it, may take.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The same client each time, without a ticket: what is known of its certificate may be used.
    Full,
    /// Each time a client with a key and a certificate that the proxy has not seen.
    Newcomer,
    /// The same client each time, with a ticket of the connection before.
    Resumed,
}

/// What the client offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exchange {
    /// X25519 and nothing else.
    Classic,
    /// X25519MLKEM768 before X25519, with a key share of each.
    Hybrid,
}

impl Exchange {
    fn groups(self) -> Vec<&'static dyn SupportedKxGroup> {
        match self {
            Self::Classic => vec![X25519],
            Self::Hybrid => vec![X25519MLKEM768, X25519],
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Handshakes {
    pub pki: PathBuf,
    pub address: SocketAddr,
    pub kind: Kind,
    pub exchange: Exchange,
    /// From when all workers have made their first connections.
    pub warm_up: Duration,
    pub measure: Duration,
    pub proxy: u32,
    /// The core that the proxy is bound to.
    pub proxy_core: usize,
}

/// What one window showed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    pub seconds: f64,
    pub connections: u64,
    /// Those among them of which the hybrid key exchange was chosen.
    pub hybrid: u64,
    pub proxy_cpu_us: f64,
    /// A share of the window, 0 to 1.
    pub proxy_core_busy: f64,
}

impl Found {
    /// CPU of the proxy for each connection, µs.
    pub fn proxy_us(&self) -> f64 {
        self.proxy_cpu_us / self.connections as f64
    }

    pub fn per_second(&self) -> f64 {
        self.connections as f64 / self.seconds
    }
}

pub async fn run(job: &Handshakes) -> Result<Found> {
    let identities = Identities::at(&job.pki);
    let counts = Rc::new(Counts::default());
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..WORKERS {
        let worker = Worker::new(job, &identities, counts.clone())?;
        workers.spawn_local(worker.connect_for_ever());
    }
    let mut failed = async || match workers.join_next().await {
        Some(Ok(Err(error))) => error,
        Some(Err(error)) => error.into(),
        _ => anyhow::anyhow!("there are no workers"),
    };
    let warmed_up = async {
        tokio::time::timeout(PATIENCE, counts.all_ready()).await.context("the first connections take too long")?;
        tokio::time::sleep(job.warm_up).await;
        anyhow::Ok(())
    };
    tokio::select! {
        error = failed() => bail!(error),
        warmed_up = warmed_up => warmed_up?,
    }
    let (start, cpu, core) = (Instant::now(), process::cpu(job.proxy)?, process::core(job.proxy_core)?);
    counts.counting.set(true);
    tokio::select! {
        error = failed() => bail!(error),
        () = tokio::time::sleep(job.measure) => {}
    }
    let used = process::cpu(job.proxy)?.saturating_sub(cpu);
    let found = Found {
        seconds: start.elapsed().as_secs_f64(),
        connections: counts.connections.get(),
        hybrid: counts.hybrid.get(),
        proxy_cpu_us: used.as_secs_f64() * 1e6,
        proxy_core_busy: Core::busy_until(&core, &process::core(job.proxy_core)?),
    };
    ensure!(found.connections > 0, "no connection was made in {:?}", job.measure);
    Ok(found)
}

#[derive(Debug, Default)]
struct Counts {
    /// Workers that have made their first connections.
    ready: Cell<usize>,
    became_ready: Notify,
    counting: Cell<bool>,
    connections: Cell<u64>,
    hybrid: Cell<u64>,
}

impl Counts {
    async fn all_ready(&self) {
        while self.ready.get() < WORKERS {
            self.became_ready.notified().await;
        }
    }
}

struct Worker {
    address: SocketAddr,
    kind: Kind,
    exchange: Exchange,
    client: Client,
    counts: Rc<Counts>,
}

/// Who connects.
enum Client {
    Same(Arc<ClientConfig>),
    Newcomers { identities: Identities, authority: Box<Authority> },
}

impl Worker {
    fn new(job: &Handshakes, identities: &Identities, counts: Rc<Counts>) -> Result<Self> {
        let Handshakes { address, kind, exchange, .. } = *job;
        let same = |resumption| {
            let mut config = identities.client_with(exchange.groups())?;
            config.resumption = resumption;
            anyhow::Ok(Client::Same(Arc::new(config)))
        };
        let client = match kind {
            Kind::Full => same(Resumption::disabled())?,
            Kind::Resumed => same(Resumption::in_memory_sessions(TICKETS))?,
            Kind::Newcomer => {
                Client::Newcomers { identities: identities.clone(), authority: Box::new(identities.authority()?) }
            }
        };
        Ok(Self { address, kind, exchange, client, counts })
    }

    fn connector(&self) -> Result<TlsConnector> {
        Ok(TlsConnector::from(match &self.client {
            Client::Same(config) => config.clone(),
            Client::Newcomers { identities, authority } => {
                Arc::new(identities.newcomer_with(authority, self.exchange.groups())?)
            }
        }))
    }

    async fn connect_for_ever(self) -> Result<()> {
        if self.kind == Kind::Resumed {
            // Brings the first tickets.
            self.call(HandshakeKind::Full).await.context("the first full handshake")?;
        }
        if self.kind != Kind::Newcomer {
            self.call(self.expected()).await?;
        }
        self.counts.ready.set(self.counts.ready.get() + 1);
        self.counts.became_ready.notify_one();
        loop {
            let hybrid = self.ping().await?;
            if self.counts.counting.get() {
                self.counts.connections.set(self.counts.connections.get() + 1);
                self.counts.hybrid.set(self.counts.hybrid.get() + u64::from(hybrid));
            }
        }
    }

    fn expected(&self) -> HandshakeKind {
        match self.kind {
            Kind::Full | Kind::Newcomer => HandshakeKind::Full,
            Kind::Resumed => HandshakeKind::Resumed,
        }
    }

    /// Makes a connection, has a PING answered and closes; returns whether the key exchange was the hybrid.
    async fn ping(&self) -> Result<bool> {
        let Opened { sender, mut connection, mut pings, hybrid } = self.open(self.expected()).await?;
        tokio::select! {
            ended = &mut connection => bail!("the connection ended before it was answered: {ended:?}"),
            pong = pings.ping(Ping::opaque()) => { pong.context("no answer to a PING")?; }
        }
        // Without requests in flight and without anybody who could make one, it says GOAWAY and closes.
        drop(sender);
        connection.await.context("closing")?;
        Ok(hybrid)
    }

    /// Makes a connection, one call that is answered rightly, and closes.
    async fn call(&self, expected: HandshakeKind) -> Result<()> {
        let Opened { sender, mut connection, .. } = self.open(expected).await?;
        let (caller, mut sender) = (Caller::new(Protocol::Grpc, false), Sender::H2(sender));
        tokio::select! {
            ended = &mut connection => bail!("the connection ended before the call was answered: {ended:?}"),
            answered = caller.call(&mut sender) => answered?,
        }
        drop(sender);
        connection.await.context("closing")
    }

    async fn open(&self, expected: HandshakeKind) -> Result<Opened> {
        let connector = self.connector()?;
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let stream = connector.connect(ServerName::try_from("localhost")?, stream).await.context("no TLS")?;
        let tls = stream.get_ref().1;
        let kind = tls.handshake_kind();
        ensure!(
            kind == Some(expected),
            "the connection was {}: {kind:?}",
            if expected == HandshakeKind::Resumed { "not resumed" } else { "not made by a full handshake" }
        );
        let group = tls.negotiated_key_exchange_group().context("no key exchange")?.name();
        let hybrid = group == X25519MLKEM768.name();
        let offered = self.exchange.groups().iter().any(|offered| offered.name() == group);
        ensure!(offered, "{group:?} was chosen");
        ensure!(tls.alpn_protocol() == Some(b"h2"), "h2 was not agreed upon");
        let (sender, mut connection) = h2::client::Builder::new().enable_push(false).handshake(stream).await?;
        let pings = connection.ping_pong().context("no PINGs")?;
        Ok(Opened { sender, connection, pings, hybrid })
    }
}

struct Opened {
    sender: SendRequest<Bytes>,
    connection: Connection<TlsStream<TcpStream>, Bytes>,
    pings: PingPong,
    hybrid: bool,
}
