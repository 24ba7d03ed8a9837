use proptest::prelude::*;

use super::*;
use crate::rollout::Kind;

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://td/region/{path}")).unwrap()
}

/// Three regions of two gateways, a sidecar and a control node.
fn nodes() -> Vec<SpiffeId> {
    let of_region = |region: &str| {
        ["gateway/one", "gateway/two", "sidecar/scorers/one", "control/one"].map(|node| id(&format!("{region}/{node}")))
    };
    ["ap", "eu", "us"].into_iter().flat_map(of_region).collect()
}

/// A fleet whose nodes all serve version 1.
struct World {
    rollout: Rollout,
    nodes: Vec<SpiffeId>,
    now: Duration,
}

impl World {
    fn new() -> Self {
        let mut rollout = Rollout::new(RolloutSettings::default(), 1);
        assert!(nodes().iter().all(|node| rollout.join(node, 1)));
        Self { rollout, nodes: nodes(), now: SECOND * 100 }
    }

    fn begun(version: u64, kind: Kind) -> Self {
        let mut world = Self::new();
        world.begin(version, kind);
        world
    }

    /// An ordinary change that has passed its stages.
    fn begun_for_all(version: u64) -> Self {
        let mut world = Self::begun(version, Kind::Ordinary);
        for _ in 0..2 {
            world.apply_all();
            world.pass(SECOND * 30);
        }
        assert_eq!(world.stage(), Some((Stage::All, false)));
        world
    }

    fn begin(&mut self, version: u64, kind: Kind) -> Option<Change> {
        self.rollout.begin(Change { version, kind }, self.now).unwrap()
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.rollout.tick(self.now);
    }

    /// Nodes that are to be given this version.
    fn wanted(&self, version: u64) -> Vec<SpiffeId> {
        self.nodes.iter().filter(|node| self.rollout.wanted(node) == Some(version)).cloned().collect()
    }

    /// These nodes apply what they are to be given.
    fn apply(&mut self, nodes: &[SpiffeId]) {
        for node in nodes {
            let Some(version) = self.rollout.wanted(node) else { continue };
            for ack in [Ack::Validated, Ack::Persisted, Ack::Applied] {
                self.rollout.ack(node, version, ack);
            }
        }
        self.rollout.tick(self.now);
    }

    fn apply_all(&mut self) {
        self.apply(&self.nodes.clone());
    }

    fn stage(&self) -> Option<(Stage, bool)> {
        match self.rollout.progress() {
            Progress::Running { stage, watching } => Some((stage, watching)),
            _ => None,
        }
    }

    fn canary(&self) -> SpiffeId {
        self.rollout.running().unwrap().canary.clone().unwrap()
    }

    /// All nodes of the canary's region but itself.
    fn neighbours(&self) -> Vec<SpiffeId> {
        let canary = self.canary();
        self.nodes.iter().filter(|node| region_of(node) == region_of(&canary) && **node != canary).cloned().collect()
    }

    fn measure(&mut self, nodes: &[SpiffeId], errors: u64, p99: u64) {
        for node in nodes {
            let serving = self.rollout.fleet.get(node).unwrap().serving;
            let sample = Sample { requests: 500, errors, p99: Some(MS * u32::try_from(p99).unwrap()) };
            self.rollout.heartbeat(node, serving, &sample);
        }
        self.rollout.tick(self.now);
    }

    fn stopped(&self) -> Option<Stop> {
        match self.rollout.progress() {
            Progress::Stopped(stop) => Some(stop),
            _ => None,
        }
    }
}

fn refusal() -> Vec<String> {
    vec!["no region".to_owned()]
}

#[test]
fn a_change_goes_from_one_gateway_to_its_region_to_all() {
    let mut world = World::begun(2, Kind::Ordinary);
    let canary = world.canary();
    assert!(is_gateway(&canary));
    assert_eq!((world.stage(), world.wanted(2)), (Some((Stage::Canary, false)), vec![canary.clone()]));
    world.rollout.ack(&canary, 2, Ack::Persisted);
    world.pass(SECOND);
    assert_eq!(world.stage(), Some((Stage::Canary, false)), "it has not applied it yet");
    world.rollout.ack(&canary, 2, Ack::Applied);
    world.pass(SECOND);
    assert_eq!((world.stage(), world.wanted(2)), (Some((Stage::Canary, true)), vec![]));
    world.pass(SECOND * 30 - MS);
    assert_eq!(world.stage(), Some((Stage::Canary, true)));
    world.pass(MS);
    assert_eq!((world.stage(), world.wanted(2)), (Some((Stage::Region, false)), world.neighbours()));
    world.apply_all();
    assert_eq!((world.stage(), world.wanted(2)), (Some((Stage::Region, true)), vec![]));
    world.pass(SECOND * 30);
    assert_eq!((world.stage(), world.wanted(2).len()), (Some((Stage::All, false)), 8));
    assert_eq!(world.rollout.settled(), 1);
    world.apply_all();
    assert_eq!((world.rollout.progress(), world.rollout.settled()), (Progress::Done { behind: 0 }, 2));
    assert!(!world.rollout.needs_rollback());
}

