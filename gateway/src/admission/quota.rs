//! Quotas that the gateways of a region share: asks Redis for this gateway's slices, once a term.
//!
//! The rule: no request waits for Redis. All quotas in use go in one round trip a term ([`TOGETHER`] in each, where
//! there are more); one that is new goes at once. Without an answer each slice stays as core says
//! ([`spillway_core::limit::quota`], which also bounds what the region admits).
//!
//! ```text
//! first request --list--> asked for each term --60 s unused, or its limit or tenant gone--> forgotten
//!               --no room--> share of a gateway that is told nothing; each request tries again
//! ```
//!
//! Keys: `spillway:<region>:quota:<tenant>:<limit>`, and `:<model>` where each model has its own. All
//! askings take the same connection: Redis must not hear an old one after a newer one.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use fred::clients::{Client, Pipeline, WithOptions};
use fred::error::{Error, ErrorKind};
use fred::interfaces::ClientLike;
use fred::types::CustomCommand;
use futures_util::future::join_all;
use parking_lot::Mutex;
use spillway_core::limit::lease::{Ask, Grant, SCRIPT};
use spillway_core::units::Name;
use spillway_runtime::drain::Drain;
use spillway_runtime::store::Redis;
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::lease::Report;
use super::limits::TenantLimits;
use super::metrics::{NoGrant, QuotaMetrics};
use crate::clock::Clock;
use crate::settings::QuotaSettings;

/// Quotas in use at a time. An asking takes Redis some 25 us, so with a term of 500 ms these take 5 % of its time for
/// each gateway.
const MOST: usize = 1_024;
/// Askings of one round trip.
const TOGETHER: usize = 512;
/// How long Redis may take, if a term is not shorter.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long Redis may take to be reached, at the start.
const CONNECT: Duration = Duration::from_secs(3);
/// By which Redis knows [`SCRIPT`]: what `sha1sum core/src/limit/quota.lua` says.
const SHA1: &str = "53b15838fba8421b8ba786c757bcf35d3762c355";
const DOING: &str = "lease a quota";

pub struct Quotas {
    pub settings: QuotaSettings,
    clock: Clock,
    redis: Option<Arc<Redis>>,
    /// Who asks: its name among the region's gateways.
    gateway: Name,
    /// Before every key.
    prefix: String,
    listed: Mutex<Listed>,
    /// Some are fresh.
    begun: Notify,
    metrics: QuotaMetrics,
}

#[derive(Default)]
struct Listed {
    /// Not asked for yet.
    fresh: Vec<InUse>,
    /// These, and those that are.
    count: usize,
    last: u64,
}

/// A quota that is in use here.
struct InUse {
    limits: Weak<TenantLimits>,
    name: QuotaName,
    /// A bucket that was replaced is listed anew.
    listing: u64,
    key: String,
}

/// Which of a tenant's quotas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaName {
    pub limit: Name,
    /// The model, if each has its own.
    pub model: Option<Box<str>>,
}

/// What is asked for a quota that still is in use.
struct Asking {
    limits: Arc<TenantLimits>,
    ask: Ask,
}

impl Quotas {
    pub fn new(
        settings: QuotaSettings,
        clock: Clock,
        redis: Option<Arc<Redis>>,
        region: &Name,
        gateway: Name,
        metrics: QuotaMetrics,
    ) -> Self {
        Self {
            settings,
            clock,
            redis,
            gateway,
            prefix: format!("spillway:{region}:quota:"),
            listed: Mutex::default(),
            begun: Notify::new(),
            metrics,
        }
    }

    /// Whether there is a Redis to ask.
    pub fn are_shared(&self) -> bool {
        self.redis.is_some()
    }

    /// Takes in a quota that comes into use, and says under which number; `None`: there is no room. Who calls
    /// holds the tenant's mutex, which is why nothing here may take it.
    pub fn list(&self, limits: &Arc<TenantLimits>, name: QuotaName) -> Option<u64> {
        let listed = &mut *self.listed.lock();
        if listed.count >= MOST {
            self.metrics.beyond.inc();
            return None;
        }
        listed.count += 1;
        listed.last += 1;
        let listing = listed.last;
        // None of these names can hold a colon.
        let QuotaName { limit, model } = &name;
        let model = model.as_deref().map_or(String::new(), |model| format!(":{model}"));
        let key = format!("{}{}:{limit}{model}", self.prefix, limits.tenant);
        listed.fresh.push(InUse { limits: Arc::downgrade(limits), name, listing, key });
        self.begun.notify_one();
        Some(listing)
    }

