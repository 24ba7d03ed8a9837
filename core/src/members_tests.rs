use std::net::Ipv6Addr;

use proptest::prelude::*;

use super::*;

const PORT: NonZeroU16 = NonZeroU16::new(9_443).unwrap();

fn v4(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, last)
}

fn v6(last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last)
}

fn hosts(addresses: impl IntoIterator<Item = impl Into<IpAddr>>) -> Option<Round> {
    of_hosts(Answer::Addresses(addresses.into_iter().map(Into::into).collect()), PORT)
}

fn service(target: &str, priority: u16, weight: u16) -> Service {
    Service { priority, weight, port: PORT.get(), target: target.to_owned() }
}

fn names(roster: &Roster) -> Vec<&str> {
    roster.pods.iter().map(|pod| pod.name.as_str()).collect()
}

fn at(ip: impl Into<IpAddr>) -> Answer {
    Answer::Addresses(vec![ip.into()])
}

#[test]
fn hosts_are_named_by_their_addresses_and_need_not_prove_these_names() {
    let round = hosts([v4(7), v4(3), v4(7)]).unwrap();
    assert_eq!(names(&round.roster), ["10-0-0-3", "10-0-0-7"]);
    assert_eq!(round.roster.pods[1].address, "10.0.0.7:9443".parse().unwrap());
    assert!(!round.roster.named && !round.partial);
    let round = hosts([v6(7), v4(7).to_ipv6_mapped(), Ipv6Addr::LOCALHOST]).unwrap();
    assert_eq!(names(&round.roster), ["0-0-0-0-0-0-0-1", "10-0-0-7", "fd00-0-0-0-0-0-0-7"]);
}

#[test]
fn answers_that_say_nothing_give_no_roster() {
    for answer in [
        Answer::Nothing,
        Answer::Failed,
        Answer::Addresses(Vec::new()),
        Answer::Addresses(vec![Ipv4Addr::UNSPECIFIED.into()]),
    ] {
        assert_eq!(of_hosts(answer, PORT), None);
    }
}

#[test]
fn addresses_of_nobody_are_left_out_and_counted() {
    let nobody = ["0.0.0.0", "255.255.255.255", "224.0.0.1", "::", "ff02::1", "::ffff:0.0.0.0"];
    let found = nobody.iter().map(|text| text.parse().unwrap()).chain([IpAddr::from(v4(1))]);
    let round = hosts(found).unwrap();
    assert_eq!((names(&round.roster), round.unusable), (vec!["10-0-0-1"], 6));
}

#[test]
fn a_roster_is_cut_in_the_order_of_names() {
    let round = hosts((0..1_200_u16).map(|index| Ipv4Addr::from(0x0a00_0000 + u32::from(index)))).unwrap();
    assert_eq!((round.roster.pods.len(), round.cut), (MOST, 200));
    assert!(names(&round.roster).is_sorted());
    let services = (0..1_200).map(|index| service(&format!("pod-{index:04}.s."), 0, 1)).collect();
    let targets = Targets::of(services);
    assert_eq!(targets.hosts().last(), Some("pod-0999.s."));
    let addresses = targets.hosts().map(|_| at(v4(1))).collect();
    let round = targets.resolved(addresses, &Roster::default()).unwrap();
    assert_eq!((round.roster.pods.len(), round.cut), (MOST, 200));
}

#[test]
fn services_are_named_by_their_targets_and_must_prove_it() {
    let services = vec![
        service("pod-1.s.", 5, 30),
        service("pod-0.s.", 5, 60),
        service("far.s.", 10, 60),
        service("last.s.", 5, 0),
    ];
    let targets = Targets::of(services);
    assert_eq!(targets.hosts().collect::<Vec<_>>(), ["last.s.", "pod-0.s.", "pod-1.s."]);
    let many = Answer::Addresses(vec![v6(1).into(), v4(9).into(), v4(8).into()]);
    let round = targets.resolved(vec![at(v4(1)), many, at(v6(2))], &Roster::default()).unwrap();
    let found: Vec<(&str, String, u8)> =
        round.roster.pods.iter().map(|pod| (pod.name.as_str(), pod.address.to_string(), pod.weight.get())).collect();
    let expected = [("last", "10.0.0.1:9443", 2), ("pod-0", "10.0.0.8:9443", 100), ("pod-1", "[fd00::2]:9443", 50)];
    assert_eq!(found, expected.map(|(name, address, weight)| (name, address.to_owned(), weight)));
    assert!(round.roster.named && !round.partial);
}

