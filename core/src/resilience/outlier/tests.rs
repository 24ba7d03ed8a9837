use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn pool(pods: u32) -> Outliers {
    let mut pool = Outliers::new(OutlierSettings::default());
    assert!(pool.keep(&(0..pods).collect::<Vec<_>>()).is_empty());
    pool
}

/// One call from beginning to end.
fn call(pool: &mut Outliers, pod: PodId, outcome: Outcome, took: Duration, begun: Duration) -> Option<Change> {
    let call = pool.begin(pod, begun);
    pool.record(call, outcome, begun + took)
}

fn fail(pool: &mut Outliers, pod: PodId, times: u32, now: Duration) -> Option<Change> {
    (0..times).filter_map(|_| call(pool, pod, Outcome::Failure, MS, now)).last()
}

/// Good calls to all pods, until `pool` knows what is usual: 10 ms.
fn warm(pool: &mut Outliers, now: Duration) {
    for pod in pool.pods.iter().map(|pod| pod.id).collect::<Vec<_>>() {
        for _ in 0..60 {
            assert_eq!(call(pool, pod, Outcome::Success, 10 * MS, now), None);
        }
    }
    assert!(pool.sweep(now + 10 * MS).is_empty());
}

#[test]
fn five_failures_in_a_row_eject_at_once() {
    let mut pool = pool(4);
    assert_eq!(fail(&mut pool, 2, 4, SECOND), None);
    assert_eq!(pool.may_take(2, SECOND), Standing::Usable);
    assert_eq!(call(&mut pool, 2, Outcome::Success, MS, SECOND), None, "the row begins anew");
    assert_eq!(fail(&mut pool, 2, 4, SECOND), None);
    let until = 2 * SECOND + MS;
    let ejected = Change::Ejected { pod: 2, reason: Reason::ConsecutiveFailures, until };
    assert_eq!(fail(&mut pool, 2, 1, SECOND), Some(ejected));
    assert_eq!(pool.may_take(2, until - MS), Standing::Ejected);
    assert_eq!(pool.may_take(2, until), Standing::Probe);
    assert_eq!(pool.may_take(1, until), Standing::Usable);
    assert!(!pool.panic());
}

#[test]
fn overload_client_errors_and_cancelled_calls_say_nothing() {
    let mut pool = pool(4);
    for outcome in [Outcome::Overload, Outcome::ClientError, Outcome::Cancelled] {
        for _ in 0..100 {
            assert_eq!(fail(&mut pool, 0, 1, SECOND), None);
            assert_eq!(call(&mut pool, 0, outcome, MS, SECOND), None);
            assert_eq!(call(&mut pool, 0, Outcome::Success, MS, SECOND), None);
            assert_eq!(call(&mut pool, 1, outcome, MS, SECOND), None);
        }
    }
    assert_eq!(pool.penalty(1, SECOND), 0.0);
    assert_eq!(pool.may_take(1, SECOND), Standing::Usable);
    fail(&mut pool, 2, 4, SECOND);
    assert_eq!(call(&mut pool, 2, Outcome::Overload, MS, SECOND), None);
    assert!(fail(&mut pool, 2, 1, SECOND).is_some(), "they do not end a row either");
}

#[test]
fn three_good_probes_one_at_a_time_bring_a_pod_back() {
    let mut pool = pool(4);
    fail(&mut pool, 0, 5, Duration::ZERO);
    let now = 2 * SECOND;
    for good in 0..3 {
        assert_eq!(pool.may_take(0, now), Standing::Probe);
        let probe = pool.begin(0, now);
        assert_eq!(pool.may_take(0, now), Standing::Ejected, "one at a time");
        let outcome = if good < 2 { None } else { Some(Change::Restored { pod: 0 }) };
        assert_eq!(pool.record(probe, Outcome::Success, now + MS), outcome);
    }
    assert_eq!(pool.may_take(0, now), Standing::Usable);
    assert_eq!(fail(&mut pool, 0, 4, now), None, "old failures are forgotten");
}

