use proptest::collection::btree_set;
use proptest::prelude::*;

use super::*;

const DAY: Duration = Duration::from_secs(86_400);
const GATEWAY: &str = "spiffe://spillway.test/region/eu/gateway/gw-0";
const OTHER: &str = "spiffe://spillway.test/region/eu/gateway/gw-1";

fn names(dns: &[&str], addresses: &[&str]) -> Names {
    Names {
        dns: dns.iter().map(|name| DnsName::host(name).unwrap()).collect(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
    }
}

fn grant() -> Grant {
    Grant { id: SpiffeId::parse(GATEWAY).unwrap(), names: names(&["edge.example"], &["192.0.2.1"]) }
}

#[test]
fn t52_a_request_for_more_than_was_granted_is_denied() {
    let plain = Asked { uris: vec![GATEWAY.into()], ..Asked::default() };
    for (asked, denied) in [
        (Asked { uris: vec![OTHER.into()], ..plain.clone() }, Denied::OtherIdentity),
        (Asked { uris: vec![GATEWAY.into(), OTHER.into()], ..plain.clone() }, Denied::OtherIdentity),
        (Asked { uris: vec![GATEWAY.into(), GATEWAY.into()], ..plain.clone() }, Denied::OtherIdentity),
        (Asked { uris: vec![format!("{GATEWAY}/")], ..plain.clone() }, Denied::OtherIdentity),
        (Asked { may_sign: true, ..plain.clone() }, Denied::MaySign),
        (Asked { other_use: true, ..plain.clone() }, Denied::OtherUse),
        (Asked { other_extension: true, ..plain.clone() }, Denied::OtherExtension),
        (Asked { other_names: true, ..plain.clone() }, Denied::OtherNames),
        (Asked { names: Some(names(&["edge.example", "bank.example"], &[])), ..plain.clone() }, Denied::OtherNames),
        (Asked { names: Some(names(&[], &["192.0.2.2"])), ..plain.clone() }, Denied::OtherNames),
        (Asked { life: Some(DAY + Duration::from_secs(1)), ..plain.clone() }, Denied::Life),
        (Asked { life: Some(Duration::MAX), ..plain.clone() }, Denied::Life),
        (Asked { life: Some(Duration::ZERO), ..plain.clone() }, Denied::Life),
    ] {
        assert_eq!(judge(&asked, &grant(), DAY), Err(denied), "{asked:?}");
    }
}

#[test]
fn a_request_without_names_gets_all_that_are_granted_and_one_with_some_gets_those() {
    let all = judge(&Asked::default(), &grant(), DAY).unwrap();
    assert_eq!(all, Approved { id: grant().id, names: grant().names, life: DAY });
    let some = names(&["EDGE.example"], &[]);
    let asked = Asked { names: Some(some.clone()), life: Some(DAY / 2), ..Asked::default() };
    assert_eq!(judge(&asked, &grant(), DAY), Ok(Approved { id: grant().id, names: some, life: DAY / 2 }));
}

proptest! {
    #[test]
    fn no_leaf_says_more_than_was_granted(
        uris in proptest::collection::vec(prop_oneof![Just(GATEWAY.to_owned()), Just(OTHER.to_owned())], 0..3),
        wanted in proptest::option::of((btree_set("[a-c]\\.test", 0..4), btree_set(0u8..6, 0..4))),
        granted in (btree_set("[a-c]\\.test", 0..4), btree_set(0u8..6, 0..4)),
        flags in any::<[bool; 4]>(),
        life in proptest::option::of(0u64..200_000),
    ) {
        let set = |(dns, addresses): (BTreeSet<String>, BTreeSet<u8>)| Names {
            dns: dns.iter().map(|name| DnsName::host(name).unwrap()).collect(),
            addresses: addresses.iter().map(|last| IpAddr::from([192, 0, 2, *last])).collect(),
        };
        let grant = Grant { id: SpiffeId::parse(GATEWAY).unwrap(), names: set(granted) };
        let [other_names, may_sign, other_use, other_extension] = flags;
        let life = life.map(Duration::from_secs);
        let asked = Asked { uris, names: wanted.map(set), other_names, may_sign, other_use, other_extension, life };
        if let Ok(approved) = judge(&asked, &grant, DAY) {
            prop_assert_eq!(&approved.id, &grant.id);
            prop_assert!(approved.names.within(&grant.names));
            prop_assert!(approved.life <= DAY && !approved.life.is_zero());
            prop_assert!(flags == [false; 4] && asked.uris.iter().all(|uri| uri == GATEWAY));
        }
    }
}
