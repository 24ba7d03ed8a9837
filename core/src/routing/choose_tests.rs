use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::routing::key_hash;

const IDLE: Candidate = Candidate { usable: true, tried: false, in_flight: 0, report: None, weight: 1.0, failing: 0.0 };

fn ring(pods: usize) -> Ring {
    let identities: Vec<String> = (0..pods).map(|pod| format!("pod-{pod}")).collect();
    Ring::new(identities.iter().map(String::as_str))
}

fn with(policy: Policy) -> RoutingSettings {
    RoutingSettings { policy, ..RoutingSettings::default() }
}

fn keyed(key: u64) -> Call {
    Call { key: Some(key_hash(&key.to_le_bytes())), ..Call::default() }
}

fn random(random: u64) -> Call {
    Call { random: mix(random, 0), ..Call::default() }
}

fn sum(_: Fresh, sum: &dyn Fn() -> Totals) -> Totals {
    sum()
}

fn take(policy: Policy, call: &Call, ring: &Ring, pods: &[Candidate]) -> Option<Choice> {
    choose(&with(policy), call, ring, |pod| pods[pod], || 0, sum)
}

fn chosen(policy: Policy, call: &Call, pods: &[Candidate]) -> (usize, Reason) {
    chosen_on(&ring(pods.len()), policy, call, pods)
}

fn chosen_on(ring: &Ring, policy: Policy, call: &Call, pods: &[Candidate]) -> (usize, Reason) {
    take(policy, call, ring, pods).map(|choice| (choice.pod, choice.reason)).unwrap()
}

fn order(call: &Call, pods: usize) -> Vec<usize> {
    ring(pods).order(call.key.unwrap()).collect()
}

#[test]
fn an_entity_goes_to_its_owner_then_along_the_ring() {
    let call = keyed(1);
    let order = order(&call, 4);
    let mut pods = [IDLE; 4];
    assert_eq!(chosen(Policy::Ring, &call, &pods), (order[0], Reason::Owner));
    pods[order[0]].usable = false;
    assert_eq!(chosen(Policy::Ring, &call, &pods), (order[1], Reason::Successor));
    pods[order[1]].tried = true;
    assert_eq!(chosen(Policy::Ring, &call, &pods), (order[2], Reason::Successor));
    pods[order[2]].in_flight = 9;
    assert_eq!(chosen(Policy::Ring, &call, &pods), (order[3], Reason::Bounded));
    pods[order[2]].weight = 0.0;
    assert_eq!(chosen(Policy::Ring, &call, &pods), (order[3], Reason::Successor));
}

#[test]
fn an_address_stays_with_its_owner_under_any_load() {
    let call = keyed(1);
    let order = order(&call, 3);
    let mut pods = [IDLE; 3];
    pods[order[0]].in_flight = 900;
    assert_eq!(chosen(Policy::SourceAddress, &call, &pods), (order[0], Reason::Owner));
    assert_eq!(chosen(Policy::Ring, &call, &pods), (order[1], Reason::Bounded));
    pods[order[0]].tried = true;
    assert_eq!(chosen(Policy::SourceAddress, &Call { hot: true, ..call }, &pods), (order[1], Reason::Successor));
}

#[test]
fn a_hot_entity_is_spread_over_its_first_usable_pods_by_load() {
    let order = order(&keyed(5), 8);
    let mut pods = [IDLE; 8];
    pods[order[1]].usable = false;
    let ring = ring(8);
    let seen = |pods: &[Candidate]| {
        let calls = (0..200).map(|number| Call { hot: true, random: mix(number, 0), ..keyed(5) });
        calls.map(|call| chosen_on(&ring, Policy::Ring, &call, pods)).collect::<BTreeSet<_>>()
    };
    let spread = |places: &[usize]| places.iter().map(|place| (order[*place], Reason::Spread)).collect::<BTreeSet<_>>();
    assert_eq!(seen(&pods), spread(&[0, 2, 3, 4]));
    pods[order[3]].in_flight = 1;
    assert_eq!(seen(&pods), spread(&[0, 2, 4]), "the most loaded of four is the worse of any two");
    // All four over the bound: on along the ring.
    for place in [0, 2, 3, 4] {
        pods[order[place]].in_flight = 50;
    }
    assert_eq!(seen(&pods), BTreeSet::from([(order[5], Reason::Bounded)]));
}

