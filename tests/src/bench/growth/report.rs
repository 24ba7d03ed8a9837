//! What grew and what did not: a table, a plot and a verdict for each.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result};
use spillway_figures::Goal;

use super::entities::{Entities, LookedUp};
use super::world::What;
use super::{FLAT, Size, Turn};
use crate::bench::results::{Axis, Line, Plot, Results, Shape, figure, verdict};
use crate::bench::statistics::{Median, median};

const MIB: f64 = (1 << 20) as f64;

/// What a turn showed: the column, its unit, the digits that a table shows.
struct Quantity {
    name: &'static str,
    unit: &'static str,
    digits: usize,
    of: fn(&Turn) -> f64,
}

const QUANTITIES: [Quantity; 13] = [
    Quantity { name: "gateway's CPU a call", unit: "µs", digits: 2, of: |turn| turn.served.busy.cpu_us },
    Quantity { name: "one call at a time", unit: "µs", digits: 2, of: |turn| turn.served.alone.cpu_us },
    Quantity { name: "CPU without a call", unit: "ms/s", digits: 1, of: |turn| turn.served.idle },
    Quantity { name: "decision in process", unit: "ns", digits: 0, of: |turn| turn.decision_ns },
    Quantity { name: "calls", unit: "1/s", digits: 0, of: |turn| turn.served.busy.per_second },
    Quantity { name: "p99", unit: "ms", digits: 1, of: |turn| turn.served.busy.p99_us / 1e3 },
    Quantity { name: "memory", unit: "MiB", digits: 0, of: |turn| turn.served.resident as f64 / MIB },
    Quantity { name: "snapshot", unit: "KiB", digits: 1, of: |turn| turn.snapshot_bytes as f64 / 1024.0 },
    Quantity { name: "check", unit: "ms", digits: 1, of: |turn| millis(turn.check) },
    Quantity { name: "open", unit: "ms", digits: 1, of: |turn| millis(turn.open) },
    Quantity { name: "served", unit: "ms", digits: 0, of: |turn| millis(turn.served.applied.served) },
    Quantity { name: "CPU to apply", unit: "ms", digits: 1, of: |turn| millis(turn.served.applied.cpu) },
    Quantity { name: "longest call", unit: "ms", digits: 1, of: |turn| millis(turn.served.applied.longest_call) },
];

impl Quantity {
    fn median(&self, turns: &[Turn]) -> Median {
        median(&turns.iter().map(self.of).collect::<Vec<_>>())
    }

    fn line(&self, sizes: &[Size]) -> Line {
        let points = sizes.iter().map(|size| (size.count as f64, self.median(&size.turns))).collect();
        Line { label: self.name.to_owned(), points }
    }
}

pub(super) fn world(what: What, sizes: &[Size], results: &mut Results) -> Result<()> {
    let name = what.name();
    let repetitions = sizes.first().map_or(0, |size| size.turns.len());
    let mut text = format!(
        "## How the cost grows: {name}\n\n{} {repetitions} turns of each size, interleaved; medians. \
         *Check*: CPU from the operator's text to the file. *Open*: CPU from the file to what is served from, in each process. *Served*: from the \
         file's change to the first answer of the new version, of which up to 500 ms are the wait until the file is looked at; *longest call*: of those made \
         meanwhile, one at a time.\n\n| {name} |",
        setup(what)
    );
    QUANTITIES.iter().try_for_each(|quantity| write!(text, " {}, {} |", quantity.name, quantity.unit))?;
    writeln!(text, "\n|{}", "---|".repeat(1 + QUANTITIES.len()))?;
    for Size { count, turns } in sizes {
        write!(text, "| {count} |")?;
        for quantity in &QUANTITIES {
            write!(text, " {:.*} |", quantity.digits, quantity.median(turns).value)?;
            let values: Vec<f64> = turns.iter().map(quantity.of).collect();
            results.sample("growth", &format!("{count} {name}"), quantity.name, quantity.unit, &values);
        }
        text.push('\n');
    }
    let [cpu, alone, _, _, _, _, _, _, check, open, served, ..] = &QUANTITIES;
    text.push_str(&flatness(name, "a call", &cpu.line(sizes).points)?);
    text.push_str(&flatness(&format!("{name}.alone"), "one call at a time", &alone.line(sizes).points)?);
    let plots = [
        (format!("growth-{name}"), "CPU of a gateway for each call", "µs a call", false, vec![cpu, alone]),
        (format!("growth-{name}-version"), "What a new version costs", "ms", true, vec![check, open, served]),
    ];
    for (file, title, unit, logarithmic, quantities) in plots {
        let title = format!("{title}, by the number of {name}");
        let lines = quantities.into_iter().map(|quantity| quantity.line(sizes)).collect();
        let plot = results.plot(&by_number(file, title, name, unit, logarithmic, lines))?;
        write!(text, "\n\n{plot}")?;
    }
    results.add(text);
    Ok(())
}

