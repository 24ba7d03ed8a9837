use std::num::NonZeroU32;

use governor::clock::{Clock, FakeRelativeClock};
use governor::{Quota, RateLimiter};
use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn per_second(tokens: u64) -> Rate {
    Rate { tokens, per: Duration::from_secs(1) }
}

fn bucket(tokens: u64, burst: u32) -> Gcra {
    Gcra::new(per_second(tokens), burst, Reserves::default()).unwrap()
}

/// Decides, keeps the state, and says whether the request was admitted.
fn take(gcra: &Gcra, state: &mut u64, now_ns: u64, cost: u32, class: Class) -> bool {
    let decision = gcra.decide(*state, now_ns, cost, class);
    if let Decision::Admitted { state: next, .. } = decision {
        *state = next;
    }
    matches!(decision, Decision::Admitted { .. })
}

/// Requests of cost 1 that are admitted at one moment.
fn drain(gcra: &Gcra, state: &mut u64, now_ns: u64, class: Class) -> u32 {
    (0..).take_while(|_| take(gcra, state, now_ns, 1, class)).count().try_into().unwrap()
}

#[test]
fn t55_a_bucket_is_exact_at_its_boundary() {
    for (tokens, burst) in [(1, 1), (3, 7), (1_000, 50), (7_777_777, 1_000), (FASTEST, 9)] {
        let gcra = bucket(tokens, burst);
        let (mut state, now) = (0, 5 * SECOND);
        assert_eq!(drain(&gcra, &mut state, now, Class::Critical), burst, "a full bucket of {burst}");
        let Decision::Refused { retry_after, remaining: 0 } = gcra.decide(state, now, 1, Class::Critical) else {
            panic!("an empty bucket admits")
        };
        let wait = u64::try_from(retry_after.as_nanos()).unwrap();
        assert_eq!(wait, SECOND.div_ceil(tokens), "one token's time");
        assert!(!take(&gcra, &mut state, now + wait - 1, 1, Class::Critical), "a nanosecond early");
        assert!(take(&gcra, &mut state, now + wait, 1, Class::Critical), "on time");
        assert!(!take(&gcra, &mut state, now + wait, 1, Class::Critical));
        let full = now + wait + gcra.fill();
        assert_eq!(drain(&gcra, &mut state, full, Class::Critical), burst, "full again, and no more than full");
    }
}

#[test]
fn costs_are_all_or_nothing() {
    let gcra = bucket(10, 10);
    let mut state = 0;
    assert!(take(&gcra, &mut state, SECOND, 7, Class::Critical));
    let second = Duration::from_secs(1);
    assert_eq!(
        gcra.decide(state, SECOND, 7, Class::Critical),
        Decision::Refused { retry_after: second.mul_f64(0.4), remaining: 3 }
    );
    let empty = gcra.decide(state, SECOND, 3, Class::Critical);
    assert_eq!(empty, Decision::Admitted { state: 2 * SECOND, remaining: 0, full_after: second });
    assert_eq!(gcra.decide(state, SECOND, 11, Class::Critical), Decision::Never { remaining: 3 });
    assert_eq!(gcra.decide(state, 0, u32::MAX, Class::Low), Decision::Never { remaining: 0 });
    assert_eq!(Decision::Never { remaining: 0 }.reset(), None);
}

#[test]
fn a_request_that_costs_nothing_changes_nothing() {
    let gcra = bucket(1, 1);
    for state in [0, SECOND, u64::MAX] {
        let decision = gcra.decide(state, SECOND, 0, Class::Low);
        assert!(matches!(decision, Decision::Admitted { state: same, .. } if same == state));
    }
}

#[test]
fn a_clock_that_steps_back_gives_nothing() {
    let gcra = bucket(10, 5);
    let mut state = 0;
    assert_eq!(drain(&gcra, &mut state, 10 * SECOND, Class::Critical), 5);
    assert_eq!(drain(&gcra, &mut state, 9 * SECOND, Class::Critical), 0);
    assert_eq!(drain(&gcra, &mut state, 0, Class::Critical), 0);
    assert_eq!(drain(&gcra, &mut state, 10 * SECOND + SECOND / 10, Class::Critical), 1);
}

