//! One JSON line per request, also when it was cancelled.
//!
//! The rule: a request never waits for the log. Lines gather in bounded memory, and one writer takes them
//! in batches; what does not fit is dropped and counted. A line holds no line break, no control character
//! and nothing that changes the direction of text, whatever the fields hold.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use spillway_core::line;

use crate::file::with_path;
use crate::telemetry::Metrics;

/// Bytes that may wait for the writer: at 40,000 requests per second, 0.4 s of a stalled disk.
const WAITING: usize = 8 << 20;
/// The writer sleeps so long after it was woken: waking it for each line costs more than the line.
const GATHER: Duration = Duration::from_millis(10);
/// Buffers that have grown beyond this in a burst are given back.
const KEPT: usize = 1 << 20;

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogSettings {
    Stdout,
    /// Appended to; made if it is not there.
    File(PathBuf),
}

/// Cheap to clone; all clones write to the same place. The writer ends when the last clone is gone.
#[derive(Clone, Debug)]
pub struct AccessLog(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    queue: Arc<Queue>,
    dropped: Counter,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    /// For the writer: there are lines, or no more will come.
    filled: Condvar,
    /// For those who flush.
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<u8>,
    /// Batches begun and written: the lines that wait are of batch `begun`.
    begun: u64,
    written: u64,
    closed: bool,
}

