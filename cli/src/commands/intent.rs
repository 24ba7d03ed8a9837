//! `spillway get`, `history` and `rollback`: the versions that the control plane keeps.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use spillway_proto::control::{GetRequest, HistoryRequest, Resource, Revision, RollbackRequest};
use spillway_runtime::audit::Timestamp;

use super::Form;
use super::apply::report;
use super::check::count;
use crate::control::{Target, answer, request};
use crate::yaml;

/// Show resources, of the current version or another
#[derive(clap::Args)]
// `--version` is a version of the resources here, not the program's.
#[command(disable_version_flag = true)]
pub struct Get {
    /// Only this kind, such as Pool
    kind: Option<String>,
    /// Only this one of the kind
    name: Option<String>,
    /// yaml: can be applied again; json: for programs [default: names alone]
    #[arg(short, long, value_name = "FORM")]
    output: Option<Written>,
    /// Of this version [default: the current one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    version: Option<u64>,
    #[command(flatten)]
    target: Target,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Written {
    Yaml,
    Json,
}

/// Show the versions that are kept: when, by whom, why
#[derive(clap::Args)]
pub struct History {
    /// How many, the newest first
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: u32,
    /// text: for people; json: for programs
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Form,
    #[command(flatten)]
    target: Target,
}

/// Make an old version's resources the next version
#[derive(clap::Args)]
pub struct Rollback {
    /// One of `spillway history`
    #[arg(value_name = "VERSION")]
    to: u64,
    /// Why, for the history
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    #[command(flatten)]
    target: Target,
}

pub fn get(arguments: &Get) -> Result<ExitCode> {
    let (kind, name) = (arguments.kind.clone().unwrap_or_default(), arguments.name.clone().unwrap_or_default());
    let message = GetRequest { kind: kind.clone(), name: name.clone(), version: arguments.version.unwrap_or(0) };
    let found = arguments.target.ask(async |mut client| answer(client.get(request(message)).await))?;
    if found.resources.is_empty() && !kind.is_empty() {
        let what = if name.is_empty() { kind } else { format!("{kind}/{name}") };
        bail!("there is no {what} in version {}", found.version);
    }
    let spec = |resource: &Resource| -> Result<Value> {
        serde_json::from_str(&resource.spec_json).with_context(|| format!("{}/{}", resource.kind, resource.name))
    };
    match arguments.output {
        None => {
            found.resources.iter().for_each(|resource| println!("{}/{}", resource.kind, resource.name));
            eprintln!("version {}, {}", found.version, count(found.resources.len(), "resource"));
        }
        Some(Written::Yaml) => {
            println!("# version {}", found.version);
            for resource in &found.resources {
                print!("---\n{}", yaml::document(&resource.kind, &resource.name, &spec(resource)?));
            }
        }
        Some(Written::Json) => {
            let one = |resource: &Resource| -> Result<Value> {
                Ok(json!({"kind": resource.kind, "name": resource.name, "spec": spec(resource)?}))
            };
            let resources: Vec<Value> = found.resources.iter().map(one).collect::<Result<_>>()?;
            println!("{:#}", json!({"version": found.version, "resources": resources}));
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn history(arguments: &History) -> Result<ExitCode> {
    let message = HistoryRequest { limit: arguments.limit };
    let found = arguments.target.ask(async |mut client| answer(client.history(request(message)).await))?;
    if arguments.output == Form::Json {
        let revisions: Vec<Value> = found.revisions.iter().map(as_json).collect();
        println!("{:#}", json!({ "revisions": revisions }));
    } else {
        found.revisions.iter().for_each(|revision| println!("{}", line(revision)));
    }
    Ok(ExitCode::SUCCESS)
}

pub fn rollback(arguments: &Rollback) -> Result<ExitCode> {
    let message = RollbackRequest { version: arguments.to, message: arguments.message.clone() };
    let done = arguments.target.ask(async |mut client| answer(client.rollback(request(message)).await))?;
    report(&done, false);
    Ok(ExitCode::SUCCESS)
}

/// RFC 3339, in UTC.
pub fn time(unix_ms: i64) -> String {
    let since = Duration::from_millis(u64::try_from(unix_ms).unwrap_or(0));
    Timestamp::from(SystemTime::UNIX_EPOCH + since).to_string()
}

fn line(revision: &Revision) -> String {
    let Revision { version, unix_ms, author, message, rolled_back_to, added, changed, removed } = revision;
    let origin = if *rolled_back_to > 0 { format!("  (version {rolled_back_to} again)") } else { String::new() };
    let space = if message.is_empty() { "" } else { "  " };
    // A message of several lines must not look like several versions.
    let message = message.replace(|character: char| character.is_control(), " ");
    format!("{version:>6}  {}  +{added} ~{changed} -{removed}  {author}{origin}{space}{message}", time(*unix_ms))
}

fn as_json(revision: &Revision) -> Value {
    json!({
        "version": revision.version,
        "time": time(revision.unix_ms),
        "author": revision.author,
        "message": revision.message,
        "rolledBackTo": (revision.rolled_back_to > 0).then_some(revision.rolled_back_to),
        "added": revision.added,
        "changed": revision.changed,
        "removed": revision.removed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_one_line_whatever_its_message() {
        let revision = Revision {
            version: 12,
            unix_ms: 1_772_323_200_007,
            author: "spiffe://td/operator/alice".into(),
            message: "two\n    13  lines".into(),
            rolled_back_to: 3,
            added: 1,
            changed: 0,
            removed: 2,
        };
        let expected = "    12  2026-03-01T00:00:00.007Z  +1 ~0 -2  spiffe://td/operator/alice  (version 3 again)  \
                        two     13  lines";
        assert_eq!(line(&revision), expected);
        let plain = Revision { rolled_back_to: 0, message: String::new(), ..revision };
        assert!(line(&plain).ends_with("operator/alice"));
    }
}
