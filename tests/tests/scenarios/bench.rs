//! The bench runs: every work and peer once, for a moment, with right answers and a row for everybody. Never a time.

use std::process::{Command, Stdio};

use spillway_tests::harness::process::binary;
use spillway_tests::harness::run_folder::RunFolder;

#[test]
fn every_work_of_the_bench_runs() {
    let folder = RunFolder::new("bench");
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .arg("smoke")
        .arg("--spillway")
        .arg(binary())
        .env(spillway_figures::PATH, folder.join("figures.jsonl"))
        .stdin(Stdio::null())
        .output()
        .expect("the bench starts");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{}\n{said}", output.status);
}
