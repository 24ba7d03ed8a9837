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
use fred::interfaces::{ClientLike, KeysInterface, LuaInterface};
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
use tokio::sync::Semaphore;
use tokio::time::timeout_at;
use tokio_util::task::AbortOnDropHandle;

use super::settings::{InvalidSettings, RedisSettings, host_and_port, read_secret};
use super::store::Answer;
use super::tls;

/// A longer value is none of ours: 256 fields of 8 bytes need less than 3 KiB.
const MAX_VALUE: usize = 64 << 10;

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
    _connections: Vec<AbortOnDropHandle<()>>,
}

/// What is to lie under a key from now on.
#[derive(Clone, Debug)]
pub(super) struct Put {
    pub key: RowKey,
    /// None: forget what is there.
    pub bytes: Option<Bytes>,
    /// Unix microseconds; not kept beyond.
    pub expires_us: i64,
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
            _connections: pool.clients().iter().cloned().map(keep_connected).collect(),
            pool,
            settings: settings.clone(),
            prefix: format!("spillway:{region}:"),
            rounds: Semaphore::new(settings.concurrency.max(1)),
        };
        Ok((Arc::new(redis), subscriber))
    }

    pub fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    pub fn channel(&self) -> String {
        format!("{}features", self.prefix)
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
        match timeout_at(deadline.into(), read).await {
            Ok(Ok(number)) => Ok(number.unwrap_or(0)),
            Ok(Err(_)) | Err(_) => Err(RedisFailed),
        }
    }

    async fn mget(&self, keys: &[&RowKey], deadline: Instant) -> Vec<Answer> {
        let names: Vec<String> = keys.iter().map(|key| self.row_key(key)).collect();
        let client = self.client();
        let read = client.mget::<Vec<Option<Bytes>>, _>(names);
        match timeout_at(deadline.into(), read).await {
            Ok(Ok(values)) if values.len() == keys.len() => values.into_iter().map(answer).collect(),
            Ok(Ok(_) | Err(_)) | Err(_) => vec![Answer::Failed; keys.len()],
        }
    }

    async fn put(&self, put: &Put, announce: bool, now_us: i64, deadline: Instant) -> Result<(), RedisFailed> {
        let left = Duration::from_micros(u64::try_from(put.expires_us.saturating_sub(now_us)).unwrap_or(0));
        let keep = u64::try_from(left.min(self.settings.keep).as_millis()).unwrap_or(u64::MAX).max(1);
        let mut keys = vec![self.row_key(&put.key)];
        if announce {
            keys.push(self.counter_key());
        }
        let arguments: Vec<Bytes> = vec![
            put.bytes.clone().unwrap_or_default(),
            keep.to_string().into(),
            self.channel().into(),
            put.key.as_str().to_owned().into(),
        ];
        let client = self.client();
        let script = client.eval::<i64, _, _, _>(PUT_ROW, keys, arguments);
        succeeded(timeout_at(deadline.into(), script).await)
    }

    async fn announce(&self, puts: &[Put], deadline: Instant) -> Result<(), RedisFailed> {
        let names: Vec<&str> = puts.iter().map(|put| put.key.as_str()).collect();
        let arguments: Vec<String> = vec![self.channel(), names.join("\n")];
        let client = self.client();
        let script = client.eval::<i64, _, _, _>(ANNOUNCE, vec![self.counter_key()], arguments);
        succeeded(timeout_at(deadline.into(), script).await)
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
        // Longer than any row: a byte that no format has lets the decoder refuse it without keeping it.
        Some(value) if value.len() > MAX_VALUE => Answer::Found(value.slice(..MAX_VALUE)),
        Some(value) => Answer::Found(value),
    }
}

fn succeeded<E>(result: Result<Result<i64, fred::error::Error>, E>) -> Result<(), RedisFailed> {
    match result {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(RedisFailed),
    }
}

/// The client reconnects by itself but for what it takes to be final, such as a refused password: that
/// may be mended on the other side, so it is tried again too.
pub(super) fn keep_connected<C: ClientLike + 'static>(client: C) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let ended = AbortOnDropHandle::new(client.connect()).await;
            if let Ok(Err(error)) = ended {
                tracing::warn!(kind = error.kind().to_str(), "redis: the connection ended");
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }))
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
