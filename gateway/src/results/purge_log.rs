//! Purges of the whole region: a list in Redis, and a channel that says to look at it.
//!
//! The rule: the list is the truth, the message only makes it quick. A gateway that misses a message
//! reads the list within [`POLL`]; one that starts reads it before it takes results from Redis; one that
//! finds purges missing from it gives up every result.
//!
//! `spillway:<region>:purges` holds the last [`KEPT`] purges, the newest first: `<number> model <name>`,
//! `<number> tenant <name>` or `<number> entity <hash>`. The channel `spillway:<region>:purge` carries the same
//! lines. Results in Redis are not searched for: they carry their mark, and go with their time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fred::clients::SubscriberClient;
use fred::interfaces::{ClientLike, EventInterface, ListInterface, LuaInterface, PubsubInterface};
use futures_util::future::BoxFuture;
use http::StatusCode;
use spillway_core::cache::store::Removed;
use spillway_core::routing::key_hash;
use spillway_core::units::Name;
use spillway_runtime::admin::{Action, Asked};
use spillway_runtime::drain::Drain;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::MissedTickBehavior;

use super::Results;
use super::purges::{KEPT, Purge};
use super::region::Region;
use crate::request::query::decoded;

const POLL: Duration = Duration::from_secs(1);
/// One operator's command, or one look at the list.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longer than any result is kept.
const LIST_LIFE: Duration = Duration::from_secs(3 * 86_400);
const PURGE: &str = include_str!("purge.lua");

/// What became of a purge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Purged {
    /// Results that this gateway had.
    pub entries: u64,
    pub bytes: u64,
    /// Whether the region's other gateways hear of it; `None`: there is no Redis, so no sharing.
    pub region: Option<bool>,
}

impl Purge {
    pub fn entity(id: &[u8]) -> Self {
        Self::Entity(key_hash(id))
    }
}

impl Results {
    /// Sends results away: here at once, in the region's other gateways within moments.
    pub async fn purge(&self, purge: Purge) -> Purged {
        let _turn = self.purging.lock().await;
        let mut told = None;
        let mut heard = None;
        if let Some(region) = &self.region {
            let announced = region.announce(&purge).await;
            told = Some(announced);
            // Others' purges may have come before it: they are heard with it, in their order.
            heard = if announced { self.read_purges(region, true).await } else { None };
        }
        let removed = heard.unwrap_or_else(|| {
            self.purges.add(purge.clone());
            self.metrics.purges.inc();
            self.sweep()
        });
        tracing::info!(%purge, region = ?told, "results purged");
        Purged { entries: removed.entries, bytes: removed.bytes, region: told }
    }

    /// Removes what purges cover.
    fn sweep(&self) -> Removed {
        let removed = self.memory.retain(|entry| !self.purges.cover(&entry.about, entry.mark));
        self.metrics.invalidated("purge", removed);
        removed
    }

    /// Takes in the region's list, and removes what it covers. `None`: it could not be read. One at a time: numbers
    /// are heard as they rise.
    async fn read_purges(&self, region: &Region, all: bool) -> Option<Removed> {
        let lines = region.purges(all).await?;
        let parse = |line: &str| -> Option<(u64, Option<Purge>)> {
            let (number, purge) = line.split_once(' ')?;
            Some((number.parse().ok()?, Purge::parse(purge)))
        };
        let listed: Vec<_> = lines.iter().filter_map(|line| parse(line)).collect();
        let (known, newest) = (self.purges.mark(), listed.first().map_or(0, |(number, _)| *number));
        if newest <= known {
            return Some(Removed::default());
        }
        if !all {
            return Box::pin(self.read_purges(region, true)).await;
        }
        let mut heard = 0;
        for (number, purge) in listed.iter().rev() {
            match purge {
                Some(purge) => heard += u64::from(self.purges.hear(*number, purge.clone())),
                // A newer gateway's word.
                None => self.purges.forget(*number),
            }
        }
        // The list has an end, and what this gateway knows is beyond it.
        if listed.len() >= KEPT && known > 0 && listed.last().is_some_and(|(oldest, _)| *oldest > known) {
            self.purges.forget(newest);
        }
        self.metrics.purges.inc_by(heard);
        Some(self.sweep())
    }
}

impl Region {
    /// Adds a purge to the list, and tells the others. False: Redis cannot be told now.
    async fn announce(&self, purge: &Purge) -> bool {
        if !self.is_connected() {
            return false;
        }
        let arguments = vec![purge.to_string(), self.channel(), KEPT.to_string(), LIST_LIFE.as_millis().to_string()];
        let client = self.connection.client();
        let script = client.eval::<(), _, _, _>(PURGE, vec![self.list()], arguments);
        self.connection.in_time("purge results", script, Instant::now() + PATIENCE).await.is_ok()
    }

