use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const START: Duration = Duration::from_secs(1_000);

/// A region that is told something each second.
struct Told {
    region: Region,
    now: Duration,
    clean: u32,
    moves: Vec<(u64, Phase)>,
}

impl Told {
    fn new() -> Self {
        Self { region: Region::new(RegionSettings::default(), START), now: START, clean: 0, moves: Vec::new() }
    }

    /// It goes out whenever it should.
    fn tell(&mut self, view: View, quality: Quality, seconds: u64) -> Phase {
        for _ in 0..seconds {
            self.now += SECOND;
            // A probe each five seconds.
            self.clean = match view {
                View::Up if self.now.as_secs().is_multiple_of(5) => self.clean + 1,
                View::Up => self.clean,
                _ => 0,
            };
            let moved = self.region.hear(Word { view, clean: self.clean, quality }, self.now);
            let out = self.region.due(self.now).map(|cause| self.region.put_out(cause, self.now));
            for moved in moved.into_iter().chain(out) {
                self.moves.push(((self.now - START).as_secs(), moved.to));
            }
        }
        self.region.phase()
    }

    fn up(&mut self, seconds: u64) -> Phase {
        self.tell(View::Up, Quality::Fine, seconds)
    }

    fn down(&mut self, seconds: u64) -> Phase {
        self.tell(View::Down, Quality::Fine, seconds)
    }

    fn phases(&self) -> Vec<Phase> {
        self.moves.iter().map(|(_, phase)| *phase).collect()
    }

    /// How often it went from no weight to some, or back.
    fn changes(&self) -> usize {
        let has_weight = |phase: &Phase| !matches!(phase, Phase::Down | Phase::Probation);
        let weights = std::iter::once(true).chain(self.moves.iter().map(|(_, phase)| has_weight(phase)));
        weights.clone().zip(weights.skip(1)).filter(|(before, after)| before != after).count()
    }
}

fn ramp(percent: u8) -> Phase {
    Phase::Ramp { percent }
}

#[test]
fn the_whole_way_out_and_back() {
    let mut told = Told::new();
    told.up(100);
    told.tell(View::Doubtful, Quality::Fine, 10);
    told.down(60);
    told.up(1_000);
    let expected = [
        (101, Phase::Suspect),
        (112, Phase::Down),
        (471, Phase::Probation),
        (530, ramp(1)),
        (590, ramp(5)),
        (650, ramp(25)),
        (710, ramp(50)),
        (770, ramp(100)),
        (830, Phase::Up),
    ];
    assert_eq!(told.moves, expected);
}

#[test]
fn weight_and_standing_follow_the_phase() {
    let mut told = Told::new();
    let mut seen = vec![(told.region.phase(), told.region.share(), told.region.phase().standing())];
    told.down(2);
    for _ in 0..1_000 {
        told.up(1);
        seen.push((told.region.phase(), told.region.share(), told.region.phase().standing()));
    }
    seen.dedup();
    let expected = [
        (Phase::Up, 1.0, Standing::Steady),
        (Phase::Down, 0.0, Standing::Out),
        (Phase::Probation, 0.0, Standing::Out),
        (ramp(1), 0.01, Standing::Unsteady),
        (ramp(5), 0.05, Standing::Unsteady),
        (ramp(25), 0.25, Standing::Unsteady),
        (ramp(50), 0.5, Standing::Unsteady),
        (ramp(100), 1.0, Standing::Unsteady),
        (Phase::Up, 1.0, Standing::Steady),
    ];
    assert_eq!(seen, expected);
    let mut told = Told::new();
    told.tell(View::Doubtful, Quality::Fine, 1);
    assert_eq!(
        (told.region.phase(), told.region.share(), told.region.phase().standing()),
        (Phase::Suspect, 1.0, Standing::Unsteady)
    );
}

#[test]
fn a_verdict_must_stand_for_a_second() {
    let mut region = Region::new(RegionSettings::default(), START);
    let word = |view| Word { view, ..Word::default() };
    let millis = |millis| START + Duration::from_millis(millis);
    region.hear(word(View::Down), millis(0));
    assert_eq!((region.phase(), region.due(millis(999))), (Phase::Suspect, None));
    region.hear(word(View::Doubtful), millis(999));
    region.hear(word(View::Down), millis(1_000));
    assert_eq!(region.due(millis(1_999)), None, "it began anew");
    assert_eq!(region.due(millis(2_000)), Some(Cause::Unreachable));
}

