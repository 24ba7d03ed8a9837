use proptest::prelude::*;
use spillway_core::failover::{Plan, Region as Planned, Traffic};
use spillway_core::resource::{Resource, parse};

use super::*;
use crate::dns::fixture::{addresses, name, place, view, zone};

/// Regions by name, weight and gateways.
fn snapshot(regions: &[(&str, f64, &[&str])]) -> Snapshot {
    let region = |(name, weight, gateways): &(&str, f64, &[&str])| {
        let gateway = |(index, address): (usize, &&str)| format!("{{name: gw-{index}, address: '{address}'}}");
        let gateways: Vec<String> = gateways.iter().enumerate().map(gateway).collect();
        format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: spillway.test, \
             weight: {weight}, gateways: [{}]}}\n",
            gateways.join(", ")
        )
    };
    let text: Vec<String> = regions.iter().map(region).collect();
    let resources: Vec<Resource> = parse(&text.join("---\n")).unwrap();
    Snapshot::compile(5, &resources).unwrap()
}

fn two() -> Snapshot {
    snapshot(&[
        ("eu", 80.0, &["192.0.2.1:8443", "192.0.2.1:9443", "[2001:db8::1]:8443"]),
        ("us", 20.0, &["198.51.100.1:443", "198.51.100.2:443"]),
    ])
}

fn published(shares: [f64; 2], standings: [Standing; 2]) -> Published {
    let region = |planned, share| Planned { planned, share, capacity: None, load: None, overridden: None };
    let regions = [(name("eu"), region(80.0, shares[0])), (name("us"), region(20.0, shares[1]))].into();
    let plan = Plan::of(41, &regions, &Traffic::default(), std::time::Duration::ZERO).unwrap();
    let standings = [(name("eu"), (standings[0], String::new())), (name("us"), (standings[1], String::new()))].into();
    Published { epoch: 1, plan, standings }
}

fn down(names: &[&str]) -> BTreeSet<Name> {
    names.iter().map(|text| name(text)).collect()
}

/// Weight as a part of all, and standing, of `eu` and `us`.
fn parts(view: &View) -> [(f64, Standing); 2] {
    let total: f64 = view.regions.values().map(|place| place.weight).sum();
    ["eu", "us"].map(|region| {
        let place = &view.regions[&name(region)];
        (place.weight / total, place.standing)
    })
}

use Standing::{Out, Steady, Unsteady};

#[test]
fn without_a_plan_the_regions_own_weights_hold() {
    let view = View::of(&two(), None, &down(&[]));
    assert_eq!((view.serial, parts(&view)), (5, [(0.8, Steady), (0.2, Steady)]));
    let eu = &view.regions[&name("eu")];
    assert_eq!(
        (eu.v4.clone(), eu.v6.clone(), eu.port),
        (addresses(&["192.0.2.1"]), addresses(&["2001:db8::1"]), 8_443)
    );
    let seen = View::of(&two(), None, &down(&["eu"]));
    assert_eq!(parts(&seen), [(0.8, Out), (0.2, Steady)], "answers leave out what is out");
}

#[test]
fn a_plan_holds_together_with_what_this_node_sees() {
    let steady = published([1.0, 1.0], [Steady, Steady]);
    let view = View::of(&two(), Some(&steady), &down(&[]));
    assert_eq!((view.serial, parts(&view)), (41, [(0.8, Steady), (0.2, Steady)]));
    let seen = View::of(&two(), Some(&steady), &down(&["eu"]));
    assert_eq!(parts(&seen), [(0.0, Out), (1.0, Steady)], "the plan, made again without it");
    let planned_out = published([0.0, 1.0], [Out, Unsteady]);
    let view = View::of(&two(), Some(&planned_out), &down(&[]));
    assert_eq!(parts(&view), [(0.0, Out), (1.0, Unsteady)], "seeing it up does not bring it back");
    let both = View::of(&two(), Some(&planned_out), &down(&["us"]));
    assert_eq!(both.regions[&name("us")].standing, Out);
}

#[test]
fn who_sees_all_down_has_seen_nothing() {
    let steady = published([1.0, 1.0], [Steady, Steady]);
    let all = down(&["eu", "us"]);
    assert_eq!(View::of(&two(), Some(&steady), &all), View::of(&two(), Some(&steady), &down(&[])));
    assert_eq!(View::of(&two(), None, &all), View::of(&two(), None, &down(&[])));
}

