use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use spillway_core::rollout::{Pace, Progress, Stage};

use super::super::fixture::{plan, rolled_back, version};
use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://td/region/{path}")).unwrap()
}

fn settings() -> RolloutSettings {
    let pace = Pace { canary_dwell: SECOND, region_dwell: SECOND, patience: SECOND * 2, canaries: 2 };
    RolloutSettings { ordinary: pace.clone(), rollback: pace, ..RolloutSettings::default() }
}

/// A node as it would be: it takes what fits, and says so.
struct Node {
    id: SpiffeId,
    seat: Option<Joined>,
    version: u64,
    resources: BTreeMap<(String, String), String>,
    plan: u64,
    refuses: bool,
}

impl Node {
    fn new(path: &str) -> Self {
        Self { id: id(path), seat: None, version: 0, resources: BTreeMap::new(), plan: 0, refuses: false }
    }

    fn encoded(&self) -> Bytes {
        if self.version == 0 {
            Bytes::new()
        } else {
            spillway_runtime::link::encode(self.version, self.resources.clone())
        }
    }

    fn sha256(&self) -> Bytes {
        if self.version == 0 { Bytes::new() } else { Sha256::digest(self.encoded()).to_vec().into() }
    }

    fn serving(&self) -> control::Serving {
        let (snapshot_version, snapshot_sha256) = (self.version, self.sha256());
        control::Serving { snapshot_version, snapshot_sha256, plan_version: self.plan }
    }

    fn join(&mut self, hub: &mut Hub, now: Duration) {
        let hello = control::Hello { serving: Some(self.serving()), build: "1".into() };
        self.seat = hub.join(&self.id, hello, now);
    }

    fn say(&mut self, hub: &mut Hub, message: FromNode, now: Duration) {
        if let Some(seat) = &self.seat
            && !hub.hear(&self.id, seat.session, &message, now)
        {
            self.seat = None;
        }
    }

    fn beat(&mut self, hub: &mut Hub, now: Duration) {
        let heartbeat = control::Heartbeat { serving: Some(self.serving()), traffic: None, answers: None };
        self.say(hub, FromNode::Heartbeat(heartbeat), now);
    }

    /// Takes what waits. Returns what came, and its outcome: `applied` or the reason.
    fn take(&mut self, hub: &mut Hub, now: Duration) -> Vec<(String, &'static str)> {
        let mut taken = Vec::new();
        while let Some(message) = self.seat.as_mut().and_then(|seat| seat.queue.try_recv().ok()) {
            match message {
                ToNode::Delta(delta) => {
                    assert_eq!(delta.epoch, hub.epoch);
                    let whole = if delta.base == 0 { "whole" } else { "delta" };
                    let outcome = self.take_delta(&delta);
                    taken.push((format!("{whole} {}", delta.target), outcome.unwrap_or_else(|reason| reason)));
                    let (document, version) = (Document::Snapshot.into(), delta.target);
                    let answer = match outcome {
                        Ok(_) => FromNode::Ack(control::Ack { document, version, step: Step::Applied.into() }),
                        Err(reason) => FromNode::Nack(control::Nack {
                            document,
                            version,
                            reason: reason.into(),
                            errors: vec!["so it is".into()],
                            serving: Some(self.serving()),
                        }),
                    };
                    self.say(hub, answer, now);
                }
                ToNode::Plan(plan) => {
                    self.plan = version_of(&plan);
                    taken.push((format!("plan {}", self.plan), "applied"));
                    let (document, step) = (Document::Plan.into(), Step::Applied.into());
                    self.say(hub, FromNode::Ack(control::Ack { document, version: self.plan, step }), now);
                }
                ToNode::Pulse(_) => taken.push(("pulse".into(), "applied")),
            }
        }
        taken
    }

