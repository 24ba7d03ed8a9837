use std::collections::BTreeMap;
use std::net::TcpListener;

use spillway_core::failover::{MayLeave, NoPeer, Plan, Region, Stranded, Traffic, peers_for};
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::resource;
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::tls::install_provider;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// The region `eu`, and two others; `ap` does not serve the model, `za` has no gateway.
fn snapshot(us: &str) -> Snapshot {
    let text = format!(
        "
{{apiVersion: spillway/v1, kind: Region, metadata: {{name: eu}}, spec: {{trustDomain: td, gateways: [{{name: a, address: '192.0.2.1:1'}}]}}}}
---
{{apiVersion: spillway/v1, kind: Region, metadata: {{name: us}}, spec: {{trustDomain: td, cost: 3, gateways: [{us}]}}}}
---
{{apiVersion: spillway/v1, kind: Region, metadata: {{name: ap}}, spec: {{trustDomain: td, gateways: [{{name: a, address: '192.0.2.3:1'}}]}}}}
---
{{apiVersion: spillway/v1, kind: Region, metadata: {{name: za}}, spec: {{trustDomain: td}}}}
---
{{apiVersion: spillway/v1, kind: Region, metadata: {{name: other}}, spec: {{trustDomain: elsewhere, gateways: [{{name: a, address: '192.0.2.4:1'}}]}}}}
---
{{apiVersion: spillway/v1, kind: Pool, metadata: {{name: p}}, spec: {{region: us, pods: [{{name: a, address: '192.0.2.9:1'}}]}}}}
---
apiVersion: spillway/v1
kind: Model
metadata: {{name: eta}}
spec:
  pools: [p]
  versions: [1]
  backend: onnx
  deadline: 1s
  inputs: [{{name: x, datatype: FP32, shape: [1]}}]
  outputs: [{{name: y, datatype: FP32, shape: [1]}}]
"
    );
    Snapshot::compile(1, &resource::parse(&text).unwrap()).unwrap()
}

struct Scene {
    workload: Arc<Workload>,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        install_provider();
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(TrustDomain::parse("td").unwrap()).unwrap();
        let id = SpiffeId::parse("spiffe://td/region/eu/gateway/a").unwrap();
        let leaf = authority.issue(&LeafRequest::new(id, SECOND * 3_600)).unwrap();
        let settings = leaf.save_workload(folder.path(), authority.trust_bundle()).unwrap();
        Self { workload: Workload::load(&settings).unwrap(), _folder: folder }
    }

    fn peers(&self, snapshot: &Snapshot, before: Option<&Peers>) -> Peers {
        Peers::new(snapshot, &name("eu"), &self.workload, &UpstreamMetrics::default(), before)
    }
}

fn seen(
    peers: &Peers,
    snapshot: &Snapshot,
    plan: Option<&Published>,
    rests: &Rests,
    class: Class,
) -> BTreeMap<String, Peer> {
    let model = &snapshot.models["eta"];
    let tenant = &name("acme");
    let sight = Sight { snapshot, plan, rests, model, model_name: "eta", tenant, class, now: SECOND };
    peers.seen(&sight).into_iter().map(|peer| (peer.region.to_string(), peer)).collect()
}

fn published(us: f64, standing: Standing) -> Published {
    let region = |share| Region { planned: 100.0, share, capacity: Some(250.0), load: Some(100.0), overridden: None };
    let regions: BTreeMap<Name, Region> =
        [(name("eu"), region(1.0)), (name("us"), region(us)), (name("ap"), region(1.0))].into();
    let plan = Plan::of(1, &regions, &Traffic::default(), Duration::ZERO).unwrap();
    Published { epoch: 1, plan, standings: [(name("us"), (standing, String::new()))].into() }
}

