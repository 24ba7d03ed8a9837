//! All that is heard and ordered, to a plan. No store and no clock: `Times` come with each call.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use spillway_core::failover::{self, Demand, Plan, Traffic};
use spillway_core::health::{Event, Evidence, Fleet, Judgement, Quality, Records, Region, Vantage, Word};
use spillway_core::resource;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_runtime::plan::Published;

use super::HealthSettings;
use super::hearing::{Heard, Hearing};
use super::orders::{Orders, Times};
use super::traffic::RegionTraffic;
use crate::distribution::Report;

pub(super) struct Judge {
    settings: HealthSettings,
    snapshot: Option<Arc<Snapshot>>,
    /// Planned weight and declared capacity of the regions that can be reached.
    sites: BTreeMap<Name, Site>,
    hearing: Hearing,
    fleet: Fleet,
    orders: Orders,
    demand: Demand,
    /// The proportions of classes in it, as last known.
    classes: [f64; 4],
    judgement: Judgement,
}

#[derive(Clone, Copy, Debug)]
struct Site {
    planned: f64,
    capacity: Option<f64>,
}

/// What is known of one region.
pub(super) struct Seen<'a> {
    pub(super) name: &'a Name,
    pub(super) region: &'a Region,
    pub(super) planned: f64,
    pub(super) evidence: Evidence,
    pub(super) quality: Quality,
    pub(super) traffic: Option<&'a RegionTraffic>,
    pub(super) withheld: Option<String>,
    pub(super) answered: Option<f64>,
}

impl Judge {
    pub(super) fn new(settings: HealthSettings, us: Vantage) -> Self {
        Self {
            hearing: Hearing::new(settings.clone(), us),
            fleet: Fleet::new(settings.fleet.clone()),
            settings,
            snapshot: None,
            sites: BTreeMap::new(),
            orders: Orders::default(),
            demand: Demand::default(),
            classes: [0.0; 4],
            judgement: Judgement::default(),
        }
    }

    /// Goes on where another leader ended. What was heard stays heard.
    pub(super) fn resume(&mut self, records: Records, plan: Option<&Plan>, now: Duration) {
        self.fleet = Fleet::resume(self.settings.fleet.clone(), records, now);
        self.orders = Orders::default();
        self.snapshot = None;
        let Some(plan) = plan else { return };
        // What is shed and carried must not change because the heartbeats are still to come.
        self.demand.observe([plan.demand], now);
        self.classes = plan.classes;
        for (region, allotment) in &plan.regions {
            if let Some(capacity) = allotment.terms.capacity {
                self.hearing.resume(region, capacity, now);
            }
        }
    }

    /// Takes in which regions there are.
    pub(super) fn keep(&mut self, snapshot: &Arc<Snapshot>, now: Duration) -> Vec<Event> {
        if self.snapshot.as_ref().is_some_and(|known| Arc::ptr_eq(known, snapshot)) {
            return Vec::new();
        }
        self.snapshot = Some(snapshot.clone());
        let reachable = snapshot.regions.iter().filter(|(_, region)| !region.gateways.is_empty());
        let site = |region: &resource::Region| Site {
            planned: region.weight,
            capacity: region.capacity.map(|rate| rate.per_second()),
        };
        self.sites = reachable.map(|(name, region)| (name.clone(), site(region))).collect();
        self.hearing.keep(snapshot);
        let names: BTreeSet<Name> = self.sites.keys().cloned().collect();
        let events = self.fleet.keep(&names, now);
        self.orders.note(&events);
        events
    }

    pub(super) fn hear(&mut self, report: &Report, now: Duration) -> Heard {
        self.hearing.hear(report, now)
    }

    /// What operators want. Also told: what has no effect, in words.
    pub(super) fn order(
        &mut self,
        wanted: &BTreeMap<Name, control::Override>,
        times: Times,
    ) -> (Vec<Event>, Vec<String>) {
        self.orders.take(wanted, &mut self.fleet, times)
    }

