use proptest::prelude::*;

use super::super::soft::Quality;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const START: Duration = Duration::from_secs(1_000);

const UP: Word = Word { view: View::Up, clean: 0, quality: Quality::Fine };
const DOWN: Word = Word { view: View::Down, clean: 0, quality: Quality::Fine };
const DOUBTFUL: Word = Word { view: View::Doubtful, clean: 0, quality: Quality::Fine };
const UNKNOWN: Word = Word { view: View::Unknown, clean: 0, quality: Quality::Fine };
const SLOW: Word = Word { view: View::Up, clean: 0, quality: Quality::Slow };

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// Regions a, b, c ... that are told something each second.
struct Told {
    fleet: Fleet,
    now: Duration,
    /// Seconds since the start, region, phase.
    moves: Vec<(u64, String, Phase)>,
    events: Vec<Event>,
}

impl Told {
    fn new(settings: FleetSettings, regions: &[&str]) -> Self {
        let mut fleet = Fleet::new(settings);
        fleet.keep(&regions.iter().map(|region| name(region)).collect(), START);
        Self { fleet, now: START, moves: Vec::new(), events: Vec::new() }
    }

    fn take(&mut self, events: Vec<Event>) {
        let since = (self.now - START).as_secs();
        for event in &events {
            assert_eq!(event.at, self.now);
            if let What::Moved(moved) = event.what {
                self.moves.push((since, event.region.to_string(), moved.to));
            }
        }
        self.events.extend(events);
    }

    /// Each region by name, in order, has its word. Probes are clean while it is up.
    fn tell<const N: usize>(&mut self, words: [Word; N], seconds: u64) -> [Phase; N] {
        let names: Vec<Name> = self.fleet.members.keys().cloned().collect();
        for _ in 0..seconds {
            self.now += SECOND;
            let clean = u32::try_from((self.now - START).as_secs() / 5).unwrap();
            let word = |word: Word| Word { clean: if word.view == View::Up { clean } else { 0 }, ..word };
            let words = names.iter().cloned().zip(words.map(word)).collect();
            let events = self.fleet.observe(&words, self.now);
            self.take(events);
            assert!(self.fleet.members.values().any(Member::is_in), "all are out");
        }
        let mut phases = self.fleet.standings().map(|standing| standing.region.phase());
        [(); N].map(|()| phases.next().unwrap())
    }

    fn order(&mut self, region: &str, pin: Pin, seconds: u64) -> Result<(), Refused> {
        let until = self.now + Duration::from_secs(seconds);
        let order = Order { pin, until, reason: "maintenance".into() };
        let events = self.fleet.order(&name(region), order, self.now)?;
        self.take(events);
        Ok(())
    }

    fn withheld(&self, region: &str) -> Option<Withheld> {
        self.fleet.members[region].withheld
    }

    fn share(&self, region: &str) -> f64 {
        self.fleet.region(&name(region)).unwrap().share()
    }
}

fn three() -> Told {
    Told::new(FleetSettings::default(), &["a", "b", "c"])
}

#[test]
fn in_ten_minutes_one_region_goes() {
    let mut told = three();
    told.tell([UP, UP, UP], 10);
    assert_eq!(told.tell([DOWN, DOWN, UP], 599), [Phase::Down, Phase::Suspect, Phase::Up]);
    assert_eq!(told.withheld("b"), Some(Withheld::Hold { until: START + 612 * SECOND }));
    assert_eq!(told.tell([DOWN, DOWN, UP], 3), [Phase::Down, Phase::Down, Phase::Up]);
    assert_eq!(told.withheld("b"), None);
    let expected =
        [(11, "a", Phase::Suspect), (11, "b", Phase::Suspect), (12, "a", Phase::Down), (612, "b", Phase::Down)];
    assert_eq!(told.moves, expected.map(|(at, region, phase)| (at, region.to_owned(), phase)));
    let withheld = told.events.iter().filter(|event| matches!(event.what, What::Withheld(..)));
    assert_eq!(withheld.count(), 1, "it is said once");
}

