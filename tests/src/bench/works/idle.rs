//! What waits costs memory: an idle gateway, an idle sidecar, and each idle mTLS connection to a proxy.
//!
//! All of it is resident memory as the kernel says it (VmRSS). The gateway and the sidecar are those of a small
//! region with embedded defaults; connections are counted as [`crate::bench::load::idle`] tells.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spillway_figures::Goal;

use super::turns::{interleaved, values};
use crate::bench::load::idle::{Found, Idle};
use crate::bench::load::part::Job;
use crate::bench::message::Protocol;
use crate::bench::peers::Kind;
use crate::bench::process;
use crate::bench::results::{Results, figure, verdict};
use crate::bench::stand::Stand;
use crate::bench::statistics::median;
use crate::harness::region::Region;

/// Of a gateway and of a sidecar, MiB.
const PROCESS: Goal = Goal::AtMost(30.0);
/// Of a connection, KiB.
const CONNECTION: Goal = Goal::AtMost(25.0);
const PEERS: [Kind; 4] = [Kind::Spillway, Kind::Envoy, Kind::Haproxy, Kind::Nginx];
/// Files that a process opens beside its connections, and more.
const OTHER_FILES: usize = 500;

#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub repetitions: usize,
    pub connections: usize,
    /// Between the last work of a process and a look at its memory.
    pub settle: Duration,
}

impl Default for Extent {
    fn default() -> Self {
        Self { repetitions: 3, connections: 2_000, settle: Duration::from_secs(1) }
    }
}

impl Extent {
    /// Shows that it runs, and measures nothing.
    pub fn smoke() -> Self {
        Self { repetitions: 1, connections: 100, settle: Duration::from_millis(50) }
    }
}

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    allow_files(extent.connections + OTHER_FILES)?;
    let processes = (0..extent.repetitions).map(|_| processes(extent)).collect::<Result<Vec<_>>>()?;
    let stand = Stand::build(spillway)?;
    let turns = interleaved(&PEERS, extent.repetitions, |kind, _| turn(&stand, kind, extent))?;
    report(extent, &processes, &turns, results)
}

/// An idle gateway and an idle sidecar.
struct Processes {
    gateway: Size,
    sidecar: Size,
}

/// Memory of a process, bytes.
#[derive(Clone, Copy)]
struct Size {
    resident: u64,
    /// What of it belongs to no file.
    anonymous: u64,
}

fn processes(extent: &Extent) -> Result<Processes> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut region = Region::new("bench-idle");
    region.set_pods(1);
    runtime.block_on(async {
        region.start().await;
        tokio::time::sleep(extent.settle).await;
    });
    let size = |process: &crate::harness::process::Process| {
        let pid = process.pid().as_raw().unsigned_abs();
        anyhow::Ok(Size { resident: process::resident(pid)?, anonymous: process::anonymous(pid)? })
    };
    let found = Processes {
        gateway: size(region.gateway())?,
        sidecar: size(region.sidecars.first().context("there is no sidecar")?)?,
    };
    println!("idle: gateway {:.1} MiB, sidecar {:.1} MiB", mib(found.gateway.resident), mib(found.sidecar.resident));
    Ok(found)
}

fn turn(stand: &Stand, kind: Kind, extent: &Extent) -> Result<Found> {
    let proxy = stand.proxy(kind, Protocol::Grpc)?;
    let job = Job::Idle(Idle {
        pki: stand.setting.identities.folder().to_owned(),
        address: proxy.address,
        connections: extent.connections,
        settle: extent.settle,
        proxy: proxy.pid,
    });
    let found: Found = job.start(&[stand.load_core])?;
    println!("{:10} {:.1} KiB/connection, {:.1} MiB before", kind.name(), found.each() / KIB, mib(found.before));
    Ok(found)
}

const KIB: f64 = 1024.0;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / KIB / KIB
}

/// Lets this process, and those that it starts from now on, open this many files each.
fn allow_files(count: usize) -> Result<()> {
    let limits = std::fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("no limit of open files")?;
    let soft = line.split_whitespace().next().context("no limit of open files")?;
    if soft == "unlimited" || soft.parse::<usize>()? >= count {
        return Ok(());
    }
    // util-linux; the soft limit alone.
    let mut raise = Command::new("prlimit");
    raise.args(["--pid", &std::process::id().to_string(), &format!("--nofile={count}:")]);
    let raised = raise.status().context("prlimit is needed")?.success();
    ensure!(raised, "{count} open files are needed, and no more than {soft} are allowed: see ulimit -Hn");
    Ok(())
}

/// A process of the product, and what is known of it.
type Own = (&'static str, fn(&Processes) -> Size);

fn report(extent: &Extent, processes: &[Processes], turns: &[(Kind, Vec<Found>)], results: &mut Results) -> Result<()> {
    let Extent { repetitions, connections, settle } = extent;
    let mut text = format!(
        "## Idle memory\n\n\
         Resident memory (VmRSS), {repetitions} starts each. Gateway and sidecar: a region with one pod, {} s after all was ready; embedded defaults (worker\n\
         threads one a core, SQLite, the ONNX model of `spillway dev` loaded, its 2,500 rows of features written). Median [95 % interval].\n\n\
         | idle process | MiB | of it in no file, MiB | goal at most | |\n|---|---|---|---|---|\n",
        settle.as_secs_f64(),
    );
    let own: [Own; 2] = [("gateway", |found| found.gateway), ("sidecar", |found| found.sidecar)];
    for (name, of) in own {
        let sizes = values(processes, |found| mib(of(found).resident));
        let size = median(&sizes);
        let anonymous = median(&values(processes, |found| mib(of(found).anonymous)));
        results.sample("idle", name, "RSS", "MiB", &sizes);
        figure(&format!("speed.idle.{name}_rss_mib"), size.value, "MiB", PROCESS);
        writeln!(text, "| {name} | {size:.1} | {anonymous:.1} | 30 | {} |", verdict(size.value, PROCESS))?;
    }
    write!(
        text,
        "\nEach connection: {connections} more mTLS HTTP/2 connections to a proxy that has served some already, each after one call that was answered; what\n\
         resident memory grew by, for each of them. One worker thread each.\n\n\
         | | KiB a connection | MiB before | goal at most | |\n|---|---|---|---|---|\n"
    )?;
    for (kind, turns) in turns {
        let title = kind.title()?;
        let sizes = values(turns, |found| found.each() / KIB);
        let size = median(&sizes);
        results.sample("idle connection", &title, "RSS", "KiB", &sizes);
        let ours = *kind == Kind::Spillway;
        let goal = if ours { CONNECTION } else { Goal::None };
        let (limit, verdict) = if ours { ("25", verdict(size.value, goal)) } else { ("", "") };
        let name = if ours { String::new() } else { format!("{}_", kind.name()) };
        figure(&format!("speed.idle.{name}connection_kib"), size.value, "KiB", goal);
        let before = median(&values(turns, |found| mib(found.before))).value;
        writeln!(text, "| {} | {size:.1} | {before:.0} | {limit} | {verdict} |", title)?;
    }
    results.add(text);
    Ok(())
}