#[test]
fn doubt_moves_no_weight() {
    let mut told = Told::new();
    told.tell(View::Doubtful, Quality::Fine, 600);
    assert_eq!(told.up(29), Phase::Suspect);
    assert_eq!(told.up(2), Phase::Up);
    told.tell(View::SomeFailing, Quality::Breaching, 600);
    assert_eq!(told.phases(), [Phase::Suspect, Phase::Up]);
}

#[test]
fn what_is_not_known_changes_nothing() {
    let mut told = Told::new();
    assert_eq!(told.tell(View::Unknown, Quality::Fine, 3_600), Phase::Up);
    told.down(1);
    assert_eq!(told.tell(View::Unknown, Quality::Fine, 3_600), Phase::Suspect);
    told.down(2);
    assert_eq!(told.tell(View::Unknown, Quality::Fine, 3_600), Phase::Down);
    told.up(302);
    assert_eq!(told.tell(View::Unknown, Quality::Fine, 3_600), Phase::Probation);
    told.up(70);
    assert_eq!(told.tell(View::Unknown, Quality::Fine, 3_600), ramp(1));
}

#[test]
fn a_soft_verdict_goes_the_same_way() {
    let mut told = Told::new();
    told.tell(View::Up, Quality::Slow, 2);
    assert_eq!(told.phases(), [Phase::Suspect, Phase::Down]);
    assert_eq!(told.region.why(), Why::Verdict(Cause::Slow));
    told.down(1);
    assert_eq!(told.region.standing_verdict(told.now), Some(Cause::Unreachable), "the worse of two");
}

#[test]
fn a_probation_needs_twelve_good_probes_that_begin_with_it() {
    let mut told = Told::new();
    told.down(2);
    told.up(301);
    assert_eq!(told.region.phase(), Phase::Probation);
    assert_eq!(told.up(50), Phase::Probation);
    told.tell(View::Doubtful, Quality::Fine, 1);
    assert_eq!(told.up(59), Phase::Probation, "one bad probe begins it anew");
    assert_eq!(told.up(2), ramp(1));
}

#[test]
fn bad_evidence_in_probation_and_ramp_leads_back_down() {
    for well in [305, 370, 430, 490, 550, 610] {
        let mut told = Told::new();
        told.down(2);
        told.up(well);
        assert_ne!(told.region.phase(), Phase::Down);
        told.down(2);
        assert_eq!((told.region.phase(), told.region.falls()), (Phase::Down, 2));
        assert_eq!(told.up(600), Phase::Down, "twice as long");
        assert_eq!(told.up(2), Phase::Probation);
    }
}

#[test]
fn the_ramp_waits_while_a_limit_is_breached_or_probes_fail() {
    let mut told = Told::new();
    told.down(2);
    told.up(400);
    assert_eq!(told.region.phase(), ramp(1));
    assert_eq!(told.tell(View::Up, Quality::Breaching, 299), ramp(1));
    assert_eq!(told.tell(View::Doubtful, Quality::Fine, 300), ramp(1));
    assert_eq!(told.up(60), ramp(1));
    assert_eq!(told.up(1), ramp(5));
}

#[test]
fn the_hold_down_doubles_with_each_fall_and_time_up_forgives_them() {
    let mut told = Told::new();
    for (falls, hold) in [(1, 300), (2, 600), (3, 1_200), (4, 1_800), (5, 1_800)] {
        told.down(2);
        assert_eq!((told.region.phase(), told.region.falls()), (Phase::Down, falls));
        assert_eq!(told.up(hold), Phase::Down);
        assert_eq!(told.up(1), Phase::Probation);
        assert_eq!(told.up(365), Phase::Up);
    }
    told.up(3_600);
    told.down(2);
    assert_eq!(told.region.falls(), 4, "of five, two were forgotten in an hour");
}

