//! Checks the files of one log, with the head beside them.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use spillway_core::audit::{Found, Head, Record, Verifier};

use super::file::head_path;

/// A longer line is none of ours.
const LINE: u64 = 1 << 20;

/// What a log is held against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadToCheck {
    /// The head beside the files.
    Beside,
    /// One that was kept elsewhere.
    At(PathBuf),
    /// None: an end that was cut off is not seen.
    Nothing,
}

/// What was checked, and how it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub records: u64,
    /// The first record's number.
    pub first: u64,
    pub last: Head,
    pub faults: usize,
}

/// The check did not take place.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{}", path.display())]
    File {
        path: PathBuf,
        #[source]
        problem: io::Error,
    },
    #[error("{}: this is no head of an audit log", .0.display())]
    NoHead(PathBuf),
    #[error("the files belong to several logs")]
    SeveralLogs,
}

/// Checks the files of one log, given in any order, and tells all that it finds, with file and line.
pub fn verify(
    files: &[PathBuf],
    head: &HeadToCheck,
    mut tell: impl FnMut(&Path, &Found),
) -> Result<Report, VerifyError> {
    // Before the files: what is written meanwhile is more than the head says, never less.
    let head = read_head(files, head)?;
    let mut opened = Vec::with_capacity(files.len());
    for path in files {
        opened.push(Opened::open(path).map_err(|problem| failed(path, problem))?);
    }
    opened.sort_by_key(|file| file.first);
    let mut verifier = Verifier::new(head);
    let mut faults = 0;
    let mut told = |path: &Path, found: Vec<Found>| {
        faults += found.iter().filter(|found| !found.finding.is_note()).count();
        found.iter().for_each(|found| tell(path, found));
    };
    let mut opened = opened.into_iter().peekable();
    while let Some(Opened { path, mut reader, .. }) = opened.next() {
        let mut line = Vec::new();
        let rest = loop {
            match next_line(&mut reader, &mut line).map_err(|problem| failed(path, problem))? {
                true => told(path, verifier.line(&line)),
                false => break &line[..],
            }
        };
        let found = if opened.peek().is_some() { verifier.next_file(rest) } else { verifier.finish(rest) };
        told(path, found);
    }
    let (first, last) = (verifier.first().unwrap_or_default(), verifier.last().unwrap_or_default());
    Ok(Report { records: verifier.records(), first, last, faults })
}

struct Opened<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    /// The number of its first sound record.
    first: u64,
}

impl<'a> Opened<'a> {
    fn open(path: &'a Path) -> io::Result<Self> {
        let mut reader = BufReader::with_capacity(256 << 10, File::open(path)?);
        let (mut line, mut first) = (Vec::new(), u64::MAX);
        while next_line(&mut reader, &mut line)? {
            if let Some(record) = Record::read(&line).filter(Record::is_sound) {
                first = record.seq;
                break;
            }
        }
        reader.rewind()?;
        Ok(Self { path, reader, first })
    }
}

/// Reads a line without its line break; after the last it says no, and leaves what stands behind it. One
/// that is too long becomes one that is no record either.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    let mut is_too_long = false;
    line.clear();
    while reader.by_ref().take(LINE).read_until(b'\n', line)? > 0 {
        let is_whole = line.pop_if(|last| *last == b'\n').is_some();
        is_too_long |= line.len() as u64 >= LINE;
        if is_too_long {
            *line = b"too long".to_vec();
        }
        if is_whole {
            return Ok(true);
        }
    }
    Ok(false)
}

fn read_head(files: &[PathBuf], head: &HeadToCheck) -> Result<Option<Head>, VerifyError> {
    let path = match head {
        HeadToCheck::Nothing => return Ok(None),
        HeadToCheck::At(path) => path.clone(),
        HeadToCheck::Beside => {
            let logs: BTreeSet<PathBuf> = files.iter().map(|path| log_of(path)).collect();
            match logs.first() {
                Some(log) if logs.len() == 1 => head_path(log),
                _ => return Err(VerifyError::SeveralLogs),
            }
        }
    };
    let bytes = std::fs::read(&path).map_err(|problem| failed(&path, problem))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|_| VerifyError::NoHead(path))
}

/// The path that a log is written to, of one of its files: rotated ones have a number behind it.
fn log_of(path: &Path) -> PathBuf {
    let number = path.extension().and_then(OsStr::to_str).and_then(|extension| extension.parse::<u32>().ok());
    if number.is_some() { path.with_extension("") } else { path.to_owned() }
}

fn failed(path: &Path, problem: io::Error) -> VerifyError {
    VerifyError::File { path: path.to_owned(), problem }
}
