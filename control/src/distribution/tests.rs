//! Control nodes and nodes of the fleet in one process, over real TLS.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::rollout::{Pace, RolloutSettings};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_runtime::audit::Audit;
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::drain::Drain;
use spillway_runtime::link::{ControlSettings, Intake, Link};
use spillway_runtime::plan::Plans;
use spillway_runtime::snapshot::Subscription;
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::Workload;
use tempfile::TempDir;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::service::Routes;

use super::fixture::{Shelved, of_resources, plan, rolled_back, version};
use super::{Distribution, DistributionSettings, Report, SERVICE, Standing, Surroundings, may_call};
use crate::intent::{Origin, Version};
use crate::metrics::ControlMetrics;
use crate::server::{Door, Guard, Server};
use crate::store::{Leader, Leadership, Store, StoreSettings};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
/// For what must happen, and not soon: the machine may be busy.
const LONG: Duration = Duration::from_secs(20);
const REGIONS: [&str; 3] = ["ap", "eu", "us"];

struct World {
    folder: TempDir,
    authority: Authority,
    store: Store,
    library: Shelved,
}

impl World {
    async fn create() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        Self { folder, authority, store, library: Shelved::new() }
    }

    fn workload(&self, path: &str) -> Arc<Workload> {
        let id = SpiffeId::parse(&format!("spiffe://spillway.test/region/{path}")).unwrap();
        let leaf = self.authority.issue(&LeafRequest::new(id, SECOND * 3_600)).unwrap();
        let folder = self.folder(path);
        Workload::load(&leaf.save_workload(folder, self.authority.trust_bundle()).unwrap()).unwrap()
    }

    fn folder(&self, path: &str) -> PathBuf {
        let folder = self.folder.path().join(path.replace('/', "-"));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    async fn elected(&self, node: &str) -> Leadership {
        self.store.campaign(&Name::parse(node).unwrap(), "unused").await.unwrap()
    }

    /// Two gateways in each of three regions, which follow these control nodes.
    fn fleet(&self, controls: &[&Control]) -> Vec<Node> {
        let names = REGIONS.iter().flat_map(|region| ["a", "b"].map(|name| format!("{region}/gateway/{name}")));
        names.map(|path| Node::start(self, &path, controls)).collect()
    }
}

/// A control node's distribution, served.
struct Control {
    address: SocketAddr,
    distribution: Distribution,
    standing: watch::Sender<Standing>,
    plan: watch::Sender<Option<Arc<control::SealedPlan>>>,
    nudges: broadcast::Sender<String>,
    reports: mpsc::Receiver<Report>,
    drain: Drain,
    _tasks: JoinSet<()>,
}

fn settings() -> DistributionSettings {
    settings_with(MS * 700)
}

/// How long a stage takes that nothing is wrong with.
fn settings_with(dwell: Duration) -> DistributionSettings {
    let ordinary = Pace { canary_dwell: dwell, region_dwell: dwell, patience: SECOND * 5, canaries: 2 };
    DistributionSettings { rollout: RolloutSettings { ordinary, ..RolloutSettings::default() }, gather: MS * 500 }
}