#[test]
fn probes_that_say_nothing_are_given_back() {
    let mut pool = pool(4);
    fail(&mut pool, 0, 5, Duration::ZERO);
    for outcome in [Outcome::Cancelled, Outcome::Overload, Outcome::ClientError] {
        assert_eq!(call(&mut pool, 0, outcome, MS, 2 * SECOND), None);
        assert_eq!(pool.may_take(0, 2 * SECOND), Standing::Probe, "{outcome:?}");
    }
}

#[test]
fn each_failed_probe_doubles_the_time_up_to_the_longest() {
    let mut pool = pool(4);
    let mut now = Duration::ZERO;
    let mut change = fail(&mut pool, 0, 5, now);
    for seconds in [1, 2, 4, 8, 8, 8] {
        let Some(Change::Ejected { until, .. }) = change else { panic!("{change:?}") };
        assert_eq!(until, now + MS + seconds * SECOND);
        now = until;
        change = call(&mut pool, 0, Outcome::Failure, MS, now);
    }
    assert!(matches!(change, Some(Change::Ejected { reason: Reason::FailedProbe, .. })));
}

#[test]
fn ejections_are_forgiven_while_the_pod_is_well() {
    let mut pool = pool(4);
    fail(&mut pool, 0, 5, Duration::ZERO);
    call(&mut pool, 0, Outcome::Failure, MS, 2 * SECOND);
    for _ in 0..3 {
        call(&mut pool, 0, Outcome::Success, MS, 5 * SECOND);
    }
    for second in 5..=25 {
        assert!(pool.sweep(second * SECOND).is_empty());
    }
    let change = fail(&mut pool, 0, 5, 25 * SECOND);
    assert_eq!(
        change,
        Some(Change::Ejected { pod: 0, reason: Reason::ConsecutiveFailures, until: 26 * SECOND + MS }),
        "two ejections were forgiven in 20 s"
    );
}

#[test]
fn half_of_the_pool_stays_and_then_there_is_panic() {
    for (pods, most) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (9, 4)] {
        let mut pool = pool(pods);
        for pod in 0..most {
            assert!(matches!(fail(&mut pool, pod, 5, SECOND), Some(Change::Ejected { .. })), "{pod} of {pods}");
            assert!(!pool.panic(), "{pod} of {pods}");
        }
        let held = Change::Held { pod: most, reason: Reason::ConsecutiveFailures };
        assert_eq!(fail(&mut pool, most, 5, SECOND), Some(held), "{pods} pods");
        assert_eq!(pool.may_take(most, SECOND), Standing::Usable);
        assert!(pool.panic(), "{pods} pods");
        assert_eq!(fail(&mut pool, most, 5, SECOND), None, "said once");
        pool.sweep(SECOND + SECOND / 2);
        assert!(pool.panic());
        pool.sweep(3 * SECOND);
        assert!(!pool.panic(), "a hold ends with the time of an ejection");
    }
}

#[test]
fn a_pod_that_is_held_goes_when_another_comes_back() {
    let mut pool = pool(2);
    fail(&mut pool, 0, 5, SECOND);
    fail(&mut pool, 1, 5, SECOND);
    assert!(pool.panic());
    for _ in 0..3 {
        call(&mut pool, 0, Outcome::Success, MS, 3 * SECOND);
    }
    assert!(!pool.panic(), "half of the pool is well");
    assert!(matches!(fail(&mut pool, 1, 5, 3 * SECOND), Some(Change::Ejected { pod: 1, .. })));
    assert_eq!((pool.out, pool.held), (1, 0));
}

