//! The store of a control node that is alone: one SQLite file.
//!
//! The rule: the last process that opened the file leads, and it alone writes. Each has an epoch above all before it,
//! which every commit compares in its own transaction; one that was superseded never leads again. The database never
//! runs on an async thread.
//!
//! Changes by another process are told within [`POLL`].

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};
use spillway_core::units::Name;
use tokio::sync::{oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;

use super::{Condition, DEADLINE, Fence, Leader, Leadership, OpenError, StoreError, Value, Write};

/// How often a process looks for what others have written.
const POLL: Duration = Duration::from_millis(250);
/// Another process's transaction is waited for so long.
const BUSY: Duration = Duration::from_millis(1_500);

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS entries (
    key      TEXT PRIMARY KEY NOT NULL,
    value    BLOB NOT NULL,
    revision INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (
    one      INTEGER PRIMARY KEY CHECK (one = 1),
    revision INTEGER NOT NULL,
    epoch    INTEGER NOT NULL,
    node     TEXT NOT NULL,
    address  TEXT NOT NULL
) STRICT;
INSERT OR IGNORE INTO state (one, revision, epoch, node, address) VALUES (1, 0, 0, '', '');
";

/// Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct Sqlite(Arc<File>);

#[derive(Debug)]
struct File {
    /// Also the turn of who uses it.
    connection: Arc<Mutex<Connection>>,
    watched: Arc<Watched>,
    /// Ours: the file's, unless another process has opened it since.
    epoch: Mutex<u64>,
    _poll: AbortOnDropHandle<()>,
}

/// Who is told of changes, and the newest epoch for those who lead by an older one.
#[derive(Debug)]
struct Watched {
    prefixes: Mutex<Vec<(String, watch::Sender<u64>)>>,
    /// The last revision that was told of.
    revision: Mutex<u64>,
    epoch: watch::Sender<u64>,
}

impl Sqlite {
    pub async fn open(path: &Path) -> Result<Self, OpenError> {
        let opened = tokio::task::spawn_blocking({
            let path = path.to_owned();
            move || connect(&path).map_err(|source| OpenError::Sqlite { path, source })
        });
        let (connection, revision, epoch) = opened.await.map_err(OpenError::Lost)??;
        let connection = Arc::new(Mutex::new(connection));
        let watched = Arc::new(Watched {
            prefixes: Mutex::default(),
            revision: Mutex::new(revision),
            epoch: watch::Sender::new(epoch),
        });
        let poll = AbortOnDropHandle::new(tokio::spawn(poll(Arc::clone(&connection), Arc::clone(&watched))));
        Ok(Self(Arc::new(File { connection, watched, epoch: Mutex::new(epoch), _poll: poll })))
    }

    pub async fn get(&self, key: &str) -> Result<Option<Value>, StoreError> {
        let key = key.to_owned();
        self.run(move |connection| {
            let mut statement = connection.prepare_cached("SELECT value, revision FROM entries WHERE key = ?1")?;
            Ok(Ok(statement.query_row([key], |row| value(row.get(0)?, row.get(1)?)).optional()?))
        })
        .await
    }

    pub async fn list(&self, prefix: &str) -> Result<Vec<(String, Value)>, StoreError> {
        let prefix = prefix.to_owned();
        self.run(move |connection| {
            let select = "SELECT key, value, revision FROM entries
                WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 ORDER BY key";
            let mut statement = connection.prepare_cached(select)?;
            let rows = statement.query_map([prefix], |row| Ok((row.get(0)?, value(row.get(1)?, row.get(2)?)?)))?;
            Ok(Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?))
        })
        .await
    }

    pub async fn last(&self, prefix: &str, most: usize) -> Result<Vec<(String, Value)>, StoreError> {
        let (prefix, most) = (prefix.to_owned(), i64::try_from(most).unwrap_or(i64::MAX));
        self.run(move |connection| {
            let select = "SELECT key, value, revision FROM entries
                WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 ORDER BY key DESC LIMIT ?2";
            let mut statement = connection.prepare_cached(select)?;
            let entry = |row: &Row<'_>| Ok((row.get(0)?, value(row.get(1)?, row.get(2)?)?));
            let rows = statement.query_map(params![prefix, most], entry)?;
            Ok(Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?))
        })
        .await
    }

    pub async fn commit(&self, fence: &Fence, conditions: &[Condition], writes: Vec<Write>) -> Result<u64, StoreError> {
        let (epoch, conditions) = (fence.epoch, conditions.to_vec());
        let watched = Arc::clone(&self.0.watched);
        self.run(move |connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            match write(&transaction, epoch, &conditions, &writes)? {
                Ok(revision) => {
                    transaction.commit()?;
                    // Within the connection's turn, so that revisions are told in their order.
                    watched.tell(revision, |prefix| writes.iter().any(|write| write.key().starts_with(prefix)));
                    Ok(Ok(revision))
                }
                refused => Ok(refused),
            }
        })
        .await
    }

    pub fn watch(&self, prefix: &str) -> watch::Receiver<u64> {
        let mut prefixes = self.0.watched.prefixes.lock();
        prefixes.retain(|(_, sender)| sender.receiver_count() > 0);
        let sender = match prefixes.iter().find(|(known, _)| known == prefix) {
            Some((_, sender)) => sender,
            None => {
                prefixes.push((prefix.to_owned(), watch::Sender::new(0)));
                &prefixes[prefixes.len() - 1].1
            }
        };
        sender.subscribe()
    }

    pub async fn campaign(&self, node: &Name, address: &str) -> Result<Leadership, StoreError> {
        let (node, address, own) = (node.to_string(), address.to_owned(), Arc::clone(&self.0));
        let epoch = self
            .run(move |connection| {
                let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
                let (_, epoch) = state(&transaction)?;
                let mut own = own.epoch.lock();
                if *own != epoch {
                    return Ok(Err(StoreError::Fenced(*own)));
                }
                let next = epoch + 1;
                let update = "UPDATE state SET epoch = ?1, node = ?2, address = ?3";
                transaction.execute(update, params![signed(next), node, address])?;
                transaction.commit()?;
                *own = next;
                Ok(Ok(next))
            })
            .await?;
        let (sender, lost) = watch::channel(false);
        let (held, dropped) = oneshot::channel::<()>();
        self.0.watched.superseded_by(epoch);
        let mut newest = self.0.watched.epoch.subscribe();
        // Ends with the leadership or with the store.
        tokio::spawn(async move {
            tokio::select! {
                _ = newest.wait_for(|newest| *newest > epoch) => {}
                _ = dropped => {}
            }
            sender.send_replace(true);
        });
        Ok(Leadership { fence: Fence { epoch, key: "".into() }, lost, until: None, held })
    }

    pub async fn leader(&self) -> Result<Option<Leader>, StoreError> {
        self.run(|connection| {
            let select = "SELECT node, address, epoch FROM state WHERE node <> ''";
            let row = connection.query_row(select, [], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, unsigned(row.get(2)?)))
            });
            let Some((node, address, epoch)) = row.optional()? else { return Ok(Ok(None)) };
            let node = Name::parse(&node).map_err(|_| StoreError::Corrupt { key: "leader".into() });
            Ok(node.map(|node| Some(Leader { node, address, epoch })))
        })
        .await
    }

    /// Runs on a thread of its own, within the deadline. One that is late ends by itself.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.0.connection);
        let done = tokio::task::spawn_blocking(move || {
            let mut connection = connection.try_lock_for(DEADLINE).ok_or_else(|| unavailable("it is busy"))?;
            work(&mut connection).map_err(unavailable)?
        });
        match tokio::time::timeout(DEADLINE, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(lost)) => Err(unavailable(lost)),
            Err(late) => Err(unavailable(late)),
        }
    }
}

