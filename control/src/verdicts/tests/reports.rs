//! Whose word counts.

use spillway_core::identity::SpiffeId;
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

#[tokio::test]
async fn one_broken_counter_has_nothing_shed() {
    let mut world = World::new(Some(500)).await;
    world.run(SECOND * 20).await;
    for _ in 0..3 {
        let told = control::Traffic { milliseconds: 5_000, requests: u64::MAX, ..control::Traffic::default() };
        let heartbeat = control::Heartbeat { traffic: Some(told), ..control::Heartbeat::default() };
        world.judging.hear(&Report::Heartbeat(id("us/gateway/g"), heartbeat), world.now);
        world.run(SECOND).await;
    }
    let plan = &world.plans.last().unwrap().1.plan;
    assert_eq!((plan.demand, plan.shed.share), (Some(900.0), 0.0));
    assert!(world.metrics.encode().unwrap().contains("spillway_control_heartbeats_disbelieved_total 3\n"));
}

#[tokio::test]
async fn a_dns_node_is_a_vantage_beside_the_control_node_of_its_name() {
    let mut world = World::new(None).await;
    world.run(SECOND * 20).await;
    let of = |world: &World, region: &str| {
        let regions = world.status().regions;
        regions.into_iter().find(|status| status.region == region).unwrap().evidence
    };
    assert!(of(&world, "us").contains(" of 3 vantages"), "{}", of(&world, "us"));
    let seen = |region: &str| control::Sighting {
        region: region.into(),
        gateway: "g".into(),
        outcome: control::sighting::Outcome::Good.into(),
        round_trip_us: 1,
    };
    let told = ["ap", "eu", "us"].map(seen).to_vec();
    // `eu/control/c` is the one that judges.
    world.judging.hear(&Report::Sightings(id("eu/dns/c"), told), world.now);
    world.run(SECOND).await;
    assert!(of(&world, "us").contains(" of 4 vantages"), "{}", of(&world, "us"));
    assert!(
        world.metrics.encode().unwrap().contains("spillway_control_sightings_ignored_total 1\n"),
        "of its own region"
    );
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
    beat(&mut world, "eu/dns/dns-0", 30, 10);
    beat(&mut world, "us/dns/dns-0", 10, 30);
    // Who is no DNS node has no word.
    beat(&mut world, "us/gateway/g", 0, 1_000_000);
    world.run(SECOND).await;
    // Regions are told by name.
    assert_eq!(answered(&world), [Some(0.0), Some(0.5), Some(0.5)]);
    world.run(SECOND * 61).await;
    assert_eq!(answered(&world), [None; 3]);
}
