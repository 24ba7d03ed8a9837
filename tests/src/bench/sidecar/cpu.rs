//! What a sidecar's process costs in front of a model server that is a process of its own: its CPU at a fixed
//! rate, with a feature join out of memory for each request and without, beside Envoy in its place.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use spillway_figures::Goal;

use super::callers::{Callers, Window, Work};
use super::envoy::{self, Place};
use super::ground::{self, Cores, by_entity, by_features, check_score};
use super::{Extent, turns};
use crate::bench::peers::envoy_version;
use crate::bench::results::{Results, figure, verdict};
use crate::bench::statistics::median;
use crate::harness::inference::cases;
use crate::harness::metrics::Metrics;

/// Requests a second.
const RATE: f64 = 1_000.0;
/// As a gateway of two worker threads keeps them.
const CONNECTIONS: usize = 2;
/// Cores at that rate.
const GOAL: Goal = Goal::AtMost(0.10);
const READS: &str = "spillway_sidecar_feature_reads_total";

struct Subject {
    title: String,
    /// Of its figure; the one whose requests have no features beside Envoy has no goal of its own.
    name: &'static str,
    goal: Goal,
    callers: Callers,
    pid: u32,
}

pub fn run(extent: &Extent, results: &mut Results) -> Result<()> {
    let cores = Cores::of_this_machine()?;
    let mut region = ground::region("bench-sidecar");
    let (_model_server, model_server) = ground::model_server(&region, cores)?;
    region.use_triton(model_server);
    ground::on_edge_core(cores, region.start_sidecars())?;
    region.load_features();
    let peer = envoy::start(Place::Sidecar, &region, model_server, cores.edge)?;
    let version = envoy_version()?;
    results.peer("Envoy", &version);
    let sidecar = region.sidecars.first().context("there is no sidecar")?;
    let pid = u32::try_from(sidecar.pid().as_raw())?;
    let tls = ground::dial_as(&region.identity("gateway-0"))?;
    let known = cases();
    let work = |bodies| {
        let known = known.clone();
        Work { bodies, check: Box::new(move |at, _, answer| check_score(answer, &known[at])) }
    };
    ground::on_load_core(cores, async {
        let connect = async |address, bodies| Callers::connect(address, &tls, CONNECTIONS, work(bodies)).await;
        let subjects = [
            Subject {
                title: "Spillway, features from memory".into(),
                name: "join",
                goal: GOAL,
                callers: connect(sidecar.address, by_entity(&known)).await?,
                pid,
            },
            Subject {
                title: "Spillway, features in the request".into(),
                name: "no_join",
                goal: GOAL,
                callers: connect(sidecar.address, by_features(&known)).await?,
                pid,
            },
            Subject {
                title: format!("Envoy {version}, features in the request"),
                name: "envoy",
                goal: Goal::None,
                callers: connect(peer.address, by_features(&known)).await?,
                pid: peer.pid,
            },
        ];
        for subject in &subjects {
            subject.callers.each_once().await.with_context(|| subject.title.clone())?;
        }
        let elsewhere = || {
            let metrics = Metrics::of(sidecar.admin);
            metrics.sum(READS, &[]) - metrics.sum(READS, &[r#"tier="l1""#, r#"outcome="hit""#])
        };
        let before = elsewhere();
        let mut windows: Vec<Vec<Window>> = subjects.iter().map(|_| Vec::new()).collect();
        for turn in turns(subjects.len(), extent.repetitions) {
            let Subject { title, callers, pid, .. } = &subjects[turn];
            let window = callers.open(RATE, extent, &[*pid]).await;
            windows[turn].push(window.with_context(|| title.clone())?);
        }
        let missed = elsewhere() - before;
        ensure!(missed == 0.0, "{missed} rows were not read from memory");
        report(extent, &subjects, &windows, results)
    })
}

fn report(extent: &Extent, subjects: &[Subject], windows: &[Vec<Window>], results: &mut Results) -> Result<()> {
    let mut text = format!(
        "## A sidecar's CPU in front of a model server\n\n\
         One gRPC call of one row after the other's moment, {RATE:.0} a second at even distances over {CONNECTIONS} connections of mTLS h2, to a sidecar whose\n\
         model server is another process (KServe v2 over plain h2), so that the model's own CPU is not in it. A join looks the features of one\n\
         entity up in two groups, both in memory. Envoy in the sidecar's place checks the caller's SPIFFE id and logs as the sidecar does; it\n\
         joins nothing. Every score was checked. {} turns of {} s each, interleaved. Median [95 % interval].\n\n\
         | | cores at {RATE:.0}/s | CPU µs/call | p50 µs | p99 µs | sent late, refused |\n|---|---|---|---|---|---|\n",
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let mut verdicts = String::new();
    for (Subject { title, name, goal, .. }, windows) in subjects.iter().zip(windows) {
        let values = |of: &dyn Fn(&Window) -> f64| windows.iter().map(of).collect::<Vec<f64>>();
        let all = values(&|window| window.cpu_us() * RATE / 1e6);
        results.sample("sidecar", title, "cores at 1,000 requests/s", "cores", &all);
        results.sample("sidecar", title, "p99", "us", &values(&|window| window.quantile_us(0.99)));
        let used = median(&all);
        let [cpu, p50, p99] = [
            median(&values(&Window::cpu_us)),
            median(&values(&|window| window.quantile_us(0.5))),
            median(&values(&|window| window.quantile_us(0.99))),
        ];
        let late: u64 = windows.iter().map(|window| window.late).sum();
        let refused: u64 = windows.iter().map(|window| window.refused).sum();
        writeln!(text, "| {title} | {used:.3} | {cpu:.1} | {:.0} | {:.0} | {late}, {refused} |", p50.value, p99.value)?;
        figure(&format!("speed.sidecar.{name}.cores_at_1000_per_s"), used.value, "cores", *goal);
        if let Goal::AtMost(most) = goal {
            let verdict = verdict(used.value, *goal);
            writeln!(verdicts, "- {title}: {:.3} cores, goal at most {most}: {verdict}.", used.value)?;
        }
    }
    write!(text, "\n{verdicts}")?;
    results.add(text.trim_end().to_owned());
    Ok(())
}
