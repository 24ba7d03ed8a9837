//! Operators' overrides.

use spillway_proto::control::r#override::Act;

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
