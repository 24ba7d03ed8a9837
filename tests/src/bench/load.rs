//! The load generator: a closed loop of calls over a few connections, every answer checked.
//!
//! It reads the processes' accounts itself at the start and the end of the window in which it counts
//! answers, so that work and answers belong to the same seconds.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::identities::Identities;
use super::process::{self, Core};
use super::{message, statistics};

#[derive(Clone, Debug)]
pub struct Load {
    pub address: SocketAddr,
    pub connections: usize,
    /// Calls in flight on each connection.
    pub streams: usize,
    /// No two calls are the same, so that none is answered out of a cache.
    pub distinct: bool,
    /// Calls are made and checked, but not counted.
    pub warm_up: Duration,
    pub measure: Duration,
    pub proxy: u32,
    pub upstream: u32,
    /// The core that the proxy is bound to.
    pub proxy_core: usize,
    /// The core that the upstream and this process are bound to.
    pub load_core: usize,
}

/// What one window showed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Window {
    pub seconds: f64,
    pub answered: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    pub proxy_cpu_us: f64,
    pub upstream_cpu_us: f64,
    pub load_cpu_us: f64,
    /// Shares of the window, 0 to 1.
    pub proxy_core_busy: f64,
    pub load_core_busy: f64,
}

impl Window {
    pub fn per_second(&self) -> f64 {
        self.answered as f64 / self.seconds
    }

    /// CPU of the proxy for each answered call, µs.
    pub fn proxy_us(&self) -> f64 {
        self.proxy_cpu_us / self.answered as f64
    }

    /// What the proxy's own account says of its core, 0 to 1.
    pub fn proxy_share(&self) -> f64 {
        self.proxy_cpu_us / 1e6 / self.seconds
    }

    /// What others took of both cores, 0 to 2.
    pub fn others(&self) -> f64 {
        let ours = (self.proxy_cpu_us + self.upstream_cpu_us + self.load_cpu_us) / 1e6 / self.seconds;
        (self.proxy_core_busy + self.load_core_busy - ours).max(0.0)
    }
}

/// Runs inside a `LocalSet`. A wrong answer or a lost connection ends it with an error.
pub async fn run(load: &Load, pki: &Path) -> Result<Window> {
    let connector = TlsConnector::from(Identities::at(pki).client()?);
    let shared = Rc::new(Shared {
        counting: Cell::new(false),
        latencies: RefCell::new(Vec::with_capacity(1 << 20)),
        known: RefCell::default(),
        body: message::request(),
        distinct: load.distinct,
        calls: Cell::new(0),
    });
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..load.connections {
        let sender = connect(load.address, &connector).await?;
        for _ in 0..load.streams {
            callers.spawn_local(shared.clone().call_for_ever(sender.clone()));
        }
    }
    let mut failed = async || match callers.join_next().await {
        Some(Ok(Err(error))) => error,
        Some(Err(error)) => error.into(),
        _ => anyhow::anyhow!("there are no callers"),
    };
    tokio::select! {
        error = failed() => bail!(error),
        () = tokio::time::sleep(load.warm_up) => {}
    }
    let before = Account::read(load)?;
    shared.counting.set(true);
    tokio::select! {
        error = failed() => bail!(error),
        () = tokio::time::sleep(load.measure) => {}
    }
    shared.counting.set(false);
    let after = Account::read(load)?;
    let mut latencies = shared.latencies.take();
    ensure!(!latencies.is_empty(), "no call was answered in {:?}", load.measure);
    Ok(before.until(&after, &mut latencies))
}

struct Shared {
    counting: Cell<bool>,
    /// Nanoseconds.
    latencies: RefCell<Vec<u32>>,
    /// Bodies that were found right: equal bytes need no decoding.
    known: RefCell<Vec<Bytes>>,
    body: Bytes,
    distinct: bool,
    calls: Cell<u64>,
}

impl Shared {
    fn next_body(&self) -> Bytes {
        if !self.distinct {
            return self.body.clone();
        }
        self.calls.set(self.calls.get() + 1);
        message::numbered(&self.body, self.calls.get())
    }

    async fn call_for_ever(self: Rc<Self>, mut sender: SendRequest<Bytes>) -> Result<()> {
        loop {
            sender = sender.ready().await?;
            let start = Instant::now();
            self.call(&mut sender).await?;
            if self.counting.get() {
                let nanos = u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX);
                self.latencies.borrow_mut().push(nanos);
            }
        }
    }

    async fn call(&self, sender: &mut SendRequest<Bytes>) -> Result<()> {
        let request = Request::post(URI)
            .version(http::Version::HTTP_2)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", "spillway-bench")
            .body(())?;
        let (response, mut send) = sender.send_request(request, false)?;
        send.send_data(self.next_body(), true)?;
        let response = response.await.context("no answer")?;
        let (head, mut body) = response.into_parts();
        let mut received = Bytes::new();
        while let Some(part) = body.data().await {
            let part = part.context("no whole answer")?;
            body.flow_control().release_capacity(part.len())?;
            received = if received.is_empty() { part } else { [received, part].concat().into() };
        }
        let trailers = body.trailers().await.context("no trailers")?;
        // An error without a message has its status in the head.
        let status = trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
        let right = head.status == 200 && status.is_some_and(|status| status == "0") && self.is_answer(&received);
        ensure!(right, "a wrong answer: {} {:?} {trailers:?} {received:?}", head.status, head.headers);
        Ok(())
    }

    fn is_answer(&self, body: &Bytes) -> bool {
        if self.known.borrow().contains(body) {
            return true;
        }
        let right = message::is_answer(body);
        let mut known = self.known.borrow_mut();
        if right && known.len() < 8 {
            known.push(Bytes::copy_from_slice(body));
        }
        right
    }
}

const URI: &str = "https://localhost/inference.GRPCInferenceService/ModelInfer";

async fn connect(address: SocketAddr, connector: &TlsConnector) -> Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("cannot reach {address}"))?;
    stream.set_nodelay(true)?;
    let stream = connector.connect(ServerName::try_from("localhost")?, stream).await.context("no TLS")?;
    let (sender, connection) = h2::client::Builder::new().enable_push(false).handshake(stream).await?;
    // Its error also reaches each call on it.
    tokio::task::spawn_local(connection);
    Ok(sender)
}

/// What all processes and cores have used so far.
struct Account {
    at: Instant,
    proxy: Duration,
    upstream: Duration,
    load: Duration,
    proxy_core: Core,
    load_core: Core,
}

impl Account {
    fn read(load: &Load) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            proxy: process::cpu(load.proxy)?,
            upstream: process::cpu(load.upstream)?,
            load: process::cpu(std::process::id())?,
            proxy_core: process::core(load.proxy_core)?,
            load_core: process::core(load.load_core)?,
        })
    }

    fn until(&self, after: &Self, latencies: &mut [u32]) -> Window {
        latencies.sort_unstable();
        let micros = |nanos: u32| f64::from(nanos) / 1e3;
        let used = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() * 1e6;
        Window {
            seconds: (after.at - self.at).as_secs_f64(),
            answered: latencies.len() as u64,
            p50_us: micros(statistics::quantile(latencies, 0.5)),
            p99_us: micros(statistics::quantile(latencies, 0.99)),
            max_us: micros(statistics::quantile(latencies, 1.0)),
            proxy_cpu_us: used(self.proxy, after.proxy),
            upstream_cpu_us: used(self.upstream, after.upstream),
            load_cpu_us: used(self.load, after.load),
            proxy_core_busy: self.proxy_core.busy_until(&after.proxy_core),
            load_core_busy: self.load_core.busy_until(&after.load_core),
        }
    }
}
