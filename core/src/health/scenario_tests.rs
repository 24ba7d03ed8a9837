//! What operators count on, from probes to weights, in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::virtual_world::{Dimensions, Life, SECOND, World};
use super::*;
use crate::failover::{self, AnswerSettings, Basis, Plan, Site, Subnet, Traffic};
use crate::units::Name;
use spillway_figures::{Goal, record};

/// Three regions, so many control nodes, the default rules and a fine clock; somewhere within a probe's interval.
fn usual(controls: usize, seed: u64) -> World {
    let tick = Duration::from_millis(100);
    let mut world = World::new(Dimensions { tick, ..Dimensions::usual(controls) }, seed);
    world.run(7 * SECOND + Duration::from_millis(250 * (seed % 20)));
    world
}

/// The time until the first region has no weight.
fn time_to_out(world: &mut World) -> Duration {
    let begin = world.now;
    while world.share(0) > 0.0 {
        world.step();
        assert!(world.now - begin < 60 * SECOND, "it stays");
    }
    assert_eq!((world.share(1), world.share(2)), (1.0, 1.0));
    world.now - begin
}

#[test]
fn a_silent_region_is_out_within_19_seconds() {
    let times = (0..20).map(|seed| {
        let mut world = usual(2, seed);
        world.live(0, Life::Silent);
        time_to_out(&mut world)
    });
    let longest = times.max().unwrap();
    record("control.virtual.silent_region_out", longest.as_secs_f64(), "s", Goal::AtMost(19.0));
    assert!((15 * SECOND..=19 * SECOND).contains(&longest), "{longest:?}");
}

#[test]
fn a_killed_region_is_out_within_9_seconds_and_within_5_if_a_connection_tells() {
    for (controls, told, limit) in [(2, false, 9), (0, false, 9), (2, true, 5), (0, true, 5)] {
        let times = (0..20).map(|seed| {
            let mut world = usual(controls, seed);
            world.live(0, Life::Killed);
            if told {
                world.nudge(0);
            }
            time_to_out(&mut world)
        });
        let longest = times.max().unwrap();
        if told && controls == 0 {
            record("control.virtual.killed_region_out_by_gateways", longest.as_secs_f64(), "s", Goal::AtMost(5.0));
        }
        assert!(longest <= limit * SECOND, "{controls} control nodes, told: {told}: {longest:?}");
    }
}

#[test]
fn two_failed_probes_and_a_good_one_move_no_weight() {
    let mut changes = 0;
    for (seed, life) in (0..10).flat_map(|seed| [(seed, Life::Killed), (seed, Life::Silent)]) {
        let mut world = usual(2, seed);
        world.live(0, life);
        let gateway = world.gateways[0].1.clone();
        let failed_twice = |world: &World| {
            let failures = |from| world.board.pair(from, &gateway).map_or(0, Pair::failures);
            world.vantages.iter().map(failures).max() == Some(2)
        };
        while !failed_twice(&world) {
            world.step();
        }
        world.live(0, Life::Well);
        world.run(40 * SECOND);
        changes += world.changes(0);
        assert_eq!(world.shares(), [1.0; 3], "{:?}", world.moves);
    }
    assert!(record("control.virtual.two_failed_probes.changes", changes as f64, "changes", Goal::AtMost(0.0)));
}

#[test]
fn one_isolated_vantage_moves_no_weight_even_on_a_lossy_network() {
    let mut changes = 0;
    for seed in 0..500 {
        let mut world = World::new(Dimensions::usual(2), seed);
        world.run(10 * SECOND);
        (world.network.loss, world.network.delay) = (0.05, 2);
        for vantage in 0..world.vantages.len() {
            world.network.isolated = BTreeSet::from([vantage]);
            for _ in 0..30 {
                world.step();
                assert_eq!(world.shares(), [1.0; 3], "seed {seed}: {:?}", world.moves);
            }
        }
        changes += world.moves.iter().filter(|(_, _, moved)| moved.to == Phase::Down).count();
    }
    assert!(record("control.virtual.isolated_vantage.changes", changes as f64, "changes", Goal::AtMost(0.0)));
}

