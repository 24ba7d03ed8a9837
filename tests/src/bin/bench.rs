//! `bench`: what `make bench` runs. Without a subcommand it measures everything and writes the results.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use spillway_tests::bench::growth;
use spillway_tests::bench::load::part;
use spillway_tests::bench::machine::Machine;
use spillway_tests::bench::message::Protocol;
use spillway_tests::bench::path::{latency, tensor};
use spillway_tests::bench::peers::Kind;
use spillway_tests::bench::results::Results;
use spillway_tests::bench::sidecar::{self, cpu, lookup, model_server};
use spillway_tests::bench::smoke;
use spillway_tests::bench::stand::Extent;
use spillway_tests::bench::upstream;
use spillway_tests::bench::works::{cache, constant, cores, handshake, idle, open_loop, unary};

/// As in the binary that is measured: look-ups run in this process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Calls in flight at each proxy.
const IN_FLIGHT: usize = 64;
/// In a smoke run, which a slow build on a busy machine has to pass without shedding load.
const FEW_IN_FLIGHT: usize = 8;
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
    #[command(flatten)]
    Work(Work),
    /// Serve the one answer (a part of the works)
    #[command(hide = true)]
    Upstream {
        #[arg(long)]
        pki: PathBuf,
    },
    /// Do a load, which is JSON, and print what it found (a part of the works)
    #[command(hide = true)]
    Part { job: String },
    /// Serve a model that costs next to nothing (a part of the works)
    #[command(hide = true)]
    ModelServer,
}

#[derive(Subcommand)]
enum Work {
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
    /// Feature look-ups, beside Feast
    Lookup,
    /// CPU of a sidecar in front of a model server
    SidecarCpu,
    /// The whole path: latency, and a tensor of 1 MiB
    Path,
    /// How the cost grows with models, pods, tenants, policies and entities
    Growth(GrowthArguments),
}

#[derive(Args, Default)]
struct GrowthArguments {
    /// Only this
    #[arg(long)]
    only: Option<growth::Subject>,
}

#[derive(Args, Default)]
struct TurnArguments {
    /// Turns of each proxy
    #[arg(long)]
    repetitions: Option<usize>,
    /// Seconds that count in each turn
    #[arg(long)]
    seconds: Option<f64>,
}

#[derive(Args, Default)]
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
    let work = match command {
        Some(Command::Upstream { pki }) => return block_on(upstream::serve(&pki)),
        Some(Command::Part { job }) => return block_on(part::run(&job)),
        Some(Command::ModelServer) => return block_on(model_server::serve()),
        Some(Command::Work(work)) => Some(work),
        None => None,
    };
    let spillway = match spillway {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("spillway"),
    };
    ensure!(spillway.is_file(), "{} is missing; build it first: make dist", spillway.display());
    if cfg!(debug_assertions) {
        println!("THIS IS A DEBUG BUILD: its figures mean nothing.");
    }
    let mut bench = Bench { spillway, results: Results::new(Machine::read()) };
    match work {
        Some(work) => bench.run(work),
        None => bench.everything(),
    }
}

struct Bench {
    spillway: PathBuf,
    results: Results,
}

impl Bench {
    fn run(&mut self, work: Work) -> Result<()> {
        let Self { spillway, results } = self;
        match work {
            Work::Smoke => self.smoke(),
            Work::Unary(UnaryArguments { turns, protocol, only }) => {
                let protocols = if protocol.is_empty() { unary::PROTOCOLS.to_vec() } else { protocol };
                let kinds = if only.is_empty() { unary::PEERS.to_vec() } else { only };
                unary::run(&turns.of(unary_extent())?, &protocols, &kinds, spillway, results)
            }
            Work::Constant(turns) => constant::run(&turns.of(constant_extent())?, spillway, results),
            Work::Cache(turns) => cache::run(&turns.of(cache_extent())?, cache::WINDOWS, spillway, results),
            Work::OpenLoop => open_loop::run(&open_loop::Extent::default(), spillway, results),
            Work::Handshakes => handshake::run(&handshake::Extent::default(), spillway, results),
            Work::Idle => idle::run(&idle::Extent::default(), spillway, results),
            Work::Cores => cores::run(&cores::Extent::default(), spillway, results),
            Work::Lookup => lookup::run(&sidecar::Extent::default(), results),
            Work::SidecarCpu => cpu::run(&sidecar::Extent::default(), results),
            Work::Path => {
                let extent = sidecar::Extent::default();
                match (latency::run(&extent, results), tensor::run(&extent, results)) {
                    (Err(first), Err(second)) => bail!("{first:#}; {second:#}"),
                    (latency, tensor) => latency.and(tensor),
                }
            }
            Work::Growth(GrowthArguments { only }) => {
                growth::run(&growth::Extent { only, ..growth::Extent::default() }, spillway, results)
            }
        }
    }

