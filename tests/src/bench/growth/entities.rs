//! Feature look-ups where entities grow: in the sidecar's memory, and in a real Redis that is full of rows.
//!
//! One look-up after the other, in process, of entities at random among all that there are; a look-up that another
//! tier answers than the one that is measured ends the bench. L1 is given room for all of them. Rows beyond the first
//! are copied within Redis, under keys as the sidecar writes them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use prometheus_client::registry::Registry;
use spillway_core::resource::FieldValue;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::{ByteSize, Name};
use spillway_sidecar::features::{
    Event, FeatureSettings, Features, Found, MemorySettings, RedisSettings, SqliteSettings, StoreSettings, Tier, now_us,
};

use super::callers::mix;
use super::{Extent, report};
use crate::bench::results::Results;
use crate::bench::sidecar::lookup::{FIELDS, GROUP, snapshot};
use crate::bench::{process, statistics};
use crate::harness::run_folder::RunFolder;
use crate::harness::servers::{Redis, Server, redis_cli};

const SIZES: [usize; 4] = [10_000, 100_000, 1_000_000, 10_000_000];
/// What an entity takes of this machine at most: its row in Redis, in L1, and what allocators lose.
const BYTES_EACH: u64 = 1_200;
/// Room for all of them.
const L1: ByteSize = ByteSize(6 << 30);
/// Longer than any run: no row goes meanwhile.
const KEEP: Duration = Duration::from_secs(3_600);
/// No answer is cut off here: a slow one shall be seen as slow.
const PATIENCE: Duration = Duration::from_secs(5);
/// Rows that one script copies: Redis answers nobody else meanwhile.
const COPIED: usize = 50_000;
const BATCH: usize = 500;
/// Entities drawn for one measurement: far more than a CPU's caches hold.
const DRAWN: usize = 500_000;

/// Look-ups in one tier and size, of entities among so many of them.
#[derive(Clone, Copy, Debug)]
pub struct LookedUp {
    /// This process's, µs each.
    pub cpu_us: f64,
    /// Redis's, µs each.
    pub redis_us: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// What one size showed; each look-up repeated.
#[derive(Clone, Debug)]
pub struct Entities {
    pub count: usize,
    pub l1: Vec<LookedUp>,
    /// Of the first ones alone, as many as the smallest size has.
    pub l1_few: Vec<LookedUp>,
    pub l2: Vec<LookedUp>,
    /// What L1 says that it holds, and by how much this process grew, bytes.
    pub l1_bytes: u64,
    pub l1_resident: u64,
    pub redis_resident: u64,
}

/// Within a tokio runtime.
pub async fn run(extent: &Extent, results: &mut Results) -> Result<()> {
    let folder = RunFolder::new("bench-growth");
    let server = Server::redis(&folder, Redis::Plain);
    redis_cli(&server, &["config", "set", "maxmemory", "0"]);
    let redis: u32 = std::fs::read_to_string(server.folder().join("redis.pid"))?.trim().parse()?;
    let open = |name: &str, memory: MemorySettings| {
        let sqlite = SqliteSettings { path: folder.join(name), timeout: PATIENCE, ..Default::default() };
        let servers = vec![server.address.to_string()];
        let settings = RedisSettings { servers, timeout: PATIENCE, keep: KEEP, ..Default::default() };
        LookUps::open(&FeatureSettings { memory, redis: Some(settings), store: StoreSettings::Sqlite(sqlite) }, redis)
    };
    // L1 takes every row and believes it for no time: each look-up asks Redis.
    let brief = MemorySettings { keep: Duration::ZERO, keep_absent: Duration::ZERO, ..Default::default() };
    let through = open("l2", brief)?;
    through.write_first().await?;
    let row = Row::of(&server)?;
    let inside = open("l1", MemorySettings { size: L1, keep: KEEP, ..Default::default() })?;
    inside.settle(Tier::L1).await?;
    let resident_before = process::resident(std::process::id())?;
    let (mut found, mut filled, mut left_out) = (Vec::new(), 1, None);
    for count in SIZES.into_iter().filter(|count| *count <= extent.entities) {
        let (needed, available) = ((count - filled) as u64 * BYTES_EACH, available()?);
        if needed > available {
            left_out = Some((count, available));
            break;
        }
        row.copy(&server, filled, count);
        let l2 = through.measure(Tier::L2, count, extent).await?;
        inside.fill(count).await?;
        let entities = Entities {
            count,
            l1: inside.measure(Tier::L1, count, extent).await?,
            l1_few: inside.measure(Tier::L1, SIZES[0], extent).await?,
            l2,
            l1_bytes: inside.features.memory_bytes(),
            l1_resident: process::resident(std::process::id())?.saturating_sub(resident_before),
            redis_resident: process::resident(redis)?,
        };
        println!("{entities:?}");
        found.push(entities);
        filled = count;
    }
    report::entities(&found, left_out, results)
}

/// The first row as Redis has it: other entities' rows differ in their key alone.
struct Row {
    key: String,
}

impl Row {
    fn of(server: &Server) -> Result<Self> {
        let keys = redis_cli(server, &["--scan", "--pattern", &format!("*{}*", name(0))]);
        let [key] = keys.lines().collect::<Vec<_>>()[..] else {
            anyhow::bail!("expected one row in Redis, found {keys:?}");
        };
        Ok(Self { key: key.to_owned() })
    }