#[test]
fn the_hold_down_begins_with_the_last_bad_word() {
    let mut told = Told::new();
    told.down(2);
    for _ in 0..10 {
        assert_eq!(told.up(300), Phase::Down);
        told.tell(View::Doubtful, Quality::Fine, 1);
    }
    assert_eq!((told.up(302), told.region.falls()), (Phase::Probation, 1));
}

/// What operators count on: half an hour of flapping is at most one way out and one way back.
#[test]
fn thirty_minutes_of_flapping_move_the_weight_twice_at_most() {
    for bad in [2, 5, 17, 30, 60, 120, 300, 600] {
        for good in [1, 5, 20, 60, 120, 180, 240, 300, 340] {
            let mut told = Told::new();
            while told.now < START + Duration::from_secs(1_800) {
                told.down(bad);
                told.up(good);
            }
            assert!(told.changes() <= 2, "{bad} s down, {good} s up: {:?}", told.moves);
        }
    }
    let mut slow = Told::new();
    while slow.now < START + Duration::from_secs(7_200) {
        slow.down(60);
        slow.up(420);
    }
    let outs = slow.moves.iter().filter(|(_, phase)| *phase == Phase::Down).count();
    assert!(outs <= 3, "with longer breaks, by the doubled hold-down: {:?}", slow.moves);
}

#[test]
fn a_drain_is_at_once_and_lasts_until_it_is_lifted() {
    let mut told = Told::new();
    told.up(10);
    let moved = told.region.drain(told.now).unwrap();
    assert_eq!((moved.to, moved.why), (Phase::Down, Why::Drained));
    assert_eq!(told.up(3_600), Phase::Down);
    told.region.unpin();
    assert_eq!(told.up(1), Phase::Probation, "without a hold-down");
    told.up(60);
    assert_eq!((told.region.phase(), told.region.falls()), (ramp(1), 0));
    assert!(told.region.drain(told.now).is_some());
    told.region.force_in(told.now);
    assert_eq!(told.region.phase(), Phase::Suspect);
}

#[test]
fn a_region_that_is_forced_in_stays_in_until_that_ends() {
    let mut told = Told::new();
    told.down(10);
    assert_eq!(told.region.force_in(told.now).map(|moved| moved.to), Some(Phase::Suspect));
    assert_eq!(told.down(3_600), Phase::Suspect);
    assert_eq!(told.region.share(), 1.0);
    told.region.unpin();
    assert_eq!(told.down(1), Phase::Down);
}

#[test]
fn another_leader_goes_on_where_the_first_one_was() {
    let mut told = Told::new();
    told.down(2);
    for _ in 0..800 {
        told.up(1);
        let record = told.region.record(told.now);
        let later = 5 * START;
        let resumed = Region::resume(RegionSettings::default(), record, later);
        assert_eq!((resumed.phase(), resumed.share()), (told.region.phase(), told.region.share()));
        assert_eq!(resumed.record(later), record);
    }
    told.down(2);
    told.up(10);
    let mut resumed = Told::new();
    resumed.region = Region::resume(RegionSettings::default(), told.region.record(told.now), START);
    assert_eq!(resumed.up(600), Phase::Down, "the hold-down is the doubled one");
    assert_eq!(resumed.up(2), Phase::Probation);
    resumed.up(30);
    resumed.region = Region::resume(RegionSettings::default(), resumed.region.record(resumed.now), resumed.now);
    assert_eq!(resumed.up(50), Phase::Probation, "what was clean before does not count");
    assert_eq!(resumed.up(15), ramp(1));
}

#[test]
fn phases_and_reasons_read_well() {
    let mut told = Told::new();
    told.down(2);
    assert_eq!(told.region.phase().to_string(), "DOWN");
    assert_eq!(told.region.why().to_string(), "more than half of its probed pairs have failed");
    assert_eq!(ramp(25).to_string(), "RAMP 25 %");
}

#[derive(Clone, Debug)]
enum Step {
    Hear(View, Quality, u32),
    PutOut,
    Drain,
    ForceIn,
    Unpin,
    Admit,
    Resume,
}

