//! L3: ScyllaDB or Cassandra.
//!
//! The rule: a statement is prepared, token-aware, idempotent, unpaged and bounded in time; one partition
//! for each entity, one statement for all its groups of one consistency. `USING TIMESTAMP event time`
//! lets the last event win in the store itself. A cluster that is away at the start is waited for.
//!
//! The table, which `createSchema: true` also creates:
//!
//! ```cql
//! CREATE TABLE <keyspace>.features (
//!     entity_key text, fg_id text, v blob, event_us bigint, seq bigint, schema_ver int,
//!     PRIMARY KEY (entity_key, fg_id)
//! ) WITH gc_grace_seconds = 864000
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use scylla::client::execution_profile::ExecutionProfile;
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use scylla::policies::load_balancing::DefaultPolicy;
use scylla::policies::speculative_execution::SimpleSpeculativeExecutionPolicy;
use scylla::statement::Consistency as Level;
use scylla::statement::prepared::PreparedStatement;
use spillway_core::feature::{RowKey, Stored};
use spillway_core::resource::Consistency;
use tokio::sync::Semaphore;
use tokio::time::{timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::settings::{CassandraSettings, InvalidSettings, host_and_port, read_secret};
use super::store::{Answer, Change, Store, Wanted, WriteFailed};
use super::tls;

/// Between attempts to reach a cluster that does not answer.
const RETRY: Duration = Duration::from_secs(1);

pub(super) struct Cassandra {
    settings: CassandraSettings,
    cluster: Arc<ArcSwapOption<Cluster>>,
    reads: Semaphore,
    writes: Semaphore,
    _connect: AbortOnDropHandle<()>,
}

/// A connected session and what is prepared on it.
struct Cluster {
    session: Session,
    read: PreparedStatement,
    insert: PreparedStatement,
    delete: PreparedStatement,
}

impl Cassandra {
    /// Connects in the background.
    pub fn open(settings: &CassandraSettings) -> Result<Self, InvalidSettings> {
        let builder = session(settings)?;
        let cluster = Arc::new(ArcSwapOption::empty());
        let connect = connect(builder, settings.clone(), cluster.clone());
        Ok(Self {
            settings: settings.clone(),
            cluster,
            reads: Semaphore::new(settings.concurrency.max(1)),
            writes: Semaphore::new(settings.concurrency.max(1)),
            _connect: AbortOnDropHandle::new(tokio::spawn(connect)),
        })
    }

    async fn read_entity(
        &self,
        cluster: &Cluster,
        key: &RowKey,
        groups: Vec<&str>,
        level: Level,
        deadline: Instant,
    ) -> Option<BTreeMap<String, Bytes>> {
        let read = async {
            let _permit = self.reads.acquire().await.ok()?;
            let mut statement = cluster.read.clone();
            statement.set_consistency(level);
            // The outer deadline abandons the answer; this one frees the connection's slot too.
            statement.set_request_timeout(Some(
                deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)),
            ));
            let answer = cluster.session.execute_unpaged(&statement, (key.entity(), groups)).await;
            let rows = answer.inspect_err(|error| log_failed("read", error)).ok()?.into_rows_result().ok()?;
            let rows = rows.rows::<(String, Option<Vec<u8>>)>().ok()?;
            let mut found = BTreeMap::new();
            for row in rows {
                let (group, value) = row.ok()?;
                found.insert(group, Bytes::from(value.unwrap_or_default()));
            }
            Some(found)
        };
        timeout_at(deadline.into(), read).await.ok().flatten()
    }

    async fn write_one(&self, cluster: &Cluster, change: &Change) -> Result<Option<Answer>, WriteFailed> {
        let _permit = self.writes.acquire().await.map_err(|_| WriteFailed)?;
        let (entity, group, event_us) = (change.key.entity(), change.key.group(), change.stored.event_us());
        let level = write_level(change.consistency);
        let written = match &change.stored {
            Stored::Row(row) => {
                let ttl = time_to_live(change.expires_us);
                let mut statement = cluster.insert.clone();
                statement.set_consistency(level);
                let values =
                    (entity, group, &row.bytes()[..], event_us, i32::from(change.schema_version), event_us, ttl);
                timeout(self.settings.write_timeout, cluster.session.execute_unpaged(&statement, values)).await
            }
            Stored::Deleted { .. } => {
                let mut statement = cluster.delete.clone();
                statement.set_consistency(level);
                timeout(
                    self.settings.write_timeout,
                    cluster.session.execute_unpaged(&statement, (event_us, entity, group)),
                )
                .await
            }
        };
        match written {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                log_failed("write", &error);
                return Err(WriteFailed);
            }
            Err(_) => return Err(WriteFailed),
        }
        // Read back at the level of the write, so that what is read is this event or a later one.
        let deadline = Instant::now() + self.settings.write_timeout;
        let found = self.read_entity(cluster, &change.key, vec![group], level, deadline).await;
        Ok(found.map(|mut found| found.remove(group).map_or(Answer::Absent, Answer::Found)))
    }
}

