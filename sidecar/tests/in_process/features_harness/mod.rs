//! What the feature tests share: one region's resources, real servers, a slow link, and waiting.

pub mod redis;
mod servers;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::registry::Registry;
pub use servers::{Link, Server};
use spillway_core::resource::{self, FieldValue};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_sidecar::features::*;

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
        self.look_within(Reach::All, groups, entities, deadline).await
    }

    pub async fn look_within(&self, reach: Reach, groups: &[&str], entities: &[&str], deadline: Duration) -> Lookup {
        let groups: Vec<Name> = groups.iter().map(|group| name(group)).collect();
        let groups: Vec<&Name> = groups.iter().collect();
        let entities: Vec<Bytes> = entities.iter().map(|entity| Bytes::copy_from_slice(entity.as_bytes())).collect();
        let deadline = Instant::now() + deadline;
        self.features.read_within(reach, &self.snapshot, "acme", &groups, &entities, deadline).await.unwrap()
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
        self.value(&format!("sidecar_feature_{line}"))
    }

    /// The same of any metric of ours.
    pub fn value(&self, line: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = format!("spillway_{line} ");
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

/// Both sidecars write events of a few entities in any order while both read them; then every tier must hold
/// the last one of each. `forget` empties L2.
pub async fn the_last_event_is_left_in_every_tier(sidecars: &[Sidecar; 2], mut forget: impl AsyncFnMut()) {
    const ENTITIES: usize = 4;
    const ROUNDS: i64 = 60;
    let start = now_us() - 30_000_000;
    let entities: Vec<String> = (0..ENTITIES).map(|_| unique("contended")).collect();
    let write = async |sidecar: &Sidecar, own: i64| {
        for round in 0..ROUNDS {
            // 37 is prime to 60: each time once, in an order of its own for each writer.
            let at = (round * 37 + own * 11) % ROUNDS * 2 + own;
            for entity in &entities {
                sidecar.put(entity, at, start + at).await.unwrap();
            }
        }
    };
    let done = AtomicBool::new(false);
    let read = async |sidecar: &Sidecar| {
        let names: Vec<&str> = entities.iter().map(String::as_str).collect();
        while !done.load(Ordering::Relaxed) {
            assert_eq!(sidecar.look(&["site"], &names, DEADLINE).await.unavailable(), 0);
            tokio::task::yield_now().await;
        }
    };
    let writes = async {
        tokio::join!(write(&sidecars[0], 0), write(&sidecars[1], 1));
        done.store(true, Ordering::Relaxed);
    };
    tokio::join!(writes, read(&sidecars[0]), read(&sidecars[1]));
    let last = Some(ROUNDS * 2 - 1);
    for entity in &entities {
        for sidecar in sidecars {
            let right = async || sidecar.hits(&sidecar.site(entity).await) == last;
            eventually("the last event is in memory", right).await;
            let found = sidecar.site(entity).await;
            assert_eq!(sidecar.hits(&found), last);
        }
    }
    // L3 alone, and what it fills L2 with.
    forget().await;
    for sidecar in sidecars {
        eventually("the loss of the numbers is noticed", async || {
            sidecar.site(&entities[0]).await;
            sidecar.features.hears()
        })
        .await;
        for entity in &entities {
            assert_eq!(sidecar.hits(&sidecar.site(entity).await), last);
        }
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
