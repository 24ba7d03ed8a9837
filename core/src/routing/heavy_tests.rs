use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const HOT: u64 = 0x5eed;

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn sketch() -> HotEntities {
    HotEntities::new(&HotSettings::default())
}

/// Requests for one key at a steady rate over a time; whether it is hot at the end.
fn steady(sketch: &mut HotEntities, per_second: u64, from: Duration, to: Duration) -> bool {
    let requests = (to - from).as_millis() as u64 * per_second / 1_000;
    (0..requests).fold(false, |_, request| {
        sketch.observe(HOT, from + Duration::from_secs_f64(request as f64 / per_second as f64))
    })
}

#[test]
fn hot_above_the_threshold_and_cold_below_its_half() {
    let mut sketch = sketch();
    assert!(!steady(&mut sketch, 990, ms(0), ms(5_000)));
    assert!(steady(&mut sketch, 1_050, ms(5_000), ms(9_000)));
    assert!(steady(&mut sketch, 560, ms(9_000), ms(14_000)), "stays hot above the half");
    assert!(!steady(&mut sketch, 440, ms(14_000), ms(19_000)));
    assert!(!steady(&mut sketch, 900, ms(19_000), ms(24_000)), "does not get hot again below the threshold");
}

#[test]
fn twice_the_threshold_is_hot_within_a_window() {
    let mut sketch = sketch();
    assert!(!steady(&mut sketch, 2_000, ms(0), ms(400)));
    assert!(steady(&mut sketch, 2_000, ms(400), ms(800)));
    assert_eq!(sketch.count(ms(800)), 1);
}

#[test]
fn silence_cools() {
    for silence in [ms(1_500), ms(30_000), Duration::from_secs(1 << 40), Duration::MAX - ms(1_000)] {
        let mut sketch = sketch();
        assert!(steady(&mut sketch, 4_000, ms(0), ms(600)));
        assert!(sketch.is_hot(HOT, ms(700)));
        assert!(!sketch.is_hot(HOT, ms(1_000) + silence));
        assert!(!sketch.observe(HOT, ms(1_000) + silence));
        assert_eq!(sketch.count(ms(1_000) + silence), 0);
    }
}

#[test]
fn a_clock_that_steps_back_changes_nothing() {
    let mut sketch = sketch();
    assert!(steady(&mut sketch, 4_000, ms(10_000), ms(10_600)));
    assert!(sketch.is_hot(HOT, ms(9_000)));
    assert!(sketch.observe(HOT, Duration::ZERO));
    assert!(sketch.is_hot(HOT, ms(10_600)));
}

#[test]
fn odd_settings_make_a_working_sketch() {
    let settings = |threshold, cold_below, window, counters| HotSettings { threshold, cold_below, window, counters };
    for settings in [
        settings(0, f64::NAN, Duration::ZERO, 0),
        settings(u32::MAX, f64::INFINITY, Duration::MAX, usize::MAX),
        settings(1, -1.0, Duration::from_nanos(1), 1),
    ] {
        let mut sketch = HotEntities::new(&settings);
        for request in 0..2_000_u64 {
            sketch.observe(request % 7, Duration::from_nanos(request * 77_777));
        }
        assert!(sketch.used <= sketch.counters);
    }
    assert!(HotEntities::new(&settings(0, 0.5, ms(1_000), 1)).observe(1, ms(0)), "the lowest threshold is one request");
}

#[test]
fn keys_that_collide_are_told_apart() {
    let mut sketch = sketch();
    for request in 0..600 {
        for key in 0..4_u64 {
            assert!(!sketch.observe(key << 32, ms(0)), "{request}");
        }
    }
    assert_eq!((0..4_u64).map(|key| sketch.slots[sketch.find(key << 32).unwrap()].count).sum::<u32>(), 2_400);
}

#[test]
fn every_count_survives_the_growth() {
    let mut sketch = sketch();
    let key = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for round in 0..256 {
        for number in round..256 {
            sketch.observe(key(number), ms(0));
        }
    }
    assert_eq!(sketch.used, 256);
    for number in 0..256 {
        let slot = sketch.find(key(number)).expect("it was counted");
        assert_eq!(u64::from(sketch.slots[slot].count), number + 1);
    }
}

