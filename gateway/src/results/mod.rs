//! The result cache: answers that are given again instead of being made again.
//!
//! The rule: a kept answer is given only to a request that would get the same one (core's key), while it
//! is fresh or may be stale (core's times), if it knows every change of its features that anybody was told
//! is confirmed ([`changes`]), and if no purge covers it ([`purges`]). What fails here is a miss.
//!
//! * [`look`]: one request's way, in order; [`together`]: where it waits, or leads. [`permit`]: what comes of its call.
//! * [`memory`]: this gateway's results. [`flight`]: one call for all who ask the same.
//! * [`region`]: results that gateways share in Redis. [`stored`]: their form there.
//! * [`entry`], [`message`]: an answer as it is kept, and as it is given.
//! * [`models`]: whether the cache pays for a model. [`refresh`]: stale answers replaced in the background.
//! * [`purge_log`]: purges of the whole region, [`view`]: what operators see, [`settings`], [`metrics`].

pub mod changes;
pub mod entry;
pub mod flight;
pub mod look;
pub mod memory;
pub mod message;
pub mod metrics;
pub mod models;
pub mod permit;
pub mod purge_log;
pub mod purges;
pub mod refresh;
pub mod region;
pub mod settings;
pub mod stored;
pub mod together;
pub mod view;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fred::clients::SubscriberClient;
use spillway_core::inference::Limits;
use spillway_core::units::Name;
use spillway_runtime::drain::Drain;
use spillway_runtime::feature_changes::{self, Hearing};
use spillway_runtime::store::{Redis, RedisSettings};
use spillway_runtime::telemetry::Metrics as Registry;
use tokio::sync::Semaphore;

use changes::{Changes, Ears, Hears};
use memory::Memory;
use metrics::Metrics;
use models::Models;
use purges::Purges;
use region::Region;

pub use entry::Kept;
pub use look::{Asked, Look, Said, wish, word};
pub use permit::Fresh;
pub use settings::ResultSettings;

/// Refreshes under way at once.
const REFRESHES: usize = 64;

pub struct Results {
    /// Times are counted from here.
    origin: Instant,
    memory: Arc<Memory>,
    changes: Changes,
    purges: Purges,
    /// Whether the region's purges have been read once.
    purges_known: AtomicBool,
    /// Held by who takes in purges.
    purging: tokio::sync::Mutex<()>,
    region: Option<Arc<Region>>,
    models: Models,
    refreshes: Arc<Semaphore>,
    /// What an answer out of Redis may hold.
    answers: Limits,
    metrics: Arc<Metrics>,
}

/// The Redis that the region's gateways share.
pub struct SharedRedis<'a> {
    pub settings: &'a RedisSettings,
    pub connection: Arc<Redis>,
    pub subscriber: SubscriberClient,
}

impl Results {
    /// Also what is to be followed, where there is a Redis.
    pub fn open(
        settings: &ResultSettings,
        redis: Option<SharedRedis<'_>>,
        region: &Name,
        answers: Limits,
        registry: &Registry,
    ) -> (Arc<Self>, Option<Channels>) {
        let metrics = Arc::new(Metrics::new(registry));
        let hearing = Hearing::default();
        let (mut hears, mut shared, mut channels) = (None, None, None);
        if let Some(SharedRedis { settings, connection, subscriber }) = redis {
            let (asked, changes) = (hearing.clone(), feature_changes::Changes::of(connection.clone(), region));
            hears = Some(Box::new(move |now| asked.hears(now)) as Box<Hears>);
            shared = Some(Region::new(connection, settings, region, metrics.clone()));
            channels = Some(Channels { changes, subscriber, hearing });
        }
        let origin = Instant::now();
        let results = Self {
            origin,
            memory: Arc::new(Memory::new(settings.memory.0, metrics.clone())),
            changes: Changes::new(hears, origin),
            purges: Purges::default(),
            purges_known: AtomicBool::new(false),
            purging: tokio::sync::Mutex::default(),
            region: shared,
            models: Models::new(metrics.clone()),
            refreshes: Arc::new(Semaphore::new(REFRESHES)),
            answers,
            metrics,
        };
        (Arc::new(results), channels)
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn purges_are_known(&self) -> bool {
        self.purges_known.load(Ordering::Relaxed)
    }
}

/// What is told to all gateways of a region.
pub struct Channels {
    changes: Arc<feature_changes::Changes>,
    subscriber: SubscriberClient,
    hearing: Hearing,
}

impl Channels {
    /// Follows feature changes and purges until the drain is over.
    pub async fn follow(self, results: Arc<Results>, registry: Registry, drain: Drain) {
        let Self { changes, subscriber, hearing } = self;
        let counted = feature_changes::Metrics::register(&mut registry.registry());
        let ears = Ears(results.clone());
        let listening = feature_changes::listen(changes, subscriber.clone(), ears, hearing, counted);
        purge_log::follow(results, subscriber, drain).await;
        // No writer has to wait for us.
        listening.end().await;
    }
}

#[cfg(test)]
mod changes_tests;
#[cfg(test)]
mod flight_tests;
#[cfg(test)]
mod region_tests;
#[cfg(test)]
pub(crate) mod tests;