    fn take_delta(&mut self, delta: &control::Delta) -> Result<&'static str, &'static str> {
        if delta.base != 0 && (delta.base, &delta.base_sha256) != (self.version, &self.sha256()) {
            return Err("base");
        }
        if self.refuses {
            return Err("invalid");
        }
        let keyed =
            |resource: &control::Resource| ((resource.kind.clone(), resource.name.clone()), resource.spec_json.clone());
        let mut resources = if delta.base == 0 { BTreeMap::new() } else { self.resources.clone() };
        for removed in &delta.removed {
            resources.remove(&(removed.kind.clone(), removed.name.clone()));
        }
        resources.extend(delta.changed.iter().map(keyed));
        let encoded = spillway_runtime::link::encode(delta.target, resources.clone());
        if Sha256::digest(&encoded)[..] != delta.target_sha256[..] {
            return Err("checksum");
        }
        (self.version, self.resources) = (delta.target, resources);
        Ok("applied")
    }
}

/// A hub in which the first version has settled.
fn settled() -> Hub {
    let mut hub = Hub::new(settings(), 7, &Settled::default());
    hub.announce(version(1, &["eu", "us"], "100"), Duration::ZERO);
    hub.begin(Duration::ZERO);
    assert_eq!(hub.settled(), 1);
    hub
}

#[test]
fn who_comes_gets_the_plan_and_what_has_settled() {
    let (mut hub, mut node) = (settled(), Node::new("eu/gateway/one"));
    hub.set_plan(plan(4, 7, &["eu", "us"]), Duration::ZERO);
    node.join(&mut hub, Duration::ZERO);
    let taken = node.take(&mut hub, Duration::ZERO);
    assert_eq!(taken, [("plan 4".into(), "applied"), ("whole 1".into(), "applied")]);
    node.beat(&mut hub, SECOND);
    assert_eq!(node.take(&mut hub, SECOND), []);
    let status = hub.status(SECOND);
    assert_eq!((status.settled, status.nodes.len(), status.nodes[0].drift.as_str()), (1, 1, ""));
}

#[test]
fn a_change_is_tried_on_one_gateway_then_on_its_region_then_given_to_all() {
    let mut hub = settled();
    let mut nodes: Vec<Node> =
        ["eu/gateway/a", "eu/gateway/b", "eu/sidecar/p/c", "us/gateway/d", "us/gateway/e"].map(Node::new).into();
    let mut now = Duration::ZERO;
    for node in &mut nodes {
        node.join(&mut hub, now);
        node.take(&mut hub, now);
    }
    hub.announce(version(2, &["ap", "eu", "us"], "100"), now);
    hub.begin(now);
    let mut counts = Vec::new();
    for _ in 0..60 {
        now += MS * 100;
        hub.tick(now);
        for node in &mut nodes {
            for (what, outcome) in node.take(&mut hub, now) {
                assert_eq!((what.as_str(), outcome), ("delta 2", "applied"));
            }
        }
        let with: Vec<&SpiffeId> = nodes.iter().filter(|node| node.version == 2).map(|node| &node.id).collect();
        if let [one] = with[..] {
            assert!(matches!(one.role, spillway_core::identity::Role::Gateway { .. }));
        }
        if counts.last() != Some(&with.len()) {
            counts.push(with.len());
        }
    }
    assert!(
        counts == [0, 1, 3, 5] || counts == [1, 3, 5] || counts == [1, 2, 5] || counts == [0, 1, 2, 5],
        "{counts:?}"
    );
    assert_eq!((hub.settled(), hub.rollout.progress()), (2, Progress::Done { behind: 0 }));
}

#[test]
fn a_refusal_stops_the_change_and_says_who_and_why_until_a_rollback() {
    let mut hub = settled();
    let mut nodes: Vec<Node> = ["eu/gateway/a", "us/gateway/b"].map(Node::new).into();
    let mut now = SECOND;
    for node in &mut nodes {
        node.join(&mut hub, now);
        node.take(&mut hub, now);
        node.refuses = true;
    }
    hub.announce(version(2, &["eu"], "100"), now);
    hub.begin(now);
    let mut taken = Vec::new();
    for _ in 0..50 {
        now += MS * 100;
        hub.tick(now);
        nodes.iter_mut().for_each(|node| taken.extend(node.take(&mut hub, now)));
    }
    assert_eq!(taken, [("delta 2".into(), "invalid")], "nobody else gets it, and nobody twice");
    let status = hub.status(now);
    assert!(status.rollout.contains("stopped"), "{}", status.rollout);
    let drifts: Vec<&str> =
        status.nodes.iter().map(|node| node.drift.as_str()).filter(|drift| !drift.is_empty()).collect();
    assert_eq!(drifts, ["refused 2: invalid: so it is"]);
    nodes.iter_mut().for_each(|node| node.refuses = false);
    let good = version(1, &["eu", "us"], "100");
    hub.announce(rolled_back(3, &good), now);
    hub.begin(now);
    for _ in 0..50 {
        now += MS * 100;
        hub.tick(now);
        nodes.iter_mut().for_each(|node| drop(node.take(&mut hub, now)));
    }
    assert_eq!((hub.settled(), nodes[0].version, nodes[1].version), (3, 3, 3));
    assert!(hub.status(now).nodes.iter().all(|node| node.drift.is_empty()));
}

