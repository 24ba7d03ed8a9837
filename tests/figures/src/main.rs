//! `make figures`: the newest value of each figure, as a table. Exit 1 if a goal does not hold.

use std::collections::BTreeMap;
use std::process::ExitCode;

use spillway_figures::{Figure, path};

fn main() -> ExitCode {
    let path = path();
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("{}: not there; `make test` and `make bench` write it", path.display());
        return ExitCode::FAILURE;
    };
    let mut newest = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        match serde_json::from_str::<Figure>(line) {
            Ok(figure) => drop(newest.insert(figure.figure.clone(), figure)),
            Err(error) => {
                eprintln!("{}:{}: {error}", path.display(), number + 1);
                return ExitCode::FAILURE;
            }
        }
    }
    let width = newest.keys().map(String::len).max().unwrap_or(0);
    println!("{:width$}  {:>12}  {:10}  {:12}  holds", "figure", "value", "unit", "goal");
    for figure in newest.values() {
        let (name, value, unit, goal) = (&figure.figure, figure.value, &figure.unit, &figure.goal);
        println!("{name:width$}  {value:>12.3}  {unit:10}  {goal:12}  {}", if figure.holds { "yes" } else { "NO" });
    }
    if newest.values().all(|figure| figure.holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
