use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

const SUBNETS: u32 = 10_000;

/// Subnets in a row, as providers hold them.
fn subnets() -> impl Iterator<Item = Subnet> {
    (0..SUBNETS).map(|index| Subnet::of(Ipv4Addr::from(0x0b00_0000 + (index << 8) + 7).into()))
}

fn names(count: usize) -> Vec<Name> {
    let names = ["eu-west", "us-east", "ap-south", "sa-east", "af-south", "me-north"];
    names.into_iter().take(count).map(|name| Name::parse(name).unwrap()).collect()
}

/// The region's gateways.
fn gateways(region: usize, count: usize) -> Vec<IpAddr> {
    (0..count).map(|gateway| Ipv4Addr::new(10, region as u8, 0, gateway as u8 + 1).into()).collect()
}

struct World {
    names: Vec<Name>,
    addresses: Vec<Vec<IpAddr>>,
}

impl World {
    fn of(regions: usize, gateways_each: usize) -> Self {
        let addresses = (0..regions).map(|region| gateways(region, gateways_each)).collect();
        Self { names: names(regions), addresses }
    }

    fn sites(&self, sites: impl IntoIterator<Item = (f64, Standing)>) -> BTreeMap<&Name, Site<'_>> {
        let known = self.names.iter().zip(&self.addresses);
        known
            .zip(sites)
            .map(|((name, addresses), (weight, standing))| (name, Site { weight, standing, addresses }))
            .collect()
    }

    fn steady(&self, weights: impl IntoIterator<Item = f64>) -> BTreeMap<&Name, Site<'_>> {
        self.sites(weights.into_iter().map(|weight| (weight, Standing::Steady)))
    }
}

fn region<'a>(sites: &BTreeMap<&'a Name, Site<'_>>, subnet: &Subnet) -> &'a Name {
    answer(sites, subnet, &AnswerSettings::default()).unwrap().region
}

fn share(sites: &BTreeMap<&Name, Site<'_>>, name: &Name) -> f64 {
    subnets().filter(|subnet| region(sites, subnet) == name).count() as f64 / f64::from(SUBNETS)
}

fn moved(before: &BTreeMap<&Name, Site<'_>>, after: &BTreeMap<&Name, Site<'_>>) -> f64 {
    subnets().filter(|subnet| region(before, subnet) != region(after, subnet)).count() as f64 / f64::from(SUBNETS)
}

#[test]
fn show_6_80_to_20_over_10_000_subnets_gives_80_within_2_percent() {
    let world = World::of(2, 2);
    let found = share(&world.steady([0.8, 0.2]), &world.names[0]);
    println!("80/20 over {SUBNETS} subnets: {:.2} %", found * 100.0);
    assert!((0.78..=0.82).contains(&found), "{found}");
}

#[test]
fn show_6_80_to_70_moves_at_most_12_percent_and_all_one_way() {
    let world = World::of(2, 2);
    let (before, after) = (world.steady([0.8, 0.2]), world.steady([0.7, 0.3]));
    let found = moved(&before, &after);
    println!("80 to 70 moves {:.2} % of {SUBNETS} subnets", found * 100.0);
    assert!((0.08..=0.12).contains(&found), "{found}");
    let mut movers = subnets().filter(|subnet| region(&before, subnet) != region(&after, subnet));
    assert!(movers.all(|subnet| *region(&after, &subnet) == world.names[1]));
}

#[test]
fn shares_hold_for_ipv6_and_for_three_regions() {
    let world = World::of(3, 1);
    let sites = world.steady([0.5, 0.3, 0.2]);
    let mut counts = [0.0; 3];
    for index in 0..u128::from(SUBNETS) {
        let subnet = Subnet::of(Ipv6Addr::from((0x2001_0db8_u128 << 96) + (index << 72) + 1).into());
        let place = world.names.iter().position(|name| name == region(&sites, &subnet)).unwrap();
        counts[place] += 1.0 / f64::from(SUBNETS);
    }
    for (count, weight) in counts.into_iter().zip([0.5, 0.3, 0.2]) {
        assert!((count - weight).abs() < 0.02, "{counts:?}");
    }
}

#[test]
fn a_lost_regions_clients_alone_move_and_come_back() {
    let world = World::of(3, 1);
    let (before, after) = (world.steady([0.4, 0.4, 0.2]), world.steady([0.5, 0.5, 0.0]));
    for subnet in subnets() {
        let (from, to) = (region(&before, &subnet), region(&after, &subnet));
        assert!(from == to || *from == world.names[2]);
    }
    assert!((moved(&before, &after) - 0.2).abs() < 0.02);
}

