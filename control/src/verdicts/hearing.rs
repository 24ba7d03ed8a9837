//! What is heard of all regions.
//!
//! The rule: a node speaks for itself. Sightings count as those of who sent them, and heartbeats for the gateway that
//! they are of; whom the Snapshot does not name is not heard.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use spillway_core::health::{Board, Gateway, Judgement, Noted, Outcome, Vantage};
use spillway_core::identity::{Role, SpiffeId};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::control::{self, sighting};

use super::answered::Answered;
use super::traffic::RegionTraffic;
use super::{HealthSettings, vantage};
use crate::distribution::Report;

/// Control and DNS nodes that are heard.
const MOST_CONTROLS: usize = 64;
/// How long such a node still counts as one that should be heard, after its last word.
const GONE: Duration = Duration::from_secs(60);

pub(super) struct Hearing {
    settings: HealthSettings,
    board: Board,
    regions: BTreeMap<Name, RegionTraffic>,
    gateways: BTreeSet<Gateway>,
    us: Vantage,
    /// Other control nodes and the DNS nodes, and when each was heard last.
    controls: BTreeMap<Vantage, Duration>,
    answered: Answered,
}

/// What a report calls for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// To be probed by all vantages.
    pub(super) nudged: Vec<Gateway>,
    /// Something failed: it should be judged soon.
    pub(super) failed: bool,
    /// What was not of this fleet, or could not be read.
    pub(super) ignored: usize,
    /// A heartbeat of figures that no gateway can have.
    pub(super) disbelieved: bool,
}

impl Hearing {
    /// `us`: this node's own vantage.
    pub(super) fn new(settings: HealthSettings, us: Vantage) -> Self {
        Self {
            board: Board::new(settings.verdict.clone()),
            settings,
            regions: BTreeMap::new(),
            gateways: BTreeSet::new(),
            us,
            controls: BTreeMap::new(),
            answered: Answered::default(),
        }
    }

    /// Takes in who there is.
    pub(super) fn keep(&mut self, snapshot: &Snapshot) {
        let of = |(region, spec): (&Name, &std::sync::Arc<spillway_core::resource::Region>)| {
            let region = region.clone();
            let gateway = move |name: &Name| Gateway { region: region.clone(), node: name.clone() };
            spec.gateways.iter().map(|at| gateway(&at.name)).collect::<Vec<_>>()
        };
        self.gateways = snapshot.regions.iter().flat_map(of).collect();
        self.regions.retain(|region, _| self.gateways.iter().any(|gateway| gateway.region == *region));
        for gateway in &self.gateways {
            let new = || RegionTraffic::new(self.settings.soft.clone());
            self.regions.entry(gateway.region.clone()).or_insert_with(new);
        }
        for (region, traffic) in &mut self.regions {
            traffic.keep(|node| self.gateways.contains(&Gateway { region: region.clone(), node: node.clone() }));
        }
        self.keep_board();
    }

    pub(super) fn hear(&mut self, report: &Report, now: Duration) -> Heard {
        match report {
            Report::Joined(id) => {
                self.meet(id, now);
                Heard::default()
            }
            Report::Left(id) => self.left(id),
            Report::Heartbeat(id, heartbeat) => {
                Heard { disbelieved: !self.counted(id, heartbeat, now), ..Heard::default() }
            }
            Report::Sightings(id, sightings) => self.sighted(id, sightings, now),
        }
    }

    /// What another leader knew of a region's capacity.
    pub(super) fn resume(&mut self, region: &Name, capacity: f64, now: Duration) {
        if let Some(traffic) = self.regions.get_mut(region) {
            traffic.resume(capacity, now);
        }
    }

    /// Looks at what was counted; `declared` says what a region is sized for.
    pub(super) fn observe(&mut self, declared: impl Fn(&Name) -> Option<f64>, now: Duration) {
        for (region, traffic) in &mut self.regions {
            traffic.observe(declared(region), now);
        }
        self.answered.forget(now);
        let before = self.controls.len();
        self.controls.retain(|_, heard| now.saturating_sub(*heard) <= GONE);
        if self.controls.len() < before {
            self.keep_board();
        }
    }

