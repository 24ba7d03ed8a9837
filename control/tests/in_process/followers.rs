//! Several control nodes on a real etcd: who leads, who follows, and what is left when either is gone.

use std::time::{Duration, Instant};

use spillway_control::store::StoreSettings;
use spillway_proto::control::r#override::Act;
use spillway_proto::control::{
    GetRequest, LiftOverrideRequest, Override, RollbackRequest, SetDrillRequest, StatusRequest,
};
use tonic::Code;

use crate::cluster::Cluster;
use crate::drills;
use crate::support::{Domain, Node, apply, eventually, files, refused, region};

/// As settings say it.
pub fn store(cluster: &Cluster) -> String {
    let StoreSettings::Etcd(settings) = cluster.settings() else { panic!("it is etcd") };
    let endpoints: Vec<String> = settings.endpoints.iter().map(|endpoint| format!("'{endpoint}'")).collect();
    let path = |path: &std::path::Path| path.display().to_string();
    let (certificate, key) = (path(&settings.identity.certificate), path(&settings.identity.key));
    let bundle = path(&settings.identity.trust_bundle);
    format!(
        "etcd: {{endpoints: [{}], identity: {{certificate: {certificate}, key: {key}, trustBundle: {bundle}}}}}",
        endpoints.join(", ")
    )
}

/// A leader and a follower that knows it.
pub async fn two(domain: &Domain, cluster: &Cluster) -> (Node, Node) {
    let store = store(cluster);
    let leader = domain.node("c-0", &store).await;
    eventually("it leads", || leader.parts.leading.fence().is_some()).await;
    let follower = domain.node("c-1", &store).await;
    let knows = || follower.parts.leading.leader().is_some_and(|leader| leader.node.as_str() == "c-0");
    eventually("it knows the leader", knows).await;
    (leader, follower)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_pass_changes_on_and_answer_questions() {
    let (domain, cluster) = (Domain::create(), Cluster::start());
    let (leader, follower) = two(&domain, &cluster).await;
    let mut alice = domain.alice(&follower).await;
    assert_eq!(apply(&mut alice, &[region("eu")]).await.version, 1);
    assert_eq!(apply(&mut alice, &[region("eu"), region("us")]).await.version, 2);
    let told = Instant::now();
    eventually("the follower has it", || follower.parts.versions.current().is_some_and(|now| now.number == 2)).await;
    println!("a follower had the version {:?} after its leader", told.elapsed());
    let shown = alice.get(GetRequest { name: "us".into(), ..Default::default() }).await.unwrap().into_inner();
    assert_eq!((shown.version, shown.resources.len()), (2, 1));
    let applied = leader.audited("intent-applied");
    assert_eq!(applied[0]["author"], "spiffe://spillway.test/operator/alice");
    assert!(follower.audited("intent-applied").is_empty());
    let act = Some(Act::Weight(5.0));
    let until = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap() + Duration::from_secs(60);
    let until_unix_ms = i64::try_from(until.as_millis()).unwrap();
    let order = Override { region: "eu".into(), act, until_unix_ms, reason: "a test".into(), ..Default::default() };
    assert_eq!(alice.set_override(order.clone()).await.unwrap().into_inner().overrides.len(), 1);
    let refusal = refused(alice.set_override(Override { region: "mars".into(), ..order }).await);
    assert_eq!((refusal.0, &*refusal.1), (Code::FailedPrecondition, "unfit-override"), "the leader's own words");
    alice.lift_override(LiftOverrideRequest { region: "eu".into() }).await.unwrap();
    let back = alice.rollback(RollbackRequest { version: 1, message: String::new() }).await.unwrap().into_inner();
    assert_eq!(back.version, 3);
    let status = alice.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((&*status.leader, &*status.answered_by), ("c-0", "c-0"), "it alone knows everything");
    let drill = SetDrillRequest { lease: 7, drill: "latency".into(), ..Default::default() };
    alice.set_drill(drill.clone()).await.unwrap();
    let on = |node: &Node| node.parts.drills.running();
    assert_eq!((on(&leader), on(&follower)), (Some("latency".into()), None), "the leader takes note");
    assert_eq!(drills::shown(&mut alice).await.len(), 1, "and whoever is asked shows it");

    // The leader leaves in order: the follower leads at once.
    let left = Instant::now();
    leader.stop().await;
    eventually("the follower leads", || follower.parts.leading.fence().is_some()).await;
    println!("the leader was stopped: the follower led after {:?}", left.elapsed());
    assert!(left.elapsed() < Duration::from_secs(4), "{:?}", left.elapsed());
    assert_eq!(apply(&mut alice, &[region("eu"), region("ap")]).await.version, 4);
    assert_eq!(drills::shown(&mut alice).await, []);
    alice.set_drill(drill).await.unwrap();
    assert_eq!(on(&follower), Some("latency".into()), "it goes on with the next leader");
    follower.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_store_questions_are_answered_and_changes_are_not() {
    let (domain, cluster) = (Domain::create(), Cluster::start());
    let (leader, follower) = two(&domain, &cluster).await;
    apply(&mut domain.alice(&leader).await, &[region("eu")]).await;
    eventually("the follower has it", || follower.parts.versions.current().is_some()).await;
    cluster.kill();
    let mut callers = [domain.alice(&leader).await, domain.alice(&follower).await];
    for alice in &mut callers {
        assert_eq!(alice.get(GetRequest::default()).await.unwrap().into_inner().version, 1);
        let asked = Instant::now();
        let (code, word, text) = refused(alice.apply(files(&[region("eu"), region("us")])).await);
        assert_eq!(code, Code::Unavailable, "{word}: {text}");
        assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
    }
    eventually("it leads no more", || leader.parts.leading.fence().is_none()).await;
    // A drill may be what has stopped the store.
    let drill = SetDrillRequest { lease: 7, drill: "store-loss".into(), ..Default::default() };
    callers[0].set_drill(drill).await.unwrap();
    assert_eq!(drills::shown(&mut callers[0]).await.len(), 1);
    cluster.start_again();
    let leads = |node: &Node| node.parts.leading.fence().is_some();
    eventually("one leads again", || leads(&leader) || leads(&follower)).await;
    for (number, alice) in callers.iter_mut().enumerate() {
        let deadline = Instant::now() + Duration::from_secs(10);
        let names = [region("eu"), region(&format!("r-{number}"))];
        loop {
            match alice.apply(files(&names)).await {
                Ok(answer) => break assert_eq!(answer.into_inner().version, 2 + number as u64),
                Err(status) => assert!(Instant::now() < deadline, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    leader.stop().await;
    follower.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_node_renews_its_own_certificate_also_a_follower_that_is_left_alone() {
    let (domain, cluster) = (Domain::issuing(Duration::from_secs(6)), Cluster::start());
    let (leader, follower) = two(&domain, &cluster).await;
    let life = |node: &Node| node.parts.workload.life();
    let first = [life(&leader), life(&follower)];
    eventually("both renew", || life(&leader) != first[0] && life(&follower) != first[1]).await;
    assert!(follower.parts.leading.fence().is_none(), "it follows still");
    leader.stop().await;
    cluster.kill();
    let last = life(&follower);
    eventually("it goes on without leader and store", || life(&follower).not_before > last.not_after).await;
    follower.stop().await;
}
