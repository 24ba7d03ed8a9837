use super::super::{Class, Decision};
use super::*;

fn settings() -> QuotaSettings {
    QuotaSettings::new(Rate { tokens: 1_600, per: Duration::from_secs(1) }, 320)
}

fn quota() -> Quota {
    Quota::new(&settings()).unwrap()
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn t62_a_quota_that_means_nothing_is_refused() {
    let minute = Duration::from_secs(60);
    for (settings, fault) in [
        (QuotaSettings { rate: Rate { tokens: 0, per: minute }, ..settings() }, InvalidLimit::NoRate),
        (QuotaSettings { rate: Rate { tokens: 1, per: minute * 2 }, ..settings() }, InvalidLimit::QuotaTooSlow),
        (QuotaSettings { burst: 0, ..settings() }, InvalidLimit::NoBurst),
        (QuotaSettings { largest_cost: 0, ..settings() }, InvalidLimit::LargestCost),
        (QuotaSettings { largest_cost: 321, ..settings() }, InvalidLimit::LargestCost),
        (QuotaSettings { term: Duration::ZERO, ..settings() }, InvalidLimit::Term),
        (QuotaSettings { term: Duration::MAX, ..settings() }, InvalidLimit::Term),
        (QuotaSettings { gateways: 0, ..settings() }, InvalidLimit::NoGateways),
    ] {
        assert_eq!(Quota::new(&settings), Err(fault), "{settings:?}");
    }
    assert!(Quota::new(&QuotaSettings { rate: Rate { tokens: 1, per: minute }, ..settings() }).is_ok());
}

#[test]
fn a_slice_joins_is_leased_and_outlives_redis() {
    let mut slice = Slice::new(quota());
    let now = millis(10_000);
    assert_eq!((slice.standing(now), slice.rate()), (Standing::Joining, 100_000));
    assert_eq!(slice.ask(&Demand::default()).held, 0);
    let half = Grant { rate: 800_000, gateways: 2 };
    assert!(slice.granted(now, now + millis(1_500), half).is_none(), "too late to be a lease");
    assert_eq!(slice.standing(now), Standing::Joining);
    assert!(slice.granted(now, now + millis(20), half).is_some());
    assert_eq!((slice.rate(), slice.bucket().burst()), (800_000, 160));
    assert_eq!(slice.ask(&Demand::default()).held, 800_000);
    assert_eq!(slice.missed(), None, "a missed answer changes nothing");
    assert_eq!(slice.standing(now + millis(1_499)), Standing::Leased);
    assert_eq!(slice.standing(now + millis(1_500)), Standing::Local, "three terms after it was asked for");
    assert_eq!(slice.rate(), 800_000, "it keeps its share");
    assert_eq!(slice.granted(now, now + millis(40), half), None, "the same rate is no change");
}

#[test]
fn without_redis_from_the_start_a_slice_is_an_equal_part() {
    let three = Quota::new(&QuotaSettings { gateways: 4, ..settings() }).unwrap();
    let mut slice = Slice::new(three);
    assert!(slice.missed().is_some());
    assert_eq!((slice.standing(Duration::ZERO), slice.rate()), (Standing::Local, 400_000));
    assert_eq!(slice.missed(), None);
}

#[test]
fn a_grant_is_never_more_than_the_quota_nor_nothing() {
    for (granted, rate) in [(u64::MAX, 1_600_000), (0, 1)] {
        let mut slice = Slice::new(quota());
        let _ = slice.granted(Duration::ZERO, Duration::ZERO, Grant { rate: granted, gateways: 0 });
        assert_eq!(slice.rate(), rate);
    }
}

#[test]
fn the_first_slice_starts_full_and_later_ones_keep_their_tokens() {
    let (now, now_ns) = (Duration::from_secs(1), 1_000_000_000);
    let mut slice = Slice::new(quota());
    let change = slice.granted(now, now, Grant { rate: 1_600_000, gateways: 1 }).unwrap();
    let full = change.state(0, now_ns);
    assert_eq!(change.to.remaining(full, now_ns, Class::Critical), 320);
    let change = slice.granted(now, now, Grant { rate: 400_000, gateways: 2 }).unwrap();
    let small = change.state(full, now_ns);
    assert_eq!(change.to.remaining(small, now_ns, Class::Critical), 80);
    let change = slice.granted(now, now, Grant { rate: 1_600_000, gateways: 1 }).unwrap();
    let large = change.state(small, now_ns);
    assert_eq!(change.to.remaining(large, now_ns, Class::Critical), 80, "larger, but with the same tokens");
    let double = QuotaSettings { rate: Rate { tokens: 3_200, per: now }, burst: 640, ..settings() };
    let change = slice.change_quota(Quota::new(&double).unwrap()).unwrap();
    assert_eq!(slice.rate(), 3_200_000);
    let doubled = change.state(large, now_ns);
    assert_eq!(change.to.remaining(doubled, now_ns, Class::Critical), 160, "the operator's change keeps the fraction");
}

#[test]
fn the_smallest_slice_still_admits_the_largest_cost() {
    let large = QuotaSettings { largest_cost: 300, ..settings() };
    let mut slice = Slice::new(Quota::new(&large).unwrap());
    let _ = slice.granted(Duration::ZERO, Duration::ZERO, Grant { rate: 1, gateways: 90 });
    assert!(matches!(slice.bucket().decide(0, 0, 300, Class::Low), Decision::Admitted { .. }));
}

#[test]
fn a_slice_grows_for_a_cost_up_to_the_quotas_burst() {
    let (now, quota) = (Duration::from_secs(1), quota());
    let mut slice = Slice::new(quota);
    let _ = slice.granted(now, now, Grant { rate: 1_000, gateways: 9 });
    assert_eq!(slice.bucket().burst(), 1);
    for (cost, burst) in [(7, 7), (3, 7), (500, 320)] {
        let larger = slice.quota.admitting(cost, &quota);
        let _ = slice.change_quota(larger);
        assert_eq!((slice.rate(), slice.bucket().burst()), (1_000, burst), "for a cost of {cost}");
    }
    assert_eq!(quota.admitting(1, &slice.quota).largest_cost, 320, "an operator's change keeps what was learned");
}

#[test]
fn demand_forgets_half_in_two_terms() {
    let (quota, mut demand) = (quota(), Demand::default());
    assert_eq!(demand.milli_per_second(), 0);
    demand.observe(500, millis(500), &quota);
    assert_eq!(demand.milli_per_second(), 1_000_000, "the first sample is the mean");
    demand.observe(0, millis(500), &quota);
    demand.observe(0, millis(500), &quota);
    assert!((499_999..=500_000).contains(&demand.milli_per_second()));
    demand.observe(0, millis(1_000), &quota);
    assert!((249_999..=250_000).contains(&demand.milli_per_second()), "however often it is sampled");
    demand.observe(7, Duration::ZERO, &quota);
    demand.observe(u64::MAX, Duration::from_nanos(1), &quota);
    demand.observe(u64::MAX, Duration::MAX, &quota);
    assert!(demand.milli_per_second() <= LARGEST_DEMAND);
}