    /// The list, or its newest line.
    async fn purges(&self, all: bool) -> Option<Vec<String>> {
        if !self.is_connected() {
            return None;
        }
        let client = self.connection.client();
        let last = if all { KEPT as i64 - 1 } else { 0 };
        let lines = client.lrange::<Vec<String>, _>(self.list(), 0, last);
        self.connection.in_time("read purges", lines, Instant::now() + PATIENCE).await.ok()
    }

    fn list(&self) -> String {
        format!("{}purges", self.prefix)
    }

    fn channel(&self) -> String {
        format!("{}purge", self.prefix)
    }
}

/// Follows the region's purges until the drain is over. The subscriber is kept connected by who listens to
/// feature changes with it.
pub async fn follow(results: Arc<Results>, subscriber: SubscriberClient, drain: Drain) {
    let Some(region) = results.region.clone() else { return };
    let mut messages = subscriber.message_rx();
    let mut reconnects = subscriber.reconnect_rx();
    let mut polls = tokio::time::interval(POLL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    region.connection.attempted().await;
    let (channel, mut subscribed) = (region.channel(), false);
    loop {
        tokio::select! {
            () = drain.stopped() => return,
            message = messages.recv() => match message {
                Ok(message) if *message.channel == *channel => {}
                Ok(_) | Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            },
            _ = reconnects.recv() => {
                subscribed = false;
                continue;
            }
            _ = polls.tick() => {
                if !subscribed && subscriber.is_connected() {
                    let subscribe = tokio::time::timeout(PATIENCE, subscriber.subscribe(channel.as_str()));
                    subscribed = matches!(subscribe.await, Ok(Ok(())));
                }
            }
        }
        let _turn = results.purging.lock().await;
        let all = !results.purges_known.load(Ordering::Relaxed);
        if results.read_purges(&region, all).await.is_some() && all {
            results.purges_known.store(true, Ordering::Relaxed);
        }
    }
}

/// `POST /cache/purge` of the admin port.
pub fn action(results: Arc<Results>) -> Action {
    let run = move |asked: Asked| -> BoxFuture<'static, (StatusCode, serde_json::Value)> {
        let results = results.clone();
        Box::pin(async move {
            match parse_query(&asked.query) {
                Ok(purge) => {
                    let purged = results.purge(purge).await;
                    (StatusCode::OK, serde_json::to_value(purged).unwrap_or_default())
                }
                Err(problem) => (StatusCode::BAD_REQUEST, serde_json::json!({ "error": problem })),
            }
        })
    };
    Action { path: "/cache/purge", word: "purge", most_body: 0, run: Arc::new(run) }
}

/// Reads what an operator asks to purge: `model=NAME`, `tenant=NAME` or `entity=ID`, one of them, in the form
/// of a URL's query.
pub fn parse_query(query: &str) -> Result<Purge, &'static str> {
    const EXPECTED: &str = "expected one of ?model=NAME, ?tenant=NAME, ?entity=ID";
    let (what, value) = query.split_once('=').ok_or(EXPECTED)?;
    let value = decoded(value).ok_or("the value is not well encoded")?;
    let name = || std::str::from_utf8(&value).ok().and_then(|text| Name::parse(text).ok()).ok_or("that is no name");
    match what {
        "model" => Ok(Purge::Model(name()?)),
        "tenant" => Ok(Purge::Tenant(name()?)),
        "entity" if (1..=spillway_core::feature::key::MAX_ENTITY).contains(&value.len()) => Ok(Purge::entity(&value)),
        "entity" => Err("an entity's id has 1 to 256 bytes"),
        _ => Err(EXPECTED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_is_purged_at_a_time() {
        let name = |text| Name::parse(text).unwrap();
        assert_eq!(parse_query("model=eta"), Ok(Purge::Model(name("eta"))));
        assert_eq!(parse_query("tenant=acme"), Ok(Purge::Tenant(name("acme"))));
        assert_eq!(parse_query("entity=a%2fb%00"), Ok(Purge::entity(b"a/b\0")));
        for query in [
            "",
            "model",
            "model=",
            "model=a b",
            "models=a",
            "entity=",
            "entity=%",
            "entity=%zz",
            "model=a&tenant=b",
            "a=b=c",
        ] {
            assert!(parse_query(query).is_err(), "{query}");
        }
        assert!(parse_query(&format!("entity={}", "x".repeat(257))).is_err());
    }
}