#[test]
fn a_hot_entity_has_one_pod_where_there_is_no_second() {
    let call = Call { hot: true, ..keyed(5) };
    assert_eq!(chosen(Policy::Ring, &call, &[IDLE]), (0, Reason::Owner));
    for spread in [0, 1, 2, MAX_SPREAD, usize::MAX] {
        let settings = RoutingSettings { spread, ..with(Policy::Ring) };
        let choice = choose(&settings, &call, &ring(40), |_| IDLE, || 0, sum).unwrap();
        assert_eq!(choice.reason, if spread < 2 { Reason::Owner } else { Reason::Spread });
        assert!(order(&call, 40)[..MAX_SPREAD].contains(&choice.pod));
    }
}

#[test]
fn without_a_key_the_less_loaded_of_two_wins() {
    let loads = [5, 3, 9].map(|in_flight| Candidate { in_flight, ..IDLE });
    let (two, three) = (ring(2), ring(3));
    for number in 0..1_000 {
        assert_eq!(chosen_on(&two, Policy::LeastRequest, &random(number), &loads[..2]), (1, Reason::LessLoaded));
        for policy in [Policy::LeastRequest, Policy::Ring, Policy::SourceAddress] {
            let (pod, reason) = chosen_on(&three, policy, &random(number), &loads);
            assert!(pod != 2 && reason == Reason::LessLoaded, "the most loaded of three never wins");
        }
    }
    assert_eq!(chosen(Policy::LeastRequest, &random(1), &loads[..1]), (0, Reason::OnlyOne));
}

#[test]
fn ties_spread_over_all_free_pods() {
    // All free, and so few free that the draws seldom meet two.
    let ring = ring(8);
    for free in [vec![0, 1, 2, 3, 4, 5, 6, 7], vec![2, 3, 6], vec![0, 7]] {
        let mut pods = [Candidate { usable: false, ..IDLE }; 8];
        free.iter().for_each(|pod| pods[*pod].usable = true);
        let mut seen = [0; 8];
        for number in 0..4_000 {
            seen[chosen_on(&ring, Policy::LeastRequest, &random(number), &pods).0] += 1;
        }
        let even = 4_000 / free.len();
        assert!(free.iter().all(|pod| seen[*pod] > even * 4 / 5), "{seen:?}");
        assert_eq!(free.iter().map(|pod| seen[*pod]).sum::<usize>(), 4_000);
    }
}

#[test]
fn the_score_counts_weight_reports_and_failures() {
    let pods = Pods { settings: &with(Policy::LeastRequest), ring: &ring(0), pod: |_| IDLE, totals: sum, panic: false };
    let busy = Candidate { in_flight: 3, ..IDLE };
    let report = |reported, age| Some(Report { reported, age: Duration::from_millis(age) });
    for (pod, score) in [
        (IDLE, 1.0),
        (busy, 4.0),
        (Candidate { weight: 0.5, ..busy }, 8.0),
        (Candidate { report: report(Reported::Utilisation(0.5), 1_000), ..busy }, 8.0),
        (Candidate { report: report(Reported::Utilisation(0.5), 1_001), ..busy }, 4.0),
        (Candidate { report: report(Reported::Utilisation(f64::NAN), 0), ..busy }, 4.0),
        (Candidate { report: report(Reported::Utilisation(7.0), 0), ..busy }, 40.0),
        (Candidate { report: report(Reported::Requests(9), 0), ..busy }, 10.0),
        (Candidate { report: report(Reported::Requests(2), 0), ..busy }, 4.0),
        (Candidate { failing: 0.5, ..busy }, 8.0),
        (Candidate { failing: f64::INFINITY, ..busy }, 400.0),
        (Candidate { failing: f64::NAN, ..busy }, 4.0),
        (Candidate { weight: 1e-320, ..busy }, f64::INFINITY),
    ] {
        let got = pods.score(&pod);
        assert!(got == score || (got - score).abs() < 1e-9 * score, "{pod:?}: {got}, not {score}");
    }
}

