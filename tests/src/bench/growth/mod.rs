//! How the cost of a call grows with what there is: models, pods, tenants, policies, feature entities.
//!
//! The rule: what a call costs is to be the same in a small world and in a large one. It is said to be flat where the
//! dearest size costs at most [`FLAT`] times the cheapest. What a new version costs may grow; the tables say how.
//!
//! * [`world`]: what a gateway knows; [`pki`], [`pods`], [`callers`], [`message`]: whom it meets.
//! * [`gateway`]: the real process; [`decisions`]: the same decisions in process.
//! * [`entities`]: feature look-ups. [`report`]: tables, plots, verdicts.

mod callers;
mod decisions;
mod entities;
mod gateway;
mod message;
mod pki;
mod pods;
mod report;
mod world;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustls::ClientConfig;
use spillway_runtime::snapshot;

use super::process;
use super::results::Results;
use callers::{Calls, Found};
use gateway::{Applied, Gateway, Sealed};
use pki::Pki;
use pods::Pods;
use world::{What, World};

/// The dearest size to the cheapest: beyond it a cost is not flat.
pub const FLAT: f64 = 1.25;
/// Connections, and calls in flight on each.
const CONNECTIONS: usize = 8;
const STREAMS: usize = 8;
/// Where tenants grow, each connection is another tenant's, with one call in flight.
const TENANTS: usize = CONNECTIONS * STREAMS;
/// How long new pods are met before anything counts, each.
const MEETING: Duration = Duration::from_millis(3);

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Subject {
    Models,
    Pods,
    Tenants,
    Policies,
    Entities,
}

impl Subject {
    const ALL: [Self; 5] = [Self::Models, Self::Pods, Self::Tenants, Self::Policies, Self::Entities];

    /// What of a gateway's world that is.
    fn world(self) -> Option<What> {
        match self {
            Self::Models => Some(What::Models),
            Self::Pods => Some(What::Pods),
            Self::Tenants => Some(What::Tenants),
            Self::Policies => Some(What::Policies),
            Self::Entities => None,
        }
    }
}

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// None: all.
    pub only: Option<Subject>,
    pub repetitions: usize,
    pub warm_up: Duration,
    pub measure: Duration,
    /// Of one decision in process, and of look-ups in one tier and size.
    pub measure_in_process: Duration,
    /// The most entities whose features are looked up.
    pub entities: usize,
}

impl Default for Extent {
    fn default() -> Self {
        Self {
            only: None,
            repetitions: 3,
            warm_up: Duration::from_millis(700),
            measure: Duration::from_millis(1_500),
            measure_in_process: Duration::from_millis(1_000),
            entities: 10_000_000,
        }
    }
}

impl Extent {
    /// Shows that it runs, and measures nothing of worth.
    pub fn smoke() -> Self {
        let moment = Duration::from_millis(50);
        Self {
            only: None,
            repetitions: 1,
            warm_up: moment,
            measure: moment,
            measure_in_process: moment,
            entities: 10_000,
        }
    }

    /// A smoke test takes the smallest and the middle size.
    fn sizes(&self, what: What) -> Vec<usize> {
        let sizes = what.sizes();
        if self.repetitions > 1 { sizes.to_vec() } else { sizes[..2].to_vec() }
    }
}

/// One world in one repetition.
#[derive(Clone, Copy, Debug)]
struct Turn {
    served: Served,
    decision_ns: f64,
    snapshot_bytes: usize,
    check: Duration,
    open: Duration,
}

/// What a gateway showed.
#[derive(Clone, Copy, Debug)]
struct Served {
    busy: Found,
    /// One call at a time: none shares a write with another.
    alone: Found,
    /// CPU time in each second without a call, ms.
    idle: f64,
    resident: u64,
    applied: Applied,
}

