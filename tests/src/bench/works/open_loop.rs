//! Latency under a load that does not wait: calls begin at random moments at a fixed rate, at shares of the
//! capacity of the weakest peer, which the closed loop finds shortly before in the same run.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use spillway_figures::Goal;

use super::turns::{interleaved, of, values};
use crate::bench::load::open::{Found, Open};
use crate::bench::load::part::Job;
use crate::bench::message::Protocol;
use crate::bench::peers::Kind;
use crate::bench::results::{Axis, Line, Plot, Results, Shape, figure, verdict};
use crate::bench::stand::{self, Calls, Stand};
use crate::bench::statistics::{Median, median};

/// p99 at [`JUDGED`], to Envoy's.
const GOAL: Goal = Goal::AtMost(1.0);
const PEERS: [Kind; 3] = [Kind::Spillway, Kind::Envoy, Kind::Haproxy];
const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::H2];
/// Of the weakest peer's capacity.
const SHARES: [f64; 3] = [0.5, 0.7, 0.9];
/// The place in [`SHARES`] that the goal is about.
const JUDGED: usize = 1;
/// As many as in the closed loop.
const CONNECTIONS: usize = 8;
/// Calls in flight on each of them in the closed loop that finds the capacity.
const STREAMS: usize = 8;

#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// At the share that is judged.
    pub repetitions: usize,
    /// At the other shares.
    pub others: usize,
    pub warm_up: Duration,
    pub measure: Duration,
    /// How long each peer's capacity is looked for.
    pub capacity: Duration,
}

impl Default for Extent {
    fn default() -> Self {
        Self {
            repetitions: 5,
            others: 2,
            warm_up: Duration::from_millis(500),
            measure: Duration::from_millis(1_500),
            capacity: Duration::from_millis(1_500),
        }
    }
}

impl Extent {
    /// Shows that it runs, and measures nothing.
    pub fn smoke() -> Self {
        let brief = Duration::from_millis(150);
        Self { repetitions: 1, others: 1, warm_up: brief, measure: brief, capacity: brief }
    }
}

/// What one process of a peer showed at each of [`SHARES`]; nothing where it was not asked for.
type Turn = [Option<Found>; SHARES.len()];

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    let stand = Stand::build(spillway)?;
    for protocol in PROTOCOLS {
        let capacities = capacities(&stand, protocol, extent)?;
        let least = capacities.iter().map(|(_, capacity)| *capacity).fold(f64::INFINITY, f64::min);
        let turns = interleaved(&PEERS, extent.repetitions, |kind, repetition| {
            turn(&stand, protocol, kind, least, repetition, extent)
        })?;
        report(protocol, extent, &capacities, least, &turns, results)?;
    }
    Ok(())
}

/// Answered calls a second of each peer in the closed loop.
fn capacities(stand: &Stand, protocol: Protocol, extent: &Extent) -> Result<Vec<(Kind, f64)>> {
    let closed = stand::Extent {
        repetitions: 1,
        warm_up: extent.warm_up,
        measure: extent.capacity,
        in_flight: CONNECTIONS * STREAMS,
    };
    let calls = Calls { protocol, distinct: false };
    let found = PEERS.iter().map(|kind| {
        let proxy = stand.proxy(*kind, protocol)?;
        let window = stand.window(*kind, &proxy, calls, &closed).context("the capacity")?;
        Ok((*kind, window.per_second()))
    });
    found.collect()
}

fn turn(
    stand: &Stand,
    protocol: Protocol,
    kind: Kind,
    capacity: f64,
    repetition: usize,
    extent: &Extent,
) -> Result<Turn> {
    let proxy = stand.proxy(kind, protocol)?;
    let mut turn = Turn::default();
    for (at, share) in SHARES.iter().enumerate() {
        if at != JUDGED && repetition >= extent.others {
            continue;
        }
        let job = Job::Open(Open {
            pki: stand.setting.identities.folder().to_owned(),
            address: proxy.address,
            protocol,
            rate: share * capacity,
            connections: CONNECTIONS,
            warm_up: extent.warm_up,
            measure: extent.measure,
            proxy_core: stand.setting.cores[0],
            load_core: stand.load_core,
        });
        let found: Found = job.start(&[stand.load_core]).with_context(|| format!("at {share} of the capacity"))?;
        println!(
            "{:10} {} at {:.0} %: p50 {:.0} us, p99 {:.0} us, sent late {:.2} %, lost {:.2} %",
            kind.name(),
            protocol.name(),
            share * 100.0,
            found.p50_us,
            found.p99_us,
            found.late_share() * 100.0,
            found.lost_share() * 100.0
        );
        turn[at] = Some(found);
    }
    Ok(turn)
}

/// One quantity of one peer at one share, turn by turn.
fn at_share(turns: &[Turn], at: usize, value: impl Fn(&Found) -> f64) -> Vec<f64> {
    turns.iter().filter_map(|turn| turn[at].as_ref()).map(value).collect()
}