#[test]
fn a_heartbeat_tells_what_a_lost_ack_did_not() {
    let mut world = World::begun(2, Kind::Ordinary);
    let canary = world.canary();
    world.rollout.heartbeat(&canary, 2, &Sample::default());
    world.pass(MS);
    assert_eq!(world.stage(), Some((Stage::Canary, true)));
}

#[test]
fn another_gateway_is_the_canary_of_another_version() {
    let canaries: BTreeSet<SpiffeId> = (2..40).map(|version| World::begun(version, Kind::Ordinary).canary()).collect();
    assert_eq!(canaries.len(), 6);
    assert_eq!(World::begun(7, Kind::Ordinary).canary(), World::begun(7, Kind::Ordinary).canary());
}

#[test]
fn a_refusal_stops_a_change_in_any_stage() {
    for kind in [Kind::Ordinary, Kind::Rollback] {
        for stage in [Stage::Canary, Stage::Region, Stage::All] {
            let mut world = World::begun(2, kind);
            while world.stage().unwrap().0 < stage {
                world.apply_all();
                world.pass(SECOND);
            }
            let (node, holders) = (world.wanted(2)[0].clone(), world.rollout.strays().count());
            world.rollout.nack(&node, 2, &refusal());
            assert_eq!(world.stopped(), Some(Stop::Refused { node, reasons: refusal() }));
            assert_eq!(world.wanted(2), [], "nobody else gets it");
            world.pass(SECOND * 999);
            assert_eq!((world.rollout.settled(), world.wanted(1).len()), (1, 0));
            assert_eq!(world.rollout.needs_rollback(), holders > 0, "{stage:?}");
        }
    }
}

#[test]
fn a_refusal_of_another_version_stops_nothing() {
    let mut world = World::begun(2, Kind::Ordinary);
    let nodes = world.nodes.clone();
    world.rollout.nack(&nodes[0], 1, &refusal());
    world.rollout.nack(&id("eu/gateway/unknown"), 2, &refusal());
    assert_eq!(world.stage(), Some((Stage::Canary, false)));
}

#[test]
fn a_canary_that_does_worse_than_its_peers_stops_the_change() {
    for (errors, p99, stops) in [(0, 20, false), (2, 35, false), (50, 20, true), (0, 200, true)] {
        let mut world = World::begun(2, Kind::Ordinary);
        let canary = world.canary();
        let neighbours = world.neighbours();
        world.apply_all();
        world.measure(&neighbours, 0, 20);
        world.measure(&[canary], errors, p99);
        assert_eq!(world.stopped().is_some(), stops, "{errors} {p99}: {:?}", world.rollout.progress());
        assert_eq!(world.rollout.needs_rollback(), stops);
    }
}

#[test]
fn a_canary_is_held_against_all_where_its_region_says_too_little() {
    let mut world = World::begun(2, Kind::Ordinary);
    let (canary, neighbours) = (world.canary(), world.neighbours());
    world.apply_all();
    world.measure(&[canary], 50, 20);
    assert_eq!(world.stopped(), None, "no peer has measured anything");
    let far = |node: &&SpiffeId| region_of(node) != region_of(&neighbours[0]);
    let far: Vec<SpiffeId> = world.nodes.iter().filter(far).cloned().collect();
    world.measure(&far, 0, 20);
    assert!(matches!(world.stopped(), Some(Stop::Worse(Worse::Errors { .. }))));
}

#[test]
fn a_region_that_does_worse_than_the_others_stops_the_change() {
    let mut world = World::begun(2, Kind::Ordinary);
    world.apply_all();
    world.pass(SECOND * 30);
    world.apply_all();
    assert_eq!(world.stage(), Some((Stage::Region, true)));
    world.measure(&world.nodes.clone(), 5, 20);
    assert_eq!(world.stopped(), None);
    let (canary, mut region) = (world.canary(), world.neighbours());
    region.push(canary);
    world.measure(&region, 50, 20);
    assert!(matches!(world.stopped(), Some(Stop::Worse(Worse::Errors { .. }))));
    assert_eq!(world.rollout.strays().count(), 4);
}