#[test]
fn who_does_not_answer_goes_before_who_is_slow() {
    let mut told = three();
    assert_eq!(told.tell([UP, SLOW, UP], 2)[1], Phase::Down, "alone, it may go");
    let mut told = three();
    told.tell([SLOW, UP, DOWN], 1);
    assert_eq!(told.tell([SLOW, UP, DOWN], 60), [Phase::Suspect, Phase::Up, Phase::Down]);
    assert_eq!(told.withheld("a"), Some(Withheld::Spare));
}

#[test]
fn for_a_soft_rule_all_others_must_be_up() {
    for others in [[DOWN, UP], [DOUBTFUL, UP]] {
        let mut told = three();
        told.tell([UP, others[0], others[1]], 10);
        assert_eq!(told.tell([SLOW, others[0], others[1]], 2_000)[0], Phase::Suspect);
        assert_eq!(told.withheld("a"), Some(Withheld::Spare));
    }
    let mut told = three();
    told.order("b", Pin::Out, 600).unwrap();
    assert_eq!(told.tell([SLOW, UP, UP], 60)[0], Phase::Suspect, "a drained one is not there either");
}

#[test]
fn the_last_region_stays() {
    let mut told = three();
    told.tell([DOWN, UP, UP], 10);
    assert_eq!(told.tell([DOWN, DOWN, UP], 700), [Phase::Down, Phase::Down, Phase::Up]);
    assert_eq!(told.tell([DOWN, DOWN, DOWN], 7_200), [Phase::Down, Phase::Down, Phase::Suspect]);
    assert_eq!(told.withheld("c"), Some(Withheld::Last));
    assert!(told.fleet.is_helpless(told.now));
}

#[test]
fn where_all_are_bad_all_stay() {
    let mut told = three();
    assert_eq!(told.tell([DOWN, DOWN, DOWN], 7_200), [Phase::Suspect; 3]);
    assert!(told.fleet.is_helpless(told.now));
    assert_eq!(told.tell([UP, UP, UP], 60), [Phase::Up; 3]);
    let mut told = three();
    assert_eq!(told.tell([DOWN, DOUBTFUL, DOUBTFUL], 7_200), [Phase::Suspect; 3], "the others are in doubt");
}

#[test]
fn an_unknown_region_is_as_good_as_any() {
    let mut told = Told::new(FleetSettings::default(), &["a", "b"]);
    assert_eq!(told.tell([DOWN, UNKNOWN], 10), [Phase::Down, Phase::Up]);
}

#[test]
fn a_region_that_is_well_replaces_those_that_are_lost_at_once() {
    let mut told = Told::new(FleetSettings::default(), &["a", "b"]);
    told.tell([DOWN, UP], 10);
    assert_eq!(told.tell([UP, UP], 100), [Phase::Down, Phase::Up]);
    assert_eq!(told.tell([UP, DOWN], 2), [Phase::Suspect, Phase::Suspect], "its hold-down is not over");
    assert_eq!(told.withheld("b"), Some(Withheld::Hold { until: START + 602 * SECOND }));
    assert_eq!(told.tell([UP, DOWN], 489), [Phase::Up, Phase::Suspect]);
    assert_eq!(told.tell([UP, DOWN], 1), [Phase::Up, Phase::Down]);
}

#[test]
fn a_region_that_falls_back_in_its_ramp_needs_no_leave() {
    let mut told = three();
    told.tell([DOWN, UP, UP], 2);
    assert_eq!(told.tell([UP, UP, UP], 365)[0], Phase::Ramp { percent: 1 });
    assert_eq!(told.tell([DOWN, UP, UP], 2)[0], Phase::Down);
    assert_eq!(told.tell([DOWN, DOWN, UP], 100)[1], Phase::Suspect, "and gives none");
    assert_eq!(told.tell([DOWN, DOWN, UP], 133)[1], Phase::Down, "but does not keep others waiting either");
}

