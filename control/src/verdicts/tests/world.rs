//! Three regions, those who probe them, and a leader with a real store, in virtual time.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use spillway_core::health::{Outcome, ProbeSettings, Schedule, Vantage};
use spillway_core::identity::SpiffeId;
use spillway_core::resource::parse;
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_proto::control::r#override::Act;
use spillway_runtime::audit::{Audit, AuditSettings};
use spillway_runtime::plan::{Published, open};
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::vantage::outcome_code;
use tempfile::TempDir;
use tokio::sync::{broadcast, mpsc, watch};

use crate::distribution::Report;
use crate::intent::{Drills, Events, StatusSource};
use crate::store::{Fence, Leadership, Store, StoreSettings, Write};
use crate::verdicts::orders::Times;
use crate::verdicts::{HealthSettings, Inputs, Judging, Verdicts, vantage};

pub const SECOND: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(50);
const TICK: Duration = Duration::from_millis(250);
const START: Duration = Duration::from_secs(1_000_000);
const WALL: Duration = Duration::from_secs(1_800_000_000);
const REGIONS: [&str; 3] = ["eu", "us", "ap"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    Well,
    Killed,
    Silent,
}

/// Who probes whom, and when.
struct Probing {
    vantage: usize,
    gateway: usize,
    schedule: Schedule,
    ends: Option<(Duration, Outcome)>,
}

/// Three regions of one gateway, whose control node, in eu, leads; all at one time.
pub struct World {
    pub folder: TempDir,
    pub store: Store,
    pub leadership: Option<Leadership>,
    pub leading: watch::Sender<Option<Fence>>,
    _reports: mpsc::Sender<Report>,
    newest: watch::Sender<Arc<Snapshot>>,
    /// What all nodes may serve: the newest version, unless a test says otherwise.
    pub served: watch::Sender<Option<Arc<Snapshot>>>,
    pub judging: Judging,
    /// Hears all that the leader hears.
    pub heir: Option<Judging>,
    pub verdicts: Verdicts,
    pub nudges: broadcast::Receiver<String>,
    pub events: Events,
    pub drills: Drills,
    pub audit: Audit,
    pub metrics: Metrics,
    pub now: Duration,
    next_tick: Duration,
    pub lives: [Life; 3],
    /// Vantages to which nothing comes back.
    pub cut_off: Vec<usize>,
    probing: Vec<Probing>,
    /// Requests/s that each region serves, and refuses.
    pub loads: [(u64, u64); 3],
    pub errors: [u64; 3],
    next_beat: Duration,
    pub plans: Vec<(Duration, Published)>,
}

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://td/region/{path}")).unwrap()
}

pub fn vantages() -> Vec<SpiffeId> {
    ["eu/gateway/g", "us/gateway/g", "ap/gateway/g", "eu/control/c"].map(id).to_vec()
}

pub fn snapshot(capacity: Option<u32>) -> Arc<Snapshot> {
    snapshot_with(&REGIONS, capacity)
}

/// One in which these regions alone have gateways.
fn snapshot_with(staffed: &[&str], capacity: Option<u32>) -> Arc<Snapshot> {
    let region = |(index, name): (usize, &str)| {
        let capacity = capacity.map_or(String::new(), |capacity| format!(", capacity: {capacity}/s"));
        let gateway = format!("{{name: g, address: \"10.0.0.{}:443\"}}", index + 1);
        let gateways = if staffed.contains(&name) { &*gateway } else { "" };
        format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: td, gateways: \
             [{gateways}]{capacity}}}\n"
        )
    };
    let text: Vec<String> = REGIONS.into_iter().enumerate().map(region).collect();
    Arc::new(Snapshot::compile(1, &parse(&text.join("---\n")).unwrap()).unwrap())
}

impl World {
    pub async fn new(capacity: Option<u32>) -> Self {
        Self::under(HealthSettings::default(), capacity).await
    }

    /// One whose control node has these settings.
    pub async fn under(health: HealthSettings, capacity: Option<u32>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
        let leadership = store.campaign(&name("c"), "127.0.0.1:1").await.unwrap();
        let leading = watch::Sender::new(Some(leadership.fence.clone()));
        let metrics = Metrics::new("test");
        let path = folder.path().join("audit.log");
        let settings = AuditSettings { path, rotate: u64::MAX, keep: 1 };
        let audit = Audit::start(Some(&settings), "control", &id("eu/control/c"), &metrics).unwrap();
        let probe = health.verdict.probe.clone();
        let (outside, judging, verdicts) = judging_by(health, &store, &leading, capacity, &metrics, audit.clone());
        let Outside { reports, nudges, events, drills, newest, served } = outside;
        let mut probing = Vec::new();
        for (place, id) in vantages().iter().enumerate() {
            for (gateway, region) in REGIONS.into_iter().enumerate() {
                let own = vantage(id).unwrap().region() == Some(&name(region));
                if !own {
                    let first = START + Duration::from_millis(700) * (place * 3 + gateway) as u32 / 2;
                    let is_gateway = matches!(vantage(id), Some(Vantage::Gateway(_)));
                    let probe = if is_gateway { ProbeSettings::default() } else { probe.clone() };
                    let schedule = Schedule::new(probe, first);
                    probing.push(Probing { vantage: place, gateway, schedule, ends: None });
                }
            }
        }
        Self {
            folder,
            store,
            leadership: Some(leadership),
            leading,
            _reports: reports,
            newest,
            served,
            judging,
            heir: None,
            nudges: nudges.subscribe(),
            events,
            drills,
            audit,
            verdicts,
            metrics,
            now: START,
            next_tick: START,
            lives: [Life::Well; 3],
            cut_off: Vec::new(),
            probing,
            loads: [(300, 0); 3],
            errors: [0; 3],
            next_beat: START + SECOND,
            plans: Vec::new(),
        }
    }

