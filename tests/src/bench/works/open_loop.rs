//! Latency under a load that does not wait: calls begin at random moments at a fixed rate, at shares of the
//! capacity of the weakest peer, which is found shortly before in the same run.
//!
//! The closed loop says who is the weakest, but not at which rate it keeps up: there 64 calls come together and are
//! read, written and woken for together, so that each costs less than one that comes alone.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use spillway_figures::Goal;

use super::turns::{interleaved, of, values};
use crate::bench::load::open::{Found, Open};
use crate::bench::load::part::Job;
use crate::bench::message::Protocol;
use crate::bench::peers::{Kind, Proxy};
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
/// Calls in flight on each of them in the closed loop that finds the weakest.
const STREAMS: usize = 8;
/// p99 of who keeps up with a rate: beyond it, a queue grew while it was measured.
const KEEPS_UP_US: f64 = 50_000.0;

#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// At the share that is judged.
    pub repetitions: usize,
    /// At the other shares.
    pub others: usize,
    pub warm_up: Duration,
    pub measure: Duration,
    /// How long each peer has the closed loop, and the weakest each rate that may be its capacity.
    pub capacity: Duration,
    /// Of the interval from nothing to the closed loop's rate, in which the capacity lies.
    pub halvings: u32,
}

impl Default for Extent {
    fn default() -> Self {
        Self {
            repetitions: 5,
            others: 2,
            warm_up: Duration::from_millis(500),
            measure: Duration::from_millis(1_500),
            capacity: Duration::from_millis(1_000),
            halvings: 5,
        }
    }
}

impl Extent {
    /// Shows that it runs, and measures nothing.
    pub fn smoke() -> Self {
        let brief = Duration::from_millis(150);
        Self { repetitions: 1, others: 1, warm_up: brief, measure: brief, capacity: brief, halvings: 1 }
    }
}

/// What one process of a peer showed at each of [`SHARES`]; nothing where it was not asked for.
type Turn = [Option<Found>; SHARES.len()];

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    let stand = Stand::build(spillway)?;
    for protocol in PROTOCOLS {
        let capacity = Capacity::find(&stand, protocol, extent)?;
        let turns = interleaved(&PEERS, extent.repetitions, |kind, repetition| {
            turn(&stand, protocol, kind, capacity.per_second, repetition, extent)
        })?;
        report(protocol, extent, &capacity, &turns, results)?;
    }
    Ok(())
}

/// Calls a second that the weakest peer keeps up with.
struct Capacity {
    weakest: Kind,
    per_second: f64,
    /// Whether it kept up; else that is the least rate that was tried.
    kept: bool,
    /// Of each peer in the closed loop.
    closed: Vec<(Kind, f64)>,
}

impl Capacity {
    fn find(stand: &Stand, protocol: Protocol, extent: &Extent) -> Result<Self> {
        let closed = PEERS.iter().map(|kind| Ok((*kind, closed_loop(stand, protocol, *kind, extent)?)));
        let closed = closed.collect::<Result<Vec<_>>>()?;
        let weakest = closed.iter().min_by(|(_, one), (_, other)| one.total_cmp(other));
        let (weakest, most) = *weakest.context("no peer")?;
        let keeps_up = |rate| -> Result<bool> {
            let proxy = stand.proxy(weakest, protocol)?;
            let found = open_loop(stand, protocol, &proxy, rate, extent.capacity, extent)?;
            Ok(found.p99_us < KEEPS_UP_US)
        };
        // A moment in which the machine stood still is no lack of capacity.
        let (per_second, kept) = bisect(most, extent.halvings, |rate| Ok(keeps_up(rate)? || keeps_up(rate)?))?;
        let verb = if kept { "keeps up with" } else { "does not even keep up with" };
        println!("{} {verb} {per_second:.0} calls/s over {}", weakest.name(), protocol.name());
        Ok(Self { weakest, per_second, kept, closed })
    }
}

