//! Whose word counts.

use spillway_proto::control;

use super::world::*;
use crate::distribution::Report;

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