#[test]
fn a_low_share_of_successes_ejects() {
    // (failures of 20 of pod 0, of the other three, is ejected)
    for (own, others, ejected) in [(0, 0, false), (1, 0, false), (4, 0, true), (4, 3, false), (11, 11, true)] {
        let mut pool = pool(4);
        for number in 0..100 {
            for pod in 0..4 {
                let failures = if pod == 0 { own } else { others };
                // Spread, so that the failures are never five in a row.
                let bad = (number * 7) % 20 < failures;
                let outcome = if bad { Outcome::Failure } else { Outcome::Success };
                call(&mut pool, pod, outcome, MS, SECOND + number * 10 * MS);
                if bad && failures > 5 {
                    pool.pods[pod as usize].failures_in_row = 0;
                }
            }
        }
        let changes = pool.sweep(2 * SECOND);
        let of_first =
            changes.iter().any(|change| matches!(change, Change::Ejected { pod: 0, reason: Reason::SuccessRate, .. }));
        assert_eq!(of_first, ejected, "{own} and {others} of 20 fail: {changes:?}");
        assert_eq!(pool.panic(), others > 10, "{own} and {others} of 20 fail: {changes:?}");
    }
}

#[test]
fn too_few_or_old_calls_are_no_evidence() {
    let mut pool = pool(4);
    for number in 0..49 {
        let outcome = if number % 4 == 0 { Outcome::Success } else { Outcome::Failure };
        call(&mut pool, 0, outcome, MS, SECOND);
    }
    assert!(pool.sweep(SECOND).is_empty(), "49 calls");
    call(&mut pool, 0, Outcome::Failure, MS, 12 * SECOND);
    assert!(pool.sweep(12 * SECOND).is_empty(), "only one of 50 in the window");
}

#[test]
fn a_pod_three_times_slower_than_the_others_is_ejected() {
    // (latency of pod 0, of the others, is ejected)
    for (own, others, ejected) in [(100, 30, true), (80, 30, false), (19, 1, false), (21, 1, true), (500, 500, false)] {
        for pods in 2..=5 {
            let mut pool = pool(pods);
            for number in 0..60 {
                for pod in 0..pods {
                    let took = if pod == 0 { own } else { others };
                    call(&mut pool, pod, Outcome::Success, took * MS, number * MS);
                }
            }
            let changes = pool.sweep(SECOND);
            let slow =
                changes.iter().any(|change| matches!(change, Change::Ejected { pod: 0, reason: Reason::Latency, .. }));
            assert_eq!(slow, ejected, "{own} and {others} ms in a pool of {pods}: {changes:?}");
            assert_eq!(changes.len(), usize::from(ejected));
        }
    }
}

#[test]
fn one_very_slow_answer_ejects_nobody() {
    let mut pool = pool(4);
    warm(&mut pool, SECOND);
    call(&mut pool, 0, Outcome::Success, 60 * SECOND, SECOND);
    assert!(pool.sweep(SECOND).is_empty());
}

#[test]
fn a_pod_that_hangs_is_suspect_and_then_ejected() {
    let mut pool = pool(4);
    warm(&mut pool, SECOND);
    let begun = 2 * SECOND;
    let hanging: Vec<Call> = (0..3).map(|_| pool.begin(0, begun)).collect();
    assert!(pool.overdue_after().unwrap() < 60 * MS);
    assert_eq!(pool.may_take(0, begun + 40 * MS), Standing::Usable);
    assert_eq!(pool.may_take(0, begun + 60 * MS), Standing::Suspect);
    assert!(pool.sweep(begun + 490 * MS).is_empty());
    let now = begun + 510 * MS;
    assert_eq!(pool.sweep(now), [Change::Ejected { pod: 0, reason: Reason::Silence, until: now + SECOND }]);
    for call in hanging {
        assert_eq!(pool.record(call, Outcome::Timeout, begun + 5 * SECOND), None, "it is out for these already");
    }
    assert_eq!(pool.may_take(0, begun + 5 * SECOND), Standing::Probe);
    let probe = pool.begin(0, begun + 5 * SECOND);
    let change = pool.sweep(begun + 6 * SECOND);
    assert!(matches!(change[..], [Change::Ejected { reason: Reason::Silence, .. }]), "the probe hangs: {change:?}");
    assert_eq!(pool.record(probe, Outcome::Success, begun + 7 * SECOND), None, "too late");
}

