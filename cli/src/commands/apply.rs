//! `spillway apply`: resources into the control plane, as its next version.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use spillway_core::intent::Source;
use spillway_proto::control::{ApplyRequest, ApplyResponse, Change, ResourceName, SourceFile};

use super::check::{count, read};
use crate::control::{Target, answer, request};
use crate::yaml;

/// Make all resources of these files the next version: what is in none of them is removed
#[derive(clap::Args)]
pub struct Arguments {
    /// A YAML file, or a folder whose *.yaml and *.yml files are read, its subfolders included
    #[arg(short, long = "file", value_name = "PATH", required = true)]
    file: Vec<PathBuf>,
    /// Only tell what would change
    #[arg(long)]
    dry_run: bool,
    /// Why, for the history
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    /// Refuse if another version is current; 0: none is
    #[arg(long, value_name = "VERSION")]
    expect: Option<u64>,
    /// A Pool or Region that may be left without pods, though it has some now
    #[arg(long, value_name = "KIND/NAME", value_parser = resource_name)]
    confirm_empty: Vec<ResourceName>,
    #[command(flatten)]
    target: Target,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let message = ApplyRequest {
        files: files(&arguments.file)?,
        dry_run: arguments.dry_run,
        message: arguments.message.clone(),
        expected_version: arguments.expect,
        confirmed_empty: arguments.confirm_empty.clone(),
    };
    let read = message.files.len();
    let applied = arguments.target.ask(async |mut client| answer(client.apply(request(message)).await))?;
    if !applied.faults.is_empty() {
        applied.faults.iter().for_each(|fault| println!("{fault}"));
        eprintln!("{} in {}; nothing was changed", count(applied.faults.len(), "fault"), count(read, "file"));
        return Ok(ExitCode::FAILURE);
    }
    report(&applied, arguments.dry_run);
    Ok(ExitCode::SUCCESS)
}

fn files(paths: &[PathBuf]) -> Result<Vec<SourceFile>> {
    let file = |source: Source| match source.text {
        Ok(yaml) => Ok(SourceFile { path: source.path, yaml }),
        Err(problem) => bail!("{}: cannot be read: {problem}", source.path),
    };
    read(paths)?.into_iter().map(file).collect()
}

/// Applies a whole folder; returns the version that is then current.
pub async fn folder(target: &Target, folder: &Path, message: &str) -> Result<u64> {
    let (files, message) = (files(&[folder.to_owned()])?, message.to_owned());
    let message = ApplyRequest { files, message, ..ApplyRequest::default() };
    let applied = answer(target.client().await?.apply(request(message)).await)?;
    ensure!(applied.faults.is_empty(), "{}", applied.faults.join("\n"));
    Ok(applied.version)
}

/// What changed, on standard output; what that amounts to, on standard error.
pub fn report(applied: &ApplyResponse, dry_run: bool) {
    let ApplyResponse { version, changes, .. } = applied;
    if changes.is_empty() {
        eprintln!("nothing changes; version {version} stays");
        return;
    }
    changes.iter().for_each(|change| print!("{}", shown(change)));
    let (what, number) = if dry_run { ("this would be version", version) } else { ("version", version) };
    eprintln!("{what} {number}, {}", count(changes.len(), "change"));
}

/// `+` new, `-` removed, `~` changed, and each field that differs.
fn shown(change: &Change) -> String {
    let ResourceName { kind, name } = change.resource.clone().unwrap_or_default();
    let fields = |json: &str| serde_json::from_str(json).map(|value| yaml::fields(&value)).unwrap_or_default();
    let mut text = String::new();
    let (before, after) = match (&*change.before_json, &*change.after_json) {
        ("", _) => return format!("+ {kind}/{name}\n"),
        (_, "") => return format!("- {kind}/{name}\n"),
        (before, after) => (fields(before), fields(after)),
    };
    // Writing to memory cannot fail.
    let _ = writeln!(text, "~ {kind}/{name}");
    for (field, was) in &before {
        let _ = match after.get(field) {
            None => writeln!(text, "    - {field}: {was}"),
            Some(is) if is != was => writeln!(text, "    ~ {field}: {was} -> {is}"),
            Some(_) => Ok(()),
        };
    }
    for (field, is) in after.iter().filter(|(field, _)| !before.contains_key(*field)) {
        let _ = writeln!(text, "    + {field}: {is}");
    }
    text
}

fn resource_name(text: &str) -> Result<ResourceName, String> {
    match text.split_once('/') {
        Some((kind @ ("Pool" | "Region"), name)) if !name.is_empty() => {
            Ok(ResourceName { kind: kind.into(), name: name.into() })
        }
        _ => Err("expected Pool/NAME or Region/NAME".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_field_by_field() {
        let change = |before: &str, after: &str| {
            let resource = Some(ResourceName { kind: "Pool".into(), name: "scorers".into() });
            shown(&Change { resource, before_json: before.into(), after_json: after.into() })
        };
        let before = r#"{"pods":[{"address":"10.0.0.1:1","name":"a"},{"name":"b"}],"region":"eu","x":"1"}"#;
        let after = r#"{"pods":[{"address":"10.0.0.2:1","name":"a"}],"region":"eu","y":{"z":"2"}}"#;
        let told = "~ Pool/scorers\n    ~ spec.pods[0].address: \"10.0.0.1:1\" -> \"10.0.0.2:1\"\n    - spec.pods[1].name: b\n    \
                    - spec.x: 1\n    + spec.y.z: 2\n";
        assert_eq!(change(before, after), told);
        assert_eq!(change("", after), "+ Pool/scorers\n");
        assert_eq!(change(before, ""), "- Pool/scorers\n");
    }
}