#[test]
fn isolated_vantages_move_no_weight_while_one_is_not() {
    for seed in 0..40 {
        let mut world = World::new(Dimensions::usual(2), seed);
        world.run(10 * SECOND);
        let vantages = world.vantages.len();
        world.network.isolated = (0..vantages).filter(|vantage| *vantage != seed as usize % vantages).collect();
        world.run(60 * SECOND);
        assert!(world.moves.iter().all(|(_, _, moved)| moved.to != Phase::Down), "seed {seed}: {:?}", world.moves);
        assert_eq!(world.shares(), [1.0; 3]);
    }
}

#[test]
fn isolated_vantages_neither_take_a_region_out_nor_keep_a_lost_one_in() {
    for seed in 0..10 {
        // Two gateways and two of four control nodes: more than half of those that probe the first region.
        let mut world = usual(4, seed);
        world.network.isolated = BTreeSet::from([1, 2, 3, 4]);
        world.run(20 * SECOND);
        assert_eq!(world.shares(), [1.0; 3], "their word would be enough");
        world.live(0, Life::Silent);
        time_to_out(&mut world);
    }
}

#[test]
fn half_an_hour_of_flapping_moves_weight_twice_at_most() {
    let mut most = 0;
    for (bad, good) in [(10, 10), (20, 40), (60, 60), (30, 120), (180, 180), (240, 300)] {
        for life in [Life::Killed, Life::Silent] {
            let mut world = World::new(Dimensions::usual(2), bad);
            for second in 0..1_800 {
                world.live(0, if second % (bad + good) < good { Life::Well } else { life });
                world.step();
            }
            assert!(world.changes(0) <= 2, "{bad} s {life:?}, {good} s well: {:?}", world.moves);
            assert_eq!(world.changes(1) + world.changes(2), 0);
            most = most.max(world.changes(0));
        }
    }
    record("control.virtual.flapping.changes", most as f64, "changes in 30 min", Goal::AtMost(2.0));
}

/// A region serves badly for so many seconds; all else is well.
fn bad_for(seconds: u64, sample: Sample) -> World {
    let mut world = World::new(Dimensions::usual(2), seconds);
    let mut watch = Watch::new(SoftSettings::default());
    for second in 0..400 {
        let (from, to) = (world.now, world.now + SECOND);
        let bad = (60..60 + seconds).contains(&second);
        let sample = if bad { sample } else { Sample { requests: 100, ..Sample::default() } };
        watch.observe(Sample { from, to, ..sample });
        world.qualities[0] = watch.quality(to);
        world.step();
    }
    world
}

#[test]
fn a_soft_rule_takes_a_region_out_from_its_edge_on() {
    let hundred = Sample { requests: 100, ..Sample::default() };
    let (slow, failing) = (Sample { slow: 2, ..hundred }, Sample { errors: 6, ..hundred });
    for (sample, seconds, cause) in [
        (slow, 299, None),
        // A verdict has to stand for a second.
        (slow, 301, Some(Cause::Slow)),
        (failing, 179, None),
        (failing, 181, Some(Cause::Failing)),
        (Sample { slow: 1, errors: 5, ..hundred }, 340, None),
        (Sample { utilisation: Some(0.9), ..slow }, 340, None),
        (Sample { shed: 2, ..failing }, 340, None),
    ] {
        let world = bad_for(seconds, sample);
        assert_eq!(world.changes(0), usize::from(cause.is_some()), "{seconds} s of {sample:?}: {:?}", world.moves);
        let verdict = world.moves.last().map(|(_, _, moved)| moved.why);
        assert!(cause.is_none_or(|cause| verdict == Some(Why::Verdict(cause))), "{verdict:?}");
    }
}

fn planned(world: &World, demand: f64, capacity: f64) -> Plan {
    let region = |(name, share): (&Name, f64)| {
        let region = failover::Region { planned: 1.0, share, capacity: Some(capacity), load: None, overridden: None };
        (name.clone(), region)
    };
    let regions = world.regions.iter().zip(world.shares()).map(region).collect();
    Plan::of(1, &regions, &Traffic { demand: Some(demand), classes: [0.1, 0.2, 0.3, 0.4] }, world.now).unwrap()
}

