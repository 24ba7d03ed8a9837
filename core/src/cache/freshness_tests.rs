use proptest::prelude::*;

use super::*;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Stored at 100 s, fresh for 60 s, then given for 10 s while revalidated and for 30 s if the model fails.
const TIMES: Times = Times { stored: Duration::from_secs(100), fresh_until: Duration::from_secs(160) };
const LIFETIMES: Lifetimes = Lifetimes {
    ttl: Duration::from_secs(60),
    stale_while_revalidate: Duration::from_secs(10),
    stale_if_error: Duration::from_secs(30),
};

const GOOD: Answer<'_> =
    Answer { end: End::Whole, model_version: Some("1"), degraded: None, feature_age: None, took: Duration::ZERO };

fn store(answer: Answer<'_>, fresh_for: Option<Duration>) -> Result<Duration, WhyNot> {
    may_store(&answer, "1", fresh_for, &LIFETIMES, &Wish::default())
}

#[test]
fn an_answer_without_features_is_fresh_for_the_ttl() {
    assert_eq!(store(GOOD, None), Ok(LIFETIMES.ttl));
}

#[test]
fn t09_errors_partial_late_and_degraded_answers_are_not_stored() {
    for (answer, why) in [
        (Answer { end: End::Error, ..GOOD }, WhyNot::Error),
        (Answer { end: End::Partial, ..GOOD }, WhyNot::Partial),
        (Answer { end: End::DeadlineExceeded, ..GOOD }, WhyNot::DeadlineExceeded),
        (Answer { degraded: Some("1 stale-feature"), ..GOOD }, WhyNot::Degraded),
        (Answer { degraded: Some(""), ..GOOD }, WhyNot::Degraded),
        (Answer { model_version: None, ..GOOD }, WhyNot::UnknownVersion),
        (Answer { model_version: Some(""), ..GOOD }, WhyNot::UnknownVersion),
    ] {
        assert_eq!(store(answer, None), Err(why), "{answer:?}");
    }
    let no_store = Wish { no_store: true, ..Wish::default() };
    assert_eq!(may_store(&GOOD, "1", None, &LIFETIMES, &no_store), Err(WhyNot::NoStore));
}

#[test]
fn t12_an_answer_of_another_version_is_not_stored() {
    let answer = Answer { model_version: Some("2"), ..GOOD };
    assert_eq!(store(answer, None), Err(WhyNot::OtherVersion));
    assert_eq!(may_store(&answer, "2", None, &LIFETIMES, &Wish::default()), Ok(LIFETIMES.ttl));
}

#[test]
fn an_answer_is_fresh_no_longer_than_its_features() {
    let of = |age, took| Answer { feature_age: Some(seconds(age)), took: seconds(took), ..GOOD };
    assert_eq!(store(of(0, 0), Some(seconds(600))), Ok(seconds(60)));
    assert_eq!(store(of(570, 0), Some(seconds(600))), Ok(seconds(30)));
    assert_eq!(store(of(570, 1), Some(seconds(600))), Ok(seconds(29)), "the age was told some time ago");
    assert_eq!(store(of(600, 0), Some(seconds(600))), Err(WhyNot::NoTimeLeft));
    let forever = Answer { feature_age: Some(Duration::MAX), took: Duration::MAX, ..GOOD };
    assert_eq!(store(forever, Some(Duration::MAX)), Err(WhyNot::NoTimeLeft));
    assert_eq!(store(GOOD, Some(seconds(600))), Err(WhyNot::UnknownFeatures), "no age is told");
    assert_eq!(store(of(1, 0), None), Err(WhyNot::UnknownFeatures), "the sidecar knows another manifest");
    let off = Lifetimes { ttl: Duration::ZERO, ..LIFETIMES };
    assert_eq!(may_store(&GOOD, "1", None, &off, &Wish::default()), Err(WhyNot::NoTimeLeft));
}

#[test]
fn an_entry_ages_from_fresh_to_expired() {
    for (now, verdict) in [
        (0, Verdict::Fresh),
        (100, Verdict::Fresh),
        (159, Verdict::Fresh),
        (160, Verdict::Revalidate),
        (169, Verdict::Revalidate),
        (170, Verdict::IfError),
        (189, Verdict::IfError),
        (190, Verdict::Expired),
        (u64::MAX, Verdict::Expired),
    ] {
        assert_eq!(TIMES.verdict(seconds(now), &LIFETIMES, &Wish::default()), verdict, "at {now} s");
    }
    assert_eq!(TIMES.end(&LIFETIMES), seconds(190));
    let swapped = Lifetimes { stale_while_revalidate: seconds(30), stale_if_error: seconds(10), ..LIFETIMES };
    assert_eq!(TIMES.verdict(seconds(189), &swapped, &Wish::default()), Verdict::Revalidate);
    assert_eq!(TIMES.verdict(seconds(160), &Lifetimes::default(), &Wish::default()), Verdict::Expired);
}

