//! The table of a work that is measured in turns: one row a peer, what went into the results as samples, and
//! what makes a row doubtful.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use spillway_figures::Goal;

use super::turns::{of, ratio, values};
use crate::bench::peers::Kind;
use crate::bench::results::{Results, figure, verdict};
use crate::bench::stand::Turn;
use crate::bench::statistics::{Median, median};

/// Less than this of its core, and a proxy's calls per second are a lower bound.
const SATURATED: f64 = 0.95;
/// More than this of the load's core, and that is what limits the calls.
const FULL: f64 = 0.95;
/// More than this of the two cores used by strangers, and the figures are doubtful.
const QUIET: f64 = 0.1;

const HEAD: &str = "\
| | CPU µs/call | calls/s | p50, p99 µs | one call at a time: p50, p99 µs | memory MiB | proxy's core busy | its own share | load's core busy: upstream, load | others |
|---|---|---|---|---|---|---|---|---|---|
";

/// What the works of one table have in common, one peer after the other.
pub type Turns = [(Kind, Vec<Turn>)];

/// Rows and doubts. `work` names the samples and figures.
pub fn table(work: &str, turns: &Turns, results: &mut Results) -> Result<String> {
    let (mut text, mut notes) = (HEAD.to_owned(), String::new());
    for (kind, turns) in turns {
        let title = kind.title()?;
        let mut sample = |quantity, unit, value: &dyn Fn(&Turn) -> f64| {
            let values = values(turns, value);
            results.sample(work, kind.name(), quantity, unit, &values);
            median(&values)
        };
        let cpu = sample("cpu", "us/call", &|turn| turn.busy.proxy_us());
        let rate = sample("rate", "1/s", &|turn| turn.busy.per_second()).value;
        let p50 = sample("p50", "us", &|turn| turn.busy.p50_us).value;
        let p99 = sample("p99", "us", &|turn| turn.busy.p99_us).value;
        let alone_p50 = sample("alone_p50", "us", &|turn| turn.alone.p50_us).value;
        let alone_p99 = sample("alone_p99", "us", &|turn| turn.alone.p99_us).value;
        let memory = sample("resident", "MiB", &|turn| turn.resident as f64 / f64::from(1 << 20)).value;
        let core = sample("proxy_core_busy", "share", &|turn| turn.busy.proxy_core_busy).value;
        let own = sample("proxy_share", "share", &|turn| turn.busy.proxy_share()).value;
        let load_core = sample("load_core_busy", "share", &|turn| turn.busy.load_core_busy).value;
        let upstream = sample("upstream_share", "share", &|turn| turn.busy.upstream_share()).value;
        let load = sample("load_share", "share", &|turn| turn.busy.load_share()).value;
        let others = sample("others", "cores", &|turn| turn.busy.others()).value;
        writeln!(
            text,
            "| {title} | {cpu} | {rate:.0} | {p50:.0}, {p99:.0} | {alone_p50:.0}, {alone_p99:.0} | {memory:.0} | {} | {} | {}: {}, {} | {} |",
            percent(core),
            percent(own),
            percent(load_core),
            percent(upstream),
            percent(load),
            percent(others),
        )?;
        figure(&format!("speed.{work}.{}_cpu_us", kind.name()), cpu.value, "us", Goal::None);
        if load_core > FULL {
            writeln!(
                notes,
                "\n**Load and upstream filled their core while {title} was measured: CPU per call holds, calls/s and latency do not.**"
            )?;
        } else if own < SATURATED {
            writeln!(notes, "\n**{title} did not fill its core: CPU per call holds, calls/s is a lower bound.**")?;
        }
        if others > QUIET {
            writeln!(
                notes,
                "\n**Others used {} of a core while {title} was measured: the figures are doubtful.**",
                percent(others)
            )?;
        }
    }
    Ok(text + &notes)
}

/// The ratio of CPU per call of two peers, and whether it holds its goal.
pub fn compared(work: &str, turns: &Turns, ours: Kind, theirs: Kind, goal: Goal) -> Result<String> {
    let cpu = |kind| of(turns, kind).map(|turns| values(turns, |turn| turn.busy.proxy_us()));
    let missing = "a peer was not measured";
    let found = ratio(&cpu(ours).context(missing)?, &cpu(theirs).context(missing)?);
    figure(&format!("speed.{work}.cpu_ratio_{}", theirs.name()), found.value, "ratio", goal);
    let said = match goal {
        Goal::None => "no goal".to_owned(),
        goal => format!("goal {goal}: {}", verdict(found.value, goal)),
    };
    Ok(format!("- CPU per call, Spillway to {}: **{found}**, {said}.", theirs.title()?))
}

/// The CPU per call of each peer, for a plot.
pub fn bars(turns: &Turns) -> Result<Vec<(String, Median)>> {
    let bar =
        |(kind, turns): &(Kind, Vec<Turn>)| Ok((kind.title()?, median(&values(turns, |turn| turn.busy.proxy_us()))));
    turns.iter().map(bar).collect()
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}
