//! Checks lines of an audit log, in their order, as they come.
//!
//! The rule: each fault is told once, at its line, and the check goes on behind it. A cut at the end shows
//! only against a [`Head`]; a file that is gone from before the first one does not show at all, since
//! rotation deletes such.

use sha2::{Digest, Sha256};

use super::{Hash, Head, Kind, Record};

/// What was found, and at which line of its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub line: u64,
    pub finding: Finding,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    // Faults.
    #[error("no record: {lines} lines from here are something else")]
    NoRecord { lines: u64 },
    #[error("the record was changed: its bytes do not match its hash")]
    Changed,
    #[error("it does not follow the record before it: its prev is not that one's hash")]
    Unlinked,
    #[error("the records {from} to {to} are missing before it")]
    Missing { from: u64, to: u64 },
    #[error("the record is there twice")]
    Repeated,
    #[error("it stands behind record {after}")]
    OutOfOrder { after: u64 },
    #[error("the log begins with record {seq}, and not because of a rotation: what was before is cut off")]
    Beginning { seq: u64 },
    #[error("the last line is cut")]
    Cut,
    #[error("it tells of bytes that a crash left before it, and they are not there")]
    NothingRecovered,
    #[error("when the process started, the head named record {}, and the log did not go so far: its end was cut off", .0.seq)]
    EndWasCut(Head),
    #[error("the records {from} to {to}, which the head names, are missing behind it")]
    EndIsMissing { from: u64, to: u64 },
    #[error("it is not the record that the head names")]
    OtherThanHead,
    #[error("there is no record")]
    Empty,

    // Notes: these happen in an honest log.
    #[error("the log is checked from record {seq} on; what was before is in a file that is not here")]
    BeginsAt { seq: u64 },
    #[error("a crash left {bytes} bytes of a line here")]
    Recovered { bytes: u64 },
    #[error("{records} records found no room in the queue and were dropped before it")]
    Lost { records: u64 },
    #[error("the last line is not whole: it is being written, or its process crashed")]
    Unfinished,
    #[error("{records} records are newer than the head")]
    NewerThanHead { records: u64 },
    #[error("the head names record {seq}, which is older than all of these")]
    OlderHead { seq: u64 },
}

impl Finding {
    /// Whether it is no fault.
    pub fn is_note(&self) -> bool {
        match self {
            Self::BeginsAt { .. }
            | Self::Recovered { .. }
            | Self::Lost { .. }
            | Self::Unfinished
            | Self::NewerThanHead { .. }
            | Self::OlderHead { .. } => true,
            Self::NoRecord { .. }
            | Self::Changed
            | Self::Unlinked
            | Self::Missing { .. }
            | Self::Repeated
            | Self::OutOfOrder { .. }
            | Self::Beginning { .. }
            | Self::Cut
            | Self::NothingRecovered
            | Self::EndWasCut(_)
            | Self::EndIsMissing { .. }
            | Self::OtherThanHead
            | Self::Empty => false,
        }
    }
}

/// Goes through one log, which may be several files.
#[derive(Debug)]
pub struct Verifier {
    head: Option<Head>,
    /// Of the file.
    line: u64,
    records: u64,
    first: Option<u64>,
    last: Option<Head>,
    debris: Option<Debris>,
    found: Vec<Found>,
}

/// Lines in a row that are no records: what a crash left, if the next record says so.
#[derive(Debug)]
struct Debris {
    line: u64,
    lines: u64,
    /// Without the last line break.
    bytes: u64,
    digest: Sha256,
}

impl Verifier {
    /// `head`: what the log is held against.
    pub fn new(head: Option<Head>) -> Self {
        Self { head, line: 0, records: 0, first: None, last: None, debris: None, found: Vec::new() }
    }

    /// Takes the next line, without its line break.
    pub fn line(&mut self, line: &[u8]) -> Vec<Found> {
        self.line += 1;
        match Record::read(line) {
            Some(record) => self.record(&record),
            None => self.debris(line),
        }
        std::mem::take(&mut self.found)
    }

    /// The file ends here and another follows. `rest`: what stands behind its last line break.
    pub fn next_file(&mut self, rest: &[u8]) -> Vec<Found> {
        let mut found = if rest.is_empty() { Vec::new() } else { self.line(rest) };
        self.give_debris_up();
        self.line = 0;
        found.append(&mut self.found);
        found
    }

