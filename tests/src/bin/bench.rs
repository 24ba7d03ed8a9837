//! `bench`: what `make bench` runs. Without a subcommand it measures everything and writes the results.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use spillway_tests::bench::load::part;
use spillway_tests::bench::lookup;
use spillway_tests::bench::machine::Machine;
use spillway_tests::bench::message::Protocol;
use spillway_tests::bench::peers::Kind;
use spillway_tests::bench::results::Results;
use spillway_tests::bench::smoke;
use spillway_tests::bench::stand::Extent;
use spillway_tests::bench::upstream;
use spillway_tests::bench::works::{cache, constant, cores, handshake, idle, open_loop, unary};

/// As in the binary that is measured: look-ups run in this process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long look-ups of one size in one tier are measured.
const EACH_LOOK_UP: Duration = Duration::from_secs(3);
/// Calls in flight at each proxy.
const IN_FLIGHT: usize = 64;
/// How long each of the works of this file is measured in a smoke run.
const MOMENT: Duration = Duration::from_millis(100);

/// Measure Spillway beside others on this machine
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// The binary to measure [default: the one beside this]
    #[arg(long, global = true)]
    spillway: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Everything for a moment, to see that it runs; writes nothing
    Smoke,
    /// The small unary call through each proxy
    Unary(UnaryArguments),
    /// Answers without an upstream: hits, and constants of other proxies
    Constant(TurnArguments),
    /// The result cache without hits, beside a gateway without it
    Cache(TurnArguments),
    /// Latency at shares of the capacity
    OpenLoop,
    /// Full and resumed handshakes
    Handshakes,
    /// Memory of what stands idle
    Idle,
    /// One and two cores
    Cores,
    /// Feature look-ups, tier by tier
    Lookup,
    /// Serve the one answer (a part of the others)
    #[command(hide = true)]
    Upstream {
        #[arg(long)]
        pki: PathBuf,
    },
    /// Do a load, which is JSON, and print what it found (a part of the others)
    #[command(hide = true)]
    Part { job: String },
}

#[derive(Args)]
struct TurnArguments {
    /// Turns of each proxy
    #[arg(long)]
    repetitions: Option<usize>,
    /// Seconds that count in each turn
    #[arg(long)]
    seconds: Option<f64>,
}

#[derive(Args)]
struct UnaryArguments {
    #[command(flatten)]
    turns: TurnArguments,
    /// Only these protocols
    #[arg(long)]
    protocol: Vec<Protocol>,
    /// Only these proxies
    #[arg(long)]
    only: Vec<Kind>,
}

fn main() -> Result<()> {
    spillway_runtime::tls::install_provider();
    let Arguments { command, spillway } = Arguments::parse();
    let command = match command {
        Some(Command::Upstream { pki }) => return block_on(upstream::serve(&pki)),
        Some(Command::Part { job }) => return block_on(part::run(&job)),
        command => command,
    };
    let spillway = match spillway {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("spillway"),
    };
    ensure!(spillway.is_file(), "{} is missing; build it first: cargo build --release -p spillway", spillway.display());
    if cfg!(debug_assertions) {
        println!("THIS IS A DEBUG BUILD: its figures mean nothing.");
    }
    let mut bench = Bench { spillway, results: Results::new(Machine::read()) };
    match command {
        Some(command) => bench.run(command),
        None => bench.everything(),
    }
}

struct Bench {
    spillway: PathBuf,
    results: Results,
}

impl Bench {
    fn run(&mut self, command: Command) -> Result<()> {
        let Self { spillway, results } = self;
        match command {
            Command::Smoke => self.smoke(),
            Command::Unary(UnaryArguments { turns, protocol, only }) => {
                let protocols = if protocol.is_empty() { unary::PROTOCOLS.to_vec() } else { protocol };
                let kinds = if only.is_empty() { unary::PEERS.to_vec() } else { only };
                unary::run(&turns.of(unary_extent())?, &protocols, &kinds, spillway, results)
            }
            Command::Constant(turns) => constant::run(&turns.of(constant_extent())?, spillway, results),
            Command::Cache(turns) => cache::run(&turns.of(cache_extent())?, cache::WINDOWS, spillway, results),
            Command::OpenLoop => open_loop::run(&open_loop::Extent::default(), spillway, results),
            Command::Handshakes => handshake::run(&handshake::Extent::default(), spillway, results),
            Command::Idle => idle::run(&idle::Extent::default(), spillway, results),
            Command::Cores => cores::run(&cores::Extent::default(), spillway, results),
            Command::Lookup => look_up(results),
            Command::Upstream { .. } | Command::Part { .. } => unreachable!("these need no stand"),
        }
    }

    fn everything(&mut self) -> Result<()> {
        let Self { spillway, results } = self;
        unary::run(&unary_extent(), &unary::PROTOCOLS, &unary::PEERS, spillway, results)?;
        constant::run(&constant_extent(), spillway, results)?;
        cache::run(&cache_extent(), cache::WINDOWS, spillway, results)?;
        open_loop::run(&open_loop::Extent::default(), spillway, results)?;
        handshake::run(&handshake::Extent::default(), spillway, results)?;
        idle::run(&idle::Extent::default(), spillway, results)?;
        cores::run(&cores::Extent::default(), spillway, results)?;
        look_up(results)?;
        results.write()
    }

    fn smoke(&mut self) -> Result<()> {
        ensure!(
            cfg!(debug_assertions) || std::env::var_os(spillway_figures::PATH).is_some(),
            "a smoke run has no figures: set {} to a file that is thrown away",
            spillway_figures::PATH
        );
        let Self { spillway, results } = self;
        let extent = Extent { repetitions: 1, warm_up: MOMENT, measure: MOMENT, in_flight: IN_FLIGHT };
        unary::run(&extent, &unary::PROTOCOLS, &unary::PEERS, spillway, results)?;
        smoke::check(results, "Small unary call, mTLS to mTLS", unary::PROTOCOLS.len() * unary::PEERS.len())?;
        constant::run(&extent, spillway, results)?;
        smoke::check(results, "Answers without an upstream", constant::WORKS.len() * constant::PEERS.len())?;
        cache::run(&extent, 1, spillway, results)?;
        smoke::check(results, "Result cache without hits", 2)?;
        Ok(())
    }
}

fn unary_extent() -> Extent {
    extent(5, 1.0, 2.5)
}

fn constant_extent() -> Extent {
    extent(5, 0.75, 2.0)
}

/// Many short windows: what is looked for is smaller than the difference between two turns.
fn cache_extent() -> Extent {
    extent(4, 0.2, 0.6)
}

fn extent(repetitions: usize, warm_up: f64, measure: f64) -> Extent {
    let [warm_up, measure] = [warm_up, measure].map(Duration::from_secs_f64);
    Extent { repetitions, warm_up, measure, in_flight: IN_FLIGHT }
}

impl TurnArguments {
    fn of(&self, default: Extent) -> Result<Extent> {
        let repetitions = self.repetitions.unwrap_or(default.repetitions);
        ensure!(repetitions > 0, "expected at least 1 repetition");
        let measure = self.seconds.map(Duration::try_from_secs_f64).transpose()?.unwrap_or(default.measure);
        Ok(Extent { repetitions, measure, ..default })
    }
}

fn look_up(results: &mut Results) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(lookup::run(EACH_LOOK_UP, results))
}

/// One thread: the process is bound to one core anyway.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, work)
}
