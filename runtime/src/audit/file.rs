//! The file of an audit log, and the head beside it: opened, continued, rotated.
//!
//! ```text
//! open --> the last record that is sound; behind it: nothing, or debris that a `recovered` record tells of
//! append* --> bytes --write--> all are in the file, or the rest of them waits for the next attempt
//! ```
//!
//! The rule: what is in the file is never changed, and the head never names more than is there.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use spillway_core::audit::{Event, Hash, Head, Record, Timestamp};

use super::AuditSettings;
use crate::file::with_path;

/// The last record is looked for so far back: what a crash leaves behind it is at most one line.
const TAIL: u64 = 1 << 20;
/// How each record begins.
const BEGINNING: &[u8] = b"{\"seq\":";
const MODE: u32 = 0o600;

#[derive(Debug)]
pub(super) struct LogFile {
    settings: AuditSettings,
    file: File,
    /// Bytes in the file.
    length: u64,
    /// Of what was appended, written or not.
    head: Head,
    /// Lines, of which the first `written` bytes are in the file.
    bytes: Vec<u8>,
    written: usize,
}

impl LogFile {
    /// Continues the file, or begins it. Its first records may be appended already: what the end of
    /// the last process left to be told.
    pub fn open(settings: AuditSettings) -> io::Result<Self> {
        let path = &settings.path;
        let begun = OpenOptions::new().read(true).append(true).create(true).mode(MODE).open(path);
        let locked = begun.and_then(|file| lock(&file).map(|()| file));
        let tail = locked.and_then(|mut file| Tail::read(&mut file).map(|tail| (file, tail)));
        let (file, Tail { last, debris, is_unfinished }) = tail.map_err(|error| with_path(path, &error))?;
        let named = read_head(path)?;
        // Without a record, a crash came between a rotation and the new file's first, or there was no log.
        let before = if last.is_none() { last_of(&numbered(path, 1))? } else { None };
        let head = last.or(before).unwrap_or_default();
        let mut bytes = Vec::new();
        if is_unfinished {
            bytes.push(b'\n');
        }
        let length = file.metadata()?.len();
        let mut log = Self { settings, file, length, head, bytes, written: 0 };
        let ahead = named.filter(|named| named.seq > head.seq || (named.seq == head.seq && named.hash != head.hash));
        if before.is_some() && debris.is_empty() {
            log.append(now(), &Event::Rotated)?;
        }
        if !debris.is_empty() || ahead.is_some() {
            let sha256 = (!debris.is_empty()).then(|| Hash::of(&debris));
            let rotated = before.is_some() && !debris.is_empty();
            log.append(now(), &Event::Recovered { bytes: debris.len() as u64, sha256, rotated, head: ahead })?;
        }
        Ok(log)
    }

    /// Adds a record to what is to be written.
    pub fn append(&mut self, time: Timestamp, event: &Event) -> io::Result<()> {
        Ok(self.head.append(time, event, &mut self.bytes)?)
    }