    /// The last file ends here. `rest`: what stands behind its last line break.
    pub fn finish(&mut self, rest: &[u8]) -> Vec<Found> {
        self.give_debris_up();
        let last = self.last.unwrap_or_default();
        if !rest.is_empty() {
            // All that the head names is there, so that this was never finished.
            let is_honest = self.head.is_some_and(|head| head.seq <= last.seq);
            self.line += 1;
            self.tell(if is_honest { Finding::Unfinished } else { Finding::Cut });
        }
        match self.head {
            Some(head) if head.seq > last.seq => {
                self.tell(Finding::EndIsMissing { from: last.seq.saturating_add(1), to: head.seq });
            }
            Some(head) if self.first.is_some_and(|first| head.seq < first) => {
                self.tell(Finding::OlderHead { seq: head.seq });
            }
            Some(head) if head.seq < last.seq => {
                self.tell(Finding::NewerThanHead { records: last.seq - head.seq });
            }
            _ => {}
        }
        if self.records == 0 && self.head.is_none_or(|head| head.seq == 0) {
            self.tell(Finding::Empty);
        }
        std::mem::take(&mut self.found)
    }

    pub fn records(&self) -> u64 {
        self.records
    }

    /// The first record's number.
    pub fn first(&self) -> Option<u64> {
        self.first
    }

    /// The last record.
    pub fn last(&self) -> Option<Head> {
        self.last
    }

    fn tell(&mut self, finding: Finding) {
        self.found.push(Found { line: self.line, finding });
    }

    fn debris(&mut self, line: &[u8]) {
        match &mut self.debris {
            Some(debris) => {
                debris.lines += 1;
                debris.bytes += 1 + line.len() as u64;
                debris.digest.update(b"\n");
                debris.digest.update(line);
            }
            None => {
                let digest = Sha256::new().chain_update(line);
                self.debris = Some(Debris { line: self.line, lines: 1, bytes: line.len() as u64, digest });
            }
        }
    }

    fn give_debris_up(&mut self) {
        if let Some(Debris { line, lines, .. }) = self.debris.take() {
            self.found.push(Found { line, finding: Finding::NoRecord { lines } });
        }
    }

    fn record(&mut self, record: &Record) {
        self.records += 1;
        self.take_debris(record);
        match record.kind {
            Kind::Recovered { head: Some(head), .. } => self.tell(Finding::EndWasCut(head)),
            Kind::Lost { records } => self.tell(Finding::Lost { records }),
            _ => {}
        }
        let seq = match self.last {
            // What it says about its place is not to be believed.
            _ if !record.is_sound => {
                self.tell(Finding::Changed);
                self.last.map_or(record.seq, |last| last.seq.saturating_add(1))
            }
            Some(last) if record.seq <= last.seq => {
                let is_same = record.head() == last;
                return self.tell(if is_same { Finding::Repeated } else { Finding::OutOfOrder { after: last.seq } });
            }
            Some(last) => {
                if record.seq > last.seq + 1 {
                    self.tell(Finding::Missing { from: last.seq + 1, to: record.seq - 1 });
                } else if record.prev != last.hash {
                    self.tell(Finding::Unlinked);
                }
                record.seq
            }
            None => {
                self.check_beginning(record);
                record.seq
            }
        };
        self.first.get_or_insert(seq);
        self.last = Some(Head { seq, hash: record.hash });
        if self.head.is_some_and(|head| head.seq == seq && head.hash != record.hash) {
            self.tell(Finding::OtherThanHead);
        }
    }

    fn check_beginning(&mut self, record: &Record) {
        match (record.seq, &record.kind) {
            (0 | 1, _) if record.seq == 0 || record.prev != Hash::default() => self.tell(Finding::Unlinked),
            (1, _) => {}
            (seq, Kind::Rotated | Kind::Recovered { rotated: true, .. }) => self.tell(Finding::BeginsAt { seq }),
            (seq, _) => self.tell(Finding::Beginning { seq }),
        }
    }

    /// Holds what stands before a record against what it says about that.
    fn take_debris(&mut self, record: &Record) {
        let said = match record.kind {
            Kind::Recovered { bytes, sha256: Some(sha256), .. } if bytes > 0 => Some((bytes, sha256)),
            _ => None,
        };
        match (said, self.debris.take()) {
            (None, None) => {}
            (Some((bytes, sha256)), Some(debris))
                if bytes == debris.bytes && sha256 == Hash(debris.digest.clone().finalize().into()) =>
            {
                self.found.push(Found { line: debris.line, finding: Finding::Recovered { bytes } });
            }
            (said, debris) => {
                self.debris = debris;
                self.give_debris_up();
                if said.is_some() {
                    self.tell(Finding::NothingRecovered);
                }
            }
        }
    }
}