#[test]
fn a_drain_wins_and_ends() {
    let mut told = three();
    told.order("a", Pin::Out, 100).unwrap();
    assert_eq!(told.share("a"), 0.0);
    assert_eq!(told.tell([UP, UP, UP], 99)[0], Phase::Down);
    assert_eq!(told.tell([UP, UP, UP], 1)[0], Phase::Probation);
    assert!(told.events.iter().any(|event| matches!(&event.what, What::Ended(order) if order.pin == Pin::Out)));
    assert_eq!(told.tell([UP, UP, UP], 400), [Phase::Up; 3]);
    assert_eq!(told.tell([UP, DOWN, UP], 2)[1], Phase::Down, "it was no automatic way out");
}

#[test]
fn what_is_forced_in_wins_and_ends() {
    let mut told = three();
    told.tell([DOWN, UP, UP], 10);
    told.order("a", Pin::In, 1_000).unwrap();
    assert_eq!(told.share("a"), 1.0);
    assert_eq!(told.tell([DOWN, UP, UP], 999)[0], Phase::Suspect);
    assert_eq!(told.withheld("a"), Some(Withheld::Forced(Cause::Unreachable)));
    let said = |told: &Told| told.events.iter().filter(|event| matches!(event.what, What::Withheld(..))).count();
    assert_eq!(said(&told), 1, "it is said once");
    assert_eq!(told.tell([DOWN, UP, UP], 1)[0], Phase::Down);
    assert_eq!((told.withheld("a"), said(&told)), (None, 1));
}

#[test]
fn an_order_that_is_lifted_ends_at_once() {
    let mut told = three();
    told.order("a", Pin::Out, 1_000).unwrap();
    told.tell([UP, UP, UP], 10);
    let events = told.fleet.lift(&name("a"), told.now);
    assert!(matches!(&events[..], [Event { what: What::Ended(_), .. }]));
    assert!(told.fleet.lift(&name("a"), told.now).is_empty());
    assert_eq!(told.tell([UP, UP, UP], 1)[0], Phase::Probation);
}

#[test]
fn orders_that_cannot_be_taken_are_refused() {
    let mut told = Told::new(FleetSettings::default(), &["a", "b"]);
    assert_eq!(told.order("z", Pin::Out, 60), Err(Refused::Unknown));
    assert_eq!(told.order("a", Pin::Out, 0), Err(Refused::Ended));
    assert_eq!(told.order("a", Pin::Out, 7 * 86_400 + 1), Err(Refused::TooLong));
    told.order("a", Pin::Out, 60).unwrap();
    assert_eq!(told.order("b", Pin::Out, 60), Err(Refused::Last));
    told.order("a", Pin::In, 60).unwrap();
    told.order("b", Pin::Out, 60).unwrap();
    assert_eq!((told.share("a"), told.share("b")), (1.0, 0.0));
    assert_eq!(told.order("a", Pin::Out, 60), Err(Refused::Last));
}

#[test]
fn a_drained_region_comes_back_when_it_is_the_only_one_left() {
    let mut told = Told::new(FleetSettings::default(), &["a", "b"]);
    told.order("a", Pin::Out, 600).unwrap();
    let events = told.fleet.keep(&BTreeSet::from([name("a")]), told.now);
    assert!(matches!(&events[..], [Event { what: What::Ended(_), .. }, Event { what: What::Moved(_), .. }]));
    assert_eq!(told.share("a"), 1.0);
    let mut told = three();
    told.tell([DOWN, UP, UP], 10);
    told.order("b", Pin::Out, 600).unwrap();
    told.fleet.keep(&BTreeSet::from([name("a"), name("b")]), told.now);
    assert_eq!((told.share("a"), told.share("b")), (1.0, 0.0), "rather the one that nobody drained");
}