/// The highest rate below `most` that is kept up with, but for the last halving of what lies between; or the least that
/// was tried, if none is.
fn bisect(most: f64, halvings: u32, mut keeps_up: impl FnMut(f64) -> Result<bool>) -> Result<(f64, bool)> {
    let (mut kept, mut too_much) = (0.0, most);
    for _ in 0..halvings {
        let rate = f64::midpoint(kept, too_much);
        *(if keeps_up(rate)? { &mut kept } else { &mut too_much }) = rate;
    }
    Ok(if kept > 0.0 { (kept, true) } else { (too_much, false) })
}

/// Answered calls a second in the closed loop.
fn closed_loop(stand: &Stand, protocol: Protocol, kind: Kind, extent: &Extent) -> Result<f64> {
    let closed = stand::Extent {
        repetitions: 1,
        warm_up: extent.warm_up,
        measure: extent.capacity,
        in_flight: CONNECTIONS * STREAMS,
    };
    let proxy = stand.proxy(kind, protocol)?;
    let window = stand.window(kind, &proxy, Calls { protocol, distinct: false }, &closed).context("the closed loop")?;
    Ok(window.per_second())
}

fn open_loop(
    stand: &Stand,
    protocol: Protocol,
    proxy: &Proxy,
    rate: f64,
    measure: Duration,
    extent: &Extent,
) -> Result<Found> {
    let job = Job::Open(Open {
        pki: stand.setting.identities.folder().to_owned(),
        address: proxy.address,
        protocol,
        rate,
        connections: CONNECTIONS,
        warm_up: extent.warm_up,
        measure,
        proxy_core: stand.setting.cores[0],
        load_core: stand.load_core,
    });
    job.start(&[stand.load_core]).with_context(|| format!("at {rate:.0} calls/s"))
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
        let found = open_loop(stand, protocol, &proxy, share * capacity, extent.measure, extent)?;
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
    capacity: &Capacity,
    turns: &[(Kind, Vec<Turn>)],
    results: &mut Results,
) -> Result<()> {
    let closed = capacity.closed.iter().map(|(kind, rate)| Ok(format!("{} {rate:.0}", kind.title()?)));
    let closed = closed.collect::<Result<Vec<String>>>()?;
    let mut text = format!(
        "## Latency under load, {}\n\n\
         Open loop: calls begin at random moments (a Poisson process, the same plan for all) on {CONNECTIONS} connections, and latency runs from the planned\n\
         moment. Shares are of {:.0} calls/s, with which {}, the weakest in a closed loop of {} calls (calls/s: {}), {} in\n\
         this open one (p99 below {:.0} ms). {} turns of {} s at {:.0} %, {} at the others, interleaved; every call of the window is waited for and checked. Late: sent more than 1 ms after its moment.\n\
         Lost: turned away for the load or timed out, 1 s each in the latencies. Medians of the turns, of p99 with its 95 % interval, µs.\n\n\
         | | load | calls/s | p50 | p90 | p99 | p99.9 | late | lost | proxy's core busy | load's core busy |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
        title(protocol),
        capacity.per_second,
        capacity.weakest.title()?,
        CONNECTIONS * STREAMS,
        closed.join(", "),
        if capacity.kept { "just keeps up" } else { "does not even keep up" },
        KEEPS_UP_US / 1e3,
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
                share * capacity.per_second,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capacity_is_the_highest_rate_that_is_kept_up_with() {
        let found = |capacity: f64| bisect(1_000.0, 5, |rate| Ok(rate <= capacity)).expect("nothing fails");
        assert_eq!(found(510.0), (500.0, true));
        assert_eq!(found(532.0), (531.25, true));
        assert_eq!(found(f64::INFINITY), (968.75, true));
        assert_eq!(found(31.25), (31.25, true));
        assert_eq!(found(31.0), (31.25, false));
        assert!(bisect(1_000.0, 5, |_| anyhow::bail!("the proxy ended")).is_err());
    }
}