#[test]
fn the_next_leader_does_not_begin_again_what_was_stopped() {
    let (mut hub, mut node) = (settled(), Node::new("eu/gateway/a"));
    node.join(&mut hub, SECOND);
    node.take(&mut hub, SECOND);
    node.refuses = true;
    let second = version(2, &["eu"], "100");
    hub.announce(Arc::clone(&second), SECOND);
    assert_eq!(hub.to_keep(), Settled { version: 1, epoch: 7, stopped: None });
    hub.begin(SECOND);
    assert_eq!(node.take(&mut hub, SECOND), [("delta 2".into(), "invalid")]);
    let kept: Settled = serde_json::from_slice(&serde_json::to_vec(&hub.to_keep()).unwrap()).unwrap();
    let mut next = Hub::new(settings(), 8, &kept);
    next.shelve(version(1, &["eu", "us"], "100"), SECOND);
    next.announce(second, SECOND);
    let mut other = Node::new("us/gateway/b");
    other.join(&mut next, SECOND);
    other.take(&mut next, SECOND);
    for second in 2..60 {
        next.begin(SECOND * second);
        next.tick(SECOND * second);
        assert_eq!(other.take(&mut next, SECOND * second), []);
    }
    let rollout = next.status(SECOND * 60).rollout;
    assert!(rollout.contains("version 2 (ordinary): stopped: ") && rollout.contains("so it is"), "{rollout}");
    assert_eq!((other.version, next.to_keep()), (1, Settled { epoch: 8, ..kept }));
    // A newer one goes its way.
    next.announce(version(3, &["eu", "us"], "70"), SECOND * 60);
    for tenth in 600..700 {
        next.begin(MS * 100 * tenth);
        next.tick(MS * 100 * tenth);
        other.take(&mut next, MS * 100 * tenth);
    }
    assert_eq!((other.version, next.to_keep().stopped), (3, None));
}

#[test]
fn what_all_may_serve_is_what_has_settled_and_the_newest_where_that_is_gone() {
    let number = |hub: &Hub| hub.served().map(|version| version.number);
    let mut hub = Hub::new(settings(), 7, &Settled { version: 1, epoch: 6, stopped: None });
    hub.announce(version(2, &["ap", "eu"], "100"), SECOND);
    assert_eq!((hub.take_missing(), number(&hub)), ([1].into(), None), "it is on its way");
    hub.shelve(version(1, &["eu", "us"], "100"), SECOND);
    hub.begin(SECOND);
    assert_eq!(number(&hub), Some(1), "a change under way is not all nodes'");
    let mut hub = Hub::new(settings(), 7, &Settled { version: 1, epoch: 6, stopped: None });
    hub.announce(version(2, &["ap", "eu"], "100"), SECOND);
    hub.lose(1);
    assert_eq!(number(&hub), Some(2));
}

#[test]
fn who_serves_something_else_than_it_was_thought_to_gets_all_of_it() {
    let (mut hub, mut node) = (settled(), Node::new("eu/gateway/one"));
    node.join(&mut hub, Duration::ZERO);
    node.take(&mut hub, Duration::ZERO);
    // Its memory, or its disk.
    node.resources.pop_last();
    node.beat(&mut hub, SECOND);
    assert!(hub.status(SECOND).nodes[0].drift.contains("something else"));
    assert_eq!(node.take(&mut hub, SECOND), [("whole 1".into(), "applied")], "after a heartbeat");
    assert_eq!(hub.status(SECOND).nodes[0].drift, "");
    // And where the hub learns of it by a refusal.
    node.resources.pop_last();
    hub.announce(version(2, &["ap", "eu", "us"], "100"), SECOND);
    hub.begin(SECOND);
    assert_eq!(node.take(&mut hub, SECOND), [("delta 2".into(), "base"), ("whole 2".into(), "applied")]);
    assert_eq!(hub.rollout.status(SECOND).refusals, [], "that is no refusal of the version");
}