#[test]
fn one_slow_call_beside_good_ones_is_no_silence() {
    let mut pool = pool(4);
    warm(&mut pool, SECOND);
    let slow = pool.begin(0, 2 * SECOND);
    for tick in 0..300 {
        let now = 2 * SECOND + tick * 10 * MS;
        call(&mut pool, 0, Outcome::Success, 9 * MS, now);
        assert_eq!(pool.may_take(0, now + 9 * MS), Standing::Usable);
        assert!(pool.sweep(now + 9 * MS).is_empty());
    }
    assert_eq!(pool.record(slow, Outcome::Success, 6 * SECOND), None);
}

#[test]
fn calls_given_up_before_the_pool_could_answer_charge_nobody() {
    let mut pool = pool(4);
    warm(&mut pool, SECOND);
    for number in 0..10_000 {
        // Always two under way, none for longer than 4 ms.
        let now = 2 * SECOND + number * 2 * MS;
        let outcome = if number % 2 == 0 { Outcome::Cancelled } else { Outcome::Timeout };
        assert_eq!(call(&mut pool, 0, outcome, 4 * MS, now), None);
        assert!(pool.sweep(now).is_empty());
        assert_eq!(pool.may_take(0, now), Standing::Usable);
    }
}

#[test]
fn breakers_hear_of_no_failure_that_is_hurried_or_late() {
    let mut pool = pool(4);
    warm(&mut pool, SECOND);
    let (call, late) = (pool.begin(1, 2 * SECOND), pool.begin(0, 2 * SECOND));
    assert_eq!(pool.judged(&call, Outcome::Timeout, 2 * SECOND + 4 * MS), Outcome::Cancelled);
    assert_eq!(pool.judged(&call, Outcome::Timeout, 2 * SECOND + 14 * MS), Outcome::Timeout);
    assert_eq!(pool.judged(&late, Outcome::Failure, 2 * SECOND), Outcome::Failure);
    fail(&mut pool, 0, 5, 2 * SECOND);
    assert_eq!(pool.judged(&late, Outcome::Failure, 2 * SECOND), Outcome::Cancelled);
    assert_eq!(pool.judged(&late, Outcome::Overload, 2 * SECOND), Outcome::Overload);
}

#[test]
fn a_pod_that_only_loses_hedges_is_ejected() {
    let mut pool = pool(4);
    warm(&mut pool, SECOND);
    let mut lost = 0;
    let mut now = 2 * SECOND;
    while pool.sweep(now).is_empty() {
        call(&mut pool, 0, Outcome::Cancelled, 13 * MS, now);
        now += 100 * MS;
        lost += 1;
        assert!(lost < 60, "each waited for longer than the median");
    }
    assert_eq!(pool.may_take(0, now), Standing::Ejected);
    now += SECOND;
    while pool.sweep(now).is_empty() {
        assert_eq!(call(&mut pool, 0, Outcome::Cancelled, 13 * MS, now), None);
        now += 100 * MS;
        lost += 1;
        assert!(lost < 120, "nor do lost probes keep it waiting for ever");
    }
    assert_eq!(pool.may_take(0, now), Standing::Ejected);
}

#[test]
fn fast_failures_cost_attraction_and_time_gives_it_back() {
    let mut pool = pool(4);
    fail(&mut pool, 0, 4, SECOND);
    let penalty = pool.penalty(0, SECOND + MS);
    assert!((0.4..0.5).contains(&penalty), "{penalty}");
    assert!(pool.penalty(0, 3 * SECOND + MS) < penalty * 0.51);
    assert_eq!(pool.penalty(1, SECOND), 0.0);
    assert_eq!(pool.penalty(99, SECOND), 0.0);
}

