//! Measured figures: appended by tests and benchmarks, printed by `make figures`.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One line of `target/figures.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// `path.`, `traffic.`, … and what was measured.
    pub figure: String,
    pub value: f64,
    pub unit: String,
    /// Such as `<= 5`; `-` where there is none.
    pub goal: String,
    pub holds: bool,
}

/// What a value is to be.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    None,
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::None => true,
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("-"),
            Self::AtMost(limit) => write!(f, "<= {limit}"),
            Self::AtLeast(limit) => write!(f, ">= {limit}"),
        }
    }
}

/// Appends a figure; returns whether its goal holds.
pub fn record(figure: &str, value: f64, unit: &str, goal: Goal) -> bool {
    let holds = goal.holds(value);
    let line = Figure { figure: figure.into(), value, unit: unit.into(), goal: goal.to_string(), holds };
    let mut text = serde_json::to_string(&line).expect("a figure is JSON");
    println!("{text}");
    text.push('\n');
    let path = path();
    std::fs::create_dir_all(path.parent().expect("target/")).expect("target/ can be made");
    // One write of less than a page: lines of parallel tests do not mix.
    let mut file = std::fs::File::options().create(true).append(true).open(&path).expect("figures can be written");
    file.write_all(text.as_bytes()).expect("figures can be written");
    holds
}

/// The environment variable that names another file than `target/figures.jsonl`.
pub const PATH: &str = "SPILLWAY_FIGURES";

pub fn path() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/figures.jsonl");
    std::env::var_os(PATH).map_or_else(default, PathBuf::from)
}