fn report(
    protocol: Protocol,
    extent: &Extent,
    capacities: &[(Kind, f64)],
    least: f64,
    turns: &[(Kind, Vec<Turn>)],
    results: &mut Results,
) -> Result<()> {
    let capacities = capacities.iter().map(|(kind, capacity)| Ok(format!("{} {capacity:.0}", kind.title()?)));
    let capacities = capacities.collect::<Result<Vec<String>>>()?;
    let mut text = format!(
        "## Latency under load, {}\n\n\
         Open loop: calls begin at random moments (a Poisson process, the same plan for all) on {CONNECTIONS} connections, and latency runs from the planned\n\
         moment. Shares are of {least:.0} calls/s, the capacity of the weakest in the closed loop of this run (calls/s: {}). {} turns of {} s at\n\
         {:.0} %, {} at the others, interleaved; every call of the window is waited for and checked. Late: sent more than 1 ms after its moment.\n\
         Lost: turned away for the load or timed out, 1 s each in the latencies. Medians of the turns, of p99 with its 95 % interval, µs.\n\n\
         | | load | calls/s | p50 | p90 | p99 | p99.9 | late | lost | proxy's core busy | load's core busy |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
        title(protocol),
        capacities.join(", "),
        extent.repetitions,
        extent.measure.as_secs_f64(),
        SHARES[JUDGED] * 100.0,
        extent.others,
    );
    let mut lines = Vec::new();
    for (kind, turns) in turns {
        let peer = kind.title()?;
        let mut points: Vec<(f64, Median)> = Vec::new();
        for (at, share) in SHARES.iter().enumerate() {
            let of = |value: &dyn Fn(&Found) -> f64| median(&at_share(turns, at, value)).value;
            let tail = at_share(turns, at, |found| found.p99_us);
            let p99 = median(&tail);
            let percent = share * 100.0;
            writeln!(
                text,
                "| {} | {percent:.0} % | {:.0} | {:.0} | {:.0} | {p99:.0} | {:.0} | {:.2} % | {:.2} % | {:.0} % | {:.0} % |",
                peer,
                share * least,
                of(&|found| found.p50_us),
                of(&|found| found.p90_us),
                of(&|found| found.p999_us),
                of(&Found::late_share) * 100.0,
                of(&Found::lost_share) * 100.0,
                of(&|found| found.proxy_core_busy) * 100.0,
                of(&|found| found.load_core_busy) * 100.0,
            )?;
            let samples = format!("open loop {}", protocol.name());
            for (name, value) in QUANTITIES {
                results.sample(
                    &samples,
                    &peer,
                    &format!("{name} at {percent:.0} %"),
                    "us",
                    &at_share(turns, at, value),
                );
            }
            if at == JUDGED {
                figure(
                    &format!("speed.open_loop.{}.{}_p99_us", protocol.name(), kind.name()),
                    p99.value,
                    "us",
                    Goal::None,
                );
            }
            points.push((percent, p99));
        }
        lines.push(Line { label: peer, points });
    }
    if let (Some(ours), Some(theirs)) = (of(turns, Kind::Spillway), of(turns, Kind::Envoy)) {
        let of = |turns: &[Turn], value: fn(&Found) -> f64| median(&at_share(turns, JUDGED, value)).value;
        let (lost_by_us, lost_by_them) = (of(ours, Found::lost_share), of(theirs, Found::lost_share));
        let share = SHARES[JUDGED] * 100.0;
        if lost_by_us.min(lost_by_them) > DOUBTFUL {
            // Both p99 are what a lost call counts, and not what anybody waited. Where one alone lost calls, its p99 is no less.
            writeln!(
                text,
                "\n**Not compared: of the calls at {share:.0} % Spillway lost {:.1} %, Envoy {:.1} %.**",
                lost_by_us * 100.0,
                lost_by_them * 100.0
            )?;
        } else {
            let ratio = of(ours, |found| found.p99_us) / of(theirs, |found| found.p99_us);
            let verdict = verdict(ratio, GOAL);
            writeln!(
                text,
                "\nRatio of the medians of p99 at {share:.0} %, Spillway to Envoy: **{ratio:.2}**; goal at most 1: {verdict}."
            )?;
            figure(&format!("speed.open_loop.{}.p99_ratio_envoy", protocol.name()), ratio, "ratio", GOAL);
            for (peer, lost) in [("Spillway", lost_by_us), ("Envoy", lost_by_them)] {
                if lost > DOUBTFUL {
                    let lost = lost * 100.0;
                    writeln!(
                        text,
                        "{peer} lost {lost:.1} % there: its p99 is what a lost call counts, and the ratio says no more than who lost."
                    )?;
                }
            }
        }
    }
    let late =
        turns.iter().flat_map(|(_, turns)| values(turns, |turn| turn[JUDGED].as_ref().map_or(0.0, Found::late_share)));
    if late.fold(0.0, f64::max) > DOUBTFUL {
        writeln!(
            text,
            "\n**More than {:.0} % of the calls of a turn were sent late: the load could not keep to its plan.**",
            DOUBTFUL * 100.0
        )?;
    }
    let axes = [("share of the weakest one's capacity, %", false), ("p99, µs", true)]
        .map(|(label, logarithmic)| Axis { label: label.into(), logarithmic });
    let [across, up] = axes;
    let plot = Plot {
        name: format!("latency-{}", protocol.name()),
        title: format!("p99 under load, {}", title(protocol)),
        shape: Shape::Lines(across, up, lines),
    };
    writeln!(text, "\n{}", results.plot(&plot)?)?;
    results.add(text);
    Ok(())
}

fn title(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Grpc => "gRPC",
        Protocol::H2 => "REST over HTTP/2",
        Protocol::H1 => "REST over HTTP/1.1",
    }
}

/// What a figure is called, and how it is taken from a turn.
type Quantity = (&'static str, fn(&Found) -> f64);

/// What is kept of each turn.
const QUANTITIES: [Quantity; 4] = [
    ("p50", |found| found.p50_us),
    ("p90", |found| found.p90_us),
    ("p99", |found| found.p99_us),
    ("p99.9", |found| found.p999_us),
];

/// A share of calls lost or sent late that says more of the load than of the proxy: p99 is one of them.
const DOUBTFUL: f64 = 0.01;
