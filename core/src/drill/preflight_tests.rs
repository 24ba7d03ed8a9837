use super::*;
use crate::drill::builtin;
use crate::drill::definition::read;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn drill(text: &str) -> Drill {
    read(builtin::text(text).unwrap()).unwrap()
}

fn region(weight: f64, capacity: Option<f64>) -> RegionBefore {
    RegionBefore { phase: Some(Phase::Up), weight, capacity }
}

fn calm() -> Situation {
    let regions = ["eu-west", "us-east", "ap-south"].map(|text| (name(text), region(1.0 / 3.0, Some(100.0))));
    let processes = ["eu-west/gateway", "us-east/gateway", "etcd-0"].map(str::to_owned);
    Situation {
        leader: true,
        regions: regions.into(),
        demand: Some(180.0),
        processes: processes.into(),
        links: ["eu-west/gateway", "eu-west/redis", "us-east/gateway"].map(str::to_owned).into(),
        requests: 100,
        announced: Announcement::Taken,
        ..Situation::default()
    }
}

#[test]
fn a_calm_fleet_bears_each_drill_that_comes_along() {
    for drill in builtin::all() {
        assert_eq!(preflight(&drill, Some(&name("eu-west")), &calm()), [], "{}", drill.name);
    }
}

#[test]
fn t65_all_reasons_against_a_drill_are_told_at_once() {
    let mut now = calm();
    now.leader = false;
    now.demand = Some(201.0);
    now.regions.get_mut("us-east").unwrap().phase = Some(Phase::Suspect);
    now.overridden = vec!["ap-south".into()];
    now.drills = vec!["latency".into()];
    now.processes.clear();
    (now.requests, now.failed) = (100, 2);
    let refusals = preflight(&drill("region-loss"), Some(&name("eu-west")), &now);
    let expected = [
        Refusal::NoLeader,
        Refusal::Capacity { left: 200.0, demand: 201.0 },
        Refusal::NotUp { region: name("us-east"), phase: "SUSPECT".into() },
        Refusal::Override("ap-south".into()),
        Refusal::Running("latency".into()),
        Refusal::NamesNobody { what: "process", names: "$target/*".into(), known: Vec::new() },
        Refusal::Failing { failed: 2, requests: 100 },
    ];
    assert_eq!(refusals, expected);
}

#[test]
fn t65_each_state_but_up_speaks_against_it() {
    for phase in [Phase::Suspect, Phase::Down, Phase::Probation, Phase::Ramp { percent: 50 }] {
        let mut now = calm();
        now.regions.get_mut("eu-west").unwrap().phase = Some(phase);
        let refusals = preflight(&drill("store-loss"), None, &now);
        assert_eq!(refusals, [Refusal::NotUp { region: name("eu-west"), phase: phase.to_string() }]);
    }
    let mut now = calm();
    now.regions.get_mut("eu-west").unwrap().phase = None;
    assert_eq!(preflight(&drill("store-loss"), None, &now).len(), 1, "nor does a word that nobody knows");
}

#[test]
fn capacity_that_nobody_knows_is_not_enough_unless_the_drill_says_so() {
    let mut now = calm();
    now.regions.get_mut("us-east").unwrap().capacity = None;
    let mut drill = drill("region-loss");
    let target = name("eu-west");
    assert_eq!(preflight(&drill, Some(&target), &now), [Refusal::UnknownCapacity(Some(name("us-east")))]);
    now.demand = Some(90.0);
    assert_eq!(preflight(&drill, Some(&target), &now), [], "what is known is enough by itself");
    now.demand = None;
    drill.accepts_unknown_capacity = true;
    assert_eq!(preflight(&drill, Some(&target), &now), []);
    now.regions.get_mut("eu-west").unwrap().capacity = None;
    drill.accepts_unknown_capacity = false;
    assert_eq!(preflight(&drill, Some(&target), &now), [Refusal::UnknownCapacity(Some(name("us-east")))]);
}

#[test]
fn the_target_must_be_there_and_not_the_only_one() {
    let drill = drill("region-loss");
    assert!(preflight(&drill, None, &calm()).contains(&Refusal::NoTarget));
    let other = name("mars");
    assert!(preflight(&drill, Some(&other), &calm()).contains(&Refusal::UnknownRegion(other.clone())));
    let mut now = calm();
    now.regions.get_mut("eu-west").unwrap().weight = 0.0;
    assert!(preflight(&drill, Some(&name("eu-west")), &now).contains(&Refusal::Idle(name("eu-west"))));
    let mut now = calm();
    now.regions.retain(|region, _| region.as_str() == "eu-west");
    assert!(preflight(&drill, Some(&name("eu-west")), &now).contains(&Refusal::LastRegion(name("eu-west"))));
}

#[test]
fn nobody_named_is_the_region_with_the_least_traffic() {
    let mut now = calm();
    now.regions.get_mut("us-east").unwrap().weight = 0.1;
    assert_eq!(choose_target(&now), Some(name("us-east")));
    now.regions.get_mut("us-east").unwrap().weight = 0.0;
    assert_eq!(choose_target(&now), Some(name("ap-south")), "a region without traffic shows nothing");
    assert_eq!(choose_target(&Situation::default()), None);
}

#[test]
fn a_drill_that_nobody_is_told_of_does_not_begin() {
    let with = |announced: Announcement, drills: &[&str]| {
        let drills = drills.iter().map(|drill| (*drill).to_owned()).collect();
        preflight(&drill("latency"), Some(&name("eu-west")), &Situation { announced, drills, ..calm() })
    };
    assert_eq!(with(Announcement::Unanswered, &[]), [Refusal::Unannounced(None)]);
    let why = || "you are no operator".to_owned();
    assert_eq!(with(Announcement::Refused(why()), &[]), [Refusal::Unannounced(Some(why()))]);
    let running = Refusal::Running("region-loss".into());
    assert_eq!(with(Announcement::Refused(why()), &["region-loss"]), [running], "one reason is enough");
}

#[test]
fn whom_the_injector_does_not_reach_is_said_with_whom_it_does() {
    let mut now = calm();
    now.links.retain(|link| link != "eu-west/redis");
    let refusals = preflight(&drill("redis-loss"), Some(&name("eu-west")), &now);
    let said: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    let expected = "the injector reaches no link that '$target/redis*' names, but eu-west/gateway, us-east/gateway";
    assert_eq!(said, [expected]);
}