#[test]
fn what_was_measured_before_the_version_says_nothing_about_it() {
    let mut world = World::new();
    world.measure(&world.nodes.clone(), 250, 900);
    world.begin(2, Kind::Ordinary);
    let (canary, neighbours) = (world.canary(), world.neighbours());
    world.measure(&[canary], 250, 900);
    world.apply_all();
    world.measure(&neighbours, 0, 20);
    assert_eq!(world.stopped(), None);
}

#[test]
fn a_lost_canary_is_replaced_once() {
    // It goes before it has the version; after it; it never answers; it comes back with the old version.
    for way in 0..4 {
        let mut world = World::begun(2, Kind::Ordinary);
        let first = world.canary();
        let lose = |world: &mut World| {
            let canary = world.canary();
            if way == 1 || way == 3 {
                world.apply(std::slice::from_ref(&canary));
            }
            match way {
                0 | 1 => world.rollout.leave(&canary, world.now),
                2 => world.pass(SECOND * 15),
                _ => assert!(world.rollout.join(&canary, 1)),
            }
            world.pass(MS);
        };
        lose(&mut world);
        let second = world.canary();
        assert_ne!(first, second, "{way}");
        assert_eq!(world.wanted(2), std::slice::from_ref(&second), "{way}: one at a time");
        lose(&mut world);
        assert_eq!(world.stopped(), Some(Stop::CanariesLost { lost: 2 }), "{way}");
    }
}

#[test]
fn nodes_that_are_away_are_not_waited_for_and_get_what_is_due_when_they_come() {
    let mut world = World::new();
    let away = [id("ap/gateway/one"), id("eu/gateway/one"), id("us/gateway/one")];
    away.iter().for_each(|node| world.rollout.leave(node, world.now));
    world.begin(2, Kind::Ordinary);
    assert!(!away.contains(&world.canary()));
    for _ in 0..2 {
        world.apply_all();
        world.pass(SECOND * 30);
    }
    assert!(away.iter().all(|node| world.rollout.wanted(node).is_none()));
    world.apply_all();
    assert_eq!(world.rollout.progress(), Progress::Done { behind: 0 });
    world.rollout.join(&away[0], 1);
    assert_eq!(world.wanted(2), [away[0].clone()]);
    assert_eq!(world.rollout.progress(), Progress::Done { behind: 1 });
    world.rollout.join(&away[1], 2);
    assert_eq!(world.rollout.wanted(&away[1]), None, "its disk had it");
}

#[test]
fn who_comes_in_the_midst_gets_what_its_stage_is_due() {
    let mut world = World::new();
    let late = [id("eu/gateway/late"), id("us/gateway/late"), id("ap/gateway/late")];
    world.begin(2, Kind::Ordinary);
    late.iter().for_each(|node| assert!(world.rollout.join(node, 0)));
    assert!(late.iter().all(|node| world.rollout.wanted(node) == Some(1)), "what has settled");
    world.apply_all();
    world.pass(SECOND * 30);
    let canary = world.canary();
    for node in &late {
        let due = if region_of(node) == region_of(&canary) { 2 } else { 1 };
        assert_eq!(world.rollout.wanted(node), Some(due));
    }
}

#[test]
fn more_than_half_of_the_region_must_apply_it_and_stay() {
    // Of four nodes, the canary included.
    for (others, passes) in [(0, false), (1, false), (2, true), (3, true)] {
        for leaves in [false, true] {
            let mut world = World::begun(2, Kind::Ordinary);
            world.apply_all();
            world.pass(SECOND * 30);
            let neighbours = world.neighbours();
            world.apply(&neighbours[..others]);
            if leaves {
                for node in &neighbours[others..] {
                    world.apply(std::slice::from_ref(node));
                    world.rollout.leave(node, world.now);
                }
                world.pass(MS);
            } else {
                assert_eq!(world.stage(), Some((Stage::Region, others == 3)));
                world.pass(SECOND * 15);
            }
            assert_eq!(world.stage(), Some((Stage::Region, true)));
            world.pass(SECOND * 30);
            if passes {
                assert_eq!(world.stage(), Some((Stage::All, false)));
            } else {
                let few = Stop::TooFew { applied: others + 1, given: 4 };
                assert_eq!(world.stopped(), Some(few), "{others} {leaves}");
            }
        }
    }
}

