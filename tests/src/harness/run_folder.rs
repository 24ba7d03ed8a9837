//! The folder of one test's files.

use std::ops::Deref;
use std::path::Path;

use tempfile::TempDir;

/// Under `target/run`. Removed with the test, kept for reading when the test fails.
pub struct RunFolder(Option<TempDir>);

impl RunFolder {
    pub fn new(name: &str) -> Self {
        let parent = crate::root().join("target/run");
        std::fs::create_dir_all(&parent).expect("target/run can be made");
        let folder = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(parent);
        Self(Some(folder.expect("a run folder can be made")))
    }
}

impl Deref for RunFolder {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.0.as_ref().expect("only taken by drop").path()
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(folder) = self.0.take()
        {
            eprintln!("the files of this run are kept in {}", folder.keep().display());
        }
    }
}
