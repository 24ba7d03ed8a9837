use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const START: Duration = Duration::from_secs(1_000);

/// A second of a region; `requests` is what it has without trouble.
fn second(at: u64, requests: u64) -> Sample {
    let from = START + Duration::from_secs(at);
    Sample { from, to: from + SECOND, requests, ..Sample::default() }
}

fn watch() -> Watch {
    Watch::new(SoftSettings::default())
}

/// After so many seconds of this.
fn after(watch: &mut Watch, seconds: std::ops::Range<u64>, of: impl Fn(Sample) -> Sample) -> Quality {
    for at in seconds.clone() {
        watch.observe(of(second(at, 100)));
    }
    watch.quality(START + Duration::from_secs(seconds.end))
}

fn slow(sample: Sample) -> Sample {
    Sample { slow: 2, ..sample }
}

fn failing(sample: Sample) -> Sample {
    Sample { errors: 6, ..sample }
}

fn fine(sample: Sample) -> Sample {
    sample
}

#[test]
fn p99_breaks_the_rule_after_300_seconds_and_not_after_299() {
    let mut watch = watch();
    assert_eq!(after(&mut watch, 0..299, slow), Quality::Breaching);
    assert_eq!(after(&mut watch, 299..300, slow), Quality::Slow);
    assert_eq!(after(&mut watch, 300..400, slow), Quality::Slow);
    assert_eq!(after(&mut watch, 400..401, fine), Quality::Fine);
}

#[test]
fn errors_break_the_rule_after_180_seconds_and_not_after_179() {
    let mut watch = watch();
    assert_eq!(after(&mut watch, 0..179, failing), Quality::Breaching);
    assert_eq!(after(&mut watch, 179..180, failing), Quality::Failing);
    let both = |sample| slow(failing(sample));
    assert_eq!(after(&mut watch, 180..600, both), Quality::Failing, "the worse of two");
    assert_eq!(after(&mut watch, 600..601, slow), Quality::Slow);
}

#[test]
fn a_good_second_begins_the_time_anew() {
    let mut watch = watch();
    assert_eq!(after(&mut watch, 0..299, slow), Quality::Breaching);
    assert_eq!(after(&mut watch, 299..300, fine), Quality::Fine);
    assert_eq!(after(&mut watch, 300..599, slow), Quality::Breaching);
    assert_eq!(after(&mut watch, 599..600, slow), Quality::Slow);
}

#[test]
fn exactly_at_the_limits_is_within_them() {
    for requests in (20..=2_000).step_by(20) {
        let (mut watch, at_limit) = (watch(), requests / 20);
        let errors = |sample| Sample { requests, errors: at_limit, ..sample };
        assert_eq!(after(&mut watch, 0..200, errors), Quality::Fine, "5.0 % of {requests}");
        let more = |sample| Sample { requests, errors: at_limit + 1, ..sample };
        assert_eq!(after(&mut watch, 200..380, more), Quality::Failing);
    }
    for requests in (100..=2_000).step_by(100) {
        let (mut watch, at_limit) = (watch(), requests / 100);
        let slow = |sample| Sample { requests, slow: at_limit, ..sample };
        assert_eq!(after(&mut watch, 0..320, slow), Quality::Fine, "p99 of {requests} is not slow");
        let more = |sample| Sample { requests, slow: at_limit + 1, ..sample };
        assert_eq!(after(&mut watch, 320..620, more), Quality::Slow);
    }
}

/// So many requests in parts of equal length, all of them failed.
fn three_minutes_with(requests: [u64; 5]) -> Quality {
    let mut watch = watch();
    for (index, requests) in (0..).zip(requests) {
        let from = START + index * 36 * SECOND;
        watch.observe(Sample { from, to: from + 36 * SECOND, requests, errors: requests, ..Sample::default() });
    }
    watch.quality(START + 180 * SECOND)
}

#[test]
fn less_than_200_requests_say_nothing() {
    assert_eq!(three_minutes_with([39, 40, 40, 40, 40]), Quality::Breaching);
    assert_eq!(three_minutes_with([40, 40, 40, 40, 40]), Quality::Failing);
    let mut watch = watch();
    let only_slow = |at: u64, requests| Sample { slow: requests, ..second(at, requests) };
    for at in (0..300).step_by(30) {
        let sample = only_slow(at, if at == 0 { 19 } else { 20 });
        watch.observe(Sample { to: sample.from + 30 * SECOND, ..sample });
    }
    assert_eq!(watch.quality(START + 300 * SECOND), Quality::Breaching, "199");
    watch.observe(only_slow(300, 20));
    assert_eq!(watch.quality(START + 301 * SECOND), Quality::Breaching, "the first ones are over 300 s ago");
    watch.observe(only_slow(301, 20));
    assert_eq!(watch.quality(START + 302 * SECOND), Quality::Slow);
}

#[test]
fn few_requests_are_judged_together() {
    let mut watch = watch();
    let sparse = |at: u64| Sample { slow: u64::from(at.is_multiple_of(10)), ..second(at, 2) };
    (0..300).for_each(|at| watch.observe(sparse(at)));
    assert_eq!(
        watch.quality(START + 300 * SECOND),
        Quality::Slow,
        "one of each 20, not one of some 2 and none of others"
    );
}

