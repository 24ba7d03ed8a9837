//! `spillway audit`: whether a log is as it was written.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use spillway_runtime::audit::{HeadToCheck, Report, verify};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Find what was changed, cut or moved in a log: prints every fault as `file:line: what`, exit 1 if there is one
    Verify(Verify),
}

#[derive(clap::Args)]
struct Verify {
    /// All files of one log, in any order, such as audit.log*; its head may be among them
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Compare with a head that was kept elsewhere, instead of the one beside the files
    #[arg(long, value_name = "FILE", conflicts_with = "no_head")]
    head: Option<PathBuf>,
    /// Compare with no head: an end that was cut off is not seen
    #[arg(long)]
    no_head: bool,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Action::Verify(Verify { files, head, no_head }) = &arguments.action;
    let head = match head {
        Some(path) => HeadToCheck::At(path.clone()),
        None if *no_head => HeadToCheck::Nothing,
        None => HeadToCheck::Beside,
    };
    let is_head = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "head");
    let files: Vec<PathBuf> = files.iter().filter(|path| !is_head(path)).cloned().collect();
    let report = verify(&files, &head, |path, found| {
        let note = if found.finding.is_note() { "note: " } else { "" };
        println!("{}:{}: {note}{}", path.display(), found.line, found.finding);
    });
    let Report { records, first, last, faults } = match (report, head) {
        (Err(error), HeadToCheck::Beside) => {
            return Err(error).context("--head FILE names the head, --no-head does without");
        }
        (report, _) => report?,
    };
    if faults > 0 {
        eprintln!("{faults} faults in {records} records");
        return Ok(ExitCode::FAILURE);
    }
    println!("ok: {records} records, seq {first} to {}, head {}", last.seq, last.hash);
    Ok(ExitCode::SUCCESS)
}
