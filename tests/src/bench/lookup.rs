//! A sidecar's feature look-up of 1 and of 10 entities, by the tier that has them.
//!
//! Through the library's own door, one look-up after the other. Its CPU time is this process's: that of
//! Redis and Cassandra is theirs, SQLite's is ours. A look-up answered by another tier than the one that
//! is measured ends the bench.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use prometheus_client::registry::Registry;
use spillway_core::resource::{self, FieldValue};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_sidecar::features::{
    CassandraSettings, Event, FeatureSettings, Features, Found, MemorySettings, RedisSettings, SqliteSettings,
    StoreSettings, Tier, now_us,
};

use super::results::{Results, figure};
use super::{process, statistics};
use crate::harness::run_folder::RunFolder;
use crate::harness::servers::{Redis, Server};
use spillway_figures::Goal;

/// Fields of a row, FP32.
const FIELDS: usize = 8;
/// Rows that are read in turn.
const ROWS: usize = 10_000;
const BATCH: usize = 500;
const WARM_UP: Duration = Duration::from_millis(300);
const GROUP: &str = "site";

/// Look-ups of one size in one tier.
#[derive(Clone, Copy, Debug)]
struct Measured {
    tier: &'static str,
    entities: usize,
    count: usize,
    p50_us: f64,
    p99_us: f64,
    cpu_us: f64,
}

/// Within a tokio runtime. `measure`: for each tier and size.
pub async fn run(measure: Duration, results: &mut Results) -> Result<()> {
    let folder = RunFolder::new("bench-lookup");
    let redis = Server::redis(&folder, Redis::Plain);
    let cassandra = Server::cassandra(&folder);
    let sqlite = |name: &str| {
        StoreSettings::Sqlite(SqliteSettings { path: folder.join(name), timeout: PATIENCE, ..Default::default() })
    };
    let redis = RedisSettings { servers: vec![redis.address.to_string()], timeout: PATIENCE, ..Default::default() };
    let cql = StoreSettings::Cassandra(CassandraSettings {
        contact_points: vec![cassandra.address.to_string()],
        timeout: PATIENCE,
        create_schema: true,
        replication_factor: 1,
        ..Default::default()
    });
    // L1 takes every row and believes it for no time: each look-up asks the next tier, as it does when a row's time is over.
    let brief = MemorySettings { keep: Duration::ZERO, keep_absent: Duration::ZERO, ..Default::default() };
    let mut measured = Vec::new();
    for (tier, expected, settings) in [
        ("l1", Tier::L1, FeatureSettings { memory: MemorySettings::default(), redis: None, store: sqlite("l1") }),
        ("l2", Tier::L2, FeatureSettings { memory: brief, redis: Some(redis), store: sqlite("l2") }),
        ("l3_cassandra", Tier::L3, FeatureSettings { memory: brief, redis: None, store: cql }),
        ("l3_sqlite", Tier::L3, FeatureSettings { memory: brief, redis: None, store: sqlite("l3") }),
    ] {
        let bench = Bench::prepare(&settings, expected).await.with_context(|| format!("preparing {tier}"))?;
        for entities in [1, 10] {
            let work = bench.clone().measure(tier, entities, measure);
            // On a worker thread, where a server's calls run.
            let found = tokio::spawn(work).await?.with_context(|| format!("{tier}, {entities} entities"))?;
            println!("{found:?}");
            measured.push(found);
        }
    }
    report(&measured, results)
}

/// No answer is cut off here: a slow one shall be seen as slow.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone)]
struct Bench {
    features: Arc<Features>,
    snapshot: Arc<Snapshot>,
    group: Name,
    entities: Arc<[Bytes]>,
    expected: Tier,
}

impl Bench {
    async fn prepare(settings: &FeatureSettings, expected: Tier) -> Result<Self> {
        let region = Name::parse("bench")?;
        let bench = Self {
            features: Features::open(settings, &region, &mut Registry::default())?,
            snapshot: Arc::new(snapshot()?),
            group: Name::parse(GROUP)?,
            entities: (0..ROWS).map(|entity| Bytes::from(format!("example-{entity:05}.test"))).collect(),
            expected,
        };
        // What is written before the Redis client has connected, Redis is told later, and forgets then. A row of
        // its own waits for the connection.
        bench.write(&[Bytes::from_static(b"first")]).await?;
        bench.write(&bench.entities).await?;
        Ok(bench)
    }