impl Control {
    async fn start(world: &World, name: &str, settings: DistributionSettings, standing: Standing) -> Self {
        let workload = world.workload(&format!("eu/control/{name}"));
        let (standing, now) = watch::channel(standing);
        let (plan, plans) = watch::channel(None);
        let (nudges, (told, reports)) = (broadcast::Sender::new(16), mpsc::channel(1_024));
        let around = Surroundings {
            node: Name::parse(name).unwrap(),
            workload: workload.clone(),
            store: world.store.clone(),
            library: Arc::new(world.library.clone()),
            standing: now,
            plan: plans,
            nudges: nudges.clone(),
            served: watch::Sender::new(None),
            reports: told,
        };
        let distribution = Distribution::new(settings, around);
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address().unwrap();
        let drain = Drain::new(Duration::ZERO);
        let guard = Guard {
            workload,
            doors: [Door { service: SERVICE, action: "follow", may_call }].into(),
            metrics: ControlMetrics::register(&Metrics::new("control")),
            audit: Audit::off(),
            drain: drain.clone(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(server.serve(Routes::new(distribution.service()), guard));
        tasks.spawn(distribution.clone().run(drain.clone()));
        Self { address, distribution, standing, plan, nudges, reports, drain, _tasks: tasks }
    }

    async fn leading(world: &World, name: &str) -> (Self, Leadership) {
        Self::leading_with(world, name, settings()).await
    }

    async fn leading_with(world: &World, name: &str, settings: DistributionSettings) -> (Self, Leadership) {
        let leadership = world.elected(name).await;
        let standing = Standing::Leading(leadership.fence.clone());
        (Self::start(world, name, settings, standing).await, leadership)
    }

    fn as_leader(&self, name: &str, epoch: u64) -> Standing {
        Standing::Following(Leader { node: Name::parse(name).unwrap(), address: self.address.to_string(), epoch })
    }

    fn drifts(&self) -> Vec<String> {
        let nodes = self.distribution.status().nodes;
        nodes
            .into_iter()
            .filter(|node| !node.drift.is_empty())
            .map(|node| format!("{}: {}", node.id, node.drift))
            .collect()
    }
}

/// A gateway's end of the stream.
struct Node {
    id: String,
    region: String,
    snapshots: Arc<Subscription>,
    plans: Arc<Plans>,
    pulses: watch::Receiver<control::Pulse>,
    metrics: Metrics,
    drain: Drain,
    _task: JoinSet<()>,
}

fn intake(folder: &Path, metrics: &Metrics) -> Intake {
    Intake::resume(&folder.join("snapshot"), metrics, &Audit::off())
}

impl Node {
    fn start(world: &World, path: &str, controls: &[&Control]) -> Self {
        let metrics = Metrics::new("test");
        let intake = intake(&world.folder(path), &metrics);
        let (snapshots, plans) = (intake.snapshots(), intake.plans());
        let servers = controls.iter().map(|control| control.address.to_string()).collect();
        let link = Link::new(ControlSettings { servers }, world.workload(path), intake, None, &metrics);
        let (pulses, drain) = (link.pulses(), Drain::new(Duration::ZERO));
        let mut task = JoinSet::new();
        task.spawn(link.follow(drain.clone()));
        let region = path.split('/').next().unwrap().to_owned();
        Self { id: path.into(), region, snapshots, plans, pulses, metrics, drain, _task: task }
    }

    fn serving(&self) -> Arc<Snapshot> {
        self.snapshots.current()
    }

    fn version(&self) -> u64 {
        self.snapshots.load().version
    }

    /// Snapshots that it refused for this reason.
    fn refused(&self, reason: &str) -> u64 {
        let counter = format!("\nspillway_snapshot_rejected_total{{reason=\"{reason}\"}} ");
        let page = self.metrics.encode().unwrap();
        page.split_once(&counter).map_or(0, |(_, rest)| rest.lines().next().unwrap().parse().unwrap())
    }
}

/// How long it took until it was so.
async fn within(most: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < most, "not within {most:?}: {what}");
        sleep(MS * 10).await;
    }
    began.elapsed()
}

fn all_serve(nodes: &[Node], version: u64) -> bool {
    nodes.iter().all(|node| node.version() == version)
}