#[test]
fn each_class_leaves_a_reserve_for_those_above() {
    let gcra = bucket(1, 100);
    let mut state = 0;
    for (class, taken) in [(Class::Low, 50), (Class::Normal, 30), (Class::High, 10), (Class::Critical, 10)] {
        assert_eq!(gcra.remaining(state, 0, class), taken);
        assert_eq!(drain(&gcra, &mut state, 0, class), taken, "{class}");
        assert_eq!(gcra.remaining(state, 0, class), 0);
    }
}

#[test]
fn nothing_is_left_for_classes_that_do_not_come() {
    let reserves = Reserves::default();
    assert_eq!(reserves.up_to(Class::Critical), reserves);
    assert_eq!(reserves.up_to(Class::Normal), Reserves { critical: 0, high: 0, normal: 0, low: 30 });
    let gcra = Gcra::new(per_second(1), 10, reserves.up_to(Class::Normal)).unwrap();
    assert_eq!(drain(&gcra, &mut 0, 0, Class::Normal), 10);
}

#[test]
fn every_class_can_enter_a_full_bucket() {
    let all = Reserves { critical: 100, high: 100, normal: 100, low: 100 };
    for reserves in [Reserves::default(), all] {
        for burst in 1..20 {
            let gcra = Gcra::new(per_second(1), burst, reserves).unwrap();
            for class in Class::ALL {
                assert!((1..=burst).all(|cost| take(&gcra, &mut 0, 0, cost, class)), "{class} into {burst}");
            }
        }
    }
}

/// Tokens that each class got in 100 s of offering `factor` times the rate, as a share of the rate.
fn shares(gcra: &Gcra, rate: u64, offers: &[(Class, f64)]) -> Vec<f64> {
    let (mut state, mut got) = (0, vec![0.0; offers.len()]);
    let mut due = vec![0.0_f64; offers.len()];
    let end = 100 * SECOND;
    while let Some((index, now)) = due.iter().copied().enumerate().min_by(|a, b| a.1.total_cmp(&b.1)) {
        if now >= end as f64 {
            break;
        }
        let (class, factor) = offers[index];
        if take(gcra, &mut state, now as u64, 1, class) {
            got[index] += 1.0 / (rate * 100) as f64;
        }
        due[index] += SECOND as f64 / (rate as f64 * factor);
    }
    got
}

#[test]
fn critical_gets_its_rate_however_much_low_asks_for() {
    let gcra = bucket(100, 50);
    let both = shares(&gcra, 100, &[(Class::Low, 2.0), (Class::Critical, 2.0)]);
    assert!(both[1] >= 0.99, "critical could use the whole rate and got {}", both[1]);
    assert!(both[0] <= 0.01, "low gets what is left: {}", both[0]);
    let half = shares(&gcra, 100, &[(Class::Low, 2.0), (Class::Critical, 0.5)]);
    assert!(half[1] >= 0.499 && half[0] >= 0.49, "low gets what critical leaves: {half:?}");
    let storm = shares(&gcra, 100, &[(Class::Low, 20.0), (Class::Normal, 5.0), (Class::Critical, 0.9)]);
    assert!(storm[2] >= 0.899, "{storm:?}");
}

#[test]
fn low_gets_the_whole_rate_while_nobody_else_asks() {
    for burst in [1, 2, 3, 50] {
        let low = shares(&bucket(100, burst), 100, &[(Class::Low, 2.0)]);
        assert!(low[0] >= 0.99, "burst {burst}: {low:?}");
    }
}