#[test]
fn a_whole_version_that_is_refused_is_not_sent_for_ever() {
    let (mut hub, mut node) = (settled(), Node::new("eu/gateway/one"));
    node.version = 1;
    node.refuses = true;
    node.join(&mut hub, Duration::ZERO);
    for number in 1..=9 {
        let taken = node.take(&mut hub, SECOND * number);
        assert_eq!(taken.len(), usize::from(number == 1), "{taken:?}");
        node.beat(&mut hub, SECOND * number);
    }
}

#[test]
fn a_plan_skips_all_stages_and_comes_again_where_the_region_was_not_known_yet() {
    let (mut hub, mut node) = (settled(), Node::new("eu/sidecar/p/one"));
    node.join(&mut hub, Duration::ZERO);
    node.take(&mut hub, Duration::ZERO);
    hub.announce(version(2, &["ap", "eu", "us"], "100"), Duration::ZERO);
    hub.begin(Duration::ZERO);
    hub.set_plan(plan(5, 7, &["ap", "eu"]), Duration::ZERO);
    let Some(ToNode::Plan(_)) = node.seat.as_mut().unwrap().queue.try_recv().ok() else { panic!("a plan") };
    let nack = control::Nack {
        document: Document::Plan.into(),
        version: 5,
        reason: "unsafe".into(),
        errors: vec!["the region 'ap' is not known".into()],
        serving: Some(node.serving()),
    };
    node.say(&mut hub, FromNode::Nack(nack), MS);
    node.beat(&mut hub, MS);
    assert_eq!(node.take(&mut hub, MS), [], "not before it knows more");
    assert!(hub.status(MS).nodes[0].drift.contains("refused the plan 5"), "{:?}", hub.status(MS));
    let mut now = MS;
    let mut taken = Vec::new();
    for _ in 0..100 {
        now += MS * 100;
        hub.tick(now);
        taken.extend(node.take(&mut hub, now));
    }
    assert_eq!(taken, [("delta 2".into(), "applied"), ("plan 5".into(), "applied")]);
    hub.set_plan(plan(4, 7, &["eu"]), now);
    assert_eq!(node.take(&mut hub, now), [], "an older plan is nobody's");
}

#[test]
fn a_node_that_does_not_read_is_cut_off_and_one_that_comes_again_in_time_is_not_missed() {
    let (mut hub, mut node) = (settled(), Node::new("eu/gateway/one"));
    node.join(&mut hub, Duration::ZERO);
    for _ in 0..=QUEUE {
        hub.pulse(control::Pulse::default(), SECOND);
    }
    assert!(!hub.hear(&node.id, 1, &FromNode::Heartbeat(control::Heartbeat::default()), SECOND));
    node.join(&mut hub, SECOND);
    node.take(&mut hub, SECOND);
    hub.announce(version(2, &["eu"], "100"), SECOND);
    hub.begin(SECOND);
    node.take(&mut hub, SECOND);
    let session = node.seat.take().unwrap().session;
    assert!(hub.leave(&node.id, session, SECOND));
    hub.tick(SECOND + GRACE - MS);
    node.join(&mut hub, SECOND + GRACE - MS);
    assert!(!hub.leave(&node.id, session, SECOND + GRACE), "that was the stream before");
    hub.tick(SECOND + GRACE);
    let running = Progress::Running { stage: Stage::Canary, watching: true };
    assert_eq!(hub.rollout.progress(), running, "its canary was not lost");
    let session = node.seat.take().unwrap().session;
    hub.leave(&node.id, session, SECOND * 3);
    hub.tick(SECOND * 3 + GRACE);
    assert!(hub.status(SECOND * 5).nodes[0].drift.starts_with("away for 2 s"));
    hub.tick(SECOND * 4 + FORGOTTEN_AFTER);
    assert!(hub.seats.is_empty());
}

