//! L3 embedded: one SQLite file (WAL) that the sidecars of a machine share.
//!
//! The rule: the database never runs on an async thread, and a read holds one of a few connections.
//! Every write also appends the row's name to `changes`; each process polls that table and so hears,
//! within [`POLL`], what the others have overwritten. Deletions are kept until their retention ends.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior, params};
use spillway_core::feature::Stored;
use tokio::sync::Semaphore;
use tokio::time::{MissedTickBehavior, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::listen::FileListener;
use super::now_us;
use super::settings::{InvalidSettings, SqliteSettings};
use super::store::{Answer, Change, Store, Wanted, WriteFailed};
use spillway_runtime::store::FaultLog;

/// How often a process looks for what others have written.
const POLL: Duration = Duration::from_millis(100);

/// Names kept in `changes`. A process that falls further behind finds a gap and flushes.
const CHANGES: i64 = 100_000;

/// Rows past their retention that one sweep removes, and how often it comes.
const SWEEP: usize = 1_000;
const SWEEP_EVERY: Duration = Duration::from_secs(10);

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS features (
    entity_key TEXT NOT NULL,
    fg_id      TEXT NOT NULL,
    v          BLOB NOT NULL,
    deleted    INTEGER NOT NULL,
    event_us   INTEGER NOT NULL,
    schema_ver INTEGER NOT NULL,
    expires_us INTEGER NOT NULL,
    PRIMARY KEY (entity_key, fg_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS features_by_expiry ON features (expires_us);
CREATE TABLE IF NOT EXISTS changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name   TEXT NOT NULL
) STRICT;
";

const READ: &str = "SELECT v FROM features WHERE entity_key = ?1 AND fg_id = ?2 AND expires_us > ?3";

/// The order of `Stored::supersedes`: time, then deletion, then bytes.
const WRITE: &str = "
INSERT INTO features (entity_key, fg_id, v, deleted, event_us, schema_ver, expires_us)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
ON CONFLICT (entity_key, fg_id) DO UPDATE SET
    v = excluded.v, deleted = excluded.deleted, event_us = excluded.event_us,
    schema_ver = excluded.schema_ver, expires_us = excluded.expires_us
WHERE (excluded.event_us, excluded.deleted, excluded.v) > (event_us, deleted, v)";

pub(super) struct Sqlite {
    settings: SqliteSettings,
    readers: Arc<Mutex<Vec<Connection>>>,
    /// As many permits as readers.
    free: Arc<Semaphore>,
    writer: Arc<Mutex<Connection>>,
    faults: Arc<FaultLog>,
}

impl Sqlite {
    pub fn open(settings: &SqliteSettings) -> Result<Self, InvalidSettings> {
        let count = settings.connections.max(1);
        let writer = connect(&settings.path).map_err(InvalidSettings::Sqlite)?;
        writer.execute_batch(SCHEMA).map_err(InvalidSettings::Sqlite)?;
        let readers: Result<Vec<_>, _> = (0..count).map(|_| connect(&settings.path)).collect();
        Ok(Self {
            settings: settings.clone(),
            readers: Arc::new(Mutex::new(readers.map_err(InvalidSettings::Sqlite)?)),
            free: Arc::new(Semaphore::new(count)),
            writer: Arc::new(Mutex::new(writer)),
            faults: Arc::new(FaultLog::of("sqlite")),
        })
    }

    /// Tells `listener` of what is written to the file, until the handle is dropped.
    pub fn listen<T: Send + Sync + 'static>(
        &self,
        listener: FileListener<T>,
    ) -> Result<AbortOnDropHandle<()>, InvalidSettings> {
        let connection = connect(&self.settings.path).map_err(InvalidSettings::Sqlite)?;
        Ok(AbortOnDropHandle::new(tokio::spawn(poll(connection, self.writer.clone(), listener))))
    }
}

#[async_trait]
impl Store for Sqlite {
    fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    async fn read(&self, rows: &[Wanted], deadline: Instant) -> Vec<Answer> {
        let all_failed = || vec![Answer::Failed; rows.len()];
        let Ok(Ok(permit)) = timeout_at(deadline.into(), self.free.clone().acquire_owned()).await else {
            return all_failed();
        };
        let readers = self.readers.clone();
        let rows_owned = rows.to_vec();
        let faults = self.faults.clone();
        // A read that is no longer waited for ends by itself and keeps its permit until then.
        let read = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let connection = readers.lock().pop()?;
            let answers = read(&connection, &rows_owned, deadline, &faults);
            readers.lock().push(connection);
            Some(answers)
        });
        match timeout_at(deadline.into(), read).await {
            Ok(Ok(Some(answers))) => answers,
            Ok(Ok(None) | Err(_)) | Err(_) => all_failed(),
        }
    }

    async fn write(&self, changes: &[Change]) -> Vec<Result<Option<Answer>, WriteFailed>> {
        let count = changes.len();
        let writer = self.writer.clone();
        let changes = changes.to_vec();
        let written = tokio::task::spawn_blocking(move || write(&mut writer.lock(), &changes));
        let failed = match written.await {
            Ok(Ok(answers)) => return answers.into_iter().map(|answer| Ok(Some(answer))).collect(),
            Ok(Err(error)) => {
                self.faults.say("write", kind(&error), &error);
                failed(&error)
            }
            Err(_) => WriteFailed::Unreached,
        };
        vec![Err(failed); count]
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(2))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // With WAL this loses no committed write when the process dies, only when the machine does.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection)
}

