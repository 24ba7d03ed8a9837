//! A sidecar's feature look-up of 1, 10 and 100 entities, by the tier that has them, beside Feast.
//!
//! Through the library's own door, one look-up after the other. Its CPU time is this process's: that of
//! Redis and Cassandra is theirs, SQLite's is ours. A look-up that is answered by another tier than the one that
//! is measured, or with another value than was written, ends the bench.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use prometheus_client::registry::Registry;
use spillway_core::feature::Layout;
use spillway_core::resource::{self, FieldValue};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_figures::Goal;
use spillway_sidecar::features::{
    CassandraSettings, Event, FeatureSettings, Features, Found, Lookup, MemorySettings, RedisSettings, SqliteSettings,
    StoreSettings, Tier, now_us,
};
use tokio::runtime::Runtime;

use super::feast::{Feast, FeatureServer};
use super::{Extent, turns};
use crate::bench::process;
use crate::bench::results::{Axis, Line, Plot, Results, Shape, figure, verdict};
use crate::bench::statistics::{Median, median, quantile};
use crate::harness::run_folder::RunFolder;
use crate::harness::servers::{Redis, Server};

/// Fields of a row, FP32.
pub const FIELDS: usize = 8;
/// Rows that are read in turn.
pub const ROWS: usize = 10_000;
pub const WARM_UP: Duration = Duration::from_millis(200);
const BATCH: usize = 500;
pub const GROUP: &str = "site";
/// Entities of one look-up.
const SIZES: [usize; 3] = [1, 10, 100];
/// The 99th percentile, µs, by tier and entities.
const GOALS: [(&str, usize, f64); 4] = [("l1", 1, 20.0), ("l2", 1, 1_500.0), ("l2", 10, 2_000.0), ("l2", 100, 5_000.0)];
/// No answer is cut off here: a slow one shall be seen as slow.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longer than any run: in memory, a row stays there.
const LONG: Duration = Duration::from_secs(3_600);
/// So many servers' worker threads, as on a machine of two cores.
const THREADS: usize = 2;
/// In process there is no hop to wait for: ours to Feast's with the same Redis.
const TO_FEAST: Goal = Goal::AtMost(1.0);

/// The id of a row's entity.
pub fn entity(row: usize) -> String {
    format!("example-{row:05}.test")
}

/// The value of a row's field: another for each, and exact.
pub fn value(row: usize, field: usize) -> f32 {
    row as f32 + field as f32 / 8.0
}

/// Look-ups of one size in one turn.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub p50_us: f64,
    pub p99_us: f64,
    /// For each look-up.
    pub cpu_us: f64,
}

impl Measured {
    pub fn of(mut nanos: Vec<u32>, used: Duration) -> Result<Self> {
        ensure!(!nanos.is_empty(), "no look-up was answered");
        nanos.sort_unstable();
        let micros = |share| f64::from(quantile(&nanos, share)) / 1e3;
        let cpu_us = used.as_secs_f64() * 1e6 / nanos.len() as f64;
        Ok(Self { p50_us: micros(0.5), p99_us: micros(0.99), cpu_us })
    }
}

/// Who looks up.
enum Subject {
    Tier(&'static str, Tiered),
    Feast(Feast),
    FeatureServer(FeatureServer),
}

impl Subject {
    fn name(&self) -> &'static str {
        match self {
            Self::Tier(name, _) => name,
            Self::Feast(_) => "feast",
            Self::FeatureServer(_) => "feast_server",
        }
    }

    fn title(&self) -> String {
        match self {
            Self::Tier("l1", _) => "Spillway, L1 (memory)".into(),
            Self::Tier("l2", _) => "Spillway, L2 (Redis)".into(),
            Self::Tier("l3_cassandra", _) => "Spillway, L3 (Cassandra)".into(),
            Self::Tier(..) => "Spillway, L3 (SQLite)".into(),
            Self::Feast(feast) => format!("Feast {} (Redis), in process", feast.version),
            Self::FeatureServer(_) => "Feast (Redis), feature server".into(),
        }
    }

    fn measure(&mut self, runtime: &Runtime, entities: usize, measure: Duration) -> Result<Measured> {
        match self {
            // On a worker thread, where a server's calls run.
            Self::Tier(_, tier) => runtime.block_on(runtime.spawn(tier.clone().measure(entities, measure)))?,
            Self::Feast(feast) => feast.measure(entities, measure),
            Self::FeatureServer(server) => server.measure(entities, measure),
        }
    }
}