    pub fn times(&self) -> Times {
        Times { now: self.now, wall: WALL + (self.now - START) }
    }

    /// From now on these regions alone have gateways.
    pub fn staff(&mut self, regions: &[&str]) {
        let snapshot = snapshot_with(regions, None);
        self.newest.send_replace(snapshot.clone());
        self.served.send_replace(Some(snapshot));
    }

    /// A gateway dies, and with it its connections: everybody who had one is told.
    pub fn kill(&mut self, gateway: usize) {
        self.lives[gateway] = Life::Killed;
        let now = self.now;
        self.probing
            .iter_mut()
            .filter(|probing| probing.gateway == gateway)
            .for_each(|probing| probing.schedule.nudge(now));
    }

    pub async fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step().await;
        }
    }

    /// Runs until the plan is so; how long it took.
    pub async fn until(&mut self, what: &str, most: Duration, is_so: impl Fn(&Published) -> bool) -> Duration {
        let began = self.now;
        while !self.plans.last().is_some_and(|(_, plan)| is_so(plan)) {
            assert!(self.now < began + most, "{what}, not within {most:?}: {:#?}", self.verdicts.findings());
            self.step().await;
        }
        self.now - began
    }

    async fn step(&mut self) {
        self.now += STEP;
        let mut soon = false;
        for index in 0..self.probing.len() {
            soon |= self.probe(index);
        }
        if self.now >= self.next_beat {
            self.next_beat += SECOND * 5;
            self.beat();
        }
        while let Ok(nudged) = self.nudges.try_recv() {
            let now = self.now;
            for probing in &mut self.probing {
                if nudged == format!("{}/g", REGIONS[probing.gateway]) {
                    probing.schedule.nudge(now);
                }
            }
        }
        if soon || self.now >= self.next_tick {
            self.next_tick = self.now + TICK;
            self.tick().await;
        }
    }

    async fn tick(&mut self) {
        let times = self.times();
        self.judging.tick(times).await;
        if let Some(heir) = &mut self.heir {
            heir.tick(times).await;
        }
        let plan = self.verdicts.plan().borrow().clone();
        let Some(plan) = plan.map(|sealed| open(&sealed).unwrap()) else { return };
        let newest = self.plans.last().map_or(0, |(_, known)| known.plan.version);
        if plan.plan.version != newest {
            assert!(plan.plan.version > newest, "numbers only rise");
            plan.plan.check(None, |region| REGIONS.contains(&region.as_str())).unwrap();
            self.plans.push((self.now, plan));
        }
    }

    fn probe(&mut self, index: usize) -> bool {
        let (vantage, gateway) = (self.probing[index].vantage, self.probing[index].gateway);
        if self.lives.get(vantage).is_some_and(|life| *life != Life::Well) {
            self.probing[index].ends = None;
            return false;
        }
        let now = self.now;
        let probing = &mut self.probing[index];
        if probing.ends.is_none() && probing.schedule.due() <= now {
            let (takes, outcome) = match self.lives[gateway] {
                _ if self.cut_off.contains(&vantage) => (SECOND * 2, Outcome::Failed),
                Life::Well => (Duration::ZERO, Outcome::Good),
                Life::Killed => (Duration::ZERO, Outcome::Refused),
                Life::Silent => (SECOND * 2, Outcome::Failed),
            };
            probing.schedule.begin(now);
            probing.ends = Some((now + takes, outcome));
        }
        let Some((_, outcome)) = probing.ends.take_if(|(ends, _)| *ends <= now) else { return false };
        probing.schedule.end(outcome);
        let sighting = control::Sighting {
            region: REGIONS[gateway].into(),
            gateway: "g".into(),
            outcome: outcome_code(outcome).into(),
            round_trip_us: 1,
        };
        self.hear(&Report::Sightings(vantages()[vantage].clone(), vec![sighting]))
    }

    pub fn hear(&mut self, report: &Report) -> bool {
        if let Some(heir) = &mut self.heir {
            heir.hear(report, self.now);
        }
        self.judging.hear(report, self.now)
    }

    fn beat(&mut self) {
        for gateway in 0..3 {
            if self.lives[gateway] != Life::Well {
                continue;
            }
            let (served, shed) = self.loads[gateway];
            let requests = (served + shed) * 5;
            let traffic = control::Traffic {
                milliseconds: 5_000,
                requests,
                classes: vec![0, 0, requests / 2, requests - requests / 2],
                served: served * 5,
                errors: self.errors[gateway] * 5,
                shed: shed * 5,
                ..control::Traffic::default()
            };
            let heartbeat = control::Heartbeat { traffic: Some(traffic), ..control::Heartbeat::default() };
            self.hear(&Report::Heartbeat(vantages()[gateway].clone(), heartbeat));
        }
    }

    pub fn weights(&self) -> [f64; 3] {
        let plan = &self.plans.last().expect("a plan").1.plan;
        REGIONS.map(|region| plan.weight(&name(region)))
    }

    pub fn phase(&self, region: &str) -> String {
        let findings = self.verdicts.findings();
        findings.regions.iter().find(|status| status.region == region).expect("a region").phase.clone()
    }

    pub fn withheld(&self, region: &str) -> String {
        let findings = self.verdicts.findings();
        findings.regions.iter().find(|status| status.region == region).expect("a region").withheld.clone()
    }

    /// Events of the audit log so far, with that name.
    pub fn audited(&self, event: &str) -> Vec<serde_json::Value> {
        self.audit.flush(SECOND * 5);
        let text = std::fs::read_to_string(self.folder.path().join("audit.log")).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        records.filter(|record| record["event"] == event).collect()
    }

    /// As people see it.
    pub fn status(&self) -> control::StatusResponse {
        let mut status = control::StatusResponse::default();
        self.verdicts.add_to(&mut status);
        self.events.add_to(&mut status);
        status
    }

    /// Plans by which traffic went elsewhere.
    pub fn moves(&self) -> usize {
        let moved = |before: &Published, after: &Published| {
            REGIONS
                .iter()
                .any(|region| (before.plan.weight(&name(region)) - after.plan.weight(&name(region))).abs() > 0.001)
        };
        self.plans.windows(2).filter(|pair| moved(&pair[0].1, &pair[1].1)).count()
    }

    pub async fn order(&mut self, region: &str, act: Act, seconds: u64) {
        let until = self.times().wall + Duration::from_secs(seconds);
        let order = control::Override {
            region: region.into(),
            act: Some(act),
            until_unix_ms: i64::try_from(until.as_millis()).unwrap(),
            reason: "test".into(),
            author: String::new(),
        };
        let key = format!("overrides/{region}");
        self.write(Write::Put(key, order.encode_to_vec().into())).await;
    }

    pub async fn write(&self, write: Write) {
        let fence = self.leading.borrow().clone().unwrap();
        self.store.commit(&fence, &[], vec![write]).await.unwrap();
    }
}

