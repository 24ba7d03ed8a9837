//! All regions, as one control node tells.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::{Value, json};
use spillway_proto::control::{
    NodeStatus, Override, Plan, RegionPlan, RegionStatus, RunningDrill, Serving, StatusRequest, StatusResponse,
    r#override::Act,
};

use super::super::Form;
use super::super::intent::time;
use crate::control::{Target, answer, request};

/// Events that are shown as text.
const EVENTS: usize = 10;

pub fn shown(target: &Target, form: Form) -> Result<String> {
    let status = target.ask(async |mut client| answer(client.status(request(StatusRequest {})).await))?;
    Ok(match form {
        Form::Text => tables(&status),
        Form::Json => format!("{:#}\n", json(&status)),
    })
}

fn tables(status: &StatusResponse) -> String {
    let mut text = String::new();
    let leader = if status.leader.is_empty() { "nobody leads" } else { &status.leader };
    let plan = status.plan.as_ref().map_or(0, |plan| plan.version);
    // Writing to memory cannot fail.
    let _ = writeln!(
        text,
        "leader {leader} (epoch {}), told by {}; intent version {}, settled {}; plan {plan}",
        status.epoch, status.answered_by, status.intent_version, status.settled_version
    );
    if !status.rollout.is_empty() {
        let _ = writeln!(text, "rollout: {}", status.rollout);
    }
    for drill in &status.drills {
        let _ = writeln!(text, "{}", drill_line(drill));
    }
    for order in status.overrides.iter().flat_map(|all| &all.overrides) {
        let _ = writeln!(text, "{}", override_line(order, &status.regions));
    }
    let mut rows = vec![
        ["REGION", "PHASE", "INTENT", "PLAN", "DNS", "REQUESTS", "PER S", "QUALITY", "EVIDENCE", "WHY"]
            .map(String::from)
            .to_vec(),
    ];
    for region in &status.regions {
        let share = |share: f64| format!("{:.1} %", share * 100.0);
        let why = if region.withheld.is_empty() {
            region.why.clone()
        } else {
            format!("{}; stays: {}", region.why, region.withheld)
        };
        rows.push(vec![
            region.region.clone(),
            region.phase.clone(),
            share(region.planned_weight),
            share(region.weight),
            region.answered.map_or_else(|| "-".into(), share),
            share(region.observed),
            format!("{:.1}", region.requests_per_second),
            region.quality.clone(),
            region.evidence.clone(),
            why,
        ]);
    }
    text.push('\n');
    text.push_str(&table(&rows));
    let mut rows = vec![["NODE", "STATE", "SNAPSHOT", "PLAN", "DRIFT", "BUILD"].map(String::from).to_vec()];
    for node in &status.nodes {
        let serving = node.serving.clone().unwrap_or_default();
        rows.push(vec![
            node.id.clone(),
            if node.connected { "here" } else { "away" }.into(),
            serving.snapshot_version.to_string(),
            serving.plan_version.to_string(),
            if node.drift.is_empty() { "none".into() } else { node.drift.clone() },
            node.build.clone(),
        ]);
    }
    text.push('\n');
    text.push_str(&table(&rows));
    if !status.events.is_empty() {
        text.push_str("\nlast events\n");
        for event in status.events.iter().rev().take(EVENTS).rev() {
            let _ = writeln!(text, "  {event}");
        }
    }
    text
}

fn drill_line(drill: &RunningDrill) -> String {
    let target = if drill.target.is_empty() { String::new() } else { format!(" of {}", drill.target) };
    let stage = if drill.stage.is_empty() { String::new() } else { format!(", {}", drill.stage) };
    format!("DRILL {}{target}{stage}, since {}, by {}", drill.drill, time(drill.began_unix_ms), drill.author)
}

fn override_line(order: &Override, regions: &[RegionStatus]) -> String {
    let stays = regions.iter().find(|region| region.region == order.region).map(|region| &*region.withheld);
    // In words of the control plane's own, beside why it should go.
    let against = match (&order.act, stays.filter(|stays| !stays.is_empty())) {
        (Some(Act::ForceIn(_)), Some(stays)) => format!("\n         !! {stays}"),
        _ => String::new(),
    };
    let reason = order.reason.replace(|character: char| character.is_control(), " ");
    format!("OVERRIDE {} {}, {}, by {}: {reason}{against}", order.region, act(order), left(order), order.author)
}

fn act(order: &Override) -> String {
    match order.act {
        Some(Act::Drain(_)) => "drained".into(),
        Some(Act::Weight(weight)) => format!("weight {weight}"),
        Some(Act::ForceIn(_)) => "forced in".into(),
        None => "-".into(),
    }
}

fn left(order: &Override) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let until = Duration::from_millis(u64::try_from(order.until_unix_ms).unwrap_or_default());
    format!("{} s left", until.saturating_sub(now).as_secs())
}

