//! The small unary call, mTLS h2 in and mTLS h2 out, through Spillway's gateway and through Envoy.
//!
//! The proxies take turns on one core with the same upstream and the same load, and who begins changes
//! each time, so that a machine that slows down slows both. Each turn starts a new process.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::identities::Identities;
use super::load::{Load, Window};
use super::process::{self, Process};
use super::proxy::{Kind, Proxy, Setting, envoy_version};
use super::results::{Results, figure};
use super::statistics::{Median, median};
use crate::figures::Goal;

/// The gateway's share of Envoy's CPU time for each call.
const RATIO: f64 = 0.7;
/// Less than this of its core, and its calls per second are a lower bound.
const SATURATED: f64 = 0.95;
/// More than this of the two cores used by strangers, and the figures are doubtful.
const QUIET: f64 = 0.1;

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
struct Turn {
    busy: Window,
    /// One call at a time.
    alone: Window,
    resident: u64,
}

pub fn run(extent: &Extent, kinds: &[Kind], spillway: &Path, results: &mut Results) -> Result<()> {
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
    let mut turns: Vec<(Kind, Vec<Turn>)> = kinds.iter().map(|kind| (*kind, Vec::new())).collect();
    for repetition in 0..extent.repetitions {
        for (kind, turns) in &mut turns {
            let turn = turn(*kind, &setting, extent, upstream.id(), load_core)
                .with_context(|| format!("{} in repetition {repetition}", kind.name()))?;
            println!(
                "{repetition} {:8} {:6.2} us/call  {:6.0} calls/s  p50 {:5.0} us  p99 {:5.0} us  proxy's core {:.0} % busy",
                kind.name(),
                turn.busy.proxy_us(),
                turn.busy.per_second(),
                turn.busy.p50_us,
                turn.busy.p99_us,
                turn.busy.proxy_core_busy * 100.0
            );
            turns.push(turn);
        }
        turns.reverse();
    }
    turns.sort_by_key(|(kind, _)| kinds.iter().position(|one| one == kind));
    report(extent, &turns, results)
}

fn turn(kind: Kind, setting: &Setting, extent: &Extent, upstream: u32, load_core: usize) -> Result<Turn> {
    let proxy = Proxy::start(kind, setting)?;
    let load = |connections, streams, warm_up, measure| Load {
        address: proxy.address,
        connections,
        streams,
        warm_up,
        measure,
        proxy: proxy.pid,
        upstream,
        proxy_core: setting.core,
        load_core,
    };
    let busy = generate(&load(extent.connections, extent.streams, extent.warm_up, extent.measure), setting)?;
    let resident = process::resident(proxy.pid)?;
    let alone = generate(&load(1, 1, extent.warm_up / 4, extent.measure / 4), setting)?;
    // Both write the log behind the answers, in blocks: not all lines must be there yet.
    let (logged, answered) = (proxy.logged()?, busy.answered);
    ensure!(logged as u64 >= answered, "{answered} calls were answered, but only {logged} are in the access log");
    Ok(Turn { busy, alone, resident })
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
    command.stdin(Stdio::null());
    let output = process::on_core(load.load_core, || command.output())??;
    ensure!(output.status.success(), "the load ended early: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("the load's report cannot be read")
}

fn report(extent: &Extent, turns: &[(Kind, Vec<Turn>)], results: &mut Results) -> Result<()> {
    let of = |turns: &[Turn], value: &dyn Fn(&Turn) -> f64| median(&turns.iter().map(value).collect::<Vec<_>>());
    let mut text = format!(
        "## Small unary call, mTLS h2 to mTLS h2\n\n\
         A `ModelInfer` of 172 B, answered with 300 B, TLS 1.3 (AES-128-GCM, X25519MLKEM768 where offered) with client certificates on both hops,\n\
         the client's SPIFFE id judged for the path, one JSON line a call. One core for the proxy (one worker thread each), one for\n\
         upstream and load. Closed loop: {} connections, {} calls in flight on each; {} turns of {} s each, interleaved.\n\
         Every answer was checked. Median [95 % interval].\n\n\
         | | CPU µs/call | calls/s | p50 µs | p99 µs | one call at a time: p50 µs, p99 µs | memory MiB | proxy's core busy | its own share | load's core busy | others |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
        extent.connections,
        extent.streams,
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let mut notes = String::new();
    for (kind, turns) in turns {
        let cpu = of(turns, &|turn| turn.busy.proxy_us());
        let (rate, p50, p99) = (
            of(turns, &|turn| turn.busy.per_second()).value,
            of(turns, &|turn| turn.busy.p50_us).value,
            of(turns, &|turn| turn.busy.p99_us).value,
        );
        let (alone_p50, alone_p99) =
            (of(turns, &|turn| turn.alone.p50_us).value, of(turns, &|turn| turn.alone.p99_us).value);
        let memory = of(turns, &|turn| turn.resident as f64 / f64::from(1 << 20)).value;
        let shares: [f64; 4] = [
            of(turns, &|turn| turn.busy.proxy_core_busy).value,
            of(turns, &|turn| turn.busy.proxy_share()).value,
            of(turns, &|turn| turn.busy.load_core_busy).value,
            of(turns, &|turn| turn.busy.others()).value,
        ];
        let [busy, own, load, others] = shares.map(|share| format!("{:.0} %", share * 100.0));
        let name = match kind {
            Kind::Spillway => "Spillway".to_owned(),
            Kind::Envoy => format!("Envoy {}", envoy_version()?),
        };
        writeln!(
            text,
            "| {name} | {} | {rate:.0} | {p50:.0} | {p99:.0} | {alone_p50:.0}, {alone_p99:.0} | {memory:.0} | {busy} | {own} | {load} | {others} |",
            shown(cpu)
        )?;
        for (name, value, unit) in [
            ("cpu_us", cpu.value, "us"),
            ("calls_per_s", rate, "1/s"),
            ("p50_us", p50, "us"),
            ("p99_us", p99, "us"),
            ("alone_p50_us", alone_p50, "us"),
            ("alone_p99_us", alone_p99, "us"),
            ("rss_mib", memory, "MiB"),
        ] {
            let prefix = if *kind == Kind::Spillway { "" } else { "envoy_" };
            figure(&format!("h2_mtls_unary.{prefix}{name}"), value, unit, Goal::None);
        }
        if shares[1] < SATURATED {
            writeln!(notes, "\n**{name} did not fill its core: CPU per call holds, calls/s is a lower bound.**")?;
        }
        if shares[3] > QUIET {
            writeln!(
                notes,
                "\n**Others used {others} of a core while {name} was measured: the figures are doubtful.**"
            )?;
        }
    }
    text.push_str(&notes);
    if let [(_, ours), (_, theirs)] = turns {
        let ratios: Vec<f64> =
            ours.iter().zip(theirs).map(|(ours, theirs)| ours.busy.proxy_us() / theirs.busy.proxy_us()).collect();
        let ratio = median(&ratios);
        let verdict = if ratio.value <= RATIO { "holds" } else { "**missed**" };
        write!(
            text,
            "\nRatio of CPU per call, Spillway to Envoy: **{}**; goal at most {RATIO}: {verdict}.",
            shown(ratio)
        )?;
        figure("h2_mtls_unary.cpu_ratio_envoy", ratio.value, "ratio", Goal::AtMost(RATIO));
    }
    results.add(text.trim_end().to_owned());
    Ok(())
}

fn shown(median: Median) -> String {
    format!("{:.2} [{:.2}, {:.2}]", median.value, median.low, median.high)
}