#[test]
fn a_changed_limit_keeps_the_fraction_used() {
    let (old, new) = (bucket(10, 100), bucket(40, 20));
    let now = 100 * SECOND;
    let quarter = now + old.fill() / 4;
    assert_eq!(old.remaining(quarter, now, Class::Critical), 75);
    assert_eq!(new.remaining(old.rescale(quarter, now, &new), now, Class::Critical), 15);
    assert_eq!(new.remaining(old.rescale(0, now, &new), now, Class::Critical), 20, "full stays full");
    let empty = now + old.fill();
    assert_eq!(new.remaining(old.rescale(empty, now, &new), now, Class::Critical), 0, "empty stays empty");
    assert_eq!(old.rescale(quarter, now, &old), quarter);
}

#[test]
fn a_slice_cut_anew_keeps_its_tokens_up_to_its_burst() {
    let (old, new) = (bucket(10, 100), bucket(40, 20));
    let now = 100 * SECOND;
    for (held, kept) in [(100, 20), (20, 20), (19, 19), (1, 1), (0, 0)] {
        let state = now + old.span(100 - held);
        assert_eq!(new.remaining(old.carry(state, now, &new), now, Class::Critical), kept);
    }
    let small = now + new.span(5);
    assert_eq!(old.remaining(new.carry(small, now, &old), now, Class::Critical), 15, "a larger one is not filled");
}

#[test]
fn t62_a_limit_that_means_nothing_is_refused() {
    let day = Duration::from_secs(86_400);
    for (tokens, per, burst, fault) in [
        (0, day, 1, InvalidLimit::NoRate),
        (1, Duration::ZERO, 1, InvalidLimit::NoRate),
        (1, day, 0, InvalidLimit::NoBurst),
        (1, Duration::from_nanos(99), 1, InvalidLimit::TooFast),
        (u64::MAX, day, 1, InvalidLimit::TooFast),
        (1, day, 367, InvalidLimit::TooSlow),
        (1, Duration::MAX, 1, InvalidLimit::TooSlow),
        (1, day, u32::MAX, InvalidLimit::TooSlow),
    ] {
        assert_eq!(Gcra::new(Rate { tokens, per }, burst, Reserves::default()), Err(fault));
    }
    let reserves = Reserves { low: 101, ..Reserves::default() };
    assert_eq!(Gcra::new(per_second(1), 1, reserves), Err(InvalidLimit::ReserveAboveWhole));
    assert!(Gcra::new(Rate { tokens: 1, per: day }, 366, Reserves::default()).is_ok());
}

#[test]
fn rates_are_told_in_thousandths() {
    assert_eq!(per_second(5).milli_per_second(), 5_000);
    assert_eq!(Rate { tokens: 1, per: Duration::from_secs(60) }.milli_per_second(), 16);
    assert_eq!(Rate { tokens: 1, per: Duration::ZERO }.milli_per_second(), 0);
    assert_eq!(Rate { tokens: u64::MAX, per: Duration::from_nanos(1) }.milli_per_second(), u64::MAX);
}

fn any_bucket() -> impl Strategy<Value = Gcra> {
    (1_u64..=FASTEST, 1_u64..100, 1_u32..2_000).prop_map(|(tokens, seconds, burst)| {
        let rate = Rate { tokens, per: Duration::from_secs(seconds) };
        Gcra::new(rate, burst, Reserves::default()).unwrap()
    })
}

