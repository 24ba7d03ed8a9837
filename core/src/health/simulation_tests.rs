//! Vantages, a network and regions in virtual time: all of [`super`] together.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use super::*;
use crate::units::Name;

/// Worlds that are tried; about a minute of two cores without optimisation.
const SEEDS: u64 = 10_000;
const SECOND: Duration = Duration::from_secs(1);
const START: Duration = Duration::from_secs(1_000);

/// Splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn happens(&mut self, probability: f64) -> bool {
        ((self.next() >> 11) as f64) < probability * (1_u64 << 53) as f64
    }
}

/// What a gateway does with a connection. With its region die its vantages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Well,
    /// Killed: connections are refused.
    Killed,
    /// Cut off: nothing comes back.
    Silent,
}

struct Probing {
    vantage: usize,
    gateway: usize,
    schedule: Schedule,
    /// When the probe under way ends, and how.
    ends: Option<(Duration, Outcome)>,
}

struct World {
    now: Duration,
    tick: Duration,
    random: Random,
    settings: FleetSettings,
    regions: Vec<Name>,
    /// The gateway of each region, and its life.
    gateways: Vec<Gateway>,
    lives: Vec<Life>,
    /// The gateways in the order of their regions, then control nodes that stand outside.
    vantages: Vec<Vantage>,
    /// Vantages to which nothing comes back.
    isolated: BTreeSet<usize>,
    /// Of the probes that should be answered, those that are not.
    loss: f64,
    qualities: Vec<Quality>,
    probing: Vec<Probing>,
    board: Board,
    fleet: Fleet,
    last_out: Option<Duration>,
    moves: Vec<(Duration, Name, Move)>,
    orders: BTreeMap<Name, (Pin, Duration)>,
}