#[async_trait]
impl Store for Cassandra {
    fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    async fn read(&self, rows: &[Wanted], deadline: Instant) -> Vec<Answer> {
        let mut answers = vec![Answer::Failed; rows.len()];
        let Some(cluster) = self.cluster.load_full() else { return answers };
        let mut statements: BTreeMap<(&str, u8), Vec<usize>> = BTreeMap::new();
        for (index, row) in rows.iter().enumerate() {
            statements.entry((row.key.entity(), row.consistency as u8)).or_default().push(index);
        }
        let reads: FuturesUnordered<_> = statements
            .into_values()
            .map(|indices| {
                let cluster = &cluster;
                async move {
                    let first = &rows[indices[0]];
                    let groups = indices.iter().map(|&index| rows[index].key.group()).collect();
                    let found =
                        self.read_entity(cluster, &first.key, groups, read_level(first.consistency), deadline).await;
                    (indices, found)
                }
            })
            .collect();
        reads
            .for_each(|(indices, found)| {
                for index in indices {
                    let Some(found) = &found else { continue };
                    answers[index] = found.get(rows[index].key.group()).cloned().map_or(Answer::Absent, Answer::Found);
                }
                std::future::ready(())
            })
            .await;
        answers
    }

    async fn write(&self, changes: &[Change]) -> Vec<Result<Option<Answer>, WriteFailed>> {
        let mut results = vec![Err(WriteFailed); changes.len()];
        let Some(cluster) = self.cluster.load_full() else { return results };
        let writes: FuturesUnordered<_> = changes
            .iter()
            .enumerate()
            .map(|(index, change)| {
                let cluster = &cluster;
                async move { (index, self.write_one(cluster, change).await) }
            })
            .collect();
        writes
            .for_each(|(index, result)| {
                results[index] = result;
                std::future::ready(())
            })
            .await;
        results
    }
}

fn session(settings: &CassandraSettings) -> Result<SessionBuilder, InvalidSettings> {
    let invalid = |setting, problem| InvalidSettings::Value { setting, problem };
    if settings.contact_points.is_empty() {
        return Err(invalid("cassandra.contactPoints", "expected at least one"));
    }
    if settings.contact_points.iter().any(|point| host_and_port(point).is_none()) {
        return Err(invalid("cassandra.contactPoints", "expected host:port"));
    }
    let keyspace = settings.keyspace.as_bytes();
    let allowed = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'_';
    if !keyspace.first().is_some_and(u8::is_ascii_lowercase) || keyspace.len() > 48 || !keyspace.iter().all(allowed) {
        return Err(invalid("cassandra.keyspace", "expected 1 to 48 lower-case letters, digits and _, a letter first"));
    }
    let policy = DefaultPolicy::builder().token_aware(true);
    let policy = match &settings.data_center {
        Some(name) => policy.prefer_datacenter(name.clone()),
        None => policy,
    };
    let mut profile = ExecutionProfile::builder()
        .load_balancing_policy(policy.build())
        .consistency(Level::LocalOne)
        .request_timeout(Some(settings.write_timeout));
    if let Some(after) = settings.speculate_after {
        let policy = SimpleSpeculativeExecutionPolicy { max_retry_count: 1, retry_interval: after };
        profile = profile.speculative_execution_policy(Some(Arc::new(policy)));
    }
    let mut builder = SessionBuilder::new()
        .known_nodes(&settings.contact_points)
        .default_execution_profile_handle(profile.build().into_handle())
        .connection_timeout(Duration::from_secs(2))
        .keepalive_interval(Duration::from_secs(5))
        .keepalive_timeout(Duration::from_secs(5));
    if let Some(username) = &settings.username {
        let path = settings.password_file.as_deref();
        let path = path.ok_or(invalid("cassandra.passwordFile", "is missing, and a username is given"))?;
        builder = builder.user(username, read_secret(path, "cassandra.passwordFile")?);
    }
    if let Some(settings) = &settings.tls {
        builder = builder.tls_context(Some(tls::client_config(settings)?));
    }
    Ok(builder)
}

