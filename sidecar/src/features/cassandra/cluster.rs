//! The way to a cluster: session, schema, prepared statements. A cluster that is away is waited for.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use scylla::client::execution_profile::ExecutionProfile;
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use scylla::policies::load_balancing::DefaultPolicy;
use scylla::policies::speculative_execution::SimpleSpeculativeExecutionPolicy;
use scylla::statement::Consistency as Level;
use scylla::statement::prepared::PreparedStatement;
use tokio::sync::SetOnce;

use spillway_runtime::store::InvalidStore;
use spillway_runtime::store::settings::{host_and_port, read_secret};
use spillway_runtime::store::tls;

use crate::features::settings::CassandraSettings;

/// Between attempts to reach a cluster that does not answer.
const RETRY: Duration = Duration::from_secs(1);

/// A connected session and what is prepared on it.
pub(super) struct Cluster {
    pub session: Session,
    pub read: PreparedStatement,
    pub insert: PreparedStatement,
    pub delete: PreparedStatement,
}

pub(super) fn session(settings: &CassandraSettings) -> Result<SessionBuilder, InvalidStore> {
    let invalid = |setting, problem| InvalidStore::Value { setting, problem };
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

/// Tries until it is done; `attempted` is set when the first attempt has ended.
pub(super) async fn connect(
    builder: SessionBuilder,
    settings: CassandraSettings,
    cluster: Arc<ArcSwapOption<Cluster>>,
    attempted: Arc<SetOnce<()>>,
) {
    let mut said = false;
    loop {
        match prepare(builder.clone(), &settings).await {
            Ok(prepared) => {
                tracing::info!("cassandra: connected");
                cluster.store(Some(Arc::new(prepared)));
                // Set before if this is not the first attempt.
                let _ = attempted.set(());
                return;
            }
            Err(error) if said => tracing::debug!(%error, "cassandra: still not reached"),
            Err(error) => {
                tracing::warn!(%error, "cassandra: not reached, trying again");
                said = true;
                let _ = attempted.set(());
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