#[test]
fn a_region_that_the_plan_does_not_know_waits_for_the_next_one() {
    let three = snapshot(&[
        ("eu", 80.0, &["192.0.2.1:443"]),
        ("us", 20.0, &["198.51.100.1:443"]),
        ("ap", 50.0, &["203.0.113.1:443"]),
    ]);
    let view = View::of(&three, Some(&published([1.0, 1.0], [Steady, Steady])), &down(&[]));
    assert_eq!((view.regions[&name("ap")].weight, view.regions[&name("ap")].standing), (0.0, Steady));
}

#[test]
fn t66_a_view_without_addresses_keeps_the_last_ones() {
    let last = view();
    let emptied = |mut view: View| {
        view.regions.values_mut().for_each(|place| (place.v4, place.v6) = (Vec::new(), Vec::new()));
        View { serial: 9, ..view }
    };
    let (kept, is_kept) = emptied(last.clone()).keeping(&last);
    assert!(is_kept);
    assert_eq!(kept, View { serial: 9, ..last.clone() });
    // Health goes on being followed.
    let mut unhealthy = emptied(last.clone());
    unhealthy.regions.get_mut(&name("eu-west")).unwrap().standing = Out;
    assert_eq!(unhealthy.keeping(&last).0.regions[&name("eu-west")].standing, Out);
    // Regions that nobody knows.
    let strangers = View { serial: 10, regions: [(name("mars"), place(1.0, Steady, &[]))].into() };
    let (kept, is_kept) = strangers.keeping(&last);
    assert!(is_kept && kept.regions[&name("us-east")].v4 == last.regions[&name("us-east")].v4);
}

#[test]
fn t66_ipv4_is_not_lost_and_ipv6_may_be() {
    let last = view();
    let mut only_v6 = last.clone();
    only_v6.regions.values_mut().for_each(|place| place.v4.clear());
    let (kept, is_kept) = only_v6.keeping(&last);
    assert!(is_kept && kept.regions == last.regions);
    let mut only_v4 = last.clone();
    only_v4.regions.values_mut().for_each(|place| place.v6.clear());
    assert_eq!(only_v4.clone().keeping(&last), (only_v4, false));
}

#[test]
fn names_of_regions_are_their_own_and_the_first_has_a_name_that_two_want() {
    let zone = Zone::of(zone());
    let regions =
        ["EU", "eu", "ap.south", "under_score"].map(|region| (name(region), place(1.0, Steady, &["192.0.2.1"])));
    let served = Served::of(View { serial: 1, regions: regions.into() }, &zone);
    let find = |text: &str| served.region(&zone.name_of(text).unwrap());
    assert_eq!(find("eu"), Some(Some(&name("EU"))));
    assert_eq!(find("ap.south"), Some(Some(&name("ap.south"))));
    assert_eq!(find("south"), Some(None));
    assert_eq!(find("under"), None);
}

proptest! {
    /// Whatever follows whatever: once there were addresses, there are some, and of IPv4 if there were.
    #[test]
    fn t66_no_sequence_of_views_takes_the_last_address(
        views in proptest::collection::vec(proptest::collection::vec((0_usize..3, 0_usize..3), 0..3), 1..8),
    ) {
        let regions = ["eu", "us", "ap"];
        let mut last: Option<View> = None;
        for counts in views {
            let place = |(index, (v4, v6)): (usize, (usize, usize))| {
                let v4 = (0..v4).map(|host| IpAddr::from([10, index as u8, 0, host as u8])).collect();
                let v6 = (0..v6).map(|host| IpAddr::from([0x2001, 0xdb8, index as u16, 0, 0, 0, 0, host as u16])).collect();
                (name(regions[index]), Place { weight: 1.0, standing: Steady, v4, v6, port: 443 })
            };
            let next = View { serial: 1, regions: counts.into_iter().enumerate().map(place).collect() };
            let next = match &last {
                Some(last) => next.keeping(last).0,
                None => next,
            };
            if let Some(last) = &last {
                let v4 = |view: &View| view.regions.values().any(|place| !place.v4.is_empty());
                prop_assert!(!next.is_empty() || last.is_empty());
                prop_assert!(v4(&next) || !v4(last));
            }
            last = Some(next);
        }
    }

    #[test]
    fn own_probes_take_out_what_they_see_and_never_all(seen in proptest::collection::vec(any::<bool>(), 2), planned: bool) {
        let names: Vec<&str> = ["eu", "us"].into_iter().zip(&seen).filter(|(_, down)| **down).map(|(name, _)| name).collect();
        let plan = published([1.0, 1.0], [Steady, Steady]);
        let view = View::of(&two(), planned.then_some(&plan), &down(&names));
        let out = view.regions.values().filter(|place| place.standing == Out).count();
        prop_assert_eq!(out, if names.len() == 2 { 0 } else { names.len() });
    }
}
