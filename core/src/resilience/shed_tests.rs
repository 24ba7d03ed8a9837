use std::collections::VecDeque;

use proptest::prelude::*;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::*;

/// Requests per second that the simulated region can do.
const CAPACITY: f64 = 1_000.0;
/// What its bulkhead lets wait, and the deadline, in seconds.
const QUEUE: f64 = 0.2;
const DEADLINE: f64 = 0.25;
/// Critical, high, normal, low.
const MIX: [f64; CLASSES] = [0.05, 0.15, 0.5, 0.3];

const CLASS: [Class; CLASSES] = [Class::Critical, Class::High, Class::Normal, Class::Low];

#[derive(Clone, Copy, Debug, Default)]
struct Outcome {
    offered: [f64; CLASSES],
    /// Done before the deadline.
    good: f64,
    /// Shed, refused by the bulkhead or done too late.
    lost: [f64; CLASSES],
    admitted: f64,
}

/// A region with one first-in first-out queue, blind to classes: the worst case for the critical.
struct Region {
    shedder: Shedder,
    random: u64,
    callers: u64,
    mix: [f64; CLASSES],
    capacity: f64,
    now: f64,
    /// Class and arrival of those that wait.
    queue: VecDeque<(usize, f64)>,
    free_at: f64,
}

impl Region {
    fn new(callers: u64) -> Self {
        let shedder = Shedder::new(ShedSettings::default());
        Self {
            shedder,
            random: 7,
            callers,
            mix: MIX,
            capacity: CAPACITY,
            now: 0.0,
            queue: VecDeque::new(),
            free_at: 0.0,
        }
    }

    /// SplitMix64 (Steele et al., 2014).
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Poisson arrivals at `rate` for some seconds.
    fn run(&mut self, rate: f64, seconds: f64) -> Outcome {
        let (mut outcome, end) = (Outcome::default(), self.now + seconds);
        loop {
            self.now += -(1.0 - self.share()).ln() / rate;
            if self.now >= end {
                return outcome;
            }
            self.serve(&mut outcome);
            let mut pick = self.share();
            let class = self.mix.iter().position(|share| {
                pick -= share;
                pick < 0.0
            });
            let class = class.unwrap_or(CLASSES - 1);
            let user = (self.next() % self.callers).to_string();
            let hash = xxh3_64_with_seed(user.as_bytes(), (self.now / 60.0) as u64);
            outcome.offered[class] += 1.0;
            if self.shedder.admit(CLASS[class], hash, Duration::from_secs_f64(self.now)) {
                outcome.admitted += 1.0;
                if self.queue.len() < (QUEUE * self.capacity) as usize {
                    self.queue.push_back((class, self.now));
                } else {
                    self.shedder.observe(Duration::ZERO, false);
                    outcome.lost[class] += 1.0;
                }
            } else {
                outcome.lost[class] += 1.0;
            }
        }
    }

    /// Starts what could start by now.
    fn serve(&mut self, outcome: &mut Outcome) {
        while let Some((class, arrived)) = self.queue.front().copied() {
            let start = self.free_at.max(arrived);
            if start > self.now {
                return;
            }
            self.queue.pop_front();
            self.free_at = start + 1.0 / self.capacity;
            self.shedder.observe(Duration::from_secs_f64(start - arrived), true);
            if self.free_at - arrived <= DEADLINE {
                outcome.good += 1.0;
            } else {
                outcome.lost[class] += 1.0;
            }
        }
    }
}

#[test]
fn goodput_holds_at_twice_and_ten_times_the_capacity_and_critical_is_served() {
    for callers in [10_000, 40] {
        for (factor, least) in [(2.0, 0.95), (10.0, 0.90)] {
            let mut region = Region::new(callers);
            // The overload begins within a window.
            region.run(CAPACITY * 0.3, 1.15);
            region.run(CAPACITY * factor, 5.0);
            let outcome = region.run(CAPACITY * factor, 10.0);
            let goodput = outcome.good / (CAPACITY * 10.0);
            assert!(goodput >= least, "{factor} x, {callers} callers: goodput {goodput}");
            let critical = 1.0 - outcome.lost[0] / outcome.offered[0];
            assert!(critical >= 0.999, "{factor} x, {callers} callers: {critical} of the critical");
            let admitted = outcome.good / outcome.admitted;
            assert!(admitted >= 0.99, "{factor} x, {callers} callers: {admitted} of the admitted in time");
        }
    }
}