/// A version that no node takes: a resource in it cannot be read.
fn unreadable(number: u64) -> Arc<Version> {
    let good = version(number, &REGIONS, "100");
    let keyed =
        |resource: &control::Resource| ((resource.kind.clone(), resource.name.clone()), resource.spec_json.clone());
    let mut resources: std::collections::BTreeMap<_, _> = good.resources.iter().map(keyed).collect();
    resources.insert(("Tenant".into(), "acme".into()), "[".into());
    of_resources(number, Origin::Applied, resources)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_of_three_regions_converges_stage_by_stage_and_plans_skip_them() {
    let world = World::create().await;
    world.library.add(version(1, &REGIONS, "100"));
    // Each stage lasts so long that a plan is everywhere meanwhile, and that none is overlooked.
    let (mut control, leadership) = Control::leading_with(&world, "one", settings_with(SECOND * 3)).await;
    let nodes = world.fleet(&[&control]);
    within(LONG, "all serve the first version", || all_serve(&nodes, 1)).await;
    assert!(matches!(timeout(LONG, control.reports.recv()).await, Ok(Some(Report::Joined(_)))));
    control.plan.send_replace(Some(plan(1, leadership.fence.epoch, &REGIONS)));
    let took = within(SECOND * 2, "a plan is everywhere", || nodes.iter().all(|node| node.plans.version() == 1)).await;
    println!("a plan was everywhere after {took:?}");

    world.library.add(version(2, &REGIONS, "50"));
    let mut stages: Vec<Vec<&str>> = Vec::new();
    let mut planned = false;
    within(LONG * 2, "all serve the second version", || {
        let with: Vec<&Node> = nodes.iter().filter(|node| node.version() == 2).collect();
        if with.len() == 1 && !planned {
            planned = true;
            control.plan.send_replace(Some(plan(2, leadership.fence.epoch, &REGIONS)));
        }
        let with_plan = nodes.iter().filter(|node| node.plans.version() == 2).count();
        if with_plan == 6 && with.len() == 1 && stages.len() == 1 {
            // Everyone has the plan while one gateway alone has the version.
            stages.push(vec!["plan"]);
        }
        let names: Vec<&str> = with.iter().map(|node| node.region.as_str()).collect();
        if !names.is_empty() && stages.iter().all(|stage| stage.len() != names.len() || *stage == ["plan"]) {
            stages.push(names);
        }
        all_serve(&nodes, 2)
    })
    .await;
    let counts: Vec<usize> = stages.iter().filter(|stage| **stage != ["plan"]).map(Vec::len).collect();
    assert!(stages.contains(&vec!["plan"]), "{stages:?}");
    assert_eq!(counts[..2], [1, 2], "{stages:?}");
    let region = stages.iter().find(|stage| stage.len() == 2).unwrap();
    assert_eq!(region[0], region[1], "the canary's region comes next");
    within(LONG, "it has settled", || control.distribution.status().settled == 2).await;
    let stored = within_store(&world, 2).await;
    assert!(stored.contains(&format!("\"epoch\":{}", leadership.fence.epoch)), "{stored}");
    assert_eq!(control.drifts(), Vec::<String>::new());
}

async fn within_store(world: &World, settled: u64) -> String {
    for _ in 0..2_000 {
        let stored = world.store.get("rollout").await.unwrap();
        let text = stored.map(|value| String::from_utf8_lossy(&value.bytes).into_owned()).unwrap_or_default();
        if text.contains(&format!("\"version\":{settled},")) {
            return text;
        }
        sleep(MS * 10).await;
    }
    panic!("the store does not know that {settled} has settled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_stops_a_change_and_a_rollback_is_everywhere_within_10_s() {
    let world = World::create().await;
    world.library.add(version(1, &REGIONS, "100"));
    let (control, _leadership) = Control::leading(&world, "one").await;
    let nodes = world.fleet(&[&control]);
    within(SECOND * 10, "all serve the first version", || all_serve(&nodes, 1)).await;
    world.library.add(unreadable(2));
    within(LONG, "it is stopped", || control.distribution.status().rollout.contains("stopped")).await;
    let drifts = control.drifts();
    assert!(drifts.len() == 1 && drifts[0].contains("refused 2: invalid"), "{drifts:?}");
    let refusals = nodes.iter().filter(|node| node.refused("invalid") > 0).count();
    assert_eq!((refusals, all_serve(&nodes, 1)), (1, true));
    // A good one goes round what was refused; another one takes it back.
    world.library.add(version(3, &REGIONS, "70"));
    within(LONG, "all serve the third", || all_serve(&nodes, 3)).await;
    within(LONG, "it has settled", || control.distribution.status().settled == 3).await;
    world.library.add(rolled_back(4, &version(1, &REGIONS, "100")));
    let took = within(SECOND * 10, "all are rolled back", || all_serve(&nodes, 4)).await;
    println!("a rollback was everywhere after {took:?}");
    assert!(nodes.iter().all(|node| node.serving().regions.values().all(|region| region.weight == 100.0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t60_nodes_go_through_followers_and_outlive_a_change_of_leader_and_a_past_leader_is_refused() {
    let world = World::create().await;
    world.library.add(version(1, &REGIONS, "100"));
    let (one, leadership) = Control::leading(&world, "one").await;
    let first = leadership.fence.epoch;
    let two = Control::start(&world, "two", settings(), one.as_leader("one", first)).await;
    let nodes = world.fleet(&[&two]);
    within(SECOND * 10, "all serve the first version, through the follower", || all_serve(&nodes, 1)).await;
    within(LONG, "nudges come through", || {
        // Again and again: a pulse that nobody nudged may follow at once.
        one.nudges.send("us/a".into()).unwrap();
        nodes.iter().any(|node| node.pulses.borrow().nudged == ["us/a"] && node.pulses.borrow().leader == "one")
    })
    .await;
    let next = world.elected("two").await;
    assert!(next.fence.epoch > first);
    two.standing.send_replace(Standing::Leading(next.fence.clone()));
    world.library.add(version(2, &REGIONS, "50"));
    within(SECOND * 15, "all serve the second version", || all_serve(&nodes, 2)).await;
    within_store(&world, 2).await;
    // The one before was paused and does not know: nodes and the store do.
    let late = Node::start(&world, "eu/gateway/c", &[&two]);
    within(SECOND * 10, "it serves the second version", || late.version() == 2).await;
    drop(late);
    let late = Node::start(&world, "eu/gateway/c", &[&one]);
    world.library.add(version(3, &REGIONS, "60"));
    within(SECOND * 10, "it refuses", || late.refused("epoch") > 0).await;
    assert_eq!(late.version(), 2);
    assert!(within_store(&world, 3).await.contains(&format!("\"epoch\":{}", next.fence.epoch)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_what_has_settled_is_given_and_a_later_leader_begins_from_there() {
    let world = World::create().await;
    world.library.add(version(1, &REGIONS, "100"));
    let (one, leadership) = Control::leading(&world, "one").await;
    within_store(&world, 1).await;
    let epoch = leadership.fence.epoch;
    one.drain.stop();
    drop((one, leadership));
    // Nobody tried this one yet.
    world.library.add(version(2, &REGIONS, "50"));
    let alone = Control::start(&world, "two", settings(), Standing::Alone).await;
    alone.plan.send_replace(Some(plan(7, epoch, &REGIONS)));
    let nodes = world.fleet(&[&alone]);
    within(SECOND * 10, "all serve what has settled", || all_serve(&nodes, 1)).await;
    within(LONG, "and the plan", || nodes.iter().all(|node| node.plans.version() == 7)).await;
    sleep(SECOND).await;
    assert!(all_serve(&nodes, 1));
    let next = world.elected("two").await;
    alone.standing.send_replace(Standing::Leading(next.fence.clone()));
    within(SECOND * 15, "all serve the second version", || all_serve(&nodes, 2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_content_is_not_its_versions_is_made_whole_and_a_late_one_gets_what_has_settled() {
    let world = World::create().await;
    let good = version(1, &REGIONS, "100");
    world.library.add(good.clone());
    let path = "eu/gateway/a";
    let other = version(1, &["eu"], "100");
    let whole = control::Delta {
        epoch: 1,
        target: 1,
        target_sha256: other.sha256.to_vec().into(),
        changed: other.resources.clone(),
        ..control::Delta::default()
    };
    intake(&world.folder(path), &Metrics::new("test")).take_delta(whole, |_| {}).unwrap();
    let (control, _leadership) = Control::leading(&world, "one").await;
    let node = Node::start(&world, path, &[&control]);
    assert_eq!(node.serving().regions.len(), 1);
    within(SECOND * 10, "it is made whole", || node.serving().regions.len() == 3).await;
    assert_eq!(node.version(), 1);
    within(LONG, "it is known to be", || control.drifts().is_empty()).await;
    let late = Node::start(&world, "us/gateway/late", &[&control]);
    within(LONG, "it serves what has settled", || late.version() == 1).await;
    late.drain.stop();
    within(LONG, "it is missed", || {
        let status = control.distribution.status();
        status.nodes.iter().any(|node| node.id.ends_with(&late.id) && !node.connected)
    })
    .await;
}