    /// Bytes that wait to be written.
    pub fn unwritten(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Whether this file has got enough.
    pub fn is_full(&self) -> bool {
        self.length + self.unwritten() as u64 >= self.settings.rotate
    }

    /// Writes what was appended. After an error the next attempt goes on where this one stopped.
    pub fn write(&mut self) -> io::Result<()> {
        while self.unwritten() > 0 {
            match self.file.write(&self.bytes[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.written += written;
                    self.length += written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.written = 0;
        Ok(())
    }

    /// Begins a new file, with everything written; the present one is the first of those that are kept.
    pub fn rotate(&mut self) -> io::Result<()> {
        let path = &self.settings.path;
        let begun = beside(path, ".new");
        remove(&begun)?;
        let file = OpenOptions::new().append(true).create_new(true).mode(MODE).open(&begun)?;
        lock(&file)?;
        self.file.sync_data()?;
        // Up to a gap, which an attempt that failed has left: or each would push out one more file.
        let keep = self.settings.keep.max(1);
        let free = (1..keep).find(|number| !numbered(path, *number).exists()).unwrap_or(keep);
        for number in (1..free).rev() {
            fs::rename(numbered(path, number), numbered(path, number + 1))?;
        }
        fs::rename(path, numbered(path, 1))?;
        fs::rename(&begun, path)?;
        self.file = file;
        self.length = 0;
        self.append(now(), &Event::Rotated)
    }

    /// Writes the head, with everything written.
    pub fn write_head(&self) -> io::Result<()> {
        self.replace_head(false)
    }

    /// Sees to it that file and head are on the disk, with everything written.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()?;
        self.replace_head(true)?;
        // The names, too: of the head, and of the files after a rotation.
        File::open(folder(&self.settings.path))?.sync_all()
    }

    fn replace_head(&self, sync: bool) -> io::Result<()> {
        let path = &self.settings.path;
        let begun = beside(path, ".head.new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(MODE).open(&begun)?;
        file.write_all(&[&serde_json::to_vec(&self.head)?[..], b"\n"].concat())?;
        if sync {
            file.sync_data()?;
        }
        fs::rename(begun, head_path(path))
    }

    /// Takes up what lies at our path if that is not our file any more: somebody moved or removed it.
    /// Whether that was so. The log then tells that its head named more.
    pub fn reopen_if_moved(&mut self) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        let is_ours = match fs::metadata(&self.settings.path) {
            Ok(found) => (found.dev(), found.ino()) == (ours.dev(), ours.ino()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if !is_ours {
            *self = Self::open(self.settings.clone())?;
        }
        Ok(!is_ours)
    }

    #[cfg(test)]
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }
}

/// The end of a file.
struct Tail {
    /// The last sound record.
    last: Option<Head>,
    /// What stands behind it, without the line break at its end.
    debris: Vec<u8>,
    /// There is no line break at the end of the file.
    is_unfinished: bool,
}

impl Tail {
    fn read(file: &mut File) -> io::Result<Self> {
        let not_ours = |problem| Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return not_ours("it is no plain file");
        }
        let from = metadata.len().saturating_sub(TAIL);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        file.take(TAIL).read_to_end(&mut bytes)?;
        let is_unfinished = bytes.last().is_some_and(|last| *last != b'\n');
        let mut end = bytes.len();
        let last = loop {
            let begin = bytes[..end].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if let Some(record) = Record::read(&bytes[begin..end]).filter(Record::is_sound) {
                break Some(record.head());
            }
            if begin == 0 {
                end = 0;
                break None;
            }
            end = begin - 1;
        };
        let is_ours = bytes.starts_with(BEGINNING) || BEGINNING.starts_with(&bytes);
        if last.is_none() && (from > 0 || !is_ours) {
            return not_ours("it is something else than an audit log; it is left alone");
        }
        let mut debris = bytes.split_off(end);
        if debris.first() == Some(&b'\n') && last.is_some() {
            debris.remove(0);
        }
        if debris.last() == Some(&b'\n') {
            debris.pop();
        }
        Ok(Self { last, debris, is_unfinished })
    }
}

/// The last record of a file, if it is there.
fn last_of(path: &Path) -> io::Result<Option<Head>> {
    match File::open(path).and_then(|mut file| Tail::read(&mut file)) {
        Ok(tail) => Ok(tail.last),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(with_path(path, &error)),
    }
}

/// Where the head of the log of this file is.
pub(super) fn head_path(path: &Path) -> PathBuf {
    beside(path, ".head")
}

/// The head of the log of this file. One that cannot be understood is none: a power cut can leave it so.
fn read_head(path: &Path) -> io::Result<Option<Head>> {
    match fs::read(head_path(path)) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(with_path(&head_path(path), &error)),
    }
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    beside(path, &format!(".{number}"))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Two processes that continue one chain would both break it.
fn lock(file: &File) -> io::Result<()> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => io::Error::new(io::ErrorKind::ResourceBusy, "another process writes to it"),
        TryLockError::Error(error) => error,
    })
}

fn now() -> Timestamp {
    SystemTime::now().into()
}
