//! Why a drill must not begin now: all reasons at once (THREATS 65).
//!
//! The rule: a drill begins only where everything is as planned, and what is left without the target is known to be
//! enough. What is not known speaks against it.

use std::collections::BTreeMap;

use super::definition::{Drill, Expected};
use super::fault::{Fault, Names, named};
use crate::health::Phase;
use crate::units::Name;

/// What the control plane and the injector say before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Situation {
    /// Whether some control node leads.
    pub leader: bool,
    pub regions: BTreeMap<Name, RegionBefore>,
    /// Requests/s asked of all regions.
    pub demand: Option<f64>,
    /// Regions with an operator's override.
    pub overridden: Vec<String>,
    /// Other drills that run.
    pub drills: Vec<String>,
    /// Whether everybody is told of this one, or why not.
    pub announced: Announcement,
    /// Processes and links that the injector can reach.
    pub processes: Vec<String>,
    pub links: Vec<String>,
    /// How synthetic clients fared before: requests, and those that were not served.
    pub requests: u64,
    pub failed: u64,
}

/// Whether the control plane has taken note of the drill.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Announcement {
    Taken,
    Refused(String),
    #[default]
    Unanswered,
}

/// One region before.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionBefore {
    /// Up, and the like. None: a word that is not known.
    pub phase: Option<Phase>,
    /// Part of all traffic.
    pub weight: f64,
    /// Requests/s.
    pub capacity: Option<f64>,
}

/// One reason against it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("no control node leads")]
    NoLeader,
    #[error("the drill needs a target region: name one with --target")]
    NoTarget,
    #[error("there is no region '{0}'")]
    UnknownRegion(Name),
    #[error("the region '{0}' gets no traffic: its loss would show nothing")]
    Idle(Name),
    #[error("'{0}' would be the only region")]
    LastRegion(Name),
    #[error("the region '{region}' is {phase}, not UP")]
    NotUp { region: Name, phase: String },
    #[error("without the target there is capacity for {left:.0} requests/s, and {demand:.0} are asked")]
    Capacity { left: f64, demand: f64 },
    #[error("how much capacity there is without the target is not known{}", .0.as_ref().map(|region| format!(": '{region}' does not say")).unwrap_or_default())]
    UnknownCapacity(Option<Name>),
    #[error("there is an override for the region '{0}'")]
    Override(String),
    #[error("the drill '{0}' runs: see spillway status")]
    Running(String),
    #[error("the control plane did not take note of the drill{}", .0.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    Unannounced(Option<String>),
    #[error("the injector reaches no {what} that '{names}' names, but {}", if .known.is_empty() { "none at all".to_owned() } else { .known.join(", ") })]
    NamesNobody {
        /// Process or link.
        what: &'static str,
        names: String,
        known: Vec<String>,
    },
    #[error("{failed} of {requests} requests failed before the fault")]
    Failing { failed: u64, requests: u64 },
    #[error("no request of a synthetic client came through to be compared with")]
    NoRequests,
}

/// The region that a drill is about if nobody names one: of those with traffic the one with the least, then the first
/// by name.
pub fn choose_target(situation: &Situation) -> Option<Name> {
    let busy = situation.regions.iter().filter(|(_, region)| region.weight > 0.0);
    let least = busy.min_by(|(_, one), (_, other)| one.weight.total_cmp(&other.weight));
    least.map(|(name, _)| name.clone())
}

/// All reasons against the drill; none, and it may begin.
pub fn preflight(drill: &Drill, target: Option<&Name>, now: &Situation) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if !now.leader {
        refusals.push(Refusal::NoLeader);
    }
    match target {
        Some(target) => check_target(drill, target, now, &mut refusals),
        None if drill.needs_target() => refusals.push(Refusal::NoTarget),
        None => {}
    }
    for (region, before) in &now.regions {
        if before.phase != Some(Phase::Up) {
            let phase = before.phase.map_or_else(|| "in no known state".to_owned(), |phase| phase.to_string());
            refusals.push(Refusal::NotUp { region: region.clone(), phase });
        }
    }
    refusals.extend(now.overridden.iter().cloned().map(Refusal::Override));
    refusals.extend(now.drills.iter().cloned().map(Refusal::Running));
    match &now.announced {
        Announcement::Taken => {}
        // That another one runs is said already.
        Announcement::Refused(_) if !now.drills.is_empty() => {}
        Announcement::Refused(why) => refusals.push(Refusal::Unannounced(Some(why.clone()))),
        Announcement::Unanswered => refusals.push(Refusal::Unannounced(None)),
    }
    for fault in &drill.faults {
        check_names(fault, target, now, &mut refusals);
    }
    let worst = drill.guards.success.ratio().max(1.0 - drill.objectives.errors.ratio());
    let served = now.requests.saturating_sub(now.failed);
    if now.requests == 0 {
        refusals.push(Refusal::NoRequests);
    } else if (served as f64) < worst * now.requests as f64 {
        refusals.push(Refusal::Failing { failed: now.failed, requests: now.requests });
    }
    refusals
}

fn check_target(drill: &Drill, target: &Name, now: &Situation, refusals: &mut Vec<Refusal>) {
    let Some(before) = now.regions.get(target) else {
        return refusals.push(Refusal::UnknownRegion(target.clone()));
    };
    if drill.expects == Expected::Failover && before.weight <= 0.0 {
        refusals.push(Refusal::Idle(target.clone()));
    }
    let lost = drill.loses.ratio();
    if lost <= 0.0 {
        return;
    }
    if now.regions.len() == 1 {
        return refusals.push(Refusal::LastRegion(target.clone()));
    }
    let unknown = |region: &Name| {
        let needed = region != target || lost < 1.0;
        needed && now.regions.get(region).is_some_and(|before| before.capacity.is_none())
    };
    let left = |(region, before): (&Name, &RegionBefore)| {
        before.capacity.unwrap_or_default() * if region == target { 1.0 - lost } else { 1.0 }
    };
    let left: f64 = now.regions.iter().map(left).sum();
    match (now.demand, now.regions.keys().find(|region| unknown(region))) {
        (Some(demand), _) if left >= demand => {}
        (Some(demand), None) => refusals.push(Refusal::Capacity { left, demand }),
        (_, missing) if !drill.accepts_unknown_capacity => refusals.push(Refusal::UnknownCapacity(missing.cloned())),
        _ => {}
    }
}

fn check_names(fault: &Fault, target: Option<&Name>, now: &Situation, refusals: &mut Vec<Refusal>) {
    let processes = (&now.processes, "process");
    let on = if fault.act.is_of_links() { (&now.links, "link") } else { processes };
    for (patterns, (known, what)) in [(&fault.on, on), (&fault.from, processes)] {
        if !patterns.is_empty() && named(patterns, target, known).is_empty() {
            let patterns: Vec<String> = patterns.iter().map(Names::to_string).collect();
            refusals.push(Refusal::NamesNobody { what, names: patterns.join(", "), known: known.clone() });
        }
    }
}

#[cfg(test)]
#[path = "preflight_tests.rs"]
mod tests;