#[test]
fn turns_go_by_weight_among_the_free() {
    let mut pods = [IDLE; 4];
    pods[1].weight = 0.5;
    pods[2].usable = false;
    let ring = ring(4);
    let mut number = 0;
    let mut taken = [0; 4];
    for _ in 0..2_500 {
        let next = || {
            number += 1;
            number
        };
        let choice = choose(&with(Policy::WeightedRoundRobin), &keyed(1), &ring, |pod| pods[pod], next, sum).unwrap();
        assert_eq!(choice.reason, Reason::Turn);
        taken[choice.pod] += 1;
    }
    assert_eq!(taken, [1_000, 500, 0, 1_000]);
    pods[0].tried = true;
    pods[3].weight = 0.0;
    assert_eq!(chosen(Policy::WeightedRoundRobin, &keyed(1), &pods), (1, Reason::Turn));
}

#[test]
fn where_nobody_can_serve_everybody_untried_may() {
    for policy in [Policy::Ring, Policy::LeastRequest, Policy::WeightedRoundRobin, Policy::SourceAddress] {
        let mut pods = [Candidate { usable: false, ..IDLE }; 3];
        pods[0].tried = true;
        pods[1].weight = 0.0;
        assert_eq!(chosen(policy, &keyed(1), &pods), (2, Reason::Panic), "{policy:?}");
        pods[0].usable = true;
        assert_eq!(chosen(policy, &keyed(1), &pods), (2, Reason::Panic), "{policy:?}: the usable one was tried");
        pods[2].tried = true;
        assert_eq!(take(policy, &keyed(1), &ring(3), &pods), None, "{policy:?}");
        assert_eq!(take(policy, &keyed(1), &ring(0), &[]), None, "{policy:?}");
    }
}

#[test]
fn in_panic_an_entity_keeps_its_owner() {
    let call = Call { panic: true, ..keyed(1) };
    let order = order(&call, 4);
    let mut pods = [IDLE; 4];
    pods[order[0]].usable = false;
    assert_eq!(chosen(Policy::Ring, &call, &pods), (order[0], Reason::Panic));
}

#[test]
fn t54_retries_end_when_every_pod_was_tried() {
    for policy in [Policy::Ring, Policy::LeastRequest, Policy::WeightedRoundRobin, Policy::SourceAddress] {
        let mut pods = [Candidate { usable: false, failing: 1.0, ..IDLE }; 5];
        let (mut tried, ring) = (BTreeSet::new(), ring(5));
        while let Some(choice) = take(policy, &keyed(9), &ring, &pods) {
            assert!(tried.insert(choice.pod), "{policy:?}: tried twice");
            pods[choice.pod].tried = true;
        }
        assert_eq!(tried.len(), 5, "{policy:?}");
    }
}

/// Four pods with 50 requests each in flight. One answers a share of its requests with an error at once.
#[test]
fn t54_fast_errors_attract_no_traffic() {
    const SERVICE: u64 = 200;
    let ring = ring(4);
    let sent_to_failing = |errors: u64, known: bool| {
        let mut pods = [IDLE; 4];
        pods[0].failing = if known { errors as f64 / 100.0 } else { 0.0 };
        let mut ends: VecDeque<(u64, usize)> = VecDeque::new();
        let mut sent = 0;
        for now in 0..8_000 {
            while let Some((_, pod)) = ends.pop_front_if(|(end, _)| *end <= now) {
                pods[pod].in_flight -= 1;
            }
            let pod = chosen_on(&ring, Policy::LeastRequest, &random(now), &pods).0;
            sent += usize::from(pod == 0);
            if pod != 0 || mix(now, 9) % 100 >= errors {
                pods[pod].in_flight += 1;
                ends.push_back((now + SERVICE, pod));
            }
        }
        sent
    };
    for errors in [25, 50, 75, 100] {
        let (blind, seeing) = (sent_to_failing(errors, false), sent_to_failing(errors, true));
        assert!(blind > 2_400, "{errors} % errors: {blind} of 8,000, so that the test shows nothing");
        assert!(seeing <= 2_100, "{errors} % errors: {seeing} of 8,000");
    }
}

