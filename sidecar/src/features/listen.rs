//! Hears which rows other processes have overwritten, and drops them from L1.
//!
//! ```text
//! deaf --subscribed and counter read--> hearing --connection lost, or counter not read--> deaf
//! ```
//! Deaf, L1 believes a row for moments only. Becoming deaf, and every gap in the numbers, flushes it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::clients::SubscriberClient;
use fred::interfaces::{ClientLike, EventInterface, PubsubInterface};
use fred::types::Message;
use spillway_core::feature::{Channel, Heard, RowKey};
use spillway_runtime::store::redis::keep_connected;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;

use super::flight::Flights;
use super::memory::Memory;
use super::metrics::Metrics;
use super::redis::Redis;

/// How often the counter is compared with what was heard.
const POLL: Duration = Duration::from_secs(1);

/// The ears of one process: what they hear goes to L1.
pub(super) struct Listener<T> {
    pub memory: Arc<Memory>,
    pub flights: Flights<T>,
    pub metrics: Arc<Metrics>,
    channel: Channel,
}

impl<T> Listener<T> {
    pub fn new(memory: Arc<Memory>, flights: Flights<T>, metrics: Arc<Metrics>) -> Self {
        Self { memory, flights, metrics, channel: Channel::default() }
    }

    /// A numbered message that names the rows, one a line.
    pub fn message(&mut self, number: u64, names: &str) {
        match self.channel.message(number) {
            Heard::Next => {
                for name in names.lines() {
                    match RowKey::parse(name) {
                        Some(key) => {
                            self.memory.invalidate(&key);
                            self.flights.forget(&key);
                            self.metrics.heard.inc();
                        }
                        None => self.gap(),
                    }
                }
            }
            Heard::Gap => self.gap(),
            Heard::Nothing => {}
        }
    }

    pub fn counter(&mut self, number: u64) {
        if self.channel.counter(number) == Heard::Gap {
            self.gap();
        }
    }

    pub fn hears(&mut self) {
        if !self.memory.set_heard(true) {
            tracing::info!("features: invalidations are heard");
        }
    }

    /// Something may be missed from now on.
    pub fn lost(&mut self) {
        self.channel.lost();
        if self.memory.set_heard(false) {
            tracing::warn!("features: invalidations are not heard; rows are kept for moments only");
            self.metrics.lost.inc();
            self.memory.flush();
        }
    }

    fn gap(&self) {
        self.metrics.gaps.inc();
        self.memory.flush();
    }
}

/// Listens to Redis until the handle is dropped.
pub(super) fn to_redis<T: Send + Sync + 'static>(
    redis: Arc<Redis>,
    subscriber: SubscriberClient,
    listener: Listener<T>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(listen(redis, subscriber, listener)))
}

async fn listen<T: Send + Sync>(redis: Arc<Redis>, subscriber: SubscriberClient, mut listener: Listener<T>) {
    let mut messages = subscriber.message_rx();
    let mut reconnects = subscriber.reconnect_rx();
    let _connected = keep_connected(subscriber.clone());
    let mut polls = tokio::time::interval(POLL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let channel = redis.channel();
    let mut subscribed = false;
    loop {
        tokio::select! {
            message = messages.recv() => match message {
                Ok(message) if *message.channel == *channel => match parse(&message) {
                    Some((number, names)) => listener.message(number, names.as_str()),
                    None => listener.lost(),
                },
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => listener.gap_from_lag(),
                Err(RecvError::Closed) => return listener.lost(),
            },
            _ = reconnects.recv() => {
                subscribed = false;
                listener.lost();
                polls.reset_immediately();
            }
            _ = polls.tick() => {
                let deadline = Instant::now() + POLL;
                if !subscribed && subscriber.is_connected() {
                    let subscribe = subscriber.subscribe(channel.as_str());
                    subscribed = matches!(tokio::time::timeout_at(deadline.into(), subscribe).await, Ok(Ok(())));
                }
                match redis.counter(deadline).await {
                    Ok(number) if subscribed && subscriber.is_connected() => {
                        listener.counter(number);
                        listener.hears();
                    }
                    Ok(_) | Err(_) => listener.lost(),
                }
            }
        }
    }
}

impl<T> Listener<T> {
    /// Messages came faster than they were taken.
    fn gap_from_lag(&mut self) {
        self.channel.lost();
        self.gap();
    }
}

/// `<number> <name>[\n<name>…]`
fn parse(message: &Message) -> Option<(u64, String)> {
    let text = message.value.as_string()?;
    let (number, names) = text.split_once(' ')?;
    Some((number.parse().ok()?, names.to_owned()))
}
