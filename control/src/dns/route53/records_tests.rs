use proptest::prelude::*;

use super::*;
use crate::dns::fixture::{name, place, view, zone};

use Standing::{Out, Steady, Unsteady};

fn sets_of(view: &View) -> Vec<ResourceRecordSet> {
    desired(view, &zone().answers, &zone().name).unwrap()
}

/// Type, region, weight and time to live.
fn told(sets: &[ResourceRecordSet]) -> Vec<(String, String, i64, i64)> {
    let tell = |set: &ResourceRecordSet| {
        let identifier = set.set_identifier().unwrap().to_owned();
        (set.r#type().as_str().to_owned(), identifier, set.weight().unwrap(), set.ttl().unwrap())
    };
    sets.iter().map(tell).collect()
}

fn two(states: [(f64, Standing); 2]) -> View {
    let [eu, us] = states;
    let eu = (name("eu"), place(eu.0, eu.1, &["192.0.2.1"]));
    let us = (name("us"), place(us.0, us.1, &["198.51.100.1"]));
    View { serial: 9, regions: [eu, us].into() }
}

fn actions(changes: &[Change]) -> Vec<(String, String)> {
    let tell = |change: &Change| {
        let set = change.resource_record_set().unwrap();
        (change.action().as_str().to_owned(), set.set_identifier().unwrap_or("-").to_owned())
    };
    changes.iter().map(tell).collect()
}

#[test]
fn a_view_is_a_weighted_set_for_each_region_and_family() {
    let expected = [("A", "eu-west", 255, 30), ("A", "us-east", 64, 30), ("AAAA", "eu-west", 255, 30)];
    let expected = expected.map(|(kind, region, weight, ttl)| (kind.to_owned(), region.to_owned(), weight, ttl));
    let sets = sets_of(&view());
    assert_eq!(told(&sets), expected);
    let values: Vec<&str> = sets[0].resource_records().iter().map(ResourceRecord::value).collect();
    assert_eq!((sets[0].name(), values), ("infer.example.com.", vec!["198.51.100.1", "198.51.100.2"]));
    assert!(sets.iter().all(|set| set.health_check_id().is_none()));
}

#[test]
fn weights_and_times_follow_health_as_answers_do() {
    for (states, weights, ttl) in [
        ([(0.5, Steady), (0.5, Steady)], [255, 255], 30),
        ([(1.0, Steady), (1e-9, Steady)], [255, 1], 30),
        ([(0.8, Unsteady), (0.2, Steady)], [255, 64], 5),
        ([(0.8, Out), (0.2, Steady)], [0, 255], 5),
        ([(0.8, Out), (0.2, Out)], [255, 64], 5),
        ([(0.0, Steady), (0.0, Steady)], [255, 255], 30),
        ([(1.0, Out), (0.0, Steady)], [0, 255], 5),
        ([(f64::NAN, Steady), (0.5, Steady)], [0, 255], 30),
    ] {
        let sets = told(&sets_of(&two(states)));
        assert_eq!([sets[0].2, sets[1].2], weights, "{states:?}");
        assert!(sets.iter().all(|set| set.3 == ttl), "{states:?}");
    }
}

#[test]
fn only_what_differs_is_changed() {
    let wanted = sets_of(&two([(0.8, Steady), (0.2, Steady)]));
    assert_eq!(changes(&wanted, &wanted).unwrap(), []);
    let all = changes(&[], &wanted).unwrap();
    assert_eq!(actions(&all), [("UPSERT".into(), "eu".into()), ("UPSERT".into(), "us".into())]);
    let shifted = sets_of(&two([(0.8, Steady), (0.4, Steady)]));
    assert_eq!(actions(&changes(&wanted, &shifted).unwrap()), [("UPSERT".into(), "us".into())]);
}

#[test]
fn what_somebody_added_goes_and_what_somebody_changed_is_put_right() {
    let wanted = sets_of(&two([(0.8, Steady), (0.2, Steady)]));
    let simple = ResourceRecordSet::builder()
        .name("infer.example.com.")
        .r#type(RrType::A)
        .ttl(300)
        .resource_records(ResourceRecord::builder().value("203.0.113.9").build().unwrap())
        .build()
        .unwrap();
    assert_eq!(
        actions(&changes(&[simple], &wanted).unwrap()),
        [("DELETE".into(), "-".into()), ("UPSERT".into(), "eu".into()), ("UPSERT".into(), "us".into())]
    );
    let mut checked = wanted.clone();
    checked[0].health_check_id = Some("abc".into());
    assert_eq!(actions(&changes(&checked, &wanted).unwrap()), [("UPSERT".into(), "eu".into())]);
    let mut latency = wanted.clone();
    latency[0].weight = None;
    assert_eq!(
        actions(&changes(&latency, &wanted).unwrap()),
        [("DELETE".into(), "eu".into()), ("CREATE".into(), "eu".into())]
    );
}

#[test]
fn t66_the_last_addresses_stay_but_ipv6_beside_ipv4_may_go() {
    let wanted = sets_of(&view());
    assert_eq!(changes(&wanted, &[]).unwrap(), [], "nothing is wanted: nothing is taken away");
    let only = |kind: RrType| wanted.iter().filter(|set| *set.r#type() == kind).cloned().collect::<Vec<_>>();
    assert_eq!(changes(&wanted, &only(RrType::Aaaa)).unwrap(), []);
    assert_eq!(actions(&changes(&wanted, &only(RrType::A)).unwrap()), [("DELETE".into(), "eu-west".into())]);
}

#[test]
fn a_stamp_is_read_as_it_was_written_and_a_strangers_is_none() {
    let (stamp, service) = (Stamp { epoch: 12, version: 41, batch: 7 }, &zone().name);
    let set = stamp.record(service).unwrap();
    assert_eq!((set.name(), Stamp::read(&set)), ("_spillway.infer.example.com.", Some(stamp)));
    for later in [(12, 41), (12, 42), (13, 1)] {
        let next = Stamp::after(Some(stamp), later.0, later.1);
        assert!(next > stamp && next.batch == 8, "{next:?}");
    }
    assert!(Stamp::after(Some(stamp), 12, 40) < stamp && Stamp::after(Some(stamp), 11, 99) < stamp);
    for text in ["\"v=spf1 -all\"", "\"epoch=12 plan=41\"", "\"epoch=12 plan=41 batch=-1\""] {
        let value = ResourceRecord::builder().value(text).build().unwrap();
        let other = ResourceRecordSet::builder().name("a.").r#type(RrType::Txt).resource_records(value);
        assert_eq!(Stamp::read(&other.build().unwrap()), None, "{text}");
    }
}

proptest! {
    #[test]
    fn some_set_of_each_family_always_has_weight(
        states in proptest::collection::vec((prop::num::f64::ANY, 0_usize..3), 2),
    ) {
        let state = |index: usize| (states[index].0, [Steady, Unsteady, Out][states[index].1]);
        let sets = told(&sets_of(&two([state(0), state(1)])));
        prop_assert!(sets.iter().any(|set| set.2 > 0));
        prop_assert!(sets.iter().all(|set| (0..=255).contains(&set.2)));
    }
}