#[test]
fn the_last_stage_ends_without_silent_nodes() {
    let mut world = World::begun_for_all(2);
    let silent = world.wanted(2)[..3].to_vec();
    let others: Vec<SpiffeId> = world.nodes.iter().filter(|node| !silent.contains(node)).cloned().collect();
    world.apply(&others);
    world.pass(SECOND * 15 - MS);
    assert_eq!(world.stage(), Some((Stage::All, false)));
    world.pass(MS);
    assert_eq!((world.rollout.progress(), world.wanted(2)), (Progress::Done { behind: 3 }, silent));
}

#[test]
fn without_a_gateway_to_be_seen_a_change_waits_and_then_goes_to_all() {
    let mut rollout = Rollout::new(RolloutSettings::default(), 1);
    rollout.begin(Change { version: 2, kind: Kind::Ordinary }, SECOND).unwrap();
    let sidecar = id("eu/sidecar/scorers/one");
    rollout.join(&sidecar, 1);
    rollout.tick(SECOND * 15);
    assert_eq!(rollout.wanted(&sidecar), None);
    rollout.tick(SECOND * 16);
    assert_eq!(rollout.wanted(&sidecar), Some(2));
}

#[test]
fn gateways_that_are_all_away_are_waited_for_but_not_for_ever() {
    let mut world = World::new();
    for node in world.nodes.clone().iter().filter(|node| is_gateway(node)) {
        world.rollout.leave(node, world.now);
    }
    world.begin(2, Kind::Ordinary);
    world.pass(SECOND * 90 - MS);
    assert_eq!(world.stage(), Some((Stage::Canary, false)));
    let mut other = World { rollout: world.rollout.clone(), nodes: nodes(), now: world.now };
    other.rollout.join(&id("eu/gateway/one"), 1);
    other.rollout.tick(other.now);
    assert_eq!(other.canary(), id("eu/gateway/one"));
    world.pass(MS);
    assert_eq!(world.stopped(), Some(Stop::NoCanary));
}

#[test]
fn a_node_that_refuses_what_has_settled_gets_it_again_as_another_build() {
    let mut world = World::begun_for_all(2);
    world.apply_all();
    let late = id("eu/gateway/late");
    world.rollout.join(&late, 1);
    assert_eq!(world.rollout.wanted(&late), Some(2));
    world.rollout.nack(&late, 2, &refusal());
    assert_eq!((world.rollout.progress(), world.rollout.wanted(&late)), (Progress::Done { behind: 1 }, None));
    world.rollout.join(&late, 1);
    assert_eq!(world.rollout.wanted(&late), Some(2));
}

#[test]
fn who_is_no_node_is_not_let_in_and_given_nothing() {
    let mut world = World::begun_for_all(2);
    let client = SpiffeId::parse("spiffe://td/tenant/shop/client/one").unwrap();
    assert!(!world.rollout.join(&client, 1));
    world.rollout.ack(&client, 2, Ack::Applied);
    world.rollout.heartbeat(&client, 2, &Sample::default());
    world.rollout.leave(&client, world.now);
    assert_eq!((world.rollout.wanted(&client), world.rollout.wanted(&id("eu/gateway/unknown"))), (None, None));
}

#[test]
fn a_node_that_refuses_all_it_is_given_is_left_alone() {
    let mut world = World::begun(2, Kind::Ordinary);
    let node = world.canary();
    world.rollout.join(&node, 0);
    let mut given = Vec::new();
    while let Some(version) = world.rollout.wanted(&node) {
        given.push(version);
        world.rollout.nack(&node, version, &refusal());
    }
    assert_eq!(given, [2, 1]);
}

#[test]
fn a_newer_version_takes_the_place_of_one_under_way() {
    let mut world = World::begun(2, Kind::Ordinary);
    let canary = world.canary();
    world.apply_all();
    for version in [0, 1, 2] {
        let refused = world.rollout.begin(Change { version, kind: Kind::Rollback }, world.now);
        assert_eq!(refused, Err(NotNewer { offered: version, newest: 2 }));
    }
    let overtaken = Some(Change { version: 2, kind: Kind::Ordinary });
    assert_eq!(world.begin(3, Kind::Ordinary), overtaken, "what had not passed its stages");
    assert_eq!(
        (world.canary(), world.wanted(3)),
        (canary.clone(), vec![canary]),
        "who has the unproven one tries again"
    );
    assert_eq!(world.wanted(2), []);
    assert_eq!(world.begin(4, Kind::Rollback).map(|change| change.version), Some(3));
    assert_eq!((world.wanted(4), world.rollout.settled()), (vec![world.canary()], 1));
}