async fn connect(builder: SessionBuilder, settings: CassandraSettings, cluster: Arc<ArcSwapOption<Cluster>>) {
    let mut said = false;
    loop {
        match prepare(builder.clone(), &settings).await {
            Ok(prepared) => {
                tracing::info!("cassandra: connected");
                return cluster.store(Some(Arc::new(prepared)));
            }
            Err(error) if said => tracing::debug!(%error, "cassandra: still not reached"),
            Err(error) => {
                tracing::warn!(%error, "cassandra: not reached, trying again");
                said = true;
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn prepare(builder: SessionBuilder, settings: &CassandraSettings) -> Result<Cluster, NotReady> {
    let session = builder.build().await?;
    // A checked identifier: nothing of it can leave its place in the statement.
    let keyspace = &settings.keyspace;
    if settings.create_schema {
        let replication = format!(
            "{{'class': 'NetworkTopologyStrategy', 'replication_factor': {}}}",
            settings.replication_factor.max(1)
        );
        session
            .query_unpaged(format!("CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = {replication}"), ())
            .await?;
        let table = format!(
            "CREATE TABLE IF NOT EXISTS {keyspace}.features (
                entity_key text, fg_id text, v blob, event_us bigint, seq bigint, schema_ver int,
                PRIMARY KEY (entity_key, fg_id)
            ) WITH gc_grace_seconds = 864000"
        );
        session.query_unpaged(table, ()).await?;
    }
    let prepare = async |text: String| {
        let mut statement = session.prepare(text).await?;
        statement.set_is_idempotent(true);
        Ok::<_, NotReady>(statement)
    };
    let read = prepare(format!("SELECT fg_id, v FROM {keyspace}.features WHERE entity_key = ? AND fg_id IN ?")).await?;
    let insert = format!(
        "INSERT INTO {keyspace}.features (entity_key, fg_id, v, event_us, schema_ver) VALUES (?, ?, ?, ?, ?)
         USING TIMESTAMP ? AND TTL ?"
    );
    let insert = prepare(insert).await?;
    let delete = format!("DELETE FROM {keyspace}.features USING TIMESTAMP ? WHERE entity_key = ? AND fg_id = ?");
    let delete = prepare(delete).await?;
    Ok(Cluster { session, read, insert, delete })
}

/// The cluster is not there, or not as it must be. A retry may help.
#[derive(Debug, thiserror::Error)]
enum NotReady {
    #[error(transparent)]
    Session(#[from] scylla::errors::NewSessionError),
    #[error(transparent)]
    Schema(#[from] scylla::errors::ExecutionError),
    #[error(transparent)]
    Prepare(#[from] scylla::errors::PrepareError),
}

fn read_level(consistency: Consistency) -> Level {
    match consistency {
        Consistency::LocalOne => Level::LocalOne,
        Consistency::LocalQuorum => Level::LocalQuorum,
        Consistency::Quorum => Level::Quorum,
    }
}

/// At least a local quorum, so that a write outlives any one node.
fn write_level(consistency: Consistency) -> Level {
    match consistency {
        Consistency::LocalOne | Consistency::LocalQuorum => Level::LocalQuorum,
        Consistency::Quorum => Level::Quorum,
    }
}

/// Seconds until `expires_us`, at least 1 and at most the 20 years that CQL takes.
fn time_to_live(expires_us: i64) -> i32 {
    let left = expires_us.saturating_sub(super::now_us()) / 1_000_000;
    i32::try_from(left.clamp(1, 20 * 365 * 86_400)).unwrap_or(1)
}

/// Failed statements are counted by the caller; the text is for whoever looks for the reason.
fn log_failed(what: &'static str, error: &scylla::errors::ExecutionError) {
    tracing::debug!(%error, what, "cassandra: a statement failed");
}
