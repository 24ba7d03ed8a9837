use std::time::Duration;

use proptest::prelude::*;
use spillway_core::limit::Class;
use spillway_core::units::Name;
use tonic::Code;

use super::*;

const QUICK: Duration = Duration::from_millis(3);
const LONG: Duration = Duration::from_millis(101);

fn ended(took: Duration, blame: Option<Blame>) -> Ended {
    Ended { forwarded: false, class: Some(Class::High), spilled: false, took, blame }
}

/// requests, served, slow, errors, shed, spilled
fn counted(ended: &Ended) -> [u64; 6] {
    let tally = Tally::default();
    tally.count(ended);
    let told = tally.take();
    assert_eq!(told.classes, [0, told.requests, 0, 0]);
    assert_eq!(told.p99_us > 0, told.served > 0);
    [told.requests, told.served, told.slow, told.errors, told.shed, told.spilled]
}

#[test]
fn only_what_the_region_did_counts_against_it() {
    let (deadline, gone) = (Blame::Impatience { gone: false }, Blame::Impatience { gone: true });
    for (took, blame, expected) in [
        (QUICK, None, [1, 1, 0, 0, 0, 0]),
        (LONG, None, [1, 1, 1, 0, 0, 0]),
        (QUICK, Some(Blame::Region), [1, 1, 0, 1, 0, 0]),
        (LONG, Some(deadline), [1, 1, 1, 1, 0, 0]),
        (QUICK, Some(deadline), [1, 0, 0, 0, 0, 0]),
        (LONG, Some(gone), [1, 1, 1, 0, 0, 0]),
        (QUICK, Some(gone), [1, 0, 0, 0, 0, 0]),
        (LONG, Some(Blame::Overload), [1, 0, 0, 0, 1, 0]),
        (LONG, Some(Blame::Caller), [0; 6]),
        (LONG, Some(Blame::Plan), [1, 0, 0, 0, 0, 0]),
    ] {
        assert_eq!(counted(&ended(took, blame)), expected, "{took:?} {blame:?}");
        let forwarded = Ended { forwarded: true, ..ended(took, blame) };
        assert_eq!(counted(&forwarded)[1..], expected[1..], "it came in elsewhere: {blame:?}");
        assert_eq!(counted(&forwarded)[0], 0);
        let spilled = Ended { spilled: true, ..ended(took, blame) };
        assert_eq!(counted(&spilled), [1, 0, 0, 0, 0, 1], "the peer counts what became of it");
    }
}

#[test]
fn refusals_are_blamed_on_whom_they_come_from() {
    let name = || Name::parse("limit").unwrap();
    let said = |status| Refusal::Sidecar { status, code: "x".into(), message: String::new() };
    let busy = |why| Refusal::Busy { why, after: Duration::ZERO };
    for (refusal, expected) in [
        (Refusal::Limited { limit: name(), after: None }, Blame::Caller),
        (Refusal::Path, Blame::Caller),
        (busy(Why::TenantFull), Blame::Caller),
        (busy(Why::Shed), Blame::Overload),
        (busy(Why::Share), Blame::Overload),
        (busy(Why::Planned), Blame::Plan),
        (busy(Why::Full), Blame::Overload),
        (busy(Why::TooLate), Blame::Overload),
        (busy(Why::TooShort), Blame::Impatience { gone: false }),
        (Refusal::PodsBusy, Blame::Overload),
        (Refusal::Deadline, Blame::Impatience { gone: false }),
        (Refusal::Cancelled, Blame::Impatience { gone: true }),
        (Refusal::NoPod, Blame::Region),
        (Refusal::BadAnswer, Blame::Region),
        (said(Code::Unavailable), Blame::Region),
        (said(Code::ResourceExhausted), Blame::Overload),
        (said(Code::FailedPrecondition), Blame::Caller),
        (said(Code::DeadlineExceeded), Blame::Impatience { gone: false }),
    ] {
        assert_eq!(blame(&refusal), expected, "{refusal:?}");
    }
}

#[test]
fn each_interval_begins_anew() {
    let tally = Tally::default();
    for _ in 0..98 {
        tally.count(&ended(QUICK, None));
    }
    for _ in 0..2 {
        tally.count(&ended(Duration::from_millis(500), None));
    }
    tally.count(&Ended { class: None, ..ended(QUICK, Some(Blame::Plan)) });
    let told = tally.take();
    assert_eq!((told.requests, told.served, told.slow, told.capacity), (101, 100, 2, None));
    assert_eq!(told.classes, [0, 100, 0, 0], "a class is known once a request was read");
    assert!((500_000..=562_500).contains(&told.p99_us), "{}", told.p99_us);
    let told = tally.take();
    assert_eq!((told.requests, told.served, told.p99_us), (0, 0, 0));
}

proptest! {
    /// Of a list of times, within an eighth, from 64 µs to two minutes.
    #[test]
    fn p99_is_that_of_the_list(times in proptest::collection::vec(1_u64..120_000_000, 1..400)) {
        let mut counts = vec![0; BUCKETS];
        times.iter().for_each(|micros| counts[bucket(Duration::from_micros(*micros))] += 1);
        let mut sorted = times.clone();
        sorted.sort_unstable();
        let exact = sorted[times.len() - 1 - times.len() / 100].max(64);
        let found = p99(&counts);
        prop_assert!(found > exact && found <= exact + exact / 8 + 1, "{found} for {exact}");
    }

    #[test]
    fn no_time_is_out_of_bounds(micros: u64) {
        prop_assert!(bucket(Duration::from_micros(micros)) < BUCKETS);
    }
}
