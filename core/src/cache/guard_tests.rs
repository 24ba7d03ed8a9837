use proptest::prelude::*;

use super::*;

const COST: Duration = Duration::from_micros(5);
const CALL: Duration = Duration::from_millis(1);
const START: Duration = Duration::from_secs(1_000);
const RETRY: Duration = Duration::from_secs(30);

fn guard() -> Guard {
    Guard::new(Settings::default())
}

/// A window of look-ups with so many hits; the last change that it made.
fn window(guard: &mut Guard, now: Duration, hits: usize) -> Option<State> {
    (0..1_000)
        .filter_map(|index| {
            let hit = index < hits;
            let observation =
                if hit { Observation::Hit { cost: COST } } else { Observation::Miss { cost: COST, call: CALL } };
            guard.observe(now, observation)
        })
        .last()
}

#[test]
fn defaults_are_those_documented() {
    let Settings { window, margin, resume, sample, retry } = Settings::default();
    assert_eq!((window, margin, resume, sample, retry), (1_000, 2, 3, 0.01, RETRY));
}

/// 1,000 look-ups cost 5 ms, so at a margin of 2 they pay from 10 hits of 1 ms, at 3 from 15.
#[test]
fn it_is_switched_off_below_the_margin_and_on_again_from_the_higher_one() {
    let off = State::Off { until: START + RETRY };
    for (hits, state) in [(0, off), (9, off), (10, State::On), (14, State::On), (1_000, State::On)] {
        let mut guard = guard();
        window(&mut guard, START, hits);
        assert_eq!(guard.state(), state, "on with {hits} hits");
    }
    for (hits, state) in [(0, off), (14, off), (15, State::On)] {
        let mut guard = guard();
        window(&mut guard, START, 0);
        window(&mut guard, START, hits);
        assert_eq!(guard.state(), state, "off with {hits} hits in the sample");
    }
    let later = START + RETRY;
    for (hits, state) in [(14, State::Off { until: later + RETRY }), (15, State::On)] {
        let mut guard = guard();
        window(&mut guard, START, 0);
        window(&mut guard, later, hits);
        assert_eq!(guard.state(), state, "trial with {hits} hits");
    }
}

#[test]
fn it_is_judged_only_by_full_windows() {
    let mut guard = guard();
    for _ in 0..999 {
        assert_eq!(guard.observe(START, Observation::Miss { cost: COST, call: CALL }), None);
    }
    let last = guard.observe(START, Observation::Miss { cost: COST, call: CALL });
    assert_eq!(last, Some(State::Off { until: START + RETRY }));
}

#[test]
fn off_it_samples_a_hundredth_and_tries_all_again_in_time() {
    let mut guard = guard();
    assert_eq!(guard.decide(START, 0), Decision::Use);
    window(&mut guard, START, 0);
    let spread = |index: u64| index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let sampled = (0..100_000).filter(|index| guard.decide(START, spread(*index)) == Decision::Sample).count();
    assert!((900..1_100).contains(&sampled), "{sampled}");
    assert_eq!(guard.decide(START, u64::MAX), Decision::Skip);
    assert_eq!(guard.decide(Duration::ZERO, u64::MAX), Decision::Skip, "the clock steps back");
    assert_eq!(guard.decide(START + RETRY, u64::MAX), Decision::Use);
    assert_eq!(guard.observe(START + RETRY, Observation::Hit { cost: COST }), Some(State::Trial));
    assert_eq!(guard.decide(START, u64::MAX), Decision::Use, "until the trial is judged");
}

#[test]
fn nonsense_does_not_confuse_it() {
    let mut guard = Guard::new(Settings { window: 0, sample: f64::NAN, retry: Duration::MAX, ..Settings::default() });
    let endless = Observation::Miss { cost: Duration::MAX, call: Duration::MAX };
    assert_eq!(guard.observe(Duration::MAX, endless), Some(State::Off { until: Duration::MAX }));
    assert_eq!(guard.decide(START, 0), Decision::Skip);
    for _ in 0..10 {
        guard.observe(START, endless);
        guard.observe(START, Observation::Hit { cost: Duration::MAX });
    }
    assert_eq!(guard.state(), State::On, "all hits, no call to compare with");
}

/// What the module says, in floating point and with every observation kept.
struct Naive {
    state: State,
    seen: Vec<Observation>,
}

impl Naive {
    fn observe(&mut self, now: Duration, observation: Observation, settings: &Settings) {
        if let State::Off { until } = self.state
            && now >= until
        {
            self.state = State::Trial;
            self.seen.clear();
        }
        self.seen.push(observation);
        if (self.seen.len() as u64) < settings.window {
            return;
        }
        let calls: Vec<f64> = self.seen.iter().filter_map(call).collect();
        let hits = (self.seen.len() - calls.len()) as f64;
        let cost: f64 = self.seen.iter().map(cost).sum();
        // Small whole numbers and a comparison without a division: exact.
        let pays = |needed: u32| hits * calls.iter().sum::<f64>() >= f64::from(needed) * cost * calls.len() as f64;
        self.state = match self.state {
            State::On if pays(settings.margin) => State::On,
            State::Off { .. } | State::Trial if pays(settings.resume) => State::On,
            State::On | State::Trial => State::Off { until: now + settings.retry },
            off @ State::Off { .. } => off,
        };
        self.seen.clear();
    }
}

fn cost(observation: &Observation) -> f64 {
    match observation {
        Observation::Hit { cost } | Observation::Miss { cost, .. } => cost.as_nanos() as f64,
    }
}

fn call(observation: &Observation) -> Option<f64> {
    match observation {
        Observation::Hit { .. } => None,
        Observation::Miss { call, .. } => Some(call.as_nanos() as f64),
    }
}

proptest! {
    #[test]
    fn it_does_what_a_naive_model_does(
        steps in proptest::collection::vec((any::<bool>(), 0_u64..20, 0_u64..100, 0_u64..3), 1..300),
    ) {
        let settings = Settings { window: 10, retry: Duration::from_secs(10), ..Settings::default() };
        let mut guard = Guard::new(settings.clone());
        let mut naive = Naive { state: State::On, seen: Vec::new() };
        let mut now = START;
        for (hit, cost, call, pause) in steps {
            now += Duration::from_secs(pause);
            let (cost, call) = (Duration::from_nanos(cost), Duration::from_nanos(call));
            let observation = if hit { Observation::Hit { cost } } else { Observation::Miss { cost, call } };
            let before = guard.state();
            let changed = guard.observe(now, observation);
            naive.observe(now, observation, &settings);
            prop_assert_eq!(guard.state(), naive.state);
            prop_assert_eq!(changed, (guard.state() != before).then_some(guard.state()));
            let off = matches!(guard.state(), State::Off { until } if now < until);
            prop_assert_eq!(guard.decide(now, u64::MAX) == Decision::Skip, off);
        }
    }
}
