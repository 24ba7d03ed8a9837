//! `spillway audit`: whether a log is as it was written, and the trail that the control plane keeps.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use spillway_core::line;
use spillway_proto::control::AuditRequest;
use spillway_runtime::audit::{HeadToCheck, Report, verify as check};

use super::Form;
use crate::control::{Target, answer, request};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Find what was changed, cut or moved in a log: prints every fault as `file:line: what`, exit 1 if there is one
    Verify(Verify),
    /// Show what the leaders of the control plane recorded: when, what, by whom; the newest first
    Show(Show),
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

#[derive(clap::Args)]
struct Show {
    /// How many; the newest 1000 are kept
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    limit: u32,
    /// text: for people; json: for programs
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Form,
    #[command(flatten)]
    target: Target,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.action {
        Action::Verify(arguments) => verify(arguments),
        Action::Show(arguments) => show(arguments),
    }
}

fn verify(Verify { files, head, no_head }: &Verify) -> Result<ExitCode> {
    let head = match head {
        Some(path) => HeadToCheck::At(path.clone()),
        None if *no_head => HeadToCheck::Nothing,
        None => HeadToCheck::Beside,
    };
    let is_head = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "head");
    let files: Vec<PathBuf> = files.iter().filter(|path| !is_head(path)).cloned().collect();
    let report = check(&files, &head, |path, found| {
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

fn show(Show { limit, output, target }: &Show) -> Result<ExitCode> {
    let message = AuditRequest { limit: *limit };
    let found = target.ask(async |mut client| answer(client.audit(request(message)).await))?;
    let read = |text: &String| serde_json::from_str(text).with_context(|| format!("no record: {text:?}"));
    let records: Vec<Map<String, Value>> = found.records.iter().map(read).collect::<Result<_>>()?;
    match output {
        Form::Json => println!("{:#}", json!({ "records": records })),
        Form::Text => records.into_iter().for_each(|record| println!("{}", said(record))),
    }
    Ok(ExitCode::SUCCESS)
}

/// A record on one line: its time, what happened, who did it (else the node), and the event's fields.
fn said(mut record: Map<String, Value>) -> String {
    let mut take = |field: &str| record.remove(field).filter(|value| !value.is_null());
    let (time, event) = (take("time"), take("event"));
    let who = take("author").or_else(|| take("by")).or_else(|| take("node"));
    let [time, event, who] = [time, event, who].map(|value| value.map_or_else(|| "-".into(), |value| word(&value)));
    let fields = record.iter().filter(|(_, value)| !value.is_null());
    let fields: Vec<String> = fields.map(|(name, value)| format!("{name}={}", word(value))).collect();
    format!("{time}  {event:<18}  {who}  {}", fields.join(" "))
}

/// A value as one word: a text that is one already is itself, all else is JSON.
fn word(value: &Value) -> String {
    let is_plain = |text: &&str| {
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'"';
        !text.is_empty() && text.bytes().all(plain)
    };
    if let Some(text) = value.as_str().filter(is_plain) {
        return text.to_owned();
    }
    let mut text = Vec::new();
    match line::write(value, &mut text) {
        Ok(()) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => "?".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_whatever_its_texts() {
        let line = |record: Value| said(serde_json::from_value(record).unwrap());
        let (time, alice) = ("2026-03-01T00:00:00.007Z", "spiffe://td/operator/alice");
        let set = json!({"time": time, "node": "c-0", "event": "override-set", "region": "eu", "act": "weight 5",
            "reason": "two\n\u{9b}lines", "author": alice});
        assert_eq!(
            line(set),
            "2026-03-01T00:00:00.007Z  override-set        spiffe://td/operator/alice  act=\"weight 5\" node=c-0 \
             reason=\"two\\n\\u009blines\" region=eu"
        );
        let created =
            json!({"time": time, "node": "c-0", "event": "token-created", "id": "x", "names": ["a"], "by": alice});
        assert!(line(created).ends_with("token-created       spiffe://td/operator/alice  id=x names=[\"a\"] node=c-0"));
        let ended = json!({"time": time, "node": "c-0", "event": "override-ended", "region": "eu", "author": null});
        assert_eq!(line(ended), "2026-03-01T00:00:00.007Z  override-ended      c-0  region=eu");
    }
}
