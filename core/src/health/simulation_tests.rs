//! Thousands of worlds with trouble of all kinds. What a seed does is the same each time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::virtual_world::{Dimensions, Life, Random, SECOND, World};
use super::*;
use crate::failover::{Plan, Region as Planned, Traffic};
use spillway_figures::{Goal, record};

/// Worlds that are tried; about 25 s of one core without optimisation.
const SEEDS: u64 = 10_000;
/// How long a world has trouble.
const TROUBLE: u32 = 60;
/// And how long it may take to settle after that.
const PEACE: u32 = 300;

/// The default rules in shorter times, so that a minute has everything in it.
fn short(seed: u64) -> Dimensions {
    let probe =
        ProbeSettings { interval: 3 * SECOND, timeout: SECOND, stale_after: 9 * SECOND, ..ProbeSettings::default() };
    let region = RegionSettings {
        calm_after: 3 * SECOND,
        hold_down: 4 * SECOND,
        longest_hold_down: 16 * SECOND,
        forgive_after: 60 * SECOND,
        clean: 2,
        step_for: SECOND,
        ..RegionSettings::default()
    };
    Dimensions {
        regions: if seed.is_multiple_of(3) { 2 } else { 3 },
        gateways_each: if seed.is_multiple_of(5) { 2 } else { 1 },
        controls: 2,
        tick: SECOND,
        probe,
        fleet: FleetSettings { region, hold: 20 * SECOND, ..FleetSettings::default() },
    }
}

/// Something happens, or not.
fn trouble(world: &mut World) {
    let region = world.random.below(world.regions.len());
    let vantage = world.random.below(world.vantages.len());
    let gateway = world.random.below(world.gateways.len());
    match world.random.below(100) {
        0..5 => world.live(region, Life::Killed),
        5..8 => world.live(region, Life::Silent),
        8..18 => world.live(region, Life::Well),
        18..20 => world.lives[gateway] = Life::Silent,
        20..24 => drop(world.network.isolated.insert(vantage)),
        24..30 => drop(world.network.isolated.pop_first()),
        30..33 => drop(world.network.cut.insert((vantage, region))),
        33..38 => drop(world.network.cut.pop_first()),
        38..40 => world.network.loss = world.random.below(40) as f64 / 100.0,
        40..42 => world.network.delay = world.random.below(6),
        42 => world.qualities[region] = Quality::Slow,
        43 => world.qualities[region] = Quality::Breaching,
        44..49 => world.qualities[region] = Quality::Fine,
        49..51 => {
            let pin = if world.random.happens(0.5) { Pin::Out } else { Pin::In };
            let time = SECOND * (1 + world.random.below(20) as u32);
            world.order(region, pin, time);
        }
        51..53 => {
            let time = SECOND * world.random.below(10) as u32;
            world.lead_nobody(time);
        }
        _ => {}
    }
}

/// What is planned with these shares, by figures as good as measurements are: none, odd or too little of all.
fn plan(world: &World, random: &mut Random) -> Plan {
    let mut figure = |most: f64| match random.below(8) {
        0 => None,
        1 => Some(0.0),
        _ => Some(random.unit() * most),
    };
    let planned = |(name, share): (&_, f64)| {
        let capacity = figure(200.0);
        let planned =
            Planned { planned: figure(1.0).unwrap_or(1.0), share, capacity, load: figure(100.0), overridden: None };
        (Clone::clone(name), planned)
    };
    let regions = world.regions.iter().zip(world.shares()).map(planned).collect();
    let traffic = Traffic { demand: figure(600.0), classes: [0.1, 0.2, 0.3, 0.4] };
    Plan::of(1, &regions, &traffic, world.now).unwrap()
}

/// Weights are finite and sum to 1, and go to nobody who is out while another one with a weight is in.
fn check_plan(plan: &Plan) {
    let weights = || plan.regions.values().map(|allotment| allotment.weight);
    assert!(weights().all(|weight| weight.is_finite() && weight >= 0.0), "{plan:?}");
    assert!((weights().sum::<f64>() - 1.0).abs() < 1e-9, "{plan:?}");
    let out = |allotment: &crate::failover::Allotment| allotment.terms.share == 0.0 && allotment.weight > 0.0;
    assert!(!plan.regions.values().any(out), "{plan:?}");
}

/// What happened in all worlds.
#[derive(Default)]
struct Seen {
    outs: AtomicUsize,
    withheld: [AtomicUsize; 4],
    blind: AtomicUsize,
    plans: AtomicUsize,
    steps: AtomicUsize,
}

impl Seen {
    fn add(count: &AtomicUsize, more: usize) {
        count.fetch_add(more, Ordering::Relaxed);
    }
}

/// A minute of trouble, then peace, with some of the regions gone for good.
fn troubled(seed: u64, seen: &Seen) {
    let mut world = World::new(short(seed), seed);
    let (mut random, mut shares) = (Random(!seed), world.shares());
    let mut step = |world: &mut World| {
        world.step();
        Seen::add(&seen.steps, 1);
        let now = world.shares();
        if now != shares {
            check_plan(&plan(world, &mut random));
            Seen::add(&seen.plans, 1);
            shares = now;
        }
    };
    for _ in 0..TROUBLE {
        trouble(&mut world);
        step(&mut world);
    }
    world.network = Default::default();
    world.qualities.fill(Quality::Fine);
    let mut settled_for = 0;
    for _ in 0..PEACE {
        step(&mut world);
        settled_for = if world.has_settled() { settled_for + 1 } else { 0 };
        if settled_for == 5 {
            break;
        }
    }
    let is_out = |moved: &Move| moved.to == Phase::Down && matches!(moved.why, Why::Verdict(_));
    Seen::add(&seen.outs, world.moves.iter().filter(|(_, _, moved)| is_out(moved)).count());
    for withheld in &world.withheld {
        let place = match withheld {
            Withheld::Hold { .. } => 0,
            Withheld::Last => 1,
            Withheld::Spare => 2,
            Withheld::Forced(_) => 3,
        };
        Seen::add(&seen.withheld[place], 1);
    }
    Seen::add(&seen.blind, usize::from(world.lives.iter().all(|life| *life != Life::Well)));
    assert!(settled_for == 5, "it does not settle: {:?} leave {:?}", world.lives, world.moves);
}

/// Says which seed it was.
struct Tried(u64);

impl Drop for Tried {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {} fails", self.0);
        }
    }
}

#[test]
fn never_all_out_never_two_within_the_hold_and_always_the_healthy_set() {
    let (began, seen, next) = (Instant::now(), Seen::default(), AtomicUsize::new(0));
    let seeds =
        || std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed) as u64).take_while(|seed| *seed < SEEDS);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                for seed in seeds() {
                    let tried = Tried(seed);
                    troubled(tried.0, &seen);
                }
            });
        }
    });
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let [hold, last, spare, forced] = seen.withheld.each_ref().map(count);
    let [outs, blind, plans, steps] = [&seen.outs, &seen.blind, &seen.plans, &seen.steps].map(count);
    println!(
        "{SEEDS} seeds in {:?}: {steps} s of virtual time, {plans} plans, {outs} regions out, withheld {hold} for the \
         hold, {last} as the last, {spare} for a soft rule, {forced} for an operator; {blind} worlds without a healthy region in the end",
        began.elapsed()
    );
    record("control.simulation.seeds", SEEDS as f64, "seeds", Goal::AtLeast(10_000.0));
    record("control.simulation.virtual_time", steps as f64, "s", Goal::None);
    for seen in [outs, hold, last, spare, forced, blind] {
        assert!(seen > 100, "the trouble is too little to prove anything");
    }
}
