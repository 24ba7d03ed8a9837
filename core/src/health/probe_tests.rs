use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const NOW: Duration = Duration::from_secs(100);

/// After these probes, five seconds apart.
fn seen(outcomes: &[Outcome]) -> (Pair, Seen) {
    let settings = ProbeSettings::default();
    let (mut pair, mut now) = (Pair::default(), NOW);
    for outcome in outcomes {
        now += settings.interval;
        pair.record(*outcome, &settings, now);
    }
    (pair, pair.seen(&settings, now))
}

#[test]
fn fails_after_three_failures_in_a_row_and_heals_with_one_answer() {
    use Outcome::{Failed, Good, Overloaded, Refused};
    for (outcomes, expected) in [
        (&[][..], Seen::Unknown),
        (&[Good], Seen::Answering),
        (&[Failed], Seen::Failing),
        (&[Good, Failed, Failed], Seen::Failing),
        (&[Failed, Refused, Failed], Seen::Failed),
        (&[Refused, Refused, Refused], Seen::Failed),
        (&[Failed, Failed, Failed, Good], Seen::Answering),
        (&[Failed, Failed, Good, Failed, Failed], Seen::Failing),
        (&[Failed, Failed, Overloaded, Failed], Seen::Failing),
        (&[Failed, Failed, Failed, Overloaded], Seen::Answering),
    ] {
        assert_eq!(seen(outcomes).1, expected, "{outcomes:?}");
    }
}

#[test]
fn an_overloaded_gateway_is_alive_and_not_clean() {
    let (pair, seen) = seen(&[Outcome::Good, Outcome::Good, Outcome::Overloaded]);
    assert_eq!((seen, pair.clean()), (Seen::Answering, 0));
}

#[test]
fn of_several_inferences_the_worst_counts() {
    let outcomes = [Outcome::Good, Outcome::Failed, Outcome::Overloaded];
    assert_eq!(outcomes.into_iter().max(), Some(Outcome::Failed));
}

#[test]
fn nothing_is_known_after_three_intervals_without_a_report() {
    let settings = ProbeSettings::default();
    let mut pair = Pair::default();
    for failure in 1..=3 {
        pair.record(Outcome::Failed, &settings, NOW + failure * SECOND);
    }
    assert_eq!(pair.seen(&settings, NOW + 18 * SECOND), Seen::Failed);
    let later = NOW + 18 * SECOND + Duration::from_nanos(1);
    assert_eq!(pair.seen(&settings, later), Seen::Unknown);
    pair.record(Outcome::Failed, &settings, later);
    assert_eq!(pair.seen(&settings, later), Seen::Failing, "the failures before the silence do not count");
}

/// From the death of a gateway, just after it answered, to its failure.
fn time_to_fail(outcome: Outcome, noticed: bool) -> Duration {
    let settings = ProbeSettings::default();
    let takes = if outcome == Outcome::Failed { settings.timeout } else { Duration::ZERO };
    let mut schedule = Schedule::new(settings.clone(), NOW);
    let mut pair = Pair::default();
    schedule.begin(NOW);
    schedule.end(Outcome::Good);
    pair.record(Outcome::Good, &settings, NOW);
    if noticed {
        schedule.nudge(NOW + SECOND);
    }
    loop {
        let began = schedule.due();
        schedule.begin(began);
        schedule.end(outcome);
        pair.record(outcome, &settings, began + takes);
        if pair.seen(&settings, began + takes) == Seen::Failed {
            return began + takes - NOW;
        }
    }
}

#[test]
fn a_dead_gateway_fails_within_the_times_of_the_module_doc() {
    assert_eq!(time_to_fail(Outcome::Failed, false), 17 * SECOND);
    assert_eq!(time_to_fail(Outcome::Refused, false), 7 * SECOND);
    assert_eq!(time_to_fail(Outcome::Refused, true), 3 * SECOND, "noticed after one, failed two later");
    assert_eq!(time_to_fail(Outcome::Failed, true), 13 * SECOND, "silence alone does not hurry it");
}

#[test]
fn a_gateway_that_has_failed_is_probed_at_the_usual_interval() {
    let mut schedule = Schedule::new(ProbeSettings::default(), NOW);
    let mut begins = Vec::new();
    for _ in 0..5 {
        begins.push((schedule.due() - NOW).as_secs());
        schedule.begin(schedule.due());
        schedule.end(Outcome::Refused);
    }
    assert_eq!(begins, [0, 1, 2, 7, 12]);
}

#[test]
fn a_nudge_is_for_now_but_not_within_a_second_of_the_last_probe() {
    let mut schedule = Schedule::new(ProbeSettings::default(), NOW);
    schedule.begin(NOW);
    schedule.nudge(NOW + SECOND / 2);
    assert_eq!(schedule.due(), NOW + SECOND);
    schedule.begin(NOW + SECOND);
    schedule.nudge(NOW + 4 * SECOND);
    assert_eq!(schedule.due(), NOW + 4 * SECOND);
    let mut idle = Schedule::new(ProbeSettings::default(), NOW);
    idle.nudge(NOW - SECOND);
    assert_eq!(idle.due(), NOW - SECOND, "a first probe need not wait for its turn");
}

fn outcomes() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        3 => Just(Outcome::Good),
        1 => Just(Outcome::Overloaded),
        3 => Just(Outcome::Failed),
        2 => Just(Outcome::Refused),
    ]
}

proptest! {
    /// What is seen is what the list of all reports says.
    #[test]
    fn a_pair_is_its_last_reports(reports in proptest::collection::vec((outcomes(), 0..20_u32), 0..60), wait in 0..20_u32) {
        let settings = ProbeSettings::default();
        let (mut pair, mut now) = (Pair::default(), NOW);
        let mut list: Vec<Outcome> = Vec::new();
        for (outcome, after) in reports {
            now += after * SECOND;
            if after > 15 {
                list.clear();
            }
            list.push(outcome);
            pair.record(outcome, &settings, now);
        }
        let failures = list.iter().rev().take_while(|outcome| outcome.is_failure()).count();
        let clean = list.iter().rev().take_while(|outcome| **outcome == Outcome::Good).count();
        let expected = match failures {
            _ if list.is_empty() || wait > 15 => Seen::Unknown,
            0 => Seen::Answering,
            1 | 2 => Seen::Failing,
            _ => Seen::Failed,
        };
        prop_assert_eq!(pair.seen(&settings, now + wait * SECOND), expected);
        prop_assert_eq!((pair.failures() as usize, pair.clean() as usize), (failures, clean));
    }

    /// However it is nudged and whatever comes back: a second between probes at least, five at most.
    #[test]
    fn probes_are_neither_too_many_nor_too_few(steps in proptest::collection::vec((outcomes(), 0..12_u32), 1..100)) {
        let mut schedule = Schedule::new(ProbeSettings::default(), NOW);
        let mut last: Option<Duration> = None;
        for (outcome, nudge) in steps {
            if let Some(last) = last
                && nudge < 6
            {
                schedule.nudge(last + nudge * SECOND);
            }
            let begins = schedule.due();
            if let Some(last) = last {
                prop_assert!((SECOND..=5 * SECOND).contains(&(begins - last)));
            }
            schedule.begin(begins);
            schedule.end(outcome);
            last = Some(begins);
        }
    }
}
