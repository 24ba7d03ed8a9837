//! What the feature channel says of kept results.
//!
//! The rule: a result that depends on feature rows is given only if it knows every change of them that a
//! writer was, or may have been, told is confirmed. Applied first, acknowledged after: when a message's
//! call returns, nothing older is given any more.
//!
//! ```text
//!            results that depend on rows
//! no channel: are given for LONGEST_UNHEARD after they were made (sidecars confirm writes by themselves)
//! hearing:    are given; a change removes those of its rows, a flush all
//! deaf:       are neither given, nor shared, nor stored: writers do not wait for this gateway
//! ```
//! Another gateway's result, and a sidecar's rows, say the number up to which they know the changes; this
//! gateway takes them if no change that it knows of came later.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spillway_core::cache::coherence::{Coherence, Settings, Tick};
use spillway_core::cache::key::{Dependencies, dependency};
use spillway_core::feature::{Heard, RowKey};
use spillway_runtime::feature_changes::Listener;

use super::Results;
use super::memory::Memory;

/// How long a result is given where no channel tells of changes.
pub const LONGEST_UNHEARD: Duration = Duration::from_secs(1);

pub struct Changes {
    /// Whether the channel is heard at a moment; `None` where there is no channel.
    hears: Option<Box<Hears>>,
    origin: Instant,
    /// Held over the judgement on a result and what follows from it; taken before a shard's lock.
    pub coherence: Mutex<Coherence>,
    /// Counts the flushes.
    generation: AtomicU64,
}

pub type Hears = dyn Fn(Instant) -> bool + Send + Sync;

/// What a result depends on, as far as its truth goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// On no row.
    Timeless,
    /// On rows whose changes are numbered.
    Numbered,
    /// On rows whose changes nobody tells.
    Unheard,
}

impl Changes {
    pub fn new(hears: Option<Box<Hears>>, origin: Instant) -> Self {
        let coherence = Mutex::new(Coherence::new(&Settings::default()));
        Self { hears, origin, coherence, generation: AtomicU64::new(0) }
    }

    pub fn truth(&self, dependencies: &Dependencies) -> Truth {
        match (dependencies.rows.is_empty(), self.is_numbered()) {
            (true, _) => Truth::Timeless,
            (false, true) => Truth::Numbered,
            (false, false) => Truth::Unheard,
        }
    }

    /// Whether there is a channel that tells of changes.
    pub fn is_numbered(&self) -> bool {
        self.hears.is_some()
    }

    /// Whether results that depend on rows may be given; `now` was read after the request came.
    pub fn hears(&self, now: Duration) -> bool {
        self.hears.as_ref().is_none_or(|hears| hears(self.origin + now))
    }

    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// A message, with the names of the rows that it is about.
    pub fn changed<'a>(&self, memory: &Memory, number: u64, names: impl IntoIterator<Item = &'a str>) {
        let rows: Vec<u64> = names.into_iter().map(dependency).collect();
        let mut coherence = self.coherence.lock();
        match coherence.message(number, rows.iter().copied()) {
            Heard::Next => memory.metrics.invalidated("feature", memory.invalidate(&rows)),
            Heard::Gap => {
                self.end_generation();
                drop(coherence);
                self.sweep(memory);
            }
            Heard::Nothing => {}
        }
    }

    /// Something may have been missed; the changes up to `number` are known to have been made.
    pub fn flush(&self, memory: &Memory, number: u64) {
        let mut coherence = self.coherence.lock();
        coherence.lost();
        let _ = coherence.message(number, []);
        self.end_generation();
        drop(coherence);
        self.sweep(memory);
    }

    /// What a call knew whose rows a sidecar read when it knew the changes up to `sidecar`.
    pub fn knew(coherence: &Coherence, began: Option<Tick>, number: Option<u64>, sidecar: u64) -> Option<Tick> {
        match number {
            Some(number) if sidecar >= number => began,
            _ => coherence.tick_of(sidecar),
        }
    }

    fn end_generation(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// What the last generation left is not given any more; here it goes.
    fn sweep(&self, memory: &Memory) {
        let now = self.generation();
        let swept = memory.retain(|entry| entry.generation.is_none_or(|generation| generation >= now));
        memory.metrics.invalidated("gap", swept);
    }
}

/// The gateway's ears: when a call returns, no older result is given any more.
pub struct Ears(pub Arc<Results>);

impl Listener for Ears {
    fn changed(&mut self, number: u64, rows: &str) -> bool {
        let are_rows = rows.lines().all(|row| RowKey::parse(row).is_some());
        if are_rows {
            self.0.changes.changed(&self.0.memory, number, rows.lines());
        }
        are_rows
    }

    fn flush(&mut self, number: u64) {
        self.0.changes.flush(&self.0.memory, number);
    }

    fn hearing(&mut self, hears: bool) {
        if hears {
            tracing::info!("results: feature changes are heard");
        } else {
            tracing::warn!("results: feature changes are not heard; results made of features are not given");
        }
    }
}
