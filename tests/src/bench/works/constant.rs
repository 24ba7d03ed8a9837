//! Calls that no upstream sees: hits in Spillway's result cache, beside proxies that answer a constant.
//!
//! The peers do all of their checks and log each call, but look nothing up: a lower bound of what a cache in them
//! would cost.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use spillway_figures::Goal;

use super::table::{bars, compared, table};
use super::turns::interleaved;
use crate::bench::message::Protocol;
use crate::bench::peers::{self, Kind};
use crate::bench::results::{Bars, Group, Plot, Results, Shape};
use crate::bench::stand::{Calls, Extent, Stand};

/// A hit's share of the CPU time of Envoy's direct response.
const REST: f64 = 0.55;
const GRPC: f64 = 0.6;

pub const PEERS: [Kind; 3] = [Kind::Caching, Kind::EnvoyConstant, Kind::HaproxyConstant];
pub const WORKS: [(Protocol, &str, f64); 2] = [(Protocol::H2, "hit_h2", REST), (Protocol::Grpc, "hit_grpc", GRPC)];

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    peers::record_versions(results)?;
    let stand = Stand::build(spillway)?;
    let mut text = format!(
        "## Answers without an upstream\n\n\
         The calls of above, all the same: Spillway answers out of its result cache, Envoy with `direct_response`, HAProxy with\n\
         `http-request return`, all with the checks and the log of above. To a call that says it is gRPC, Envoy's direct response has no\n\
         body: so that the bytes are the same, it and HAProxy are asked with another content type, and answer with the right message\n\
         and the status in the head; they have no trailers of their own, Spillway sends them. {} turns of {} s each, interleaved.\n\
         Median [95 % interval].\n",
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let mut groups = Vec::new();
    for (protocol, work, goal) in WORKS {
        let calls = Calls { protocol, distinct: false };
        let turns = interleaved(&PEERS, extent.repetitions, |kind, _| stand.turn(kind, calls, extent))?;
        writeln!(text, "\n### {}\n\n{}", protocol.title(), table(work, &turns, results)?)?;
        for (peer, goal) in [(Kind::EnvoyConstant, Goal::AtMost(goal)), (Kind::HaproxyConstant, Goal::None)] {
            writeln!(text, "{}", compared(work, &turns, Kind::Caching, peer, goal)?)?;
        }
        groups.push(Group { label: protocol.title().to_owned(), bars: bars(&turns)? });
    }
    let plot = Plot {
        name: "constant".to_owned(),
        title: "CPU of an answer without an upstream".to_owned(),
        shape: Shape::Bars(Bars { unit: "CPU, µs a call".to_owned(), groups }),
    };
    write!(text, "\n{}", results.plot(&plot)?)?;
    results.add(text);
    Ok(())
}
