//! `spillway check`: every fault of every resource, and the Snapshot that they compile to.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use spillway_core::intent::{Source, compile};
use spillway_runtime::file::write_atomic;
use spillway_runtime::snapshot;

/// Read resources, print every fault as `file:line: kind/name: field: problem`, exit 1 if there is one
#[derive(clap::Args)]
pub struct Arguments {
    /// A YAML file, or a folder whose *.yaml and *.yml files are read, its subfolders included
    #[arg(short, long = "file", value_name = "PATH", required = true)]
    file: Vec<PathBuf>,
    /// Write the compiled snapshot to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The snapshot's version [default: one more than that of the file at --output, or 1]
    #[arg(long, value_name = "N", requires = "output", value_parser = clap::value_parser!(u64).range(1..))]
    snapshot_version: Option<u64>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let sources = read(&arguments.file)?;
    let version = match (arguments.snapshot_version, &arguments.output) {
        (Some(version), _) => version,
        (None, Some(output)) => following_version(output)?,
        (None, None) => 1,
    };
    let resources = match compile(version, &sources) {
        Ok((resources, _)) => resources,
        Err(faults) => {
            for fault in &faults {
                println!("{fault}");
            }
            eprintln!("{} in {}", count(faults.len(), "fault"), count(sources.len(), "file"));
            return Ok(ExitCode::FAILURE);
        }
    };
    if let Some(output) = &arguments.output {
        let sealed = snapshot::seal(&resources, version);
        write_atomic(output, &sealed, 0o644).with_context(|| format!("cannot write {}", output.display()))?;
        eprintln!("{}: snapshot version {version}, {}", output.display(), count(resources.len(), "resource"));
    } else {
        eprintln!("no faults in {} ({})", count(resources.len(), "resource"), count(sources.len(), "file"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the files; whether their texts are right is [`compile`]'s to say.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Source>> {
    let mut files = Vec::new();
    for path in paths {
        collect(path, &mut files)?;
    }
    if files.is_empty() {
        bail!("no *.yaml or *.yml file in {}", display(paths));
    }
    let source = |path: &PathBuf| Source {
        path: path.display().to_string(),
        text: std::fs::read_to_string(path).map_err(|error| error.to_string()),
    };
    Ok(files.iter().map(source).collect())
}

fn following_version(output: &Path) -> Result<u64> {
    match std::fs::read(output) {
        Ok(bytes) => {
            let present = snapshot::open(&bytes).with_context(|| {
                format!("{} is there but is no snapshot: give --snapshot-version to replace it", output.display())
            })?;
            Ok(present.version + 1)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(1),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", output.display())),
    }
}

fn collect(path: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    let facts = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !facts.is_dir() {
        into.push(path.to_owned());
        return Ok(());
    }
    let mut entries = std::fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>())
        .with_context(|| format!("cannot read {}", path.display()))?;
    entries.sort();
    for entry in entries {
        let is_yaml = entry.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if is_yaml || entry.is_dir() {
            collect(&entry, into)?;
        }
    }
    Ok(())
}

/// `1 fault`, `2 faults`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn display(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
