//! Control nodes as vantages: what those that follow see, and what they know when they lead.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, BoxStream, StreamExt};
use spillway_core::identity::{ExpectedPeer, Revoked, SpiffeId};
use spillway_proto::control::evidence_client::EvidenceClient;
use spillway_proto::control::{Heard, RegionStatus, Sightings, StatusRequest, StatusResponse};
use spillway_runtime::dial::dial;
use spillway_runtime::tls::Workload;
use tonic::Code;

use crate::cluster::Cluster;
use crate::followers::{store, two};
use crate::support::{Client, Domain, Node, apply, eventually};

/// A region with a gateway that nobody is at.
fn deserted(name: &str, address: &str) -> String {
    format!(
        "---\napiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: spillway.test, \
         gateways: [{{name: g, address: '{address}:1'}}]}}\n"
    )
}

fn of<'a>(status: &'a StatusResponse, region: &str) -> Option<&'a RegionStatus> {
    status.regions.iter().find(|found| found.region == region)
}

async fn until(what: &str, client: &mut Client, is_so: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = client.status(StatusRequest {}).await.unwrap().into_inner();
        if is_so(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "not in time: {what}: {status:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// No gateway says anything here: there are two vantages, and both are control nodes. One alone takes no region out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_is_a_vantage_and_has_the_same_evidence_when_it_leads() {
    let (domain, cluster) = (Domain::create(), Cluster::start());
    let leader = domain.node("c-0", &store(&cluster)).await;
    eventually("it leads", || leader.parts.leading.fence().is_some()).await;
    let mut alice = domain.alice(&leader).await;
    let applied = apply(&mut alice, &[deserted("eu", "127.0.0.1"), deserted("us", "127.0.0.2")]).await;
    assert_eq!(applied.faults, Vec::<String>::new());
    let phase =
        |wanted: &'static str| move |status: &StatusResponse| of(status, "us").is_some_and(|us| us.phase == wanted);
    let one = "1 of 1 pairs failed";
    let alone = until("us is suspected", &mut alice, |status| {
        phase("suspect")(status) && of(status, "us").is_some_and(|us| us.evidence.starts_with(one))
    });
    alone.await;

    let follower = domain.node("c-1", &store(&cluster)).await;
    let began = Instant::now();
    let down = until("us is down", &mut alice, phase("down")).await;
    println!("two vantages agreed {:?} after the follower began", began.elapsed());
    let evidence = &of(&down, "us").unwrap().evidence;
    assert!(evidence.starts_with("2 of 2 pairs failed"), "{evidence}");
    let shown = follower.parts.metrics.encode().unwrap();
    assert!(shown.contains("\nspillway_control_evidence_shared 1\n"), "{shown}");

    let mut bob = domain.alice(&follower).await;
    leader.stop().await;
    eventually("the follower leads", || follower.parts.leading.fence().is_some()).await;
    let led = Instant::now();
    let its = |status: &StatusResponse| {
        let epoch = status.plan.as_ref().map(|plan| plan.epoch);
        status.leader == "c-1"
            && epoch == Some(status.epoch)
            && of(status, "us").is_some_and(|us| !us.evidence.is_empty())
    };
    let status = until("its own plan stands", &mut bob, its).await;
    println!("the next leader's plan stood after {:?}", led.elapsed());
    assert!(led.elapsed() < Duration::from_secs(5), "{:?}", led.elapsed());
    let us = of(&status, "us").unwrap();
    assert_eq!((us.phase.as_str(), us.weight), ("down", 0.0), "{us:?}");
    // It may have heard too few of the last leader's probes for that pair to have failed, but it heard them.
    let counts = us.evidence.contains(" of 2 pairs failed") && us.failing_pairs == 2;
    assert!(counts, "what the last leader saw counts on: {us:?}");
    follower.stop().await;
}

/// Who is told is told no longer than it is heard.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_told_ends_with_what_is_heard_with_trust_and_with_silence() {
    let domain = Domain::create();
    let leader = domain.alone().await;
    let share = async |path: &str, says: BoxStream<'static, Sightings>| {
        let workload = Workload::load(&domain.identity(path)).unwrap();
        let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
        let channel = dial(&workload, expected, &leader.address.to_string(), Duration::from_secs(5)).await.unwrap();
        EvidenceClient::new(channel).share(says).await.unwrap().into_inner()
    };
    let end = async |mut told: tonic::Streaming<Heard>| {
        let (began, all) = (Instant::now(), async { while let Ok(Some(_)) = told.message().await {} });
        tokio::time::timeout(Duration::from_secs(30), all).await.expect("it ends");
        began.elapsed()
    };
    let alive = || {
        let beats = tokio::time::interval(Duration::from_secs(2));
        let says = stream::unfold(beats, async |mut beats| {
            beats.tick().await;
            Some((Sightings::default(), beats))
        });
        says.boxed()
    };

    let closed = end(share("region/us/control/closed", stream::empty().boxed()).await).await;
    let silent = end(share("region/us/control/silent", stream::pending().boxed()).await);
    let mut kept = share("region/us/control/kept", alive()).await;
    let revoked = async {
        let told = share("region/us/control/revoked", alive()).await;
        let ids = [SpiffeId::parse("spiffe://spillway.test/region/us/control/revoked").unwrap()].into();
        assert!(leader.parts.workload.revoke(&Arc::new(Revoked { ids, ..Revoked::default() })));
        end(told).await
    };
    let (silent, revoked) = tokio::join!(silent, revoked);
    println!("the answer ended {closed:?} after its question, {revoked:?} after trust, {silent:?} after the last word");
    assert!(closed < Duration::from_secs(10), "not by its silence: {closed:?}");
    let beat = tokio::time::timeout(Duration::from_secs(30), async {
        // What is left of the time before, and then what is told now.
        for _ in 0..4 {
            kept.message().await.unwrap().expect("it goes on");
        }
    });
    beat.await.expect("who goes on to say something is told");
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_control_nodes_share_evidence_and_only_with_the_leader() {
    let (domain, cluster) = (Domain::create(), Cluster::start());
    let (leader, follower) = two(&domain, &cluster).await;
    let ask = async |path: &str, node: &Node| {
        let workload = Workload::load(&domain.identity(path)).unwrap();
        let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
        let channel = dial(&workload, expected, &node.address.to_string(), Duration::from_secs(5)).await.unwrap();
        let answer = EvidenceClient::new(channel).share(stream::pending()).await;
        answer.map(|_| ()).map_err(|status| status.code())
    };
    assert_eq!(ask("region/us/gateway/g", &leader).await, Err(Code::PermissionDenied));
    assert_eq!(ask("operator/alice", &leader).await, Err(Code::PermissionDenied));
    assert_eq!(ask("region/us/control/x", &follower).await, Err(Code::Unavailable));
    assert_eq!(ask("region/us/control/x", &leader).await, Ok(()));
    leader.stop().await;
    follower.stop().await;
}
