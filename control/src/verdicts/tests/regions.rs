//! What takes a region out, and what brings it back.

use std::sync::Arc;

use spillway_core::failover::{Basis, Standing};
use spillway_runtime::plan::Published;
use spillway_runtime::settings::parse;

use super::world::*;
use crate::verdicts::stored;

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

/// Gateways report every 5 s, whatever a control node's own interval is.
#[tokio::test]
async fn a_silent_region_goes_out_also_where_control_nodes_probe_more_often() {
    let health = parse("probes: {interval: 1s, timeout: 1s}").unwrap();
    let mut world = World::under(health, None).await;
    world.run(SECOND * 33).await;
    world.lives[1] = Life::Silent;
    let took = world.until("us is out", SECOND * 60, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    assert!(took <= SECOND * 19, "{took:?}");
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

/// A version of the intent takes its stages; a plan is for all nodes at once.
#[tokio::test]
async fn a_plan_names_only_regions_that_all_nodes_know() {
    let mut world = World::new(None).await;
    let newest = snapshot(None);
    let mut older = (*newest).clone();
    older.regions.remove(&name("ap"));
    world.served.send_replace(Some(Arc::new(older)));
    world.run(SECOND * 10).await;
    let plan = &world.plans.last().unwrap().1;
    assert_eq!(plan.plan.regions.keys().collect::<Vec<_>>(), [&name("eu"), &name("us")]);
    assert!(plan.standings.keys().eq(plan.plan.regions.keys()));
    let version = plan.plan.version;
    world.served.send_replace(None);
    world.kill(1);
    world.run(SECOND * 10).await;
    assert_eq!(world.plans.last().unwrap().1.plan.version, version, "nothing is planned before it is known for whom");
    world.served.send_replace(Some(newest));
    world
        .until("ap has its part, us none", SECOND, |plan| {
            plan.plan.weight(&name("ap")) > 0.4 && plan.plan.weight(&name("us")) == 0.0
        })
        .await;
}
