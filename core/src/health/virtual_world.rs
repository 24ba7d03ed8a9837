//! Regions, vantages, a network and a leader in virtual time: all of [`super`] together, for its tests.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;
use crate::units::Name;

pub const SECOND: Duration = Duration::from_secs(1);
pub const START: Duration = Duration::from_secs(1_000);

/// Splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub fn happens(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.unit() < probability
    }
}

/// What a gateway does with a connection. With it dies the vantage that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    Well,
    /// Killed: connections are refused.
    Killed,
    /// Cut off: nothing comes back.
    Silent,
}

/// How big the world is and how fast it turns.
pub struct Dimensions {
    pub regions: usize,
    pub gateways_each: usize,
    /// Control nodes, which stand outside of all regions.
    pub controls: usize,
    pub tick: Duration,
    pub probe: ProbeSettings,
    pub fleet: FleetSettings,
}

impl Dimensions {
    /// Three regions of a gateway each, and the rules by default.
    pub fn usual(controls: usize) -> Self {
        Self {
            regions: 3,
            gateways_each: 1,
            controls,
            tick: SECOND,
            probe: ProbeSettings::default(),
            fleet: FleetSettings::default(),
        }
    }
}

/// Who probes whom.
struct Probing {
    vantage: usize,
    gateway: usize,
    schedule: Schedule,
    /// When the probe under way ends, and how.
    ends: Option<(Duration, Outcome)>,
}

/// A report on its way to the leader.
struct Report {
    arrives: Duration,
    vantage: usize,
    gateway: usize,
    outcome: Outcome,
}

/// What the network does.
#[derive(Default)]
pub struct Network {
    /// Vantages to which nothing comes back.
    pub isolated: BTreeSet<usize>,
    /// Vantages that do not reach the gateways of a region.
    pub cut: BTreeSet<(usize, usize)>,
    /// Of the probes that should be answered those that are not, and of the reports those that do not arrive.
    pub loss: f64,
    /// Seconds that a report takes at most. Each takes its own time, so that one overtakes the other.
    pub delay: usize,
}

pub struct World {
    pub now: Duration,
    pub random: Random,
    pub dimensions: Dimensions,
    pub regions: Vec<Name>,
    pub gateways: Vec<(usize, Gateway)>,
    pub lives: Vec<Life>,
    /// The gateways in their order, then the control nodes.
    pub vantages: Vec<Vantage>,
    pub network: Network,
    pub qualities: Vec<Quality>,
    probing: Vec<Probing>,
    reports: Vec<Report>,
    pub board: Board,
    pub fleet: Fleet,
    /// By how much the leader's clock is ahead of ours.
    ahead: Duration,
    /// What the leader wrote down when it moved a region last.
    records: Records,
    /// Operators' orders, until when by our clock.
    pub orders: BTreeMap<Name, (Pin, Duration)>,
    pub moves: Vec<(Duration, Name, Move)>,
    pub withheld: Vec<Withheld>,
    last_out: Option<Duration>,
}

impl World {
    pub fn new(dimensions: Dimensions, seed: u64) -> Self {
        let name = |text: String| Name::parse(&text).unwrap();
        let mut random = Random(seed);
        let regions: Vec<Name> = (0..dimensions.regions).map(|index| name(format!("r{index}"))).collect();
        let gateway = |index: usize| {
            let region = index / dimensions.gateways_each;
            (region, Gateway { region: regions[region].clone(), node: name(format!("g{index}")) })
        };
        let gateways: Vec<_> = (0..dimensions.regions * dimensions.gateways_each).map(gateway).collect();
        let control = |index| Vantage::Control { region: None, node: name(format!("c{index}")) };
        let of_gateways = gateways.iter().map(|(_, gateway)| Vantage::Gateway(gateway.clone()));
        let vantages: Vec<Vantage> = of_gateways.chain((0..dimensions.controls).map(control)).collect();
        let pairs = (0..vantages.len()).flat_map(|vantage| (0..gateways.len()).map(move |gateway| (vantage, gateway)));
        let probing = pairs
            .filter(|(vantage, gateway)| vantages[*vantage].region() != Some(&gateways[*gateway].1.region))
            .map(|(vantage, gateway)| {
                let first = START + dimensions.probe.interval.mul_f64(random.unit());
                let schedule = Schedule::new(dimensions.probe.clone(), first);
                Probing { vantage, gateway, schedule, ends: None }
            })
            .collect();
        let mut world = Self {
            now: START,
            random,
            lives: vec![Life::Well; gateways.len()],
            network: Network::default(),
            qualities: vec![Quality::Fine; dimensions.regions],
            probing,
            reports: Vec::new(),
            board: Board::default(),
            fleet: Fleet::new(dimensions.fleet.clone()),
            ahead: Duration::ZERO,
            records: Records::default(),
            orders: BTreeMap::new(),
            moves: Vec::new(),
            withheld: Vec::new(),
            last_out: None,
            regions,
            gateways,
            vantages,
            dimensions,
        };
        world.hand_over();
        world
    }

