//! One JSON line per request, also when it was cancelled.
//!
//! The rule: a request never waits for the log. Lines go through a bounded queue to one writer; what
//! does not fit is dropped and counted. A line holds no line break, no control character and nothing
//! that changes the direction of text, whatever the fields hold.

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};

use crate::telemetry::Metrics;

/// Lines that may wait for the writer: at 40,000 requests per second, 0.4 s of a stalled disk.
const QUEUE: usize = 16_384;

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogSettings {
    Stdout,
    /// Appended to; made if it is not there.
    File(PathBuf),
}

/// Cheap to clone; all clones write to the same place. The writer ends when the last clone is gone.
#[derive(Clone, Debug)]
pub struct AccessLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    lines: Option<SyncSender<Line>>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
    dropped: Counter,
}

#[derive(Debug)]
enum Line {
    Text(Vec<u8>),
    /// Answered when all lines before it are written.
    Flush(SyncSender<()>),
}

impl AccessLog {
    /// Opens the place and starts the writer. Counts `spillway_access_log_dropped_total` and
    /// `spillway_access_log_failures_total`.
    pub fn open(settings: &AccessLogSettings, metrics: &Metrics) -> io::Result<Self> {
        let place: Box<dyn Write + Send> = match settings {
            AccessLogSettings::Stdout => Box::new(io::stdout()),
            AccessLogSettings::File(path) => Box::new(OpenOptions::new().create(true).append(true).open(path)?),
        };
        Self::to(place, metrics)
    }

    /// Writes nothing and counts nothing.
    pub fn off() -> Self {
        Self(Arc::new(Shared { lines: None, writer: Mutex::default(), dropped: Counter::default() }))
    }

    fn to(place: Box<dyn Write + Send>, metrics: &Metrics) -> io::Result<Self> {
        let help = "Access log lines dropped because the writer was behind";
        let dropped = metrics.register("access_log_dropped", help, Counter::default());
        let help = "Access log writes that failed";
        let failures = metrics.register("access_log_failures", help, Counter::default());
        let (lines, queue) = sync_channel(QUEUE);
        let writer = std::thread::Builder::new().name("access-log".into());
        let writer = writer.spawn(move || write(queue, BufWriter::with_capacity(64 << 10, place), &failures))?;
        Ok(Self(Arc::new(Shared { lines: Some(lines), writer: Mutex::new(Some(writer)), dropped })))
    }

    /// A record that is written when it is dropped.
    pub fn entry<R: Serialize>(&self, record: R) -> Entry<R> {
        Entry { record, log: self.clone() }
    }

    /// Writes one record.
    pub fn write(&self, record: &impl Serialize) {
        let Some(lines) = &self.0.lines else { return };
        let mut text = Vec::with_capacity(512);
        let written = record.serialize(&mut Serializer::with_formatter(&mut text, Plain(CompactFormatter)));
        text.push(b'\n');
        if written.is_err() || lines.try_send(Line::Text(text)).is_err() {
            self.0.dropped.inc();
        }
    }

    /// Waits until all lines so far are written, at most this long. Blocks.
    pub fn flush(&self, within: Duration) {
        let Some(lines) = &self.0.lines else { return };
        let (done, written) = sync_channel(1);
        if lines.try_send(Line::Flush(done)).is_ok() {
            let _ = written.recv_timeout(within);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The writer ends when its queue does. It may be stuck on a disk, so it is not waited for:
        // `flush` is the bounded way to see everything written.
        self.lines = None;
        self.writer.lock().take();
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

fn write(queue: Receiver<Line>, mut place: impl Write, failures: &Counter) {
    // A batch is written when the queue is empty: promptly when calm, in large pieces when busy.
    while let Ok(first) = queue.recv() {
        let mut next = Some(first);
        while let Some(line) = next {
            let written = match &line {
                Line::Text(text) => place.write_all(text),
                Line::Flush(_) => place.flush(),
            };
            if written.is_err() {
                failures.inc();
            }
            if let Line::Flush(done) = line {
                let _ = done.try_send(());
            }
            next = queue.try_recv().ok();
        }
        if place.flush().is_err() {
            failures.inc();
        }
    }
}

/// Compact JSON that a terminal shows as it is: besides what JSON must escape, it escapes DEL and C1
/// controls (U+009B starts an ANSI sequence), line and paragraph separators and bidirectional marks.
struct Plain(CompactFormatter);

impl Formatter for Plain {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut from = 0;
        for (at, character) in fragment.char_indices().filter(|(_, character)| misleads(*character)) {
            self.0.write_string_fragment(writer, &fragment[from..at])?;
            write!(writer, "\\u{:04x}", u32::from(character))?;
            from = at + character.len_utf8();
        }
        self.0.write_string_fragment(writer, &fragment[from..])
    }
}

fn misleads(character: char) -> bool {
    matches!(character,
        '\u{7f}'..='\u{9f}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
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
        assert!(text.trim_end().chars().all(|character| !character.is_control() && !misleads(character)), "{text:?}");
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
        // Beyond the queue, the writer holds one line and its buffer of 64 KiB.
        for status in 0..(QUEUE + 4_000) as u16 {
            log.write(&Record { path: "x".repeat(100), status });
        }
        assert!(log.0.dropped.get() > 0);
        drop(stalled);
    }
}
