//! The load generator: a closed loop of calls over a few connections, every answer checked.
//!
//! It reads the processes' accounts itself at the start and the end of the window in which it counts
//! answers, so that work and answers belong to the same seconds.

pub mod account;
pub mod caller;
pub mod handshakes;
pub mod idle;
pub mod open;
pub mod part;

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio_rustls::TlsConnector;

use super::identities::Identities;
use super::message::Protocol;
pub use account::{Account, Window};
pub use caller::{Caller, Sender};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Load {
    /// The folder of the identities.
    pub pki: PathBuf,
    pub address: SocketAddr,
    pub protocol: Protocol,
    pub connections: usize,
    /// Calls in flight on each connection.
    pub streams: usize,
    /// No two calls are the same, so that none is answered out of a cache.
    pub distinct: bool,
    /// For a proxy that answers gRPC itself: its status is in the head.
    pub status_in_head: bool,
    /// Calls are made and checked, but not counted.
    pub warm_up: Duration,
    pub measure: Duration,
    pub proxy: u32,
    pub upstream: u32,
    /// The cores that the proxy is bound to.
    pub proxy_cores: Vec<usize>,
    /// The core that the upstream and this process are bound to.
    pub load_core: usize,
}

/// Dials as the bench's client.
pub fn connector(identities: &Identities, protocol: Protocol) -> Result<TlsConnector> {
    Ok(offering(identities.client()?, protocol))
}

/// Dials as one whom every proxy must refuse.
pub fn stranger(identities: &Identities, protocol: Protocol) -> Result<TlsConnector> {
    Ok(offering(identities.stranger()?, protocol))
}

fn offering(mut config: rustls::ClientConfig, protocol: Protocol) -> TlsConnector {
    config.alpn_protocols = vec![protocol.alpn().to_vec()];
    TlsConnector::from(std::sync::Arc::new(config))
}

/// Runs inside a `LocalSet`. A wrong answer or a lost connection ends it with an error.
pub async fn run(load: &Load) -> Result<Window> {
    let connector = connector(&Identities::at(&load.pki), load.protocol)?;
    let caller = Caller::new(load.protocol, load.distinct);
    let shared = Rc::new(Shared {
        caller: if load.status_in_head { caller.with_status_in_head() } else { caller },
        counting: Cell::new(false),
        checked: Cell::new(0),
        latencies: RefCell::new(Vec::with_capacity(1 << 20)),
    });
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..load.connections {
        let sender = shared.caller.connect(load.address, &connector).await?;
        for _ in 1..load.streams {
            callers.spawn_local(shared.clone().call_for_ever(sender.another()?));
        }
        callers.spawn_local(shared.clone().call_for_ever(sender));
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
    Ok(Window { checked: shared.checked.get(), ..before.until(&after, &mut latencies) })
}

struct Shared {
    caller: Caller,
    counting: Cell<bool>,
    checked: Cell<u64>,
    /// Nanoseconds.
    latencies: RefCell<Vec<u32>>,
}

impl Shared {
    async fn call_for_ever(self: Rc<Self>, mut sender: Sender) -> Result<()> {
        loop {
            sender = sender.ready().await?;
            let start = Instant::now();
            self.caller.call(&mut sender).await?;
            self.checked.set(self.checked.get() + 1);
            if self.counting.get() {
                let nanos = u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX);
                self.latencies.borrow_mut().push(nanos);
            }
        }
    }
}