#[test]
fn pods_come_and_go_without_breaking_the_floor() {
    let mut pool = pool(4);
    fail(&mut pool, 0, 5, SECOND);
    fail(&mut pool, 1, 5, 2 * SECOND);
    let call = pool.begin(1, 2 * SECOND);
    assert_eq!(pool.keep(&[0, 1, 3]), [Change::Restored { pod: 0 }], "its time ends first");
    assert_eq!(pool.may_take(1, 2 * SECOND), Standing::Ejected);
    assert_eq!(pool.keep(&[3, 0, 0]), [], "an id that is named twice is one pod");
    pool.keep(&[0, 1, 3]);
    assert_eq!(pool.may_take(1, 2 * SECOND), Standing::Usable, "a new pod under an old id");
    assert_eq!(pool.record(call, Outcome::Failure, 2 * SECOND), None);
    assert_eq!(pool.penalty(1, 2 * SECOND), 0.0, "not its call");
    assert_eq!(pool.keep(&[]), []);
    assert!(!pool.panic());
    assert_eq!(pool.may_take(7, SECOND), Standing::Usable, "unknown is not down");
}

#[test]
fn reports_name_the_rule_and_its_end() {
    let mut pool = pool(2);
    fail(&mut pool, 0, 5, SECOND);
    fail(&mut pool, 1, 5, SECOND);
    let reports: Vec<_> = pool.pods(SECOND).map(|report| (report.standing, report.reason, report.until)).collect();
    let (reason, until) = (Some(Reason::ConsecutiveFailures), Some(2 * SECOND + MS));
    assert_eq!(reports, [(Standing::Ejected, reason, until), (Standing::Usable, reason, until)]);
}

#[test]
fn a_pod_is_small() {
    assert!(size_of::<Pod>() <= 400, "{}", size_of::<Pod>());
    assert!(size_of::<Outliers>() <= 1_300, "{}", size_of::<Outliers>());
}

/// What pod 0 of four does while it is faulty.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Resets, 500, garbage: bad at once.
    Bad,
    /// Each call ends at its deadline.
    Hangs(Duration),
}

/// 400 calls a second to four pods, each 5 ms; pod 0 is faulty from 5 s to `healed`. Nobody retries.
fn scenario(fault: Fault, healed: Duration) {
    let mut pool = pool(4);
    let (mut failed_before_ejection, mut failed, mut ejected, mut back) = (0, 0, None, None);
    let mut open: Vec<(Duration, Call, Outcome)> = Vec::new();
    let note = |change: Option<Change>, now, ejected: &mut Option<Duration>, back: &mut Option<Duration>| match change {
        Some(Change::Ejected { pod, .. }) => {
            assert_eq!(pod, 0, "a good pod was ejected");
            ejected.get_or_insert(now);
        }
        Some(Change::Restored { .. }) => *back = Some(now),
        Some(Change::Held { pod, .. }) => panic!("{pod} held"),
        None => {}
    };
    let end = healed + 16 * SECOND;
    for tick in 0.. {
        let now = tick * SECOND / 400;
        if now > end {
            break;
        }
        if tick % 40 == 0 {
            for change in pool.sweep(now) {
                note(Some(change), now, &mut ejected, &mut back);
            }
        }
        for index in (0..open.len()).rev().filter(|index| open[*index].0 <= now).collect::<Vec<_>>() {
            let (_, call, outcome) = open.swap_remove(index);
            failed += u32::from(outcome.is_failure());
            failed_before_ejection += u32::from(outcome.is_failure() && ejected.is_none());
            note(pool.record(call, outcome, now), now, &mut ejected, &mut back);
        }
        // A turn to each pod that may have one; a suspect's goes to the next.
        let standing = |pod: u32| pool.may_take(pod, now);
        let turn = (tick..tick + 4)
            .map(|turn| turn % 4)
            .find(|pod| matches!(standing(*pod), Standing::Usable | Standing::Probe));
        let pod = turn.expect("at least half of the pool is usable");
        let faulty = pod == 0 && now >= 5 * SECOND && now < healed;
        let (outcome, took) = match fault {
            Fault::Bad if faulty => (Outcome::Failure, MS),
            Fault::Hangs(deadline) if faulty => (Outcome::Timeout, deadline),
            _ => (Outcome::Success, 5 * MS),
        };
        open.push((now + took, pool.begin(pod, now), outcome));
    }
    let ejected = ejected.expect("ejected") - 5 * SECOND;
    assert!(ejected <= SECOND, "{fault:?}: ejected after {ejected:?}");
    assert!(failed_before_ejection <= 5, "{fault:?}: {failed_before_ejection} failures before the ejection");
    // Then one for each probe, and what had begun to hang before the pod was suspect.
    assert!(failed <= 25, "{fault:?}: {failed} failures");
    let back = back.expect("back");
    assert!(back >= healed && back <= healed + 15 * SECOND, "{fault:?}: back {:?} after", back - healed);
}

