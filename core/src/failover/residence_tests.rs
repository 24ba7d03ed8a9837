use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn peer(region: &str) -> Peer {
    let round_trip = Some(MS * 5);
    Peer { region: name(region), serves: true, healthy: true, headroom: Some(100.0), cost: 1.0, round_trip }
}

fn ask<'a>(
    may_leave: &MayLeave,
    peers: &'a [Peer],
    change: impl Fn(&mut Stranded<'_>),
) -> Result<Vec<&'a str>, NoPeer> {
    let home = name("home");
    let (left, expected) = (MS * 100, MS * 10);
    let mut request = Stranded { region: &home, forwarded: false, may_leave, left, expected, key: 7 };
    change(&mut request);
    peers_for(&request, peers).map(|regions| regions.into_iter().map(Name::as_str).collect())
}

fn anywhere(peers: &[Peer]) -> Result<Vec<&str>, NoPeer> {
    ask(&MayLeave::Anywhere, peers, |_| {})
}

#[test]
fn a_request_goes_only_where_its_tenant_lets_it() {
    let peers = [peer("eu"), peer("us"), peer("home")];
    let to = |regions: &[&str]| MayLeave::To(regions.iter().map(|region| name(region)).collect());
    assert_eq!(MayLeave::default(), MayLeave::No);
    for (policy, expected) in [
        (MayLeave::No, Err(NoPeer::Residence)),
        (to(&[]), Err(NoPeer::Residence)),
        (to(&["mars", "home"]), Err(NoPeer::Residence)),
        (to(&["us"]), Ok(vec!["us"])),
    ] {
        assert_eq!(ask(&policy, &peers, |_| {}), expected, "{policy:?}");
    }
    let mut all = anywhere(&peers).unwrap();
    all.sort_unstable();
    assert_eq!(all, ["eu", "us"], "never to itself");
}

#[test]
fn one_hop_is_the_most() {
    let peers = [peer("eu")];
    assert_eq!(ask(&MayLeave::Anywhere, &peers, |request| request.forwarded = true), Err(NoPeer::Forwarded));
}

#[test]
fn the_reason_is_how_far_it_got() {
    let full = Peer { headroom: Some(0.0), ..peer("full") };
    let overfull = Peer { headroom: Some(-5.0), ..peer("overfull") };
    let sick = Peer { healthy: false, ..peer("sick") };
    let without = Peer { serves: false, ..peer("without") };
    let far = Peer { round_trip: Some(MS * 91), ..peer("far") };
    for (peers, reason) in [
        (vec![], NoPeer::Alone),
        (vec![peer("home")], NoPeer::Alone),
        (vec![without.clone()], NoPeer::NotServed),
        (vec![Peer { serves: false, ..sick.clone() }], NoPeer::NotServed),
        (vec![without.clone(), sick.clone()], NoPeer::Unhealthy),
        (vec![full.clone(), sick.clone()], NoPeer::Full),
        (vec![overfull], NoPeer::Full),
        (vec![full, far, sick, without], NoPeer::Deadline),
    ] {
        assert_eq!(anywhere(&peers), Err(reason), "{peers:?}");
        assert!(!reason.as_str().is_empty());
    }
}

#[test]
fn t53_a_request_that_could_not_be_answered_in_time_stays() {
    let at = |round_trip| [Peer { round_trip, ..peer("eu") }];
    for (round_trip, left, expected, fits) in [
        (Some(MS * 90), MS * 100, MS * 10, true),
        (Some(MS * 91), MS * 100, MS * 10, false),
        (None, MS * 10, MS * 10, true),
        (None, MS * 9, MS * 10, false),
        (Some(MS), MS, Duration::ZERO, false),
        (Some(Duration::MAX), Duration::MAX, Duration::MAX, true),
    ] {
        let peers = at(round_trip);
        let found = ask(&MayLeave::Anywhere, &peers, |request| {
            (request.left, request.expected) = (left, expected);
        });
        assert_eq!(found.is_ok(), fits, "{round_trip:?} {left:?} {expected:?}");
    }
}

#[test]
fn cheaper_goes_before_nearer_and_what_is_not_known_comes_last() {
    let far = Peer { round_trip: Some(MS * 70), ..peer("far") };
    let dear = Peer { cost: 2.0, ..peer("dear") };
    let priceless = Peer { cost: f64::NAN, ..peer("priceless") };
    let nowhere = Peer { round_trip: None, ..peer("nowhere") };
    let silent = Peer { headroom: None, cost: 0.0, ..peer("silent") };
    let odd = Peer { headroom: Some(f64::NAN), cost: 0.5, ..peer("odd") };
    let peers = [odd, silent, priceless, dear, nowhere, far, peer("near")];
    let order = ["near", "far", "nowhere", "dear", "priceless", "silent", "odd"];
    assert_eq!(anywhere(&peers).unwrap(), order);
    let mut turned = peers;
    turned.reverse();
    assert_eq!(anywhere(&turned).unwrap(), order, "whatever the order of the list");
}

#[test]
fn equally_good_peers_share_by_headroom() {
    let peers = [
        Peer { headroom: Some(300.0), round_trip: Some(MS * 19), ..peer("eu") },
        Peer { headroom: Some(100.0), round_trip: Some(MS), ..peer("us") },
    ];
    let first = |key| ask(&MayLeave::Anywhere, &peers, |request| request.key = key).unwrap()[0];
    let key = |index: u64| index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let of_eu = (0..4_000).filter(|index| first(key(*index)) == "eu").count();
    assert!((2_900..3_100).contains(&of_eu), "{of_eu}");
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let region = prop_oneof![Just("home"), Just("a"), Just("b"), Just("c"), Just("d")];
    let number = || prop_oneof![Just(0.0), Just(1.0), prop::num::f64::ANY];
    let round_trip = proptest::option::of((0_u32..200).prop_map(|time| MS * time));
    (region, any::<bool>(), any::<bool>(), proptest::option::of(number()), number(), round_trip).prop_map(
        |(region, serves, healthy, headroom, cost, round_trip)| Peer {
            region: name(region),
            serves,
            healthy,
            headroom,
            cost,
            round_trip,
        },
    )
}

proptest! {
    #[test]
    fn who_is_offered_may_be_sent_to_and_nobody_else_could_be(
        peers in proptest::collection::vec(any_peer(), 0..6),
        allowed in proptest::option::of(proptest::collection::btree_set("[a-d]", 0..3)),
        left in 0_u32..200,
        key: u64,
    ) {
        let policy = allowed.map_or(MayLeave::Anywhere, |regions| {
            MayLeave::To(regions.iter().map(|region| name(region)).collect())
        });
        let found = ask(&policy, &peers, |request| (request.left, request.key) = (MS * left, key));
        let fits = |peer: &&Peer| {
            let in_time = MS * left >= peer.round_trip.unwrap_or_default() + MS * 10;
            let room = peer.headroom.is_none_or(|headroom| !headroom.is_finite() || headroom > 0.0);
            policy.permits(&peer.region) && peer.region.as_str() != "home" && peer.serves && peer.healthy && room && in_time
        };
        let mut expected: Vec<&str> = peers.iter().filter(fits).map(|peer| peer.region.as_str()).collect();
        match found {
            Err(_) => prop_assert!(expected.is_empty()),
            Ok(mut found) => {
                expected.sort_unstable();
                found.sort_unstable();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
