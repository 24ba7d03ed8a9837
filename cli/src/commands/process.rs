//! `spillway gateway`, `sidecar`, `control`, `dns` and `injector`: settings in, a process that runs until it is told to drain.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::prctl::{get_thp_disable, set_pdeathsig, set_thp_disable};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use spillway_runtime::drain::Drain;
use spillway_runtime::settings;
use spillway_runtime::telemetry::init_logging;

/// From this on a cache in memory is worth huge pages: its look-ups then miss the TLB less often.
const LARGE_CACHE: u64 = 1 << 30;
/// And all models' files together, whose weights are read from end to end by each call.
const LARGE_MODELS: u64 = 64 << 20;
/// And a Snapshot, as it lies in its file: what is made of 5,000 models takes 70 MiB.
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

pub fn gateway(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_gateway::GatewaySettings = settings::read(&arguments.config)?;
    let snapshot = bytes_of(&settings.common.snapshot);
    allow_huge_pages(settings.results.memory.0 >= LARGE_CACHE || snapshot >= LARGE_SNAPSHOT);
    // The gateway's requests run on threads of its own; this one looks after the rest.
    serve(arguments, 1, settings.common.drain_timeout, |drain| spillway_gateway::run(settings, drain))
}

pub fn sidecar(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_sidecar::SidecarSettings = settings::read(&arguments.config)?;
    let cache = settings.features.as_ref().map_or(0, |features| features.memory.size.0);
    let models = settings.models.as_deref().map_or(0, bytes_in);
    let snapshot = bytes_of(&settings.common.snapshot);
    allow_huge_pages(cache >= LARGE_CACHE || models >= LARGE_MODELS || snapshot >= LARGE_SNAPSHOT);
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.common.drain_timeout, |drain| spillway_sidecar::run(settings, drain))
}

pub fn control(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_control::ControlSettings = settings::read(&arguments.config)?;
    allow_huge_pages(false);
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.drain_timeout, |drain| spillway_control::run(settings, drain))
}

pub fn dns(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_control::dns::DnsSettings = settings::read(&arguments.config)?;
    allow_huge_pages(false);
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

/// The allocator asks for huge pages, of which one byte in use takes 2 MiB: most of what an idle process would have. So
/// only what is large at the start has them (prctl(2), PR_SET_THP_DISABLE, which outlives execve).
fn allow_huge_pages(allow: bool) {
    if allow {
        // A kernel that has none refuses, which is as good; so below.
        let _ = set_thp_disable(false);
        return;
    }
    if get_thp_disable() != Ok(false) || set_thp_disable(true).is_err() {
        return;
    }
    // What was allocated before `main` lies in two of them already. In this program started anew, as the same process, it
    // does not; where that cannot be, this one goes on.
    let mut arguments = std::env::args_os();
    if let (Some(name), Ok(program)) = (arguments.next(), std::env::current_exe()) {
        let _ = Command::new(program).arg0(name).args(arguments).exec();
    }
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
