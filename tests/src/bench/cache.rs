//! What the result cache costs and saves: the small unary call through a gateway without it, with it and
//! nothing to find in it, and with every answer in it.

use std::path::Path;

use anyhow::{Context, Result};

use super::proxy::Kind;
use super::results::{Results, figure};
use super::stand::{Extent, Stand, Turn};
use super::statistics::median;
use spillway_figures::Goal;

/// CPU of a call that is looked up in vain, to one that is not looked up.
const COST: f64 = 1.02;

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    let stand = Stand::build(spillway)?;
    let mut turns: Vec<(usize, Vec<Turn>)> = (0..VARIANTS.len()).map(|variant| (variant, Vec::new())).collect();
    for repetition in 0..extent.repetitions {
        for (variant, turns) in &mut turns {
            let Variant { name, kind, distinct } = VARIANTS[*variant];
            let turn = stand.turn(kind, distinct, extent);
            turns.push(turn.with_context(|| format!("{name} in repetition {repetition}"))?);
        }
        turns.reverse();
    }
    turns.sort_by_key(|(variant, _)| *variant);
    report(extent, &turns.into_iter().map(|(_, turns)| turns).collect::<Vec<_>>(), results);
    Ok(())
}

struct Variant {
    name: &'static str,
    kind: Kind,
    distinct: bool,
}

const VARIANTS: [Variant; 3] = [
    Variant { name: "off", kind: Kind::Spillway, distinct: true },
    Variant { name: "on, no hit", kind: Kind::Caching, distinct: true },
    Variant { name: "on, all hits", kind: Kind::Caching, distinct: false },
];

fn report(extent: &Extent, turns: &[Vec<Turn>], results: &mut Results) {
    let mut text = format!(
        "## Result cache\n\n\
         The small unary call of above, {} turns of {} s each, interleaved. Without hits no two calls are the same; the guard\n\
         of the model sees that and looks up one in a hundred. Median [95 % interval].\n\n\
         | cache | CPU µs/call | calls/s | one call at a time: p50 µs, p99 µs |\n|---|---|---|---|\n",
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let of = |turns: &[Turn], value: &dyn Fn(&Turn) -> f64| median(&turns.iter().map(value).collect::<Vec<_>>());
    for (variant, turns) in VARIANTS.iter().zip(turns) {
        let cpu = of(turns, &|turn| turn.busy.proxy_us());
        let [rate, p50, p99] = [
            of(turns, &|turn| turn.busy.per_second()).value,
            of(turns, &|turn| turn.alone.p50_us).value,
            of(turns, &|turn| turn.alone.p99_us).value,
        ];
        text.push_str(&format!("| {} | {cpu} | {rate:.0} | {p50:.0}, {p99:.0} |\n", variant.name));
        if !variant.distinct {
            figure("traffic.bench.cache_hit.cpu_us", cpu.value, "us", Goal::None);
            figure("traffic.bench.cache_hit.p50_us", p50, "us", Goal::None);
            figure("traffic.bench.cache_hit.p99_us", p99, "us", Goal::None);
        }
    }
    if let [off, miss, hit] = turns {
        let ratio = |turns: &[Turn]| {
            let pairs = turns.iter().zip(off).map(|(turn, off)| turn.busy.proxy_us() / off.busy.proxy_us());
            median(&pairs.collect::<Vec<_>>())
        };
        let (cost, hit) = (ratio(miss), ratio(hit));
        let verdict = if cost.value <= COST { "holds" } else { "**missed**" };
        text.push_str(&format!(
            "\nRatio of CPU per call to the cache off: without hits **{cost:.3}**, goal at most {COST}: {verdict}; with hits {hit}."
        ));
        figure("traffic.bench.cache_without_hits.cpu_ratio", cost.value, "", Goal::AtMost(COST));
        figure("traffic.bench.cache_hit.cpu_ratio", hit.value, "", Goal::None);
    }
    results.add(text);
}