/// The stated error: 1,000 other keys make 9,000 requests/s, and eps is 5.5 %.
#[test]
fn a_hot_key_is_found_among_many() {
    for (per_second, found) in [(1_060, true), (990, false)] {
        let mut sketch = sketch();
        let mut hot = false;
        for step in 0..50_000_u64 {
            let now = Duration::from_micros(step * 100);
            if step % 10 != 0 {
                sketch.observe(((step * 7_919 % 1_000) << 20) | 0xfff, now);
            }
            // Evenly: whenever the rate's multiple passes the next 10,000.
            if step * per_second % 10_000 < per_second {
                hot |= sketch.observe(HOT, now);
            }
        }
        assert_eq!(hot, found, "{per_second} requests/s");
    }
}

#[test]
fn t56_a_million_entities_take_no_more_memory() {
    let mut sketch = sketch();
    assert_eq!(sketch.slots.len(), FEWEST);
    for entity in 0..1_000_000_u64 {
        let hot = sketch.observe(entity.wrapping_mul(0x9e37_79b9_7f4a_7c15), Duration::from_micros(entity * 20));
        assert!(!hot);
    }
    assert_eq!((sketch.slots.len(), sketch.counters), (512, 256));
    assert!(sketch.used <= 256);
    assert!(steady(&mut sketch, 2_000, ms(20_000), ms(22_000)));
    assert!(!sketch.observe(HOT, ms(3_600_000)));
    assert_eq!(
        (sketch.slots.len(), sketch.used),
        (FEWEST, 1),
        "what is forgotten takes no memory, from the next look on"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against exact counts that fade alike: counts are too low by no more than the error, the error
    /// keeps to its formula, and keys get hot and cold where the module says.
    #[test]
    fn counts_and_heat_keep_to_the_stated_error(
        counters in 1_usize..12,
        steps in proptest::collection::vec((0_u64..30, 1_u64..80, 0_u64..300), 1..60),
    ) {
        let mut sketch = HotEntities::new(&HotSettings { threshold: 100, counters, ..HotSettings::default() });
        let mut exact: HashMap<u64, f64> = HashMap::new();
        let mut hot: HashMap<u64, bool> = HashMap::new();
        let (mut now, mut fadings) = (Duration::ZERO, 0);
        for (key, requests, later) in steps {
            // Few of the keys come often, and all share few homes.
            let key = if key < 20 { key % 3 } else { key } << 40;
            now += ms(later);
            let due = (now.as_nanos() / sketch.step.as_nanos()) as i32 - fadings;
            fadings += due;
            exact.values_mut().for_each(|count| *count *= (15.0_f64 / 16.0).powi(due));
            for _ in 0..requests {
                let is_hot = sketch.observe(key, now);
                *exact.entry(key).or_default() += 1.0;
                let error = sketch.error;
                let all: f64 = exact.values().sum();
                prop_assert!(error <= all / (counters + 1) as f64 + 16.0);
                prop_assert!(sketch.used <= counters);
                prop_assert!(!is_hot || hot.get(&key) == Some(&true) || exact[&key] >= 100.0 - 1e-6);
                prop_assert!(is_hot || exact[&key] < 100.0 + error + 1e-6, "a hot key is missed");
                hot.insert(key, is_hot);
            }
            prop_assert_eq!(sketch.used, sketch.slots.iter().filter(|slot| slot.count > 0).count());
            for (key, exact) in &exact {
                let count = sketch.find(*key).map_or(0.0, |slot| f64::from(sketch.slots[slot].count));
                prop_assert!(count <= exact + 1e-6 && *exact <= count + sketch.error + 1e-6);
                let is_hot = sketch.is_hot(*key, now);
                let was_hot = hot.insert(*key, is_hot) == Some(true);
                prop_assert!(!is_hot || was_hot, "only a request makes hot");
                prop_assert!(!is_hot || *exact >= 50.0 - sketch.error - 1e-6);
                prop_assert!(is_hot || !was_hot || *exact < 50.0 || sketch.error >= 50.0);
            }
        }
    }
}