#[test]
fn few_requests_of_long_work_may_wait_longer() {
    let mut region = Region::new(10_000);
    region.capacity = 200.0;
    region.run(400.0, 5.0);
    let outcome = region.run(400.0, 20.0);
    assert!(outcome.good >= 0.95 * 200.0 * 20.0, "{outcome:?}");
}

#[test]
fn nothing_is_shed_below_the_capacity() {
    let mut region = Region::new(10_000);
    let outcome = region.run(CAPACITY * 0.9, 20.0);
    assert_eq!(outcome.admitted, outcome.offered.iter().sum::<f64>());
}

#[test]
fn all_are_let_in_again_when_the_overload_ends() {
    let mut region = Region::new(10_000);
    region.run(CAPACITY * 10.0, 10.0);
    assert!(region.shedder.level() < 256.0);
    region.run(CAPACITY * 0.5, 10.0);
    assert_eq!(region.shedder.level(), STEPS as f64);
}

#[test]
fn half_the_capacity_lost_is_found_again() {
    let mut region = Region::new(10_000);
    region.run(CAPACITY * 1.5, 5.0);
    region.capacity = CAPACITY / 2.0;
    region.run(CAPACITY * 1.5, 5.0);
    let halved = region.run(CAPACITY * 1.5, 5.0).good / (CAPACITY / 2.0 * 5.0);
    assert!(halved >= 0.95, "{halved}");
    region.capacity = CAPACITY;
    region.run(CAPACITY * 1.5, 15.0);
    let whole = region.run(CAPACITY * 1.5, 5.0).good / (CAPACITY * 5.0);
    assert!(whole >= 0.95, "{whole}");
}

#[test]
fn critical_is_shed_when_it_alone_is_too_much() {
    let mut region = Region::new(10_000);
    region.mix = [1.0, 0.0, 0.0, 0.0];
    region.run(CAPACITY * 2.0, 5.0);
    let outcome = region.run(CAPACITY * 2.0, 10.0);
    assert!(region.shedder.level() < STEPS_PER_CLASS as f64);
    assert!(outcome.good >= 0.95 * CAPACITY * 10.0);
}

#[test]
fn critical_is_not_shed_while_it_fits() {
    let mut region = Region::new(10_000);
    region.mix = [0.425, 0.075, 0.2, 0.3];
    region.run(CAPACITY * 2.0, 5.0);
    let outcome = region.run(CAPACITY * 2.0, 10.0);
    assert_eq!(outcome.lost[0], 0.0, "0.85 of the capacity");
    assert!(outcome.good >= 0.95 * CAPACITY * 10.0);
}

#[test]
fn the_backlog_drains_soon() {
    let mut region = Region::new(10_000);
    region.run(CAPACITY * 10.0, 2.0);
    assert!(region.queue.len() < 40, "{} wait", region.queue.len());
}

#[test]
fn a_region_that_hangs_and_recovers_serves_again_soon() {
    let mut region = Region::new(10_000);
    region.run(CAPACITY * 2.0, 5.0);
    region.free_at = region.now + 5.0;
    region.run(CAPACITY * 2.0, 5.0);
    region.run(CAPACITY * 2.0, 5.0);
    let outcome = region.run(CAPACITY * 2.0, 5.0);
    assert!(outcome.good >= 0.95 * CAPACITY * 5.0, "{outcome:?}");
}

#[test]
fn work_that_nobody_waits_for_does_not_hide_how_long_others_wait() {
    let level_after = |waitless: u32| {
        let mut shedder = Shedder::new(ShedSettings::default());
        for now in (0..20).map(|moment| Duration::from_millis(moment * 200)) {
            for _ in 0..100 {
                // Each second one still waits.
                for _ in 0..2 {
                    shedder.admit(Class::Normal, 0, now);
                }
                shedder.observe(Duration::from_millis(150), true);
            }
            for _ in 0..waitless {
                shedder.admit(Class::Normal, 0, now);
                shedder.observe_waitless();
            }
        }
        shedder.level()
    };
    assert!(level_after(0) < STEPS as f64 && level_after(1_000) < STEPS as f64, "{}", level_after(1_000));
}

