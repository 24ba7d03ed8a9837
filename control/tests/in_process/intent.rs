//! What operators ask of one control node, over its port.

use std::time::{Duration, SystemTime};

use spillway_proto::control::r#override::Act;
use spillway_proto::control::{
    ApplyRequest, GetRequest, HistoryRequest, LiftOverrideRequest, Override, ResourceName, RollbackRequest,
    StatusRequest,
};
use tonic::Code;

use crate::support::{Client, Domain, apply, eventually, files, in_the_name_of, pool, refused, region};

fn in_ms(time: Duration) -> i64 {
    let until = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() + time;
    i64::try_from(until.as_millis()).unwrap()
}

fn drain(region: &str) -> Override {
    let until_unix_ms = in_ms(Duration::from_secs(600));
    Override {
        region: region.into(),
        act: Some(Act::Drain(true)),
        until_unix_ms,
        reason: "floods".into(),
        ..Default::default()
    }
}

async fn names(client: &mut Client, request: GetRequest) -> Vec<String> {
    let resources = client.get(request).await.unwrap().into_inner().resources;
    resources.iter().map(|resource| format!("{}/{}", resource.kind, resource.name)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_applied_is_a_version_and_what_changes_nothing_is_none() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    let nothing = refused(alice.get(GetRequest::default()).await);
    assert_eq!((nothing.0, &*nothing.1), (Code::NotFound, "nothing-applied"));
    let eu = [region("eu"), pool("rankers", "eu", 1)].concat();
    let scorers = pool("scorers", "eu", 2);
    let dry = ApplyRequest { dry_run: true, ..files(&[eu.clone(), scorers.clone()]) };
    let planned = alice.apply(dry).await.unwrap().into_inner();
    assert_eq!((planned.version, planned.changes.len()), (1, 3));
    assert_eq!(refused(alice.get(GetRequest::default()).await).0, Code::NotFound, "a dry run does nothing");

    let request = ApplyRequest { message: "first".into(), expected_version: Some(0), ..files(&[eu.clone(), scorers]) };
    let applied = alice.apply(request).await.unwrap().into_inner();
    assert_eq!(applied, planned);
    let again = apply(&mut alice, &[pool("scorers", "eu", 2), eu.clone()]).await;
    assert_eq!((again.version, again.changes.len()), (1, 0));
    let fewer = apply(&mut alice, std::slice::from_ref(&eu)).await;
    assert_eq!((fewer.version, fewer.changes.len()), (2, 1));
    assert_eq!(fewer.changes[0].after_json, "");
    assert_eq!(names(&mut alice, GetRequest::default()).await, ["Pool/rankers", "Region/eu"]);
    let old = GetRequest { version: 1, kind: "Pool".into(), ..Default::default() };
    assert_eq!(names(&mut alice, old).await, ["Pool/rankers", "Pool/scorers"]);

    let history = alice.history(HistoryRequest::default()).await.unwrap().into_inner().revisions;
    let told: Vec<_> = history.iter().map(|one| (one.version, &*one.message, one.added, one.removed)).collect();
    assert_eq!(told, [(2, "", 0, 1), (1, "first", 3, 0)]);
    assert_eq!(history[0].author, "spiffe://spillway.test/operator/alice");
    assert!((history[1].unix_ms - in_ms(Duration::ZERO)).abs() < 60_000);

    let audited = node.audited("intent-applied");
    assert_eq!((audited.len(), &audited[0]["version"], &audited[0]["added"]), (2, &1.into(), &3.into()));
    assert_eq!(audited[0]["author"], "spiffe://spillway.test/operator/alice");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_name_file_and_line_and_change_nothing() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    apply(&mut alice, &[region("eu")]).await;
    let wrong = apply(&mut alice, &[region("eu"), pool("scorers", "us", 1)]).await;
    assert_eq!((wrong.version, wrong.changes.len()), (1, 0));
    assert_eq!(wrong.faults, ["1.yaml:5: Pool/scorers: spec.region: there is no Region 'us'"]);
    assert!(apply(&mut alice, &[]).await.faults[0].contains("there is no Region"));
    let expected = ApplyRequest { expected_version: Some(7), ..files(&[region("us")]) };
    let (code, word, text) = refused(alice.apply(expected).await);
    assert_eq!((code, &*word), (Code::Aborted, "not-expected-version"));
    assert_eq!(text, "the current version is 1; 7 was expected");
    let audited = node.audited("intent-refused");
    assert_eq!(audited.len(), 3);
    assert!(audited[0]["problem"].as_str().unwrap().contains("there is no Region 'us'"), "{audited:?}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_leave_no_pods_must_be_confirmed_and_stays_so() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    let both = [region("eu"), region("us"), pool("scorers", "eu", 2), pool("rankers", "us", 1)];
    let emptied = [region("eu"), region("us"), pool("scorers", "eu", 2)];
    apply(&mut alice, &both).await;
    let (code, word, text) = refused(alice.apply(files(&emptied)).await);
    assert_eq!((code, &*word), (Code::FailedPrecondition, "unsafe"));
    assert!(text.contains("the region 'us' would have no pods"), "{text}");
    let confirmed = vec![ResourceName { kind: "Region".into(), name: "us".into() }];
    let request = ApplyRequest { confirmed_empty: confirmed.clone(), ..files(&emptied) };
    assert_eq!(alice.apply(request).await.unwrap().into_inner().version, 2);
    // A node that missed version 2 must be able to take version 3.
    let more = [emptied.concat(), region("ap")];
    assert_eq!(apply(&mut alice, &more).await.version, 3);
    assert_eq!(node.parts.versions.current().unwrap().confirmed_empty, confirmed);
    assert_eq!(apply(&mut alice, &both).await.version, 4);
    assert_eq!(node.parts.versions.current().unwrap().confirmed_empty, []);
    // What was confirmed for a version goes with its content.
    let back = alice.rollback(RollbackRequest { version: 2, message: String::new() }).await.unwrap().into_inner();
    assert_eq!((back.version, &node.parts.versions.current().unwrap().confirmed_empty), (5, &confirmed));
    let other = vec![ResourceName { kind: "Model".into(), name: "eta".into() }];
    let request = ApplyRequest { confirmed_empty: other, ..files(&both) };
    assert_eq!(refused(alice.apply(request).await).0, Code::InvalidArgument);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_is_a_new_version_with_old_content() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    let none = refused(alice.rollback(RollbackRequest { version: 1, message: String::new() }).await);
    assert_eq!(none.0, Code::NotFound);
    apply(&mut alice, &[region("eu")]).await;
    apply(&mut alice, &[region("eu"), region("us")]).await;
    let mut changed = node.parts.versions.changed();
    changed.mark_unchanged();
    let request = RollbackRequest { version: 1, message: "us is not ready".into() };
    let back = alice.rollback(request.clone()).await.unwrap().into_inner();
    assert_eq!((back.version, back.changes.len()), (3, 1));
    assert!(changed.has_changed().unwrap() && *changed.borrow() == 3);
    assert_eq!(names(&mut alice, GetRequest::default()).await, ["Region/eu"]);
    let newest = alice.history(HistoryRequest { limit: 1 }).await.unwrap().into_inner().revisions;
    assert_eq!((newest.len(), newest[0].version, newest[0].rolled_back_to, newest[0].removed), (1, 3, 1, 1));
    let versions = (node.parts.versions.current().unwrap(), node.parts.versions.version(1).await.unwrap().unwrap());
    assert_eq!(versions.0.resources, versions.1.resources);
    assert_ne!(versions.0.sha256, versions.1.sha256, "the number is part of the content");
    let again = alice.rollback(request).await.unwrap().into_inner();
    assert_eq!((again.version, again.changes.len()), (3, 0));
    let unknown = refused(alice.rollback(RollbackRequest { version: 9, message: String::new() }).await);
    assert_eq!((unknown.0, &*unknown.2), (Code::NotFound, "there is no version 9"));
    assert_eq!(node.audited("intent-applied")[2]["rolled_back_to"], 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overrides_hold_until_they_end_or_are_lifted() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    assert_eq!(refused(alice.set_override(drain("eu")).await).1, "nothing-applied");
    apply(&mut alice, &[region("eu"), region("us")]).await;
    for (bad, word) in [
        (Override { reason: " ".into(), ..drain("eu") }, "unfit-override"),
        (Override { until_unix_ms: in_ms(Duration::from_secs(8 * 86_400)), ..drain("eu") }, "unfit-override"),
        (Override { until_unix_ms: in_ms(Duration::ZERO) - 1, ..drain("eu") }, "unfit-override"),
        (Override { act: Some(Act::Weight(f64::NAN)), ..drain("eu") }, "unfit-override"),
        (Override { act: None, ..drain("eu") }, "malformed"),
        (drain("mars"), "unfit-override"),
        (drain("../eu"), "malformed"),
    ] {
        let refused = refused(alice.set_override(bad.clone()).await);
        assert_eq!(refused.1, word, "{bad:?}: {refused:?}");
    }
    let mut changed = node.parts.overrides.changed();
    changed.mark_unchanged();
    let forged = Override { author: "spiffe://spillway.test/operator/bob".into(), ..drain("eu") };
    let held = alice.set_override(forged).await.unwrap().into_inner().overrides;
    assert_eq!((held.len(), &*held[0].author), (1, "spiffe://spillway.test/operator/alice"));
    assert!(changed.has_changed().unwrap());
    let (code, _, text) = refused(alice.set_override(drain("us")).await);
    assert_eq!(code, Code::FailedPrecondition);
    assert!(text.contains("'us' is the last region"), "{text}");
    let lift = LiftOverrideRequest { region: "eu".into() };
    assert!(alice.lift_override(lift.clone()).await.unwrap().into_inner().overrides.is_empty());
    assert_eq!(refused(alice.lift_override(lift).await).1, "no-such-override");

    alice.set_override(drain("us")).await.unwrap();
    let shown = alice.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((&*shown.leader, &*shown.answered_by, shown.intent_version), ("c-0", "c-0", 1));
    assert_eq!(shown.overrides.unwrap().overrides[0].region, "us");
    assert!(shown.events.iter().any(|event| event.contains("us: drain, ordered by")), "{:?}", shown.events);
    let short = Override { until_unix_ms: in_ms(Duration::from_secs(4)), ..drain("us") };
    alice.set_override(short).await.unwrap();
    eventually("it has ended", || node.audited("override-ended").len() == 2).await;
    let shown = alice.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(shown.overrides.unwrap().overrides, []);
    let ended = node.audited("override-ended");
    assert_eq!((&ended[0]["region"], &ended[1]["author"]), (&"eu".into(), &serde_json::Value::Null));
    assert_eq!(node.audited("override-set").len(), 3);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_operators_that_are_named_may_call() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let alice = "spiffe://spillway.test/operator/alice";
    apply(&mut domain.alice(&node).await, &[region("eu")]).await;
    for stranger in [
        "operator/mallory",
        "region/eu/gateway/gw-0",
        "region/eu/sidecar/scorers/pod-0",
        "region/us/control/c-1",
        "tenant/acme/client/web",
    ] {
        let mut client = domain.caller(stranger, &node).await;
        let (code, word, _) = refused(client.get(GetRequest::default()).await);
        assert_eq!(code, Code::PermissionDenied, "{stranger}: {word}");
        // The name of an operator counts only where a control node says it.
        let mut client = domain.caller(stranger, &node).await;
        let named = client.get(in_the_name_of(alice, GetRequest::default())).await;
        assert_eq!(named.is_ok(), stranger.contains("control"), "{stranger}");
    }
    let mut control = domain.caller("region/us/control/c-1", &node).await;
    for other in ["spiffe://spillway.test/operator/mallory", "spiffe://other.test/operator/alice", "alice"] {
        let named = control.get(in_the_name_of(other, GetRequest::default())).await;
        assert_eq!(refused(named).0, Code::PermissionDenied, "{other}");
    }
    let denied = node.audited("denied");
    let by = |id: &str| denied.iter().any(|record| record["id"] == format!("spiffe://spillway.test/{id}"));
    assert!(by("operator/mallory") && by("region/eu/gateway/gw-0") && by("tenant/acme/client/web"), "{denied:?}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_restart_and_an_older_process_ends() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    // Several parts.
    let pools: Vec<String> = (0..3_000).map(|number| pool(&format!("pool-{number}"), "eu", 10)).collect();
    let all = [region("eu"), region("us"), pools.concat()];
    assert_eq!(apply(&mut alice, &all).await.changes.len(), 3_002);
    let before = node.parts.versions.current().unwrap();
    assert!(before.encoded.len() > 1 << 20, "{}", before.encoded.len());
    alice.set_override(drain("us")).await.unwrap();
    let epoch = node.parts.leading.fence().unwrap().epoch;
    node.stop().await;
    let node = domain.alone().await;
    eventually("it was read", || node.parts.versions.current().is_some()).await;
    let after = node.parts.versions.current().unwrap();
    assert_eq!((after.number, after.sha256), (before.number, before.sha256));
    assert_eq!(
        (&after.encoded, &after.resources, &after.snapshot),
        (&before.encoded, &before.resources, &before.snapshot)
    );
    assert!(node.parts.leading.fence().unwrap().epoch > epoch);
    let mut alice = domain.alice(&node).await;
    let held = alice.status(StatusRequest {}).await.unwrap().into_inner().overrides.unwrap().overrides;
    assert_eq!((held.len(), &*held[0].region), (1, "us"));
    // A second process on the same file: the first one drains by itself.
    let second = domain.alone().await;
    eventually("the older one drains", || !node.parts.drain.is_serving()).await;
    assert!(node.parts.leading.fence().is_none());
    node.stop().await;
    let all = [region("eu"), region("us"), pool("pool-0", "eu", 1)];
    assert_eq!(apply(&mut domain.alice(&second).await, &all).await.version, 2);
    second.stop().await;
}
