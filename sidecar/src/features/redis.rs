//! L2: Redis, alone or as a cluster.
//!
//! The rule: what Redis says is checked like any stranger's word, it is never waited for longer than its
//! slice of the deadline, and it never loses a later event to an earlier one (the writes compare event
//! times in Lua). One `MGET` for all rows of a call; in a cluster one for each entity, all at once.
//!
//! Alone, a row and the word about it are one script. In a cluster they lie in different slots and are
//! two: a writer that dies between them leaves other processes' L1 with the old row until `memory.keep`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fred::clients::SubscriberClient;
use fred::interfaces::{KeysInterface, LuaInterface};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use spillway_core::feature::RowKey;
use spillway_core::units::Name;
use spillway_runtime::feature_changes::Changes;
use spillway_runtime::store::{self, InvalidStore, RedisFailed, RedisSettings};
use tokio::sync::Semaphore;
use tokio::time::timeout_at;

use super::store::Answer;

/// A longer value is none of ours: 256 fields of 8 bytes need less than 3 KiB.
const MAX_VALUE: usize = 64 << 10;

/// What `put_row.lua` leaves where it must take nothing for a while; no row begins with it.
const FENCED: &[u8] = b"\xF2";

/// Longer than whoever read the store takes to fill Redis.
const FENCE: Duration = Duration::from_secs(5);

/// Names in one message of a cluster's channel.
const NAMES: usize = 200;

const PUT_ROW: &str = concat!(include_str!("number.lua"), include_str!("put_row.lua"));
const ANNOUNCE: &str = concat!(include_str!("number.lua"), include_str!("announce.lua"));

pub(super) struct Redis {
    connection: Arc<store::Redis>,
    changes: Arc<Changes>,
    settings: RedisSettings,
    /// `spillway:<region>:`, before every key: regions may share a server.
    prefix: String,
    rounds: Semaphore,
}

/// What Redis is told of one row.
#[derive(Clone, Debug)]
pub(super) struct Put {
    pub key: RowKey,
    pub value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    /// An event's stored form: to be kept unless a later one is there.
    Event {
        bytes: Bytes,
        /// Unix microseconds; not kept beyond.
        expires_us: i64,
    },
    /// The row changed, and to what is not known: nothing may lie there for [`FENCE`].
    Unknown,
    /// What was read there is no row: to be removed, if it still is what lies there.
    Garbage(Bytes),
}

impl Redis {
    /// Connects in the background, now and whenever the connection is lost.
    pub fn open(settings: &RedisSettings, region: &Name) -> Result<(Arc<Self>, SubscriberClient), InvalidStore> {
        let (connection, subscriber) = store::Redis::open(settings)?;
        let connection = Arc::new(connection);
        let redis = Self {
            changes: Changes::of(connection.clone(), region),
            connection,
            settings: settings.clone(),
            prefix: format!("spillway:{region}:"),
            rounds: Semaphore::new(settings.concurrency.max(1)),
        };
        Ok((Arc::new(redis), subscriber))
    }

    pub fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    /// Where the region is told of what is written.
    pub fn changes(&self) -> &Arc<Changes> {
        &self.changes
    }

    /// Comes back when the first attempts to connect have ended, either way.
    pub async fn attempted(&self) {
        self.connection.attempted().await;
    }

    pub fn is_connected(&self) -> bool {
        self.connection.is_connected()
    }

    /// One answer for each key, in order, before `deadline`.
    pub async fn read(&self, keys: &[&RowKey], deadline: Instant) -> Vec<Answer> {
        let all = |answer: Answer| vec![answer; keys.len()];
        if !self.is_connected() {
            return all(Answer::Failed);
        }
        let Ok(Ok(_permit)) = timeout_at(deadline.into(), self.rounds.acquire()).await else {
            return all(Answer::Failed);
        };
        if !self.settings.cluster {
            return self.mget(keys, deadline).await;
        }
        // Keys of one entity follow one another, and share a slot.
        let slots = keys.chunk_by(|a, b| a.entity() == b.entity());
        join_all(slots.map(|keys| self.mget(keys, deadline))).await.concat()
    }

