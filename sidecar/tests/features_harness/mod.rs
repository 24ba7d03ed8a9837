//! What the feature tests share: one region's resources, real servers, a slow link, and waiting.
#![allow(dead_code)]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use spillway_core::resource::{self, FieldValue};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_sidecar::features::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub const DEADLINE: Duration = Duration::from_secs(2);

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// `site` (shared) and `user` (a tenant's own): fresh for a minute, kept for an hour.
pub fn snapshot() -> Snapshot {
    snapshot_of(1, "1m", "1h")
}

pub fn snapshot_of(schema: u16, fresh: &str, retain: &str) -> Snapshot {
    let text = format!(
        "
apiVersion: spillway/v1
kind: Region
metadata: {{name: eu}}
spec: {{trustDomain: spillway.test}}
---
apiVersion: spillway/v1
kind: Tenant
metadata: {{name: acme}}
---
apiVersion: spillway/v1
kind: Tenant
metadata: {{name: globex}}
---
apiVersion: spillway/v1
kind: FeatureGroup
metadata: {{name: site}}
spec:
  schemaVersion: {schema}
  freshFor: {fresh}
  retainFor: {retain}
  fields: [{{name: age, datatype: FP32, default: 1.5}}, {{name: hits, datatype: INT64}}]
---
apiVersion: spillway/v1
kind: FeatureGroup
metadata: {{name: user}}
spec:
  scope: tenant
  schemaVersion: {schema}
  freshFor: {fresh}
  retainFor: {retain}
  consistency: local_quorum
  fields: [{{name: score, datatype: FP64}}]
"
    );
    Snapshot::compile(1, &resource::parse(&text).unwrap()).unwrap()
}

/// One process' worth of features, with its metrics.
pub struct Sidecar {
    pub features: Arc<Features>,
    registry: Registry,
    pub snapshot: Snapshot,
}

impl Sidecar {
    pub fn open(settings: &FeatureSettings) -> Self {
        Self::with(settings, snapshot())
    }

    pub fn with(settings: &FeatureSettings, snapshot: Snapshot) -> Self {
        let mut registry = Registry::with_prefix("spillway");
        let features = Features::open(settings, &name("eu"), &mut registry).unwrap();
        Self { features, registry, snapshot }
    }

    pub async fn site(&self, entity: &str) -> Found {
        self.look(&["site"], &[entity], DEADLINE).await.get(0, 0).clone()
    }

    pub async fn look(&self, groups: &[&str], entities: &[&str], deadline: Duration) -> Lookup {
        let groups: Vec<Name> = groups.iter().map(|group| name(group)).collect();
        let groups: Vec<&Name> = groups.iter().collect();
        let entities: Vec<Bytes> = entities.iter().map(|entity| Bytes::copy_from_slice(entity.as_bytes())).collect();
        self.features.read(&self.snapshot, "acme", &groups, &entities, Instant::now() + deadline).await.unwrap()
    }

    pub async fn put(&self, entity: &str, hits: i64, event_us: i64) -> Result<Written, WriteError> {
        self.features.write(&self.snapshot, &[event(entity, Some(hits), event_us)]).await
    }

    pub async fn delete(&self, entity: &str, event_us: i64) -> Result<Written, WriteError> {
        self.features.write(&self.snapshot, &[event(entity, None, event_us)]).await
    }

    /// `hits` of a row of `site`.
    pub fn hits(&self, found: &Found) -> Option<i64> {
        let Found::Present(present) = found else { return None };
        let layout = self.features.layout(&self.snapshot, &name("site")).unwrap();
        match layout.value(&present.row, 1)? {
            FieldValue::Int(value) => Some(value),
            other => panic!("{other:?}"),
        }
    }

    /// The value of one metric line, such as `reads_total{tier="l2",outcome="hit"}`.
    pub fn metric(&self, line: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = format!("spillway_sidecar_feature_{line} ");
        let value = text.lines().find_map(|text| text.strip_prefix(&line));
        value.unwrap_or_else(|| panic!("no {line} in {text}")).parse().unwrap()
    }

    pub fn reads(&self, tier: &str, outcome: &str) -> u64 {
        self.metric(&format!("reads_total{{tier=\"{tier}\",outcome=\"{outcome}\"}}"))
    }

    /// Until no tier fails any more.
    pub async fn until_answered(&self) {
        eventually("all tiers answer", async || {
            let probe = unique("probe");
            !self.look(&["site"], &[&probe], DEADLINE).await.failed_tiers.any()
        })
        .await;
    }

    /// Until no tier fails any more and invalidations are heard.
    pub async fn until_well(&self) {
        self.until_answered().await;
        eventually("invalidations are heard", async || self.features.hears()).await;
    }
}

