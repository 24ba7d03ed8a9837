//! What a new connection costs the proxy: a full mTLS handshake of a client that was here before, one of a client
//! that was not, and one that resumes an earlier session.
//!
//! TLS 1.3, certificates of ECDSA P-256 on both sides. Each connection is counted when it is of the kind that is
//! asked for and a PING over it was answered; it is closed in order, which is part of its cost.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use spillway_figures::Goal;

use super::turns::{interleaved, of, ratio, values};
use crate::bench::load::handshakes::{Exchange, Found, Handshakes, Kind as Handshake};
use crate::bench::load::part::Job;
use crate::bench::message::Protocol;
use crate::bench::peers::Kind;
use crate::bench::results::{Bars, Group, Plot, Results, Shape, figure, verdict};
use crate::bench::stand::Stand;
use crate::bench::statistics::median;

/// CPU of a handshake, to Envoy's.
const GOAL: Goal = Goal::AtMost(0.85);
const PEERS: [Kind; 4] = [Kind::Spillway, Kind::Envoy, Kind::Haproxy, Kind::Nginx];

#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub repetitions: usize,
    pub warm_up: Duration,
    pub measure: Duration,
}

impl Default for Extent {
    fn default() -> Self {
        Self { repetitions: 5, warm_up: Duration::from_millis(200), measure: Duration::from_millis(700) }
    }
}

impl Extent {
    /// Shows that it runs, and measures nothing.
    pub fn smoke() -> Self {
        Self { repetitions: 1, warm_up: Duration::ZERO, measure: Duration::from_millis(100) }
    }
}

struct Variant {
    /// Of figures and samples.
    name: &'static str,
    title: &'static str,
    kind: Handshake,
    exchange: Exchange,
    goal: Goal,
}

const VARIANTS: [Variant; 4] = [
    Variant { name: "full", title: "full", kind: Handshake::Full, exchange: Exchange::Classic, goal: GOAL },
    Variant {
        name: "newcomer",
        title: "full, new client",
        kind: Handshake::Newcomer,
        exchange: Exchange::Classic,
        goal: GOAL,
    },
    Variant { name: "resumed", title: "resumed", kind: Handshake::Resumed, exchange: Exchange::Classic, goal: GOAL },
    Variant {
        name: "full_hybrid",
        title: "full, hybrid offered",
        kind: Handshake::Full,
        exchange: Exchange::Hybrid,
        goal: Goal::None,
    },
];

/// Places in [`VARIANTS`].
const FULL: usize = 0;
const HYBRID: usize = 3;

/// What one process of a peer showed, in the order of [`VARIANTS`].
type Turn = [Found; VARIANTS.len()];

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    let stand = Stand::build(spillway)?;
    let turns = interleaved(&PEERS, extent.repetitions, |kind, _| turn(&stand, kind, extent))?;
    report(extent, &turns, results)
}

fn turn(stand: &Stand, kind: Kind, extent: &Extent) -> Result<Turn> {
    let proxy = stand.proxy(kind, Protocol::Grpc)?;
    let found = VARIANTS.iter().map(|variant| {
        let job = Job::Handshakes(Handshakes {
            pki: stand.setting.identities.folder().to_owned(),
            address: proxy.address,
            kind: variant.kind,
            exchange: variant.exchange,
            warm_up: extent.warm_up,
            measure: extent.measure,
            proxy: proxy.pid,
            proxy_core: stand.setting.cores[0],
        });
        let found: Found = job.start(&[stand.load_core]).with_context(|| variant.title)?;
        println!(
            "{:10} {:22} {:7.1} us/handshake  {:6.0}/s",
            kind.name(),
            variant.title,
            found.proxy_us(),
            found.per_second()
        );
        Ok(found)
    });
    let found = found.collect::<Result<Vec<Found>>>()?;
    found.try_into().ok().context("a variant was not measured")
}

fn report(extent: &Extent, turns: &[(Kind, Vec<Turn>)], results: &mut Results) -> Result<()> {
    let mut text = format!(
        "## New connections\n\n\
         CPU of the proxy for each connection: TLS 1.3 (AES-128-GCM) with client certificates, ECDSA P-256 on both sides, the handshake, an HTTP/2 PING\n\
         and its answer, the end. Full: the same client each time; new client: each time a key and a certificate that the proxy has not seen. Resumed: by a ticket\n\
         of the connection before (`psk_dhe_ke`), which the client checks of each; a call of each kind was answered rightly before. Key exchange X25519; hybrid: the client offers X25519MLKEM768, too. One core for the proxy (one worker thread), one for\n\
         upstream and load; {} turns of {} s each, interleaved. Median [95 % interval], µs.\n\n\
         | | full | full, new client | resumed | full, hybrid offered | X25519MLKEM768 chosen | full/s | proxy's core busy |\n|---|---|---|---|---|---|---|---|\n",
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let mut groups: Vec<Group> =
        VARIANTS.iter().map(|variant| Group { label: variant.title.into(), bars: Vec::new() }).collect();
    for (kind, turns) in turns {
        let name = kind.title()?;
        let mut cells = Vec::new();
        for (at, variant) in VARIANTS.iter().enumerate() {
            let cpu = values(turns, |turn| turn[at].proxy_us());
            let found = median(&cpu);
            results.sample("handshake", &name, &format!("{} CPU", variant.name), "us", &cpu);
            figure(&format!("speed.handshake.{}.{}_cpu_us", variant.name, kind.name()), found.value, "us", Goal::None);
            groups[at].bars.push((name.clone(), found));
            cells.push(format!("{found:.0}"));
        }
        let hybrid = turns.iter().all(|turn| turn[HYBRID].hybrid == turn[HYBRID].connections);
        let hybrid = if hybrid { "yes" } else { "no" };
        let rate = median(&values(turns, |turn| turn[FULL].per_second())).value;
        let busy = median(&values(turns, |turn| turn[FULL].proxy_core_busy)).value * 100.0;
        writeln!(text, "| {name} | {} | {hybrid} | {rate:.0} | {busy:.0} % |", cells.join(" | "))?;
    }
    if let (Some(ours), Some(theirs)) = (of(turns, Kind::Spillway), of(turns, Kind::Envoy)) {
        for (at, variant) in VARIANTS.iter().enumerate() {
            let Goal::AtMost(limit) = variant.goal else { continue };
            let cpu = |turns: &[Turn]| values(turns, |turn| turn[at].proxy_us());
            let ratio = ratio(&cpu(ours), &cpu(theirs));
            let verdict = verdict(ratio.value, variant.goal);
            writeln!(
                text,
                "\nRatio of CPU, Spillway to Envoy, {}: **{ratio}**; goal at most {limit}: {verdict}.",
                variant.title
            )?;
            figure(&format!("speed.handshake.{}.cpu_ratio_envoy", variant.name), ratio.value, "ratio", variant.goal);
        }
        let adds = ratio(&values(ours, |turn| turn[HYBRID].proxy_us()), &values(ours, |turn| turn[FULL].proxy_us()));
        writeln!(text, "\nThe hybrid key exchange costs Spillway {adds} times a handshake with X25519 alone.")?;
    }
    let plot = Plot {
        name: "handshakes".into(),
        title: "New connections".into(),
        shape: Shape::Bars(Bars { unit: "CPU of the proxy, µs a connection".into(), groups }),
    };
    writeln!(text, "\n{}", results.plot(&plot)?)?;
    results.add(text);
    Ok(())
}
