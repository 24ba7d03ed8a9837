//! What is asked for, and what fits.

use std::time::Duration;

use super::world::*;

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