/// No values: a deletion.
pub fn event(entity: &str, hits: Option<i64>, event_us: i64) -> Event {
    Event {
        group: name("site"),
        tenant: String::new(),
        entity: Bytes::copy_from_slice(entity.as_bytes()),
        event_us,
        values: hits.map(|hits| vec![Some(FieldValue::Float(0.5)), Some(FieldValue::Int(hits))]),
    }
}

pub fn tier(found: &Found) -> Option<Tier> {
    match found {
        Found::Present(present) => Some(present.tier),
        _ => None,
    }
}

pub fn is_stale(found: &Found) -> bool {
    matches!(found, Found::Present(present) if present.stale)
}

pub fn is_absent(found: &Found) -> bool {
    matches!(found, Found::Absent { malformed: None })
}

pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub fn sqlite(folder: &Path) -> StoreSettings {
    let timeout = Duration::from_secs(1);
    StoreSettings::Sqlite(SqliteSettings { path: folder.join("features.db"), timeout, ..SqliteSettings::default() })
}

pub fn settings(store: StoreSettings, redis: Option<RedisSettings>) -> FeatureSettings {
    FeatureSettings { memory: MemorySettings::default(), redis, store }
}

/// Waits for a condition; a test never sleeps and asserts.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(Instant::now() < end, "did not come true: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A real server, by the project's own script; stopped when dropped.
pub struct Server {
    script: PathBuf,
    pub folder: tempfile::TempDir,
    pub port: u16,
    start: Vec<String>,
}

impl Server {
    pub fn redis(mode: &str) -> Self {
        // Cluster nodes also take their port + 10,000.
        let port = free_ports(3, 12_000..21_900);
        let server = Self::new("redis.sh", port, vec![port.to_string(), mode.into()]);
        server.start();
        server
    }

    /// Not started.
    pub fn cassandra() -> Self {
        let port = free_ports(2, 22_000..31_000);
        Self::new("cassandra.sh", port, vec![port.to_string(), (port + 1).to_string()])
    }

    fn new(script: &str, port: u16, start: Vec<String>) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/servers").join(script);
        Self { script, folder: tempfile::tempdir().unwrap(), port, start }
    }

    pub fn start(&self) {
        self.run("start", &self.start);
    }

    /// A crash: SIGKILL.
    pub fn kill(&self) {
        self.run("kill", &[]);
    }

    /// Stops the processes where they are: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn redis_cli(&self, arguments: &[&str]) -> String {
        let output =
            Command::new("redis-cli").args(["-c", "-p", &self.port.to_string()]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    fn run(&self, verb: &str, arguments: &[String]) {
        let output = Command::new(&self.script).arg(verb).arg(self.folder.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn signal(&self, signal: &str) {
        for pid in pids(self.folder.path()) {
            assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.thaw();
        self.run("kill", &[]);
    }
}

fn pids(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "pid") {
            found.push(std::fs::read_to_string(path).unwrap().trim().to_owned());
        } else if path.is_dir() {
            found.extend(pids(&path));
        }
    }
    found
}

/// So many free ports in a row. Each call looks elsewhere, and each process begins elsewhere.
fn free_ports(count: u16, range: std::ops::Range<u16>) -> u16 {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let slots = u64::from((range.end - range.start) / 10);
    loop {
        let slot = (u64::from(std::process::id()) * 17 + CALLS.fetch_add(1, Ordering::SeqCst)) % slots;
        let first = range.start + slot as u16 * 10;
        if (first..first + count).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return first;
        }
    }
}

/// A TCP link to a server whose every answer can be delayed.
pub struct Link {
    pub address: SocketAddr,
    delay_ms: Arc<AtomicU64>,
}

impl Link {
    pub async fn to(server: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let delay_ms = Arc::new(AtomicU64::new(0));
        let delay = delay_ms.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(upstream) = tokio::net::TcpStream::connect(&server).await else { continue };
                let delay = delay.clone();
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = upstream.into_split();
                    let back = async {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
                            tokio::time::sleep(Duration::from_millis(delay.load(Ordering::Relaxed))).await;
                            if to_client.write_all(&buffer[..count]).await.is_err() {
                                break;
                            }
                        }
                    };
                    let forth = tokio::io::copy(&mut from_client, &mut to_server);
                    tokio::select! { () = back => {}, _ = forth => {} }
                });
            }
        });
        Self { address, delay_ms }
    }

    pub fn delay(&self, delay: Duration) {
        self.delay_ms.store(delay.as_millis() as u64, Ordering::Relaxed);
    }
}
