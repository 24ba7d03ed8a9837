//! `spillway audit verify`: what it prints, and how it exits.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use spillway_core::identity::SpiffeId;
use spillway_runtime::audit::{Audit, AuditSettings, Event};
use spillway_runtime::telemetry::Metrics;

/// A log of three files: 1 to 4, 5 to 8, and 9 and 10 are in them.
fn log(folder: &Path) {
    let settings = AuditSettings { path: folder.join("audit.log"), rotate: 950, keep: 10 };
    let id = SpiffeId::parse("spiffe://spillway.test/region/eu/gateway/gw-0").unwrap();
    let audit = Audit::start(Some(&settings), "gateway", &id, &Metrics::new("test")).unwrap();
    for generation in 1..=6 {
        audit.record(Event::RevocationsChanged { generation, serials: 1, ids: 0 });
    }
    audit.stop(Duration::from_secs(10));
}

/// What it prints, without the folder, and whether it exits with 0.
fn verify(folder: &Path, arguments: &[&str]) -> (String, bool) {
    let output = Command::new(env!("CARGO_BIN_EXE_spillway"))
        .args(["audit", "verify"])
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{:?}", output.status);
    (String::from_utf8(text).unwrap(), output.status.success())
}

const FILES: [&str; 4] = ["audit.log", "audit.log.1", "audit.log.2", "audit.log.head"];

#[test]
fn a_whole_log_is_ok_in_any_order_of_its_files() {
    let folder = tempfile::tempdir().unwrap();
    log(folder.path());
    let (text, ok) = verify(folder.path(), &FILES);
    let head: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("audit.log.head")).unwrap()).unwrap();
    let expected = format!("ok: 10 records, seq 1 to 10, head {}\n", head["hash"].as_str().unwrap());
    assert_eq!((text.as_str(), ok), (expected.as_str(), true));
    let (text, ok) = verify(folder.path(), &["audit.log", "audit.log.1"]);
    let note = "audit.log.1:1: note: the log is checked from record 5 on; what was before is in a file that is not here\nok: 6 records, seq 5 to 10";
    assert!(text.starts_with(note) && ok, "{text}");
    assert!(verify(folder.path(), &["--head", "audit.log.head", "audit.log", "audit.log.1"]).1);
}

#[test]
fn each_fault_is_printed_with_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    log(folder.path());
    let change = |name: &str, from: &str, to: &str| {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        fs::write(folder.path().join(name), text.replace(from, to)).unwrap();
    };
    change("audit.log.2", "\"generation\":2", "\"generation\":7");
    let text = fs::read_to_string(folder.path().join("audit.log.1")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    fs::write(folder.path().join("audit.log.1"), format!("{}\n{}\n{}\n", lines[0], lines[2], lines[3])).unwrap();
    let (text, ok) = verify(folder.path(), &FILES);
    let expected = "audit.log.2:3: the record was changed: its bytes do not match its hash\n\
                    audit.log.1:2: the records 6 to 6 are missing before it\n\
                    2 faults in 9 records\n";
    assert_eq!((text.as_str(), ok), (expected, false));
}

#[test]
fn an_end_that_was_cut_off_shows_against_the_head() {
    let folder = tempfile::tempdir().unwrap();
    log(folder.path());
    fs::remove_file(folder.path().join("audit.log")).unwrap();
    let kept = ["audit.log.1", "audit.log.2"];
    let (text, ok) = verify(folder.path(), &kept);
    let expected = "audit.log.1:4: the records 9 to 10, which the head names, are missing behind it\n";
    assert!(text.starts_with(expected) && !ok, "{text}");
    assert!(verify(folder.path(), &[&kept[..], &["--no-head"]].concat()).1);
    fs::remove_file(folder.path().join("audit.log.head")).unwrap();
    let (text, ok) = verify(folder.path(), &kept);
    assert!(text.contains("audit.log.head") && text.contains("--no-head") && !ok, "{text}");
}