pub fn run(extent: &Extent, results: &mut Results) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let folder = RunFolder::new("bench-lookup");
    let redis = Server::redis(&folder, Redis::Plain);
    let cassandra = Server::cassandra(&folder);
    let mut subjects = runtime.block_on(tiers(&folder, &redis, &cassandra))?;
    let feast = Feast::prepare(&folder, redis.address)?;
    let server = feast.serve()?;
    results.peer("Feast", &feast.version);
    subjects.extend([Subject::Feast(feast), Subject::FeatureServer(server)]);
    // A look-up takes little: many fit into a part of the time.
    let measure = extent.measure / 4;
    let mut found: Vec<Vec<Vec<Measured>>> = subjects.iter().map(|_| Vec::new()).collect();
    for turn in turns(subjects.len(), extent.repetitions) {
        let subject = &mut subjects[turn];
        let mut sizes = Vec::with_capacity(SIZES.len());
        for entities in SIZES {
            let measured = subject.measure(&runtime, entities, measure);
            sizes.push(measured.with_context(|| format!("{}, {entities} entities", subject.name()))?);
        }
        found[turn].push(sizes);
    }
    report(extent, &subjects, &found, results)
}

async fn tiers(folder: &RunFolder, redis: &Server, cassandra: &Server) -> Result<Vec<Subject>> {
    let sqlite = |name: &str| {
        StoreSettings::Sqlite(SqliteSettings { path: folder.join(name), timeout: PATIENCE, ..Default::default() })
    };
    let redis =
        RedisSettings { servers: vec![redis.address.to_string()], timeout: PATIENCE, keep: LONG, ..Default::default() };
    let cql = StoreSettings::Cassandra(CassandraSettings {
        contact_points: vec![cassandra.address.to_string()],
        timeout: PATIENCE,
        create_schema: true,
        replication_factor: 1,
        ..Default::default()
    });
    let long = MemorySettings { keep: LONG, ..Default::default() };
    // L1 takes every row and believes it for no time: each look-up asks the next tier, as it does when a row's time is over.
    let brief = MemorySettings { keep: Duration::ZERO, keep_absent: Duration::ZERO, ..Default::default() };
    let mut subjects = Vec::new();
    for (name, expected, settings) in [
        ("l1", Tier::L1, FeatureSettings { memory: long, redis: None, store: sqlite("l1") }),
        ("l2", Tier::L2, FeatureSettings { memory: brief, redis: Some(redis), store: sqlite("l2") }),
        ("l3_cassandra", Tier::L3, FeatureSettings { memory: brief, redis: None, store: cql }),
        ("l3_sqlite", Tier::L3, FeatureSettings { memory: brief, redis: None, store: sqlite("l3") }),
    ] {
        let tier = Tiered::prepare(&settings, expected).await.with_context(|| format!("preparing {name}"))?;
        subjects.push(Subject::Tier(name, tier));
    }
    Ok(subjects)
}

/// Features that one tier answers for.
#[derive(Clone)]
struct Tiered {
    features: Arc<Features>,
    snapshot: Arc<Snapshot>,
    group: Name,
    layout: Arc<Layout>,
    entities: Arc<[Bytes]>,
    expected: Tier,
}

impl Tiered {
    async fn prepare(settings: &FeatureSettings, expected: Tier) -> Result<Self> {
        let (region, group) = (Name::parse("bench")?, Name::parse(GROUP)?);
        let snapshot = Arc::new(snapshot()?);
        let features = Features::open(settings, &region, &mut Registry::default())?;
        let layout = features.layout(&snapshot, &group).context("the group has no layout")?;
        let entities = (0..ROWS).map(|row| Bytes::from(entity(row))).collect();
        let tier = Self { features, snapshot, group, layout, entities, expected };
        // What is written before the Redis client has connected, Redis is told later, and forgets then. A row of
        // its own waits for the connection.
        tier.write(&[Bytes::from_static(b"first")]).await?;
        tier.write(&tier.entities).await?;
        Ok(tier)
    }