#[test]
fn a_wish_narrows_what_will_do() {
    let wish = Wish::default();
    let no_cache = Wish { no_cache: true, ..wish };
    let max_age = |time| Wish { max_age: Some(seconds(time)), ..wish };
    let max_stale = |time| Wish { max_stale: Some(seconds(time)), ..wish };
    let min_fresh = |time| Wish { min_fresh: Some(seconds(time)), ..wish };
    for (now, wish, verdict) in [
        (120, no_cache, Verdict::Refused),
        (165, no_cache, Verdict::Expired),
        (120, max_age(20), Verdict::Fresh),
        (121, max_age(20), Verdict::Refused),
        (100, max_age(0), Verdict::Fresh),
        (165, max_age(1_000), Verdict::Expired),
        (165, Wish { max_stale: Some(seconds(5)), ..max_age(1_000) }, Verdict::Revalidate),
        (165, Wish { max_stale: Some(seconds(5)), ..max_age(64) }, Verdict::Expired),
        (165, max_stale(5), Verdict::Revalidate),
        (166, max_stale(5), Verdict::Expired),
        (175, Wish { max_stale: Some(Duration::MAX), ..wish }, Verdict::IfError),
        (190, Wish { max_stale: Some(Duration::MAX), ..wish }, Verdict::Expired),
        (120, min_fresh(40), Verdict::Fresh),
        (121, min_fresh(40), Verdict::Refused),
        (160, min_fresh(0), Verdict::Expired),
        (120, Wish { no_store: true, only_if_cached: true, ..wish }, Verdict::Fresh),
    ] {
        assert_eq!(TIMES.verdict(seconds(now), &LIFETIMES, &wish), verdict, "at {now} s with {wish:?}");
    }
}

#[test]
fn age_and_ttl_are_told_in_whole_seconds() {
    let at = |millis| (TIMES.age(Duration::from_millis(millis)).as_secs(), TIMES.ttl(Duration::from_millis(millis)));
    assert_eq!(at(100_000), (0, 60));
    assert_eq!(at(100_500), (0, 59), "never more than there is");
    assert_eq!(at(160_000), (60, 0));
    assert_eq!(at(160_001), (60, -1));
    assert_eq!(at(99_000), (0, 61), "the clock of another thread is behind");
    let endless = Times { stored: Duration::ZERO, fresh_until: Duration::MAX };
    assert_eq!(endless.ttl(Duration::ZERO), i64::MAX);
    assert_eq!(Times { fresh_until: Duration::ZERO, ..endless }.ttl(Duration::MAX), -i64::MAX);
}

#[test]
fn jitter_spreads_ends_over_a_tenth_of_the_ttl() {
    assert_eq!(jittered(seconds(100), 0), seconds(100));
    assert_eq!(jittered(seconds(100), u64::MAX / 2), Duration::from_nanos(95_000_000_001));
    assert_eq!(jittered(seconds(100), u64::MAX), Duration::from_nanos(90_000_000_001));
    assert_eq!(jittered(Duration::ZERO, u64::MAX), Duration::ZERO);
    assert!(jittered(Duration::MAX, u64::MAX) <= Duration::MAX);
    let times = Times::new(seconds(5), seconds(100), u64::MAX / 2);
    assert_eq!((times.stored, times.fresh_until.as_secs()), (seconds(5), 100));
    assert_eq!(Times::new(Duration::MAX, Duration::MAX, 0).fresh_until, Duration::MAX);
}

fn wishes() -> impl Strategy<Value = Wish> {
    let time = || proptest::option::of((0_u64..100).prop_map(seconds));
    let flags = any::<(bool, bool, bool)>();
    (flags, time(), time(), time()).prop_map(|((no_cache, no_store, only_if_cached), max_age, max_stale, min_fresh)| {
        Wish { no_cache, no_store, only_if_cached, max_age, max_stale, min_fresh }
    })
}

/// How much of the model's work an answer from the store saves; what gives none last.
fn rank(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Fresh => 0,
        Verdict::Revalidate => 1,
        Verdict::IfError => 2,
        Verdict::Expired | Verdict::Refused => 3,
    }
}

proptest! {
    #[test]
    fn jitter_never_lengthens(ttl: u64, random: u64) {
        let ttl = Duration::from_nanos(ttl);
        let jittered = jittered(ttl, random);
        prop_assert!(jittered <= ttl && jittered >= ttl - ttl / 10);
    }

    #[test]
    fn no_wish_gets_more_than_none_and_no_entry_gets_better_with_time(
        wish in wishes(), now in 0_u64..250, later in 0_u64..250, times in (0_u64..100, 0_u64..100),
        stale in (0_u64..60, 0_u64..60),
    ) {
        let entry = Times { stored: seconds(times.0), fresh_until: seconds(times.0 + times.1) };
        let (stale_while_revalidate, stale_if_error) = (seconds(stale.0), seconds(stale.1));
        let lifetimes = Lifetimes { ttl: seconds(100), stale_while_revalidate, stale_if_error };
        let at = |now: u64, wish: &Wish| rank(entry.verdict(seconds(now), &lifetimes, wish));
        prop_assert!(at(now, &wish) >= at(now, &Wish::default()));
        prop_assert!(at(now + later, &wish) >= at(now, &wish));
        let ended = seconds(now) >= entry.end(&lifetimes);
        prop_assert_eq!(ended, entry.verdict(seconds(now), &lifetimes, &Wish::default()) == Verdict::Expired);
    }
}