/// `left_out`: a size for which this machine had too little memory, and how much it had.
pub(super) fn entities(found: &[Entities], left_out: Option<(usize, u64)>, results: &mut Results) -> Result<()> {
    let mut text = "## How the cost grows: feature entities\n\n\
         Look-ups of one entity, drawn at random from all that there are, one at a time, in process; rows of 8 FP32 fields. L1 has room for all, and all are in it; \
         L2 is a real Redis on loopback TCP that holds them all. CPU is the sidecar's side; Redis's own stands beside it. *Of 10,000*: the same L1, but only the first 10,000 \
         are asked for, which a CPU's cache holds: what the table itself costs. Medians.\n\n\
         | entities | L1: CPU µs | of 10,000 | p99 µs | L1 says MiB | process grew by MiB | L2: CPU µs | Redis's CPU µs | p50 µs | p99 µs | Redis MiB |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    let of =
        |looked_up: &[LookedUp], value: fn(&LookedUp) -> f64| median(&looked_up.iter().map(value).collect::<Vec<_>>());
    for size in found {
        let Entities { count, l1, l1_few, l2, l1_bytes, l1_resident, redis_resident } = size;
        let mib = |bytes: &u64| *bytes as f64 / MIB;
        writeln!(
            text,
            "| {count} | {:.2} | {:.2} | {:.1} | {:.0} | {:.0} | {:.1} | {:.1} | {:.0} | {:.0} | {:.0} |",
            of(l1, |one| one.cpu_us).value,
            of(l1_few, |one| one.cpu_us).value,
            of(l1, |one| one.p99_us).value,
            mib(l1_bytes),
            mib(l1_resident),
            of(l2, |one| one.cpu_us).value,
            of(l2, |one| one.redis_us).value,
            of(l2, |one| one.p50_us).value,
            of(l2, |one| one.p99_us).value,
            mib(redis_resident),
        )?;
        for (tier, looked_up) in [("L1", l1), ("L1, of 10,000", l1_few), ("L2", l2)] {
            let subject = format!("{count} entities, {tier}");
            for (quantity, of) in [
                ("CPU of a look-up", (|one| one.cpu_us) as fn(&LookedUp) -> f64),
                ("Redis's CPU of a look-up", |one| one.redis_us),
                ("p50", |one| one.p50_us),
                ("p99", |one| one.p99_us),
            ] {
                results.sample("growth", &subject, quantity, "µs", &looked_up.iter().map(of).collect::<Vec<_>>());
            }
        }
    }
    if let Some((count, available)) = left_out {
        let gib = available as f64 / MIB / 1024.0;
        writeln!(text, "\n**{count} entities were left out: this machine had {gib:.1} GiB to give.**")?;
    }
    let line = |label: &str, points: &dyn Fn(&Entities) -> Median| Line {
        label: label.to_owned(),
        points: found.iter().map(|size| (size.count as f64, points(size))).collect(),
    };
    let l1 = line("L1", &|size| of(&size.l1, |one| one.cpu_us));
    let few = line("L1, of 10,000", &|size| of(&size.l1_few, |one| one.cpu_us));
    let l2 = line("L2", &|size| of(&size.l2, |one| one.cpu_us));
    text.push_str(&flatness("entities_l1", "a look-up in L1", &l1.points)?);
    text.push_str(&flatness("entities_l2", "a look-up in L2", &l2.points)?);
    for (file, title, lines) in [
        ("growth-entities-l1", "CPU of a look-up in L1, by the number of entities", vec![l1, few]),
        ("growth-entities-l2", "CPU of a look-up in L2, by the number of entities", vec![l2]),
    ] {
        let plot = by_number(file.to_owned(), title.to_owned(), "entities", "µs a look-up", false, lines);
        let plot = results.plot(&plot)?;
        write!(text, "\n\n{plot}")?;
    }
    results.add(text);
    Ok(())
}

fn by_number(name: String, title: String, what: &str, unit: &str, logarithmic: bool, lines: Vec<Line>) -> Plot {
    let across = Axis { label: what.to_owned(), logarithmic: true };
    Plot { name, title, shape: Shape::Lines(across, Axis { label: unit.to_owned(), logarithmic }, lines) }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The sentence that says whether a cost is flat, and its figure.
fn flatness(name: &str, each: &str, points: &[(f64, Median)]) -> Result<String> {
    let ratio = ratio(points).with_context(|| format!("{name} has no cost that could grow"))?;
    let goal = Goal::AtMost(FLAT);
    figure(&format!("speed.growth.{name}.ratio"), ratio, "ratio", goal);
    let what = if goal.holds(ratio) { "Flat" } else { "Not flat" };
    Ok(format!(
        "\n{what}: {each}, the dearest size costs **{ratio:.2}** x the cheapest; goal at most {FLAT}: {}.",
        verdict(ratio, goal)
    ))
}

/// The dearest to the cheapest; none where nothing was measured.
fn ratio(points: &[(f64, Median)]) -> Option<f64> {
    let values = || points.iter().map(|(_, median)| median.value);
    let (most, least) = (values().reduce(f64::max)?, values().reduce(f64::min)?);
    (least > 0.0).then(|| most / least)
}

fn setup(what: What) -> &'static str {
    match what {
        What::Models => "Calls go to all models in turn, 8 connections with 8 calls in flight on each.",
        What::Pods => {
            "Each pod is a real server with its own certificate, and the gateway has a connection to each; calls name one of 10,000 entities, \
             which the ring spreads over all pods. 8 connections with 8 calls in flight on each: the more pods, the fewer calls share one write to a pod."
        }
        What::Tenants => {
            "Each tenant has a token bucket and a policy; 64 connections of up to 64 tenants, as far apart in the order of names as there are, one call in \
             flight on each."
        }
        What::Policies => {
            "All policies name the one tenant that calls, each another model by its whole name; the one that allows the calls is the last. 8 connections with \
             8 calls in flight on each."
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_the_dearest_to_the_cheapest() {
        let of = |costs: &[f64]| ratio(&costs.iter().map(|cost| (1.0, median(&[*cost]))).collect::<Vec<_>>());
        assert_eq!([of(&[40.0, 50.0, 45.0]), of(&[50.0, 40.0]), of(&[7.0])], [Some(1.25), Some(1.25), Some(1.0)]);
        assert_eq!([of(&[]), of(&[0.0, 1.0])], [None, None], "nothing was measured");
    }
}
