//! Client, gateway and sidecar with the embedded model: the latency of an answer out of the result cache, and of one
//! made of features in memory by the model, at a fixed rate of 70 % of what the path took just before.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use http::HeaderMap;
use spillway_figures::Goal;

use crate::bench::results::{Results, figure, verdict};
use crate::bench::sidecar::Extent;
use crate::bench::sidecar::callers::{Callers, Window, Work};
use crate::bench::sidecar::ground::{self, Cores, by_entity, check_score};
use crate::bench::statistics::median;
use crate::harness::inference::{Case, cases};
use crate::harness::metrics::Metrics;
use crate::harness::process::spillway_ok;
use crate::harness::region::{Region, text};
use crate::harness::servers::{Redis, Server};

const CONNECTIONS: usize = 8;
/// Calls in flight on each connection while the capacity is looked for.
const STREAMS: usize = 8;
/// Of the capacity.
const LOAD: f64 = 0.7;
/// Calls a second beyond which this load, on its one core, falls behind its own plan.
const MOST: f64 = 15_000.0;
const READS: &str = "spillway_sidecar_feature_reads_total";

/// At most.
const WARM_UP: Duration = Duration::from_secs(20);

/// Where the answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Hit,
    Miss,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Hit => "out of the result cache",
            Self::Miss => "features from memory, embedded model",
        }
    }

    /// What the model says of its results. Those of a miss are kept, and too old when they are asked for again.
    fn cache(self) -> &'static str {
        match self {
            Self::Hit => "  cache: { ttl: 1h }\n",
            Self::Miss => "  cache: { ttl: 1ms }\n",
        }
    }

    /// Entities that are asked about in turn. For misses so many that no two calls in flight ask about the same one.
    fn entities(self) -> usize {
        match self {
            Self::Hit => 64,
            Self::Miss => 2_048,
        }
    }

    /// p50 and p99, ms.
    fn goals(self) -> [f64; 2] {
        match self {
            Self::Hit => [0.8, 2.1],
            Self::Miss => [4.2, 8.7],
        }
    }

    /// Whether the answer says that it came this way.
    fn check(self, said: &HeaderMap) -> Result<()> {
        let status = said.get("cache-status").and_then(|status| status.to_str().ok()).context("no cache-status")?;
        let right = match self {
            Self::Hit => status.contains("; hit"),
            Self::Miss => !status.contains("; hit") && !status.contains("collapsed"),
        };
        ensure!(right, "not a {}: {status}", self.name());
        Ok(())
    }
}

/// One turn: what the path takes at most, and what it does at 70 % of that.
struct Turn {
    capacity: Window,
    steady: Window,
}

pub fn run(extent: &Extent, results: &mut Results) -> Result<()> {
    let mut found = Vec::new();
    for way in [Way::Hit, Way::Miss] {
        found.push((way, measure(way, extent).with_context(|| way.title())?));
    }
    report(extent, &found, results)
}