impl World {
    fn new(regions: usize, controls: usize, settings: FleetSettings, seed: u64) -> Self {
        let name = |text: String| Name::parse(&text).unwrap();
        let mut random = Random(seed);
        let regions: Vec<Name> = (0..regions).map(|index| name(format!("r{index}"))).collect();
        let gateway = |region: &Name| Gateway { region: region.clone(), node: name("g".into()) };
        let gateways: Vec<Gateway> = regions.iter().map(gateway).collect();
        let control = |index| Vantage::Control { region: None, node: name(format!("c{index}")) };
        let mut vantages: Vec<Vantage> = gateways.iter().cloned().map(Vantage::Gateway).collect();
        vantages.extend((0..controls).map(control));
        let pairs = (0..vantages.len()).flat_map(|vantage| (0..gateways.len()).map(move |gateway| (vantage, gateway)));
        let probing = pairs
            .filter(|(vantage, gateway)| vantage != gateway)
            .map(|(vantage, gateway)| {
                let first = START + Duration::from_millis(random.next() % 5_000);
                let schedule = Schedule::new(ProbeSettings::default(), first);
                Probing { vantage, gateway, schedule, ends: None }
            })
            .collect();
        let mut board = Board::new(VerdictSettings::default());
        board.keep(&vantages.iter().cloned().collect(), &gateways.iter().cloned().collect());
        let mut fleet = Fleet::new(settings.clone());
        fleet.keep(&regions.iter().cloned().collect(), START);
        Self {
            now: START,
            tick: SECOND,
            random,
            settings,
            lives: vec![Life::Well; regions.len()],
            isolated: BTreeSet::new(),
            loss: 0.0,
            qualities: vec![Quality::Fine; regions.len()],
            regions,
            gateways,
            vantages,
            probing,
            board,
            fleet,
            last_out: None,
            moves: Vec::new(),
            orders: BTreeMap::new(),
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    fn step(&mut self) {
        self.now += self.tick;
        for index in 0..self.probing.len() {
            self.probe(index);
        }
        let judgement = self.board.judge(&self.fleet.out(), self.now);
        let words = judgement.regions.into_iter().zip(&self.qualities);
        let words = words.map(|((name, evidence), quality)| (name, Word::new(&evidence, *quality))).collect();
        let events = self.fleet.observe(&words, self.now);
        self.check(events);
    }

    fn probe(&mut self, index: usize) {
        let Probing { vantage, gateway, .. } = self.probing[index];
        if self.lives.get(vantage).is_some_and(|life| *life != Life::Well) {
            self.probing[index].ends = None;
            return;
        }
        if self.probing[index].ends.is_none() && self.probing[index].schedule.due() <= self.now {
            let lost = self.isolated.contains(&vantage) || self.random.happens(self.loss);
            let (takes, outcome) = match self.lives[gateway] {
                _ if lost => (2 * SECOND, Outcome::Failed),
                Life::Well => (Duration::ZERO, Outcome::Good),
                Life::Killed => (Duration::ZERO, Outcome::Refused),
                Life::Silent => (2 * SECOND, Outcome::Failed),
            };
            self.probing[index].ends = Some((self.now + takes, outcome));
            self.probing[index].schedule.begin(self.now);
        }
        let probing = &mut self.probing[index];
        let Some((_, outcome)) = probing.ends.take_if(|(ends, _)| *ends <= self.now) else { return };
        probing.schedule.end(outcome);
        let noted = self.board.record(&self.vantages[vantage], &self.gateways[gateway], outcome, self.now);
        if noted == Noted::Urgent {
            self.nudge(gateway);
        }
    }

    /// All who probe a gateway hear that it may be gone.
    fn nudge(&mut self, gateway: usize) {
        for probing in self.probing.iter_mut().filter(|probing| probing.gateway == gateway) {
            probing.schedule.nudge(self.now);
        }
    }

    fn check(&mut self, events: Vec<Event>) {
        self.orders.retain(|_, (_, until)| *until > self.now);
        for event in events {
            let What::Moved(moved) = event.what else { continue };
            self.moves.push((self.now, event.region, moved));
            if let (Phase::Up | Phase::Suspect, Phase::Down) = (moved.from, moved.to) {
                let hold = self.settings.hold;
                assert!(
                    self.last_out.is_none_or(|last| self.now - last >= hold),
                    "two within the hold: {:?}",
                    self.moves
                );
                self.last_out = Some(self.now);
            }
        }
        let mut sum = 0.0;
        for standing in self.fleet.standings() {
            let share = standing.region.share();
            assert!((0.0..=1.0).contains(&share));
            sum += share;
            let order = self.orders.get(standing.name);
            assert_eq!(standing.order.map(|order| (order.pin, order.until)).as_ref(), order);
            match order {
                Some((Pin::Out, _)) => assert_eq!(share, 0.0),
                Some((Pin::In, _)) => assert_eq!(share, 1.0),
                None => assert_eq!(standing.region.pin(), None),
            }
        }
        assert!(sum > 0.0, "all are out: {:?}", self.moves);
    }

    fn phase(&self, region: usize) -> Phase {
        self.fleet.region(&self.regions[region]).unwrap().phase()
    }

    fn share(&self, region: usize) -> f64 {
        self.fleet.region(&self.regions[region]).unwrap().share()
    }

    /// The time until the region has no weight.
    fn time_to_out(&mut self, region: usize) -> Duration {
        let begin = self.now;
        while self.share(region) > 0.0 {
            self.step();
            assert!(self.now - begin < 60 * SECOND, "it stays");
        }
        self.now - begin
    }

    fn has_settled(&self) -> bool {
        let healthy = self.lives.contains(&Life::Well);
        let is_settled = |(region, life): (usize, &Life)| match life {
            Life::Well => self.phase(region) == Phase::Up,
            Life::Killed | Life::Silent => !healthy || self.share(region) == 0.0,
        };
        self.lives.iter().enumerate().all(is_settled)
    }

    /// Something happens, or not.
    fn trouble(&mut self) {
        let region = self.random.below(self.regions.len());
        match self.random.below(100) {
            0..3 => self.lives[region] = Life::Killed,
            3..5 => self.lives[region] = Life::Silent,
            5..13 => self.lives[region] = Life::Well,
            13..16 => {
                self.isolated.insert(self.random.below(self.vantages.len()));
            }
            16..24 => {
                self.isolated.pop_first();
            }
            24 => self.loss = self.random.below(30) as f64 / 100.0,
            25 => self.qualities[region] = Quality::Slow,
            26 => self.qualities[region] = Quality::Breaching,
            27..33 => self.qualities[region] = Quality::Fine,
            33 => {
                let pin = if self.random.happens(0.5) { Pin::Out } else { Pin::In };
                let until = self.now + Duration::from_secs(1 + self.random.below(40) as u64);
                let name = self.regions[region].clone();
                if self.fleet.order(&name, Order { pin, until, reason: "test".into() }, self.now).is_ok() {
                    self.orders.insert(name, (pin, until));
                }
            }
            _ => {}
        }
    }
}

/// The default rules, with shorter times where a rule is a time.
fn short() -> FleetSettings {
    let region = RegionSettings {
        calm_after: 5 * SECOND,
        hold_down: 10 * SECOND,
        longest_hold_down: 40 * SECOND,
        clean: 3,
        step_for: 3 * SECOND,
        ..RegionSettings::default()
    };
    FleetSettings { region, hold: 60 * SECOND, ..FleetSettings::default() }
}

/// Two minutes of trouble, then peace, with some of the regions gone for good.
fn troubled(seed: u64) {
    let regions = 2 + usize::from(seed % 3 > 0);
    let mut world = World::new(regions, 2, short(), seed);
    for _ in 0..120 {
        world.trouble();
        world.step();
    }
    world.isolated.clear();
    world.loss = 0.0;
    world.qualities.fill(Quality::Fine);
    let mut settled_for = 0;
    for _ in 0..600 {
        world.step();
        settled_for = if world.has_settled() { settled_for + 1 } else { 0 };
        if settled_for == 20 {
            return;
        }
    }
    panic!("seed {seed}: {:?} leave {:?}", world.lives, world.moves);
}

fn in_parallel(seeds: Range<u64>, test: fn(u64)) {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64);
    std::thread::scope(|scope| {
        for first in 0..threads {
            let seeds = (seeds.start + first..seeds.end).step_by(threads as usize);
            scope.spawn(move || seeds.for_each(test));
        }
    });
}

#[test]
fn never_all_out_never_two_within_the_hold_and_always_the_healthy_set() {
    in_parallel(0..SEEDS, troubled);
}

#[test]
fn a_lossy_network_and_one_isolated_vantage_move_no_weight() {
    in_parallel(0..SEEDS / 20, |seed| {
        let mut world = World::new(3, 2, FleetSettings::default(), seed);
        world.run(20 * SECOND);
        world.loss = 0.05;
        for vantage in 0..5 {
            world.isolated = BTreeSet::from([vantage]);
            world.run(30 * SECOND);
        }
        let shares = world.moves.iter().filter(|(_, _, moved)| moved.to != Phase::Up && moved.to != Phase::Suspect);
        assert_eq!(shares.count(), 0, "seed {seed}: {:?}", world.moves);
    });
}

/// Three regions, so many control nodes, production times, and a finer clock.
fn production(controls: usize, seed: u64) -> World {
    let mut world = World::new(3, controls, FleetSettings::default(), seed);
    world.tick = Duration::from_millis(100);
    world.run(12 * SECOND + Duration::from_millis(100 * (seed % 50)));
    world
}

#[test]
fn a_silent_region_is_out_within_19_seconds() {
    let mut longest = Duration::ZERO;
    for seed in 0..100 {
        let mut world = production(2, seed);
        world.lives[0] = Life::Silent;
        longest = longest.max(world.time_to_out(0));
        assert_eq!((world.share(1), world.share(2)), (1.0, 1.0));
    }
    assert!((15 * SECOND..=19 * SECOND).contains(&longest), "{longest:?}");
}

#[test]
fn a_killed_region_is_out_within_9_seconds_and_within_5_if_a_connection_tells() {
    for controls in [0, 2] {
        let (mut longest, mut longest_told) = (Duration::ZERO, Duration::ZERO);
        for seed in 0..100 {
            let mut world = production(controls, seed);
            world.lives[0] = Life::Killed;
            longest = longest.max(world.time_to_out(0));
            let mut world = production(controls, seed);
            world.lives[0] = Life::Killed;
            world.nudge(0);
            longest_told = longest_told.max(world.time_to_out(0));
        }
        assert!(longest <= 9 * SECOND, "{longest:?}");
        assert!(longest_told <= 5 * SECOND, "{longest_told:?}");
    }
}

#[test]
fn two_failed_probes_and_a_good_one_move_no_weight() {
    for (seed, life) in (0..100).flat_map(|seed| [(seed, Life::Killed), (seed, Life::Silent)]) {
        let mut world = production(2, seed);
        world.lives[0] = life;
        while !world
            .vantages
            .iter()
            .any(|from| world.board.pair(from, &world.gateways[0]).is_some_and(|pair| pair.failures() == 2))
        {
            world.step();
        }
        world.lives[0] = Life::Well;
        world.run(60 * SECOND);
        assert!(
            world.moves.iter().all(|(_, _, moved)| matches!(moved.to, Phase::Up | Phase::Suspect)),
            "{:?}",
            world.moves
        );
    }
}

#[test]
fn half_an_hour_of_flapping_moves_weight_twice_at_most() {
    for (bad, good) in [(10, 10), (20, 40), (60, 60), (30, 120), (180, 180), (240, 300)] {
        for life in [Life::Killed, Life::Silent] {
            let mut world = World::new(3, 2, FleetSettings::default(), bad);
            let (mut changes, mut had) = (0, true);
            for second in 0..1_800 {
                world.lives[0] = if second % (bad + good) < good { Life::Well } else { life };
                world.step();
                let has = world.share(0) > 0.0;
                changes += u32::from(had != has);
                had = has;
            }
            assert!(changes <= 2, "{bad} s {life:?}, {good} s well: {:?}", world.moves);
        }
    }
}

#[test]
fn everything_unhealthy_leaves_everything_in() {
    for seed in 0..10 {
        let mut world = production(2, seed);
        world.lives.fill(Life::Silent);
        world.run(60 * SECOND);
        world.tick = SECOND;
        world.run(1_800 * SECOND);
        assert!((0..3).all(|region| world.share(region) == 1.0), "{:?}", world.moves);
    }
}

/// A region is lost, the others get half as much again and are full: slow, shedding, failing by timeouts.
#[test]
fn survivors_that_are_full_stay_in() {
    for utilisation in [Some(1.2), None] {
        let mut world = World::new(3, 2, FleetSettings::default(), 1);
        let mut watches = vec![Watch::new(SoftSettings::default()); 3];
        for second in 0..3_600 {
            if second == 60 {
                world.lives[0] = Life::Silent;
            }
            let full = second > 77;
            for (region, watch) in watches.iter_mut().enumerate() {
                let busy = full && region > 0;
                let (slow, errors, shed) = if busy { (500, 80, 300) } else { (0, 0, 0) };
                let utilisation = if busy { utilisation } else { Some(0.6) };
                let (from, to) = (world.now, world.now + SECOND);
                watch.observe(Sample { from, to, requests: 1_000, slow, errors, shed, utilisation });
                world.qualities[region] = watch.quality(to);
            }
            world.step();
        }
        assert_eq!((world.share(0), world.share(1), world.share(2)), (0.0, 1.0, 1.0));
        assert_eq!(world.qualities, [Quality::Fine; 3]);
    }
}
