//! From an operator's word to the nodes of a fleet, through whole control nodes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use spillway_proto::control::{ResourceName, RollbackRequest, StatusRequest};
use spillway_runtime::audit::Audit;
use spillway_runtime::drain::Drain;
use spillway_runtime::link::{ControlSettings, Intake, Link};
use spillway_runtime::snapshot::Subscription;
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::Workload;
use tokio::task::JoinHandle;

use crate::cluster::Cluster;
use crate::followers::two;
use crate::support::{Domain, Node, apply, eventually, files, pool, region};

/// A gateway's end of the stream.
struct Gateway {
    snapshots: Arc<Subscription>,
    task: JoinHandle<()>,
}

impl Gateway {
    fn start(domain: &Domain, region: &str, name: &str, nodes: &[&Node]) -> Self {
        let path = format!("region/{region}/gateway/{name}");
        let workload = Workload::load(&domain.identity(&path)).unwrap();
        let metrics = Metrics::new("test");
        let snapshot = domain.path(&path.replace('/', "-")).join("snapshot");
        let intake = Intake::resume(&snapshot, &metrics, &Audit::off());
        let snapshots = intake.snapshots();
        let servers = nodes.iter().map(|node| node.address.to_string()).collect();
        let link = Link::new(ControlSettings { servers }, workload, intake, None, &metrics);
        Self { snapshots, task: tokio::spawn(link.follow(Drain::new(Duration::ZERO))) }
    }

    fn fleet(domain: &Domain, nodes: &[&Node]) -> Vec<Self> {
        let places = ["ap", "eu", "us"].iter().flat_map(|region| ["a", "b"].map(|name| (region, name)));
        places.map(|(region, name)| Self::start(domain, region, name, nodes)).collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn all_serve(fleet: &[Gateway], version: u64) -> bool {
    fleet.iter().all(|gateway| gateway.snapshots.load().version == version)
}

fn regions(pods: usize) -> Vec<String> {
    ["ap", "eu", "us"].iter().flat_map(|name| [region(name), pool(&format!("of-{name}"), name, pods)]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_applied_reaches_the_fleet_and_so_does_its_rollback_within_10_s() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    let fleet = Gateway::fleet(&domain, &[&node]);
    apply(&mut alice, &regions(1)).await;
    eventually("all serve the first version", || all_serve(&fleet, 1)).await;
    apply(&mut alice, &regions(2)).await;
    eventually("all serve the second", || all_serve(&fleet, 2)).await;
    let began = Instant::now();
    alice.rollback(RollbackRequest { version: 1, message: "back".into() }).await.unwrap();
    eventually("all are rolled back", || all_serve(&fleet, 3)).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    println!("a rollback was everywhere after {:?}", began.elapsed());
    // A region that is left without pods, because an operator said so.
    let without = [regions(1)[..5].to_vec()].concat();
    let meant = ResourceName { kind: "Region".into(), name: "us".into() };
    let confirmed =
        alice.apply(spillway_proto::control::ApplyRequest { confirmed_empty: vec![meant], ..files(&without) });
    assert_eq!(confirmed.await.unwrap().into_inner().faults, Vec::<String>::new());
    eventually("all serve it", || all_serve(&fleet, 4)).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = alice.status(StatusRequest {}).await.unwrap().into_inner();
        let is_whole = status.nodes.iter().all(|node| node.connected && node.drift.is_empty());
        if (status.settled_version, status.nodes.len(), is_whole) == (4, 6, true) {
            break;
        }
        assert!(Instant::now() < deadline, "it has not settled: {status:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(fleet);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_goes_on_under_the_next_leader() {
    let (domain, cluster) = (Domain::create(), Cluster::start());
    let (leader, follower) = two(&domain, &cluster).await;
    let mut alice = domain.alice(&follower).await;
    let fleet = Gateway::fleet(&domain, &[&leader, &follower]);
    apply(&mut alice, &regions(1)).await;
    eventually("all serve the first version, through either", || all_serve(&fleet, 1)).await;
    leader.stop().await;
    eventually("the other leads", || follower.parts.leading.fence().is_some()).await;
    assert!(all_serve(&fleet, 1));
    apply(&mut alice, &regions(2)).await;
    eventually("all serve the second", || all_serve(&fleet, 2)).await;
    drop(fleet);
    follower.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t59_without_the_store_what_has_settled_is_still_given() {
    let (domain, cluster) = (Domain::create(), Cluster::start());
    let (leader, follower) = two(&domain, &cluster).await;
    let mut alice = domain.alice(&leader).await;
    let first = Gateway::start(&domain, "eu", "a", &[&leader]);
    apply(&mut alice, &regions(1)).await;
    eventually("it serves the first version", || first.snapshots.load().version == 1).await;
    cluster.kill();
    eventually("nobody leads", || leader.parts.leading.fence().is_none()).await;
    let late = Gateway::start(&domain, "us", "late", &[&leader]);
    eventually("a late one serves it, too", || late.snapshots.load().version == 1).await;
    drop((first, late));
    leader.stop().await;
    follower.stop().await;
}