fn measure(way: Way, extent: &Extent) -> Result<Vec<Turn>> {
    let cores = Cores::of_this_machine()?;
    let mut region = ground::region("bench-path");
    let model = region.resources.get_mut("model.yaml").context("there is no model")?;
    model.push_str(way.cache());
    let redis = Server::redis(&region.folder, Redis::Plain);
    // Without it, nobody tells the gateway of changed features, and results made of them are kept for a second.
    writeln!(region.features, "  redis: {{ servers: [\"{}\"], timeout: 20ms }}", redis.address)?;
    writeln!(region.gateway_settings, "redis: {{ servers: [\"{}\"], timeout: 20ms }}", redis.address)?;
    ground::on_edge_core(cores, region.start_sidecars())?;
    let known = cases();
    let asked: Vec<Case> = (0..way.entities())
        .map(|number| Case { entity: format!("path-{number:05}"), ..known[number % known.len()].clone() })
        .collect();
    load(&region, "site", &asked, 0..SITE)?;
    load(&region, "page", &asked, SITE..known.first().map_or(SITE, |case| case.features.len()))?;
    ground::on_edge_core(cores, region.start_gateway())?;
    let [gateway, sidecar] = [region.gateway(), region.sidecars.first().context("there is no sidecar")?];
    let watched = [u32::try_from(gateway.pid().as_raw())?, u32::try_from(sidecar.pid().as_raw())?];
    let tls = ground::dial_as(&region.identity("acme"))?;
    ground::on_load_core(cores, async {
        let elsewhere = || {
            let metrics = Metrics::of(sidecar.admin);
            metrics.sum(READS, &[]) - metrics.sum(READS, &[r#"tier="l1""#, r#"outcome="hit""#])
        };
        let bodies = by_entity(&asked);
        let unchecked = Work { bodies: bodies.clone(), check: score_of(asked.clone(), None) };
        let warming = Callers::connect(gateway.address, &tls, 1, unchecked).await?;
        let work = Work { bodies, check: score_of(asked.clone(), Some(way)) };
        let callers = Callers::connect(gateway.address, &tls, CONNECTIONS, work).await?;
        // Features come into memory, and results that are kept long enough into the cache. Neither is believed before
        // both processes hear of changes, and the gateway stops looking where a model's first calls find nothing.
        let end = Instant::now() + WARM_UP;
        loop {
            warming.each_once().await?;
            let before = elsewhere();
            match callers.each_once().await {
                Ok(()) if elsewhere() == before => break,
                Err(error) if Instant::now() > end => return Err(error),
                _ => ensure!(Instant::now() < end, "not all rows are read from memory"),
            }
        }
        let before = elsewhere();
        let mut turns = Vec::with_capacity(extent.repetitions);
        for _ in 0..extent.repetitions {
            let brief = Extent { measure: extent.measure / 2, ..*extent };
            let capacity = callers.closed(STREAMS, &brief, &watched).await?;
            let steady = callers.open((capacity.per_second() * LOAD).min(MOST), extent, &watched).await?;
            turns.push(Turn { capacity, steady });
        }
        let missed = elsewhere() - before;
        ensure!(missed == 0.0, "{missed} rows were not read from memory");
        Ok(turns)
    })
}

/// Features of the group `site`; those of `page` follow in the model's input.
const SITE: usize = 5;

#[expect(clippy::type_complexity, reason = "it is one closure")]
fn score_of(asked: Vec<Case>, way: Option<Way>) -> Box<dyn Fn(usize, &HeaderMap, &[u8]) -> Result<()>> {
    Box::new(move |at, said, answer| {
        check_score(answer, &asked[at])?;
        way.map_or(Ok(()), |way| way.check(said))
    })
}

/// Loads some columns of the cases as a group, through the sidecar.
fn load(region: &Region, group: &str, asked: &[Case], columns: std::ops::Range<usize>) -> Result<()> {
    let source = std::fs::read_to_string(crate::root().join(format!("cli/dev/model/{group}.csv")))?;
    let mut rows = source.lines().next().context("the file has no head")?.to_owned() + "\n";
    for case in asked {
        let values: Vec<String> = case.features[columns.clone()].iter().map(f32::to_string).collect();
        writeln!(rows, "{},2026-01-01T00:00:00Z,{}", case.entity, values.join(","))?;
    }
    let file = region.folder.join(format!("{group}.csv"));
    std::fs::write(&file, rows)?;
    spillway_ok(&region.load_arguments(group, text(&file), 0).iter().map(String::as_str).collect::<Vec<_>>());
    Ok(())
}

fn report(extent: &Extent, found: &[(Way, Vec<Turn>)], results: &mut Results) -> Result<()> {
    let mut text = format!(
        "## The whole path\n\n\
         Client, gateway, sidecar with the embedded model (ONNX, 9 features of one entity out of two groups): three processes, mTLS on both hops,\n\
         access logs on, a real Redis for both. Gateway (one worker thread) and sidecar share one core, the load has the other. Calls come at even distances at\n\
         {:.0} % of the rate that {CONNECTIONS} connections with {STREAMS} calls in flight each had just before, but no more than {MOST} a second, which the load keeps\n\
         up with, and latency runs from the planned moment.\n\
         Every score was checked, and that the answer came the way that it says. {} turns of {} s each. Median [95 % interval].\n\n\
         | | calls/s at most | calls/s | p50 ms | p99 ms | p99.9 ms | sent late, refused | CPU µs/call, gateway + sidecar |\n|---|---|---|---|---|---|---|---|\n",
        LOAD * 100.0,
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let mut verdicts = String::new();
    for (way, turns) in found {
        let values = |of: &dyn Fn(&Turn) -> f64| turns.iter().map(of).collect::<Vec<f64>>();
        let ms = |share: f64| values(&|turn| turn.steady.quantile_us(share) / 1e3);
        let (capacity, rate) = (values(&|turn| turn.capacity.per_second()), values(&|turn| turn.steady.per_second()));
        results.sample("path", way.title(), "calls/s at most", "1/s", &capacity);
        for (quantity, share, goal) in
            [("p50", 0.5, Some(way.goals()[0])), ("p99", 0.99, Some(way.goals()[1])), ("p99.9", 0.999, None)]
        {
            let values = ms(share);
            results.sample("path", way.title(), quantity, "ms", &values);
            let (value, goal) = (median(&values).value, goal.map_or(Goal::None, Goal::AtMost));
            figure(&format!("speed.path.{}.{quantity}_ms", way.name()), value, "ms", goal);
            if let Goal::AtMost(most) = goal {
                let verdict = verdict(value, goal);
                writeln!(verdicts, "- {}: {quantity} {value:.3} ms, goal at most {most} ms: {verdict}.", way.title())?;
            }
        }
        let late: u64 = turns.iter().map(|turn| turn.steady.late).sum();
        let refused: u64 = turns.iter().map(|turn| turn.steady.refused).sum();
        let (all, part) = (
            median(&values(&|turn| turn.steady.cpu_us())),
            [0, 1].map(|process| median(&values(&|turn| turn.steady.cpu_us_of(process))).value),
        );
        writeln!(
            text,
            "| {} | {:.0} | {:.0} | {:.3} | {:.3} | {:.3} | {late}, {refused} | {all:.1} = {:.1} + {:.1} |",
            way.title(),
            median(&capacity).value,
            median(&rate).value,
            median(&ms(0.5)),
            median(&ms(0.99)),
            median(&ms(0.999)),
            part[0],
            part[1],
        )?;
    }
    write!(text, "\n{verdicts}")?;
    results.add(text.trim_end().to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_must_have_come_the_way_that_is_measured() {
        let passes = |way: Way, status: &str| {
            way.check(&HeaderMap::from_iter([("cache-status".parse().unwrap(), status.parse().unwrap())])).is_ok()
        };
        for (status, hit, miss) in [
            ("spillway; hit; ttl=30; detail=l1", true, false),
            ("spillway; fwd=miss; stored", false, true),
            ("spillway; fwd=miss; collapsed", false, false),
            ("spillway; fwd=bypass; detail=guard", false, true),
        ] {
            assert_eq!((passes(Way::Hit, status), passes(Way::Miss, status)), (hit, miss), "{status}");
        }
        assert!(Way::Miss.check(&HeaderMap::new()).is_err());
    }
}
