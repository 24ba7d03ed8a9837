//! What was measured, for people: `tests/bench/RESULTS.md`.

use anyhow::Result;

use super::machine::Machine;
use spillway_figures::{Goal, record};

/// The sections of one run of the bench.
#[derive(Debug)]
pub struct Results {
    machine: Machine,
    sections: Vec<String>,
}

impl Results {
    pub fn new(machine: Machine) -> Self {
        println!("{machine}");
        Self { machine, sections: Vec::new() }
    }

    /// A section in Markdown.
    pub fn add(&mut self, markdown: String) {
        println!("\n{markdown}\n");
        self.sections.push(markdown);
    }

    /// Replaces the file of the run before.
    pub fn write(&self) -> Result<()> {
        let path = crate::root().join("tests/bench/RESULTS.md");
        let head =
            "# Bench results\n\nWritten by `make bench`; what is measured, and how, is told in `tests/src/bench`.";
        std::fs::write(&path, format!("{head}\n\n{}.\n\n{}\n", self.machine, self.sections.join("\n\n")))?;
        println!("{} written", path.display());
        Ok(())
    }
}

/// Appends one figure of the bench to `target/figures.jsonl`; a debug build has none worth keeping.
pub fn figure(name: &str, value: f64, unit: &str, goal: Goal) {
    if cfg!(debug_assertions) {
        return;
    }
    record(name, (value * 1_000.0).round() / 1_000.0, unit, goal);
}