/// One world.
struct Size {
    count: usize,
    turns: Vec<Turn>,
}

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    let [gateway_core, load_core, ..] = process::cores()?[..] else {
        bail!("the bench needs two cores: one for the gateway, one for load and pods");
    };
    let folder = tempfile::Builder::new().prefix("spillway-growth-").tempdir()?;
    let pki = Pki::create(&folder.path().join("pki"))?;
    let most = extent.sizes(What::Pods).last().copied().unwrap_or_default();
    let pods = Pods::start(most, &pki, load_core)?;
    let stage = Stage { extent, spillway, folder: folder.path(), pki, pods, gateway_core };
    let subjects = Subject::ALL.into_iter().filter(|subject| extent.only.is_none_or(|only| only == *subject));
    for what in subjects.filter_map(Subject::world) {
        let mut sizes: Vec<Size> =
            extent.sizes(what).into_iter().map(|count| Size { count, turns: Vec::new() }).collect();
        for repetition in 0..extent.repetitions {
            for size in &mut sizes {
                let turn = process::on_cores(&[load_core], || stage.turn(what, size.count))?;
                let turn = turn.with_context(|| format!("{} {}, repetition {repetition}", size.count, what.name()))?;
                println!("{} {}: {turn:?}", size.count, what.name());
                size.turns.push(turn);
            }
            sizes.reverse();
        }
        sizes.sort_by_key(|size| size.count);
        report::world(what, &sizes, results)?;
    }
    if extent.only.is_some_and(|only| only != Subject::Entities) {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(entities::run(extent, results))
}

struct Stage<'a> {
    extent: &'a Extent,
    spillway: &'a Path,
    folder: &'a Path,
    pki: Pki,
    pods: Pods,
    gateway_core: usize,
}

impl Stage<'_> {
    fn turn(&self, what: What, count: usize) -> Result<Turn> {
        let world = World::of(what, count);
        let [first, second] = [(1, false), (2, true)]
            .map(|(version, marked)| Sealed::of(&world.resources(&self.pods.addresses, marked), version));
        let (first, second) = (first?, second?);
        let decision_ns =
            decisions::measure(what, &world, &snapshot::open(&first.bytes)?, self.extent.measure_in_process / 10)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let served = self.serve(what, &world, &first, &second);
        let served = tokio::task::LocalSet::new().block_on(&runtime, served)?;
        let Sealed { bytes, check, open } = &first;
        Ok(Turn { served, decision_ns, snapshot_bytes: bytes.len(), check: *check, open: *open })
    }

    async fn serve(&self, what: What, world: &World, first: &Sealed, second: &Sealed) -> Result<Served> {
        let folder = self.folder.join(what.name());
        let clients = self.clients(what, world)?;
        let first_client = clients.first().context("there are no clients")?.clone();
        let core = self.gateway_core;
        let gateway = Gateway::start(self.spillway, &folder, &self.pki, core, first, &first_client).await?;
        let many = Calls {
            address: gateway.address,
            gateway: gateway.pid(),
            clients,
            streams: if what == What::Tenants { 1 } else { STREAMS },
            models: world.models,
            warm_up: self.extent.warm_up + MEETING * u32::try_from(world.pods)?,
            measure: self.extent.measure,
        };
        let busy = callers::run(&many).await?;
        let one = Calls {
            clients: vec![first_client.clone()],
            streams: 1,
            warm_up: many.warm_up / 4,
            measure: many.measure / 2,
            ..many
        };
        let alone = callers::run(&one).await?;
        let resident = process::resident(gateway.pid())?;
        let idle = gateway.idle().await?;
        let applied = gateway.apply(second, &first_client).await?;
        // Some megabytes for each turn.
        std::fs::remove_dir_all(&folder)?;
        Ok(Served { busy, alone, idle, resident, applied })
    }

    /// Where tenants grow, they are as far apart as there are.
    fn clients(&self, what: What, world: &World) -> Result<Vec<Arc<ClientConfig>>> {
        if what != What::Tenants {
            return Ok(vec![self.pki.client(&world::tenant(0))?; CONNECTIONS]);
        }
        let apart = |at: usize| at * world.tenants / TENANTS;
        (0..TENANTS).map(|at| self.pki.client(&world::tenant(apart(at)))).collect()
    }
}

/// Runs on this thread, and says how much CPU time that took: others on the machine do not count.
fn on_cpu<T>(work: impl FnOnce() -> T) -> Result<(T, Duration)> {
    let used = || -> Result<Duration> {
        // The kernel brings the account of a running thread up to date when it schedules.
        std::thread::yield_now();
        let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
        let nanos = text.split(' ').next().and_then(|number| number.parse().ok());
        Ok(Duration::from_nanos(nanos.context("schedstat has no time on the CPU")?))
    };
    let before = used()?;
    let done = work();
    Ok((done, used()?.saturating_sub(before)))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_short_work_is_accounted() {
        let work = |time: Duration| {
            let start = Instant::now();
            while start.elapsed() < time {
                std::hint::spin_loop();
            }
        };
        let used: Duration = (0..20).map(|_| on_cpu(|| work(Duration::from_micros(500))).unwrap().1).sum();
        assert!(used > Duration::from_millis(2), "{used:?} of 10 ms, where others have the machine too");
    }
}