    fn copy(&self, server: &Server, from: usize, to: usize) {
        const SCRIPT: &str = "local row = redis.call('GET', KEYS[1])\n\
            for at = tonumber(ARGV[1]), tonumber(ARGV[2]) - 1 do\n\
            redis.call('SET', ARGV[3] .. string.format('e-%08d', at) .. ARGV[4], row, 'PX', ARGV[5])\nend";
        let (before, after) = self.key.split_once(&name(0)).unwrap_or_default();
        let keep = KEEP.as_millis().to_string();
        for start in (from..to).step_by(COPIED) {
            let end = (start + COPIED).min(to);
            let (start, end) = (start.to_string(), end.to_string());
            redis_cli(server, &["eval", SCRIPT, "1", &self.key, &start, &end, before, after, &keep]);
        }
    }
}

#[derive(Clone)]
struct LookUps {
    features: Arc<Features>,
    snapshot: Arc<Snapshot>,
    group: Name,
    redis: u32,
}

impl LookUps {
    fn open(settings: &FeatureSettings, redis: u32) -> Result<Self> {
        let features = Features::open(settings, &Name::parse("bench")?, &mut Registry::default())?;
        Ok(Self { features, snapshot: Arc::new(snapshot()?), group: Name::parse(GROUP)?, redis })
    }

    /// Writes the first entity's row and waits until Redis answers for it.
    async fn write_first(&self) -> Result<()> {
        // What is written before the Redis client has connected, Redis is told later, and forgets then. A row of its
        // own waits for the connection.
        let event = |entity: String| Event {
            group: self.group.clone(),
            tenant: String::new(),
            entity: entity.into(),
            event_us: now_us() - 1_000_000,
            values: Some((0..FIELDS).map(|field| Some(FieldValue::Float(field as f64))).collect()),
        };
        self.features.write(&self.snapshot, &[event("first".into())]).await.context("the first row")?;
        self.until(&[Bytes::from_static(b"first")], Tier::L2).await?;
        self.features.write(&self.snapshot, &[event(name(0))]).await.context("the second row")?;
        self.settle(Tier::L2).await
    }

    /// Waits until the first entity's row comes from a tier.
    async fn settle(&self, tier: Tier) -> Result<()> {
        self.until(&[name(0).into()], tier).await
    }

    async fn until(&self, entities: &[Bytes], tier: Tier) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        while self.read(entities, tier).await? > 0 {
            ensure!(Instant::now() < end, "the row does not come from {tier:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// One look-up; returns how many rows did not come fresh, with the values that were written, from this tier.
    async fn read(&self, entities: &[Bytes], tier: Tier) -> Result<usize> {
        let found = self
            .features
            .read(&self.snapshot, "", &[&self.group], entities, Instant::now() + PATIENCE)
            .await
            .context("the look-up failed")?;
        let right = |at: &usize| matches!(found.get(*at, 0), Found::Present(row) if row.tier == tier && !row.stale);
        Ok((0..entities.len()).filter(|at| !right(at)).count())
    }

    /// L1 takes what Redis has. What it held before is read again: a tenth was not there any more after nine million copies,
    /// most likely since a listener that a busy Redis does not answer in time drops everything.
    async fn fill(&self, count: usize) -> Result<()> {
        for (tier, holds) in [(Tier::L2, false), (Tier::L1, true)] {
            let mut elsewhere = 0;
            for start in (0..count).step_by(BATCH) {
                let batch: Vec<Bytes> = (start..(start + BATCH).min(count)).map(|at| name(at).into()).collect();
                elsewhere += self.read(&batch, tier).await?;
            }
            ensure!(!holds || elsewhere == 0, "of {count} rows that were read, L1 does not hold {elsewhere}");
        }
        Ok(())
    }

    /// Look-ups of single entities among the first `count`, on a worker thread, where a server's calls run.
    async fn measure(&self, tier: Tier, count: usize, extent: &Extent) -> Result<Vec<LookedUp>> {
        let time = extent.measure_in_process / u32::try_from(extent.repetitions)?;
        let mut found = Vec::new();
        for repetition in 0..extent.repetitions {
            let seed = mix((count + repetition) as u64);
            let drawn = (0..DRAWN as u64).map(|at| name((mix(seed ^ at) % count as u64) as usize).into()).collect();
            found.push(tokio::spawn(self.clone().look_up(tier, drawn, time)).await??);
        }
        Ok(found)
    }

    async fn look_up(self, tier: Tier, drawn: Vec<Bytes>, time: Duration) -> Result<LookedUp> {
        let mut nanos: Vec<u32> = Vec::with_capacity(1 << 20);
        let mut wrong = 0;
        let own = std::process::id();
        let (start, before, redis_before) = (Instant::now(), process::cpu(own)?, process::cpu(self.redis)?);
        for entity in drawn.chunks_exact(1).cycle() {
            let asked = Instant::now();
            wrong += self.read(entity, tier).await?;
            nanos.push(u32::try_from(asked.elapsed().as_nanos()).unwrap_or(u32::MAX));
            if start.elapsed() >= time {
                break;
            }
        }
        let count = nanos.len() as f64;
        let each = |used: Duration| used.as_secs_f64() * 1e6 / count;
        let cpu_us = each(process::cpu(own)?.saturating_sub(before));
        let redis_us = each(process::cpu(self.redis)?.saturating_sub(redis_before));
        ensure!(wrong == 0, "{wrong} of {count} rows did not come from {tier:?}");
        nanos.sort_unstable();
        let micros = |share| f64::from(statistics::quantile(&nanos, share)) / 1e3;
        Ok(LookedUp { cpu_us, redis_us, p50_us: micros(0.5), p99_us: micros(0.99) })
    }
}

fn name(entity: usize) -> String {
    format!("e-{entity:08}")
}

/// Memory that this machine could give, bytes.
fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    Ok(line.context("/proc/meminfo does not say what is available")?.trim().parse::<u64>()? * 1024)
}