#[test]
fn another_leader_keeps_what_is_out_and_the_hold() {
    let mut told = three();
    told.tell([DOWN, UP, UP], 100);
    told.order("c", Pin::Out, 600).unwrap();
    let records = told.fleet.records(told.now);
    assert_eq!(records.hold, 502 * SECOND);
    let mut resumed = three();
    resumed.fleet = Fleet::resume(FleetSettings::default(), records, START);
    assert_eq!(resumed.fleet.out(), BTreeSet::from([name("a"), name("c")]));
    resumed.order("c", Pin::Out, 600).unwrap();
    assert_eq!(resumed.tell([UP, DOWN, UP], 10), [Phase::Suspect, Phase::Suspect, Phase::Down], "a is needed");
    assert_eq!(resumed.withheld("b"), Some(Withheld::Hold { until: START + 502 * SECOND }));
    assert_eq!(resumed.tell([UP, DOWN, UP], 492), [Phase::Up, Phase::Down, Phase::Down]);
    let empty = Records { regions: Records::default().regions, hold: Duration::MAX };
    assert_eq!(Fleet::resume(FleetSettings::default(), empty, START).next_out, START + 600 * SECOND);
}

#[test]
fn a_record_without_a_region_that_is_in_is_not_followed() {
    let down = Record { phase: Phase::Down, why: Why::Planned, lasted: SECOND, falls: 3 };
    let regions = BTreeMap::from([(name("a"), down), (name("b"), down)]);
    let mut fleet = Fleet::resume(FleetSettings::default(), Records { regions, hold: SECOND }, START);
    fleet.observe(&BTreeMap::new(), START);
    assert_eq!(fleet.out(), BTreeSet::new());
}

