//! Quotas that the gateways of a region share: asks Redis for this gateway's slices, once a term.
//!
//! The rule: no request waits for Redis. All quotas that requests were asked about lately go in one round
//! trip; one that is new goes at once. Without an answer each slice stays as core says
//! ([`spillway_core::limit::quota`], which also bounds what the region admits).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fred::clients::Pipeline;
use fred::error::Error;
use fred::interfaces::LuaInterface;
use parking_lot::Mutex;
use spillway_core::limit::lease::{Ask, Grant, SCRIPT};
use spillway_core::limit::{Standing, gcra, quota};
use spillway_core::units::Name;
use spillway_runtime::drain::Drain;
use spillway_runtime::store::{Redis, RedisFailed};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval};

use super::lease::Report;
use super::limits::TenantLimits;
use super::metrics::QuotaMetrics;
use crate::clock::Clock;

/// Quotas in use at a time; others get the share of a gateway that is told nothing.
const MOST: usize = 4_096;
/// Questions in one round trip.
const TOGETHER: usize = 512;

/// What a gateway is told about quotas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaSettings {
    /// `term`: the time between two askings, 10ms to 20s; default 500ms.
    pub term: Duration,
    /// `gateways`: how many the region has, for those that never reached Redis; default 1.
    pub gateways: u32,
}

impl Default for QuotaSettings {
    fn default() -> Self {
        Self { term: Duration::from_millis(500), gateways: 1 }
    }
}

pub struct Quotas {
    pub settings: QuotaSettings,
    redis: Option<Redis>,
    /// Who asks: its name among the region's gateways.
    gateway: Name,
    /// Before every key.
    prefix: String,
    /// Begun since the last look.
    fresh: Mutex<Vec<InUse>>,
    begun: Notify,
    count: AtomicUsize,
    metrics: QuotaMetrics,
}

/// A quota that is in use here.
struct InUse {
    limits: Arc<TenantLimits>,
    name: QuotaName,
    key: String,
}

/// Which of a tenant's quotas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaName {
    pub limit: Name,
    /// The model, if each has its own.
    pub model: Option<Box<str>>,
}

impl Quotas {
    pub fn new(
        settings: QuotaSettings,
        redis: Option<Redis>,
        region: &Name,
        gateway: Name,
        metrics: QuotaMetrics,
    ) -> Self {
        Self {
            settings,
            redis,
            gateway,
            prefix: format!("spillway:{region}:quota:"),
            fresh: Mutex::default(),
            begun: Notify::new(),
            count: AtomicUsize::new(0),
            metrics,
        }
    }

    /// Whether there is a Redis to ask.
    pub fn are_shared(&self) -> bool {
        self.redis.is_some()
    }

    /// Takes in a quota that was not in use.
    pub fn begin(&self, tenant: &Name, limits: &Arc<TenantLimits>, name: QuotaName, now: Duration) {
        let below = |count: usize| (count < MOST).then_some(count + 1);
        if self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below).is_err() {
            self.metrics.beyond.inc();
            limits.answer(&name, now, now, None);
            return;
        }
        // None of these names can hold a colon.
        let QuotaName { limit, model } = &name;
        let model = model.as_deref().map_or(String::new(), |model| format!(":{model}"));
        let key = format!("{}{tenant}:{limit}{model}", self.prefix);
        self.fresh.lock().push(InUse { limits: limits.clone(), name, key });
        self.begun.notify_one();
    }

    /// Asks until the drain is over.
    pub async fn run(&self, clock: Clock, drain: &Drain) {
        let Some(redis) = &self.redis else { return };
        let mut terms = interval(self.settings.term);
        terms.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut used: Vec<InUse> = Vec::new();
        loop {
            tokio::select! {
                _ = terms.tick() => {
                    let reports = self.round(redis, &mut used, clock).await;
                    self.metrics.set(&reports);
                }
                () = self.begun.notified() => {
                    let mut fresh = std::mem::take(&mut *self.fresh.lock());
                    self.round(redis, &mut fresh, clock).await;
                    used.append(&mut fresh);
                }
                () = drain.stopped() => return,
            }
        }
    }

    /// Asks for all of these, and forgets those that nobody uses.
    async fn round(&self, redis: &Redis, used: &mut Vec<InUse>, clock: Clock) -> Vec<Report> {
        let (sent, deadline) = (clock.now(), Instant::now() + self.settings.term);
        let mut asks = Vec::with_capacity(used.len());
        used.retain(|quota| {
            let ask = quota.limits.ask(&quota.name, sent);
            asks.extend(ask);
            ask.is_some()
        });
        self.count.fetch_sub(self.count.load(Ordering::Relaxed).min(0), Ordering::Relaxed);
        let mut reports = Vec::with_capacity(used.len());
        for (used, asks) in used.chunks(TOGETHER).zip(asks.chunks(TOGETHER)) {
            let questions: Vec<_> =
                used.iter().zip(asks).map(|(quota, ask)| (quota.key.as_str(), ask)).collect();
            let answers = self.lease(redis, &questions, deadline).await;
            let now = clock.now();
            for (quota, answer) in used.iter().zip(answers) {
                if answer.is_none() {
                    self.metrics.failures.inc();
                }
                reports.extend(quota.limits.answer(&quota.name, sent, now, answer));
            }
        }
        reports
    }
}
