//! What the result cache costs where nothing is found in it: no two calls are the same, with the cache and without.
//!
//! The difference that is looked for is smaller than what two turns differ by, so both gateways run at once on
//! one core and are loaded in turn, for short windows; a few times with new processes.

use std::path::Path;

use anyhow::Result;
use spillway_figures::Goal;

use super::turns::ratio;
use crate::bench::message::Protocol;
use crate::bench::peers::Kind;
use crate::bench::results::{Results, figure, verdict};
use crate::bench::stand::{Calls, Extent, Stand};
use crate::bench::statistics::median;

/// CPU of a call that is looked up in vain, to one that is not looked up.
const COST: f64 = 1.02;
/// Windows of each gateway in one repetition.
pub const WINDOWS: usize = 12;
const CALLS: Calls = Calls { protocol: Protocol::Grpc, distinct: true };

/// `windows`: of each gateway in one repetition.
pub fn run(extent: &Extent, windows: usize, spillway: &Path, results: &mut Results) -> Result<()> {
    let stand = Stand::build(spillway)?;
    let (mut off, mut on) = (Vec::new(), Vec::new());
    for _ in 0..extent.repetitions {
        let proxies = [Kind::Spillway, Kind::Caching].map(|kind| stand.proxy(kind, CALLS.protocol));
        let [plain, caching] = proxies;
        let (plain, caching) = (plain?, caching?);
        let mut peers = [(Kind::Spillway, &plain, &mut off), (Kind::Caching, &caching, &mut on)];
        for _ in 0..windows {
            for (kind, proxy, found) in &mut peers {
                found.push(stand.window(*kind, proxy, CALLS, extent)?.proxy_us());
            }
            peers.reverse();
        }
    }
    results.sample("cache_misses", "off", "cpu", "us/call", &off);
    results.sample("cache_misses", "on", "cpu", "us/call", &on);
    let (found, goal) = (ratio(&on, &off), Goal::AtMost(COST));
    figure("speed.cache_misses.cpu_ratio_off", found.value, "ratio", goal);
    results.add(format!(
        "## Result cache without hits\n\n\
         The small gRPC call, no two the same, through a gateway without result cache and one with it; the guard of the model sees that\n\
         and looks up one in a hundred. {} windows of {} s each, one after the other, with {} pairs of processes. Median [95 % interval].\n\n\
         | cache | CPU µs/call |\n|---|---|\n| off | {} |\n| on, no hit | {} |\n\n\
         - CPU per call, on to off: **{found:.3}**, goal {goal}: {}.",
        off.len(),
        extent.measure.as_secs_f64(),
        extent.repetitions,
        median(&off),
        median(&on),
        verdict(found.value, goal),
    ));
    Ok(())
}
