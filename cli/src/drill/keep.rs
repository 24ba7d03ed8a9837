//! What stays of a run: its report as JSON, as text and as a picture, one after the other in a folder.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use spillway_core::drill::{Report, picture, text};
use spillway_runtime::file::write_atomic;

/// Reports that are read back: the newest by name, which begins with the time.
const MOST: usize = 200;
/// A report of an hour has less.
const MOST_BYTES: u64 = 16 << 20;

/// Writes BEGAN-DRILL[-TARGET].{json,txt,svg}, and says where the JSON is.
pub fn save(folder: &Path, report: &Report) -> Result<PathBuf> {
    let on = report.target.as_ref().map(|target| format!("-{target}")).unwrap_or_default();
    // Colons are no part of file names everywhere.
    let name = format!("{}-{}{on}", report.began.replace(':', ""), report.drill);
    write(folder, &name, report)
}

/// Writes report.json, report.txt and timeline.svg.
pub fn save_plain(folder: &Path, report: &Report) -> Result<()> {
    let file = write(folder, "report", report)?;
    std::fs::rename(file.with_extension("svg"), folder.join("timeline.svg")).context("timeline.svg")
}

fn write(folder: &Path, name: &str, report: &Report) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let json = serde_json::to_string_pretty(report)?;
    for (extension, content) in [("json", json), ("txt", text::text(report)), ("svg", picture::picture(report))] {
        let file = folder.join(format!("{name}.{extension}"));
        write_atomic(&file, content.as_bytes(), 0o644).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(folder.join(format!("{name}.json")))
}

/// The reports in a folder. What is none is left out, and said so.
pub fn earlier(folder: &Path) -> Vec<Report> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    let newest = files.iter().rev().take(MOST);
    newest.filter_map(|file| read(file).inspect_err(|problem| eprintln!("left out: {problem:#}")).ok()).collect()
}

fn read(file: &Path) -> Result<Report> {
    let told = || file.display().to_string();
    let length = std::fs::metadata(file).with_context(told)?.len();
    anyhow::ensure!(length <= MOST_BYTES, "{}: {length} bytes are too many", file.display());
    serde_json::from_slice(&std::fs::read(file).with_context(told)?).with_context(told)
}

#[cfg(test)]
#[path = "keep_tests.rs"]
mod tests;
