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

mod cluster;
mod fault;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use scylla::statement::Consistency as Level;
use spillway_core::feature::{RowKey, Stored};
use spillway_core::resource::Consistency;
use tokio::sync::{Semaphore, SetOnce};
use tokio::time::{timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::now_us;
use super::settings::CassandraSettings;
use super::store::{Answer, Change, Store, Wanted, WriteFailed};
use cluster::Cluster;
use spillway_runtime::store::{FaultLog, InvalidStore};

pub(super) struct Cassandra {
    settings: CassandraSettings,
    cluster: Arc<ArcSwapOption<Cluster>>,
    reads: Semaphore,
    writes: Semaphore,
    attempted: Arc<SetOnce<()>>,
    faults: FaultLog,
    _connect: AbortOnDropHandle<()>,
}

impl Cassandra {
    /// Connects in the background.
    pub fn open(settings: &CassandraSettings) -> Result<Self, InvalidStore> {
        let builder = cluster::session(settings)?;
        let cluster = Arc::new(ArcSwapOption::empty());
        let attempted = Arc::new(SetOnce::new());
        let connect = cluster::connect(builder, settings.clone(), cluster.clone(), attempted.clone());
        Ok(Self {
            settings: settings.clone(),
            cluster,
            reads: Semaphore::new(settings.concurrency.max(1)),
            writes: Semaphore::new(settings.concurrency.max(1)),
            attempted,
            faults: FaultLog::of("cassandra"),
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
            let answer = answer.inspect_err(|error| self.faults.say("read", fault::kind(error), error));
            let rows = answer.ok()?.into_rows_result().ok()?;
            let rows = rows.rows::<(String, Option<Vec<u8>>)>().ok()?;
            let mut found = BTreeMap::new();
            for row in rows {
                let (group, value) = row.ok()?;
                found.insert(group, Bytes::from(value.unwrap_or_default()));
            }
            Some(found)
        };
        let read = timeout_at(deadline.into(), read).await;
        read.inspect_err(|late| self.faults.say("read", "timeout", late)).ok().flatten()
    }

    async fn write_one(&self, cluster: &Cluster, change: &Change) -> Result<Option<Answer>, WriteFailed> {
        let _permit = self.writes.acquire().await.map_err(|_| WriteFailed::Unreached)?;
        let (entity, group, event_us) = (change.key.entity(), change.key.group(), change.stored.event_us());
        let level = write_level(change.consistency);
        let written = match &change.stored {
            Stored::Row(row) => {
                let ttl = time_to_live(change.expires_us, now_us());
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
                self.faults.say("write", fault::kind(&error), &error);
                return Err(fault::of_write(&error));
            }
            Err(late) => {
                self.faults.say("write", "timeout", &late);
                return Err(WriteFailed::Unreached);
            }
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

    async fn attempted(&self) {
        self.attempted.wait().await;
    }

    fn is_reached(&self) -> bool {
        self.cluster.load().is_some()
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
        let mut results = vec![Err(WriteFailed::Unreached); changes.len()];
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

/// The most that CQL takes: 20 years.
const LONGEST: i64 = 20 * 365 * 86_400;

/// Unix seconds, 2038-01-19T03:14:06Z. Cassandra keeps the end of a row's life in 32 signed bits, unless
/// `storage_compatibility_mode` is NONE, and refuses a write that ends later.
const LAST_END: i64 = i32::MAX as i64 - 1;

/// How far the servers' clocks may be ahead of ours.
const SKEW: i64 = 3_600;

/// Seconds until `expires_us`, as far as CQL can express it. A row that should be kept beyond
/// [`LAST_END`] ends there, and is to be written again before.
fn time_to_live(expires_us: i64, now_us: i64) -> i32 {
    let left = expires_us.saturating_sub(now_us) / 1_000_000;
    let until_last = LAST_END - SKEW - now_us / 1_000_000;
    // Once that day has come, only servers without the limit are left to write to.
    let most = if until_last > 0 { until_last.min(LONGEST) } else { LONGEST };
    i32::try_from(left.clamp(1, most)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_row_ends_where_cassandra_cannot_say_so() {
        const YEAR: i64 = 365 * 86_400;
        let ttl = |now_s: i64, left_s: i64| i64::from(time_to_live((now_s + left_s) * 1_000_000, now_s * 1_000_000));
        let now = 1_795_000_000;
        assert_eq!(ttl(now, 3_600), 3_600);
        assert_eq!(ttl(now, -5), 1);
        assert_eq!(now + ttl(now, 20 * YEAR), LAST_END - SKEW, "in 2026, 20 years are too long");
        assert_eq!(ttl(now - 20 * YEAR, 30 * YEAR), LONGEST);
        assert_eq!(ttl(LAST_END - SKEW - 1, YEAR), 1);
        assert_eq!(ttl(LAST_END, YEAR), YEAR, "afterwards, servers without the limit are written to");
        assert_eq!(time_to_live(i64::MAX, 0), i32::try_from(LONGEST).unwrap());
    }
}
