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
use fred::clients::{Client, Pool, SubscriberClient};
use fred::interfaces::{ClientLike, EventInterface, KeysInterface, LuaInterface};
use fred::types::config::ClusterDiscoveryPolicy;
use fred::types::config::{
    Config, ConnectionConfig, Options, PerformanceConfig, ReconnectPolicy, Server, ServerConfig, TcpConfig, TlsConfig,
    TlsConnector, TlsHostMapping, UnresponsiveConfig,
};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use spillway_core::feature::RowKey;
use spillway_core::units::Name;
use tokio::sync::{Semaphore, SetOnce};
use tokio::time::timeout_at;
use tokio_util::task::AbortOnDropHandle;

use super::fault_log::FaultLog;
use super::settings::{InvalidSettings, RedisSettings, host_and_port, read_secret};
use super::store::Answer;
use super::tls;

/// A longer value is none of ours: 256 fields of 8 bytes need less than 3 KiB.
const MAX_VALUE: usize = 64 << 10;

/// What `put_row.lua` leaves where it must take nothing for a while; no row begins with it.
const FENCED: &[u8] = b"\xF2";

/// Longer than whoever read the store takes to fill Redis.
const FENCE: Duration = Duration::from_secs(5);

/// Names in one message of a cluster's channel.
const NAMES: usize = 200;

const PUT_ROW: &str = include_str!("put_row.lua");
const ANNOUNCE: &str = include_str!("announce.lua");

pub(super) struct Redis {
    pool: Pool,
    settings: RedisSettings,
    /// `spillway:<region>:`, before every key and channel: regions may share a server.
    prefix: String,
    rounds: Semaphore,
    faults: FaultLog,
    connections: Vec<Connected>,
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

/// Redis did not do as told in time. Its fault; the same may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RedisFailed;

impl Redis {
    /// Connects in the background, now and whenever the connection is lost.
    pub fn open(settings: &RedisSettings, region: &Name) -> Result<(Arc<Self>, SubscriberClient), InvalidSettings> {
        let config = config(settings)?;
        let fault = |error: fred::error::Error| InvalidSettings::Redis(error.details().to_owned());
        let (performance, connection, policy) = (performance(), connection(settings), reconnect());
        let pool = Pool::new(
            config.clone(),
            Some(performance.clone()),
            Some(connection.clone()),
            Some(policy.clone()),
            settings.connections.max(1),
        )
        .map_err(fault)?;
        let subscriber = SubscriberClient::new(config, Some(performance), Some(connection), Some(policy));
        let redis = Self {
            connections: pool.clients().iter().cloned().map(keep_connected).collect(),
            pool,
            settings: settings.clone(),
            prefix: format!("spillway:{region}:"),
            rounds: Semaphore::new(settings.concurrency.max(1)),
            faults: FaultLog::of("redis"),
        };
        Ok((Arc::new(redis), subscriber))
    }

    pub fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    pub fn channel(&self) -> String {
        format!("{}features", self.prefix)
    }

    /// Comes back when the first attempts to connect have ended, either way.
    pub async fn attempted(&self) {
        join_all(self.connections.iter().map(|connected| connected.attempted.wait())).await;
    }

    pub fn is_connected(&self) -> bool {
        self.pool.clients().iter().any(ClientLike::is_connected)
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

    /// Keeps each event unless a later one is there. `announce`: the region hears of it.
    pub async fn write(
        &self,
        puts: &[Put],
        announce: bool,
        now_us: i64,
        deadline: Instant,
    ) -> Vec<Result<(), RedisFailed>> {
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
                if self.announce(puts, deadline).await.is_err() {
                    results.fill(Err(RedisFailed));
                }
            }
        }
        results
    }

    /// The number of the last message on the channel.
    pub async fn counter(&self, deadline: Instant) -> Result<u64, RedisFailed> {
        let client = self.client();
        let key = self.counter_key();
        let read = client.get::<Option<u64>, _>(key);
        let number = self.in_time("poll", read, deadline).await;
        number.map(|number| number.unwrap_or(0))
    }

    async fn mget(&self, keys: &[&RowKey], deadline: Instant) -> Vec<Answer> {
        let names: Vec<String> = keys.iter().map(|key| self.row_key(key)).collect();
        let client = self.client();
        let read = client.mget::<Vec<Option<Bytes>>, _>(names);
        match self.in_time("read", read, deadline).await {
            Ok(values) if values.len() == keys.len() => values.into_iter().map(answer).collect(),
            Ok(_) | Err(_) => vec![Answer::Failed; keys.len()],
        }
    }