#[derive(Clone, Debug)]
enum Step {
    Words(Vec<(View, Quality)>),
    Order(usize, Pin, u32),
    Lift(usize),
    Keep(Vec<&'static str>),
    Resume,
}

const REGIONS: [&str; 4] = ["a", "b", "c", "d"];

fn words() -> impl Strategy<Value = Vec<(View, Quality)>> {
    let view = prop_oneof![
        5 => Just(View::Up),
        5 => Just(View::Down),
        1 => Just(View::Doubtful),
        1 => Just(View::Unknown),
        1 => Just(View::SomeFailing),
    ];
    let quality = prop_oneof![
        8 => Just(Quality::Fine),
        1 => Just(Quality::Breaching),
        1 => Just(Quality::Slow),
        1 => Just(Quality::Failing),
    ];
    proptest::collection::vec((view, quality), REGIONS.len())
}

fn steps() -> impl Strategy<Value = Vec<(Step, u64)>> {
    let pin = prop_oneof![Just(Pin::Out), Just(Pin::In)];
    let step = prop_oneof![
        10 => words().prop_map(Step::Words),
        2 => (0..4_usize, pin, 0..400_u32).prop_map(|(region, pin, seconds)| Step::Order(region, pin, seconds)),
        1 => (0..4_usize).prop_map(Step::Lift),
        1 => proptest::sample::subsequence(REGIONS.to_vec(), 1..=4).prop_map(Step::Keep),
        1 => Just(Step::Resume),
    ];
    proptest::collection::vec((step, 1..100_u64), 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever happens: something is in; from being in, regions go by themselves with the hold between them; orders
    /// are kept and end; and with steady words exactly the healthy regions are up.
    #[test]
    fn the_fleet_keeps_its_rules(steps in steps(), last in words()) {
        let settings = FleetSettings::dev();
        let mut told = Told::new(settings.clone(), &REGIONS);
        let mut said: Vec<(View, Quality)> = vec![(View::Up, Quality::Fine); 4];
        let (mut last_out, mut ends): (Option<Duration>, BTreeMap<Name, (Pin, Duration)>) = (None, BTreeMap::new());
        let steady = last.into_iter().map(|(view, _)| (view, Quality::Fine)).collect();
        let steady_since = steps.len();
        let steps = steps.into_iter().chain([(Step::Words(steady), 600)]);
        for (number, (step, seconds)) in steps.enumerate() {
            match step {
                Step::Words(words) => said = words,
                Step::Order(region, pin, seconds) => {
                    let until = told.now + seconds * SECOND;
                    let order = Order { pin, until, reason: "".into() };
                    if told.fleet.order(&name(REGIONS[region]), order, told.now).is_ok() {
                        ends.insert(name(REGIONS[region]), (pin, until));
                    }
                }
                Step::Lift(region) => {
                    told.fleet.lift(&name(REGIONS[region]), told.now);
                    ends.remove(REGIONS[region]);
                }
                Step::Keep(regions) => {
                    let names: BTreeSet<Name> = regions.into_iter().map(name).collect();
                    for event in told.fleet.keep(&names, told.now) {
                        if let What::Ended(_) = event.what { ends.remove(&event.region); }
                    }
                    ends.retain(|name, _| names.contains(name));
                }
                Step::Resume => {
                    let records = told.fleet.records(told.now);
                    told.fleet = Fleet::resume(settings.clone(), records, told.now);
                    for (name, (pin, until)) in &ends {
                        let order = Order { pin: *pin, until: *until, reason: "".into() };
                        prop_assert!(told.fleet.order(name, order, told.now).is_ok());
                    }
                }
            }
            for _ in 0..seconds {
                told.now += SECOND;
                let clean = u32::try_from((told.now - START).as_secs() / 5).unwrap();
                let words = REGIONS.iter().zip(&said).map(|(region, (view, quality))| {
                    let clean = if view.is_good() { clean } else { 0 };
                    (name(region), Word { view: *view, clean, quality: *quality })
                });
                let events = told.fleet.observe(&words.collect(), told.now);
                ends.retain(|_, (_, until)| *until > told.now);
                for event in events {
                    let What::Moved(moved) = event.what else { continue };
                    if let (Phase::Up | Phase::Suspect, Phase::Down) = (moved.from, moved.to) {
                        let early = last_out.is_some_and(|last| told.now - last < settings.hold);
                        prop_assert!(!early, "{} at {:?} after {:?}", event.region, told.now, last_out);
                        last_out = Some(told.now);
                    }
                }
                prop_assert!(told.fleet.standings().any(|standing| standing.region.share() > 0.0));
                for Standing { name, region, order, .. } in told.fleet.standings() {
                    prop_assert!((0.0..=1.0).contains(&region.share()));
                    prop_assert_eq!(order.map(|order| (order.pin, order.until)), ends.get(name).copied());
                    match order.map(|order| order.pin) {
                        Some(Pin::Out) => prop_assert_eq!(region.share(), 0.0),
                        Some(Pin::In) => prop_assert!(region.share() >= 1.0),
                        None => prop_assert!(region.pin().is_none()),
                    }
                }
            }
            if number == steady_since {
                let view = |name: &Name| said[REGIONS.iter().position(|region| *region == name.as_str()).unwrap()].0;
                let healthy = told.fleet.members.keys().any(|name| view(name).is_good());
                for Standing { name, region, .. } in told.fleet.standings() {
                    match view(name) {
                        View::Up | View::SomeFailing => prop_assert_eq!(region.phase(), Phase::Up, "{}", name),
                        View::Down if healthy => prop_assert_eq!(region.share(), 0.0, "{}", name),
                        View::Down | View::Doubtful | View::Unknown => {}
                    }
                }
            }
        }
    }

    #[test]
    fn any_settings_are_survived(times in any::<[Duration; 3]>(), steps in proptest::collection::vec((words(), 0..100_u32), 1..30)) {
        let [hold, longest_order, wait] = times;
        let mut fleet = Fleet::new(FleetSettings { hold, longest_order, ..FleetSettings::default() });
        let names: BTreeSet<Name> = REGIONS.iter().map(|region| name(region)).collect();
        let mut now = Duration::ZERO;
        fleet.keep(&names, now);
        for (said, times) in steps {
            now = now.saturating_add(wait.saturating_mul(times));
            let words = names.iter().cloned().zip(said.into_iter().map(|(view, quality)| Word { view, clean: times, quality }));
            fleet.observe(&words.collect(), now);
            let order = Order { pin: Pin::Out, until: now.saturating_add(wait), reason: "".into() };
            let _ = fleet.order(&name(REGIONS[times as usize % 4]), order, now);
            prop_assert!(fleet.standings().any(|standing| standing.region.share() > 0.0));
        }
    }
}