fn candidate() -> impl Strategy<Value = Candidate> {
    let weight = prop_oneof![4 => 0.1..=1.0, 1 => Just(0.0), 1 => prop::num::f64::ANY];
    let reported =
        prop_oneof![prop::num::f64::ANY.prop_map(Reported::Utilisation), any::<usize>().prop_map(Reported::Requests)];
    let report =
        proptest::option::of((reported, any::<Duration>()).prop_map(|(reported, age)| Report { reported, age }));
    let load = prop_oneof![4 => 0_usize..20, 1 => any::<usize>()];
    (any::<bool>(), prop::bool::weighted(0.3), load, report, weight, prop::num::f64::ANY).prop_map(
        |(usable, tried, in_flight, report, weight, failing)| Candidate {
            usable,
            tried,
            in_flight,
            report,
            weight,
            failing,
        },
    )
}

fn policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![Policy::Ring, Policy::LeastRequest, Policy::WeightedRoundRobin, Policy::SourceAddress])
}

proptest! {
    #[test]
    fn a_pod_that_may_serve_is_found_and_no_other(
        pods in proptest::collection::vec(candidate(), 0..10),
        policy in policy(),
        key: Option<u64>,
        hot: bool,
        panic: bool,
        random: u64,
        turns: [u64; 4],
    ) {
        let call = Call { key, hot, panic, random };
        let ring = ring(pods.len());
        let decide = || {
            let asked = Cell::new(0);
            let next = || turns[asked.replace(asked.get() + 1) % 4];
            choose(&with(policy), &call, &ring, |pod| pods[pod], next, sum)
        };
        let choice = decide();
        prop_assert_eq!(choice, decide(), "the same input makes the same choice");

        let untried = |pod: &Candidate| !pod.tried && weight_of(pod.weight) > 0.0;
        prop_assert_eq!(choice.is_some(), pods.iter().any(untried));
        if let Some(Choice { pod, reason }) = choice {
            prop_assert!(untried(&pods[pod]));
            let panics = panic || !pods.iter().any(|pod| untried(pod) && pod.usable);
            prop_assert_eq!(reason == Reason::Panic, panics);
            prop_assert!(panics || pods[pod].usable);
        }
    }

    #[test]
    fn the_worse_of_two_never_wins(one in candidate(), other in candidate(), random: u64) {
        let weight = |pod: &Candidate| weight_of(pod.weight).clamp(0.1, 1.0);
        let pods = [one, other].map(|pod| Candidate { usable: true, tried: false, weight: weight(&pod), ..pod });
        let settings = with(Policy::LeastRequest);
        let all = Pods { settings: &settings, ring: &ring(2), pod: |pod: usize| pods[pod], totals: sum, panic: false };
        let choice = all.by_load(random).unwrap();
        prop_assert!(all.score(&pods[choice.pod]) <= all.score(&pods[1 - choice.pod]));
    }

    /// Hot entities and others, placed and completed in any order.
    #[test]
    fn no_pod_of_a_healthy_pool_is_given_more_than_its_bound(
        count in 1_usize..8,
        steps in proptest::collection::vec((any::<bool>(), 0_u64..4, any::<u64>()), 1..100),
    ) {
        let (mut pods, mut running) = (vec![IDLE; count], Vec::<usize>::new());
        let ring = ring(count);
        for (completes, key, random) in steps {
            if completes && !running.is_empty() {
                pods[running.swap_remove(below(random, running.len()))].in_flight -= 1;
                continue;
            }
            let call = Call { hot: key < 2, random, ..keyed(key) };
            let choice = choose(&with(Policy::Ring), &call, &ring, |pod| pods[pod], || 0, sum).unwrap();
            pods[choice.pod].in_flight += 1;
            running.push(choice.pod);
            prop_assert!(pods[choice.pod].in_flight <= (5 * running.len()).div_ceil(4 * count));
        }
    }

    #[test]
    fn two_of_draws_two_different_numbers(random: u64, count in 0_usize..100) {
        match two_of(random, count) {
            Some((one, other)) => prop_assert!(one != other && one < count && other < count),
            None => prop_assert!(count < 2),
        }
    }
}
