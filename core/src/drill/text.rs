//! A report for people, in a terminal.

use std::fmt::Write as _;

use super::history::Spread;
use super::report::{Report, percent, seconds};

/// A few dozen lines.
pub fn text(report: &Report) -> String {
    let mut lines = Lines::default();
    let on = report.target.as_ref().map(|target| format!(" on {target}")).unwrap_or_default();
    lines.say(&format!("{}: {}{on}, {}", report.outcome.name().to_uppercase(), report.drill, report.began));
    if !report.description.is_empty() {
        lines.say(&format!("  {}", report.description));
    }
    for reason in &report.reasons {
        lines.say(&format!("  ! {reason}"));
    }
    for fault in &report.faults {
        lines.say(&format!("  fault: {fault}"));
    }
    let moments = report.timeline.iter().filter_map(|moment| Some((moment, moment.at_ms?)));
    let mut moments: Vec<_> = moments.collect();
    // What is reached together stays in the order of the numbers.
    moments.sort_by_key(|(_, at)| *at);
    if !moments.is_empty() {
        lines.say("\ntimeline");
        for (moment, at) in moments {
            lines.say(&format!("  {:>9}  {:<2}  {}", seconds(at), moment.mark, moment.name));
        }
    }
    if let Some(recovery) = &report.recovery {
        let parts: Vec<String> =
            recovery.phases.iter().map(|phase| format!("{} {}", phase.name, seconds(phase.ms))).collect();
        lines.say(&format!("\nrecovery time  {} = {}", seconds(recovery.rto_ms), parts.join(" + ")));
    }
    if let Some(data) = &report.data {
        let lost = data.rpo_ms.map_or_else(|| "no heartbeat could be read elsewhere".to_owned(), seconds);
        lines.say(&format!("data loss      {lost} ({} heartbeats written before)", data.written));
    }
    requests(report, &mut lines);
    if !report.objectives.is_empty() {
        lines.say("\nobjectives");
        for objective in &report.objectives {
            let met = if objective.met { "met " } else { "MISSED" };
            lines.say(&format!("  {met:<6}  {:<14} {:<12} {}", objective.name, objective.limit, objective.found));
        }
    }
    past(report, &mut lines);
    lines.0
}

fn requests(report: &Report, lines: &mut Lines) {
    let requests = &report.requests;
    if requests.sent == 0 {
        return;
    }
    let clients = &report.clients;
    lines.say(&format!(
        "clients        {}, of them {} of the target, of which {} moved",
        clients.all, clients.of_target, clients.moved
    ));
    lines.say(&format!(
        "requests       {}, {} failed, {} served, {} retries",
        requests.sent,
        requests.failed,
        percent(requests.success),
        requests.retried
    ));
    for (class, count) in &requests.classes {
        let reasons: Vec<String> = count.reasons.iter().map(|(why, count)| format!("{count} {why}")).collect();
        let reasons = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join(", ")) };
        lines.say(&format!("  {class:<9}    {}, {} failed{reasons}", count.sent, count.failed));
    }
}

fn past(report: &Report, lines: &mut Lines) {
    let past = &report.past;
    if past.runs == 0 {
        return;
    }
    lines.say(&format!("\nruns before: {}, passed: {}", past.runs, past.passed));
    let rows: [(&str, Option<Spread>); 6] = [
        ("recovery time", past.rto),
        ("verdict", past.verdict),
        ("95 % moved", past.moved95),
        ("99 % moved", past.moved99),
        ("errors back", past.errors_back),
        ("data loss", past.rpo),
    ];
    for (name, spread) in rows {
        if let Some(Spread { p50_ms, max_ms }) = spread {
            lines.say(&format!("  {name:<14} p50 {:>8}   max {:>8}", seconds(p50_ms), seconds(max_ms)));
        }
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn say(&mut self, line: &str) {
        // Writing to memory cannot fail.
        let _ = writeln!(self.0, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::example;
    use super::*;

    #[test]
    fn a_report_says_what_happened_and_what_it_means() {
        let text = text(&example());
        for line in [
            "PASS: region-loss on eu-west, 2026-03-01T12:00:00.000Z",
            "  fault: kill eu-west/*",
            "        1 s  T1  first failed probe",
            "recovery time  11 s = detect 1 s + judge 3 s + publish 1 s + answer 1 s + move 5 s + recover 0 s",
            "data loss      1 s (10 heartbeats written before)",
            "clients        30, of them 10 of the target, of which 10 moved",
            "  normal       1200, 20 failed: 20 unreachable",
            "  met     moved95        <= 60 s      11 s",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_refusal_says_why_and_nothing_else() {
        let refused = Report {
            outcome: super::super::report::Outcome::Refused,
            reasons: vec!["no control node leads".into()],
            timeline: Vec::new(),
            recovery: None,
            data: None,
            requests: Default::default(),
            objectives: Vec::new(),
            ..example()
        };
        let text = text(&refused);
        assert!(text.starts_with("REFUSED") && text.contains("! no control node leads"), "{text}");
        assert!(!text.contains("timeline") && !text.contains("requests"), "{text}");
    }
}
