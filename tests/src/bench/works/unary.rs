//! The small unary call through each proxy, mTLS in and mTLS out: gRPC, REST over HTTP/2, REST over HTTP/1.1.
//!
//! The proxies take turns on one core with the same upstream and the same load, and who begins changes
//! each time, so that a machine that slows down slows all. Each turn starts a new process.

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

/// The gateway's share of Envoy's CPU time for each call.
const ENVOY: f64 = 0.5;
/// The moonshot: its multiple of HAProxy's.
const HAPROXY: f64 = 1.2;

pub const PROTOCOLS: [Protocol; 3] = [Protocol::Grpc, Protocol::H2, Protocol::H1];
pub const PEERS: [Kind; 4] = [Kind::Spillway, Kind::Envoy, Kind::Haproxy, Kind::Nginx];

pub fn run(
    extent: &Extent,
    protocols: &[Protocol],
    kinds: &[Kind],
    spillway: &Path,
    results: &mut Results,
) -> Result<()> {
    peers::record_versions(results)?;
    let stand = Stand::build(spillway)?;
    let mut text = introduction(extent);
    let mut groups = Vec::new();
    for protocol in protocols {
        let calls = Calls { protocol: *protocol, distinct: false };
        let turns = interleaved(kinds, extent.repetitions, |kind, _| stand.turn(kind, calls, extent))?;
        let work = protocol.name();
        writeln!(text, "\n### {}\n\n{}", heading(*protocol), table(work, &turns, results)?)?;
        for (peer, goal) in [(Kind::Envoy, Goal::AtMost(ENVOY)), (Kind::Haproxy, Goal::None), (Kind::Nginx, Goal::None)]
        {
            if kinds.contains(&Kind::Spillway) && kinds.contains(&peer) {
                writeln!(text, "{}", compared(work, &turns, Kind::Spillway, peer, goal)?)?;
            }
        }
        groups.push(Group { label: protocol.title().to_owned(), bars: bars(&turns)? });
    }
    let plot = Plot {
        name: "unary".to_owned(),
        title: "CPU of a small unary call".to_owned(),
        shape: Shape::Bars(Bars { unit: "CPU, µs a call".to_owned(), groups }),
    };
    write!(text, "\nThe moonshot is {HAPROXY} times HAProxy's.\n\n{}", results.plot(&plot)?)?;
    results.add(text);
    Ok(())
}

fn introduction(extent: &Extent) -> String {
    let [grpc, rest] =
        [Protocol::Grpc, Protocol::H2].map(|protocol| (protocol.request().len(), protocol.response().len()));
    format!(
        "## Small unary call, mTLS to mTLS\n\n\
         One row of 28 FP32, answered with 52: over gRPC {} B and {} B, over REST with binary tensors {} B and {} B. TLS 1.3\n\
         (AES-128-GCM, X25519MLKEM768 where offered) with client certificates on both hops, the client's SPIFFE id judged for the path\n\
         (each peer was seen to refuse another), a rate limit that is never reached, one JSON line a call, a balancer by least\n\
         requests over the one upstream. Spillway speaks gRPC to it whatever the client spoke; the others pass on what came. nginx\n\
         speaks HTTP/2 to an upstream for gRPC alone, so its REST goes there over HTTP/1.1; HAProxy and nginx cannot see a URI SAN,\n\
         `tests/bench/haproxy.cfg` and `nginx.conf` say what they check instead.\n\n\
         One core for the proxy (one worker thread each), one for upstream and load. Closed loop: {} calls in flight, on 8 connections of\n\
         HTTP/2 or each on its own of HTTP/1.1; {} turns of {} s each, interleaved. Every answer was checked. Median [95 % interval].\n",
        grpc.0,
        grpc.1,
        rest.0,
        rest.1,
        extent.in_flight,
        extent.repetitions,
        extent.measure.as_secs_f64(),
    )
}

fn heading(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Grpc => "gRPC to gRPC over mTLS HTTP/2",
        Protocol::H2 => "REST over HTTP/2 to mTLS HTTP/2",
        Protocol::H1 => "REST over HTTP/1.1 to mTLS HTTP/2",
    }
}