#[test]
fn services_without_weights_are_equal() {
    let targets = Targets::of(vec![service("a.s.", 0, 0), service("b.s.", 0, 0)]);
    let round = targets.resolved(vec![at(v4(1)), at(v4(2))], &Roster::default()).unwrap();
    assert!(round.roster.pods.iter().all(|pod| pod.weight == Pod::FULL_WEIGHT));
}

#[test]
fn records_that_can_be_no_pod_are_left_out_and_counted() {
    let no_port = Service { port: 0, ..service("d.s.", 0, 0) };
    let services =
        vec![service(".", 0, 0), service("-a.s.", 0, 0), no_port, service("b.s.", 0, 0), service("b.t.", 0, 0)];
    let targets = Targets::of(services);
    assert_eq!((targets.hosts().collect::<Vec<_>>(), targets.unusable), (vec!["b.s."], 4));
    assert_eq!(targets.clone().resolved(vec![at(Ipv4Addr::UNSPECIFIED)], &Roster::default()), None);
    assert_eq!(targets.resolved(vec![Answer::Nothing], &Roster::default()), None);
    assert_eq!(Targets::of(Vec::new()).resolved(Vec::new(), &Roster::default()), None);
}

#[test]
fn a_target_whose_address_is_not_told_keeps_its_last_one() {
    let services = vec![service("a.s.", 0, 0), service("b.s.", 0, 0), service("c.s.", 0, 0)];
    let targets = Targets::of(services);
    let last = targets.clone().resolved(vec![at(v4(1)), at(v4(2)), Answer::Nothing], &Roster::default()).unwrap();
    assert_eq!((names(&last.roster), last.partial), (vec!["a", "b"], false));
    // One that was never known, or that is said not to be, is no pod.
    let answers = vec![Answer::Failed, Answer::Nothing, Answer::Failed];
    let round = targets.resolved(answers, &last.roster).unwrap();
    assert_eq!((names(&round.roster), round.partial), (vec!["a"], true));
    assert_eq!(round.roster.pods[0].address, "10.0.0.1:9443".parse().unwrap());
}

#[test]
fn times_to_live_are_kept_within_bounds_and_failures_wait_longer_each_time() {
    let seconds = Duration::from_secs;
    assert_eq!([0, 1, 30, 300, 86_400].map(|ttl| refresh_after(seconds(ttl)).as_secs()), [1, 1, 30, 300, 300]);
    assert_eq!([1, 2, 5, 6, u32::MAX].map(|failures| retry_after(failures, 0.0)), [1, 2, 16, 30, 30].map(seconds));
    assert_eq!(retry_after(1, 1.0), Duration::from_millis(900));
}

fn any_answer(record: impl Strategy<Value = IpAddr>) -> impl Strategy<Value = Answer> {
    prop_oneof![
        proptest::collection::vec(record, 0..6).prop_map(Answer::Addresses),
        Just(Answer::Nothing),
        Just(Answer::Failed)
    ]
}

fn check(round: &Round) {
    let names = names(&round.roster);
    assert!(!names.is_empty() && names.len() <= MOST);
    assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "each once, in order: {names:?}");
    assert!(round.roster.pods.iter().all(|pod| is_someone(pod.address.ip()) && pod.address.port() > 0));
    assert!(round.roster.pods.iter().all(|pod| pod.weight <= Pod::FULL_WEIGHT));
}

proptest! {
    #[test]
    fn rosters_are_never_empty_and_have_each_name_once_whatever_the_order_of_records(
        hosts in any_answer(prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u16; 8]>().prop_map(IpAddr::from)]),
        services in proptest::collection::vec(("[a-c.-]{0,4}", 0..3_u16, any::<u16>(), 0..3_u16), 0..6),
        addresses in proptest::collection::vec(any_answer((0..4_u8).prop_map(|last| v4(last).into())), 6),
    ) {
        if let Some(round) = of_hosts(hosts, PORT) {
            check(&round);
        }
        let services = services.into_iter();
        let mut services: Vec<Service> =
            services.map(|(target, priority, weight, port)| Service { priority, weight, port, target }).collect();
        let targets = Targets::of(services.clone());
        services.reverse();
        let reversed = Targets::of(services);
        prop_assert_eq!(reversed.hosts().collect::<Vec<_>>(), targets.hosts().collect::<Vec<_>>());
        let addresses = addresses.into_iter().take(targets.hosts().count()).collect();
        if let Some(round) = targets.resolved(addresses, &Roster::default()) {
            check(&round);
        }
    }
}