    /// Another leader takes up what the one before wrote down. Its clock is another one, and it has heard nothing yet.
    pub fn hand_over(&mut self) {
        self.ahead = SECOND * self.random.below(10_000) as u32;
        let now = self.now + self.ahead;
        let settings = VerdictSettings { probe: self.dimensions.probe.clone(), ..VerdictSettings::default() };
        self.board = Board::new(settings);
        self.board.keep(
            &self.vantages.iter().cloned().collect(),
            &self.gateways.iter().map(|(_, gateway)| gateway.clone()).collect(),
        );
        self.reports.clear();
        self.fleet = Fleet::resume(self.dimensions.fleet.clone(), self.records.clone(), now);
        let events = self.fleet.keep(&self.regions.iter().cloned().collect(), now);
        self.note(events);
        self.orders.retain(|_, (_, until)| *until > self.now);
        for (name, (pin, until)) in self.orders.clone() {
            let order = Order { pin, until: until + self.ahead, reason: "again".into() };
            let events = self.fleet.order(&name, order, now).unwrap();
            self.note(events);
        }
    }

    /// For so long nobody leads: what is planned stays, and reports go nowhere.
    pub fn lead_nobody(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += self.dimensions.tick;
            self.probe_all();
            self.reports.clear();
        }
        self.hand_over();
    }

    pub fn order(&mut self, region: usize, pin: Pin, time: Duration) {
        let (name, until) = (self.regions[region].clone(), self.now + time);
        let order = Order { pin, until: until + self.ahead, reason: "test".into() };
        if let Ok(events) = self.fleet.order(&name, order, self.now + self.ahead) {
            self.orders.insert(name, (pin, until));
            self.note(events);
        }
    }

    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    pub fn step(&mut self) {
        self.now += self.dimensions.tick;
        self.probe_all();
        self.deliver();
        let now = self.now + self.ahead;
        let judgement = self.board.judge(&self.fleet.out(), now);
        let words = judgement.regions.into_iter().zip(&self.qualities);
        let words = words.map(|((name, evidence), quality)| (name, Word::new(&evidence, *quality))).collect();
        let events = self.fleet.observe(&words, now);
        self.orders.retain(|_, (_, until)| *until > self.now);
        self.note(events);
        self.check();
    }

    fn probe_all(&mut self) {
        for index in 0..self.probing.len() {
            self.probe(index);
        }
    }

    fn probe(&mut self, index: usize) {
        let probing = &mut self.probing[index];
        if probing.ends.is_none() && probing.schedule.due() > self.now {
            return;
        }
        let (vantage, gateway) = (probing.vantage, probing.gateway);
        if self.lives.get(vantage).is_some_and(|life| *life != Life::Well) {
            probing.ends = None;
            return;
        }
        if probing.ends.is_none() {
            let (network, life) = (&self.network, self.lives[gateway]);
            let cut = network.isolated.contains(&vantage) || network.cut.contains(&(vantage, self.gateways[gateway].0));
            let (takes, outcome) = match life {
                _ if cut || self.random.happens(network.loss) => (self.dimensions.probe.timeout, Outcome::Failed),
                Life::Well => (Duration::ZERO, Outcome::Good),
                Life::Killed => (Duration::ZERO, Outcome::Refused),
                Life::Silent => (self.dimensions.probe.timeout, Outcome::Failed),
            };
            probing.ends = Some((self.now + takes, outcome));
            probing.schedule.begin(self.now);
        }
        let Some((_, outcome)) = probing.ends.take_if(|(ends, _)| *ends <= self.now) else { return };
        probing.schedule.end(outcome);
        if !self.random.happens(self.network.loss) {
            let arrives = self.now + SECOND * self.random.below(self.network.delay + 1) as u32;
            self.reports.push(Report { arrives, vantage, gateway, outcome });
        }
    }

    fn deliver(&mut self) {
        let mut index = 0;
        while let Some(report) = self.reports.get(index) {
            if report.arrives > self.now {
                index += 1;
                continue;
            }
            let Report { vantage, gateway, outcome, .. } = self.reports.remove(index);
            let (from, to) = (&self.vantages[vantage], &self.gateways[gateway].1);
            if self.board.record(from, to, outcome, self.now + self.ahead) == Noted::Urgent {
                self.nudge(gateway);
            }
        }
    }

    /// All who probe a gateway hear that it may be gone.
    pub fn nudge(&mut self, gateway: usize) {
        for probing in self.probing.iter_mut().filter(|probing| probing.gateway == gateway) {
            probing.schedule.nudge(self.now);
        }
    }

    /// Notes what the leader did, which it writes down before anybody acts on it.
    fn note(&mut self, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        self.records = self.fleet.records(self.now + self.ahead);
        for Event { region, at, what } in events {
            assert_eq!(at, self.now + self.ahead);
            match what {
                What::Moved(moved) => {
                    if let (Phase::Up | Phase::Suspect, Phase::Down, Why::Verdict(_)) =
                        (moved.from, moved.to, moved.why)
                    {
                        let hold = self.dimensions.fleet.hold;
                        let is_due = self.last_out.is_none_or(|last| self.now - last >= hold);
                        assert!(is_due, "two outs within the hold, the second of {region}: {:?}", self.moves);
                        self.last_out = Some(self.now);
                    }
                    self.moves.push((self.now, region, moved));
                }
                What::Withheld(_, withheld) => self.withheld.push(withheld),
                What::Ended(_) => {}
            }
        }
    }

    fn check(&self) {
        let mut sum = 0.0;
        for standing in self.fleet.standings() {
            let share = standing.region.share();
            assert!((0.0..=1.0).contains(&share));
            sum += share;
            let order = self.orders.get(standing.name);
            assert_eq!(standing.order.map(|order| (order.pin, order.until - self.ahead)).as_ref(), order);
            match order {
                Some((Pin::Out, _)) => assert_eq!(share, 0.0),
                Some((Pin::In, _)) => assert_eq!(share, 1.0),
                None => assert_eq!(standing.region.pin(), None),
            }
        }
        assert!(sum > 0.0, "all are out: {:?}", self.moves);
    }

    pub fn phase(&self, region: usize) -> Phase {
        self.fleet.region(&self.regions[region]).unwrap().phase()
    }

    pub fn share(&self, region: usize) -> f64 {
        self.fleet.region(&self.regions[region]).unwrap().share()
    }

    pub fn shares(&self) -> Vec<f64> {
        (0..self.regions.len()).map(|region| self.share(region)).collect()
    }

    /// All gateways of the region.
    pub fn live(&mut self, region: usize, life: Life) {
        let all = self.gateways.iter().zip(&mut self.lives);
        all.filter(|((of, _), _)| *of == region).for_each(|(_, of_gateway)| *of_gateway = life);
    }

    /// Whether most of its gateways are well. Of a region that has lost exactly half of them it is not said: this
    /// is too little to go out, and too much to come back.
    fn is_healthy(&self, region: usize) -> Option<bool> {
        let lives = self.gateways.iter().zip(&self.lives).filter(|((of, _), _)| *of == region);
        let well = lives.filter(|(_, life)| **life == Life::Well).count() * 2;
        (well != self.dimensions.gateways_each).then_some(well > self.dimensions.gateways_each)
    }

    /// Whether exactly the healthy regions are up, or none is healthy.
    pub fn has_settled(&self) -> bool {
        let any = (0..self.regions.len()).any(|region| self.is_healthy(region) == Some(true));
        let is_settled = |region| match self.is_healthy(region) {
            Some(true) => self.phase(region) == Phase::Up,
            Some(false) => !any || self.share(region) == 0.0,
            None => true,
        };
        (0..self.regions.len()).all(is_settled)
    }

    /// Changes of a region's weight from something to nothing or back.
    pub fn changes(&self, region: usize) -> usize {
        let has_weight = |phase| !matches!(phase, Phase::Down | Phase::Probation);
        let of_region = self.moves.iter().filter(|(_, name, _)| *name == self.regions[region]);
        of_region.filter(|(_, _, moved)| has_weight(moved.from) != has_weight(moved.to)).count()
    }
}
