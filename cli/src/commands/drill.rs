//! `spillway drill`: break something on purpose, and see how long it takes to get over it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use spillway_core::drill::{Drill, builtin, definition, text};
use spillway_core::units::{InvalidUnit, Name};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Form;
use crate::drill::keep;
use crate::drill::place::Place;
use crate::drill::run::{self, Setup};

/// Of a run that could not be begun, or ended without a report.
const NO_REPORT: u8 = 4;

const INJECTOR: &str = "\
A drill needs injectors, which break things and mend them. `spillway dev` has one. In a deployment none runs unless
somebody starts `spillway injector` on the machines whose processes may be broken; --endpoints names a file of addresses
and identities, theirs among them (described in docs/drills.md).";

const EXIT_CODES: &str = "\
Exit codes:
  0  passed
  1  failed: an objective was missed or could not be measured, or not everything came back in time
  2  the command makes no sense
  3  refused before anything was broken, or aborted
  4  no report: it could not be run, or was interrupted twice";

#[derive(clap::Args)]
#[command(after_help = INJECTOR)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Run a drill
    #[command(after_help = EXIT_CODES)]
    Run(Box<Run>),
    /// Show the drills that come along
    List,
    /// Show how a drill is written, as a start for one's own
    Show {
        /// One of `spillway drill list`
        name: String,
    },
}

#[derive(clap::Args)]
struct Run {
    /// A file, or a name of `spillway drill list`
    #[arg(value_name = "FILE|NAME")]
    drill: String,
    /// The region to lose [default: the drill's own, or the one with the least traffic]
    #[arg(long, value_name = "REGION", value_parser = parse_name)]
    target: Option<Name>,
    /// Ask this control node alone [default: all]
    #[arg(long, value_name = "NAME|HOST:PORT")]
    control: Option<String>,
    /// What `spillway dev` runs out of this folder
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, require_equals = true, default_value = ".dev", default_missing_value = ".dev")]
    dev: PathBuf,
    /// Addresses and identities [default: endpoints.json in the folder of `spillway dev`]
    #[arg(long, value_name = "FILE")]
    endpoints: Option<PathBuf>,
    /// Send requests as this tenant
    #[arg(long, value_name = "TENANT", default_value = "acme")]
    tenant: String,
    /// Begin though nobody knows whether the other regions can carry the load
    #[arg(long)]
    accept_unknown_capacity: bool,
    /// text: for people; json: for programs
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Form,
    /// Put report.json, report.txt and timeline.svg here, too
    #[arg(long, value_name = "FOLDER")]
    report: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.action {
        Action::Run(run) => {
            let outcome = tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run.run());
            Ok(outcome.unwrap_or_else(|error| {
                eprintln!("spillway: {error:#}");
                ExitCode::from(NO_REPORT)
            }))
        }
        Action::List => {
            for drill in builtin::all() {
                println!("{:<14} {}", drill.name.as_str(), drill.description);
            }
            Ok(ExitCode::SUCCESS)
        }
        Action::Show { name } => {
            print!(
                "{}",
                builtin::text(name).with_context(|| format!("there is no drill '{name}'; see: spillway drill list"))?
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl Run {
    async fn run(&self) -> Result<ExitCode> {
        let mut drill = read(&self.drill)?;
        drill.accepts_unknown_capacity |= self.accept_unknown_capacity;
        let endpoints = self.endpoints.clone().unwrap_or_else(|| self.dev.join("endpoints.json"));
        let place = Place::read(&endpoints, &self.tenant, self.control.as_deref())?;
        let setup = Setup { drill, target: self.target.clone(), place, runs: self.dev.join("drills") };
        let (interrupt, interrupts) = mpsc::channel(2);
        let (mut interrupted, mut terminated) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let signals = async move {
            loop {
                tokio::select! {
                    _ = interrupted.recv() => {}
                    _ = terminated.recv() => {}
                }
                if interrupt.send(()).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let report = tokio::select! {
            report = run::run(setup, interrupts) => report?,
            () = signals => bail!("interrupted"),
        };
        if let Some(folder) = &self.report {
            keep::save_plain(folder, &report)?;
        }
        match self.output {
            Form::Json => println!("{}", serde_json::to_string_pretty(&report)?),
            Form::Text => print!("{}", text::text(&report)),
        }
        Ok(ExitCode::from(report.outcome.exit_code()))
    }
}

/// A name that comes along goes before a file of that name; `./NAME` is the file.
fn read(drill: &str) -> Result<Drill> {
    let written = match builtin::text(drill) {
        Some(text) => text.to_owned(),
        None => std::fs::read_to_string(Path::new(drill))
            .with_context(|| format!("{drill}: neither a file nor a drill that comes along"))?,
    };
    definition::read(&written).map_err(|faults| {
        let lines: Vec<String> = faults.iter().map(|fault| format!("{drill}:{}: {fault}", fault.line)).collect();
        anyhow::anyhow!("{}", lines.join("\n"))
    })
}

fn parse_name(text: &str) -> Result<Name, InvalidUnit> {
    Name::parse(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drill_is_a_name_or_a_file_whose_faults_are_told_with_their_lines() {
        assert_eq!(read("region-loss").unwrap().name.as_str(), "region-loss");
        assert!(read("no-such-drill").is_err());
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mine.yaml");
        std::fs::write(&file, builtin::text("latency").unwrap().replace("150ms", "soon")).unwrap();
        let told = read(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(told.contains("mine.yaml:9: Drill/?: spec.faults[0].by"), "{told}");
    }
}
