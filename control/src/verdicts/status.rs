//! What `spillway status` shows of regions.

use std::sync::Arc;

use spillway_core::health::{Event, Quality, Record, Records, What};
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_runtime::plan::{Published, encode};

use super::Verdicts;
use super::judge::{Judge, Seen};
use super::stored::phase_word;
use crate::intent::StatusSource;

/// The parts of a `StatusResponse` that are about regions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Findings {
    /// In force; none before the first.
    pub plan: Option<control::Plan>,
    pub regions: Vec<control::RegionStatus>,
}

impl StatusSource for Verdicts {
    fn add_to(&self, status: &mut control::StatusResponse) {
        let findings = self.findings();
        status.plan.clone_from(&findings.plan);
        status.regions.clone_from(&findings.regions);
    }
}

/// An event in words.
pub(super) fn words(event: &Event) -> String {
    let region = &event.region;
    match &event.what {
        What::Moved(moved) => format!("{region}: {} -> {}: {}", moved.from, moved.to, moved.why),
        What::Withheld(_, withheld) => format!("{region} stays though it should go out: {withheld}"),
        What::Ended(order) => format!("{region}: an override ended ({})", order.reason),
    }
}

/// As the leader sees it.
pub(super) fn judged(judge: &Judge, written: Option<&Published>) -> Findings {
    let seen: Vec<Seen<'_>> = judge.seen().collect();
    let planned: f64 = seen.iter().map(|seen| seen.planned).sum();
    let load = |seen: &Seen<'_>| seen.traffic.and_then(|traffic| traffic.load()).unwrap_or_default();
    let all: f64 = seen.iter().map(load).sum();
    let part = |of: f64, all: f64| if all > 0.0 { of / all } else { 0.0 };
    let region = |seen: &Seen<'_>| control::RegionStatus {
        region: seen.name.to_string(),
        phase: phase_word(seen.region.phase()).to_owned(),
        why: seen.region.why().to_string(),
        evidence: seen.evidence.to_string(),
        quality: quality(seen),
        planned_weight: part(seen.planned, planned),
        weight: written.map_or(0.0, |written| written.plan.weight(seen.name)),
        observed: part(load(seen), all),
        answered: seen.answered,
        withheld: seen.withheld.clone().unwrap_or_default(),
        requests_per_second: load(seen),
        failing_pairs: u32::try_from(seen.evidence.failing + seen.evidence.failed).unwrap_or(u32::MAX),
    };
    let regions = seen.iter().map(region).collect();
    Findings { plan: written.map(encode), regions }
}

/// As the leader last wrote it.
pub(super) fn read(published: &Published, records: &Records) -> Findings {
    let region = |(name, record): (&Name, &Record)| {
        let allotment = published.plan.regions.get(name);
        control::RegionStatus {
            region: name.to_string(),
            phase: phase_word(record.phase).to_owned(),
            why: record.why.to_string(),
            planned_weight: allotment.map_or(0.0, |allotment| allotment.terms.planned),
            weight: published.plan.weight(name),
            ..control::RegionStatus::default()
        }
    };
    let regions = records.regions.iter().map(region).collect();
    Findings { plan: Some(encode(published)), regions }
}

fn quality(seen: &Seen<'_>) -> String {
    let word = match seen.quality {
        Quality::Fine => return "fine".to_owned(),
        Quality::Breaching => "breaching",
        Quality::Slow => "slow",
        Quality::Failing => "failing",
    };
    match seen.traffic {
        Some(traffic) => format!("{word}: {}", traffic.reason()),
        None => word.to_owned(),
    }
}

/// What is shared with the rest of the process.
pub(super) type Shared = tokio::sync::watch::Sender<Arc<Findings>>;
