use proptest::prelude::*;

use super::*;
use crate::drill::{builtin, definition};

const SECOND: Duration = Duration::from_secs(1);

fn fresh(name: &str) -> Course {
    Course::new(&definition::read(builtin::text(name).unwrap()).unwrap(), Duration::ZERO)
}

/// A run that is under way.
fn observing(name: &str) -> Course {
    let mut course = fresh(name);
    assert_eq!(course.step(Event::Judged(Vec::new()), SECOND), Some(Order::Inject));
    assert_eq!(course.step(Event::Injected, SECOND * 2), None);
    course
}

fn seen(requests: u64, failed: u64, settled: bool) -> Event {
    Event::Seen { sample: Sample { requests, failed, doubted: Some([].into()) }, settled }
}

#[test]
fn a_refused_drill_injects_nothing() {
    let mut course = fresh("region-loss");
    assert_eq!(course.step(Event::Judged(vec![Refusal::NoLeader]), SECOND), Some(Order::Report));
    assert_eq!(course.stage(), &Stage::Done(End::Refused(vec![Refusal::NoLeader])));
    assert_eq!(course.step(Event::Injected, SECOND), None);
    assert_eq!(course.tick(SECOND * 9_999), None);
}

#[test]
fn a_failover_drill_ends_its_fault_when_all_was_seen() {
    let mut course = observing("region-loss");
    assert_eq!(course.step(seen(9, 3, false), SECOND * 3), None);
    assert_eq!(course.step(seen(9, 0, true), SECOND * 4), Some(Order::Remove));
    assert_eq!(course.step(Event::Removed, SECOND * 5), None);
    assert_eq!(course.stage(), &Stage::Recovering);
    assert_eq!(course.step(Event::FailedBack, SECOND * 60), Some(Order::Report));
    assert_eq!(course.stage(), &Stage::Done(End::Completed));
}

#[test]
fn a_steady_drill_holds_its_fault_for_the_whole_time() {
    let mut course = observing("store-loss");
    for second in 3..62 {
        assert_eq!(course.step(seen(9, 0, true), SECOND * second), None);
        assert_ne!(course.tick(SECOND * second), Some(Order::Remove));
    }
    assert_eq!(course.tick(SECOND * 62), Some(Order::Remove));
    assert_eq!(course.abort(), None);
}

#[test]
fn the_lease_is_renewed_while_something_may_be_broken() {
    let mut course = observing("store-loss");
    let orders: Vec<u32> = (2..20).filter(|second| course.tick(SECOND * *second) == Some(Order::Renew)).collect();
    assert_eq!(orders, [4, 7, 10, 13, 16, 19], "counted from the injection's order");
    let mut early = fresh("store-loss");
    early.step(Event::Judged(Vec::new()), SECOND);
    assert_eq!(early.tick(SECOND * 4), Some(Order::Renew), "what takes long to inject is kept too");
}

#[test]
fn every_trouble_under_the_fault_aborts_and_restores() {
    for (event, word) in [(Event::LeaseLost, "removed the fault"), (Event::Interrupted, "interrupted")] {
        let mut course = observing("region-loss");
        assert_eq!(course.step(event, SECOND * 3), Some(Order::Remove));
        assert!(course.abort().unwrap().to_string().contains(word));
        course.step(Event::Removed, SECOND * 4);
        course.step(Event::FailedBack, SECOND * 5);
        assert!(matches!(course.stage(), Stage::Done(End::Aborted(_))));
    }
    let mut course = observing("region-loss");
    let orders: Vec<Option<Order>> = (3..19).map(|second| course.step(seen(9, 9, false), SECOND * second)).collect();
    assert_eq!(orders.iter().flatten().collect::<Vec<_>>(), [&Order::Remove]);
    assert!(matches!(course.abort(), Some(Abort::Guard(Breach::Success { .. }))));
    let mut course = fresh("region-loss");
    course.step(Event::Judged(Vec::new()), SECOND);
    assert_eq!(course.step(Event::NotInjected("no such process".into()), SECOND), Some(Order::Remove));
}

#[test]
fn a_removal_that_nobody_confirms_is_asked_for_again_until_the_lease_has_ended_it() {
    let mut course = observing("region-loss");
    course.step(Event::Interrupted, SECOND * 3);
    let asked: Vec<u32> = (3..60).filter(|second| course.tick(SECOND * *second) == Some(Order::Remove)).collect();
    assert_eq!(asked, [6, 9, 12, 15, 18]);
    assert_eq!(course.stage(), &Stage::Recovering);
}

#[test]
fn a_way_back_that_takes_too_long_ends_the_run_too() {
    let mut course = observing("region-loss");
    course.step(seen(9, 0, true), SECOND * 3);
    course.step(Event::Removed, SECOND * 4);
    assert_eq!(course.tick(SECOND * 903), None);
    assert_eq!(course.tick(SECOND * 904), Some(Order::Report));
    assert_eq!(course.stage(), &Stage::Done(End::Completed));
}

fn any_event() -> impl Strategy<Value = Option<Event>> {
    prop_oneof![
        Just(None),
        Just(Some(Event::Judged(Vec::new()))),
        Just(Some(Event::Judged(vec![Refusal::NoLeader]))),
        Just(Some(Event::Injected)),
        Just(Some(Event::NotInjected(String::new()))),
        (0_u64..3, any::<bool>()).prop_map(|(failed, settled)| Some(seen(3, failed, settled))),
        Just(Some(Event::LeaseLost)),
        Just(Some(Event::Interrupted)),
        Just(Some(Event::Removed)),
        Just(Some(Event::FailedBack)),
    ]
}

proptest! {
    #[test]
    fn what_was_injected_is_always_ordered_to_be_removed_before_the_end(
        events in proptest::collection::vec((any_event(), 0_u32..40), 0..200),
        steady in any::<bool>(),
    ) {
        let mut course = fresh(if steady { "redis-loss" } else { "region-loss" });
        let (mut now, mut injected, mut removed) = (Duration::ZERO, false, false);
        let mut last_word = Duration::ZERO;
        for (event, seconds) in events {
            // The controller ticks every second, whatever happens.
            let mut orders = Vec::new();
            for _ in 0..seconds {
                now += SECOND;
                orders.extend(course.tick(now).map(|order| (order, now)));
            }
            orders.extend(event.and_then(|event| course.step(event, now)).map(|order| (order, now)));
            for (order, at) in orders {
                match order {
                    Order::Inject => { prop_assert!(!injected); injected = true; }
                    Order::Renew => prop_assert!(injected && !removed),
                    Order::Remove => { prop_assert!(injected); removed = true; }
                    Order::Report => prop_assert_eq!(injected, removed),
                }
                if order != Order::Report {
                    let silent = at - last_word;
                    prop_assert!(order == Order::Inject || silent <= Lease::RENEW_EVERY, "{order:?} after {silent:?}");
                    last_word = at;
                }
            }
            if course.stage().may_be_broken() {
                prop_assert!(injected && now - last_word <= Lease::RENEW_EVERY + SECOND);
            }
        }
    }
}
