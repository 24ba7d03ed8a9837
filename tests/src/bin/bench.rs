//! `bench`: what `make bench` runs. Without a subcommand it measures everything and writes the results.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use spillway_tests::bench::load::{self, Load};
use spillway_tests::bench::lookup;
use spillway_tests::bench::machine::Machine;
use spillway_tests::bench::proxy::Kind;
use spillway_tests::bench::results::Results;
use spillway_tests::bench::stand::Extent;
use spillway_tests::bench::upstream;
use spillway_tests::bench::{cache, compare};

/// As in the binary that is measured: look-ups run in this process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long look-ups of one size in one tier are measured.
const EACH_LOOK_UP: Duration = Duration::from_secs(3);

/// Measure Spillway beside others on this machine
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// The small unary call through Spillway and Envoy
    Compare(CompareArguments),
    /// The small unary call through Spillway with a result cache and without
    Cache(CompareArguments),
    /// Feature look-ups, tier by tier
    Lookup,
    /// Serve the one answer (a part of `compare`)
    Upstream(UpstreamArguments),
    /// Make calls and print one JSON object (a part of `compare`)
    Load(LoadArguments),
}

#[derive(Args)]
struct CompareArguments {
    /// Turns of each proxy
    #[arg(long, default_value_t = Self::default().repetitions)]
    repetitions: usize,
    /// Seconds that count in each turn
    #[arg(long, default_value_t = Self::default().seconds)]
    seconds: f64,
    #[arg(long, default_value_t = Self::default().connections)]
    connections: usize,
    /// Calls in flight on each connection
    #[arg(long, default_value_t = Self::default().streams)]
    streams: usize,
    /// Only this proxy: no ratio
    #[arg(long, value_parser = ["spillway", "envoy"])]
    only: Option<String>,
    /// The binary to measure [default: the one beside this]
    #[arg(long)]
    spillway: Option<PathBuf>,
}

impl Default for CompareArguments {
    fn default() -> Self {
        Self { repetitions: 7, seconds: 6.0, connections: 8, streams: 8, only: None, spillway: None }
    }
}

#[derive(Args)]
struct UpstreamArguments {
    #[arg(long)]
    pki: PathBuf,
}

#[derive(Args)]
struct LoadArguments {
    #[arg(long)]
    pki: PathBuf,
    #[arg(long)]
    address: SocketAddr,
    #[arg(long)]
    connections: usize,
    #[arg(long)]
    streams: usize,
    /// No two calls are the same
    #[arg(long)]
    distinct: bool,
    #[arg(long)]
    warm_up_ms: u64,
    #[arg(long)]
    measure_ms: u64,
    /// Process ids whose CPU time is taken
    #[arg(long)]
    proxy: u32,
    #[arg(long)]
    upstream: u32,
    #[arg(long)]
    proxy_core: usize,
    #[arg(long)]
    load_core: usize,
}

fn main() -> Result<()> {
    spillway_runtime::tls::install_provider();
    match Arguments::parse().command {
        Some(Command::Upstream(arguments)) => block_on(upstream::serve(&arguments.pki)),
        Some(Command::Load(arguments)) => generate(&arguments),
        Some(Command::Compare(arguments)) => compare(&arguments, &mut Results::new(Machine::read())),
        Some(Command::Cache(arguments)) => cache(&arguments, &mut Results::new(Machine::read())),
        Some(Command::Lookup) => look_up(&mut Results::new(Machine::read())),
        None => {
            let mut results = Results::new(Machine::read());
            compare(&CompareArguments::default(), &mut results)?;
            // What is looked for is smaller than the difference between two turns: many of them.
            cache(&CompareArguments { repetitions: 20, seconds: 3.0, ..CompareArguments::default() }, &mut results)?;
            look_up(&mut results)?;
            results.write()
        }
    }
}

fn compare(arguments: &CompareArguments, results: &mut Results) -> Result<()> {
    let kinds: &[Kind] = match arguments.only.as_deref() {
        Some("spillway") => &[Kind::Spillway],
        Some(_) => &[Kind::Envoy],
        None => &[Kind::Spillway, Kind::Envoy],
    };
    compare::run(&arguments.extent()?, kinds, &arguments.spillway(kinds == [Kind::Envoy])?, results)
}

fn cache(arguments: &CompareArguments, results: &mut Results) -> Result<()> {
    ensure!(arguments.only.as_deref() != Some("envoy"), "only Spillway has a result cache");
    cache::run(&arguments.extent()?, &arguments.spillway(false)?, results)
}

impl CompareArguments {
    /// The binary to measure.
    fn spillway(&self, unused: bool) -> Result<PathBuf> {
        let path = match &self.spillway {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("spillway"),
        };
        ensure!(
            unused || Path::new(&path).is_file(),
            "{} is missing; build it first: cargo build --release -p spillway",
            path.display()
        );
        Ok(path)
    }

    fn extent(&self) -> Result<Extent> {
        ensure!(self.repetitions > 0 && self.connections > 0 && self.streams > 0, "expected at least 1");
        if cfg!(debug_assertions) {
            println!("THIS IS A DEBUG BUILD: its figures mean nothing.");
        }
        Ok(Extent {
            repetitions: self.repetitions,
            warm_up: Duration::from_secs(1),
            measure: Duration::try_from_secs_f64(self.seconds)?,
            connections: self.connections,
            streams: self.streams,
        })
    }
}

fn look_up(results: &mut Results) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(lookup::run(EACH_LOOK_UP, results))
}

fn generate(arguments: &LoadArguments) -> Result<()> {
    let load = Load {
        address: arguments.address,
        connections: arguments.connections,
        streams: arguments.streams,
        distinct: arguments.distinct,
        warm_up: Duration::from_millis(arguments.warm_up_ms),
        measure: Duration::from_millis(arguments.measure_ms),
        proxy: arguments.proxy,
        upstream: arguments.upstream,
        proxy_core: arguments.proxy_core,
        load_core: arguments.load_core,
    };
    let window = block_on(load::run(&load, &arguments.pki))?;
    println!("{}", serde_json::to_string(&window)?);
    Ok(())
}

/// One thread: the process is bound to one core anyway.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, work)
}
