//! Operators' overrides.

use spillway_proto::control::r#override::Act;
use spillway_runtime::plan::Published;

use super::world::*;
use crate::store::Write;

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
async fn an_order_outlasts_its_regions_absence() {
    let mut world = World::new(None).await;
    world.run(SECOND * 30).await;
    world.order("us", Act::Drain(true), 7_200).await;
    world.until("us is drained", SECOND * 5, |plan| plan.plan.weight(&name("us")) == 0.0).await;
    let waits = "the override of 'us' has no effect: there is no such region";
    let said = |world: &World| world.status().events.iter().filter(|event| event.ends_with(waits)).count();
    // It leaves and returns, as after a change and its rollback.
    world.staff(&["eu", "ap"]);
    world.run(SECOND * 60).await;
    assert_eq!(said(&world), 1);
    world.staff(&["eu", "us", "ap"]);
    world.run(SECOND * 60).await;
    near(world.weights(), [0.5, 0.0, 0.5]);
    assert_eq!(world.phase("us"), "down");
    world.write(Write::Delete("overrides/us".into())).await;
    world.run(SECOND * 420).await;
    assert_ne!(world.phase("us"), "down", "it ends as any other");

    // One that is given before there is anything of the region.
    world.staff(&["eu", "us"]);
    world.run(SECOND).await;
    world.order("ap", Act::Drain(true), 7_200).await;
    world.run(SECOND * 5).await;
    world.staff(&["eu", "us", "ap"]);
    world.run(SECOND).await;
    assert_eq!((world.weights()[2], world.phase("ap").as_str()), (0.0, "down"));
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
