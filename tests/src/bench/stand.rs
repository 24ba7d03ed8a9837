//! Where proxies are measured: one core for the proxy, one for the upstream and the load, and turns on them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::identities::Identities;
use super::load::{Load, Window};
use super::process::{self, Process};
use super::proxy::{Kind, Proxy, Setting};

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub repetitions: usize,
    pub warm_up: Duration,
    pub measure: Duration,
    pub connections: usize,
    pub streams: usize,
}

/// One turn of one proxy.
#[derive(Clone, Debug)]
pub struct Turn {
    pub busy: Window,
    /// One call at a time.
    pub alone: Window,
    pub resident: u64,
}

pub struct Stand {
    setting: Setting,
    upstream: Process,
    load_core: usize,
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
        let (upstream, line) = Process::start(&mut command, load_core, &folder.path().join("upstream.log"))?;
        let listening: serde_json::Value = serde_json::from_str(&line)?;
        let setting = Setting {
            folder: folder.path().to_owned(),
            identities,
            upstream: listening["listening"].as_str().context("the upstream does not say where it listens")?.parse()?,
            core: proxy_core,
            spillway: spillway.to_owned(),
        };
        Ok(Self { setting, upstream, load_core, _folder: folder })
    }

    /// `distinct`: no two calls are the same.
    pub fn turn(&self, kind: Kind, distinct: bool, extent: &Extent) -> Result<Turn> {
        let Self { setting, upstream, load_core, .. } = self;
        let proxy = Proxy::start(kind, setting)?;
        let load = |connections, streams, warm_up, measure| Load {
            address: proxy.address,
            connections,
            streams,
            distinct,
            warm_up,
            measure,
            proxy: proxy.pid,
            upstream: upstream.id(),
            proxy_core: setting.core,
            load_core: *load_core,
        };
        let busy = generate(&load(extent.connections, extent.streams, extent.warm_up, extent.measure), setting)?;
        let resident = process::resident(proxy.pid)?;
        let alone = generate(&load(1, 1, extent.warm_up / 4, extent.measure / 4), setting)?;
        // Both write the log behind the answers, in blocks: not all lines must be there yet.
        let (logged, answered) = (proxy.logged()?, busy.answered);
        ensure!(logged as u64 >= answered, "{answered} calls were answered, but only {logged} are in the access log");
        let turn = Turn { busy, alone, resident };
        println!(
            "{:20} {:6.2} us/call  {:6.0} calls/s  p50 {:5.0} us  p99 {:5.0} us  proxy's core {:.0} % busy",
            kind.name(),
            turn.busy.proxy_us(),
            turn.busy.per_second(),
            turn.busy.p50_us,
            turn.busy.p99_us,
            turn.busy.proxy_core_busy * 100.0
        );
        Ok(turn)
    }
}

/// The load in a process of its own, so that its CPU time is nobody else's.
fn generate(load: &Load, setting: &Setting) -> Result<Window> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("load").arg("--pki").arg(setting.identities.folder());
    command.arg("--address").arg(load.address.to_string());
    for (name, value) in [
        ("--connections", load.connections as u64),
        ("--streams", load.streams as u64),
        ("--warm-up-ms", u64::try_from(load.warm_up.as_millis())?),
        ("--measure-ms", u64::try_from(load.measure.as_millis())?),
        ("--proxy", load.proxy.into()),
        ("--upstream", load.upstream.into()),
        ("--proxy-core", load.proxy_core as u64),
        ("--load-core", load.load_core as u64),
    ] {
        command.arg(name).arg(value.to_string());
    }
    if load.distinct {
        command.arg("--distinct");
    }
    command.stdin(Stdio::null());
    let output = process::on_core(load.load_core, || command.output())??;
    ensure!(output.status.success(), "the load ended early: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("the load's report cannot be read")
}
