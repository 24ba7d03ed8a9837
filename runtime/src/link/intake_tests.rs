use proptest::prelude::*;

use super::super::samples::*;
use super::*;

fn steps_of(intake: &mut Intake, delta: control::Delta) -> (Vec<Step>, Result<(), Refusal>) {
    let mut steps = Vec::new();
    let taken = intake.take_delta(delta, |step| steps.push(step));
    (steps, taken)
}

fn reason(intake: &mut Intake, delta: control::Delta) -> &'static str {
    intake.take_delta(delta, |_| {}).map_or_else(|refusal| refusal.reason.as_str(), |()| "taken")
}

fn plan_reason(intake: &mut Intake, plan: control::SealedPlan) -> &'static str {
    intake.take_plan(plan, |_| {}).map_or_else(|refusal| refusal.reason.as_str(), |()| "taken")
}

#[test]
fn a_whole_version_and_then_a_delta_are_validated_kept_and_served() {
    let node = Node::new();
    let mut intake = node.intake();
    assert!(intake.snapshots().is_empty() && intake.serving().now() == control::Serving::default());
    let all = vec![Step::Validated, Step::Persisted, Step::Applied];
    let one = Content::of(1, &["eu", "us"]);
    assert_eq!(steps_of(&mut intake, one.whole(3)), (all.clone(), Ok(())));
    let two = Content::of(2, &["eu", "us", "ap"]);
    assert_eq!(steps_of(&mut intake, two.since(&one, 3)), (all, Ok(())));
    assert_eq!(intake.snapshots().current().regions.len(), 3);
    assert_eq!(intake.serving().now().snapshot_sha256, two.sha256());
    assert_eq!(steps_of(&mut intake, two.whole(3)), (vec![Step::Applied], Ok(())), "it is served already");
    let again = node.intake();
    assert_eq!(again.serving().now(), intake.serving().now());
    assert!(node.shows("snapshot_version 2"));
}

#[test]
fn what_a_delta_is_made_for_must_be_what_is_served() {
    let node = Node::new();
    let mut intake = node.intake();
    let (one, two, three) = (Content::of(1, &["eu"]), Content::of(2, &["eu", "us"]), Content::of(3, &["eu", "ap"]));
    assert_eq!(reason(&mut intake, two.since(&one, 1)), "base");
    intake.take_delta(one.whole(1), |_| {}).unwrap();
    assert_eq!(reason(&mut intake, three.since(&two, 1)), "base");
    let other = Content::of(1, &["us"]);
    assert_eq!(reason(&mut intake, two.since(&other, 1)), "base", "the same version, other content");
    let lying = control::Delta { changed: Vec::new(), ..two.since(&one, 1) };
    assert_eq!(reason(&mut intake, lying), "checksum");
    assert_eq!(reason(&mut intake, two.since(&one, 1)), "taken");
}

#[test]
fn the_same_version_comes_again_only_whole_and_only_where_it_differs() {
    let node = Node::new();
    let mut intake = node.intake();
    let (mine, theirs) = (Content::of(1, &["eu"]), Content::of(1, &["eu", "us"]));
    intake.take_delta(mine.whole(1), |_| {}).unwrap();
    let as_delta = control::Delta { base: 1, base_sha256: mine.sha256(), ..theirs.since(&mine, 1) };
    assert_eq!(reason(&mut intake, as_delta), "version");
    assert_eq!(reason(&mut intake, theirs.whole(1)), "taken");
    assert_eq!(intake.serving().now().snapshot_sha256, theirs.sha256());
}

#[test]
fn t60_t61_older_versions_and_leaders_of_the_past_are_refused_also_after_a_restart() {
    let node = Node::new();
    let mut intake = node.intake();
    intake.take_delta(Content::of(5, &["eu"]).whole(7), |_| {}).unwrap();
    assert_eq!(reason(&mut intake, Content::of(4, &["eu"]).whole(7)), "version");
    for mut intake in [intake, node.intake()] {
        assert_eq!(reason(&mut intake, Content::of(6, &["eu"]).whole(6)), "epoch");
        assert_eq!(plan_reason(&mut intake, plan(1, 6, &["eu"])), "epoch");
    }
    let mut intake = node.intake();
    assert_eq!(plan_reason(&mut intake, plan(1, 9, &["eu"])), "taken");
    assert_eq!(reason(&mut node.intake(), Content::of(6, &["eu"]).whole(8)), "epoch", "plans count too");
    assert_eq!(reason(&mut node.intake(), Content::of(6, &["eu"]).whole(9)), "taken");
}

