use proptest::prelude::*;

use super::*;

const ALL: [bool; 4] = [true; 4];

/// What the primary is like.
#[derive(Clone, Copy, Debug)]
struct Weather {
    features: u64,
    prediction: u64,
    /// One of so many requests fails; 0 for none.
    fails: u32,
}

const FINE: Weather = Weather { features: 5, prediction: 10, fails: 0 };
const SLOW_FEATURES: Weather = Weather { features: 30, ..FINE };
const SLOW_MODEL: Weather = Weather { prediction: 40, ..FINE };
const SOME_ERRORS: Weather = Weather { fails: 40, ..FINE };
const DOWN: Weather = Weather { fails: 1, ..FINE };

struct Model {
    ladder: Ladder,
    now: Duration,
    requests: u32,
    /// Requests that were served as at level 0.
    primary: u32,
}

impl Model {
    fn new(allowed: [bool; 4]) -> Self {
        let ladder = Ladder::new(DegradeSettings { allowed, ..DegradeSettings::default() });
        Self { ladder, now: Duration::from_secs(1_000), requests: 0, primary: 0 }
    }

    /// One request after `pause`; those that are degraded get a quick and faultless answer.
    fn request(&mut self, weather: Weather, pause: Duration) -> Level {
        self.now += pause;
        self.requests += 1;
        let step = match self.ladder.serve(self.now) {
            Serve::At(level) => level.step,
            Serve::Probe(_) => Step::Normal,
        };
        self.primary += u32::from(step == Step::Normal);
        let fails = weather.fails > 0 && self.requests.is_multiple_of(weather.fails);
        let features = if step == Step::Normal { weather.features } else { 0 };
        let prediction = if step <= Step::StaleFeatures { weather.prediction } else { 1 };
        let sample = Sample {
            step,
            features: Some(Duration::from_millis(features)),
            prediction: (!fails).then_some(Duration::from_millis(prediction)),
            error: fails && step <= Step::StaleFeatures,
        };
        self.ladder.observe(sample, self.now);
        self.ladder.level(self.now)
    }

    /// 50 requests per second; the level at the end.
    fn run(&mut self, weather: Weather, seconds: f64) -> Level {
        for _ in 0..(seconds * 50.0) as u32 {
            self.request(weather, Duration::from_millis(20));
        }
        self.ladder.level(self.now)
    }
}

fn at(step: Step, reason: Reason) -> Level {
    Level { step, reason: Some(reason) }
}

const NORMAL: Level = Level { step: Step::Normal, reason: None };

#[test]
fn each_trigger_enters_its_level() {
    for (weather, level) in [
        (FINE, NORMAL),
        (SLOW_FEATURES, at(Step::StaleFeatures, Reason::SlowFeatures)),
        (SLOW_MODEL, at(Step::FallbackModel, Reason::SlowPredictions)),
        (SOME_ERRORS, at(Step::CachedPrediction, Reason::Errors)),
        (DOWN, at(Step::StaticAnswer, Reason::Errors)),
    ] {
        assert_eq!(Model::new(ALL).run(weather, 6.0), level, "{weather:?}");
    }
}

#[test]
fn levels_that_are_not_allowed_give_way_to_the_next_lower() {
    let (y, n) = (true, false);
    for (allowed, weather, step) in [
        ([n, n, n, n], DOWN, Step::Normal),
        ([y, y, y, n], DOWN, Step::CachedPrediction),
        ([y, n, n, n], DOWN, Step::StaleFeatures),
        ([y, n, n, y], SOME_ERRORS, Step::StaleFeatures),
        ([y, n, y, y], SLOW_MODEL, Step::StaleFeatures),
        ([n, y, y, y], SLOW_FEATURES, Step::Normal),
        ([n, n, n, y], SOME_ERRORS, Step::Normal),
    ] {
        let level = Model::new(allowed).run(weather, 10.0);
        assert_eq!(level.step, step, "{allowed:?} {weather:?}");
        assert_eq!(level.reason.is_none(), step == Step::Normal);
    }
}

#[test]
fn trouble_shorter_than_enter_after_or_of_few_samples_changes_nothing() {
    let mut model = Model::new(ALL);
    model.run(FINE, 20.0);
    // 2 s of 10: the p95 is above for less than 3 s before it is fine again.
    assert_eq!(model.run(SLOW_MODEL, 2.0), NORMAL);
    let mut sparse = Model::new(ALL);
    for _ in 0..100 {
        assert_eq!(sparse.request(DOWN, Duration::from_millis(210)), NORMAL, "under 50 samples in 10 s");
    }
}

#[test]
fn levels_are_left_one_at_a_time() {
    let mut model = Model::new(ALL);
    assert_eq!(model.run(DOWN, 6.0).step, Step::StaticAnswer);
    let (mut last, mut changes) = (Step::StaticAnswer, Vec::new());
    let healed = model.now;
    while last != Step::Normal && model.now < healed + Duration::from_secs(120) {
        let step = model.request(FINE, Duration::from_millis(20)).step;
        if step != last {
            changes.push((step, (model.now - healed).as_secs()));
            last = step;
        }
    }
    let steps: Vec<_> = changes.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [Step::CachedPrediction, Step::FallbackModel, Step::StaleFeatures, Step::Normal]);
    assert!(changes.windows(2).all(|pair| pair[1].1 - pair[0].1 >= 15), "{changes:?}");
    assert!((15..=26).contains(&changes[0].1), "the window has to forget first: {changes:?}");
}

#[test]
fn a_measure_between_leaving_and_entering_keeps_the_level() {
    let mut model = Model::new(ALL);
    model.run(SLOW_MODEL, 6.0);
    assert_eq!(model.run(Weather { prediction: 18, ..FINE }, 120.0).step, Step::FallbackModel);
    assert_eq!(model.run(Weather { prediction: 15, ..FINE }, 60.0).step, Step::Normal);
}

