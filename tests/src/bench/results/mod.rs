//! What was measured: for people `tests/bench/RESULTS.md` with its plots and the README's table, for
//! programs `tests/bench/RESULTS.json`.
//!
//! The rule: everything in them comes from one run, and a goal that the run did not measure says so.
//! [`goals`]: which goals there are, and whether they hold; [`plot`]: pictures.

pub mod goals;
pub mod plot;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use spillway_figures::{Figure, Goal, record};

use super::machine::{self, Machine};
use super::statistics::{Median, median};
pub use plot::{Axis, Bars, Group, Line, Plot, Shape};

/// Where the results of the last run lie, below the repository.
const FOLDER: &str = "tests/bench";

/// The results of one run of the bench.
#[derive(Debug)]
pub struct Results {
    machine: Machine,
    date: String,
    /// Versions of what Spillway was measured beside.
    peers: BTreeMap<String, String>,
    sections: Vec<String>,
    samples: Vec<Sample>,
    /// Name and SVG.
    plots: BTreeMap<String, String>,
    /// Bytes of `figures.jsonl` that earlier runs wrote.
    figures_before: u64,
}

/// What one quantity of one subject was in each repetition.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Sample {
    work: String,
    subject: String,
    quantity: String,
    unit: String,
    #[serde(flatten)]
    median: Median,
    values: Vec<f64>,
}

#[derive(Serialize)]
struct Everything<'a> {
    machine: &'a Machine,
    date: &'a str,
    peers: &'a BTreeMap<String, String>,
    goals: &'a [Figure],
    samples: &'a [Sample],
}

impl Results {
    pub fn new(machine: Machine) -> Self {
        let date = machine::now();
        println!("{machine}, {date}");
        Self {
            machine,
            date,
            peers: BTreeMap::new(),
            sections: Vec::new(),
            samples: Vec::new(),
            plots: BTreeMap::new(),
            figures_before: std::fs::metadata(spillway_figures::path()).map_or(0, |file| file.len()),
        }
    }

    /// A section in Markdown.
    pub fn add(&mut self, markdown: String) {
        println!("\n{markdown}\n");
        self.sections.push(markdown);
    }

    /// What was added so far.
    pub fn sections(&self) -> &[String] {
        &self.sections
    }

    /// The version of something that Spillway is measured beside or with, such as `Envoy` and `1.40.0`.
    pub fn peer(&mut self, name: &str, version: &str) {
        self.peers.insert(name.to_owned(), version.to_owned());
    }

    /// One entry of `RESULTS.json`: all repetitions of a quantity, with their median and its interval.
    ///
    /// # Panics
    /// If there are no values, or one that is no number: then nothing was measured.
    pub fn sample(&mut self, work: &str, subject: &str, quantity: &str, unit: &str, values: &[f64]) {
        assert!(values.iter().all(|value| value.is_finite()), "{work}, {subject}: {quantity} is {values:?}");
        self.samples.push(Sample {
            work: work.to_owned(),
            subject: subject.to_owned(),
            quantity: quantity.to_owned(),
            unit: unit.to_owned(),
            median: median(values),
            values: values.to_vec(),
        });
    }

    /// Takes a plot that is written with the rest, and returns what shows it in a section.
    pub fn plot(&mut self, plot: &Plot) -> Result<String> {
        let svg = plot.svg().with_context(|| format!("the plot {} cannot be drawn", plot.name))?;
        ensure!(self.plots.insert(plot.name.clone(), svg).is_none(), "there are two plots called {}", plot.name);
        Ok(format!("![{}](plots/{}.svg)", plot.title, plot.name))
    }

    /// Replaces what the run before wrote.
    pub fn write(&self) -> Result<()> {
        ensure!(!cfg!(debug_assertions), "figures of a debug build mean nothing: they are not written");
        let goals = goals::of_this_run(&spillway_figures::path(), self.figures_before)?;
        let folder = crate::root().join(FOLDER);
        std::fs::write(folder.join("RESULTS.md"), self.markdown(&goals))?;
        std::fs::write(folder.join("RESULTS.json"), self.json(&goals)?)?;
        self.write_plots(folder.join("plots"))?;
        goals::write_into(&crate::root().join("README.md"), &goals::readme(&goals, &self.machine, &self.date))?;
        println!("{}/RESULTS.md, RESULTS.json, plots/ and README.md written", folder.display());
        Ok(())
    }