    /// A region's part of the answers of DNS nodes.
    pub(super) fn answered(&self, region: &Name) -> Option<f64> {
        self.answered.part(region)
    }

    pub(super) fn judge(&self, out: &BTreeSet<Name>, now: Duration) -> Judgement {
        self.board.judge(out, now)
    }

    pub(super) fn regions(&self) -> impl Iterator<Item = (&Name, &RegionTraffic)> {
        self.regions.iter()
    }

    pub(super) fn region(&self, name: &Name) -> Option<&RegionTraffic> {
        self.regions.get(name)
    }

    fn keep_board(&mut self) {
        let controls = self.controls.keys().chain([&self.us]).cloned();
        let vantages = self.gateways.iter().cloned().map(Vantage::Gateway).chain(controls);
        self.board.keep(&vantages.collect(), &self.gateways);
    }

    /// A control or DNS node is a vantage as long as it says something. The snapshot names none.
    fn meet(&mut self, id: &SpiffeId, now: Duration) {
        let vantage = vantage(id).filter(|vantage| *vantage != self.us);
        let Some(vantage @ (Vantage::Control { .. } | Vantage::Dns { .. })) = vantage else { return };
        if let Some(heard) = self.controls.get_mut(&vantage) {
            *heard = now;
        } else if self.controls.len() < MOST_CONTROLS {
            self.controls.insert(vantage, now);
            self.keep_board();
        }
    }

    /// A gateway whose stream ended may be gone.
    fn left(&mut self, id: &SpiffeId) -> Heard {
        match vantage(id) {
            Some(Vantage::Gateway(gateway)) if self.gateways.contains(&gateway) => {
                if let Some(traffic) = self.regions.get_mut(&gateway.region) {
                    traffic.left(&gateway.node);
                }
                Heard { nudged: vec![gateway], ..Heard::default() }
            }
            _ => Heard::default(),
        }
    }

    /// Takes in a heartbeat, if it is one that counts. False: it is not to be believed.
    fn counted(&mut self, id: &SpiffeId, heartbeat: &control::Heartbeat, now: Duration) -> bool {
        if let (Role::Dns { .. }, Some(told)) = (&id.role, &heartbeat.answers) {
            self.answered.hear(told, |region| self.regions.contains_key(region), now);
        }
        let (Role::Gateway { region, name }, Some(told)) = (&id.role, &heartbeat.traffic) else { return true };
        let known = self.gateways.contains(&Gateway { region: region.clone(), node: name.clone() });
        let traffic = self.regions.get_mut(region).filter(|_| known);
        traffic.is_none_or(|traffic| traffic.hear(name, told, now))
    }

    fn sighted(&mut self, id: &SpiffeId, sightings: &[control::Sighting], now: Duration) -> Heard {
        self.meet(id, now);
        let mut heard = Heard::default();
        for sighting in sightings {
            let read = vantage(id).zip(gateway_of(sighting)).zip(outcome_of(sighting.outcome()));
            let Some(((vantage, gateway), outcome)) = read else {
                heard.ignored += 1;
                continue;
            };
            match self.board.record(&vantage, &gateway, outcome, now) {
                Noted::Ignored => heard.ignored += 1,
                Noted::Counted => heard.failed |= outcome.is_failure(),
                Noted::Urgent => {
                    heard.failed = true;
                    heard.nudged.push(gateway);
                }
            }
        }
        heard
    }
}

fn gateway_of(sighting: &control::Sighting) -> Option<Gateway> {
    let (region, node) = (Name::parse(&sighting.region).ok()?, Name::parse(&sighting.gateway).ok()?);
    Some(Gateway { region, node })
}

fn outcome_of(outcome: sighting::Outcome) -> Option<Outcome> {
    match outcome {
        sighting::Outcome::Good => Some(Outcome::Good),
        sighting::Outcome::Overloaded => Some(Outcome::Overloaded),
        sighting::Outcome::Failed => Some(Outcome::Failed),
        sighting::Outcome::Refused => Some(Outcome::Refused),
        sighting::Outcome::Unspecified => None,
    }
}
