//! The audit log of one process: a file of [`spillway_core::audit`] records, and its head beside it.
//!
//! ```text
//! record() --events--------------------> queue --100 ms--> writer --> audit.log, then audit.log.head
//! denied() --equal ones of a second----/   full: dropped, counted, and a `lost` record says how many
//! record() --events--> tap, if there is one: full: dropped, and counted by whose tap it is
//! audit.log --full--> audit.log.1 --> audit.log.2 … the oldest is deleted
//! ```
//!
//! The rule: whoever records never waits, and every gap is told in the log itself. The file is only ever
//! appended to: what a crash left of a line stays, and a `recovered` record behind it says what it was.
//! On the disk itself the newest second may be missing after a power cut.

mod file;
mod queue;
mod verify;
mod writer;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::metrics::counter::Counter;
pub use spillway_core::audit::{Denial, Event, Hash, Timestamp};
use spillway_core::identity::SpiffeId;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use self::file::LogFile;
use self::queue::Queue;
pub use self::verify::{HeadToCheck, Report, VerifyError, verify};
use self::writer::Writer;
use crate::telemetry::Metrics;

/// Where the audit log is, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditSettings {
    /// Made if it is not there, continued if it is. No other process may write to it.
    pub path: PathBuf,
    /// Bytes of a file: the record that reaches them is its last.
    pub rotate: u64,
    /// Full files that are kept.
    pub keep: u32,
}

/// Cheap to clone; all clones write to the same log. The writer ends when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Audit {
    log: Option<Arc<Shared>>,
    tap: Option<Tap>,
}

#[derive(Debug)]
struct Shared {
    queue: Arc<Queue>,
    dropped: Counter,
}

/// Who hears of records beside the log.
#[derive(Clone, Debug)]
struct Tap {
    to: mpsc::Sender<(Timestamp, Event)>,
    lost: Counter,
}

impl Audit {
    /// Continues the log that the settings name, and records that this process has started: `process` is
    /// what it is, such as `gateway`, and `id` who. Without settings it is [`Audit::off`].
    ///
    /// Counts `spillway_audit_records_total`, `spillway_audit_dropped_total` and
    /// `spillway_audit_failures_total`. Blocks on the file system.
    pub fn start(
        settings: Option<&AuditSettings>,
        process: &'static str,
        id: &SpiffeId,
        metrics: &Metrics,
    ) -> io::Result<Self> {
        let Some(settings) = settings else { return Ok(Self::off()) };
        let audit = Self::open(settings, metrics)?;
        audit.record(Event::Started { process, id: id.to_string(), version: env!("CARGO_PKG_VERSION") });
        Ok(audit)
    }

    /// Records nothing.
    pub fn off() -> Self {
        Self { log: None, tap: None }
    }

    /// Whatever this value and its clones record goes there, too, with or without a log; denials do not, since anybody
    /// can make a flood of them. `lost` counts what finds no room there.
    pub fn tapped(self, to: mpsc::Sender<(Timestamp, Event)>, lost: Counter) -> Self {
        Self { tap: Some(Tap { to, lost }), ..self }
    }

    fn open(settings: &AuditSettings, metrics: &Metrics) -> io::Result<Self> {
        let log = LogFile::open(settings.clone())?;
        let counter = |name, help| metrics.register(name, help, Counter::default());
        let records = counter("audit_records", "Records of the audit log");
        let dropped = counter("audit_dropped", "Audit records dropped because the writer was behind");
        let failures = counter("audit_failures", "Writes of the audit log that failed and are tried again");
        let queue = Arc::new(Queue::default());
        let writer = Writer::new(log, queue.clone(), records, failures);
        // Not joined: it may be stuck on a disk. `flush` is the bounded way to see everything written.
        std::thread::Builder::new().name("audit-log".into()).spawn(move || writer.run())?;
        Ok(Self { log: Some(Arc::new(Shared { queue, dropped })), tap: None })
    }

    pub fn record(&self, event: Event) {
        let time = SystemTime::now().into();
        if let Some(Tap { to, lost }) = &self.tap
            && let Err(TrySendError::Full(_)) = to.try_send((time, event.clone()))
        {
            lost.inc();
        }
        self.push(|queue| queue.push(time, event));
    }

    /// Records a decision against somebody; equal ones of a second are one record. `denial` is asked for
    /// it only if there is a log.
    pub fn denied(&self, denial: impl FnOnce() -> Denial) {
        self.push(|queue| queue.push_denial(SystemTime::now().into(), Instant::now(), denial()));
    }

    /// Waits until all records so far are on the disk, at most this long. Blocks.
    pub fn flush(&self, within: Duration) {
        if let Some(shared) = &self.log {
            shared.queue.flush(Instant::now() + within);
        }
    }

    /// Records that the process stops, and flushes. Blocks.
    pub fn stop(&self, within: Duration) {
        self.record(Event::Stopped);
        self.flush(within);
    }

    fn push(&self, push: impl FnOnce(&Queue) -> bool) {
        if let Some(shared) = &self.log
            && !push(&shared.queue)
        {
            shared.dropped.inc();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// A text of unknown length, such as a list of faults, as it goes into a record.
pub fn clipped(text: &dyn std::fmt::Display) -> String {
    const MOST: usize = 1_024;
    text.to_string().chars().take(MOST).collect()
}
