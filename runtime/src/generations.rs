//! A file of which two good generations are kept: the newest, and the one before.
//!
//! The rule: whatever stops a write, and whatever became of one file, a good generation is left. What is not good
//! any more never takes the place of one that is.
//!
//! ```text
//! write: newest (if it is still what was good) ──copy──▶ FILE.previous, then new content ──▶ FILE
//! ```

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::file::{with_path, write_atomic};

/// Readable by all, as what lies beside it is.
const MODE: u32 = 0o644;

/// A file and its `.previous`.
#[derive(Debug)]
pub struct Generations {
    newest: PathBuf,
    previous: PathBuf,
    /// Larger files are refused before they are read.
    limit: u64,
    /// SHA-256 of the newest file, if it is good.
    good: Option<[u8; 32]>,
}

/// What was kept.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<T, E> {
    Newest(T),
    /// And what is wrong with the newest.
    Previous {
        value: T,
        newest: E,
    },
    Neither {
        newest: E,
        previous: E,
    },
    /// There is no such file.
    Nothing,
}

impl Generations {
    pub fn new(path: impl AsRef<Path>, limit: u64) -> Self {
        let newest = path.as_ref().to_owned();
        Self { previous: beside(&newest, ".previous"), newest, limit, good: None }
    }

    /// The first generation that `open` accepts. Blocks on the file system.
    pub fn read<T, E: From<io::Error>>(&mut self, open: impl Fn(&[u8]) -> Result<T, E>) -> Found<T, E> {
        let look = |path| -> Result<(T, [u8; 32]), Option<E>> {
            let content = match self.content(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(None),
                content => content.map_err(|error| Some(E::from(error)))?,
            };
            open(&content).map(|value| (value, Sha256::digest(&content).into())).map_err(Some)
        };
        let missing = |path: &Path| E::from(with_path(path, &io::ErrorKind::NotFound.into()));
        let newest = match look(&self.newest) {
            Ok((value, digest)) => {
                self.good = Some(digest);
                return Found::Newest(value);
            }
            Err(problem) => problem,
        };
        match (newest, look(&self.previous)) {
            (newest, Ok((value, _))) => {
                Found::Previous { value, newest: newest.unwrap_or_else(|| missing(&self.newest)) }
            }
            (None, Err(None)) => Found::Nothing,
            (newest, Err(previous)) => Found::Neither {
                newest: newest.unwrap_or_else(|| missing(&self.newest)),
                previous: previous.unwrap_or_else(|| missing(&self.previous)),
            },
        }
    }

    /// Makes this the newest generation, and the newest so far the one before. Blocks on the file system.
    pub fn write(&mut self, content: &[u8]) -> io::Result<()> {
        let still_good = |now: &Vec<u8>| self.good == Some(Sha256::digest(now).into());
        if let Some(now) = self.content(&self.newest).ok().filter(still_good) {
            write_atomic(&self.previous, &now, MODE).map_err(|error| with_path(&self.previous, &error))?;
        }
        write_atomic(&self.newest, content, MODE).map_err(|error| with_path(&self.newest, &error))?;
        self.good = Some(Sha256::digest(content).into());
        Ok(())
    }

    fn content(&self, path: &Path) -> io::Result<Vec<u8>> {
        let length = fs::metadata(path).map_err(|error| with_path(path, &error))?.len();
        if length > self.limit {
            let problem = format!("it has {length} bytes; at most {} are accepted", self.limit);
            return Err(with_path(path, &io::Error::new(io::ErrorKind::FileTooLarge, problem)));
        }
        fs::read(path).map_err(|error| with_path(path, &error))
    }
}

/// A path with something at the end of its name.
pub(crate) fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(end);
    name.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Good is what begins with a digit.
    fn open(content: &[u8]) -> Result<u8, io::Error> {
        content.first().copied().filter(u8::is_ascii_digit).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn found(path: &Path) -> Result<Option<u8>, ()> {
        match Generations::new(path, 100).read(open) {
            Found::Newest(value) | Found::Previous { value, .. } => Ok(Some(value)),
            Found::Nothing => Ok(None),
            Found::Neither { .. } => Err(()),
        }
    }

    #[test]
    fn t63_a_bad_newest_gives_way_to_the_one_before_and_two_bad_ones_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let previous = folder.path().join("file.previous");
        assert_eq!(found(&path), Ok(None));
        let mut generations = Generations::new(&path, 100);
        for content in [b"1 one", b"2 two"] {
            generations.write(content).unwrap();
        }
        assert_eq!((fs::read(&path).unwrap(), fs::read(&previous).unwrap()), (b"2 two".to_vec(), b"1 one".to_vec()));
        assert_eq!(found(&path), Ok(Some(b'2')));
        fs::write(&path, b"").unwrap();
        assert_eq!(found(&path), Ok(Some(b'1')));
        fs::write(&path, [b'3'; 101]).unwrap();
        assert_eq!(found(&path), Ok(Some(b'1')), "it is too large");
        fs::remove_file(&path).unwrap();
        assert_eq!(found(&path), Ok(Some(b'1')));
        fs::write(&previous, b"x").unwrap();
        assert_eq!(found(&path), Err(()));
    }

    #[test]
    fn a_write_that_fails_is_told_and_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gone").join("file");
        let error = Generations::new(&path, 100).write(b"1").unwrap_err();
        assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    }

    proptest! {
        #[test]
        fn one_good_generation_outlives_any_damage_to_the_newest(
            steps in prop::collection::vec((0_u8..10, 0_u8..4), 1..12),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            let mut generations = Generations::new(&path, 100);
            let mut good: Vec<u8> = Vec::new();
            for (value, damage) in steps {
                let value = b'0' + value;
                generations.write(&[value]).unwrap();
                good.push(value);
                match damage {
                    0 => fs::write(&path, b"x").unwrap(),
                    1 => fs::remove_file(&path).unwrap(),
                    2 => generations = {
                        let mut again = Generations::new(&path, 100);
                        again.read(open);
                        again
                    },
                    _ => {}
                }
                let kept = found(&path);
                match damage {
                    0 | 1 => prop_assert!(good.len() == 1 || matches!(kept, Ok(Some(kept)) if good.contains(&kept))),
                    _ => prop_assert_eq!(kept, Ok(Some(value))),
                }
            }
        }
    }
}