#[test]
fn what_was_given_to_all_counts_as_settled_when_it_is_overtaken() {
    let mut world = World::begun_for_all(2);
    let some = world.nodes[..5].to_vec();
    world.apply(&some);
    assert_eq!(world.begin(3, Kind::Ordinary), None);
    assert_eq!((world.rollout.settled(), world.wanted(3).len()), (2, 1));
    let canary = world.canary();
    let is_behind = |node: &&SpiffeId| world.rollout.fleet.get(node).unwrap().serving < 2 && **node != canary;
    let behind: Vec<SpiffeId> = world.nodes.iter().filter(is_behind).cloned().collect();
    assert!(behind.len() >= 3);
    assert_eq!(world.wanted(2), behind, "they are still given it");
}

#[test]
fn a_rollback_after_a_stop_begins_where_the_damage_is() {
    let mut world = World::begun(2, Kind::Ordinary);
    let canary = world.canary();
    world.apply_all();
    world.rollout.nack(&canary, 2, &refusal());
    assert!(world.rollout.needs_rollback());
    assert_eq!(world.begin(3, Kind::Rollback), None);
    assert_eq!(world.canary(), canary);
    let began = world.now;
    while world.stage().is_some() {
        world.apply_all();
        world.pass(MS * 100);
    }
    assert_eq!((world.rollout.progress(), world.rollout.settled()), (Progress::Done { behind: 0 }, 3));
    assert!(world.now - began <= SECOND * 3, "two dwells");
}

#[test]
fn a_rollback_takes_at_most_10_s_whatever_nodes_do() {
    let settings = RolloutSettings::default();
    assert_eq!(settings.longest(Kind::Rollback), SECOND * 9);
    assert_eq!(settings.longest(Kind::Ordinary), SECOND * 150);
    let endless = Pace { patience: Duration::MAX, canaries: u32::MAX, ..settings.ordinary.clone() };
    assert_eq!(RolloutSettings { ordinary: endless, ..settings }.longest(Kind::Ordinary), Duration::MAX);
}

#[test]
fn a_new_leader_takes_up_a_change_where_nodes_are() {
    // The canary's region serves version 2; the leader knows only that 1 has settled and 2 was begun.
    let mut rollout = Rollout::new(RolloutSettings::default(), 1);
    for node in nodes() {
        let serving = if region_of(&node).unwrap().as_str() == "eu" { 2 } else { 1 };
        rollout.join(&node, serving);
    }
    rollout.begin(Change { version: 2, kind: Kind::Ordinary }, SECOND).unwrap();
    let canary = rollout.running().unwrap().canary.clone().unwrap();
    assert_eq!(region_of(&canary).unwrap().as_str(), "eu");
    assert_eq!(rollout.progress(), Progress::Running { stage: Stage::Canary, watching: true });
    rollout.tick(SECOND * 31);
    assert_eq!(rollout.progress(), Progress::Running { stage: Stage::Region, watching: true });
}

#[test]
fn time_that_steps_back_does_no_harm() {
    let mut world = World::begun(2, Kind::Ordinary);
    world.apply_all();
    world.rollout.tick(Duration::ZERO);
    world.pass(SECOND * 30);
    assert_eq!(world.stage(), Some((Stage::Region, false)));
    world.rollout.tick(Duration::MAX);
    world.rollout.tick(Duration::ZERO);
}

/// What happens to one of 12 nodes.
#[derive(Clone, Debug)]
enum Event {
    Apply(usize),
    /// It says that it serves a version; perhaps one that nobody gave it.
    Claim(usize, u64),
    Refuse(usize),
    Leave(usize),
    Join(usize),
    Measure(usize, Sample),
    Begin(Kind),
    Pass(Duration),
}

