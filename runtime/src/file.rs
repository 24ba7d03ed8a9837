//! Files that change under us: noticed by polling, replaced by renaming.
//!
//! The rule: a reader sees the old content or the new one, and content that is the same is no change.

use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

/// A file written this recently may be written again within one tick of the file system's clock, so
/// its time stamp alone does not say that it stayed the same.
const UNSETTLED: Duration = Duration::from_secs(2);

/// Files that are read together and read again when one of them changed.
#[derive(Debug)]
pub struct Watched {
    paths: Vec<PathBuf>,
    /// Larger files are refused before they are read.
    limit: u64,
    stamps: Vec<Stamp>,
    /// SHA-256 of what was returned last.
    digests: Vec<[u8; 32]>,
}

/// What tells one version of a file from the next. Symbolic links are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    length: u64,
    inode: u64,
}

impl Watched {
    pub fn new(paths: Vec<PathBuf>, limit: u64) -> Self {
        Self { paths, limit, stamps: Vec::new(), digests: Vec::new() }
    }

    /// The contents, in the order of the paths, if they differ from those returned last. An error names the file.
    ///
    /// Blocks on the file system.
    pub fn changed(&mut self) -> io::Result<Option<Vec<Vec<u8>>>> {
        let stamps = self.stamps()?;
        let now = SystemTime::now();
        let settled = |stamp: &Stamp| now.duration_since(stamp.modified).is_ok_and(|age| age > UNSETTLED);
        if stamps == self.stamps && stamps.iter().all(settled) {
            return Ok(None);
        }
        let read = |path: &PathBuf| fs::read(path).map_err(|error| with_path(path, &error));
        let contents = self.paths.iter().map(read).collect::<io::Result<Vec<_>>>()?;
        self.stamps = stamps;
        let digests: Vec<[u8; 32]> = contents.iter().map(|content| Sha256::digest(content).into()).collect();
        if digests == self.digests {
            return Ok(None);
        }
        self.digests = digests;
        Ok(Some(contents))
    }

    /// Has the next look return the contents whether they changed or not: for a reader that could not use
    /// them when they came, and may now.
    pub fn forget(&mut self) {
        self.stamps.clear();
        self.digests.clear();
    }

    fn stamps(&self) -> io::Result<Vec<Stamp>> {
        let stamp = |path: &PathBuf| {
            let metadata = fs::metadata(path)?;
            if metadata.len() > self.limit {
                let problem = format!("it has {} bytes; at most {} are accepted", metadata.len(), self.limit);
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
            }
            Stamp::of(&metadata)
        };
        self.paths.iter().map(|path| stamp(path).map_err(|error| with_path(path, &error))).collect()
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> io::Result<Self> {
        Ok(Self { modified: metadata.modified()?, length: metadata.len(), inode: metadata.ino() })
    }
}

/// The same error, with the file that it is about.
pub(crate) fn with_path(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Replaces a file as a whole: readers see the old content or the new, also after a crash.
///
/// `mode` is the permission bits of the new file, such as `0o600` for a key.
pub fn write_atomic(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let temporary = folder.join(format!(".{}.{}.new", name.to_string_lossy(), std::process::id()));
    let written = (|| {
        // A leftover of a killed writer may have other permissions: never write into it.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_replaced_file_is_a_change_and_a_touched_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomic(&path, b"one", 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut watched = Watched::new(vec![path.clone()], 100);
        assert_eq!(watched.changed().unwrap().unwrap(), [b"one".to_vec()]);
        assert!(watched.changed().unwrap().is_none());
        write_atomic(&path, b"one", 0o600).unwrap();
        assert!(watched.changed().unwrap().is_none());
        // Written in place, same length, within the same tick of the clock.
        fs::write(&path, b"two").unwrap();
        assert_eq!(watched.changed().unwrap().unwrap(), [b"two".to_vec()]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(watched.changed().unwrap().is_none());
        watched.forget();
        assert_eq!(watched.changed().unwrap().unwrap(), [b"two".to_vec()]);
        assert!(watched.changed().unwrap().is_none());
    }

    #[test]
    fn a_missing_or_huge_file_is_an_error_and_its_return_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut watched = Watched::new(vec![path.clone()], 4);
        let missing = watched.changed().unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(missing.to_string().starts_with(&format!("{}: ", path.display())), "{missing}");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(watched.changed().unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        fs::write(&path, b"1234").unwrap();
        assert!(watched.changed().unwrap().is_some());
    }
}