#[test]
fn one_bad_pod_of_four_costs_five_failures_is_out_in_a_second_and_back_in_fifteen() {
    for outage in [3, 20, 60] {
        let healed = (5 + outage) * SECOND;
        scenario(Fault::Bad, healed);
        for deadline in [30 * MS, 100 * MS, SECOND, 5 * SECOND] {
            scenario(Fault::Hangs(deadline), healed);
        }
    }
}

#[test]
fn t54_a_pool_that_fails_as_a_whole_keeps_half_and_is_back_in_fifteen_seconds() {
    let mut pool = pool(4);
    let healed = 30 * SECOND;
    let mut panicked = false;
    for tick in 0..18_000_u32 {
        let now = tick * SECOND / 400;
        if tick % 40 == 0 {
            pool.sweep(now);
        }
        let standing = |pod: u32| pool.may_take(pod, now);
        let turn = (tick..tick + 4)
            .map(|turn| turn % 4)
            .find(|pod| pool.panic() || matches!(standing(*pod), Standing::Usable | Standing::Probe));
        let outcome = if now >= 5 * SECOND && now < healed { Outcome::Failure } else { Outcome::Success };
        call(&mut pool, turn.expect("half of the pool is usable"), outcome, MS, now);
        panicked |= pool.panic();
        assert!(pool.out <= 2);
    }
    assert!(panicked);
    assert!(!pool.panic());
    assert!(pool.pods(45 * SECOND).all(|report| report.standing == Standing::Usable));
}

