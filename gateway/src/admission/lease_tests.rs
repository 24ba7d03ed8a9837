use spillway_core::limit::{QuotaSettings, Rate, Reserves};

use super::*;

const SECOND: u64 = 1_000_000_000;

fn quota(tokens: u64, burst: u32) -> Quota {
    let rate = Rate { tokens, per: Duration::from_secs(1) };
    Quota::new(&QuotaSettings { gateways: 4, ..QuotaSettings::new(rate, burst) }).unwrap()
}

fn gcra(tokens: u64, burst: u32) -> Gcra {
    Gcra::new(Rate { tokens, per: Duration::from_secs(1) }, burst, Reserves::default()).unwrap()
}

fn begun(placed: bool) -> Bucket {
    let mut bucket = Bucket::full(gcra(1_600, 320));
    bucket.begin(quota(1_600, 320), Some(7), placed, SECOND);
    bucket
}

fn admits(bucket: &mut Bucket, cost: u32, now_ns: u64) -> bool {
    let charge = Charge { model: "a", class: Class::Critical, cost, entity_cost: cost, entities: &[], now_ns };
    let decision = bucket.decide(cost, &charge);
    bucket.state = bucket.next;
    matches!(decision, Decision::Admitted { .. })
}

/// How often it admits at once.
fn drain(bucket: &mut Bucket, now_ns: u64) -> usize {
    (0..1_000).take_while(|_| admits(bucket, 1, now_ns)).count()
}

const fn at(now_ns: u64) -> Duration {
    Duration::from_nanos(now_ns)
}

#[test]
fn a_bucket_becomes_one_of_a_slice_and_follows_its_grants() {
    let mut bucket = begun(false);
    assert_eq!(bucket.report(at(SECOND)).unwrap().standing, Standing::Joining);
    assert_eq!(drain(&mut bucket, SECOND), 20, "a sixteenth of the burst");
    let sent = SECOND + SECOND / 2;
    let ask = bucket.ask(7, at(sent)).unwrap();
    assert_eq!((ask.held, ask.demand), (0, 42_000), "21 in half a second, the refused among them");
    let report = bucket.answer(7, at(sent), at(sent), Some(Grant { rate: 800_000, gateways: 2 })).unwrap();
    assert_eq!(report, Report { rate: 800_000, demand: 42_000, standing: Standing::Leased });
    assert_eq!(bucket.burst(), 160);
    assert_eq!(bucket.ask(7, at(sent)).unwrap().held, 800_000);
    assert_eq!(bucket.answer(7, at(sent), at(sent), None).unwrap().rate, 800_000, "no answer changes nothing");
    assert_eq!(bucket.report(at(sent + 3 * SECOND / 2)).unwrap().standing, Standing::Local);
}

#[test]
fn a_bucket_that_nobody_grants_has_its_share() {
    let mut bucket = begun(true);
    assert_eq!(bucket.report(at(SECOND)).unwrap(), Report { rate: 400_000, demand: 0, standing: Standing::Local });
    assert_eq!(drain(&mut bucket, SECOND), 80);
    let mut bucket = begun(false);
    assert_eq!(bucket.answer(7, at(SECOND), at(SECOND), None).unwrap().rate, 400_000);
}

#[test]
fn another_listing_is_not_asked_for_nor_answered() {
    let mut bucket = begun(false);
    assert_eq!(bucket.ask(6, at(SECOND)), None);
    assert_eq!(bucket.answer(6, at(SECOND), at(SECOND), None), None);
    assert_eq!(bucket.report(at(SECOND)).unwrap().standing, Standing::Joining);
    bucket.begin(quota(1_600, 320), None, true, SECOND);
    assert!(!bucket.is_listed());
    bucket.begin(quota(1_600, 320), Some(8), true, SECOND);
    assert!(bucket.is_listed() && bucket.ask(8, at(SECOND)).is_some());
}

#[test]
fn a_slice_that_nobody_uses_is_given_up_once_it_is_full() {
    let mut bucket = begun(false);
    assert!(admits(&mut bucket, 1, SECOND));
    assert!(bucket.ask(7, at(60 * SECOND)).is_some(), "59 s");
    assert!(bucket.ask(7, at(61 * SECOND)).is_none());
    assert_eq!(bucket.report(at(61 * SECOND)), None);
    bucket.begin(quota(1_600, 320), Some(8), false, 62 * SECOND);
    assert_eq!(drain(&mut bucket, 62 * SECOND), 20, "a newcomer again");
    let mut slow = Bucket::full(gcra(1, 320));
    slow.begin(quota(1, 320), Some(7), false, SECOND);
    assert_eq!(drain(&mut slow, SECOND), 19);
    assert!(slow.ask(7, at(100 * SECOND)).is_some(), "its debt of 306 s is not forgotten");
}

#[test]
fn a_slice_is_large_enough_for_the_costs_that_come() {
    let mut bucket = begun(false);
    let _ = bucket.answer(7, at(SECOND), at(SECOND), Some(Grant { rate: 16_000, gateways: 90 }));
    assert_eq!(bucket.burst(), 3);
    assert!(admits(&mut bucket, 50, SECOND), "more than the slice's burst, but not than the quota's");
    assert!(!admits(&mut bucket, 50, SECOND));
    assert!(!admits(&mut bucket, 321, SECOND));
    let ask = bucket.ask(7, at(2 * SECOND)).unwrap();
    assert_eq!(ask.demand, 100_000, "what can never be is no demand");
    assert_eq!(bucket.burst(), 50, "it stays so");
}

#[test]
fn an_operators_change_keeps_the_share_and_the_fraction_used() {
    let mut bucket = begun(false);
    let _ = bucket.answer(7, at(SECOND), at(SECOND), Some(Grant { rate: 800_000, gateways: 2 }));
    assert!(admits(&mut bucket, 80, SECOND));
    let mut bucket = bucket.follow(gcra(3_200, 640), Some(quota(3_200, 640)), SECOND);
    assert_eq!(bucket.report(at(SECOND)).unwrap().rate, 1_600_000);
    assert_eq!((bucket.burst(), bucket.remaining(SECOND)), (320, 160));
    assert!(bucket.ask(7, at(SECOND)).is_some());
    let bucket = bucket.follow(gcra(1_600, 320), None, SECOND);
    assert_eq!((bucket.burst(), bucket.remaining(SECOND)), (320, 160));
    assert!(!bucket.is_listed(), "not the region's any more");
}