    fn markdown(&self, goals: &[Figure]) -> String {
        let peers: Vec<String> = self.peers.iter().map(|(name, version)| format!("{name} {version}")).collect();
        let peers = if peers.is_empty() { String::new() } else { format!(" Beside: {}.", peers.join(", ")) };
        format!(
            "# Bench results\n\n\
             Written by `make bench`; what is measured, and how, is told in `tests/src/bench`. All repetitions: [RESULTS.json](RESULTS.json).\n\n\
             {}, {}.{peers}\n\n## Goals\n\n{}\n{}\n",
            self.machine,
            self.date,
            goals::table(goals),
            self.sections.iter().map(|section| format!("\n{}\n", section.trim_end())).collect::<String>().trim_end(),
        )
    }

    fn json(&self, goals: &[Figure]) -> Result<String> {
        let Self { machine, date, peers, samples, .. } = self;
        let mut text = serde_json::to_string_pretty(&Everything { machine, date, peers, goals, samples })?;
        text.push('\n');
        Ok(text)
    }

    /// Those of earlier runs go.
    fn write_plots(&self, folder: PathBuf) -> Result<()> {
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        for (name, svg) in &self.plots {
            std::fs::write(folder.join(format!("{name}.svg")), svg)?;
        }
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

/// How a section says whether a goal is met.
pub fn verdict(value: f64, goal: Goal) -> &'static str {
    if goal.holds(value) { "holds" } else { "**missed**" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let machine = Machine { cpu: "A CPU".into(), cores: 2, kernel: "6.1".into(), commit: "abc".into() };
        Results::new(machine)
    }

    fn figures() -> Vec<Figure> {
        vec![Figure {
            figure: "speed.a.ratio".into(),
            value: 0.4,
            unit: "ratio".into(),
            goal: "<= 0.5".into(),
            holds: true,
        }]
    }

    #[test]
    fn sections_stand_below_the_goals() {
        let mut results = results();
        results.peer("Envoy", "1.40.0");
        results.add("## One\n\ntext\n".into());
        results.add("## Two".into());
        let text = results.markdown(&figures());
        let places = ["A CPU, 2 cores", "Beside: Envoy 1.40.0.", "## Goals", "speed.a.ratio", "## One", "## Two"]
            .map(|part| text.find(part).unwrap_or_else(|| panic!("{part} is missing in {text}")));
        assert!(places.is_sorted(), "{text}");
        assert!(!text.contains("\n\n\n") && text.ends_with("## Two\n"), "{text}");
    }

    #[test]
    fn each_sample_has_its_median_interval_and_values() {
        let mut results = results();
        results.sample("unary", "Envoy", "cpu", "us", &[3.0, 1.0, 2.0]);
        let json: serde_json::Value = serde_json::from_str(&results.json(&figures()).unwrap()).unwrap();
        let sample = &json["samples"][0];
        assert_eq!((&sample["median"], &sample["low"], &sample["high"]), (&2.0.into(), &1.0.into(), &3.0.into()));
        assert_eq!(sample["values"], serde_json::json!([3.0, 1.0, 2.0]));
        assert_eq!((&json["machine"]["commit"], &json["goals"][0]["holds"]), (&"abc".into(), &true.into()));
    }

    #[test]
    #[should_panic(expected = "cpu is [NaN]")]
    fn what_is_no_number_is_no_sample() {
        results().sample("unary", "Envoy", "cpu", "us", &[f64::NAN]);
    }

    #[test]
    fn a_name_is_for_one_plot() {
        let mut results = results();
        let bars = Bars {
            unit: "µs".into(),
            groups: vec![Group { label: "grpc".into(), bars: vec![("Envoy".into(), median(&[1.0]))] }],
        };
        let plot = Plot { name: "unary".into(), title: "CPU".into(), shape: Shape::Bars(bars) };
        assert_eq!(results.plot(&plot).unwrap(), "![CPU](plots/unary.svg)");
        assert!(results.plot(&plot).is_err());
    }
}