/// Columns as wide as they need to be.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn json(status: &StatusResponse) -> Value {
    json!({
        "leader": status.leader,
        "epoch": status.epoch,
        "answered_by": status.answered_by,
        "intent_version": status.intent_version,
        "settled_version": status.settled_version,
        "rollout": status.rollout,
        "plan": status.plan.as_ref().map(plan),
        "regions": status.regions.iter().map(region).collect::<Vec<_>>(),
        "nodes": status.nodes.iter().map(node).collect::<Vec<_>>(),
        "overrides": status.overrides.iter().flat_map(|all| &all.overrides).map(order).collect::<Vec<_>>(),
        "drills": status.drills.iter().map(drill).collect::<Vec<_>>(),
        "events": status.events,
    })
}

fn region(region: &RegionStatus) -> Value {
    json!({
        "region": region.region,
        "phase": region.phase,
        "why": region.why,
        "evidence": region.evidence,
        "failing_pairs": region.failing_pairs,
        "quality": region.quality,
        "planned_weight": region.planned_weight,
        "weight": region.weight,
        "answered": region.answered,
        "observed": region.observed,
        "withheld": region.withheld,
        "requests_per_second": region.requests_per_second,
    })
}

fn plan(plan: &Plan) -> Value {
    let region = |region: &RegionPlan| {
        json!({
            "region": region.region,
            "weight": region.weight,
            "load": region.load,
            "shed": region.shed,
            "capacity": region.capacity,
            "capacity_factor": region.capacity_factor,
            "standing": region.standing().as_str_name().to_lowercase(),
            "why": region.why,
        })
    };
    json!({
        "version": plan.version,
        "epoch": plan.epoch,
        "basis": plan.basis().as_str_name().to_lowercase(),
        "demand": plan.demand,
        "regions": plan.regions.iter().map(region).collect::<Vec<_>>(),
    })
}

fn node(node: &NodeStatus) -> Value {
    let Serving { snapshot_version, plan_version, .. } = node.serving.clone().unwrap_or_default();
    json!({
        "id": node.id,
        "connected": node.connected,
        "serving": { "snapshot_version": snapshot_version, "plan_version": plan_version },
        "drift": node.drift,
        "build": node.build,
    })
}

fn drill(drill: &RunningDrill) -> Value {
    json!({
        "drill": drill.drill,
        "target": (!drill.target.is_empty()).then_some(&drill.target),
        "stage": drill.stage,
        "author": drill.author,
        "began_unix_ms": drill.began_unix_ms,
        "left_ms": drill.left_ms,
    })
}

fn order(order: &Override) -> Value {
    json!({
        "region": order.region,
        "act": act(order),
        "until_unix_ms": order.until_unix_ms,
        "reason": order.reason,
        "author": order.author,
    })
}

#[cfg(test)]
mod tests {
    use spillway_proto::control::Overrides;

    use super::*;

    fn status() -> StatusResponse {
        let region = |region: &str, weight, answered| RegionStatus {
            region: region.into(),
            phase: "up".into(),
            planned_weight: 0.5,
            weight,
            answered,
            observed: 0.25,
            ..RegionStatus::default()
        };
        let forced = RegionStatus {
            phase: "suspect".into(),
            withheld: "an operator forced it in, against the verdict: it failed too often".into(),
            ..region("us", 0.25, None)
        };
        let order = Override {
            region: "us".into(),
            act: Some(Act::ForceIn(true)),
            reason: "probes are\nwrong".into(),
            author: "alice".into(),
            ..Override::default()
        };
        StatusResponse {
            leader: "c-0".into(),
            regions: vec![region("eu", 0.75, Some(0.8)), forced],
            overrides: Some(Overrides { overrides: vec![order] }),
            drills: vec![RunningDrill {
                drill: "region-loss".into(),
                target: "us".into(),
                stage: "observe".into(),
                author: "bob".into(),
                began_unix_ms: 1_772_323_200_007,
                left_ms: 12_000,
                lease: 7,
            }],
            ..StatusResponse::default()
        }
    }

    #[test]
    fn a_drill_and_a_region_that_is_forced_in_are_told_before_all_else() {
        let text = tables(&status());
        let lines: Vec<&str> = text.lines().skip(1).take(3).collect();
        assert_eq!(
            lines,
            [
                "DRILL region-loss of us, observe, since 2026-03-01T00:00:00.007Z, by bob",
                "OVERRIDE us forced in, 0 s left, by alice: probes are wrong",
                "         !! an operator forced it in, against the verdict: it failed too often",
            ]
        );
        let shown = json(&status());
        assert_eq!(
            (&shown["drills"][0]["drill"], &shown["drills"][0]["left_ms"]),
            (&json!("region-loss"), &json!(12_000))
        );
        assert_eq!(shown["drills"][0].get("lease"), None, "who knows it could end the drill");
    }

    #[test]
    fn weights_are_shown_as_wanted_planned_answered_and_used() {
        let text = tables(&status());
        let row = text.lines().find(|line| line.starts_with("eu ")).unwrap();
        assert!(row.contains("50.0 %  75.0 %  80.0 %  25.0 %"), "{row}");
        let shown = json(&status());
        assert_eq!((&shown["regions"][0]["answered"], &shown["regions"][1]["answered"]), (&json!(0.8), &Value::Null));
    }
}