#[derive(Clone, Debug)]
enum Event {
    Join(usize),
    Leave(usize),
    Beat(usize),
    Take(usize),
    Damage(usize),
    Refuse(usize, bool),
    Announce,
    Plan,
    Pass(u64),
}

fn any_event() -> impl Strategy<Value = Event> {
    let node = || 0_usize..5;
    prop_oneof![
        4 => node().prop_map(Event::Join),
        1 => node().prop_map(Event::Leave),
        6 => node().prop_map(Event::Beat),
        12 => node().prop_map(Event::Take),
        1 => node().prop_map(Event::Damage),
        1 => (node(), any::<bool>()).prop_map(|(node, refuses)| Event::Refuse(node, refuses)),
        2 => Just(Event::Announce),
        1 => Just(Event::Plan),
        6 => (50_u64..1_500).prop_map(Event::Pass),
    ]
}

proptest! {
    #[test]
    fn whatever_nodes_do_versions_never_fall_and_in_quiet_all_serve_what_has_settled(
        events in prop::collection::vec(any_event(), 1..120),
    ) {
        let mut hub = Hub::new(settings(), 7, &Settled::default());
        let paths = ["eu/gateway/a", "eu/gateway/b", "us/gateway/c", "us/sidecar/p/d", "ap/control/e"];
        let mut nodes: Vec<Node> = paths.map(Node::new).into();
        let mut library: BTreeMap<u64, Arc<Version>> = BTreeMap::new();
        let (mut now, mut newest, mut newest_plan) = (Duration::ZERO, 0, 0);
        let announce = |hub: &mut Hub, library: &mut BTreeMap<u64, Arc<Version>>, newest: &mut u64, now| {
            *newest += 1;
            let made = if newest.is_multiple_of(4) {
                rolled_back(*newest, &library[&(*newest - 1)])
            } else {
                version(*newest, &["eu", "us"], &newest.to_string())
            };
            library.insert(*newest, Arc::clone(&made));
            hub.announce(made, now);
            hub.begin(now);
        };
        let step = |hub: &mut Hub, library: &BTreeMap<u64, Arc<Version>>, now| {
            for number in hub.take_missing() {
                if let Some(version) = library.get(&number) {
                    hub.shelve(Arc::clone(version), now);
                }
            }
            hub.tick(now);
        };
        for event in events {
            let (versions, settled): (Vec<u64>, _) = (nodes.iter().map(|node| node.version).collect(), hub.settled());
            match event {
                Event::Join(at) => nodes[at].join(&mut hub, now),
                Event::Leave(at) => {
                    if let Some(seat) = nodes[at].seat.take() {
                        hub.leave(&nodes[at].id, seat.session, now);
                    }
                }
                Event::Beat(at) => nodes[at].beat(&mut hub, now),
                Event::Take(at) => drop(nodes[at].take(&mut hub, now)),
                Event::Damage(at) => drop(nodes[at].resources.pop_last()),
                Event::Refuse(at, refuses) => nodes[at].refuses = refuses,
                Event::Announce => announce(&mut hub, &mut library, &mut newest, now),
                Event::Plan => {
                    newest_plan += 1;
                    hub.set_plan(plan(newest_plan, 7, &["eu"]), now);
                }
                Event::Pass(time) => now += MS * u32::try_from(time).unwrap(),
            }
            step(&mut hub, &library, now);
            prop_assert!(nodes.iter().zip(versions).all(|(node, before)| node.version >= before));
            prop_assert!(hub.settled() >= settled && hub.settled() <= newest);
        }
        // What was stopped is gone round by one more; then nobody refuses, and all come.
        announce(&mut hub, &mut library, &mut newest, now);
        for node in &mut nodes {
            node.refuses = false;
            node.join(&mut hub, now);
        }
        for _ in 0..200 {
            now += MS * 100;
            step(&mut hub, &library, now);
            for node in &mut nodes {
                node.take(&mut hub, now);
                node.beat(&mut hub, now);
            }
        }
        prop_assert_eq!(hub.settled(), newest, "{:?}", hub.status(now));
        for node in &nodes {
            prop_assert_eq!((node.version, node.plan), (newest, newest_plan), "{} {:?}", node.id, hub.status(now));
            prop_assert_eq!(&node.sha256()[..], &library[&newest].sha256[..]);
        }
    }
}
