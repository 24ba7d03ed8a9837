//! The newest epoch that was seen: a leader of an older one leads no more, also after a restart.

use std::io;
use std::path::PathBuf;

use crate::file::{with_path, write_atomic};

/// In a file beside the snapshot: the number, and a line break.
#[derive(Debug)]
pub(super) struct Epoch {
    path: PathBuf,
    newest: u64,
}

impl Epoch {
    /// What cannot be read counts as none: versions alone then keep old content out. Blocks on the file system.
    pub fn resume(path: PathBuf) -> Self {
        let newest = match std::fs::read_to_string(&path) {
            Ok(text) => text.trim_end().parse().unwrap_or_else(|_| {
                tracing::warn!(path = %path.display(), "the newest epoch is not known: the file holds no number");
                0
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the newest epoch is not known");
                0
            }
        };
        Self { path, newest }
    }

    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Keeps an epoch that is newer. Blocks on the file system.
    pub fn see(&mut self, epoch: u64) -> io::Result<()> {
        if epoch > self.newest {
            write_atomic(&self.path, format!("{epoch}\n").as_bytes(), 0o644)
                .map_err(|error| with_path(&self.path, &error))?;
            self.newest = epoch;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_newer_epochs_are_kept_and_they_outlive_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("snapshot.epoch");
        let mut epoch = Epoch::resume(path.clone());
        assert_eq!(epoch.newest(), 0);
        for (seen, newest) in [(7, 7), (5, 7), (7, 7), (9, 9)] {
            epoch.see(seen).unwrap();
            assert_eq!((epoch.newest(), Epoch::resume(path.clone()).newest()), (newest, newest));
        }
        std::fs::write(&path, "nine").unwrap();
        assert_eq!(Epoch::resume(path).newest(), 0);
    }
}
