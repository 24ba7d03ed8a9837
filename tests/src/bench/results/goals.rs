//! The goals of the bench: which ones there are, what was found, and whether they hold.
//!
//! What was found are the figures `speed.…` that this run appended to `target/figures.jsonl`, the newest of each name.

use std::fmt::Write as _;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use spillway_figures::{Figure, Goal};

use super::super::machine::Machine;

/// Names of this bench's figures begin so.
const PREFIX: &str = "speed.";
/// Around the table in the README.
const MARKS: [&str; 2] = ["<!-- bench -->\n", "<!-- /bench -->"];

/// The goals in the README, in its order: the figure, and what it says. A figure with a goal that is not
/// here stands in RESULTS.md alone, under its name.
const TITLES: [(&str, &str); 39] = [
    ("speed.grpc.cpu_ratio_envoy", "unary gRPC to mTLS h2: CPU per call, to Envoy's"),
    ("speed.h2.cpu_ratio_envoy", "REST over h2 to mTLS h2: the same"),
    ("speed.h1.cpu_ratio_envoy", "REST over HTTP/1.1 to mTLS h2: the same"),
    (
        "speed.hit_h2.cpu_ratio_envoy-constant",
        "hit in the result cache, REST over h2: CPU, to Envoy answering a constant",
    ),
    ("speed.hit_grpc.cpu_ratio_envoy-constant", "hit in the result cache, gRPC with trailers: the same"),
    ("speed.cache_misses.cpu_ratio_off", "result cache on without a hit: CPU, to the cache off"),
    ("speed.handshake.full.cpu_ratio_envoy", "full mTLS handshake: CPU, to Envoy's"),
    ("speed.handshake.newcomer.cpu_ratio_envoy", "full mTLS handshake of a client that is new: the same"),
    ("speed.handshake.resumed.cpu_ratio_envoy", "resumed mTLS handshake: the same"),
    ("speed.open_loop.grpc.p99_ratio_envoy", "gRPC at 70 % load: p99, to Envoy's"),
    ("speed.open_loop.h2.p99_ratio_envoy", "REST over h2 at 70 % load: the same"),
    ("speed.idle.gateway_rss_mib", "memory of an idle gateway"),
    ("speed.idle.sidecar_rss_mib", "memory of an idle sidecar"),
    ("speed.idle.connection_kib", "memory of an idle mTLS connection"),
    ("speed.cores.ratio", "calls with two worker threads, to one"),
    ("speed.lookup.l1.1.p99_us", "features of one entity from memory: p99"),
    ("speed.lookup.l2.1.p99_us", "features of one entity from Redis: p99"),
    ("speed.lookup.l2.10.p99_us", "of 10 entities: p99"),
    ("speed.lookup.l2.100.p99_us", "of 100 entities: p99"),
    ("speed.lookup.l2.1.p99_ratio_feast", "of one entity, to Feast with the same Redis: p99"),
    ("speed.lookup.l2.10.p99_ratio_feast", "of 10 entities, to Feast: p99"),
    ("speed.lookup.l2.100.p99_ratio_feast", "of 100 entities, to Feast: p99"),
    ("speed.sidecar.join.cores_at_1000_per_s", "sidecar at 1,000 requests/s, beyond the model's own CPU: cores"),
    ("speed.sidecar.no_join.cores_at_1000_per_s", "the same without a join"),
    ("speed.path.hit.p50_ms", "whole path at 70 % load or 15,000 calls/s, hit in the result cache: p50"),
    ("speed.path.hit.p99_ms", "the same: p99"),
    ("speed.path.miss.p50_ms", "whole path at 70 % load, features and model: p50"),
    ("speed.path.miss.p99_ms", "the same: p99"),
    ("speed.tensor.cpu_ratio_envoy", "tensor of 1 MiB through both hops: CPU, to two Envoys"),
    ("speed.growth.models.ratio", "CPU per call with 1 to 10,000 models: the dearest to the cheapest"),
    ("speed.growth.models.alone.ratio", "the same, one call at a time"),
    ("speed.growth.pods.ratio", "the same with 4 to 1,000 pods"),
    ("speed.growth.pods.alone.ratio", "the same, one call at a time"),
    ("speed.growth.tenants.ratio", "with 1 to 100,000 tenants"),
    ("speed.growth.tenants.alone.ratio", "the same, one call at a time"),
    ("speed.growth.policies.ratio", "with 10 to 10,000 policies"),
    ("speed.growth.policies.alone.ratio", "the same, one call at a time"),
    ("speed.growth.entities_l1.ratio", "CPU of a feature look-up in memory with 10,000 to 10,000,000 entities"),
    ("speed.growth.entities_l2.ratio", "of one in Redis"),
];