impl Watched {
    fn tell(&self, revision: u64, concerned: impl Fn(&str) -> bool) {
        *self.revision.lock() = revision;
        for (prefix, sender) in &*self.prefixes.lock() {
            if concerned(prefix) {
                sender.send_modify(|changes| *changes += 1);
            }
        }
    }

    fn superseded_by(&self, epoch: u64) {
        self.epoch.send_if_modified(|newest| std::mem::replace(newest, epoch.max(*newest)) < epoch);
    }
}

/// Opens the file, and supersedes whoever had it: its revision and the new epoch.
fn connect(path: &Path) -> rusqlite::Result<(Connection, u64, u64)> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // What was answered is on the disk.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute_batch(SCHEMA)?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute("UPDATE state SET epoch = epoch + 1, node = '', address = ''", [])?;
    let (revision, epoch) = state(&transaction)?;
    transaction.commit()?;
    Ok((connection, revision, epoch))
}

fn write(
    transaction: &Transaction<'_>,
    fence: u64,
    conditions: &[Condition],
    writes: &[Write],
) -> rusqlite::Result<Result<u64, StoreError>> {
    let (revision, epoch) = state(transaction)?;
    if epoch != fence {
        return Ok(Err(StoreError::Fenced(fence)));
    }
    let mut look = transaction.prepare_cached("SELECT revision FROM entries WHERE key = ?1")?;
    for condition in conditions {
        let (key, expected) = match condition {
            Condition::Absent(key) => (key, None),
            Condition::At(key, revision) => (key, Some(*revision)),
        };
        let found = look.query_row([key], |row| row.get(0)).optional()?.map(unsigned);
        if found != expected {
            return Ok(Err(StoreError::Conflict(key.clone())));
        }
    }
    let revision = revision + 1;
    let mut put =
        transaction.prepare_cached("INSERT OR REPLACE INTO entries (key, value, revision) VALUES (?1, ?2, ?3)")?;
    let mut delete = transaction.prepare_cached("DELETE FROM entries WHERE key = ?1")?;
    for write in writes {
        match write {
            Write::Put(key, value) => put.execute(params![key, &value[..], signed(revision)])?,
            Write::Delete(key) => delete.execute([key])?,
        };
    }
    transaction.prepare_cached("UPDATE state SET revision = ?1")?.execute([signed(revision)])?;
    Ok(Ok(revision))
}

/// Revision and epoch.
fn state(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    let mut statement = connection.prepare_cached("SELECT revision, epoch FROM state")?;
    statement.query_row([], |row| Ok((unsigned(row.get(0)?), unsigned(row.get(1)?))))
}

async fn poll(connection: Arc<Mutex<Connection>>, watched: Arc<Watched>) {
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (connection, watched) = (Arc::clone(&connection), Arc::clone(&watched));
        let looked = tokio::task::spawn_blocking(move || {
            let connection = connection.lock();
            let (revision, epoch) = state(&connection)?;
            watched.superseded_by(epoch);
            // Ours were told of within the turns of their commits.
            let others = revision > *watched.revision.lock();
            if others {
                watched.tell(revision, |_| true);
            }
            Ok::<(), rusqlite::Error>(())
        });
        if let Ok(Err(error)) = looked.await {
            tracing::warn!(%error, "the store's file cannot be read");
        }
    }
}

fn value(bytes: Vec<u8>, revision: i64) -> rusqlite::Result<Value> {
    Ok(Value { bytes: Bytes::from(bytes), revision: unsigned(revision) })
}

fn unavailable(problem: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::Unavailable(problem.into())
}

/// Numbers begin at 0 here and count commits and starts.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "sqlite_tests.rs"]
mod tests;
