//! Vantages and regions in virtual time, and a real store.

use std::collections::BTreeMap;
use std::time::Duration;

use prost::Message;
use spillway_core::failover::{Basis, Standing};
use spillway_core::health::{Outcome, ProbeSettings, Schedule};
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
use tokio::sync::{broadcast, mpsc};

use super::orders::Times;
use super::*;
use crate::distribution::Report;
use crate::intent::{Drills, Events, StatusSource};
use crate::store::{Fence, Leadership, Store, StoreSettings, Write};

const SECOND: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(50);
const TICK: Duration = Duration::from_millis(250);
const START: Duration = Duration::from_secs(1_000_000);
const WALL: Duration = Duration::from_secs(1_800_000_000);
const REGIONS: [&str; 3] = ["eu", "us", "ap"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
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
struct World {
    folder: TempDir,
    store: Store,
    leadership: Option<Leadership>,
    leading: watch::Sender<Option<Fence>>,
    _reports: mpsc::Sender<Report>,
    judging: Judging,
    verdicts: Verdicts,
    nudges: broadcast::Receiver<String>,
    events: Events,
    drills: Drills,
    audit: Audit,
    metrics: Metrics,
    now: Duration,
    next_tick: Duration,
    lives: [Life; 3],
    /// Vantages to which nothing comes back.
    cut_off: Vec<usize>,
    probing: Vec<Probing>,
    /// Requests/s that each region serves, and refuses.
    loads: [(u64, u64); 3],
    errors: [u64; 3],
    next_beat: Duration,
    plans: Vec<(Duration, Published)>,
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://td/region/{path}")).unwrap()
}

fn vantages() -> Vec<SpiffeId> {
    ["eu/gateway/g", "us/gateway/g", "ap/gateway/g", "eu/control/c"].map(id).to_vec()
}

fn snapshot(capacity: Option<u32>) -> Arc<Snapshot> {
    let region = |(index, name): (usize, &str)| {
        let capacity = capacity.map_or(String::new(), |capacity| format!(", capacity: {capacity}/s"));
        format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: td, gateways: \
             [{{name: g, address: \"10.0.0.{}:443\"}}]{capacity}}}\n",
            index + 1
        )
    };
    let text: Vec<String> = REGIONS.into_iter().enumerate().map(region).collect();
    Arc::new(Snapshot::compile(1, &parse(&text.join("---\n")).unwrap()).unwrap())
}

impl World {
    async fn new(capacity: Option<u32>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
        let leadership = store.campaign(&name("c"), "127.0.0.1:1").await.unwrap();
        let leading = watch::Sender::new(Some(leadership.fence.clone()));
        let metrics = Metrics::new("test");
        let path = folder.path().join("audit.log");
        let settings = AuditSettings { path, rotate: u64::MAX, keep: 1 };
        let audit = Audit::start(Some(&settings), "control", &id("eu/control/c"), &metrics).unwrap();
        let (Outside { reports, nudges, events, drills }, judging, verdicts) =
            judging(&store, &leading, capacity, &metrics, audit.clone());
        let mut probing = Vec::new();
        for (vantage, id) in vantages().iter().enumerate() {
            for (gateway, region) in REGIONS.into_iter().enumerate() {
                let own = super::vantage(id).unwrap().region() == Some(&name(region));
                if !own {
                    let first = START + Duration::from_millis(700) * (vantage * 3 + gateway) as u32 / 2;
                    let schedule = Schedule::new(ProbeSettings::default(), first);
                    probing.push(Probing { vantage, gateway, schedule, ends: None });
                }
            }
        }
        Self {
            folder,
            store,
            leadership: Some(leadership),
            leading,
            _reports: reports,
            judging,
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

    fn times(&self) -> Times {
        Times { now: self.now, wall: WALL + (self.now - START) }
    }

    /// A gateway dies, and with it its connections: everybody who had one is told.
    fn kill(&mut self, gateway: usize) {
        self.lives[gateway] = Life::Killed;
        let now = self.now;
        self.probing
            .iter_mut()
            .filter(|probing| probing.gateway == gateway)
            .for_each(|probing| probing.schedule.nudge(now));
    }

    async fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step().await;
        }
    }

    /// Runs until the plan is so; how long it took.
    async fn until(&mut self, what: &str, most: Duration, is_so: impl Fn(&Published) -> bool) -> Duration {
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
        self.judging.hear(&Report::Sightings(vantages()[vantage].clone(), vec![sighting]), now)
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
            self.judging.hear(&Report::Heartbeat(vantages()[gateway].clone(), heartbeat), self.now);
        }
    }

    fn weights(&self) -> [f64; 3] {
        let plan = &self.plans.last().expect("a plan").1.plan;
        REGIONS.map(|region| plan.weight(&name(region)))
    }

    fn phase(&self, region: &str) -> String {
        let findings = self.verdicts.findings();
        findings.regions.iter().find(|status| status.region == region).expect("a region").phase.clone()
    }

    fn withheld(&self, region: &str) -> String {
        let findings = self.verdicts.findings();
        findings.regions.iter().find(|status| status.region == region).expect("a region").withheld.clone()
    }

    /// Events of the audit log so far, with that name.
    fn audited(&self, event: &str) -> Vec<serde_json::Value> {
        self.audit.flush(SECOND * 5);
        let text = std::fs::read_to_string(self.folder.path().join("audit.log")).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        records.filter(|record| record["event"] == event).collect()
    }

    /// As people see it.
    fn status(&self) -> control::StatusResponse {
        let mut status = control::StatusResponse::default();
        self.verdicts.add_to(&mut status);
        self.events.add_to(&mut status);
        status
    }

    /// Plans by which traffic went elsewhere.
    fn moves(&self) -> usize {
        let moved = |before: &Published, after: &Published| {
            REGIONS
                .iter()
                .any(|region| (before.plan.weight(&name(region)) - after.plan.weight(&name(region))).abs() > 0.001)
        };
        self.plans.windows(2).filter(|pair| moved(&pair[0].1, &pair[1].1)).count()
    }

    async fn order(&mut self, region: &str, act: Act, seconds: u64) {
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

    async fn write(&self, write: Write) {
        let fence = self.leading.borrow().clone().unwrap();
        self.store.commit(&fence, &[], vec![write]).await.unwrap();
    }
}

/// The other ends.
struct Outside {
    reports: mpsc::Sender<Report>,
    nudges: broadcast::Sender<String>,
    events: Events,
    drills: Drills,
}

fn judging(
    store: &Store,
    leading: &watch::Sender<Option<Fence>>,
    capacity: Option<u32>,
    metrics: &Metrics,
    audit: Audit,
) -> (Outside, Judging, Verdicts) {
    let (reports, heard) = mpsc::channel(1_024);
    let (nudges, events) = (broadcast::Sender::new(64), Events::default());
    let served = snapshot(capacity);
    let drills = Drills::default();
    let inputs = Inputs {
        us: vantage(&id("eu/control/c")).unwrap(),
        reports: heard,
        snapshot: Box::new(move || Some(served.clone())),
        store: store.clone(),
        leading: leading.subscribe(),
        nudges: nudges.clone(),
        audit,
        events: events.clone(),
        drills: drills.clone(),
    };
    let (judging, verdicts) = Judging::new(inputs, HealthSettings::default(), metrics);
    (Outside { reports, nudges, events, drills }, judging, verdicts)
}

fn near(weights: [f64; 3], expected: [f64; 3]) {
    let close = weights.iter().zip(expected).all(|(one, other)| (one - other).abs() < 0.002);
    assert!(close, "{weights:?}, expected {expected:?}");
}

const THIRD: f64 = 1.0 / 3.0;

#[tokio::test]
async fn a_killed_region_is_out_of_the_plan_in_5_s_and_a_silent_one_in_19() {
    for (life, most) in [(Life::Killed, 5), (Life::Silent, 19)] {
        let mut world = World::new(Some(500)).await;
        world.run(SECOND * 33).await;
        near(world.weights(), [THIRD; 3]);
        if life == Life::Killed {
            world.kill(1)
        } else {
            world.lives[1] = life
        }
        let out = |plan: &Published| plan.plan.weight(&name("us")) == 0.0;
        let took = world.until("us is out", SECOND * 60, out).await;
        assert!(took <= SECOND * most, "{life:?}: {took:?}");
        let plan = world.plans.last().unwrap().1.clone();
        near(world.weights(), [0.5, 0.0, 0.5]);
        assert_eq!(plan.standings[&name("us")].0, Standing::Out);
        assert!(plan.standings[&name("us")].1.starts_with("DOWN: more than half"), "{plan:?}");
        assert_eq!(plan.plan.regions[&name("eu")].capacity_factor, 1.5);
        // 900/s came, two can serve 500/s each.
        assert_eq!((plan.plan.demand, plan.plan.shed.share), (Some(900.0), 0.0));
        let told = world.verdicts.plan().borrow().clone().unwrap();
        let stored = stored::Stored::decode(world.store.get("plan").await.unwrap().unwrap().bytes).unwrap();
        assert_eq!(stored.plan, *told, "told is what is written");
        let status = world.status();
        assert!(status.events.last().unwrap().contains("us: SUSPECT -> DOWN"), "{status:?}");
        assert_eq!((status.regions.len(), status.plan.map(|plan| plan.version)), (3, Some(plan.plan.version)));
        let text = world.metrics.encode().unwrap();
        for line in [
            "spillway_control_region_phase{region=\"us\",phase=\"down\"} 1",
            "spillway_control_region_phase{region=\"us\",phase=\"up\"} 0",
            "spillway_control_region_weight{region=\"us\"} 0.0",
            "spillway_control_capacity_factor{region=\"ap\"} 1.5",
            "spillway_control_region_moves_total{region=\"us\",phase=\"down\"} 1",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}

#[tokio::test]
async fn a_region_that_is_back_gets_its_traffic_step_by_step() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    world.kill(1);
    world.until("us is out", SECOND * 10, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    world.run(SECOND * 60).await;
    world.lives[1] = Life::Well;
    let before = world.plans.len();
    let took =
        world.until("us is whole", SECOND * 900, |plan| (plan.plan.weight(&name("us")) - THIRD).abs() < 0.001).await;
    // Five minutes well, twelve good probes, four steps of a minute.
    assert!((590..=630).contains(&took.as_secs()), "{took:?}");
    let mut steps: Vec<f64> = world.plans[before..].iter().map(|(_, plan)| plan.plan.weight(&name("us"))).collect();
    steps.dedup_by(|one, other| (*one - *other).abs() < 0.001);
    // What it still lacks is carried by all in proportion to what they have.
    let expected = [0.0, 0.01, 0.05, 0.25, 0.5, 1.0].map(|share| share / (2.0 + share));
    let expected = &expected[expected.len() - steps.len()..];
    assert!(steps.iter().zip(expected).all(|(one, other)| (one - other).abs() < 0.001), "{steps:?}");
    assert!(steps.len() >= 5);
    world.run(SECOND * 70).await;
    assert_eq!(world.phase("us"), "up");
}

#[tokio::test]
async fn what_only_one_vantage_sees_changes_no_weight() {
    let mut world = World::new(None).await;
    world.run(SECOND * 40).await;
    let plans = world.plans.len();
    // It sees nothing of two regions: it is cut off itself.
    world.cut_off = vec![2];
    world.run(SECOND * 120).await;
    assert_eq!((world.plans.len(), world.moves()), (plans, 0));
    assert!(world.metrics.encode().unwrap().contains("spillway_control_vantages_isolated 1"));
}

#[tokio::test]
async fn two_failed_probes_and_a_good_one_change_no_weight() {
    let mut world = World::new(None).await;
    world.run(SECOND * 40).await;
    world.lives[1] = Life::Silent;
    world.run(SECOND * 9).await;
    world.lives[1] = Life::Well;
    world.run(SECOND * 60).await;
    assert_eq!(world.moves(), 0);
    assert_eq!(world.phase("us"), "up");
}

#[tokio::test]
async fn a_region_that_flaps_for_half_an_hour_goes_out_once() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    for _ in 0..30 {
        world.kill(1);
        world.run(SECOND * 20).await;
        world.lives[1] = Life::Well;
        world.run(SECOND * 40).await;
    }
    assert_eq!(world.moves(), 1, "{:#?}", world.verdicts.findings());
    near(world.weights(), [0.5, 0.0, 0.5]);
}

#[tokio::test]
async fn the_second_region_within_ten_minutes_stays_and_it_is_said_why() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    world.kill(1);
    world.run(SECOND * 30).await;
    world.kill(2);
    world.run(SECOND * 60).await;
    near(world.weights(), [0.5, 0.0, 0.5]);
    let findings = world.verdicts.findings();
    let ap = findings.regions.iter().find(|status| status.region == "ap").unwrap();
    assert_eq!(ap.withheld, "a region went out a short time ago", "{findings:#?}");
    assert!(world.status().events.last().unwrap().contains("ap stays though it should go out"));
}

#[tokio::test]
async fn the_next_leader_goes_on_and_the_last_one_is_refused() {
    let mut world = World::new(Some(400)).await;
    world.run(SECOND * 30).await;
    world.kill(1);
    world.until("us is out", SECOND * 10, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    world.run(SECOND * 120).await;
    let before = world.plans.last().unwrap().1.clone();
    assert!(before.plan.shed.share > 0.1, "900/s for 800");

    // Another process opens the file, wins, and knows nothing of its own.
    let path = world.folder.path().join("control.db");
    let other = Store::open(&StoreSettings::Sqlite(path)).await.unwrap();
    let won = other.campaign(&name("d"), "127.0.0.1:2").await.unwrap();
    let leading = watch::Sender::new(Some(won.fence.clone()));
    let (_outside, mut next, told) = judging(&other, &leading, Some(400), &Metrics::new("test"), Audit::off());
    let times = world.times();
    next.tick(times).await;
    let plan = open(&told.plan().borrow().clone().unwrap()).unwrap();
    assert!(plan.plan.version > before.plan.version && plan.epoch > before.epoch);
    assert_eq!(plan.plan.regions, before.plan.regions, "nothing moves because the leader does");
    let us = told.findings().regions.iter().find(|status| status.region == "us").unwrap().clone();
    assert_eq!((us.phase.as_str(), us.why.as_str()), ("down", "more than half of its probed pairs have failed"));

    // The old one has not noticed. What it judges now is refused by the store.
    let plans = world.plans.len();
    world.loads = [(10, 0); 3];
    world.run(SECOND * 200).await;
    assert!(world.plans[plans..].iter().all(|(_, plan)| plan.epoch == won.fence.epoch), "told is only what is written");
    assert!(world.metrics.encode().unwrap().contains("spillway_control_plan_writes_total{outcome=\"fenced\"} 1"));
    let stored = stored::Stored::decode(other.get("plan").await.unwrap().unwrap().bytes).unwrap();
    assert_eq!(open(&stored.plan).unwrap().epoch, won.fence.epoch);
}

#[tokio::test]
async fn operators_orders_hold_until_their_end() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    world.order("us", Act::Drain(true), 120).await;
    let took = world.until("us is drained", SECOND * 5, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    assert!(took <= SECOND, "{took:?}");
    assert!(world.plans.last().unwrap().1.plan.regions[&name("us")].terms.drained);
    // Two may not be left without.
    world.order("ap", Act::Drain(true), 120).await;
    world.run(SECOND * 2).await;
    world.order("eu", Act::Drain(true), 60).await;
    world.run(SECOND * 2).await;
    near(world.weights(), [1.0, 0.0, 0.0]);
    let refused = "the override of 'eu' has no effect: no other region is in";
    assert!(world.status().events.iter().any(|event| event.contains(refused)));
    world.write(Write::Delete("overrides/ap".into())).await;
    world.run(SECOND * 110).await;
    assert_eq!((world.phase("us").as_str(), world.phase("ap").as_str()), ("down", "ramp"));
    world.run(SECOND * 20).await;
    assert_ne!(world.phase("us"), "down", "its time is over");
    world.run(SECOND * 420).await;
    near(world.weights(), [THIRD; 3]);
    // Weights, and in whatever its health.
    world.order("us", Act::Weight(50.0), 60).await;
    world.until("us weighs less", SECOND * 5, |plan| plan.plan.weight(&name("us")) < 0.21).await;
    near(world.weights(), [0.4, 0.2, 0.4]);
    world.run(SECOND * 61).await;
    near(world.weights(), [THIRD; 3]);
    world.order("us", Act::ForceIn(true), 600).await;
    world.kill(1);
    world.run(SECOND * 60).await;
    near(world.weights(), [THIRD; 3]);
}

#[tokio::test]
async fn a_region_is_forced_in_at_once_against_the_verdict_and_everybody_is_told() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    world.kill(1);
    world.until("us is out", SECOND * 10, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    // Down, and then in its hold-down, in its probation, on its ramp: from anywhere, at once.
    let is_in = |plan: &Published| (plan.plan.weight(&name("us")) - THIRD).abs() < 0.002;
    world.run(SECOND * 5).await;
    world.order("us", Act::ForceIn(true), 120).await;
    let took = world.until("us is forced in", SECOND * 5, is_in).await;
    assert!(took <= SECOND, "{took:?}");
    world.run(SECOND * 60).await;
    near(world.weights(), [THIRD; 3]);
    let status = world.status();
    let us = status.regions.iter().find(|status| status.region == "us").unwrap();
    let against = "an operator forced it in, against the verdict: more than half of its probed pairs have failed";
    assert_eq!(
        (us.phase.as_str(), us.why.as_str(), us.withheld.as_str()),
        ("suspect", "forced in by an operator", against)
    );
    let said = |text: &str| status.events.iter().filter(|event| event.ends_with(text)).count();
    assert_eq!(said("us: DOWN -> SUSPECT: forced in by an operator"), 1, "{:?}", status.events);
    assert_eq!(said(&format!("us stays though it should go out: {against}")), 1, "{:?}", status.events);
    assert_eq!(world.audited("region-withheld")[0]["why"], against);
    assert_eq!(world.audited("region-moved").last().unwrap()["why"], "forced in by an operator");
    assert!(world.plans.last().unwrap().1.standings[&name("us")].1.ends_with(&format!("it stays, since {against}")));

    // When it ends, the verdict counts again, by its own rules.
    world.run(SECOND * 600).await;
    near(world.weights(), [0.5, 0.0, 0.5]);
    world.lives[1] = Life::Well;
    world.run(SECOND * 30).await;
    assert_eq!(world.phase("us"), "down", "its hold-down");
    world.order("us", Act::ForceIn(true), 3_600).await;
    assert!(world.until("us is forced in", SECOND * 5, is_in).await <= SECOND);
    world.run(SECOND * 40).await;
    assert_eq!((world.phase("us").as_str(), world.withheld("us").as_str()), ("up", ""), "nothing is said against it");

    // Forced in is not the only one in: others cannot be drained to leave a region alone that is sick.
    world.kill(1);
    world.run(SECOND * 30).await;
    world.order("eu", Act::Drain(true), 600).await;
    world.run(SECOND * 2).await;
    world.order("ap", Act::Drain(true), 600).await;
    world.run(SECOND * 2).await;
    near(world.weights(), [0.0, 0.5, 0.5]);
    let refused = "the override of 'ap' has no effect: no other region is in";
    assert!(world.status().events.iter().any(|event| event.contains(refused)));
}

#[tokio::test]
async fn what_moves_during_a_drill_is_said_to() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    let alice = SpiffeId::parse("spiffe://td/operator/alice").unwrap();
    let drill =
        control::SetDrillRequest { lease: 7, drill: "region-loss".into(), target: "us".into(), ..Default::default() };
    world.drills.set(&alice, drill, (&world.audit, &world.events)).unwrap();
    world.kill(1);
    world.until("us is out", SECOND * 10, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    let events = world.status().events;
    let during =
        "us: SUSPECT -> DOWN: more than half of its probed pairs have failed (during the drill region-loss of us)";
    assert!(events.last().unwrap().ends_with(during), "{events:?}");
    assert_eq!(world.audited("region-moved").last().unwrap()["drill"], "region-loss of us");
    let over = control::EndDrillRequest { lease: 7, how: "pass".into() };
    world.drills.end(&alice, &over, (&world.audit, &world.events));
    world.lives[1] = Life::Well;
    world.until("us is back", SECOND * 600, |plan| plan.plan.weight(&name("us")) > 0.0).await;
    assert!(!world.status().events.last().unwrap().contains("drill"));
    assert!(world.audited("region-moved").last().unwrap()["drill"].is_null());
}

#[tokio::test]
async fn what_dns_nodes_answered_is_held_against_the_plan() {
    let mut world = World::new(None).await;
    world.run(SECOND * 10).await;
    let answered = |world: &World| world.status().regions.iter().map(|region| region.answered).collect::<Vec<_>>();
    assert_eq!(answered(&world), [None; 3], "no DNS node has said anything");
    let beat = |world: &mut World, node: &str, eu, us| {
        let told = [("eu", eu), ("us", us), ("mars", 5)];
        let region = |(region, answers): (&str, u64)| control::RegionAnswers { region: region.into(), answers };
        let answers = Some(control::Answers { regions: told.map(region).to_vec() });
        let heartbeat = control::Heartbeat { answers, ..control::Heartbeat::default() };
        world.judging.hear(&Report::Heartbeat(id(node), heartbeat), world.now);
    };
    beat(&mut world, "eu/control/dns-0", 30, 10);
    beat(&mut world, "us/control/dns-0", 10, 30);
    // Who is no DNS node has no word.
    beat(&mut world, "us/gateway/g", 0, 1_000_000);
    world.run(SECOND).await;
    // Regions are told by name.
    assert_eq!(answered(&world), [Some(0.0), Some(0.5), Some(0.5)]);
    world.run(SECOND * 61).await;
    assert_eq!(answered(&world), [None; 3]);
}

#[tokio::test]
async fn without_the_store_nothing_new_is_told_and_with_it_at_once() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    let plans = world.plans.len();
    let lock = rusqlite::Connection::open(world.folder.path().join("control.db")).unwrap();
    lock.execute_batch("BEGIN EXCLUSIVE").unwrap();
    world.kill(1);
    world.run(Duration::from_millis(4_900)).await;
    assert_eq!(world.plans.len(), plans);
    assert!(world.metrics.encode().unwrap().contains("writes_total{outcome=\"failed\"}"));
    lock.execute_batch("COMMIT").unwrap();
    let took = world.until("us is out", SECOND * 5, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    assert!(took <= SECOND * 2, "it was judged all the time: {took:?}");
}

#[tokio::test]
async fn who_does_not_lead_tells_what_the_leader_wrote() {
    let mut world = World::new(None).await;
    world.run(SECOND * 20).await;
    let follows = watch::Sender::new(None);
    let (_outside, mut follower, told) = judging(&world.store, &follows, None, &Metrics::new("test"), Audit::off());
    follower.tick(world.times()).await;
    assert_eq!(*told.plan().borrow(), *world.verdicts.plan().borrow());
    world.kill(1);
    world.run(SECOND * 10).await;
    follower.tick(world.times()).await;
    assert_eq!(*told.plan().borrow(), *world.verdicts.plan().borrow());
    let us = told.findings().regions.iter().find(|status| status.region == "us").unwrap().clone();
    assert_eq!((us.phase.as_str(), us.weight), ("down", 0.0));
    // It resigns; the leadership of before says nothing any more.
    drop(world.leadership.take());
    world.leading.send_replace(None);
    let plans = world.plans.len();
    world.lives[1] = Life::Well;
    world.run(SECOND * 700).await;
    assert_eq!(world.plans.len(), plans);
}

#[tokio::test]
async fn figures_that_move_nothing_are_told_seldom_and_noise_never() {
    let mut world = World::new(Some(1_000)).await;
    world.run(SECOND * 60).await;
    let plans = world.plans.len();
    world.loads = [(302, 0), (299, 0), (301, 0)];
    world.run(SECOND * 60).await;
    assert_eq!(world.plans.len(), plans, "noise");
    for second in 0..60 {
        world.loads = [(400 + second * 20, 0); 3];
        world.run(SECOND).await;
    }
    let new = world.plans.len() - plans;
    assert!((5..=13).contains(&new), "{new}");
    assert_eq!(world.moves(), 0);
    let times: Vec<Duration> = world.plans[plans..].iter().map(|(at, _)| *at).collect();
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= SECOND * 5), "{times:?}");
}

#[tokio::test]
async fn errors_of_a_region_that_answers_take_it_out_and_overload_does_not() {
    for (shed, moves) in [(0, 1), (100, 0)] {
        let mut world = World::new(None).await;
        world.run(SECOND * 30).await;
        world.errors[1] = 30;
        world.loads[1].1 = shed;
        world.run(SECOND * 220).await;
        assert_eq!(world.moves(), moves, "{:#?}", world.verdicts.findings());
    }
}

#[tokio::test]
async fn what_fits_nowhere_is_shed_from_the_lowest_class() {
    let mut world = World::new(None).await;
    world.loads = [(400, 40); 3];
    world.run(SECOND * 30).await;
    assert_eq!(world.plans.last().unwrap().1.plan.regions[&name("eu")].terms.capacity, Some(400.0), "measured");
    world.kill(1);
    world.until("us is out", SECOND * 10, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    let plan = &world.plans.last().unwrap().1.plan;
    // 1,320/s for 800; half of it is of the lowest class.
    assert!((plan.shed.share - 520.0 / 1_320.0).abs() < 0.01, "{plan:?}");
    assert_eq!((plan.shed.classes[0], plan.shed.classes[1], plan.shed.classes[2]), (0.0, 0.0, 0.0));
    assert!((plan.shed.classes[3] - 0.79).abs() < 0.01, "{plan:?}");
}

#[tokio::test]
async fn with_nothing_left_everything_is_answered() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    for gateway in 0..3 {
        world.kill(gateway);
    }
    world.run(SECOND * 120).await;
    let sum: f64 = world.weights().iter().sum();
    assert!((sum - 1.0).abs() < 1e-9 && world.weights().iter().any(|weight| *weight > 0.0));
    assert_ne!(world.plans.last().unwrap().1.plan.basis, Basis::Blind, "unknown is not down");
}

#[tokio::test]
async fn a_gateway_whose_stream_ended_is_probed_by_all() {
    let mut world = World::new(None).await;
    world.run(SECOND).await;
    let heard = world.judging.hear(&Report::Left(id("us/gateway/g")), world.now);
    assert!(!heard);
    assert_eq!(world.nudges.try_recv().unwrap(), "us/g");
    world.judging.hear(&Report::Left(id("mars/gateway/g")), world.now);
    world.judging.hear(&Report::Left(id("us/control/c")), world.now);
    assert!(world.nudges.try_recv().is_err());
}

#[tokio::test]
async fn nobody_speaks_for_another() {
    let mut world = World::new(None).await;
    world.run(SECOND * 20).await;
    let sighting = |region: &str, gateway: &str, outcome| control::Sighting {
        region: region.into(),
        gateway: gateway.into(),
        outcome,
        round_trip_us: 0,
    };
    let bad = vec![
        sighting("mars", "g", 4),
        sighting("us", "other", 4),
        sighting("us/x", "g", 4),
        sighting("us", "g", 0),
        sighting("us", "g", 77),
    ];
    let strangers = ["eu/sidecar/p/x", "mars/gateway/g", "us/gateway/g"];
    assert!(!world.judging.hear(&Report::Sightings(id("eu/gateway/g"), bad), world.now));
    for stranger in strangers {
        assert!(!world.judging.hear(&Report::Sightings(id(stranger), vec![sighting("us", "g", 4)]), world.now));
    }
    assert!(world.metrics.encode().unwrap().contains("spillway_control_sightings_ignored_total 8"));
    let told = control::Traffic { milliseconds: 1, requests: u64::MAX, ..control::Traffic::default() };
    let heartbeat = control::Heartbeat { traffic: Some(told), ..control::Heartbeat::default() };
    world.judging.hear(&Report::Heartbeat(id("us/gateway/other"), heartbeat), world.now);
    world.run(SECOND * 20).await;
    assert_eq!(world.plans.last().unwrap().1.plan.demand, Some(900.0));
}

/// The task itself, in real time: it judges without being called, and ends with the drain.
#[tokio::test]
async fn the_task_judges_by_itself_and_ends_with_the_drain() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
    let leadership = store.campaign(&name("c"), "127.0.0.1:1").await.unwrap();
    let leading = watch::Sender::new(None);
    let (outside, judging, verdicts) = judging(&store, &leading, None, &Metrics::new("test"), Audit::off());
    let drain = spillway_runtime::drain::Drain::new(SECOND);
    let task = tokio::spawn(judging.run(drain.clone()));
    let mut plan = verdicts.plan();
    assert!(plan.borrow().is_none());
    leading.send_replace(Some(leadership.fence.clone()));
    tokio::time::timeout(SECOND * 5, plan.wait_for(Option::is_some)).await.unwrap().unwrap();
    let statuses: BTreeMap<String, String> =
        verdicts.findings().regions.iter().map(|status| (status.region.clone(), status.phase.clone())).collect();
    assert_eq!(statuses.len(), 3);
    let mut nudges = outside.nudges.subscribe();
    outside.reports.send(Report::Left(id("us/gateway/g"))).await.unwrap();
    tokio::time::timeout(SECOND * 5, nudges.recv()).await.unwrap().unwrap();
    drain.stop();
    tokio::time::timeout(SECOND * 5, task).await.unwrap().unwrap();
}