    /// Writes rows and reads them until the tier answers for all of them.
    async fn write(&self, entities: &[Bytes]) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        for (at, batch) in entities.chunks(BATCH).enumerate() {
            let rows = batch.iter().zip(at * BATCH..);
            let events: Vec<Event> = rows.map(|(entity, row)| self.event(entity, row)).collect();
            // A store that has just started may refuse; a write may be sent again.
            while let Err(error) = self.features.write(&self.snapshot, &events).await {
                ensure!(Instant::now() < end, "the rows cannot be written: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        loop {
            let mut elsewhere = 0;
            for (at, batch) in entities.chunks(BATCH).enumerate() {
                elsewhere += self.elsewhere(&self.read(batch).await?, at * BATCH, batch.len())?;
            }
            if elsewhere == 0 {
                return Ok(());
            }
            let count = entities.len();
            ensure!(Instant::now() < end, "{elsewhere} of {count} rows do not come from {:?}", self.expected);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn event(&self, entity: &Bytes, row: usize) -> Event {
        Event {
            group: self.group.clone(),
            tenant: String::new(),
            entity: entity.clone(),
            event_us: now_us() - 1_000_000,
            values: Some((0..FIELDS).map(|field| Some(FieldValue::Float(value(row, field).into()))).collect()),
        }
    }

    async fn read(&self, entities: &[Bytes]) -> Result<Lookup> {
        let deadline = Instant::now() + PATIENCE;
        Ok(self.features.read(&self.snapshot, "", &[&self.group], entities, deadline).await?)
    }

    /// How many rows, from `first` on, another tier had. A wrong value is an error.
    fn elsewhere(&self, found: &Lookup, first: usize, count: usize) -> Result<usize> {
        let mut elsewhere = 0;
        for at in 0..count {
            let Found::Present(present) = found.get(at, 0) else {
                elsewhere += 1;
                continue;
            };
            for field in 0..FIELDS {
                let expected = value(first + at, field).to_le_bytes();
                let read = self.layout.field(&present.row, field);
                ensure!(read == Some(&expected[..]), "row {}: f{field} is {read:?}", first + at);
            }
            elsewhere += usize::from(present.tier != self.expected || present.stale);
        }
        Ok(elsewhere)
    }

    async fn measure(self, entities: usize, measure: Duration) -> Result<Measured> {
        let mut rounds = self.entities.chunks_exact(entities).enumerate().cycle();
        let mut elsewhere = 0;
        let mut next = async || -> Result<Duration> {
            let Some((round, batch)) = rounds.next() else { bail!("there are no entities") };
            let start = Instant::now();
            let found = self.read(batch).await?;
            let took = start.elapsed();
            elsewhere += self.elsewhere(&found, round * entities, entities)?;
            Ok(took)
        };
        let warm = Instant::now() + WARM_UP;
        while Instant::now() < warm {
            next().await?;
        }
        let mut nanos: Vec<u32> = Vec::with_capacity(1 << 20);
        let (own, start) = (std::process::id(), Instant::now());
        let before = process::cpu(own)?;
        while start.elapsed() < measure {
            nanos.push(u32::try_from(next().await?.as_nanos()).unwrap_or(u32::MAX));
        }
        let used = process::cpu(own)?.saturating_sub(before);
        ensure!(elsewhere == 0, "{elsewhere} rows did not come from the tier that is measured");
        Measured::of(nanos, used)
    }
}

/// Resources with the one feature group.
pub fn snapshot() -> Result<Snapshot> {
    let fields: String = (0..FIELDS).map(|field| format!("    - {{ name: f{field}, datatype: FP32 }}\n")).collect();
    let text = format!(
        "apiVersion: spillway/v1\nkind: Region\nmetadata: {{ name: bench }}\nspec: {{ trustDomain: spillway.test }}\n---\n\
         apiVersion: spillway/v1\nkind: FeatureGroup\nmetadata: {{ name: {GROUP} }}\n\
         spec:\n  schemaVersion: 1\n  freshFor: 24h\n  retainFor: 30d\n  fields:\n{fields}"
    );
    let faults = |faults: Vec<resource::Fault>| anyhow::anyhow!("the bench's resources are wrong: {faults:?}");
    Snapshot::compile(1, &resource::parse(&text).map_err(faults)?).map_err(faults)
}

/// `found`: subject, repetition, size.
fn report(extent: &Extent, subjects: &[Subject], found: &[Vec<Vec<Measured>>], results: &mut Results) -> Result<()> {
    let mut text = format!(
        "## Feature look-up, beside Feast\n\n\
         One group of {FIELDS} FP32 fields, {ROWS} rows, one look-up at a time; every value of every answer was checked, outside of the\n\
         time that counts. In process but for Feast's feature server, which is asked over HTTP/1.1 by one connection that is kept (as\n\
         `feast serve` comes, one worker). L2 and Feast use the same real Redis on loopback TCP; L3 is a real Cassandra node (LOCAL_ONE) or\n\
         SQLite (WAL). CPU is that of the process that looks up (of Spillway with the bench's checks, of the feature server without its\n\
         client), not of the stores. {} turns of {} s each, interleaved, on two cores that servers and clients share. Median [95 % interval].\n\n\
         | | entities | p50 µs | p99 µs | CPU µs |\n|---|---|---|---|---|\n",
        extent.repetitions,
        (extent.measure / 4).as_secs_f64(),
    );
    let values = |subject: usize, size: usize, of: &dyn Fn(&Measured) -> f64| -> Vec<f64> {
        found[subject].iter().map(|sizes| of(&sizes[size])).collect()
    };
    let mut lines: Vec<Line> = Vec::new();
    for (at, subject) in subjects.iter().enumerate() {
        let (name, title) = (subject.name(), subject.title());
        let mut points = Vec::new();
        for (size, entities) in SIZES.into_iter().enumerate() {
            let [p50, p99, cpu] = [
                ("p50", values(at, size, &|one| one.p50_us)),
                ("p99", values(at, size, &|one| one.p99_us)),
                ("cpu", values(at, size, &|one| one.cpu_us)),
            ]
            .map(|(quantity, values)| {
                results.sample(&format!("lookup.{entities}"), &title, quantity, "us", &values);
                let median = median(&values);
                if GOALS.iter().all(|(tier, size, _)| (*tier, *size, quantity) != (name, entities, "p99")) {
                    figure(&format!("speed.lookup.{name}.{entities}.{quantity}_us"), median.value, "us", Goal::None);
                }
                median
            });
            writeln!(text, "| {title} | {entities} | {p50:.1} | {p99:.1} | {cpu:.1} |")?;
            points.push((entities as f64, p99));
        }
        lines.push(Line { label: title, points });
    }
    text.push('\n');
    let at = |name: &str| subjects.iter().position(|subject| subject.name() == name).context("a subject is missing");
    let size = |entities: usize| SIZES.iter().position(|size| *size == entities).context("a size is missing");
    for (tier, entities, most) in GOALS {
        let p99 = median(&values(at(tier)?, size(entities)?, &|one| one.p99_us)).value;
        let goal = Goal::AtMost(most);
        figure(&format!("speed.lookup.{tier}.{entities}.p99_us"), p99, "us", goal);
        writeln!(
            text,
            "- {entities} of {}: p99 {p99:.1} µs, goal at most {most} µs: {}.",
            tier.to_uppercase(),
            verdict(p99, goal)
        )?;
    }
    for (size, entities) in SIZES.into_iter().enumerate() {
        let ratio = |of: &dyn Fn(&Measured) -> f64| -> Result<Median> {
            let (ours, theirs) = (values(at("l2")?, size, of), values(at("feast")?, size, of));
            Ok(median(&ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>()))
        };
        let (p99, cpu) = (ratio(&|one| one.p99_us)?, ratio(&|one| one.cpu_us)?);
        figure(&format!("speed.lookup.l2.{entities}.p99_ratio_feast"), p99.value, "ratio", TO_FEAST);
        figure(&format!("speed.lookup.l2.{entities}.cpu_ratio_feast"), cpu.value, "ratio", Goal::None);
        writeln!(
            text,
            "- {entities} of L2 to Feast in process: p99 **{p99:.3}**, goal at most 1: {}; CPU {cpu:.3}.",
            verdict(p99.value, TO_FEAST)
        )?;
    }
    let axis = |label: &str| Axis { label: label.into(), logarithmic: true };
    let plot = Plot {
        name: "lookup".into(),
        title: "Feature look-up, p99".into(),
        shape: Shape::Lines(axis("entities of a look-up"), axis("p99, µs"), lines),
    };
    writeln!(text, "\n{}", results.plot(&plot)?)?;
    results.add(text.trim_end().to_owned());
    Ok(())
}