/// The figures with goals that were appended after the first `before` bytes.
pub fn of_this_run(path: &Path, before: u64) -> Result<Vec<Figure>> {
    let mut file = std::fs::File::open(path).with_context(|| format!("no figures: {}", path.display()))?;
    file.seek(SeekFrom::Start(before))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let mut found: Vec<Figure> = Vec::new();
    for line in text.lines() {
        let figure: Figure = serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()))?;
        if !figure.figure.starts_with(PREFIX) || figure.goal == Goal::None.to_string() {
            continue;
        }
        found.retain(|earlier| earlier.figure != figure.figure);
        found.push(figure);
    }
    Ok(found)
}

/// All goals: those with a title first, then the others in the order in which they were recorded.
pub fn table(goals: &[Figure]) -> String {
    let mut text = head();
    for (name, title) in TITLES {
        row(&mut text, title, goals.iter().find(|goal| goal.figure == name));
    }
    for goal in goals.iter().filter(|goal| title(&goal.figure).is_none()) {
        row(&mut text, &format!("`{}`", goal.figure), Some(goal));
    }
    let missed = goals.iter().filter(|goal| !goal.holds).count();
    let _ = write!(text, "\n{} of {} goals hold.", goals.len() - missed, goals.len());
    text
}

/// What the README shows: the goals with titles.
pub fn readme(goals: &[Figure], machine: &Machine, date: &str) -> String {
    let mut text = head();
    for (name, title) in TITLES {
        row(&mut text, title, goals.iter().find(|goal| goal.figure == name));
    }
    let _ = writeln!(text, "\nMeasured on {machine}, {date}.");
    text
}

/// Replaces what stands between the marks.
pub fn write_into(path: &Path, table: &str) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let replaced = between_marks(&text, table).with_context(|| format!("{}: no marks of the bench", path.display()))?;
    std::fs::write(path, replaced).with_context(|| path.display().to_string())
}

fn between_marks(text: &str, table: &str) -> Option<String> {
    let [first, last] = MARKS;
    let (before, rest) = text.split_once(first)?;
    let (_, after) = rest.split_once(last)?;
    Some(format!("{before}{first}{table}{last}{after}"))
}

fn head() -> String {
    "| | goal | found | |\n|---|---|---|---|\n".to_owned()
}

fn row(text: &mut String, title: &str, goal: Option<&Figure>) {
    // Writing into a String cannot fail.
    let _ = match goal {
        None => writeln!(text, "| {title} | | | **not measured** |"),
        Some(Figure { value, unit, goal, holds, .. }) => {
            let unit = if unit == "ratio" { "" } else { unit };
            let verdict = if *holds { "holds" } else { "**missed**" };
            writeln!(text, "| {title} | {} | {value} {unit} | {verdict} |", goal.replace("<=", "≤").replace(">=", "≥"))
        }
    };
}

fn title(name: &str) -> Option<&'static str> {
    TITLES.iter().find_map(|(figure, title)| (*figure == name).then_some(*title))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_runs_goals_count_and_the_newest_of_each_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("figures.jsonl");
        let line = |name: &str, value: f64, goal: &str, holds: bool| {
            let figure = Figure { figure: name.into(), value, unit: "ratio".into(), goal: goal.into(), holds };
            serde_json::to_string(&figure).unwrap() + "\n"
        };
        let before = line("speed.old", 1.0, "<= 1", true);
        let run = [
            line("speed.a", 2.0, "<= 1", false),
            line("speed.b", 1.0, "-", true),
            line("path.c", 1.0, "<= 1", true),
            line("speed.d", 3.0, ">= 1", true),
            line("speed.a", 1.0, "<= 1", true),
        ];
        std::fs::write(&path, before.clone() + &run.concat()).unwrap();
        let found = of_this_run(&path, before.len() as u64).unwrap();
        let found: Vec<_> = found.iter().map(|figure| (figure.figure.as_str(), figure.value, figure.holds)).collect();
        assert_eq!(found, [("speed.d", 3.0, true), ("speed.a", 1.0, true)]);
    }

    #[test]
    fn a_table_says_what_holds_and_what_does_not() {
        let figure = |name: &str, holds| Figure {
            figure: name.into(),
            value: 0.5,
            unit: "ms".into(),
            goal: "<= 0.6".into(),
            holds,
        };
        let text = table(&[figure("speed.a", true), figure("speed.b", false)]);
        assert!(text.contains("| `speed.a` | ≤ 0.6 | 0.5 ms | holds |"), "{text}");
        assert!(text.contains("| `speed.b` | ≤ 0.6 | 0.5 ms | **missed** |"), "{text}");
        assert!(text.ends_with("1 of 2 goals hold."), "{text}");
    }

    #[test]
    fn only_what_stands_between_the_marks_changes() {
        let text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n";
        let new = between_marks(text, "new\n").unwrap();
        assert_eq!(new, "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter\n");
        assert_eq!(between_marks("no marks", "new"), None);
    }

    #[test]
    fn the_readme_has_the_marks() {
        let readme = std::fs::read_to_string(crate::root().join("README.md")).unwrap();
        assert!(between_marks(&readme, "").is_some());
    }
}
