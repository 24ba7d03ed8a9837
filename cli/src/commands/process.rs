//! `spillway gateway`, `spillway sidecar` and `spillway control`: settings in, a process that runs until it is told to drain.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use spillway_runtime::drain::Drain;
use spillway_runtime::settings;
use spillway_runtime::telemetry::init_logging;

#[derive(clap::Args)]
pub struct Arguments {
    /// The process settings, a YAML file
    #[arg(short, long, value_name = "FILE", env = "SPILLWAY_CONFIG")]
    config: PathBuf,
    /// Read the settings, print every fault, and leave; nothing listens
    #[arg(long)]
    check: bool,
}

pub fn gateway(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_gateway::GatewaySettings = settings::read(&arguments.config)?;
    // The gateway's requests run on threads of its own; this one looks after the rest.
    serve(arguments, 1, settings.common.drain_timeout, |drain| spillway_gateway::run(settings, drain))
}

pub fn sidecar(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_sidecar::SidecarSettings = settings::read(&arguments.config)?;
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.common.drain_timeout, |drain| spillway_sidecar::run(settings, drain))
}

pub fn control(arguments: &Arguments) -> Result<ExitCode> {
    let settings: spillway_control::ControlSettings = settings::read(&arguments.config)?;
    let cores = std::thread::available_parallelism()?.get();
    serve(arguments, cores, settings.drain_timeout, |drain| spillway_control::run(settings, drain))
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
