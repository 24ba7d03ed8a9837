use super::*;

const GOOD: &str = r#"
apiVersion: spillway/v1
kind: Drill
metadata: { name: slow-gateway }
spec:
  description: The gateways of a region answer late
  target: eu-west
  expects: failover
  loses: 50%
  unknownCapacity: accept
  faults:
    - { act: delay, on: ["$target/gateway*"], from: ["*/gateway*"], by: 300ms }
    - { act: kill, on: ["$target/redis"] }
  hold: 3m
  settle: 5s
  recover: 10m
  load: { clients: 10, interval: 100ms, deadline: 2s, attempts: 2 }
  heartbeat: { group: site }
  objectives: { verdict: 19s, moved95: 60s, rto: 2m, rpo: 5m, errors: 0%, success: 99.9%, weightChanges: 4 }
  guards: { success: 80%, successFor: 5s, secondRegionFor: 0s, blindFor: 10s }
"#;

#[test]
fn a_whole_drill_is_read() {
    let drill = read(GOOD).unwrap();
    assert_eq!(drill.name.as_str(), "slow-gateway");
    assert_eq!(drill.target.as_ref().unwrap().as_str(), "eu-west");
    assert_eq!((drill.expects, drill.loses.ratio(), drill.accepts_unknown_capacity), (Expected::Failover, 0.5, true));
    assert_eq!(drill.faults[0].act, Act::Delay(Duration::from_millis(300)));
    assert_eq!((drill.faults[0].from.len(), drill.faults[1].act), (1, Act::Kill));
    assert_eq!(drill.load.clients, 10);
    assert_eq!(drill.heartbeat.as_ref().unwrap().group.as_str(), "site");
    assert_eq!(drill.objectives.times[&Measure::Verdict], Duration::from_secs(19));
    assert_eq!(drill.objectives.times[&Measure::Rpo], Duration::from_secs(300));
    assert_eq!((drill.objectives.errors.ratio(), drill.objectives.weight_changes), (0.0, Some(4)));
    assert_eq!(drill.guards.second_region_for, Duration::ZERO);
    assert!(drill.needs_target());
}

#[test]
fn what_is_left_out_has_a_default() {
    let text = "apiVersion: spillway/v1\nkind: Drill\nmetadata: { name: a }\nspec:\n  expects: steady\n  faults:\n    - { act: pause, on: [etcd-*] }\n";
    let drill = read(text).unwrap();
    assert_eq!((drill.hold, drill.loses.ratio()), (Duration::from_secs(120), 0.0));
    assert_eq!(drill.objectives.weight_changes, Some(0), "steady means that no weight changes");
    assert!(!drill.needs_target());
    assert_eq!((drill.load, drill.guards), (Load::default(), Guards::default()));
    let all = read(&text.replace("steady", "failover")).unwrap();
    assert_eq!((all.loses.ratio(), all.objectives.weight_changes), (1.0, None));
}

#[test]
fn every_fault_of_a_file_is_told_with_its_line() {
    let bad = r#"apiVersion: spillway/v2
kind: Drill
metadata: { name: -a }
spec:
  expects: chaos
  faults: []
  colour: red
"#;
    let faults = read(bad).unwrap_err();
    let fields: Vec<(usize, &str)> = faults.iter().map(|fault| (fault.line, fault.field.as_str())).collect();
    assert_eq!(fields, [(1, "apiVersion"), (3, "metadata.name")], "without a name the spec is not read");
    let faults = read(&bad.replace("v2", "v1").replace("-a", "a")).unwrap_err();
    let fields: Vec<(usize, &str)> = faults.iter().map(|fault| (fault.line, fault.field.as_str())).collect();
    assert!(fields.contains(&(5, "spec.expects")) && fields.contains(&(6, "spec.faults")), "{fields:?}");
    assert!(read("").is_err() && read("a: [").is_err() && read(&format!("{GOOD}---{GOOD}")).is_err());
}

#[test]
fn what_cannot_be_meant_is_refused() {
    for (from, to) in [
        ("by: 300ms", "by: 0ms"),
        (", by: 300ms", ""),
        ("on: [\"$target/redis\"]", "on: []"),
        ("on: [\"$target/redis\"]", "on: [\"$target/redis\"], from: [a]"),
        ("on: [\"$target/redis\"]", "on: [\"$target/redis\"], by: 3s"),
        ("hold: 3m", "hold: 3h"),
        ("clients: 10", "clients: 0"),
        ("attempts: 2", "attempts: 99"),
        ("errors: 0%", "errors: 0"),
        ("verdict: 19s", "verdict: soon"),
        ("verdict: 19s", "judgement: 19s"),
        ("success: 80%", "success: 101%"),
        ("group: site", "entity: site"),
    ] {
        assert!(GOOD.contains(from), "{from}");
        assert!(read(&GOOD.replace(from, to)).is_err(), "{to}");
    }
}
