use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// `region=weight` and `pool@region`, with a `!` behind a pool without pods.
fn contents(text: &str) -> Contents {
    let mut contents = Contents::default();
    for word in text.split_whitespace() {
        if let Some((region, weight)) = word.split_once('=') {
            contents.regions.insert(name(region), weight.parse().unwrap());
        } else if let Some((pool, region)) = word.split_once('@') {
            let has_pods = !region.ends_with('!');
            let region = name(region.trim_end_matches('!'));
            contents.pools.insert(name(pool), PoolContents { region, has_pods });
        }
    }
    contents
}

fn confirmed(regions: &[&str], pools: &[&str]) -> Confirmed {
    let set = |names: &[&str]| names.iter().map(|text| name(text)).collect();
    Confirmed { regions: set(regions), pools: set(pools) }
}

/// Why version 8 with these contents is not taken in place of version 7 with those.
fn reasons(now: &str, then: &str, confirmed: &Confirmed) -> Vec<String> {
    let (now, then) = (contents(now), contents(then));
    let offer = Offer { version: 8, epoch: 3, size: ByteSize(100), resync: false, contents: &then, confirmed };
    let held = Held { serving: Some((7, &now)), epoch: 3 };
    let faults = check(&offer, &held, MOST_BYTES).err().unwrap_or_default();
    faults.iter().map(ToString::to_string).collect()
}

const WORLD: &str = "eu=1 us=1 a@eu b@eu c@us";

#[test]
fn an_ordinary_change_is_taken() {
    for then in [
        WORLD,
        "eu=0 us=1 a@eu b@eu c@us",
        "eu=1 us=1 ap=1 a@eu c@us d@us",
        "eu=1 us=1 b@eu c@us",
        "eu=1 us=1 new@eu c@us",
        "eu=1 us=1 a@eu b@eu c@us d@us!",
    ] {
        assert_eq!(reasons(WORLD, then, &Confirmed::default()), [""; 0], "{then}");
    }
    assert_eq!(reasons("eu=1 a@eu!", "eu=1 a@eu!", &Confirmed::default()), [""; 0], "it had none before");
}

#[test]
fn t62_what_would_leave_nothing_is_refused_unless_that_very_thing_was_confirmed() {
    let pool = |pool| format!("the pool '{pool}' would have no pods, and has some now; confirm it if it is meant");
    let region =
        |region| format!("the region '{region}' would have no pods, and has some now; confirm it if it is meant");
    let none = Confirmed::default();
    for (then, confirmed, expected) in [
        ("eu=1 us=1 a@eu! b@eu c@us", &none, vec![pool("a")]),
        ("eu=1 us=1 a@eu! b@eu c@us", &confirmed(&[], &["a"]), vec![]),
        ("eu=1 us=1 a@eu! b@eu c@us", &confirmed(&["eu"], &["b"]), vec![pool("a")]),
        ("eu=1 us=1 a@eu! b@eu! c@us", &none, vec![pool("a"), pool("b"), region("eu")]),
        ("eu=1 us=1 a@eu! b@eu! c@us", &confirmed(&["eu"], &["a", "b"]), vec![]),
        ("eu=1 us=1 c@us", &none, vec![region("eu")]),
        ("us=1 c@us", &none, vec![region("eu")]),
        ("us=1 c@us", &confirmed(&["eu"], &[]), vec![]),
        ("eu=1 us=1 a@us b@us c@us", &none, vec![region("eu")]),
        ("eu=1 us=1", &none, vec![region("eu"), region("us")]),
        ("", &none, vec!["there is no region; expected at least one".into(), region("eu"), region("us")]),
        ("", &confirmed(&["eu", "us"], &[]), vec!["there is no region; expected at least one".into()]),
    ] {
        assert_eq!(reasons(WORLD, then, confirmed), expected, "{then}");
    }
}

#[test]
fn t62_weights_must_be_finite_and_one_above_0() {
    let none = Confirmed::default();
    let pods = "a@eu b@eu c@us";
    for (weights, expected) in [
        ("eu=0 us=0", vec!["no region has a weight above 0"]),
        ("eu=NaN us=1", vec!["the weight of the region 'eu' is NaN; expected a finite number, 0 or more"]),
        ("eu=inf us=1", vec!["the weight of the region 'eu' is inf; expected a finite number, 0 or more"]),
        (
            "eu=-1 us=0",
            vec![
                "the weight of the region 'eu' is -1; expected a finite number, 0 or more",
                "no region has a weight above 0",
            ],
        ),
    ] {
        assert_eq!(reasons(WORLD, &format!("{weights} {pods}"), &none), expected, "{weights}");
    }
}