#[test]
fn an_answer_has_addresses_of_one_region_in_the_subnets_own_order() {
    let world = World::of(2, 20);
    let sites = world.steady([0.5, 0.5]);
    let mut firsts = BTreeSet::new();
    for subnet in subnets().take(1_000) {
        let given = answer(&sites, &subnet, &AnswerSettings::default()).unwrap();
        assert_eq!(given, answer(&sites, &subnet, &AnswerSettings::default()).unwrap(), "stable");
        let of_region = world.names.iter().position(|name| name == given.region).unwrap();
        let distinct: BTreeSet<_> = given.addresses.iter().collect();
        assert_eq!((given.addresses.len(), distinct.len()), (8, 8));
        assert!(given.addresses.iter().all(|address| world.addresses[of_region].contains(address)));
        firsts.insert(given.addresses[0]);
    }
    assert_eq!(firsts.len(), 40, "each gateway is somebody's first");
}

#[test]
fn a_gateway_that_goes_moves_its_own_clients_alone() {
    let all = gateways(0, 5);
    for key in 0..500 {
        let (before, after) = (ordered(&all, key), ordered(&all[1..], key));
        let without: Vec<IpAddr> = before.into_iter().filter(|address| *address != all[0]).collect();
        assert_eq!(without, after);
    }
}

#[test]
fn the_bound_on_addresses_holds_and_is_never_none() {
    let world = World::of(2, 3);
    for (addresses, expected) in [(0, 1), (1, 1), (2, 2), (3, 3), (8, 3), (usize::MAX, 3)] {
        let settings = AnswerSettings { addresses, ..AnswerSettings::default() };
        let subnet = subnets().next().unwrap();
        let given = answer(&world.steady([1.0, 1.0]), &subnet, &settings).unwrap();
        assert_eq!(given.addresses.len(), expected);
        let blind = world.sites([(1.0, Standing::Out), (1.0, Standing::Out)]);
        let given = answer(&blind, &subnet, &settings).unwrap();
        assert_eq!(given.addresses.len(), addresses.clamp(1, 6));
    }
}

#[test]
fn what_is_unsteady_is_asked_for_again_soon() {
    use Standing::{Out, Steady, Unsteady};
    let world = World::of(2, 1);
    for (standings, seconds) in
        [([Steady, Steady], 30), ([Steady, Out], 30), ([Unsteady, Steady], 5), ([Unsteady, Out], 5), ([Out, Out], 5)]
    {
        let sites = world.sites([1.0, 0.0].into_iter().zip(standings));
        let given = answer(&sites, &subnets().next().unwrap(), &AnswerSettings::default()).unwrap();
        assert_eq!((given.ttl, given.region), (Duration::from_secs(seconds), &world.names[0]), "{standings:?}");
    }
}

#[test]
fn t66_while_any_region_has_an_address_there_is_an_answer() {
    use Standing::{Out, Steady, Unsteady};
    let world = World::of(3, 2);
    // Which regions are answered, over all subnets.
    for (sites, expected) in [
        ([(0.5, Steady), (0.5, Unsteady), (0.0, Steady)], [true, true, false]),
        ([(0.5, Out), (0.3, Steady), (0.2, Out)], [false, true, false]),
        // Healthy without weight goes before weight without health.
        ([(1.0, Out), (0.0, Steady), (0.0, Steady)], [false, true, true]),
        ([(0.0, Steady), (f64::NAN, Unsteady), (-1.0, Out)], [true, true, false]),
        ([(0.6, Out), (0.4, Out), (0.0, Out)], [true, true, false]),
        ([(0.0, Out), (0.0, Out), (f64::INFINITY, Out)], [true, true, true]),
    ] {
        let sites = world.sites(sites);
        let mut answered = [false; 3];
        for subnet in subnets().take(200) {
            for address in answer(&sites, &subnet, &AnswerSettings::default()).unwrap().addresses {
                answered[world.addresses.iter().position(|of| of.contains(&address)).unwrap()] = true;
            }
        }
        assert_eq!(answered, expected, "{sites:?}");
    }
}

#[test]
fn with_all_regions_out_a_client_is_given_some_of_each() {
    let world = World::of(3, 4);
    let sites = world.sites([(0.5, Standing::Out), (0.3, Standing::Out), (0.2, Standing::Out)]);
    for subnet in subnets().take(100) {
        let given = answer(&sites, &subnet, &AnswerSettings::default()).unwrap();
        let regions: Vec<u8> = given
            .addresses
            .iter()
            .map(|address| world.addresses.iter().position(|of| of.contains(address)).unwrap() as u8)
            .collect();
        assert_eq!(world.names[usize::from(regions[0])], *given.region);
        assert_eq!(regions.len(), 8);
        assert!(regions[..3].iter().collect::<BTreeSet<_>>().len() == 3, "{regions:?}");
        assert_eq!(regions[..3], regions[3..6], "in turn");
    }
}

