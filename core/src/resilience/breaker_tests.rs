use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const NOW: Duration = Duration::from_secs(100);

fn breaker() -> Breaker {
    Breaker::new(BreakerSettings::default())
}

fn call(breaker: &mut Breaker, outcome: Outcome, now: Duration) -> Option<BreakerState> {
    let permit = breaker.permit(now).expect("allowed");
    breaker.record(permit, outcome, now)
}

fn calls(breaker: &mut Breaker, outcome: Outcome, times: u32, now: Duration) -> Option<BreakerState> {
    (0..times).filter_map(|_| call(breaker, outcome, now)).last()
}

fn opened(now: Duration) -> (Breaker, Duration) {
    let mut breaker = breaker();
    let open = calls(&mut breaker, Outcome::Failure, 20, now);
    assert_eq!(open, Some(BreakerState::Open { until: now + 30 * SECOND }));
    (breaker, now + 30 * SECOND)
}

#[test]
fn opens_when_half_of_the_last_hundred_failed() {
    let mut breaker = breaker();
    assert_eq!(calls(&mut breaker, Outcome::Success, 1_000, NOW), None);
    assert_eq!(calls(&mut breaker, Outcome::Failure, 49, NOW), None);
    assert_eq!(breaker.state(), BreakerState::Closed { calls: 100, failures: 49 });
    assert!(call(&mut breaker, Outcome::Timeout, NOW).is_some());
    assert_eq!(breaker.permit(NOW + 30 * SECOND - Duration::from_nanos(1)).unwrap_err().until, NOW + 30 * SECOND);
}

#[test]
fn opens_after_twenty_calls_at_the_earliest() {
    let mut breaker = breaker();
    assert_eq!(calls(&mut breaker, Outcome::Failure, 10, NOW), None);
    assert_eq!(calls(&mut breaker, Outcome::Success, 9, NOW), None);
    assert!(call(&mut breaker, Outcome::Success, NOW).is_some(), "half of twenty, whichever is the last");
}

#[test]
fn overload_client_errors_and_cancelled_calls_count_as_neither() {
    let mut breaker = breaker();
    calls(&mut breaker, Outcome::Failure, 19, NOW);
    for outcome in [Outcome::Overload, Outcome::ClientError, Outcome::Cancelled] {
        assert_eq!(calls(&mut breaker, outcome, 200, NOW), None);
    }
    assert_eq!(breaker.state(), BreakerState::Closed { calls: 19, failures: 19 });
}

#[test]
fn closes_when_most_of_ten_probes_are_good_and_all_have_ended() {
    let (mut breaker, until) = opened(NOW);
    assert!(!breaker.allows(until - SECOND));
    let probes: Vec<Permit> = (0..10).map(|_| breaker.permit(until).unwrap()).collect();
    assert!(probes.iter().all(Permit::is_probe));
    assert!(!breaker.allows(until), "ten at most");
    for (number, probe) in probes.into_iter().enumerate() {
        assert!(matches!(breaker.state(), BreakerState::HalfOpen { .. }));
        let outcome = if number < 4 { Outcome::Failure } else { Outcome::Success };
        let closed = breaker.record(probe, outcome, until);
        assert_eq!(closed.is_some(), number == 9);
    }
    assert_eq!(breaker.state(), BreakerState::Closed { calls: 0, failures: 0 });
}

#[test]
fn opens_again_at_the_fifth_bad_probe() {
    let (mut breaker, until) = opened(NOW);
    assert_eq!(calls(&mut breaker, Outcome::Failure, 4, until), None);
    let open = call(&mut breaker, Outcome::Failure, until);
    assert_eq!(open, Some(BreakerState::Open { until: until + 30 * SECOND }), "for the same time");
}

#[test]
fn probes_that_say_nothing_are_given_back() {
    let (mut breaker, until) = opened(NOW);
    let probes: Vec<Permit> = (0..10).map(|_| breaker.permit(until).unwrap()).collect();
    for (probe, outcome) in probes.into_iter().zip([Outcome::Cancelled, Outcome::Overload].into_iter().cycle()) {
        assert!(!breaker.allows(until));
        assert_eq!(breaker.record(probe, outcome, until), None);
        let _again = breaker.permit(until).expect("its place is free");
    }
}

#[test]
fn lost_probes_are_replaced_after_the_time_of_an_opening() {
    let (mut breaker, until) = opened(NOW);
    let lost: Vec<Permit> = (0..10).map(|_| breaker.permit(until).unwrap()).collect();
    assert_eq!(breaker.permit(until).unwrap_err(), Refused { until: until + 30 * SECOND });
    let later = until + 30 * SECOND;
    assert!(calls(&mut breaker, Outcome::Success, 10, later).is_some());
    for permit in lost {
        assert_eq!(breaker.record(permit, Outcome::Failure, later), None);
    }
    assert_eq!(breaker.state(), BreakerState::Closed { calls: 0, failures: 0 });
}

#[test]
fn permits_of_an_older_period_do_not_count() {
    let mut breaker = breaker();
    let early: Vec<Permit> = (0..40).map(|_| breaker.permit(NOW).unwrap()).collect();
    calls(&mut breaker, Outcome::Failure, 20, NOW);
    let until = NOW + 30 * SECOND;
    let probe = breaker.permit(until).unwrap();
    for permit in early {
        assert_eq!(breaker.record(permit, Outcome::Failure, until), None);
    }
    assert!(matches!(breaker.state(), BreakerState::HalfOpen { calls: 0, failures: 0, under_way: 1, .. }));
    assert_eq!(breaker.record(probe, Outcome::Success, until), None);
}