    /// Judges all regions, and moves them.
    pub(super) fn observe(&mut self, now: Duration) -> Vec<Event> {
        self.look(now);
        let word = |(name, evidence): (&Name, &Evidence)| {
            let quality = self.hearing.region(name).map_or(Quality::Fine, |traffic| traffic.quality(now));
            (name.clone(), Word::new(evidence, quality))
        };
        let words = self.judgement.regions.iter().map(word).collect();
        let events = self.fleet.observe(&words, now);
        self.orders.note(&events);
        events
    }

    /// Looks, and moves nothing: what a node does that does not lead.
    pub(super) fn look(&mut self, now: Duration) {
        let sites = &self.sites;
        self.hearing.observe(|name| sites.get(name).and_then(|site| site.capacity), now);
        self.judgement = self.hearing.judge(&self.fleet.out(), now);
        self.demand.observe(self.hearing.regions().map(|(_, traffic)| traffic.load()), now);
        let mut classes = [0.0; 4];
        for (_, traffic) in self.hearing.regions() {
            classes.iter_mut().zip(traffic.classes()).for_each(|(sum, rate)| *sum += rate);
        }
        let sum: f64 = classes.iter().sum();
        if sum > 0.0 {
            self.classes = classes.map(|rate| rate / sum);
        }
    }

    /// The plan of now: of the regions that all nodes may serve and that are wanted still, as no node takes a plan with
    /// one that it does not know. None without such regions that can be reached.
    pub(super) fn plan(&self, served: &Snapshot, (version, epoch): (u64, u64), times: Times) -> Option<Published> {
        let region = |(name, served): (&Name, &Arc<resource::Region>)| {
            let traffic = self.hearing.region(name);
            let declared = served.capacity.map(|rate| rate.per_second());
            let region = failover::Region {
                planned: served.weight,
                share: self.fleet.region(name).map_or(1.0, Region::share),
                capacity: declared.or_else(|| traffic.and_then(RegionTraffic::measured)),
                load: traffic.and_then(RegionTraffic::load),
                overridden: self.orders.of(name, &self.fleet, times),
            };
            (name.clone(), region)
        };
        let regions: BTreeMap<Name, failover::Region> =
            served.regions.iter().filter(|(name, _)| self.sites.contains_key(*name)).map(region).collect();
        let traffic = Traffic { demand: self.demand.at(times.now), classes: self.classes };
        let plan = Plan::of(version, &regions, &traffic, times.now)?;
        let standing = |seen: Seen<'_>| (seen.name.clone(), (seen.region.phase().standing(), seen.why()));
        let standings = self.seen().filter(|seen| regions.contains_key(seen.name)).map(standing).collect();
        Some(Published { epoch, plan, standings })
    }

    pub(super) fn records(&self, now: Duration) -> Records {
        self.fleet.records(now)
    }

    pub(super) fn judgement(&self) -> &Judgement {
        &self.judgement
    }

    pub(super) fn seen(&self) -> impl Iterator<Item = Seen<'_>> {
        self.fleet.standings().map(|standing| Seen {
            name: standing.name,
            region: standing.region,
            planned: self.sites.get(standing.name).map_or(0.0, |site| site.planned),
            evidence: self.judgement.regions.get(standing.name).copied().unwrap_or_default(),
            quality: standing.word.quality,
            traffic: self.hearing.region(standing.name),
            withheld: standing.withheld.map(|withheld| withheld.to_string()),
            answered: self.hearing.answered(standing.name),
        })
    }
}

impl Seen<'_> {
    /// For people: its phase and why, and what was withheld.
    fn why(&self) -> String {
        let why = format!("{}: {}", self.region.phase(), self.region.why());
        match &self.withheld {
            Some(withheld) => format!("{why}; it stays, since {withheld}"),
            None => why,
        }
    }
}