#[derive(Clone, Debug)]
enum Step {
    Begin(PodId),
    End(usize, Outcome),
    Sweep,
    Keep(Vec<PodId>),
    Wait(u32),
    /// The clock of another thread.
    Back(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let outcome = prop_oneof![
        4 => Just(Outcome::Failure),
        3 => Just(Outcome::Success),
        1 => Just(Outcome::Timeout),
        1 => Just(Outcome::Overload),
        1 => Just(Outcome::ClientError),
        1 => Just(Outcome::Cancelled),
    ];
    let step = prop_oneof![
        8 => (0..7_u32).prop_map(Step::Begin),
        8 => (any::<usize>(), outcome).prop_map(|(index, outcome)| Step::End(index, outcome)),
        2 => Just(Step::Sweep),
        1 => proptest::collection::vec(0..7_u32, 0..7).prop_map(Step::Keep),
        2 => (0..2_000_u32).prop_map(Step::Wait),
        1 => (0..50_u32).prop_map(Step::Back),
    ];
    proptest::collection::vec(step, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    /// Whatever happens: at least half of the pool is in, the counts are true, a pod that is out has one probe at
    /// most, no ejection is longer than the longest, and panic means that less than half is well.
    #[test]
    fn the_floor_holds_for_every_sequence(steps in steps()) {
        let settings = OutlierSettings { consecutive_failures: 2, min_samples: 3, ..OutlierSettings::default() };
        let mut pool = Outliers::new(settings);
        pool.keep(&[0, 1, 2, 3]);
        let mut now = SECOND;
        let mut stepped_back = Duration::ZERO;
        let mut open: Vec<Call> = Vec::new();
        for step in steps {
            let mut changes = Vec::new();
            match step {
                Step::Begin(pod) => open.push(pool.begin(pod, now)),
                Step::End(index, outcome) if !open.is_empty() => {
                    let call = open.swap_remove(index % open.len());
                    changes.extend(pool.record(call, outcome, now));
                }
                Step::End(..) => {}
                Step::Sweep => changes = pool.sweep(now),
                Step::Keep(pods) => changes = pool.keep(&pods),
                Step::Wait(millis) => now += millis * MS,
                Step::Back(millis) => {
                    now = now.saturating_sub(millis * MS);
                    stepped_back += millis * MS;
                }
            }
            for change in changes {
                if let Change::Ejected { until, .. } = change {
                    prop_assert!(until > now && until <= now + 8 * SECOND);
                }
            }
            let out = pool.pods.iter().filter(|pod| pod.state != State::In).count();
            let held = pool.pods.iter().filter(|pod| pod.held.is_some()).count();
            prop_assert_eq!((pool.out, pool.held), (out, held));
            prop_assert!(out <= pool.pods.len() / 2);
            prop_assert_eq!(pool.panic(), pool.pods.len() - out - held < pool.pods.len().div_ceil(2));
            for report in pool.pods(now) {
                prop_assert!((0.0..=1.0).contains(&report.penalty));
                let known = &pool.pods[pool.find(report.pod).unwrap()];
                let probes = open.iter().filter(|call| call.probe && call.period == known.period).count();
                prop_assert!(probes <= 1);
                prop_assert!(probes == 0 || report.standing != Standing::Probe);
                let under_way = open.iter().filter(|call| call.period == known.period).count();
                prop_assert_eq!(known.outstanding.oldest().is_some(), under_way > 0);
                if let Some(oldest) = known.outstanding.oldest() {
                    let mut starts = open.iter().filter(|call| call.period == known.period).map(|call| call.started);
                    prop_assert!(starts.all(|start| start + stepped_back >= oldest));
                }
            }
        }
    }

    /// A pool whose pods only answer well, refuse or are given up early loses none, whatever the order.
    #[test]
    fn pods_without_fault_stay(steps in proptest::collection::vec((0..4_u32, 0..4_u8, 1..40_u64), 1..300)) {
        let mut pool = pool(4);
        let mut now = SECOND;
        for (pod, kind, millis) in steps {
            let outcome = [Outcome::Success, Outcome::Overload, Outcome::ClientError, Outcome::Success][usize::from(kind)];
            prop_assert_eq!(call(&mut pool, pod, outcome, Duration::from_millis(5 + millis % 3), now), None);
            now += Duration::from_millis(millis);
            prop_assert!(pool.sweep(now).is_empty());
            prop_assert_eq!(pool.may_take(pod, now), Standing::Usable);
            prop_assert!(!pool.panic());
        }
    }

    /// No setting and no time makes it fall.
    #[test]
    fn any_settings_are_survived(
        (factor, count, time) in (any::<f64>(), any::<u32>(), any::<u64>()),
        ends in proptest::collection::vec((any::<u64>(), any::<bool>()), 1..60),
    ) {
        let time = Duration::from_micros(time);
        let mut pool = Outliers::new(OutlierSettings {
            consecutive_failures: count % 3,
            window: time,
            min_samples: count % 4,
            success_deviations: factor,
            success_margin: -factor,
            success_floor: factor,
            latency_factor: factor,
            latency_min: time,
            suspect_factor: factor,
            suspect_min: time,
            silence_factor: factor,
            silence_min: time,
            base_ejection: time,
            max_ejection: time,
            forgive_after: time,
            probe_successes: count,
            max_ejected: factor,
        });
        pool.keep(&[1, 2, 3]);
        for (now, good) in ends {
            let now = Duration::from_micros(now);
            let outcome = if good { Outcome::Success } else { Outcome::Timeout };
            let call = pool.begin(1 + u32::from(good), now);
            pool.record(call, outcome, now.saturating_add(time));
            pool.sweep(now);
            prop_assert!(pool.out <= 1);
        }
    }
}
