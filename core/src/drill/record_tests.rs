use proptest::prelude::*;

use super::*;
use crate::drill::report::tests::{drill, recorded};

const SECOND: Duration = Duration::from_secs(1);

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn request(client: u32, at: f64, first: &str, failed: bool) -> Request {
    Request {
        client,
        class: Class::Normal,
        sent: Duration::from_secs_f64(at),
        took: Duration::ZERO,
        first: Some(name(first)),
        retries: 0,
        outcome: if failed { Err(Failure::TimedOut) } else { Ok(Served { region: Some(name(first)) }) },
    }
}

fn started(text: &str) -> Recorder {
    let mut recorder = Recorder::new(&drill(text), Some(name("eu")));
    for client in 0..20 {
        recorder.request(&request(client, 1.0, if client < 10 { "eu" } else { "us" }, false));
    }
    recorder.injected(SECOND * 2);
    recorder
}

#[test]
fn a_client_has_moved_when_it_asks_another_region_first() {
    let mut recorder = started("region-loss");
    for client in 0..9 {
        recorder.request(&request(client, 3.0 + f64::from(client), "us", false));
        // That it asks the lost one again takes nothing back.
        recorder.request(&request(client, 14.0, "eu", true));
    }
    recorder.request(&request(15, 3.0, "eu", false));
    let timeline = recorder.timeline(SECOND * 15);
    assert_eq!(timeline.at(Mark::Moved90), Some(SECOND * 9), "nine of ten");
    assert_eq!(timeline.at(Mark::Moved95), None, "95 % of ten are ten");
    assert_eq!(recorder.moved(), (10, 9));
    recorder.request(&request(9, 20.5, "us", false));
    let timeline = recorder.timeline(SECOND * 21);
    assert_eq!(timeline.at(Mark::Moved99), Some(Duration::from_millis(18_500)));
}

#[test]
fn the_first_move_counts_whatever_the_order_in_which_requests_end() {
    let mut recorder = started("region-loss");
    for client in (0..10).rev() {
        recorder.request(&request(client, 9.0, "us", false));
        recorder.request(&request(client, 4.0, "us", false));
    }
    assert_eq!(recorder.timeline(SECOND * 10).at(Mark::Moved99), Some(SECOND * 2));
}

#[test]
fn errors_are_back_after_the_last_bad_second_that_five_good_ones_follow() {
    let mut recorder = started("region-loss");
    assert_eq!(recorder.timeline(SECOND * 6).at(Mark::ErrorsBack), None, "five seconds have not passed");
    assert_eq!(recorder.timeline(SECOND * 7).at(Mark::ErrorsBack), Some(Duration::ZERO), "there were none");
    for client in 0..200 {
        recorder.request(&request(client, 4.2, "us", client == 0));
        recorder.request(&request(client, 8.2, "us", client == 0));
    }
    assert_eq!(recorder.timeline(SECOND * 14).at(Mark::ErrorsBack), Some(Duration::ZERO), "half a percent is fine");
    recorder.request(&request(3, 8.7, "eu", true));
    recorder.request(&request(4, 8.1, "eu", true));
    assert_eq!(recorder.timeline(SECOND * 13).at(Mark::ErrorsBack), None);
    assert_eq!(recorder.timeline(SECOND * 14).at(Mark::ErrorsBack), Some(Duration::from_millis(6_700)));
    recorder.removed(SECOND * 15);
    recorder.request(&request(3, 30.0, "eu", true));
    assert_eq!(
        recorder.timeline(SECOND * 90).at(Mark::ErrorsBack),
        Some(Duration::from_millis(6_700)),
        "what fails on the way back is in the success rate"
    );
}

#[test]
fn errors_that_last_until_the_fault_is_removed_are_not_back() {
    let mut recorder = started("region-loss");
    for second in 2..30 {
        recorder.request(&request(0, f64::from(second), "eu", true));
    }
    recorder.removed(SECOND * 30);
    assert_eq!(recorder.timeline(SECOND * 60).at(Mark::ErrorsBack), None);
}

#[test]
fn a_steady_drill_has_no_marks_of_a_failover_but_counts_what_moves() {
    let recorder = recorded(&drill("vantage-split"));
    let timeline = recorder.timeline(SECOND * 40);
    for mark in [Mark::Verdict, Mark::Published, Mark::Answers, Mark::Moved90] {
        assert_eq!(timeline.at(mark), None, "{mark:?}");
    }
    assert_eq!(timeline.at(Mark::FirstFailedProbe), Some(SECOND));
    assert_eq!(recorder.weight_changes(), 2);
}

#[test]
fn regions_in_doubt_are_those_that_were_not_before() {
    let mut recorder = Recorder::new(&drill("region-loss"), Some(name("eu")));
    let sight = |phases: [Phase; 3]| {
        let regions = ["eu", "us", "ap"]
            .into_iter()
            .zip(phases)
            .map(|(region, phase)| (name(region), RegionSight { phase: Some(phase), failing: 0, weight: 0.3 }));
        Sight { plan_version: 1, regions: regions.collect() }
    };
    recorder.sight(sight([Phase::Up, Phase::Up, Phase::Suspect]), SECOND);
    recorder.injected(SECOND);
    recorder.sight(sight([Phase::Down, Phase::Up, Phase::Suspect]), SECOND * 2);
    assert!(recorder.doubted().is_empty(), "the target is meant to be, the other one was");
    recorder.sight(sight([Phase::Down, Phase::Suspect, Phase::Suspect]), SECOND * 3);
    assert_eq!(recorder.doubted(), [name("us")].into());
}

#[test]
fn a_run_has_settled_when_clients_have_moved_and_errors_are_back_for_a_while() {
    let drill = drill("region-loss");
    let mut recorder = recorded(&drill);
    assert!(recorder.is_settled(SECOND * 40) && recorder.is_back());
    recorder = Recorder::new(&drill, Some(name("eu-west")));
    assert!(!recorder.is_settled(SECOND * 40) && !recorder.is_back());
}

proptest! {
    #[test]
    fn nothing_seen_in_any_order_puts_marks_out_of_reason(
        seen in proptest::collection::vec((0_u8..4, 0_u32..40, 0_u32..6, any::<bool>()), 0..120),
    ) {
        let mut recorder = Recorder::new(&drill("region-loss"), Some(name("eu")));
        let mut sent = 0;
        for (kind, second, client, flag) in seen {
            let now = SECOND * second;
            match kind {
                0 => { recorder.request(&request(client, f64::from(second), if flag { "eu" } else { "us" }, flag)); sent += 1; }
                1 => if recorder.injected_at().is_none() { recorder.injected(now) },
                2 => recorder.removed(now),
                _ => recorder.answer(client, &name(if flag { "eu" } else { "us" }), now),
            }
        }
        let timeline = recorder.timeline(SECOND * 60);
        prop_assert_eq!(recorder.counts().0, sent);
        let (had, moved) = recorder.moved();
        prop_assert!(moved <= had);
        prop_assert!(timeline.at(Mark::Moved90) <= timeline.at(Mark::Moved95) || timeline.at(Mark::Moved95).is_none());
        prop_assert!(timeline.at(Mark::Moved95) <= timeline.at(Mark::Moved99) || timeline.at(Mark::Moved99).is_none());
        if recorder.injected_at().is_none() {
            prop_assert_eq!(timeline, Timeline::default());
        }
    }
}
