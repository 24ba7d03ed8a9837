//! Features of entities, out of the nearest tier that has them: L1 in process, L2 Redis, L3 Cassandra,
//! ScyllaDB or SQLite.
//!
//! The rules: one round per tier for all rows of a call, within its slice of the deadline. A tier that
//! fails is skipped and said to have failed; an error is never taken for an absence and never kept. A
//! value past its freshness is replaced if any tier has a newer one, else served and said to be stale.
//! The last event wins in every tier, and a write reaches L3, then L2, then every L1 that may hold it; it is
//! confirmed when they have said so.
//!
//! In reading order: [`settings`], [`lookup`], `read` (one look-up), `round` (one round through L2 and L3),
//! `flight` (shared reads), `write`, `repair` (what Redis missed), `memory` (L1), `redis` (L2), `listen`
//! (invalidation), `store` (L3's trait), `cassandra`, `sqlite`.

mod cassandra;
mod flight;
mod groups;
mod listen;
pub mod lookup;
mod memory;
mod metrics;
mod read;
mod redis;
mod repair;
mod round;
pub mod settings;
mod sqlite;
mod store;
mod write;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join;
use prometheus_client::registry::Registry;
use spillway_core::feature::Layout;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::feature_changes::{self, Confirmations, Hearing, Listening};
use tokio::sync::Semaphore;
use tokio::time::timeout_at;
use tokio_util::task::AbortOnDropHandle;

pub use lookup::{FailedTiers, FeatureError, Found, Lookup, Present, Reach, Tier};
pub use settings::{
    CassandraSettings, FeatureSettings, InvalidSettings, MemorySettings, SqliteSettings, StoreSettings,
};
pub use spillway_runtime::store::{RedisSettings, TlsSettings};
pub use write::{Event, RejectedEvent, WriteError, Written};

use cassandra::Cassandra;
use flight::Flights;
use groups::Groups;
use listen::{FileListener, Listener};
use memory::Memory;
use metrics::Metrics;
use redis::Redis;
use repair::Repairs;
use round::Resolved;
use sqlite::Sqlite;
use store::Store;

/// Fills of L2 under way at once; more are left out.
const FILLS: usize = 64;

/// All tiers of one process.
pub struct Features {
    memory: Arc<Memory>,
    redis: Option<Arc<Redis>>,
    changes: Option<Changes>,
    store: Arc<dyn Store>,
    groups: Groups,
    flights: Flights<Resolved>,
    fills: Arc<Semaphore>,
    repairs: Arc<Repairs>,
    metrics: Arc<Metrics>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// Both ends of the region's changes.
struct Changes {
    listening: Listening,
    confirmations: Confirmations,
}

impl Features {
    /// Checks the settings and starts; a Redis or Cassandra that is away is waited for in the background.
    /// To be called at start, within a tokio runtime: a SQLite file is opened at once. Dropping the value
    /// ends all its tasks.
    pub fn open(
        settings: &FeatureSettings,
        region: &Name,
        registry: &mut Registry,
    ) -> Result<Arc<Self>, InvalidSettings> {
        let metrics = Arc::new(Metrics::register(registry));
        let hearing = settings.redis.as_ref().map(|_| Hearing::default());
        let memory = Arc::new(Memory::new(settings.memory, hearing.clone()));
        let flights = Flights::default();
        let repairs = Arc::new(Repairs::default());
        let listener = || Listener { memory: memory.clone(), flights: flights.clone(), metrics: metrics.clone() };
        let mut tasks = Vec::new();
        let (mut redis, mut changes) = (None, None);
        if let (Some(settings), Some(hearing)) = (&settings.redis, hearing) {
            let (opened, subscriber) = Redis::open(settings, region)?;
            let (told, counted) = (opened.changes(), feature_changes::Metrics::register(registry));
            changes = Some(Changes {
                listening: feature_changes::listen(told.clone(), subscriber, listener(), hearing, counted.clone()),
                confirmations: Confirmations::start(told.clone(), counted),
            });
            let repair = repair::repair(opened.clone(), repairs.clone(), metrics.clone());
            tasks.push(AbortOnDropHandle::new(tokio::spawn(repair)));
            redis = Some(opened);
        }
        let store: Arc<dyn Store> = match &settings.store {
            StoreSettings::Cassandra(settings) => Arc::new(Cassandra::open(settings)?),
            StoreSettings::Sqlite(settings) => {
                let sqlite = Sqlite::open(settings)?;
                tasks.push(sqlite.listen(FileListener::new(listener(), redis.is_none()))?);
                Arc::new(sqlite)
            }
        };
        Ok(Arc::new(Self {
            memory,
            redis,
            changes,
            store,
            groups: Groups::default(),
            flights,
            fills: Arc::new(Semaphore::new(FILLS)),
            repairs,
            metrics,
            _tasks: tasks,
        }))
    }

    /// Waits until each store was tried once, for at most `patience`. One that is not there then is waited
    /// for in the background, and its rows come from another tier or are unavailable.
    pub async fn first_attempt(&self, patience: Duration) {
        let end = tokio::time::Instant::now() + patience;
        let redis = async {
            if let Some(redis) = &self.redis
                && (timeout_at(end, redis.attempted()).await.is_err() || !redis.is_connected())
            {
                tracing::warn!(tier = Tier::L2.name(), "features: starting without a tier that does not answer");
            }
        };
        let store = async {
            if timeout_at(end, self.store.attempted()).await.is_err() || !self.store.is_reached() {
                tracing::warn!(tier = Tier::L3.name(), "features: starting without a tier that does not answer");
            }
        };
        join(redis, store).await;
    }

    /// To be called when no look-up is wanted any more: no writer waits for this process from then on.
    pub async fn end(&self) {
        if let Some(changes) = &self.changes {
            changes.listening.end().await;
        }
    }

    /// Where the fields of a group lie, for [`spillway_core::feature::Gather::of`].
    pub fn layout(&self, snapshot: &Snapshot, group: &Name) -> Option<Arc<Layout>> {
        self.groups.get(snapshot, group).map(|group| group.layout.clone())
    }

    /// Whether changes by other processes are heard; if not, L1 is not believed, or for moments only.
    pub fn hears(&self) -> bool {
        self.memory.hears()
    }

    /// Bytes that L1 holds.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.weight()
    }
}

impl std::fmt::Debug for Features {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Features").field("redis", &self.redis.is_some()).finish_non_exhaustive()
    }
}

/// Unix microseconds.
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