fn views() -> impl Strategy<Value = View> {
    prop_oneof![
        1 => Just(View::Unknown),
        6 => Just(View::Up),
        1 => Just(View::SomeFailing),
        1 => Just(View::Doubtful),
        2 => Just(View::Down),
    ]
}

fn qualities() -> impl Strategy<Value = Quality> {
    prop_oneof![
        12 => Just(Quality::Fine),
        1 => Just(Quality::Breaching),
        1 => Just(Quality::Slow),
        1 => Just(Quality::Failing),
    ]
}

fn steps() -> impl Strategy<Value = Vec<(Step, u32)>> {
    let step = prop_oneof![
        30 => (views(), qualities(), 0..40_u32).prop_map(|(view, quality, clean)| Step::Hear(view, quality, clean)),
        6 => Just(Step::PutOut),
        1 => Just(Step::Drain),
        1 => Just(Step::ForceIn),
        1 => Just(Step::Unpin),
        1 => Just(Step::Admit),
        1 => Just(Step::Resume),
    ];
    proptest::collection::vec((step, 0..400_u32), 1..200)
}

proptest! {
    /// Weight goes up by the ramp alone, or at once by an operator or for need; it is lost only by a verdict or an
    /// operator; who is pinned stays; and being well always leads up.
    #[test]
    fn weight_moves_only_by_the_rules(steps in steps()) {
        let settings = RegionSettings::default();
        let (mut region, mut now) = (Region::new(settings.clone(), START), START);
        for (step, wait) in steps {
            now += wait * SECOND;
            let (before, why) = (region.share(), region.why());
            let moved = match step {
                Step::Hear(view, quality, clean) => {
                    let moved = region.hear(Word { view, clean, quality }, now);
                    let rises = matches!(moved, Some(Move { why: Why::Clean | Why::Climbed, .. }));
                    prop_assert!(region.share() == before || (region.share() > before && rises));
                    prop_assert!(view.is_good() || !rises);
                    moved
                }
                Step::PutOut => {
                    let due = region.due(now);
                    prop_assert!(due.is_none() || (before > 0.0 && region.pin() != Some(Pin::In)));
                    due.map(|cause| region.put_out(cause, now))
                }
                Step::Drain => region.drain(now),
                Step::ForceIn => region.force_in(now),
                Step::Unpin => { region.unpin(); None }
                Step::Admit if region.pin() == Some(Pin::Out) => None,
                Step::Admit => region.admit(Why::Needed, now),
                Step::Resume => {
                    let pin = region.pin();
                    region = Region::resume(settings.clone(), region.record(now), now);
                    match pin {
                        Some(Pin::Out) => region.drain(now),
                        Some(Pin::In) => region.force_in(now),
                        None => None,
                    }
                }
            };
            if let Some(moved) = moved {
                prop_assert_eq!((moved.to, moved.why), (region.phase(), region.why()));
            } else {
                prop_assert_eq!((before, why), (region.share(), region.why()));
            }
            prop_assert!((0.0..=1.0).contains(&region.share()));
            prop_assert_eq!(region.phase().standing() == Standing::Out, region.share() == 0.0);
            match region.pin() {
                Some(Pin::Out) => prop_assert_eq!(region.share(), 0.0),
                Some(Pin::In) => prop_assert!(region.share() >= 1.0),
                None => {}
            }
        }
        region.unpin();
        for clean in 0..3_000 {
            now += SECOND;
            region.hear(Word { view: View::Up, clean: clean / 5, quality: Quality::Fine }, now);
        }
        prop_assert_eq!(region.phase(), Phase::Up);
    }

    #[test]
    fn any_settings_are_survived(times in any::<[Duration; 6]>(), clean: u32, steps in steps()) {
        let [down_after, calm_after, hold_down, longest_hold_down, forgive_after, step_for] = times;
        let settings = RegionSettings {
            down_after, calm_after, hold_down, longest_hold_down, forgive_after, clean, step_for,
        };
        let mut region = Region::new(settings, START);
        for (step, wait) in steps {
            let now = START.saturating_add(times[0].saturating_mul(wait));
            if let Step::Hear(view, quality, clean) = step {
                region.hear(Word { view, clean, quality }, now);
            }
            region.put_out(Cause::Slow, now);
        }
    }
}