#[test]
fn t60_t61_versions_and_epochs_never_go_back() {
    let world = contents(WORLD);
    let none = Confirmed::default();
    let refused = |version, epoch, resync| {
        let offer = Offer { version, epoch, size: ByteSize(1), resync, contents: &world, confirmed: &none };
        check(&offer, &Held { serving: Some((7, &world)), epoch: 3 }, MOST_BYTES).err().unwrap_or_default()
    };
    let older = |offered| Unsafe::Older { offered, serving: 7 };
    let stale = |offered| Unsafe::StaleLeader { offered, seen: 3 };
    for (version, epoch, resync, expected) in [
        (8, 3, false, vec![]),
        (8, 9, false, vec![]),
        (7, 3, false, vec![older(7)]),
        (7, 3, true, vec![]),
        (6, 3, true, vec![older(6)]),
        (0, 3, false, vec![older(0)]),
        (8, 2, false, vec![stale(2)]),
        (7, 2, true, vec![stale(2)]),
        (6, 0, false, vec![stale(0), older(6)]),
    ] {
        assert_eq!(refused(version, epoch, resync), expected, "{version} {epoch} {resync}");
    }
}

#[test]
fn a_node_that_has_nothing_takes_any_version_but_no_empty_one() {
    let (world, empty, none) = (contents("eu=1"), Contents::default(), Confirmed::default());
    let offer = Offer { version: 0, epoch: 0, size: ByteSize(1), resync: false, contents: &world, confirmed: &none };
    let held = Held { serving: None, epoch: 0 };
    assert_eq!(check(&offer, &held, MOST_BYTES), Ok(()));
    let nothing = Offer { contents: &empty, ..offer };
    assert_eq!(check(&nothing, &held, MOST_BYTES), Err(vec![Unsafe::Weights(UnfitWeights::NoRegion)]));
}

#[test]
fn size_is_bounded_and_so_are_reasons() {
    let (world, none) = (contents(WORLD), Confirmed::default());
    let held = Held { serving: None, epoch: 0 };
    let offer = |size| Offer { version: 1, epoch: 0, size, resync: false, contents: &world, confirmed: &none };
    assert_eq!(check(&offer(MOST_BYTES), &held, MOST_BYTES), Ok(()));
    let size = ByteSize(MOST_BYTES.0 + 1);
    assert_eq!(check(&offer(size), &held, MOST_BYTES), Err(vec![Unsafe::TooLarge { size, most: MOST_BYTES }]));
    let regions = (0..100).map(|index| format!("r{index}=NaN ")).collect::<String>();
    let found = reasons("", &regions, &none);
    assert_eq!((found.len(), found.last().unwrap().as_str()), (33, "and 69 more"));
}

#[test]
fn contents_are_read_from_a_snapshot() {
    let yaml = "
apiVersion: spillway/v1
kind: Region
metadata: { name: eu }
spec: { trustDomain: td }
---
apiVersion: spillway/v1
kind: Pool
metadata: { name: listed }
spec: { region: eu, pods: [{ name: one, address: \"10.0.0.1:9443\" }] }
---
apiVersion: spillway/v1
kind: Pool
metadata: { name: asked }
spec: { region: eu, dns: { name: scorers.example.net, port: 9443 } }
";
    let resources = crate::resource::parse(yaml).unwrap();
    let snapshot = Snapshot::compile(1, &resources).unwrap();
    assert_eq!(Contents::of(&snapshot, |_| 2.0), contents("eu=2 listed@eu asked@eu"));
}

proptest! {
    /// A node that is offered anything, again and again.
    #[test]
    fn a_node_never_ends_without_regions_weights_or_what_it_served(
        offers in proptest::collection::vec(
            (
                0_u64..12,
                0_u64..4,
                proptest::collection::btree_map("[ab]", prop_oneof![Just(0.0), Just(1.0), prop::num::f64::ANY], 0..3),
                proptest::collection::btree_map("[p-s]", ("[ab]", any::<bool>()), 0..4),
                proptest::option::of("[ab]"),
            ),
            1..20,
        ),
    ) {
        let mut serving: Option<(u64, Contents)> = None;
        let mut newest = 0;
        for (version, epoch, regions, pools, region) in offers {
            let contents = Contents {
                regions: regions.iter().map(|(region, weight)| (name(region), *weight)).collect(),
                pools: pools
                    .iter()
                    .map(|(pool, (region, has_pods))| (name(pool), PoolContents { region: name(region), has_pods: *has_pods }))
                    .collect(),
            };
            let confirmed = Confirmed { regions: region.iter().map(|region| name(region)).collect(), ..Confirmed::default() };
            let offer = Offer { version, epoch, size: ByteSize(1), resync: false, contents: &contents, confirmed: &confirmed };
            let held = Held { serving: serving.as_ref().map(|(version, contents)| (*version, contents)), epoch: newest };
            if check(&offer, &held, MOST_BYTES).is_err() {
                continue;
            }
            prop_assert!(contents.regions.values().all(|weight| weight.is_finite() && *weight >= 0.0));
            prop_assert!(contents.regions.values().any(|weight| *weight > 0.0));
            prop_assert!(epoch >= newest);
            if let Some((before, served)) = &serving {
                prop_assert!(version > *before);
                for region in served.staffed_regions() {
                    prop_assert!(contents.staffed_regions().contains(region) || confirmed.regions.contains(region));
                }
            }
            newest = epoch;
            serving = Some((version, contents));
        }
    }
}