#[test]
fn what_was_rare_and_long_ago_says_nothing() {
    let mut watch = watch();
    for at in 0..3_600 {
        watch.observe(Sample { errors: 1, ..second(at, u64::from(at % 10 == 0)) });
    }
    assert_eq!(watch.quality(START + 3_600 * SECOND), Quality::Fine);
    assert_eq!(after(&mut watch, 3_600..3_660, failing), Quality::Breaching);
}

#[test]
fn overload_is_no_reason_to_go() {
    let cases = [
        (0, None, Quality::Failing),
        (1, None, Quality::Failing),
        (2, None, Quality::Fine),
        (0, Some(0.89), Quality::Failing),
        (0, Some(0.9), Quality::Fine),
        (0, Some(5.0), Quality::Fine),
        (2, Some(0.7), Quality::Fine),
        (2, Some(0.69), Quality::Failing),
        (90, Some(0.3), Quality::Failing),
        (0, Some(f64::NAN), Quality::Failing),
        (2, Some(f64::NAN), Quality::Fine),
    ];
    for (shed, utilisation, expected) in cases {
        let busy = |sample| Sample { shed, utilisation, ..failing(slow(sample)) };
        assert_eq!(after(&mut watch(), 0..400, busy), expected, "{shed} shed of 100, {utilisation:?}");
    }
}

#[test]
fn overload_begins_the_time_anew() {
    let mut watch = watch();
    after(&mut watch, 0..170, failing);
    let full = |sample| Sample { utilisation: Some(1.2), ..failing(sample) };
    assert_eq!(after(&mut watch, 170..175, full), Quality::Fine);
    assert_eq!(after(&mut watch, 175..354, failing), Quality::Breaching);
    assert_eq!(after(&mut watch, 354..355, failing), Quality::Failing);
}

#[test]
fn silence_ends_what_was_measured() {
    let mut watch = watch();
    after(&mut watch, 0..180, failing);
    let end = START + 180 * SECOND;
    assert_eq!(watch.quality(end + 60 * SECOND), Quality::Failing);
    assert_eq!(watch.quality(end + 61 * SECOND), Quality::Fine);
    watch.observe(failing(second(241, 100)));
    assert_eq!(watch.quality(START + 242 * SECOND), Quality::Breaching);
}

#[test]
fn late_and_double_samples_are_left_out() {
    let mut watch = watch();
    after(&mut watch, 0..100, failing);
    watch.observe(second(99, 100));
    watch.observe(second(10, 100));
    assert_eq!(after(&mut watch, 100..180, failing), Quality::Failing);
}

#[test]
fn the_reason_reads_well() {
    let mut watch = watch();
    after(&mut watch, 0..180, failing);
    assert_eq!(watch.reason(), "errors: 6.0 % of 18000 requests, for 180 s; over 100 ms: within the limit");
}

#[test]
fn memory_is_bounded() {
    let mut watch = Watch::new(SoftSettings { slow_for: Duration::MAX, ..SoftSettings::default() });
    assert_eq!(after(&mut watch, 0..5_000, failing), Quality::Failing);
    assert_eq!(watch.parts.len(), MOST_PARTS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A rule is broken when each second of its time is bad, none overloaded, and there were enough requests.
    #[test]
    fn quality_is_what_the_list_of_all_seconds_says(
        phases in proptest::collection::vec((0..5_u8, 1..220_u64, 20..40_u64), 1..8),
    ) {
        let settings = SoftSettings { samples: 6_000, ..SoftSettings::default() };
        let mut watch = Watch::new(settings.clone());
        let (mut list, mut at) = (Vec::<Sample>::new(), 0);
        for (kind, seconds, requests) in phases {
            for _ in 0..seconds {
                let sample = second(at, requests);
                let sample = match kind {
                    0 => sample,
                    1 => Sample { slow: 1, ..sample },
                    2 => Sample { errors: 3, ..sample },
                    3 => Sample { errors: 3, slow: 3, ..sample },
                    _ => Sample { errors: 9, slow: 9, utilisation: Some(1.0), ..sample },
                };
                watch.observe(sample);
                list.push(sample);
                at += 1;
                let broken = |seconds: usize, bad: fn(&Sample) -> u64, limit: u64| {
                    let last = list.iter().rev().take(seconds);
                    let enough = last.clone().map(|sample| sample.requests).sum::<u64>() >= settings.samples;
                    let all = last.clone().all(|sample| bad(sample) * 100 > limit * sample.requests);
                    let overloaded = last.clone().any(|sample| sample.utilisation.is_some());
                    last.len() == seconds && enough && all && !overloaded
                };
                let verdict = match watch.quality(START + Duration::from_secs(at)) {
                    Quality::Fine | Quality::Breaching => None,
                    quality => Some(quality),
                };
                let expected = if broken(180, |sample| sample.errors, 5) {
                    Some(Quality::Failing)
                } else if broken(300, |sample| sample.slow, 1) {
                    Some(Quality::Slow)
                } else {
                    None
                };
                prop_assert_eq!(verdict, expected, "after {} s", at);
            }
        }
    }

    /// No sample and no time makes it fall.
    #[test]
    fn any_samples_are_survived(
        samples in proptest::collection::vec((any::<Duration>(), any::<Duration>(), any::<[u64; 4]>(), any::<f64>()), 0..50),
        now: Duration,
    ) {
        let mut watch = watch();
        for (from, to, [requests, slow, errors, shed], utilisation) in samples {
            watch.observe(Sample { from, to, requests, slow, errors, shed, utilisation: Some(utilisation) });
            watch.quality(now);
            watch.reason();
        }
    }
}