    /// Writes rows and reads them until the tier answers for all of them.
    async fn write(&self, entities: &[Bytes]) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        for batch in entities.chunks(BATCH) {
            let events: Vec<Event> = batch.iter().map(|entity| self.event(entity)).collect();
            // A store that has just started may refuse; a write may be sent again.
            while let Err(error) = self.features.write(&self.snapshot, &events).await {
                ensure!(Instant::now() < end, "the rows cannot be written: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        loop {
            let mut elsewhere = 0;
            for batch in entities.chunks(BATCH) {
                elsewhere += self.read(batch).await?;
            }
            if elsewhere == 0 {
                return Ok(());
            }
            let count = entities.len();
            ensure!(Instant::now() < end, "{elsewhere} of {count} rows do not come from {:?}", self.expected);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn event(&self, entity: &Bytes) -> Event {
        Event {
            group: self.group.clone(),
            tenant: String::new(),
            entity: entity.clone(),
            event_us: now_us() - 1_000_000,
            values: Some((0..FIELDS).map(|field| Some(FieldValue::Float(field as f64))).collect()),
        }
    }

    /// One look-up; returns how many rows another tier had.
    async fn read(&self, entities: &[Bytes]) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        let found = self.features.read(&self.snapshot, "", &[&self.group], entities, deadline).await?;
        let right = |at: &usize| {
            let found = found.get(*at, 0);
            matches!(found, Found::Present(present) if present.tier == self.expected && !present.stale)
        };
        Ok((0..entities.len()).filter(|at| !right(at)).count())
    }

    async fn measure(self, tier: &'static str, entities: usize, measure: Duration) -> Result<Measured> {
        let mut rounds = self.entities.chunks_exact(entities).cycle();
        let mut wrong = 0;
        let mut next = async || -> Result<Duration> {
            let Some(batch) = rounds.next() else { bail!("there are no entities") };
            let start = Instant::now();
            wrong += self.read(batch).await?;
            Ok(start.elapsed())
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
        ensure!(wrong == 0, "{wrong} rows did not come from the tier that is measured");
        nanos.sort_unstable();
        let micros = |share| f64::from(statistics::quantile(&nanos, share)) / 1e3;
        Ok(Measured {
            tier,
            entities,
            count: nanos.len(),
            p50_us: micros(0.5),
            p99_us: micros(0.99),
            cpu_us: used.as_secs_f64() * 1e6 / nanos.len() as f64,
        })
    }
}

fn snapshot() -> Result<Snapshot> {
    let fields: String = (0..FIELDS).map(|field| format!("    - {{ name: f{field}, datatype: FP32 }}\n")).collect();
    let text = format!(
        "apiVersion: spillway/v1\nkind: Region\nmetadata: {{ name: bench }}\nspec: {{ trustDomain: spillway.test }}\n---\n\
         apiVersion: spillway/v1\nkind: FeatureGroup\nmetadata: {{ name: {GROUP} }}\n\
         spec:\n  schemaVersion: 1\n  freshFor: 24h\n  retainFor: 30d\n  fields:\n{fields}"
    );
    let faults = |faults: Vec<resource::Fault>| anyhow::anyhow!("the bench's resources are wrong: {faults:?}");
    Snapshot::compile(1, &resource::parse(&text).map_err(faults)?).map_err(faults)
}

fn report(measured: &[Measured], results: &mut Results) -> Result<()> {
    let mut text = format!(
        "## Feature look-up in the sidecar\n\n\
         One group of {FIELDS} FP32 fields, one look-up at a time, in process. L2 is a real Redis on loopback TCP, L3 a real Cassandra node\n\
         (LOCAL_ONE) or SQLite (WAL). CPU is the sidecar's side alone; servers and client share two cores.\n\n\
         | tier | entities | look-ups | p50 µs | p99 µs | CPU µs |\n|---|---|---|---|---|---|\n"
    );
    for one in measured {
        let Measured { tier, entities, count, p50_us, p99_us, cpu_us } = one;
        writeln!(text, "| {tier} | {entities} | {count} | {p50_us:.1} | {p99_us:.1} | {cpu_us:.1} |")?;
        for (name, value) in [("p50", p50_us), ("p99", p99_us), ("cpu", cpu_us)] {
            figure(&format!("path.bench.lookup.{tier}.{entities}.{name}_us"), *value, "us", Goal::None);
        }
    }
    results.add(text.trim_end().to_owned());
    Ok(())
}
