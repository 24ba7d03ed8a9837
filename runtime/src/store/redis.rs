//! A connection to Redis, alone or as a cluster, that is kept up and never waited for too long.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::clients::{Client, Pool, SubscriberClient, WithOptions};
use fred::interfaces::{ClientLike, EventInterface};
use fred::types::config::{
    ClusterDiscoveryPolicy, Config, ConnectionConfig, Options, PerformanceConfig, ReconnectPolicy, Server,
    ServerConfig, TcpConfig, TlsConfig, TlsConnector, TlsHostMapping, UnresponsiveConfig,
};
use futures_util::future::join_all;
use tokio::sync::SetOnce;
use tokio::time::timeout_at;
use tokio_util::task::AbortOnDropHandle;

use super::fault_log::FaultLog;
use super::settings::{InvalidStore, RedisSettings, host_and_port, read_secret};
use super::tls;

/// Redis did not do as told in time. Its fault; the same may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedisFailed;

pub struct Redis {
    pool: Pool,
    faults: FaultLog,
    connections: Vec<Connected>,
}

impl Redis {
    /// Connects in the background, now and whenever the connection is lost. The subscriber is connected by
    /// who listens to it ([`keep_connected`]).
    pub fn open(settings: &RedisSettings) -> Result<(Self, SubscriberClient), InvalidStore> {
        let config = config(settings)?;
        let fault = |error: fred::error::Error| InvalidStore::Redis(error.details().to_owned());
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
        let connections = pool.clients().iter().cloned().map(keep_connected).collect();
        Ok((Self { pool, faults: FaultLog::of("redis"), connections }, subscriber))
    }

    /// Comes back when the first attempts to connect have ended, either way.
    pub async fn attempted(&self) {
        join_all(self.connections.iter().map(|connected| connected.attempted.wait())).await;
    }

    pub fn is_connected(&self) -> bool {
        self.pool.clients().iter().any(ClientLike::is_connected)
    }

    /// For one command, which fails at once where there is no connection.
    pub fn client(&self) -> WithOptions<Client> {
        self.pool.next_connected().with_options(&at_once())
    }

    /// The same, but always by the same connection to a server, which hears one after the other.
    pub fn orderly(&self) -> WithOptions<Client> {
        self.pool.clients().first().unwrap_or_else(|| self.pool.next()).with_options(&at_once())
    }

    /// What a command answers before `deadline`; the log hears why it did not.
    pub async fn in_time<T>(
        &self,
        doing: &'static str,
        command: impl Future<Output = Result<T, fred::error::Error>>,
        deadline: Instant,
    ) -> Result<T, RedisFailed> {
        // Boxed: the client's futures nest so deeply that the compiler gives up on what holds one.
        match timeout_at(deadline.into(), Box::pin(command)).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(self.failed(doing, &error)),
            Err(late) => {
                self.faults.say(doing, "timeout", &late);
                Err(RedisFailed)
            }
        }
    }

    /// Lets the log hear why one of several commands failed.
    pub fn failed(&self, doing: &'static str, error: &fred::error::Error) -> RedisFailed {
        self.faults.say(doing, kind(error), error);
        RedisFailed
    }
}

fn at_once() -> Options {
    Options { fail_fast: true, max_attempts: Some(1), ..Options::default() }
}

/// A word for the log: Redis begins its errors with one.
fn kind(error: &fred::error::Error) -> &'static str {
    const WORDS: [&str; 10] =
        ["OOM", "READONLY", "WRONGTYPE", "MISCONF", "LOADING", "BUSY", "NOPERM", "NOAUTH", "CLUSTERDOWN", "MASTERDOWN"];
    let said = error.details().split(' ').next().unwrap_or_default();
    WORDS.into_iter().find(|word| *word == said).unwrap_or_else(|| error.kind().to_str())
}

/// A client that is kept connected until this is dropped.
pub struct Connected {
    attempted: Arc<SetOnce<()>>,
    _task: AbortOnDropHandle<()>,
}

/// The client reconnects by itself but for what it takes to be final, such as a refused password: that
/// may be mended on the other side, so it is tried again too.
pub fn keep_connected<C: ClientLike + EventInterface + 'static>(client: C) -> Connected {
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

fn config(settings: &RedisSettings) -> Result<Config, InvalidStore> {
    let invalid = |setting, problem| InvalidStore::Value { setting, problem };
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