#[test]
fn regions_with_gateways_in_our_trust_domain_are_peers() {
    let (scene, snapshot) =
        (Scene::new(), snapshot("{name: a, address: '192.0.2.2:1'}, {name: b, address: '192.0.2.2:2'}"));
    let peers = scene.peers(&snapshot, None);
    let seen = seen(&peers, &snapshot, None, &Rests::default(), Class::Low);
    assert_eq!(seen.keys().collect::<Vec<_>>(), ["ap", "us"]);
    assert_eq!((seen["us"].serves, seen["us"].healthy, seen["us"].headroom, seen["us"].cost), (true, true, None, 3.0));
    assert!(!seen["ap"].serves);
    let expected = peers.region(&name("us")).unwrap().gateways[0].upstream.expected().unwrap().to_string();
    assert_eq!(expected, "spiffe://td/region/us/gateway/*");
}

#[test]
fn the_plan_says_what_a_region_has_left_and_what_it_refused_outweighs_that() {
    let (scene, snapshot) = (Scene::new(), snapshot("{name: a, address: '192.0.2.2:1'}"));
    let (peers, rests) = (scene.peers(&snapshot, None), Rests::default());
    let us = |plan: &Published, class| seen(&peers, &snapshot, Some(plan), &rests, class)["us"].clone();
    let steady = published(1.0, Standing::Steady);
    assert!((us(&steady, Class::High).headroom.unwrap() - 150.0).abs() < 1e-9 && us(&steady, Class::High).healthy);
    assert!(!us(&published(0.0, Standing::Out), Class::High).healthy);
    rests.refused(&name("us"), "eta", Class::Normal, SECOND, SECOND);
    assert_eq!(us(&steady, Class::Low).headroom, Some(0.0));
    let tired = us(&steady, Class::Normal);
    assert!(us(&steady, Class::High).headroom > Some(0.0), "what was refused to normal was not refused to high");
    let stranded = Stranded {
        region: &name("eu"),
        forwarded: false,
        may_leave: &MayLeave::Anywhere,
        left: SECOND,
        expected: Duration::ZERO,
        key: 7,
    };
    assert_eq!(peers_for(&stranded, &[tired]), Err(NoPeer::Full));
}

#[test]
fn gateways_take_turns_and_their_ways_outlive_snapshots() {
    let two = "{name: a, address: '192.0.2.2:1'}, {name: b, address: '192.0.2.2:2'}";
    let (scene, before) = (Scene::new(), snapshot(two));
    let peers = scene.peers(&before, None);
    let us = peers.region(&name("us")).unwrap();
    let turns: Vec<Vec<&str>> =
        (0..4).map(|_| us.in_turn().into_iter().map(|gateway| gateway.at.name.as_str()).collect()).collect();
    assert_eq!((&turns[0], &turns[1]), (&turns[2], &turns[3]));
    assert_ne!(turns[0], turns[1]);
    assert!(turns.iter().all(|turn| turn.len() == 2));

    let held: Vec<_> = us.gateways.iter().map(|gateway| gateway.upstream.hold()).collect();
    let after = snapshot("{name: b, address: '192.0.2.2:2'}, {name: a, address: '192.0.2.2:3'}");
    let next = scene.peers(&after, Some(&peers));
    let in_flight = |gateway: &PeerGateway| (gateway.at.name.to_string(), gateway.upstream.in_flight());
    let kept: Vec<_> = next.region(&name("us")).unwrap().gateways.iter().map(in_flight).collect();
    assert_eq!(kept, [("b".to_owned(), 1), ("a".to_owned(), 0)], "the one whose address changed is another");
    drop(held);
}

#[tokio::test]
async fn a_region_whose_gateways_cannot_be_reached_is_not_healthy() {
    // Nobody listens there: it was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (scene, snapshot) = (Scene::new(), snapshot(&format!("{{name: a, address: '{free}'}}")));
    let (peers, rests) = (scene.peers(&snapshot, None), Rests::default());
    assert!(seen(&peers, &snapshot, None, &rests, Class::High)["us"].healthy, "unknown is not down");
    let us = peers.region(&name("us")).unwrap();
    assert!(us.gateways[0].upstream.connect().await.is_err());
    assert!(!seen(&peers, &snapshot, None, &rests, Class::High)["us"].healthy);
}