    /// Measures all, one work after the other, and writes down what came of it. One that fails takes no other with it: its goals
    /// are not measured, which the results and the exit status say.
    fn everything(&mut self) -> Result<()> {
        let all = [
            Work::Unary(UnaryArguments::default()),
            Work::Constant(TurnArguments::default()),
            Work::Cache(TurnArguments::default()),
            Work::OpenLoop,
            Work::Handshakes,
            Work::Idle,
            Work::Cores,
            Work::Lookup,
            Work::SidecarCpu,
            Work::Path,
            Work::Growth(GrowthArguments::default()),
        ];
        let mut failed = 0;
        for work in all {
            if let Err(error) = self.run(work) {
                self.results.add(format!("**A work ended with an error: {error:#}**"));
                failed += 1;
            }
        }
        self.results.write()?;
        ensure!(failed == 0, "{failed} works were not measured to their end: tests/bench/RESULTS.md says why");
        Ok(())
    }

    fn smoke(&mut self) -> Result<()> {
        ensure!(
            cfg!(debug_assertions) || std::env::var_os(spillway_figures::PATH).is_some(),
            "a smoke run has no figures: set {} to a file that is thrown away",
            spillway_figures::PATH
        );
        let Self { spillway, results } = self;
        let extent = Extent { repetitions: 1, warm_up: MOMENT, measure: MOMENT, in_flight: FEW_IN_FLIGHT };
        unary::run(&extent, &unary::PROTOCOLS, &unary::PEERS, spillway, results)?;
        smoke::check(results, "Small unary call, mTLS to mTLS", unary::PROTOCOLS.len() * unary::PEERS.len())?;
        constant::run(&extent, spillway, results)?;
        smoke::check(results, "Answers without an upstream", constant::WORKS.len() * constant::PEERS.len())?;
        cache::run(&extent, 1, spillway, results)?;
        smoke::check(results, "Result cache without hits", 2)?;
        open_loop::run(&open_loop::Extent::smoke(), spillway, results)?;
        smoke::check(results, "Latency under load, gRPC", 9)?;
        smoke::check(results, "Latency under load, REST over HTTP/2", 9)?;
        handshake::run(&handshake::Extent::smoke(), spillway, results)?;
        smoke::check(results, "New connections", 4)?;
        idle::run(&idle::Extent::smoke(), spillway, results)?;
        smoke::check(results, "Idle memory", 6)?;
        cores::run(&cores::Extent::smoke(), spillway, results)?;
        smoke::check(results, "One worker thread and two", 2)?;
        lookup::run(&sidecar::Extent::SMOKE, results)?;
        smoke::check(results, "Feature look-up, beside Feast", 18)?;
        cpu::run(&sidecar::Extent::SMOKE, results)?;
        smoke::check(results, "A sidecar's CPU in front of a model server", 3)?;
        latency::run(&sidecar::Extent::SMOKE, results)?;
        smoke::check(results, "The whole path", 2)?;
        tensor::run(&sidecar::Extent::SMOKE, results)?;
        smoke::check(results, "A tensor of 1 MiB through both hops", 2)?;
        growth::run(&growth::Extent::smoke(), spillway, results)?;
        for what in ["models", "pods", "tenants", "policies"] {
            smoke::check(results, &format!("How the cost grows: {what}"), 2)?;
        }
        smoke::check(results, "How the cost grows: feature entities", 1)
    }
}

fn unary_extent() -> Extent {
    extent(5, 0.75, 2.0)
}

fn constant_extent() -> Extent {
    extent(5, 0.5, 1.5)
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

/// One thread: the process is bound to one core anyway.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, work)
}