/// Three regions of 600 requests/s each; one is lost, and of the headroom that its load needs the survivors have 70 %.
/// What they take beyond their capacity is shed as planned, and what they serve is slow and runs into time-outs.
#[test]
fn survivors_with_70_percent_of_the_headroom_stay_in_and_shed_the_lowest_class() {
    let (demand, capacity) = (1_800.0, 600.0 + 0.7 * 300.0);
    for knows_utilisation in [true, false] {
        let mut world = World::new(Dimensions::usual(2), 1);
        let mut watches = vec![Watch::new(SoftSettings::default()); 3];
        for second in 0..2_000 {
            if second == 60 {
                world.live(0, Life::Silent);
            }
            let plan = planned(&world, demand, capacity);
            for (region, (watch, allotment)) in watches.iter_mut().zip(plan.regions.values()).enumerate() {
                let load = allotment.load.unwrap();
                let shed = load * allotment.shed.share;
                let requests = (load - shed) as u64;
                let hurt = shed > 0.0;
                let sample = Sample {
                    from: world.now,
                    to: world.now + SECOND,
                    requests,
                    slow: if hurt { requests / 2 } else { 0 },
                    errors: if hurt { requests / 10 } else { 0 },
                    shed: shed as u64,
                    utilisation: knows_utilisation.then_some(load / capacity),
                };
                watch.observe(sample);
                world.qualities[region] = watch.quality(sample.to);
            }
            world.step();
        }
        assert_eq!(world.shares(), [0.0, 1.0, 1.0], "{:?}", world.moves);
        assert_eq!(world.changes(1) + world.changes(2), 0);
        let plan = planned(&world, demand, capacity);
        let [critical, high, normal, low] = plan.shed.classes;
        let out = world.changes(1) + world.changes(2);
        record("control.virtual.headroom_70.more_regions_out", out as f64, "regions", Goal::AtMost(0.0));
        record("control.virtual.headroom_70.shed_of_lowest", low * 100.0, "%", Goal::AtMost(25.1));
        record(
            "control.virtual.headroom_70.shed_of_others",
            (critical + high + normal) * 100.0,
            "%",
            Goal::AtMost(0.0),
        );
        assert_eq!([critical, high, normal], [0.0; 3]);
        assert!((low - 0.1 / 0.4).abs() < 1e-9 && (plan.shed.share - 0.1).abs() < 1e-9, "{plan:?}");
    }
}

#[test]
fn with_everything_unhealthy_weights_stay_and_names_are_answered() {
    let mut world = World::new(Dimensions::usual(2), 7);
    world.lives.fill(Life::Silent);
    world.run(1_800 * SECOND);
    assert_eq!(world.shares(), [1.0; 3], "{:?}", world.moves);
    let plan = planned(&world, 300.0, 200.0);
    assert_eq!(plan.basis, Basis::Healthy, "who leads keeps all in");
    // A node that sees for itself that all are gone.
    let plan = plan.under(|_| Some(0.0));
    assert_eq!(plan.basis, Basis::Blind);
    let weights: Vec<f64> = world.regions.iter().map(|region| plan.weight(region)).collect();
    assert!(weights.iter().all(|weight| (weight - 1.0 / 3.0).abs() < 1e-9), "{weights:?}");
    let addresses: [IpAddr; 3] = [1, 2, 3].map(|region| Ipv4Addr::new(10, region, 0, 1).into());
    let site = |(region, address)| {
        let addresses = std::slice::from_ref(address);
        (region, Site { weight: plan.weight(region), standing: failover::Standing::Out, addresses })
    };
    let sites: BTreeMap<&Name, Site<'_>> = world.regions.iter().zip(&addresses).map(site).collect();
    let client = Subnet::of(Ipv4Addr::new(192, 0, 2, 1).into());
    let answer = failover::answer(&sites, &client, &AnswerSettings::default()).unwrap();
    record("control.virtual.all_unhealthy.addresses", answer.addresses.len() as f64, "addresses", Goal::AtLeast(1.0));
    assert_eq!((answer.addresses.len(), answer.ttl), (3, 5 * SECOND), "one of each, to be asked for again soon");
}
