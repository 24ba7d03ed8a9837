//! `spillway gateway`, `sidecar`, `control`, `dns` and `injector`: settings in, a process that runs until it is told to drain.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use spillway_runtime::drain::Drain;
use spillway_runtime::settings::{self, FromNode};
use spillway_runtime::telemetry::init_logging;

use crate::huge_pages;

/// From this on a cache in memory is worth huge pages: its look-ups then miss the TLB less often.
const LARGE_CACHE: u64 = 1 << 30;
/// And all models' files together, whose weights are read from end to end by each call.
const LARGE_MODELS: u64 = 64 << 20;
/// And a Snapshot, as it lies in its file: that of 5,000 models, of which a gateway makes 70 MiB.
const LARGE_SNAPSHOT: u64 = 1 << 20;

#[derive(clap::Args)]
pub struct Arguments {
    /// The process settings, a YAML file
    #[arg(short, long, value_name = "FILE", env = "SPILLWAY_CONFIG")]
    config: PathBuf,
    /// Read the settings, print every fault, and leave; nothing listens
    #[arg(long)]
    check: bool,
    /// Ends with this process, its parent, however that ends
    #[arg(long, hide = true, value_name = "PID")]
    parent: Option<i32>,
}

impl Arguments {
    /// The settings of a process that begins without huge pages.
    fn settings<T: FromNode>(&self) -> Result<T> {
        // A file that is a pipe can be read once.
        if !self.check {
            huge_pages::begin_without();
        }
        Ok(settings::read(&self.config)?)
    }
}

pub fn gateway(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_gateway::GatewaySettings = arguments.settings()?;
    let snapshot = bytes_of(&settings.common.snapshot);
    huge_pages::allow_if(settings.results.memory.0 >= LARGE_CACHE || snapshot >= LARGE_SNAPSHOT);
    // The gateway's requests run on threads of its own; this one looks after the rest.
    serve(arguments, 1, settings.common.drain_timeout, |drain| spillway_gateway::run(settings, drain))
}

pub fn sidecar(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_sidecar::SidecarSettings = arguments.settings()?;
    let cache = settings.features.as_ref().map_or(0, |features| features.memory.size.0);
    let models = settings.models.as_deref().map_or(0, bytes_in);
    let snapshot = bytes_of(&settings.common.snapshot);
    huge_pages::allow_if(cache >= LARGE_CACHE || models >= LARGE_MODELS || snapshot >= LARGE_SNAPSHOT);
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.common.drain_timeout, |drain| spillway_sidecar::run(settings, drain))
}

pub fn control(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_control::ControlSettings = arguments.settings()?;
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.drain_timeout, |drain| spillway_control::run(settings, drain))
}

pub fn dns(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_control::dns::DnsSettings = arguments.settings()?;
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.common.drain_timeout, |drain| spillway_control::dns::run(settings, drain))
}

pub fn injector(arguments: &Arguments) -> Result<ExitCode> {
    let settings: crate::injector::InjectorSettings = settings::read(&arguments.config)?;
    // Requests go through its links.
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.drain_timeout, |drain| crate::injector::node::run(settings, drain))
}

/// Runs a process until it has drained: on TERM or INT, or because its admin port was told to.
fn serve<F, E>(
    arguments: &Arguments,
    threads: usize,
    drain_timeout: Duration,
    run: impl FnOnce(Drain) -> F,
) -> Result<ExitCode>
where
    F: Future<Output = Result<(), E>>,
    anyhow::Error: From<E>,
{
    if arguments.check {
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(parent) = arguments.parent {
        end_with(Pid::from_raw(parent))?;
    }
    init_logging();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(async {
        let drain = Drain::new(drain_timeout);
        let signals = tokio::spawn({
            let drain = drain.clone();
            async move { drain.on_signals().await }
        });
        let outcome = run(drain).await;
        signals.abort();
        Ok(outcome.map(|()| ExitCode::SUCCESS)?)
    })
}

/// The bytes of a file; what cannot be read is none.
fn bytes_of(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |metadata| metadata.len())
}

/// The bytes of a folder's files, likewise.
fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

/// The kernel kills us when our parent's thread that started us is gone, also while we are stopped (prctl(2),
/// PR_SET_PDEATHSIG).
fn end_with(parent: Pid) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    ensure!(getppid() == parent, "who started this is gone, or not the process {parent}");
    Ok(())
}