#[test]
fn the_boundary_step_is_let_in_in_part() {
    let mut shedder = Shedder::new(ShedSettings::default());
    shedder.level = 256.25;
    let admitted = (0..400).filter(|_| shedder.admit(Class::Normal, 0, Duration::ZERO)).count();
    assert_eq!(admitted, 100);
    assert!(!shedder.admit(Class::Normal, u64::MAX, Duration::ZERO));
    assert!(shedder.admit(Class::High, u64::MAX, Duration::ZERO));
}

#[test]
fn each_kind_of_window_moves_the_target_as_stated() {
    // Of 200 ms, with a target of 1,000 per second: admitted, started, wait in ms, refused, target after.
    for (admitted, started, wait, refused, target) in [
        (200, 200, 4, 0, 1_100.0),
        (200, 200, 5, 0, 1_010.0),
        (200, 200, 20, 0, 1_010.0),
        (200, 180, 23, 0, 855.0),
        (200, 180, 22, 0, 1_010.0),
        (200, 180, 0, 20, 855.0),
        (200, 200, 21, 0, 1_000.0),
        (150, 200, 100, 0, 1_000.0),
        (200, 0, 0, 200, 1_000.0),
        (200, 198, 6, 2, 1_010.0),
    ] {
        let mut shedder = Shedder::new(ShedSettings::default());
        shedder.target = 1_000.0;
        (0..admitted).for_each(|_| assert!(shedder.admit(Class::Critical, 0, Duration::ZERO)));
        (0..started).for_each(|_| shedder.observe(Duration::from_millis(wait), true));
        (0..refused).for_each(|_| shedder.observe(Duration::ZERO, false));
        shedder.tick(Duration::from_millis(200));
        let case = (admitted, started, wait, refused);
        assert!((shedder.target - target).abs() < 1e-6, "{case:?}: {}", shedder.target);
    }
}

#[test]
fn a_window_with_few_requests_lasts_longer() {
    let mut shedder = Shedder::new(ShedSettings::default());
    shedder.tick(Duration::ZERO);
    (0..99).for_each(|_| _ = shedder.admit(Class::Low, 0, Duration::ZERO));
    (0..98).for_each(|_| shedder.observe(Duration::from_millis(101), true));
    shedder.tick(Duration::from_millis(999));
    assert_eq!(shedder.level(), STEPS as f64);
    shedder.tick(Duration::from_secs(1));
    assert!(shedder.level() < STEPS as f64);
}

#[test]
fn refusals_alone_are_overload() {
    let mut shedder = Shedder::new(ShedSettings::default());
    for index in 0..200_u64 {
        assert!(shedder.admit(Class::Low, index << 57, Duration::ZERO));
        shedder.observe(Duration::ZERO, index % 10 > 0);
    }
    shedder.tick(Duration::from_millis(199));
    assert_eq!(shedder.level(), STEPS as f64, "the window is open");
    shedder.tick(Duration::from_millis(200));
    assert!(shedder.level() < STEPS as f64);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The level stays on its line; a class is shed only while all below it are.
    #[test]
    fn the_level_is_sound_whatever_happens(
        steps in proptest::collection::vec((0_u64..400, 0_usize..CLASSES, any::<u64>(), 0_u32..40, 0_u64..100, any::<bool>()), 1..80),
    ) {
        let mut shedder = Shedder::new(ShedSettings { samples: 5, ..ShedSettings::default() });
        let mut now = Duration::from_secs(1);
        for (time, class, hash, requests, wait, starts) in steps {
            now = if time > 380 { now.saturating_sub(Duration::from_millis(50)) } else { now + Duration::from_millis(time) };
            for request in 0..u64::from(requests) {
                let hash = hash.wrapping_mul(request | 1);
                let admitted = shedder.admit(CLASS[class], hash, now);
                let (step, level) = ((class * STEPS_PER_CLASS) as f64 + (hash >> 57) as f64, shedder.level());
                prop_assert!(admitted || step + 1.0 > level);
                prop_assert!(!admitted || step < level);
                if admitted {
                    shedder.observe(Duration::from_millis(wait), starts);
                }
            }
            shedder.tick(now);
            prop_assert!((0.0..=STEPS as f64).contains(&shedder.level()));
        }
    }
}