    /// Asks until the drain is over.
    pub async fn run(&self, drain: &Drain) {
        if let Some(redis) = &self.redis {
            // Who starts is not to take it for gone before it was there: until then slices are a newcomer's.
            let _ = timeout(CONNECT, redis.attempted()).await;
        }
        let mut terms = interval(self.settings.term);
        terms.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut used: Vec<InUse> = Vec::new();
        loop {
            tokio::select! {
                _ = terms.tick() => {
                    let reports = self.round(&mut used).await;
                    self.metrics.set(&reports);
                }
                () = self.begun.notified() => {
                    let mut fresh = std::mem::take(&mut self.listed.lock().fresh);
                    self.round(&mut fresh).await;
                    used.append(&mut fresh);
                }
                () = drain.stopped() => return,
            }
        }
    }

    /// Asks for all of these, and forgets those that are not in use any more.
    async fn round(&self, used: &mut Vec<InUse>) -> Vec<Report> {
        let (sent, deadline) = (self.clock.now(), Instant::now() + self.settings.term.min(PATIENCE));
        let (before, mut askings) = (used.len(), Vec::with_capacity(used.len()));
        used.retain(|quota| {
            let asking = quota.limits.upgrade().and_then(|limits| {
                let ask = limits.ask(&quota.name, quota.listing, sent)?;
                Some(Asking { limits, ask })
            });
            let is_in_use = asking.is_some();
            askings.extend(asking);
            is_in_use
        });
        self.listed.lock().count -= before - used.len();
        let parts = used.chunks(TOGETHER).zip(askings.chunks(TOGETHER));
        let answers = join_all(parts.map(|(used, askings)| self.lease(used, askings, deadline))).await;
        let now = self.clock.now();
        let answered = used.iter().zip(&askings).zip(answers.into_iter().flatten());
        answered
            .filter_map(|((quota, Asking { limits, .. }), grant)| {
                limits.answer(&quota.name, quota.listing, sent, now, grant)
            })
            .collect()
    }

    /// One round trip; a second one where Redis does not know the script. An answer for each, or none.
    async fn lease(&self, used: &[InUse], askings: &[Asking], deadline: Instant) -> Vec<Option<Grant>> {
        let failed = |why| {
            self.metrics.failed(why, used.len());
            vec![None; used.len()]
        };
        let Some(redis) = &self.redis else { return vec![None; used.len()] };
        let client = redis.orderly();
        if !client.is_connected() {
            return failed(NoGrant::Away);
        }
        let call = async {
            let mut answers = self.send(&client, "EVALSHA", SHA1, used.iter().zip(askings)).await?;
            let unknown = |answer: &Answer| matches!(answer, Err(error) if error.details().starts_with("NOSCRIPT"));
            let again: Vec<usize> = (0..answers.len()).filter(|index| unknown(&answers[*index])).collect();
            if !again.is_empty() {
                let again_asked = again.iter().map(|index| (&used[*index], &askings[*index]));
                let told = self.send(&client, "EVAL", SCRIPT, again_asked).await?;
                again.into_iter().zip(told).for_each(|(index, answer)| answers[index] = answer);
            }
            Ok(answers)
        };
        let Ok(answers) = redis.in_time(DOING, call, deadline).await else {
            return failed(if Instant::now() < deadline { NoGrant::Error } else { NoGrant::Timeout });
        };
        let grant = |answer: Answer| match answer {
            Ok((rate, gateways)) => Some(Grant { rate, gateways }),
            Err(error) => {
                redis.failed(DOING, &error);
                self.metrics.failed(NoGrant::Error, 1);
                None
            }
        };
        answers.into_iter().map(grant).collect()
    }

    /// Sends one command for each, and takes as many answers.
    async fn send(
        &self,
        client: &WithOptions<Client>,
        command: &'static str,
        script: &'static str,
        asked: impl Iterator<Item = (&InUse, &Asking)>,
    ) -> Result<Vec<Answer>, Error> {
        let pipeline = Pipeline::from(client.clone());
        let mut count = 0;
        for (quota, Asking { ask, .. }) in asked {
            let head = [script.to_owned(), "1".to_owned(), quota.key.clone()];
            let arguments = head.into_iter().chain(ask.arguments(self.gateway.as_str())).collect();
            let command = CustomCommand::new_static(command, quota.key.as_str(), false);
            let () = pipeline.custom::<(), String>(command, arguments).await?;
            count += 1;
        }
        let answers = pipeline.try_all::<(u64, u64)>().await;
        // One error for all: nothing was sent, or the connection ended.
        match answers.len() {
            answered if answered == count => Ok(answers),
            _ => Err(answers
                .into_iter()
                .find_map(Result::err)
                .unwrap_or_else(|| Error::new(ErrorKind::Protocol, "not as many answers as askings"))),
        }
    }
}

/// The rate and the number of gateways.
type Answer = Result<(u64, u64), Error>;

#[cfg(test)]
#[path = "quota_tests.rs"]
mod tests;
