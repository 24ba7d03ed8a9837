//! The Snapshot in a file: sealed by who writes it, checked and followed by who serves from it.
//!
//! The rule: a file is taken as a whole or not at all, and versions only rise. What is refused leaves
//! the last good Snapshot in place, with a reason and a count.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prost::Message;
use sha2::{Digest, Sha256};
use spillway_core::resource::{Fault, Resource, parse_canonical};
use spillway_core::snapshot::Snapshot;
use spillway_proto::control;
use tokio::sync::watch;

use crate::audit::{Audit, Event, Hash, clipped};
use crate::drain::Drain;
use crate::file::Watched;
use crate::telemetry::{Chain, Metrics};

const POLL: Duration = Duration::from_millis(250);
/// 100,000 resources of a size seen in practice fit; more is a mistake.
const MAX_FILE: u64 = 256 << 20;

/// Why a Snapshot is not taken. The writer's fault; the last good one stays.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("the snapshot file cannot be read")]
    Unreadable(#[from] std::io::Error),
    #[error("this is no sealed snapshot")]
    Malformed,
    #[error("the snapshot's bytes do not match its SHA-256")]
    Checksum,
    #[error("the snapshot's version {found} is not above {current}, which is served")]
    Version { found: u64, current: u64 },
    #[error("the snapshot is not valid: {}", listed(.0))]
    Invalid(Vec<Fault>),
}

impl Refused {
    /// A stable word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "unreadable",
            Self::Malformed => "malformed",
            Self::Checksum => "checksum",
            Self::Version { .. } => "version",
            Self::Invalid(_) => "invalid",
        }
    }
}

/// Encodes resources as a snapshot file. The same resources and version give the same bytes.
pub fn seal(resources: &[Resource], version: u64) -> Vec<u8> {
    let mut resources: Vec<_> = resources
        .iter()
        .map(|resource| control::Resource {
            kind: resource.spec.kind().to_owned(),
            name: resource.name.to_string(),
            spec_json: resource.canonical.clone(),
        })
        .collect();
    resources.sort_by(|one, other| (&one.kind, &one.name).cmp(&(&other.kind, &other.name)));
    let snapshot = control::Snapshot { version, resources }.encode_to_vec();
    let sha256 = Sha256::digest(&snapshot).to_vec();
    control::SealedSnapshot { snapshot: snapshot.into(), sha256: sha256.into() }.encode_to_vec()
}

/// Checks a snapshot file and compiles what is in it.
pub fn open(sealed: &[u8]) -> Result<Snapshot, Refused> {
    let sealed = control::SealedSnapshot::decode(sealed).map_err(|_| Refused::Malformed)?;
    if sealed.snapshot.is_empty() {
        return Err(Refused::Malformed);
    }
    if Sha256::digest(&sealed.snapshot)[..] != sealed.sha256[..] {
        return Err(Refused::Checksum);
    }
    let snapshot = control::Snapshot::decode(sealed.snapshot).map_err(|_| Refused::Malformed)?;
    let mut resources = Vec::with_capacity(snapshot.resources.len());
    let mut faults = Vec::new();
    for control::Resource { kind, name, spec_json } in &snapshot.resources {
        match parse_canonical(kind, name, spec_json) {
            Ok(resource) => resources.push(resource),
            Err(mut found) => faults.append(&mut found),
        }
    }
    if !faults.is_empty() {
        return Err(Refused::Invalid(faults));
    }
    Snapshot::compile(snapshot.version, &resources).map_err(Refused::Invalid)
}

/// The newest Snapshot accepted from a file.
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

impl Subscription {
    /// Reads the file for the first time. Blocks on the file system.
    pub fn start(path: impl AsRef<Path>, metrics: &Metrics, audit: &Audit) -> Result<Self, Refused> {
        let path = path.as_ref().to_owned();
        let mut file = Watched::new(vec![path.clone()], MAX_FILE);
        let (snapshot, sha256) = match file.changed()?.as_deref() {
            Some([sealed]) => (open(sealed)?, Hash::of(sealed)),
            _ => return Err(Refused::Malformed),
        };
        let subscription = Self {
            path,
            changed: watch::Sender::new(snapshot.version),
            version: metrics.register("snapshot_version", "The version that is served", Gauge::default()),
            accepted: metrics.register("snapshot_accepted", "Snapshots taken into service", Counter::default()),
            rejected: metrics.family("snapshot_rejected", "Snapshots refused; the last good one stayed"),
            current: ArcSwap::from_pointee(snapshot),
            file: Mutex::new(file),
            audit: audit.clone(),
        };
        subscription.tell_accepted(sha256);
        Ok(subscription)
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
                    self.rejected.get_or_create(&Reason { reason: error.reason() }).inc();
                    tracing::error!(
                        path = %self.path.display(),
                        reason = error.reason(),
                        problem,
                        serving = self.load().version,
                        "snapshot refused, the last good one stays"
                    );
                    self.audit.record(Event::SnapshotRefused {
                        reason: error.reason(),
                        problem: clipped(&problem),
                        serving: self.load().version,
                    });
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
        let version = snapshot.version;
        self.current.store(Arc::new(snapshot));
        self.tell_accepted(Hash::of(&content));
        self.changed.send_replace(version);
        tracing::info!(version, "snapshot taken");
        Ok(true)
    }

    fn tell_accepted(&self, sha256: Hash) {
        let version = self.load().version;
        self.accepted.inc();
        self.version.set(i64::try_from(version).unwrap_or(i64::MAX));
        self.audit.record(Event::SnapshotAccepted { version, sha256 });
    }
}

/// The first faults, so that one log line stays one.
fn listed(faults: &[Fault]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<String> = faults.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = faults.len().saturating_sub(SHOWN);
    if more == 0 { shown.join("; ") } else { format!("{}; and {more} more", shown.join("; ")) }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