proptest! {
    /// One class without reserves admits exactly what the `governor` crate admits, and says the same wait.
    #[test]
    fn admits_exactly_what_governor_admits(
        interval in 100_u64..10_000_000,
        burst in 1_u32..40,
        requests in proptest::collection::vec((0_u64..4_000, 1_u32..50), 1..80),
    ) {
        let per = Duration::from_nanos(interval);
        let gcra = Gcra::new(Rate { tokens: 1, per }, burst, Reserves::default()).unwrap();
        let quota = Quota::with_period(per).unwrap().allow_burst(NonZeroU32::new(burst).unwrap());
        let clock = FakeRelativeClock::default();
        let governor = RateLimiter::direct_with_clock(quota, clock.clone());
        let (mut state, mut now) = (0, 0);
        for (thousandths, cost) in requests {
            let passed = interval * thousandths / 1_000;
            clock.advance(Duration::from_nanos(passed));
            now += passed;
            let decision = gcra.decide(state, now, cost, Class::Critical);
            match governor.check_n(NonZeroU32::new(cost).unwrap()) {
                Ok(Ok(())) => {
                    prop_assert!(matches!(decision, Decision::Admitted { .. }), "{decision:?}");
                }
                Ok(Err(until)) => {
                    let retry_after = until.wait_time_from(clock.now());
                    let same = matches!(decision, Decision::Refused { retry_after: own, .. } if own == retry_after);
                    prop_assert!(same, "{decision:?}, governor says {retry_after:?}");
                }
                Err(_) => prop_assert!(matches!(decision, Decision::Never { .. }), "{decision:?}"),
            }
            if let Decision::Admitted { state: next, .. } = decision {
                state = next;
            }
        }
    }

    /// Whatever the state, the clock and the class: what is said to remain can be taken, and no more; a
    /// refusal's wait is exact; nobody takes another class's reserve.
    #[test]
    fn what_is_said_holds(
        gcra in any_bucket(), debt in 0_u64..3_000, now in 0_u64..1 << 60, cost in 1_u32..2_100, class in 0_usize..4,
    ) {
        let class = Class::ALL[class];
        let state = now.saturating_add(gcra.fill() / 1_000 * debt);
        let remaining = gcra.remaining(state, now, class);
        let mut drained = state;
        prop_assert_eq!(drain(&gcra, &mut drained, now, class), remaining);
        match gcra.decide(state, now, cost, class) {
            Decision::Admitted { state: next, full_after, .. } => {
                prop_assert_eq!(next, state.max(now) + gcra.span(cost));
                prop_assert_eq!(gcra.remaining(next, next, Class::Critical), gcra.burst());
                prop_assert_eq!(u128::from(next - now), full_after.as_nanos());
                let kept = gcra.remaining(next, now, Class::Critical);
                prop_assert!(kept >= gcra.reserve(class, cost));
            }
            Decision::Refused { retry_after, .. } => {
                let then = now + u64::try_from(retry_after.as_nanos()).unwrap();
                prop_assert!(!take(&gcra, &mut state.clone(), then - 1, cost, class));
                prop_assert!(take(&gcra, &mut state.clone(), then, cost, class));
            }
            Decision::Never { .. } => prop_assert!(cost > gcra.burst()),
        }
    }

    /// Neither change of a bucket makes tokens: not in sum, not above the burst, not by rounding.
    #[test]
    fn changing_a_bucket_makes_no_tokens(
        old in any_bucket(), new in any_bucket(), debt in 0_u64..3_000, now in 0_u64..1 << 60,
    ) {
        let state = now.saturating_add(old.fill() / 1_000 * debt);
        let held = old.remaining(state, now, Class::Critical);
        let carried = new.remaining(old.carry(state, now, &new), now, Class::Critical);
        prop_assert!(carried <= held.min(new.burst()) && held.min(new.burst()) <= carried + 1);
        let rescaled = new.remaining(old.rescale(state, now, &new), now, Class::Critical);
        let fraction = |tokens: u32, of: &Gcra| f64::from(tokens) / f64::from(of.burst());
        prop_assert!(fraction(rescaled, &new) <= fraction(held + 1, &old));
        prop_assert!(fraction(rescaled + 1, &new) >= fraction(held, &old) - 1e-9);
    }

    /// No input panics or admits from an empty bucket.
    #[test]
    fn no_state_or_clock_is_too_large(
        gcra in any_bucket(), new in any_bucket(), state in any::<u64>(), now in any::<u64>(), cost in any::<u32>(),
    ) {
        for class in Class::ALL {
            let _ = gcra.decide(state, now, cost, class);
        }
        let _ = (gcra.rescale(state, now, &new), gcra.carry(state, now, &new));
    }
}
