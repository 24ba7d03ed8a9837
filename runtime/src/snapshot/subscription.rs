//! The Snapshot that is served now, and how it is replaced: by a file that changes, or by pushes.
//!
//! ```text
//! start ──▶ file is followed: [`Subscription::watch`]
//! resume ─▶ file is kept for the next start alone, and pushes replace what is served ([`crate::link`])
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use bytes::Bytes;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::snapshot::Snapshot;
use tokio::sync::watch;

use super::{MAX_FILE, Refused, compile, open, unwrap};
use crate::audit::{Audit, Event, Hash, clipped};
use crate::drain::Drain;
use crate::file::Watched;
use crate::generations::{Found, Generations};
use crate::telemetry::{Chain, Metrics};

const POLL: Duration = Duration::from_millis(250);

/// The newest Snapshot that was accepted.
#[derive(Debug)]
pub struct Subscription {
    path: PathBuf,
    current: ArcSwap<Snapshot>,
    file: Mutex<Watched>,
    /// Says that `current` was replaced; carries the version.
    changed: watch::Sender<u64>,
    rejected: Family<Reason, Counter>,
    accepted: Counter,
    version: Gauge,
    audit: Audit,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// What stays of a Snapshot beside its compiled form where pushes replace it.
#[derive(Debug)]
pub(crate) struct Kept {
    pub generations: Generations,
    /// The encoded Snapshot that is served; empty for none.
    pub encoded: Bytes,
}

impl Subscription {
    /// Reads the file for the first time. Blocks on the file system.
    pub fn start(path: impl AsRef<Path>, metrics: &Metrics, audit: &Audit) -> Result<Self, Refused> {
        let path = path.as_ref().to_owned();
        let mut file = Watched::new(vec![path.clone()], MAX_FILE);
        let (snapshot, sha256) = match file.changed()?.as_deref() {
            Some([sealed]) => (open(sealed)?, Hash::of(sealed)),
            _ => return Err(Refused::Malformed),
        };
        let subscription = Self::new(path, snapshot, file, metrics, audit);
        subscription.tell_accepted(sha256);
        Ok(subscription)
    }

    /// What was kept when the process ran last: the newest generation, or the one before where that is not good, or
    /// nothing. For pushes; the file is not followed. Blocks on the file system.
    pub(crate) fn resume(path: &Path, metrics: &Metrics, audit: &Audit) -> (Self, Kept) {
        let mut generations = Generations::new(path, MAX_FILE);
        let found = generations.read(|sealed| {
            let encoded = unwrap(sealed)?;
            Ok::<_, Refused>((compile(encoded.clone())?, encoded, Hash::of(sealed)))
        });
        let (good, bad) = match found {
            Found::Newest(good) => (Some(good), Vec::new()),
            Found::Previous { value, newest } => (Some(value), vec![newest]),
            Found::Neither { newest, previous } => (None, vec![newest, previous]),
            Found::Nothing => (None, Vec::new()),
        };
        let (snapshot, encoded, sha256) = match good {
            Some((snapshot, encoded, sha256)) => (snapshot, encoded, Some(sha256)),
            None => (Snapshot::default(), Bytes::new(), None),
        };
        let file = Watched::new(Vec::new(), MAX_FILE);
        let subscription = Self::new(path.to_owned(), snapshot, file, metrics, audit);
        for refused in bad {
            subscription.tell_refused(refused.reason(), &Chain(&refused).to_string());
        }
        match sha256 {
            Some(sha256) => subscription.tell_accepted(sha256),
            None => tracing::warn!(path = %path.display(), "there is no good snapshot; the first push is waited for"),
        }
        (subscription, Kept { generations, encoded })
    }

    fn new(path: PathBuf, snapshot: Snapshot, file: Watched, metrics: &Metrics, audit: &Audit) -> Self {
        Self {
            path,
            changed: watch::Sender::new(snapshot.version),
            version: metrics.register("snapshot_version", "The version that is served", Gauge::default()),
            accepted: metrics.register("snapshot_accepted", "Snapshots taken into service", Counter::default()),
            rejected: metrics.family("snapshot_rejected", "Snapshots refused; the last good one stayed"),
            current: ArcSwap::from_pointee(snapshot),
            file: Mutex::new(file),
            audit: audit.clone(),
        }
    }

    /// Whether nothing is served yet: no push has come.
    pub fn is_empty(&self) -> bool {
        self.load().version == 0
    }

    /// Serves a pushed Snapshot, which was checked; the SHA-256 is that of the file it was written to.
    pub(crate) fn replace(&self, snapshot: Snapshot, sha256: Hash) {
        let version = snapshot.version;
        self.current.store(Arc::new(snapshot));
        self.tell_accepted(sha256);
        self.changed.send_replace(version);
        tracing::info!(version, "snapshot taken");
    }

    /// Counts and records that something was not taken.
    pub(crate) fn tell_refused(&self, reason: &'static str, problem: &str) {
        let serving = self.load().version;
        self.rejected.get_or_create(&Reason { reason }).inc();
        tracing::error!(
            path = %self.path.display(),
            reason,
            problem,
            serving,
            "snapshot refused, the last good one stays"
        );
        self.audit.record(Event::SnapshotRefused { reason, problem: clipped(&problem), serving });
    }

    /// The Snapshot to serve from. A request asks once and keeps it to its end.
    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Like [`Subscription::current`], without touching the count of references: for a short look.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }

    /// Tells of each replacement, with the version.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Follows the file until stopped.
    pub async fn watch(self: Arc<Self>, drain: Drain) {
        let mut refused: Option<String> = None;
        loop {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = drain.stopped() => return,
            }
            let subscription = self.clone();
            let reload = tokio::task::spawn_blocking(move || subscription.reload());
            match reload.await.unwrap_or_else(|lost| Err(Refused::Unreadable(std::io::Error::other(lost)))) {
                Ok(true) => refused = None,
                Ok(false) => {}
                Err(error) => {
                    let problem = Chain(&error).to_string();
                    // A file that stays unreadable is told once, not twice a second.
                    if matches!(error, Refused::Unreadable(_)) && refused.as_ref() == Some(&problem) {
                        continue;
                    }
                    self.tell_refused(error.reason(), &problem);
                    refused = Some(problem);
                }
            }
        }
    }

    /// Reads the file again if it changed, and says whether a new Snapshot is served. Blocks on the
    /// file system.
    pub fn reload(&self) -> Result<bool, Refused> {
        let mut file = self.file.lock();
        let Some(content) = file.changed()? else { return Ok(false) };
        let content = content.concat();
        let snapshot = open(&content)?;
        let current = self.current.load();
        if snapshot == **current {
            return Ok(false);
        }
        if snapshot.version <= current.version {
            return Err(Refused::Version { found: snapshot.version, current: current.version });
        }
        self.replace(snapshot, Hash::of(&content));
        Ok(true)
    }

    fn tell_accepted(&self, sha256: Hash) {
        let version = self.load().version;
        self.accepted.inc();
        self.version.set(i64::try_from(version).unwrap_or(i64::MAX));
        self.audit.record(Event::SnapshotAccepted { version, sha256 });
    }
}