    /// Keeps each event unless a later one is there. `announce`: the region hears of it, and the answer is the
    /// number of the change, 0 where the counter cannot rise.
    pub async fn write(
        &self,
        puts: &[Put],
        announce: bool,
        now_us: i64,
        deadline: Instant,
    ) -> Vec<Result<u64, RedisFailed>> {
        if !self.is_connected() {
            return vec![Err(RedisFailed); puts.len()];
        }
        let together = announce && !self.settings.cluster;
        let writes: FuturesUnordered<_> = puts
            .iter()
            .enumerate()
            .map(|(index, put)| async move { (index, self.put(put, together, now_us, deadline).await) })
            .collect();
        let mut results = vec![Err(RedisFailed); puts.len()];
        writes
            .for_each(|(index, result)| {
                results[index] = result;
                std::future::ready(())
            })
            .await;
        if announce && self.settings.cluster {
            for (puts, results) in puts.chunks(NAMES).zip(results.chunks_mut(NAMES)) {
                let told = self.announce(puts, deadline).await;
                results.iter_mut().for_each(|result| *result = result.and(told));
            }
        }
        results
    }

    async fn mget(&self, keys: &[&RowKey], deadline: Instant) -> Vec<Answer> {
        let names: Vec<String> = keys.iter().map(|key| self.row_key(key)).collect();
        let client = self.connection.client();
        let read = client.mget::<Vec<Option<Bytes>>, _>(names);
        match self.connection.in_time("read", read, deadline).await {
            Ok(values) if values.len() == keys.len() => values.into_iter().map(answer).collect(),
            Ok(_) | Err(_) => vec![Answer::Failed; keys.len()],
        }
    }

    async fn put(&self, put: &Put, announce: bool, now_us: i64, deadline: Instant) -> Result<u64, RedisFailed> {
        let (what, bytes, keep) = match &put.value {
            Value::Event { bytes, expires_us } => {
                let left = Duration::from_micros(u64::try_from(expires_us.saturating_sub(now_us)).unwrap_or(0));
                ("event", bytes.clone(), left.min(self.settings.keep))
            }
            Value::Unknown => ("unknown", Bytes::new(), FENCE),
            Value::Garbage(read) => ("garbage", read.clone(), Duration::ZERO),
        };
        let keep = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX).max(1);
        let mut keys = vec![self.row_key(&put.key)];
        if announce {
            keys.push(self.changes.counter().to_owned());
        }
        let arguments: Vec<Bytes> = vec![
            what.into(),
            bytes,
            keep.to_string().into(),
            self.changes.channel().to_owned().into(),
            put.key.as_str().to_owned().into(),
        ];
        let client = self.connection.client();
        let script = client.eval::<u64, _, _, _>(PUT_ROW, keys, arguments);
        self.connection.in_time("write", script, deadline).await
    }

    async fn announce(&self, puts: &[Put], deadline: Instant) -> Result<u64, RedisFailed> {
        let names: Vec<&str> = puts.iter().map(|put| put.key.as_str()).collect();
        let arguments: Vec<String> = vec![self.changes.channel().to_owned(), names.join("\n")];
        let client = self.connection.client();
        let script = client.eval::<u64, _, _, _>(ANNOUNCE, vec![self.changes.counter()], arguments);
        self.connection.in_time("write", script, deadline).await
    }

    fn row_key(&self, key: &RowKey) -> String {
        format!("{}f:{}", self.prefix, key.as_str())
    }
}

/// `MGET` gives nothing for a key of another type; the fill that follows overwrites it.
fn answer(value: Option<Bytes>) -> Answer {
    match value {
        None => Answer::Absent,
        Some(value) if value == FENCED => Answer::Absent,
        // Longer than any row: a byte that no format has lets the decoder refuse it without keeping it.
        Some(value) if value.len() > MAX_VALUE => Answer::Found(value.slice(..MAX_VALUE)),
        Some(value) => Answer::Found(value),
    }
}