impl AccessLog {
    /// Opens the place and starts the writer. Counts `spillway_access_log_dropped_total` and
    /// `spillway_access_log_failures_total`.
    pub fn open(settings: &AccessLogSettings, metrics: &Metrics) -> io::Result<Self> {
        let place: Box<dyn Write + Send> = match settings {
            AccessLogSettings::Stdout => Box::new(io::stdout()),
            AccessLogSettings::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Box::new(file.map_err(|error| with_path(path, &error))?)
            }
        };
        Self::to(place, metrics)
    }

    /// Writes nothing and counts nothing.
    pub fn off() -> Self {
        Self(None)
    }

    fn to(place: Box<dyn Write + Send>, metrics: &Metrics) -> io::Result<Self> {
        let help = "Access log lines dropped because the writer was behind";
        let dropped = metrics.register("access_log_dropped", help, Counter::default());
        let help = "Access log writes that failed";
        let failures = metrics.register("access_log_failures", help, Counter::default());
        let queue = Arc::new(Queue::default());
        let writer = std::thread::Builder::new().name("access-log".into());
        // Not joined: it may be stuck on a disk. `flush` is the bounded way to see everything written.
        writer.spawn({
            let queue = queue.clone();
            move || queue.write(place, &failures)
        })?;
        Ok(Self(Some(Arc::new(Shared { queue, dropped }))))
    }

    /// A record that is written when it is dropped.
    pub fn entry<R: Serialize>(&self, record: R) -> Entry<R> {
        Entry { record, log: self.clone() }
    }

    /// Writes one record.
    pub fn write(&self, record: &impl Serialize) {
        thread_local!(static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
        let Some(shared) = &self.0 else { return };
        let kept = LINE.with_borrow_mut(|line| {
            line.clear();
            let written = line::write(record, line);
            line.push(b'\n');
            written.is_ok() && shared.queue.push(line)
        });
        if !kept {
            shared.dropped.inc();
        }
    }

    /// Waits until all lines so far are written, at most this long. Blocks.
    pub fn flush(&self, within: Duration) {
        if let Some(shared) = &self.0 {
            shared.queue.flush(Instant::now() + within);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue.state.lock().closed = true;
        self.queue.filled.notify_one();
    }
}

impl Queue {
    /// Whether there was room.
    fn push(&self, line: &[u8]) -> bool {
        let mut state = self.state.lock();
        if state.lines.len() + line.len() > WAITING {
            return false;
        }
        let first = state.lines.is_empty();
        state.lines.extend_from_slice(line);
        drop(state);
        if first {
            self.filled.notify_one();
        }
        true
    }

    fn flush(&self, until: Instant) {
        let mut state = self.state.lock();
        let last = state.begun + u64::from(!state.lines.is_empty());
        while state.written < last && !self.written.wait_until(&mut state, until).timed_out() {}
    }

    fn write(&self, mut place: impl Write, failures: &Counter) {
        let mut batch = Vec::new();
        let mut state = self.state.lock();
        loop {
            while state.lines.is_empty() && !state.closed {
                self.filled.wait(&mut state);
            }
            if state.lines.is_empty() {
                return;
            }
            if !state.closed {
                drop(state);
                std::thread::sleep(GATHER);
                state = self.state.lock();
            }
            std::mem::swap(&mut state.lines, &mut batch);
            state.begun += 1;
            drop(state);
            if place.write_all(&batch).and_then(|()| place.flush()).is_err() {
                failures.inc();
            }
            batch.clear();
            batch.shrink_to(KEPT);
            state = self.state.lock();
            state.written = state.begun;
            self.written.notify_all();
        }
    }
}

/// A request's record, written when dropped: at its end, or when the request is cancelled.
#[derive(Debug)]
pub struct Entry<R: Serialize> {
    record: R,
    log: AccessLog,
}

impl<R: Serialize> Deref for Entry<R> {
    type Target = R;

    fn deref(&self) -> &R {
        &self.record
    }
}

impl<R: Serialize> DerefMut for Entry<R> {
    fn deref_mut(&mut self) -> &mut R {
        &mut self.record
    }
}

impl<R: Serialize> Drop for Entry<R> {
    fn drop(&mut self) {
        self.log.write(&self.record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Record {
        path: String,
        status: u16,
    }

    fn log() -> (AccessLog, tempfile::NamedTempFile, Metrics) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metrics = Metrics::new("test");
        let log = AccessLog::open(&AccessLogSettings::File(file.path().into()), &metrics).unwrap();
        (log, file, metrics)
    }

    fn lines(log: &AccessLog, file: &tempfile::NamedTempFile) -> String {
        log.flush(Duration::from_secs(5));
        std::fs::read_to_string(file.path()).unwrap()
    }

    #[test]
    fn t57_hostile_fields_stay_one_plain_line() {
        let (log, file, _) = log();
        let hostile = "a\r\n{\"status\":200}\u{1b}[2J\u{9b}31m\u{2028}\u{202e}\u{7f}\0ä";
        log.write(&Record { path: hostile.into(), status: 404 });
        let text = lines(&log, &file);
        assert_eq!(text.lines().count(), 1);
        assert!(text.trim_end().chars().all(|character| !character.is_control()), "{text:?}");
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((read["path"].as_str(), read["status"].as_u64()), (Some(hostile), Some(404)));
    }

    #[tokio::test]
    async fn a_cancelled_request_is_written() {
        let (log, file, _) = log();
        let mut entry = log.entry(Record { path: "/v2".into(), status: 0 });
        let request = tokio::spawn(async move {
            entry.status = 499;
            std::future::pending::<()>().await;
            drop(entry);
        });
        tokio::task::yield_now().await;
        request.abort();
        let _ = request.await;
        assert_eq!(lines(&log, &file), "{\"path\":\"/v2\",\"status\":499}\n");
    }

    /// A disk that accepts nothing until its lock is free.
    struct Stalled(Arc<Mutex<()>>);

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            drop(self.0.lock());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stalled_disk_stops_no_request_and_losses_are_counted() {
        let lock = Arc::new(Mutex::new(()));
        let stalled = lock.lock();
        let metrics = Metrics::new("test");
        let log = AccessLog::to(Box::new(Stalled(lock.clone())), &metrics).unwrap();
        // The writer may hold as much as waits for it.
        let path = "x".repeat(10_000);
        for _ in 0..=2 * WAITING / path.len() {
            log.write(&Record { path: path.clone(), status: 200 });
        }
        assert!(log.0.as_ref().unwrap().dropped.get() > 0);
        log.flush(Duration::from_millis(50));
        drop(stalled);
    }
}