#[test]
fn probes_of_an_ejected_pod_do_not_add_up() {
    let mut breaker = breaker();
    calls(&mut breaker, Outcome::Failure, 5, NOW);
    for round in 1..100 {
        assert_eq!(call(&mut breaker, Outcome::Failure, NOW + round * 8 * SECOND), None);
    }
    assert_eq!(breaker.state(), BreakerState::Closed { calls: 1, failures: 1 });
}

#[test]
fn settings_beyond_their_bounds_are_cut() {
    let settings = BreakerSettings { window: 1_000, minimum: 0, probes: 0, ..BreakerSettings::default() };
    let mut breaker = Breaker::new(settings);
    assert!(call(&mut breaker, Outcome::Failure, NOW).is_some());
    assert!(call(&mut breaker, Outcome::Success, NOW + 30 * SECOND).is_some(), "one probe");
    calls(&mut breaker, Outcome::Success, 1_000, NOW + 30 * SECOND);
    assert_eq!(breaker.state(), BreakerState::Closed { calls: 128, failures: 0 });
    let never = BreakerSettings { failure_ratio: f64::NAN, ..BreakerSettings::default() };
    assert_eq!(calls(&mut Breaker::new(never), Outcome::Failure, 1_000, NOW), None);
}

/// The rules once more, word by word, with lists for counters.
struct Model {
    ended: VecDeque<bool>,
    last: Duration,
    open_until: Option<Duration>,
    probes: Option<Vec<bool>>,
}

impl Model {
    /// Whether the state changed.
    fn record(&mut self, failed: bool, now: Duration) -> bool {
        if let Some(probes) = &mut self.probes {
            probes.push(failed);
            let bad = probes.iter().filter(|bad| **bad).count();
            let changed = bad >= 2 || probes.len() == 4;
            if bad >= 2 {
                self.open_until = Some(now + 30 * SECOND);
            }
            if changed {
                self.probes = None;
                self.ended.clear();
            }
            return changed;
        }
        if now.saturating_sub(self.last) > 5 * SECOND {
            self.ended.clear();
        }
        self.last = self.last.max(now);
        self.ended.push_back(failed);
        if self.ended.len() > 10 {
            self.ended.pop_front();
        }
        let bad = self.ended.iter().filter(|bad| **bad).count();
        let opens = self.ended.len() >= 4 && bad * 2 >= self.ended.len();
        if opens {
            self.open_until = Some(now + 30 * SECOND);
        }
        opens
    }
}

proptest! {
    /// Call by call it does what the rules say.
    #[test]
    fn agrees_with_the_rules(steps in proptest::collection::vec((0..3_u8, 0..8_000_u64), 1..200)) {
        let settings = BreakerSettings { window: 10, minimum: 4, probes: 4, ..BreakerSettings::default() };
        let mut breaker = Breaker::new(settings);
        let mut model = Model { ended: VecDeque::new(), last: Duration::ZERO, open_until: None, probes: None };
        let mut now = NOW;
        for (kind, millis) in steps {
            now += Duration::from_millis(millis);
            if model.open_until.is_some_and(|until| now >= until) {
                model.open_until = None;
                model.probes = Some(Vec::new());
            }
            prop_assert_eq!(breaker.allows(now), model.open_until.is_none());
            let Ok(permit) = breaker.permit(now) else { continue };
            prop_assert_eq!(permit.is_probe(), model.probes.is_some());
            let outcome = [Outcome::Success, Outcome::Failure, Outcome::ClientError][usize::from(kind)];
            let changed = breaker.record(permit, outcome, now).is_some();
            prop_assert_eq!(changed, kind < 2 && model.record(kind == 1, now));
        }
    }

    /// However calls overlap: never more probes than allowed, and it does not stay shut.
    #[test]
    fn never_too_many_probes_nor_shut_for_ever(
        steps in proptest::collection::vec((any::<bool>(), any::<usize>(), 0..5_u8, 0..3_000_u64), 1..300),
    ) {
        let mut breaker = Breaker::new(BreakerSettings { minimum: 2, probes: 3, ..BreakerSettings::default() });
        let mut open: Vec<Permit> = Vec::new();
        let mut now = NOW;
        for (begin, index, kind, millis) in steps {
            now += Duration::from_millis(millis);
            if begin {
                let allowed = breaker.allows(now);
                let permit = breaker.permit(now);
                prop_assert_eq!(allowed, permit.is_ok());
                open.extend(permit);
            } else if !open.is_empty() {
                let outcome = [
                    Outcome::Failure, Outcome::Success, Outcome::Timeout, Outcome::Cancelled, Outcome::Overload,
                ][usize::from(kind)];
                let permit = open.swap_remove(index % open.len());
                breaker.record(permit, outcome, now);
            }
            let probes = open.iter().filter(|permit| permit.probe && permit.period == breaker.period).count();
            match breaker.state() {
                BreakerState::HalfOpen { calls, failures, under_way, .. } => {
                    prop_assert_eq!(under_way as usize, probes);
                    prop_assert!(calls + under_way <= 3 && failures <= calls);
                }
                BreakerState::Closed { calls, failures } => prop_assert!(failures <= calls && calls <= 100),
                BreakerState::Open { until } => prop_assert!(until <= now + 30 * SECOND),
            }
            prop_assert!(breaker.allows(now + 30 * SECOND));
        }
    }
}