fn any_event() -> impl Strategy<Value = Event> {
    let sample = (0_u64..2_000, 0_u64..100, proptest::option::of(1_u64..100))
        .prop_map(|(requests, errors, p99)| Sample { requests, errors, p99: p99.map(Duration::from_millis) });
    let kind = prop_oneof![Just(Kind::Ordinary), Just(Kind::Rollback)];
    prop_oneof![
        20 => (0_usize..12).prop_map(Event::Apply),
        1 => (0_usize..12, 0_u64..20).prop_map(|(node, version)| Event::Claim(node, version)),
        1 => (0_usize..12).prop_map(Event::Refuse),
        3 => (0_usize..12).prop_map(Event::Leave),
        5 => (0_usize..12).prop_map(Event::Join),
        5 => (0_usize..12, sample).prop_map(|(node, sample)| Event::Measure(node, sample)),
        2 => kind.prop_map(Event::Begin),
        20 => (0_u64..8_000).prop_map(|time| Event::Pass(Duration::from_millis(time))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_change_is_in_one_stage_goes_no_further_once_stopped_and_ends(
        events in proptest::collection::vec(any_event(), 1..200),
    ) {
        let mut world = World::new();
        let mut serving = vec![1_u64; world.nodes.len()];
        let (mut newest, mut began) = (1, world.now);
        // Versions that may be given to nobody any more.
        let mut stopped: BTreeSet<u64> = BTreeSet::new();
        let mut last: Option<(u64, Stage)> = None;
        let mut settled = 1;
        for event in events {
            match event {
                Event::Apply(node) => {
                    if let Some(version) = world.rollout.wanted(&world.nodes[node]) {
                        prop_assert!(version > serving[node], "never back");
                        serving[node] = version;
                        world.rollout.ack(&world.nodes[node].clone(), version, Ack::Applied);
                    }
                }
                Event::Claim(node, version) => {
                    serving[node] = version;
                    world.rollout.heartbeat(&world.nodes[node].clone(), version, &Sample::default());
                }
                Event::Refuse(node) => {
                    let node = world.nodes[node].clone();
                    if let Some(version) = world.rollout.wanted(&node) {
                        world.rollout.nack(&node, version, &refusal());
                        prop_assert_ne!(world.rollout.wanted(&node), Some(version), "not again");
                    }
                }
                Event::Leave(node) => world.rollout.leave(&world.nodes[node].clone(), world.now),
                Event::Join(node) => {
                    prop_assert!(world.rollout.join(&world.nodes[node].clone(), serving[node]));
                }
                Event::Measure(node, sample) => {
                    world.rollout.heartbeat(&world.nodes[node].clone(), serving[node], &sample);
                }
                Event::Begin(kind) => {
                    newest += 1;
                    if let Some(overtaken) = world.begin(newest, kind) {
                        stopped.insert(overtaken.version);
                    }
                    began = world.now;
                }
                Event::Pass(time) => world.pass(time),
            }
            prop_assert!(world.rollout.settled() >= settled);
            settled = world.rollout.settled();
            prop_assert!(!stopped.contains(&settled), "what was stopped never settles");
            for node in &world.nodes {
                let wanted = world.rollout.wanted(node);
                prop_assert!(wanted.is_none_or(|version| !stopped.contains(&version) && version <= newest));
            }
            if world.stopped().is_some() {
                stopped.insert(newest);
            }
            let Some((stage, _)) = world.stage() else { continue };
            let given = world.wanted(newest);
            match stage {
                Stage::Canary => prop_assert!(given.len() <= 1, "{given:?}"),
                Stage::Region => {
                    let canary = world.canary();
                    prop_assert!(given.iter().all(|node| region_of(node) == region_of(&canary)), "{given:?}");
                }
                Stage::All => {}
            }
            if let Some((version, before)) = last {
                prop_assert!(version < newest || before <= stage, "stages go forward only");
            }
            last = Some((newest, stage));
        }
        // Whatever has happened: without a newer one, the change ends in time.
        if let Some(change) = world.rollout.change {
            let end = world.now.max(began) + RolloutSettings::default().longest(change.kind);
            while world.stage().is_some() {
                world.pass(MS * 50);
                prop_assert!(world.now <= end + MS * 500, "{change:?}: {:?}", world.rollout.progress());
            }
        }
    }

    #[test]
    fn a_rollback_always_ends_in_10_s(
        events in proptest::collection::vec((0_usize..12, 0_u8..4), 0..100),
    ) {
        let mut world = World::begun(2, Kind::Rollback);
        let (end, mut events) = (world.now + SECOND * 10, events.into_iter());
        while world.stage().is_some() {
            if let Some((node, what)) = events.next() {
                let node = world.nodes[node].clone();
                match what {
                    0 => world.rollout.leave(&node, world.now),
                    1 => prop_assert!(world.rollout.join(&node, 1)),
                    _ => world.apply(&[node]),
                }
            }
            world.pass(MS * 100);
            prop_assert!(world.now <= end, "{:?}", world.rollout.progress());
        }
    }
}