/// The other ends.
pub struct Outside {
    pub reports: mpsc::Sender<Report>,
    pub nudges: broadcast::Sender<String>,
    pub events: Events,
    pub drills: Drills,
    pub newest: watch::Sender<Arc<Snapshot>>,
    /// What all nodes may serve.
    pub served: watch::Sender<Option<Arc<Snapshot>>>,
}

pub fn judging(
    store: &Store,
    leading: &watch::Sender<Option<Fence>>,
    capacity: Option<u32>,
    metrics: &Metrics,
    audit: Audit,
) -> (Outside, Judging, Verdicts) {
    judging_by(HealthSettings::default(), store, leading, capacity, metrics, audit)
}

fn judging_by(
    health: HealthSettings,
    store: &Store,
    leading: &watch::Sender<Option<Fence>>,
    capacity: Option<u32>,
    metrics: &Metrics,
    audit: Audit,
) -> (Outside, Judging, Verdicts) {
    let (reports, heard) = mpsc::channel(1_024);
    let (nudges, events) = (broadcast::Sender::new(64), Events::default());
    let (newest, intent) = watch::channel(snapshot(capacity));
    let (served, settled) = watch::channel(Some(intent.borrow().clone()));
    let drills = Drills::default();
    let inputs = Inputs {
        us: vantage(&id("eu/control/c")).unwrap(),
        reports: heard,
        snapshot: Box::new(move || Some(intent.borrow().clone())),
        served: Box::new(move || settled.borrow().clone()),
        store: store.clone(),
        leading: leading.subscribe(),
        nudges: nudges.clone(),
        shared: broadcast::Sender::new(1),
        audit,
        events: events.clone(),
        drills: drills.clone(),
    };
    let (judging, verdicts) = Judging::new(inputs, health, metrics);
    (Outside { reports, nudges, events, drills, newest, served }, judging, verdicts)
}

pub fn near(weights: [f64; 3], expected: [f64; 3]) {
    let close = weights.iter().zip(expected).all(|(one, other)| (one - other).abs() < 0.002);
    assert!(close, "{weights:?}, expected {expected:?}");
}

pub const THIRD: f64 = 1.0 / 3.0;
