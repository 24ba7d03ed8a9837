//! The small unary call, mTLS h2 in and mTLS h2 out, through Spillway's gateway and through Envoy.
//!
//! The proxies take turns on one core with the same upstream and the same load, and who begins changes
//! each time, so that a machine that slows down slows both. Each turn starts a new process.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use super::proxy::{Kind, envoy_version};
use super::results::{Results, figure};
use super::stand::{Extent, Stand, Turn};
use super::statistics::median;
use spillway_figures::Goal;

/// The gateway's share of Envoy's CPU time for each call.
const RATIO: f64 = 0.7;
/// Less than this of its core, and its calls per second are a lower bound.
const SATURATED: f64 = 0.95;
/// More than this of the two cores used by strangers, and the figures are doubtful.
const QUIET: f64 = 0.1;

pub fn run(extent: &Extent, kinds: &[Kind], spillway: &Path, results: &mut Results) -> Result<()> {
    let stand = Stand::build(spillway)?;
    let mut turns: Vec<(Kind, Vec<Turn>)> = kinds.iter().map(|kind| (*kind, Vec::new())).collect();
    for repetition in 0..extent.repetitions {
        for (kind, turns) in &mut turns {
            let turn = stand.turn(*kind, false, extent);
            turns.push(turn.with_context(|| format!("{} in repetition {repetition}", kind.name()))?);
        }
        turns.reverse();
    }
    turns.sort_by_key(|(kind, _)| kinds.iter().position(|one| one == kind));
    report(extent, &turns, results)
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
            Kind::Spillway | Kind::Caching => "Spillway".to_owned(),
            Kind::Envoy => format!("Envoy {}", envoy_version()?),
        };
        writeln!(
            text,
            "| {name} | {} | {rate:.0} | {p50:.0} | {p99:.0} | {alone_p50:.0}, {alone_p99:.0} | {memory:.0} | {busy} | {own} | {load} | {others} |",
            cpu
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
            figure(&format!("path.bench.h2_mtls_unary.{prefix}{name}"), value, unit, Goal::None);
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
        write!(text, "\nRatio of CPU per call, Spillway to Envoy: **{}**; goal at most {RATIO}: {verdict}.", ratio)?;
        figure("path.bench.h2_mtls_unary.cpu_ratio_envoy", ratio.value, "ratio", Goal::AtMost(RATIO));
    }
    results.add(text.trim_end().to_owned());
    Ok(())
}