#[test]
fn t62_what_would_leave_nothing_is_refused_and_what_was_confirmed_is_not() {
    let node = Node::new();
    let mut intake = node.intake();
    let staffed = Content::of(1, &["eu", "us"]).with_pool("eu").with_pool("us");
    intake.take_delta(staffed.whole(1), |_| {}).unwrap();
    assert_eq!(reason(&mut intake, Content::of(2, &[]).whole(1)), "invalid");
    let weightless = Content::of(2, &["eu", "us"]).with_pool("eu").with_pool("us").weighing("0");
    assert_eq!(reason(&mut intake, weightless.since(&staffed, 1)), "unsafe");
    let emptied = Content::of(2, &["eu", "us"]).with_pool("eu");
    let refusal = intake.take_delta(emptied.since(&staffed, 1), |_| {}).unwrap_err();
    assert_eq!(refusal.reason, Reason::Unsafe);
    assert!(refusal.errors[0].contains("'us'"), "{refusal:?}");
    let meant = control::ResourceName { kind: "Region".into(), name: "us".into() };
    let confirmed = control::Delta { confirmed_empty: vec![meant], ..emptied.since(&staffed, 1) };
    assert_eq!(reason(&mut intake, confirmed), "taken");
}

#[test]
fn a_version_that_is_too_large_is_refused() {
    let node = Node::new();
    let mut intake = node.intake();
    intake.take_delta(Content::of(1, &["eu"]).whole(1), |_| {}).unwrap();
    let huge = Content::of(2, &["eu"]).with_raw("Tenant", "huge", &" ".repeat(66 << 20));
    assert_eq!(reason(&mut intake, huge.whole(1)), "too_large");
    assert_eq!(intake.snapshots().current().version, 1);
}

#[test]
fn what_cannot_be_kept_is_not_served() {
    let node = Node::new();
    let mut intake = node.intake();
    intake.take_delta(Content::of(1, &["eu"]).whole(1), |_| {}).unwrap();
    std::fs::remove_dir_all(node.folder.path()).unwrap();
    assert_eq!(reason(&mut intake, Content::of(2, &["eu"]).whole(1)), "unwritable");
    assert_eq!(plan_reason(&mut intake, plan(1, 1, &["eu"])), "unwritable");
    assert_eq!((intake.snapshots().current().version, intake.plans().version()), (1, 0));
    std::fs::create_dir_all(node.folder.path()).unwrap();
    assert_eq!(reason(&mut intake, Content::of(2, &["eu"]).whole(1)), "taken");
}

#[test]
fn t63_a_truncated_newest_gives_way_to_the_one_before_and_two_bad_ones_to_nothing() {
    let node = Node::new();
    let (file, previous) = (node.path(), node.folder.path().join("snapshot.previous"));
    let mut intake = node.intake();
    intake.take_delta(Content::of(1, &["eu"]).whole(1), |_| {}).unwrap();
    intake.take_delta(Content::of(2, &["eu", "us"]).whole(1), |_| {}).unwrap();
    for version in 1..=2 {
        intake.take_plan(plan(version, 1, &["eu", "us"]), |_| {}).unwrap();
    }
    for name in ["snapshot", "plan"] {
        let path = node.folder.path().join(name);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    }
    let again = node.intake();
    assert_eq!((again.snapshots().current().version, again.plans().version()), (1, 1));
    assert!(node.shows("snapshot_rejected_total{reason=\"malformed\"} 1"));
    assert!(node.shows("plan_rejected_total{reason=\"unreadable\"} 1"));
    std::fs::write(previous, b"").unwrap();
    let mut empty = node.intake();
    assert!(empty.snapshots().is_empty());
    empty.take_delta(Content::of(3, &["eu"]).whole(1), |_| {}).unwrap();
    assert_eq!(crate::snapshot::open(&std::fs::read(file).unwrap()).unwrap().version, 3);
}