#[test]
fn probes_are_a_small_share_and_at_least_one_a_second() {
    let mut model = Model::new(ALL);
    model.run(DOWN, 10.0);
    (model.requests, model.primary) = (0, 0);
    for _ in 0..10_000 {
        model.request(DOWN, Duration::from_millis(2));
    }
    assert!((200..=225).contains(&model.primary), "{} probes of 10,000", model.primary);
    (model.requests, model.primary) = (0, 0);
    for _ in 0..100 {
        model.request(DOWN, Duration::from_millis(200));
    }
    assert_eq!(model.primary, 20, "one a second");
}

#[test]
fn degraded_requests_say_nothing_of_the_primary() {
    let mut ladder = Ladder::new(DegradeSettings { allowed: ALL, ..DegradeSettings::default() });
    let slow = Some(Duration::from_secs(1));
    for index in 0..1_000_u64 {
        let now = Duration::from_millis(index * 20);
        let step = Step::ALL[2 + (index % 3) as usize];
        ladder.observe(Sample { step, features: slow, prediction: slow, error: true }, now);
        ladder.observe(Sample { step: Step::StaleFeatures, features: slow, prediction: None, error: false }, now);
        assert_eq!(ladder.level(now), NORMAL);
    }
}

#[test]
fn at_level_one_the_model_is_still_judged() {
    let mut model = Model::new(ALL);
    assert_eq!(model.run(SLOW_FEATURES, 10.0).step, Step::StaleFeatures);
    let worse = Weather { prediction: 40, ..SLOW_FEATURES };
    assert_eq!(model.run(worse, 15.0), at(Step::FallbackModel, Reason::SlowPredictions));
}

#[test]
fn without_requests_the_level_comes_back_to_normal() {
    let mut model = Model::new(ALL);
    model.run(DOWN, 10.0);
    for _ in 0..80 {
        model.now += Duration::from_secs(1);
        model.ladder.level(model.now);
    }
    assert_eq!(model.ladder.level(model.now), NORMAL);
}

#[test]
fn new_settings_take_the_level_along_as_far_as_they_allow() {
    let mut model = Model::new(ALL);
    model.run(DOWN, 6.0);
    let settings = DegradeSettings { allowed: [true, true, false, false], ..DegradeSettings::default() };
    model.ladder.reconfigure(settings, model.now);
    assert_eq!(model.ladder.level(model.now), at(Step::FallbackModel, Reason::Errors));
    model.ladder.reconfigure(DegradeSettings::default(), model.now);
    assert_eq!(model.ladder.level(model.now), NORMAL);
}

#[test]
fn unusable_settings_do_no_harm() {
    let settings = DegradeSettings {
        allowed: ALL,
        feature_p95: Duration::ZERO,
        prediction_p95: Duration::ZERO,
        errors: f64::NAN,
        many_errors: -1.0,
        window: Duration::ZERO,
        leave_below: f64::NAN,
        probes: f64::NAN,
        probe_every: Duration::MAX,
        ..DegradeSettings::default()
    };
    let mut ladder = Ladder::new(settings);
    for now in [Duration::ZERO, Duration::MAX, Duration::from_secs(5)] {
        ladder.observe(Sample { step: Step::Normal, features: None, prediction: None, error: true }, now);
        ladder.serve(now);
    }
}

fn weathers() -> impl Strategy<Value = Weather> {
    let wild = (1_u64..60, 1_u64..60, 0_u32..60);
    let wild = wild.prop_map(|(features, prediction, fails)| Weather { features, prediction, fails });
    prop_oneof![Just(FINE), Just(SLOW_FEATURES), Just(SLOW_MODEL), Just(SOME_ERRORS), Just(DOWN), wild]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn the_ladder_neither_flaps_nor_leaves_what_is_allowed_nor_stays_down(
        allowed in any::<[bool; 4]>(),
        phases in proptest::collection::vec((weathers(), 1_u32..30, 8_u64..80), 1..6),
    ) {
        let mut model = Model::new(allowed);
        let settings = DegradeSettings::default();
        let mut last = Step::Normal;
        let mut change: Option<(bool, Duration)> = None;
        let mut see = |step: Step, now: Duration| -> Result<(), TestCaseError> {
            prop_assert!(step == Step::Normal || allowed[usize::from(step.number()) - 1], "{:?}", step);
            if step == last {
                return Ok(());
            }
            let worse = step > last;
            if let Some((was_worse, at)) = change {
                let least = match (was_worse, worse) {
                    (true, false) | (false, false) => settings.leave_after,
                    (false, true) => settings.enter_after,
                    (true, true) => Duration::ZERO,
                };
                prop_assert!(now - at >= least, "{:?} after {:?}", step, now - at);
            }
            let skipped = (step.number() + 1..last.number()).any(|number| allowed[usize::from(number) - 1]);
            prop_assert!(worse || !skipped, "from {:?} to {:?}", last, step);
            (last, change) = (step, Some((worse, now)));
            Ok(())
        };
        for (weather, seconds, pause) in phases {
            let end = model.now + Duration::from_secs(u64::from(seconds));
            while model.now < end {
                let level = model.request(weather, Duration::from_millis(pause));
                see(level.step, model.now)?;
            }
        }
        // The window forgets, then every level takes its time: 10 s + 4 x 15 s.
        let end = model.now + Duration::from_secs(75);
        while model.now < end {
            let level = model.request(FINE, Duration::from_millis(100));
            see(level.step, model.now)?;
        }
        prop_assert_eq!(model.ladder.level(model.now), NORMAL);
    }
}
