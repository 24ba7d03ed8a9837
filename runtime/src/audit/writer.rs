//! The one who writes: batches, rotation, the disk once a second; and what did not work, again.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use spillway_core::audit::{Event, Timestamp};

use super::file::LogFile;
use super::queue::{Chores, Queue, Taken};

/// Bytes of one write.
const CHUNK: usize = 64 << 10;
/// What is written is on the disk after this.
const SYNC: Duration = Duration::from_secs(1);

pub(super) struct Writer {
    log: LogFile,
    queue: Arc<Queue>,
    /// What was taken and not appended yet.
    batch: VecDeque<(Timestamp, Event)>,
    /// The first write that is not surely on the disk.
    unsynced: Option<Instant>,
    is_failing: bool,
    records: Counter,
    failures: Counter,
}

impl Writer {
    pub fn new(log: LogFile, queue: Arc<Queue>, records: Counter, failures: Counter) -> Self {
        Self { log, queue, batch: VecDeque::new(), unsynced: None, is_failing: false, records, failures }
    }

    /// Writes until nothing can come any more.
    pub fn run(mut self) {
        while self.turn() {}
    }

    /// One batch. Whether there may be another.
    pub fn turn(&mut self) -> bool {
        let chores = match (self.is_written(), self.unsynced) {
            (false, _) => Chores::Retry,
            (true, Some(_)) => Chores::Sync,
            (true, None) => Chores::None,
        };
        let Taken { events, flush, closed } = self.queue.take(chores);
        self.batch.extend(events);
        match self.write(flush.is_some() || closed) {
            Ok(()) if std::mem::take(&mut self.is_failing) => tracing::info!("the audit log is written again"),
            Ok(()) => {}
            Err(error) => self.failed(&error),
        }
        if let Some(flush) = flush.filter(|_| self.is_written()) {
            self.queue.answer(flush);
        }
        if closed && !self.is_written() {
            tracing::error!("the last records of the audit log cannot be written");
        }
        // What was only tried again has left the queue as it was.
        !closed || (chores == Chores::Retry && self.is_written())
    }

    fn is_written(&self) -> bool {
        self.batch.is_empty() && self.log.unwritten() == 0
    }

    fn write(&mut self, sync: bool) -> io::Result<()> {
        let mut rotated = Ok(());
        if !self.is_written() {
            self.unsynced.get_or_insert_with(Instant::now);
            while let Some((time, event)) = self.batch.pop_front() {
                self.log.append(time, &event)?;
                self.records.inc();
                if self.log.is_full() || self.log.unwritten() >= CHUNK {
                    self.log.write()?;
                }
                // A file that cannot be rotated grows on, and the next batch tries again.
                if self.log.is_full() && rotated.is_ok() {
                    rotated = self.log.rotate();
                }
            }
            self.log.write()?;
            self.log.write_head()?;
        }
        if self.unsynced.is_some_and(|since| sync || since.elapsed() >= SYNC) {
            self.log.sync()?;
            self.unsynced = None;
            if self.log.reopen_if_moved()? {
                return Err(io::Error::other("the file was moved or removed; the log goes on in a new one"));
            }
        }
        rotated
    }

    /// Told once until it works again.
    fn failed(&mut self, error: &io::Error) {
        self.failures.inc();
        if !std::mem::replace(&mut self.is_failing, true) {
            tracing::error!(%error, "the audit log cannot be written; it is tried again");
        }
    }

    #[cfg(test)]
    pub fn log(&mut self) -> &mut LogFile {
        &mut self.log
    }
}