#[test]
fn a_region_without_an_address_of_the_family_is_not_answered() {
    let mut world = World::of(2, 2);
    world.addresses[0].clear();
    assert!(subnets().take(50).all(|subnet| *region(&world.steady([0.9, 0.1]), &subnet) == world.names[1]));
    assert!(subnets().take(50).all(|subnet| *region(&world.steady([1.0, 0.0]), &subnet) == world.names[1]));
    world.addresses[1].clear();
    let subnet = subnets().next().unwrap();
    assert_eq!(answer(&world.steady([0.9, 0.1]), &subnet, &AnswerSettings::default()), None);
    assert_eq!(answer(&BTreeMap::new(), &subnet, &AnswerSettings::default()), None);
}

#[test]
fn a_query_is_decided_by_the_client_subnet_option_or_else_by_its_sender() {
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let resolver = ip("192.0.2.55");
    for (ecs, address, length, scope) in [
        (None, "192.0.2.0", 24, 0),
        (Some(("198.51.100.77", 32)), "198.51.100.0", 24, 24),
        (Some(("198.51.100.77", 24)), "198.51.100.0", 24, 24),
        (Some(("198.51.100.77", 20)), "198.51.96.0", 20, 20),
        (Some(("198.51.100.77", 1)), "128.0.0.0", 1, 1),
        (Some(("198.51.100.77", 0)), "192.0.2.0", 24, 0),
        (Some(("198.51.100.77", 33)), "192.0.2.0", 24, 0),
        (Some(("2001:db8:1:2ff::9", 64)), "2001:db8:1:200::", 56, 56),
        (Some(("2001:db8:1:2ff::9", 128)), "2001:db8:1:200::", 56, 56),
        (Some(("2001:db8:1:2ff::9", 32)), "2001:db8::", 32, 32),
        (Some(("2001:db8:1:2ff::9", 129)), "192.0.2.0", 24, 0),
    ] {
        let ecs = ecs.map(|(text, source)| (ip(text), source));
        let expected = Subnet { address: ip(address), length };
        assert_eq!(Subnet::of_query(ecs, resolver), (expected, scope), "{ecs:?}");
        assert_eq!(expected.length(), length);
    }
    assert_eq!(Subnet::of(ip("::ffff:192.0.2.55")), Subnet::of(resolver), "a socket of both families");
    assert_eq!(Subnet::of(ip("192.0.2.1")), Subnet::of(ip("192.0.2.254")));
    assert_ne!(Subnet::of(ip("192.0.2.1")), Subnet::of(ip("192.0.3.1")));
}

fn any_site() -> impl Strategy<Value = (f64, Standing)> {
    let weight = prop_oneof![Just(0.0), 0.0..1.0, prop::num::f64::ANY];
    (weight, prop_oneof![Just(Standing::Steady), Just(Standing::Unsteady), Just(Standing::Out)])
}

proptest! {
    /// Through any changes of weights and health.
    #[test]
    fn an_answer_is_never_empty_and_never_out_while_another_is_not(
        states in proptest::collection::vec(proptest::collection::vec(any_site(), 1..6), 1..8),
        client: u32,
    ) {
        let world = World::of(6, 3);
        let subnet = Subnet::of(Ipv4Addr::from(client).into());
        for state in states {
            let sites = world.sites(state);
            let given = answer(&sites, &subnet, &AnswerSettings::default()).unwrap();
            prop_assert!((1..=8).contains(&given.addresses.len()));
            let blind = sites.values().all(|site| site.standing == Standing::Out);
            prop_assert!(blind || sites[given.region].standing != Standing::Out);
            let of_region = |address: &IpAddr| sites[given.region].addresses.contains(address);
            prop_assert!(of_region(&given.addresses[0]));
            prop_assert!(blind || given.addresses.iter().all(of_region));
        }
    }

    #[test]
    fn a_changed_weight_moves_subnets_to_or_from_its_region_alone(
        weights in proptest::collection::vec(0.01..1.0, 2..6),
        which: prop::sample::Index,
        changed in 0.0..1.0,
        clients in proptest::collection::vec(any::<u32>(), 100),
    ) {
        let world = World::of(6, 1);
        let which = which.index(weights.len());
        let mut after = weights.clone();
        after[which] = changed;
        let (before, after) = (world.steady(weights), world.steady(after));
        for client in clients {
            let subnet = Subnet::of(Ipv4Addr::from(client).into());
            let (from, to) = (region(&before, &subnet), region(&after, &subnet));
            prop_assert!(from == to || [from, to].contains(&&world.names[which]));
        }
    }
}
