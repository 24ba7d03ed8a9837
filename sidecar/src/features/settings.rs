//! Where features are kept and how long a tier may take. Static: read once, at start.

use std::path::PathBuf;
use std::time::Duration;

use spillway_core::units::ByteSize;
use spillway_runtime::store::{InvalidStore, RedisSettings, TlsSettings};

#[derive(Clone, Debug)]
pub struct FeatureSettings {
    /// The in-process tier.
    pub memory: MemorySettings,
    /// The regional tier; none: the in-process tier is filled from the durable one.
    pub redis: Option<RedisSettings>,
    /// The durable tier.
    pub store: StoreSettings,
}

#[derive(Clone, Copy, Debug)]
pub struct MemorySettings {
    /// Keys, rows and their bookkeeping together.
    pub size: ByteSize,
    /// How long a row is served without asking again while changes are heard.
    pub keep: Duration,
    /// How long an absence is remembered, and a row where nobody tells of changes: no Redis, and a store that
    /// others write too. At most 5 s.
    pub keep_absent: Duration,
}

impl MemorySettings {
    pub const MAX_KEEP_ABSENT: Duration = Duration::from_secs(5);
}

impl Default for MemorySettings {
    fn default() -> Self {
        Self { size: ByteSize(64 << 20), keep: Duration::from_secs(60), keep_absent: Duration::from_secs(1) }
    }
}

// One value for each process: its size matters to nobody.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum StoreSettings {
    Cassandra(CassandraSettings),
    Sqlite(SqliteSettings),
}

#[derive(Clone, Debug)]
pub struct CassandraSettings {
    /// `host:port`, some nodes of the ring.
    pub contact_points: Vec<String>,
    /// Lower-case letters, digits and `_`.
    pub keyspace: String,
    /// Reads stay in this data centre; none: every node is as near as another.
    pub data_center: Option<String>,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
    pub tls: Option<TlsSettings>,
    /// The most that a read may take of a request's time.
    pub timeout: Duration,
    /// The most that a write may take.
    pub write_timeout: Duration,
    /// A second node is asked when the first has not answered for so long; none: never.
    pub speculate_after: Option<Duration>,
    /// Statements at once.
    pub concurrency: usize,
    /// Creates keyspace and table when they are not there.
    pub create_schema: bool,
    /// Of a keyspace that is created here.
    pub replication_factor: u8,
}

impl Default for CassandraSettings {
    fn default() -> Self {
        Self {
            contact_points: Vec::new(),
            keyspace: "spillway".into(),
            data_center: None,
            username: None,
            password_file: None,
            tls: None,
            timeout: Duration::from_millis(20),
            write_timeout: Duration::from_secs(2),
            speculate_after: None,
            concurrency: 256,
            create_schema: false,
            replication_factor: 3,
        }
    }
}

#[derive(Clone, Debug)]
pub struct SqliteSettings {
    pub path: PathBuf,
    /// The most that a read may take of a request's time.
    pub timeout: Duration,
    /// Reading connections, each on a blocking thread while it reads.
    pub connections: usize,
}

impl Default for SqliteSettings {
    fn default() -> Self {
        Self { path: PathBuf::new(), timeout: Duration::from_millis(50), connections: 4 }
    }
}

/// The settings cannot be used. The operator's fault; a retry is of no use.
#[derive(Debug, thiserror::Error)]
pub enum InvalidSettings {
    #[error(transparent)]
    Store(#[from] InvalidStore),
    #[error("the SQLite file cannot be opened or prepared")]
    Sqlite(#[source] rusqlite::Error),
}