    async fn put(&self, put: &Put, announce: bool, now_us: i64, deadline: Instant) -> Result<(), RedisFailed> {
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
            keys.push(self.counter_key());
        }
        let arguments: Vec<Bytes> = vec![
            what.into(),
            bytes,
            keep.to_string().into(),
            self.channel().into(),
            put.key.as_str().to_owned().into(),
        ];
        let client = self.client();
        let script = client.eval::<i64, _, _, _>(PUT_ROW, keys, arguments);
        self.in_time("write", script, deadline).await.map(drop)
    }

    async fn announce(&self, puts: &[Put], deadline: Instant) -> Result<(), RedisFailed> {
        let names: Vec<&str> = puts.iter().map(|put| put.key.as_str()).collect();
        let arguments: Vec<String> = vec![self.channel(), names.join("\n")];
        let client = self.client();
        let script = client.eval::<i64, _, _, _>(ANNOUNCE, vec![self.counter_key()], arguments);
        self.in_time("write", script, deadline).await.map(drop)
    }

    async fn in_time<T>(
        &self,
        doing: &'static str,
        command: impl Future<Output = Result<T, fred::error::Error>>,
        deadline: Instant,
    ) -> Result<T, RedisFailed> {
        // Boxed: the client's futures nest so deeply that the compiler gives up on what holds one.
        match timeout_at(deadline.into(), Box::pin(command)).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => {
                self.faults.say(doing, kind(&error), &error);
                Err(RedisFailed)
            }
            Err(late) => {
                self.faults.say(doing, "timeout", &late);
                Err(RedisFailed)
            }
        }
    }

    fn client(&self) -> fred::clients::WithOptions<Client> {
        // Nothing waits for a connection: the request goes on to the next tier at once.
        let options = Options { fail_fast: true, max_attempts: Some(1), ..Options::default() };
        self.pool.next_connected().with_options(&options)
    }

    fn row_key(&self, key: &RowKey) -> String {
        format!("{}f:{}", self.prefix, key.as_str())
    }

    fn counter_key(&self) -> String {
        format!("{}features:changes", self.prefix)
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

/// A word for the log: Redis begins its errors with one.
fn kind(error: &fred::error::Error) -> &'static str {
    const WORDS: [&str; 10] =
        ["OOM", "READONLY", "WRONGTYPE", "MISCONF", "LOADING", "BUSY", "NOPERM", "NOAUTH", "CLUSTERDOWN", "MASTERDOWN"];
    let said = error.details().split(' ').next().unwrap_or_default();
    WORDS.into_iter().find(|word| *word == said).unwrap_or_else(|| error.kind().to_str())
}

/// A client that is kept connected until this is dropped.
pub(super) struct Connected {
    attempted: Arc<SetOnce<()>>,
    _task: AbortOnDropHandle<()>,
}

/// The client reconnects by itself but for what it takes to be final, such as a refused password: that
/// may be mended on the other side, so it is tried again too.
pub(super) fn keep_connected<C: ClientLike + EventInterface + 'static>(client: C) -> Connected {
    let attempted = Arc::new(SetOnce::new());
    let first = attempted.clone();
    let task = tokio::spawn(async move {
        loop {
            // Both listen before there is anything to hear.
            let mut errors = client.error_rx();
            let mut connected = Box::pin(client.wait_for_connect());
            let already = futures_util::poll!(&mut connected).is_ready();
            let connection = AbortOnDropHandle::new(client.connect());
            if !already {
                tokio::select! { _ = connected => {}, _ = errors.recv() => {} }
            }
            // Set before if this is not the first attempt.
            let _ = first.set(());
            drop(errors);
            if let Ok(Err(error)) = connection.await {
                tracing::warn!(kind = error.kind().to_str(), "redis: the connection ended");
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    Connected { attempted, _task: AbortOnDropHandle::new(task) }
}

fn config(settings: &RedisSettings) -> Result<Config, InvalidSettings> {
    let invalid = |setting, problem| InvalidSettings::Value { setting, problem };
    let mut servers = Vec::new();
    for server in &settings.servers {
        let (host, port) = host_and_port(server).ok_or(invalid("redis.servers", "expected host:port"))?;
        servers.push(Server::new(host, port));
    }
    let server = match (settings.cluster, servers.len()) {
        (_, 0) => return Err(invalid("redis.servers", "expected at least one")),
        (true, _) => ServerConfig::Clustered { hosts: servers, policy: ClusterDiscoveryPolicy::default() },
        (false, 1) => ServerConfig::Centralized { server: servers.remove(0) },
        (false, _) => return Err(invalid("redis.servers", "expected exactly one without cluster: true")),
    };
    let password = match &settings.password_file {
        Some(path) => Some(read_secret(path, "redis.passwordFile")?),
        None => None,
    };
    let tls = match &settings.tls {
        Some(settings) => {
            let connector = tokio_rustls::TlsConnector::from(tls::client_config(settings)?);
            Some(TlsConfig { connector: TlsConnector::from(connector), hostnames: TlsHostMapping::None })
        }
        None => None,
    };
    // Not `fail_fast`: a Redis that is away at the start is waited for like one that goes away later.
    Ok(Config { fail_fast: false, username: settings.username.clone(), password, server, tls, ..Config::default() })
}

fn performance() -> PerformanceConfig {
    PerformanceConfig { broadcast_channel_capacity: 4_096, ..PerformanceConfig::default() }
}

fn connection(settings: &RedisSettings) -> ConnectionConfig {
    let patience = settings.timeout.saturating_mul(20).max(Duration::from_secs(1));
    ConnectionConfig {
        connection_timeout: Duration::from_secs(2),
        internal_command_timeout: Duration::from_secs(2),
        max_command_attempts: 1,
        max_redirections: 3,
        reconnect_on_auth_error: true,
        unresponsive: UnresponsiveConfig { max_timeout: Some(patience), interval: patience / 4 },
        tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
        ..ConnectionConfig::default()
    }
}

fn reconnect() -> ReconnectPolicy {
    ReconnectPolicy::Exponential { attempts: 0, max_attempts: 0, min_delay: 50, max_delay: 1_000, base: 2, jitter: 50 }
}