fn read(connection: &Connection, rows: &[Wanted], deadline: Instant, faults: &FaultLog) -> Vec<Answer> {
    let now_us = now_us();
    let one = |row: &Wanted| {
        if Instant::now() >= deadline {
            return Answer::Failed;
        }
        let found = connection.prepare_cached(READ).and_then(|mut statement| {
            statement
                .query_row(params![row.key.entity(), row.key.group(), now_us], |row| row.get::<_, Vec<u8>>(0))
                .optional()
        });
        match found {
            Ok(Some(bytes)) => Answer::Found(bytes.into()),
            Ok(None) => Answer::Absent,
            Err(error) => {
                faults.say("read", kind(&error), &error);
                Answer::Failed
            }
        }
    };
    rows.iter().map(one).collect()
}

fn kind(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => "busy",
        Some(ErrorCode::DiskFull) => "full",
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => "read-only",
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => "corrupt",
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => "io",
        Some(_) | None => "statement",
    }
}

/// Whether the same change may fare better: not where the file or the statement is at fault.
fn failed(error: &rusqlite::Error) -> WriteFailed {
    match kind(error) {
        "busy" | "full" | "io" => WriteFailed::Unreached,
        _ => WriteFailed::Refused,
    }
}

/// All changes or none.
fn write(connection: &mut Connection, changes: &[Change]) -> rusqlite::Result<Vec<Answer>> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut answers = Vec::with_capacity(changes.len());
    {
        let mut upsert = transaction.prepare_cached(WRITE)?;
        let mut name = transaction.prepare_cached("INSERT INTO changes (name) VALUES (?1)")?;
        let mut read = transaction.prepare_cached(READ)?;
        for change in changes {
            let (entity, group) = (change.key.entity(), change.key.group());
            let (bytes, deleted) = (change.stored.bytes(), matches!(change.stored, Stored::Deleted { .. }));
            let event_us = change.stored.event_us();
            upsert.execute(params![
                entity,
                group,
                &bytes[..],
                deleted,
                event_us,
                change.schema_version,
                change.expires_us
            ])?;
            name.execute([change.key.as_str()])?;
            let now: Option<Vec<u8>> = read.query_row(params![entity, group, i64::MIN], |row| row.get(0)).optional()?;
            answers.push(now.map_or(Answer::Absent, |bytes| Answer::Found(bytes.into())));
        }
        let prune = "DELETE FROM changes WHERE number <= (SELECT max(number) FROM changes) - ?1";
        transaction.prepare_cached(prune)?.execute([CHANGES])?;
    }
    transaction.commit()?;
    Ok(answers)
}

async fn poll<T: Send + Sync + 'static>(
    mut connection: Connection,
    writer: Arc<Mutex<Connection>>,
    mut listener: FileListener<T>,
) {
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = None;
    let mut swept = Instant::now();
    loop {
        ticks.tick().await;
        let sweep = swept.elapsed() >= SWEEP_EVERY;
        if sweep {
            swept = Instant::now();
        }
        let writer = writer.clone();
        let looked = tokio::task::spawn_blocking(move || {
            if sweep && let Err(error) = sweep_expired(&writer.lock()) {
                tracing::warn!(%error, "sqlite: rows past their retention were not removed");
            }
            let changes = changes_after(&connection, seen);
            (connection, changes)
        });
        let Ok((back, changes)) = looked.await else { return listener.lost() };
        connection = back;
        match changes {
            Ok(Changes { from_start: Some(last), .. }) => {
                listener.counter(last);
                seen = Some(last);
                listener.hears();
            }
            Ok(Changes { names, .. }) => {
                for (number, name) in names {
                    listener.message(number, &name);
                    seen = Some(number);
                }
                listener.hears();
            }
            Err(error) => {
                tracing::warn!(%error, "sqlite: changes could not be read");
                seen = None;
                listener.lost();
            }
        }
    }
}

struct Changes {
    /// The last number, when nothing was seen before.
    from_start: Option<u64>,
    names: Vec<(u64, String)>,
}

fn changes_after(connection: &Connection, seen: Option<u64>) -> rusqlite::Result<Changes> {
    let Some(seen) = seen else {
        let last: Option<i64> = connection.query_row("SELECT max(number) FROM changes", [], |row| row.get(0))?;
        return Ok(Changes {
            from_start: Some(last.and_then(|last| u64::try_from(last).ok()).unwrap_or(0)),
            names: Vec::new(),
        });
    };
    let mut statement =
        connection.prepare_cached("SELECT number, name FROM changes WHERE number > ?1 ORDER BY number LIMIT 10000")?;
    let seen = i64::try_from(seen).unwrap_or(i64::MAX);
    let rows = statement.query_map([seen], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)))?;
    let names: rusqlite::Result<Vec<_>> =
        rows.map(|row| row.map(|(number, name)| (u64::try_from(number).unwrap_or(0), name))).collect();
    Ok(Changes { from_start: None, names: names? })
}

fn sweep_expired(connection: &Connection) -> rusqlite::Result<usize> {
    let sweep = "DELETE FROM features WHERE (entity_key, fg_id) IN
        (SELECT entity_key, fg_id FROM features WHERE expires_us <= ?1 LIMIT ?2)";
    connection.prepare_cached(sweep)?.execute(params![now_us(), SWEEP as i64])
}