#[test]
fn t62_t66_t67_a_plan_is_taken_whole_or_not_at_all() {
    let node = Node::new();
    let mut intake = node.intake();
    assert_eq!(
        plan_reason(&mut intake, plan(1, 1, &["eu", "us"])),
        "taken",
        "no snapshot says which regions there are"
    );
    intake.take_delta(Content::of(1, &["eu", "us"]).whole(1), |_| {}).unwrap();
    assert_eq!(plan_reason(&mut intake, plan(3, 1, &["eu", "us"])), "taken");
    assert_eq!(plan_reason(&mut intake, plan(3, 1, &["eu", "us"])), "taken", "it holds already");
    assert_eq!(plan_reason(&mut intake, plan(2, 1, &["eu", "us"])), "version");
    assert_eq!(plan_reason(&mut intake, plan(4, 1, &["eu", "ap"])), "unsafe");
    let with = |change: fn(&mut control::Plan)| {
        let mut plan = control::Plan::decode(plan(4, 1, &["eu", "us"]).plan).unwrap();
        change(&mut plan);
        sealed_plan(&plan)
    };
    for (change, expected) in [
        ((|plan| plan.regions[0].weight = f64::NAN) as fn(&mut control::Plan), "unsafe"),
        (|plan| plan.regions[0].weight = -1.0, "unsafe"),
        (|plan| plan.regions[0].weight = 0.9, "unsafe"),
        (|plan| plan.regions.iter_mut().for_each(|region| region.weight = 0.0), "unsafe"),
        (|plan| plan.regions.clear(), "unsafe"),
        (|plan| plan.regions[0].share = f64::NAN, "invalid"),
        (|plan| plan.regions[0].planned = f64::INFINITY, "invalid"),
        (|plan| plan.regions[0].capacity = Some(f64::NAN), "invalid"),
        (|plan| plan.regions[0].shed_classes.clear(), "invalid"),
        (|plan| plan.regions[0].region = "Eu!".into(), "invalid"),
        (|plan| plan.basis = 9, "malformed"),
        (|plan| plan.regions[0].why = "x".repeat(2 << 20), "too_large"),
    ] {
        assert_eq!(plan_reason(&mut intake, with(change)), expected);
    }
    let flipped = control::SealedPlan { sha256: vec![0; 32].into(), ..plan(4, 1, &["eu", "us"]) };
    assert_eq!(plan_reason(&mut intake, flipped), "checksum");
    assert_eq!((intake.plans().version(), node.intake().plans().version()), (3, 3));
}

/// The regions of three versions, any of which may follow any other.
fn any_content() -> impl Strategy<Value = Content> {
    let regions = prop::collection::btree_set(prop::sample::select(vec!["ap", "eu", "us"]), 0..=3);
    (1_u64..6, regions).prop_map(|(version, regions)| Content::of(version, &regions.into_iter().collect::<Vec<_>>()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_comes_versions_and_epochs_never_fall_and_a_restart_serves_the_same(
        pushes in prop::collection::vec((any_content(), any_content(), 0_u64..4, any::<bool>(), any::<bool>()), 1..12),
    ) {
        let node = Node::new();
        let mut intake = node.intake();
        let (mut version, mut newest_epoch) = (0, 0);
        for (content, base, epoch, whole, restart) in pushes {
            let before = intake.serving().now();
            let delta = if whole { content.whole(epoch) } else { content.since(&base, epoch) };
            match intake.take_delta(delta, |_| {}) {
                Ok(()) => {
                    prop_assert!(epoch >= newest_epoch && content.version >= version);
                    (version, newest_epoch) = (content.version, epoch);
                    prop_assert_eq!(intake.serving().now().snapshot_sha256, content.sha256());
                    prop_assert!(!intake.snapshots().current().regions.is_empty());
                }
                Err(refusal) => {
                    prop_assert!(!refusal.errors.is_empty());
                    prop_assert_eq!(&intake.serving().now(), &before);
                }
            }
            if restart {
                let now = intake.serving().now();
                intake = node.intake();
                prop_assert_eq!(intake.serving().now(), now);
            }
        }
    }
}
