//! Where proxies are measured: one core for the proxy, one for the upstream and the load, and turns on them.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::identities::Identities;
use super::load::part::Job;
use super::load::{self, Caller, Load, Window};
use super::message::Protocol;
use super::peers::{Kind, Proxy, Setting};
use super::process::{self, Process};

/// Connections of HTTP/2; calls in flight are spread over them.
const CONNECTIONS: usize = 8;

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub repetitions: usize,
    pub warm_up: Duration,
    pub measure: Duration,
    /// Calls in flight: on 8 connections of HTTP/2, or each on its own of HTTP/1.1.
    pub in_flight: usize,
}

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calls {
    pub protocol: Protocol,
    /// No two calls are the same.
    pub distinct: bool,
}

/// One turn of one proxy.
#[derive(Clone, Debug)]
pub struct Turn {
    pub busy: Window,
    /// One call at a time.
    pub alone: Window,
    /// Bytes.
    pub resident: u64,
}

pub struct Stand {
    pub(super) setting: Setting,
    pub(super) upstream: Process,
    pub(super) load_core: usize,
    /// Who was seen to refuse a stranger.
    trusted: RefCell<Vec<(Kind, Protocol)>>,
    _folder: tempfile::TempDir,
}

impl Stand {
    pub fn build(spillway: &Path) -> Result<Self> {
        let cores = process::cores()?;
        let [proxy_core, load_core, ..] = cores[..] else {
            bail!("the bench needs two cores: one for the proxy, one for load and upstream");
        };
        let folder = tempfile::Builder::new().prefix("spillway-bench-").tempdir()?;
        let identities = Identities::create(&folder.path().join("pki"))?;
        let this = std::env::current_exe()?;
        let mut command = Command::new(&this);
        command.arg("upstream").arg("--pki").arg(identities.folder());
        let (upstream, line) = Process::start(&mut command, &[load_core], &folder.path().join("upstream.log"))?;
        let listening: serde_json::Value = serde_json::from_str(&line)?;
        let setting = Setting {
            folder: folder.path().to_owned(),
            identities,
            upstream: listening["listening"].as_str().context("the upstream does not say where it listens")?.parse()?,
            cores: vec![proxy_core],
            threads: 1,
            spillway: spillway.to_owned(),
        };
        Ok(Self { setting, upstream, load_core, trusted: RefCell::default(), _folder: folder })
    }

    /// A proxy that was seen to refuse a stranger.
    pub fn proxy(&self, kind: Kind, protocol: Protocol) -> Result<Proxy> {
        let proxy = Proxy::start(kind, &self.setting)?;
        if !self.trusted.borrow().contains(&(kind, protocol)) {
            refuses_strangers(proxy.address, &self.setting.identities, protocol)
                .with_context(|| format!("{} does not judge who calls", kind.name()))?;
            self.trusted.borrow_mut().push((kind, protocol));
        }
        Ok(proxy)
    }

    /// A new process of a proxy under load, then with one call at a time.
    pub fn turn(&self, kind: Kind, calls: Calls, extent: &Extent) -> Result<Turn> {
        let proxy = self.proxy(kind, calls.protocol)?;
        let busy = self.window(kind, &proxy, calls, extent)?;
        let resident = process::resident(proxy.pid)?;
        let alone = Extent { warm_up: extent.warm_up / 4, measure: extent.measure / 4, in_flight: 1, ..*extent };
        let alone = self.window(kind, &proxy, calls, &alone)?;
        proxy.await_log(busy.checked + alone.checked)?;
        let turn = Turn { busy, alone, resident };
        println!(
            "{:4} {:16} {:6.2} us/call  {:6.0} calls/s  p50 {:5.0} us  p99 {:5.0} us  proxy's core {:.0} % busy",
            calls.protocol.name(),
            kind.name(),
            turn.busy.proxy_us(),
            turn.busy.per_second(),
            turn.busy.p50_us,
            turn.busy.p99_us,
            turn.busy.proxy_core_busy * 100.0
        );
        Ok(turn)
    }

    /// One window of a running proxy under load.
    pub fn window(&self, kind: Kind, proxy: &Proxy, calls: Calls, extent: &Extent) -> Result<Window> {
        let connections = match calls.protocol {
            Protocol::Grpc | Protocol::H2 => CONNECTIONS.min(extent.in_flight),
            Protocol::H1 => extent.in_flight,
        };
        let load = Load {
            pki: self.setting.identities.folder().to_owned(),
            address: proxy.address,
            protocol: calls.protocol,
            connections,
            streams: extent.in_flight / connections,
            distinct: calls.distinct,
            status_in_head: calls.protocol == Protocol::Grpc && kind.has_no_trailers(),
            warm_up: extent.warm_up,
            measure: extent.measure,
            proxy: proxy.pid,
            upstream: self.upstream.id(),
            proxy_cores: self.setting.cores.clone(),
            load_core: self.load_core,
        };
        Job::Load(load)
            .start(&[self.load_core])
            .with_context(|| format!("{} over {}", kind.name(), calls.protocol.name()))
    }
}

/// What lets a client in whom it should not know is no peer.
fn refuses_strangers(address: SocketAddr, identities: &Identities, protocol: Protocol) -> Result<()> {
    let connector = load::stranger(identities, protocol)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let caller = Caller::new(protocol, false);
        let mut sender = caller.connect(address, &connector).await?.ready().await?;
        let answer = caller.ask(&mut sender).await?;
        ensure!(answer.is_refusal(), "a client with another SPIFFE id got {answer:?}");
        Ok(())
    })
}
