use std::collections::BTreeMap;

use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use spillway_figures::{Goal, record};
use spillway_proto::control::ack::{Document, Step};
use spillway_proto::control::from_node::Message as FromNode;
use spillway_proto::control::to_node::Message as ToNode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::fake::{CONTROL, FakeControl};
use super::samples::{Content, Node, plan, sealed_plan};
use super::*;
use crate::fixture::{Domain, GATEWAY, SIDECAR, eventually};
use crate::plan::Plans;
use crate::telemetry::Metrics;

const SECOND: Duration = Duration::from_secs(1);

struct Counted;

impl TrafficSource for Counted {
    fn since_last(&self) -> control::Traffic {
        control::Traffic { requests: 7, ..control::Traffic::default() }
    }
}

struct Running {
    snapshots: Arc<Subscription>,
    plans: Arc<Plans>,
    pulses: watch::Receiver<control::Pulse>,
    sightings: SightingLog,
    metrics: Metrics,
    drain: Drain,
}

impl Running {
    fn start(domain: &Domain, node: &Node, servers: impl IntoIterator<Item = impl ToString>) -> Self {
        let intake = node.intake();
        let (snapshots, plans, metrics) = (intake.snapshots(), intake.plans(), node.metrics.lock().clone());
        let servers = servers.into_iter().map(|server| server.to_string()).collect();
        let settings = ControlSettings { servers };
        let link = Link::new(settings, domain.workload(GATEWAY), intake, Some(Arc::new(Counted)), &metrics);
        let (pulses, sightings) = (link.pulses(), link.sightings());
        let drain = Drain::new(Duration::ZERO);
        tokio::spawn(link.follow(drain.clone()));
        Self { snapshots, plans, pulses, sightings, metrics, drain }
    }

    fn shows(&self, line: &str) -> bool {
        self.metrics.encode().unwrap().contains(&format!("\nspillway_{line}\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.drain.stop();
    }
}

#[tokio::test]
async fn what_is_pushed_is_acknowledged_step_by_step_and_served() {
    let (domain, node) = (Domain::create(), Node::new());
    let mut control = FakeControl::start(&domain).await;
    let mut running = Running::start(&domain, &node, [control.address]);
    let (mut stream, hello) = control.stream().await;
    assert_eq!(hello.serving, Some(control::Serving::default()));
    let one = Content::of(1, &["eu"]);
    stream.send(ToNode::Delta(one.whole(1)));
    for step in [Step::Validated, Step::Persisted, Step::Applied] {
        let ack = control::Ack { document: Document::Snapshot.into(), version: 1, step: step.into() };
        assert_eq!(stream.next().await, Some(FromNode::Ack(ack)));
    }
    assert_eq!(running.snapshots.current().version, 1);
    stream.send(ToNode::Plan(plan(4, 1, &["eu"])));
    let ack = stream.outcome().await.unwrap();
    assert_eq!((ack.document(), ack.version, running.plans.version()), (Document::Plan, 4, 4));
    stream.send(ToNode::Delta(Content::of(2, &[]).since(&one, 1)));
    let nack = stream.outcome().await.unwrap_err();
    assert_eq!((nack.version, nack.reason.as_str(), nack.errors.is_empty()), (2, "invalid", false));
    let serving = nack.serving.unwrap();
    assert_eq!((serving.snapshot_version, serving.snapshot_sha256, serving.plan_version), (1, one.sha256(), 4));
    assert!(running.shows("snapshot_rejected_total{reason=\"invalid\"} 1") && running.shows("control_connected 1"));
    let pulse = control::Pulse { nudged: vec!["us/gw-0".into()], leader: "one".into() };
    stream.send(ToNode::Pulse(pulse.clone()));
    timeout(SECOND * 5, running.pulses.changed()).await.unwrap().unwrap();
    assert_eq!(*running.pulses.borrow(), pulse);
    running.sightings.record([control::Sighting { region: "us".into(), ..control::Sighting::default() }]);
    let Some(FromNode::Sightings(sent)) = stream.next().await else { panic!("sightings") };
    assert_eq!(sent.sightings[0].region, "us");
    let Some(FromNode::Heartbeat(beat)) = stream.next().await else { panic!("a heartbeat") };
    assert_eq!((beat.serving.unwrap().snapshot_sha256, beat.traffic.unwrap().requests), (one.sha256(), 7));
}

#[tokio::test]
async fn servers_are_tried_in_turn_and_only_control_nodes_are_believed() {
    let (domain, node) = (Domain::create(), Node::new());
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let sidecar = FakeControl::start_as(domain.workload(SIDECAR)).await;
    let foreign = Domain::create();
    let stranger = FakeControl::start_as(foreign.workload(CONTROL)).await;
    let mut control = FakeControl::start(&domain).await;
    let servers = [nobody, sidecar.address, stranger.address, control.address];
    let running = Running::start(&domain, &node, servers);
    for _ in 0..3 {
        // Each time the stream ends, the others have their turn before.
        let (stream, _) = control.stream().await;
        eventually("the stream is open", || running.shows("control_connected 1")).await;
        drop(stream);
        eventually("the stream is closed", || running.shows("control_connected 0")).await;
    }
}

#[tokio::test]
async fn a_half_open_stream_is_given_up_and_another_stands_within_15_s() {
    let (domain, node) = (Domain::create(), Node::new());
    let mut control = FakeControl::start(&domain).await;
    let proxy = Proxy::start(control.address).await;
    let running = Running::start(&domain, &node, [proxy.address]);
    let (stream, _) = control.stream().await;
    stream.send(ToNode::Pulse(control::Pulse::default()));
    eventually("the stream is open", || running.shows("control_connected 1")).await;
    let began = Instant::now();
    proxy.swallow();
    let (mut second, hello) = control.stream().await;
    let took = began.elapsed().as_secs_f64();
    assert!(record("control.half_open.reconnected", took, "s", Goal::AtMost(15.0)), "{took}");
    assert_eq!(hello.serving, Some(control::Serving::default()));
    second.send(ToNode::Delta(Content::of(1, &["eu"]).whole(1)));
    second.outcome().await.unwrap();
    assert!(running.shows("control_streams_ended_total{reason=\"silent\"} 1"));
}

#[tokio::test]
async fn t59_without_control_what_was_kept_is_served_again() {
    let (domain, node) = (Domain::create(), Node::new());
    let mut control = FakeControl::start(&domain).await;
    let first = Running::start(&domain, &node, [control.address]);
    let (mut stream, _) = control.stream().await;
    stream.send(ToNode::Delta(Content::of(8, &["eu", "us"]).whole(1)));
    stream.outcome().await.unwrap();
    stream.send(ToNode::Plan(plan(3, 1, &["eu", "us"])));
    stream.outcome().await.unwrap();
    let address = control.address;
    drop((first, control, stream));
    let again = Running::start(&domain, &node, [address]);
    assert_eq!((again.snapshots.current().version, again.plans.version()), (8, 3));
    assert!(!again.snapshots.is_empty());
}

#[tokio::test]
async fn t62_of_1000_mutations_all_are_refused_with_a_reason_and_the_last_good_one_stays() {
    let (domain, node) = (Domain::create(), Node::new());
    let mut control = FakeControl::start(&domain).await;
    let running = Running::start(&domain, &node, [control.address]);
    let (mut stream, _) = control.stream().await;
    let good = Content::of(10, &["eu", "us"]).with_pool("eu").with_pool("us");
    stream.send(ToNode::Delta(good.whole(5)));
    stream.outcome().await.unwrap();
    stream.send(ToNode::Plan(plan(4, 5, &["eu", "us"])));
    stream.outcome().await.unwrap();
    let mut random = StdRng::seed_from_u64(5);
    let mut reasons = BTreeMap::new();
    for number in 0..1_000 {
        let (what, message) = mutation(&good, number, &mut random);
        stream.send_raw(&message);
        let nack = match stream.outcome().await {
            Ok(ack) => panic!("the mutation {number}, {what}, was taken: {ack:?}"),
            Err(nack) => nack,
        };
        assert!(!nack.reason.is_empty() && !nack.errors.is_empty(), "{number} {what}: {nack:?}");
        let serving = nack.serving.unwrap();
        assert_eq!((serving.snapshot_sha256, serving.plan_version), (good.sha256(), 4), "{number} {what}");
        *reasons.entry(nack.reason).or_insert(0) += 1;
    }
    for reason in ["malformed", "checksum", "base", "version", "epoch", "too_large", "unsafe", "invalid"] {
        assert!(reasons.contains_key(reason), "{reason} in {reasons:?}");
    }
    assert_eq!(running.snapshots.current().version, 10);
    // Larger than what is read at all: the stream ends behind the refusal, and another one begins.
    stream.send_raw(&vec![0; MOST_MESSAGE + 1]);
    assert_eq!(stream.outcome().await.unwrap_err().reason, "too_large");
    let (mut stream, _) = control.stream().await;
    let next = Content::of(11, &["eu", "us"]).with_pool("eu").with_pool("us");
    stream.send(ToNode::Delta(next.since(&good, 5)));
    stream.outcome().await.unwrap();
    println!("refused: {reasons:?}");
    let refused: u32 = reasons.values().sum();
    assert!(record("control.mutations.refused", f64::from(refused), "of 1000", Goal::AtLeast(1_000.0)));
}

/// A message that nobody may take, and what is wrong with it.
fn mutation(good: &Content, number: u32, random: &mut StdRng) -> (&'static str, Vec<u8>) {
    let regions = ["eu", "us"];
    let staffed = |version| Content::of(version, &regions).with_pool("eu").with_pool("us");
    let next = staffed(11).with_raw("Tenant", "acme", "{}");
    let whole = || ToNode::Delta(next.whole(5));
    let raw = |message: ToNode| control::ToNode { message: Some(message) }.encode_to_vec();
    let older = random.random_range(1..=9);
    let with_plan = |change: &dyn Fn(&mut control::Plan)| {
        let mut plan = control::Plan::decode(plan(5, 5, &regions).plan).unwrap();
        change(&mut plan);
        raw(ToNode::Plan(sealed_plan(&plan)))
    };
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 2.0][random.random_range(0..5)];
    if number % 250 == 249 {
        let spec = " ".repeat((66 << 20) + random.random_range(0..100));
        return ("oversized", raw(ToNode::Delta(next.with_raw("Tenant", "huge", &spec).whole(5))));
    }
    match number % 16 {
        0 => {
            let mut bytes = raw(whole());
            bytes.truncate(random.random_range(1..bytes.len()));
            ("truncated", bytes)
        }
        1 => {
            let mut bytes = raw(ToNode::Delta(next.since(good, 5)));
            // Behind the epoch: a higher one is no fault. The frame around it is the message's kind and length.
            let at = random.random_range(8..bytes.len());
            bytes[at] ^= 1 << random.random_range(0..8);
            ("a flipped bit", bytes)
        }
        2 => {
            let mut bytes = vec![0; random.random_range(8..200)];
            random.fill_bytes(&mut bytes);
            bytes[0] = 0x0a;
            ("noise", bytes)
        }
        3 => ("no region", raw(ToNode::Delta(Content::of(11, &[]).whole(5)))),
        4 => ("an older version", raw(ToNode::Delta(staffed(older).whole(5)))),
        5 => ("a leader of the past", raw(ToNode::Delta(next.whole(random.random_range(0..5))))),
        6 => {
            let left = regions[random.random_range(0..2)];
            ("an emptied region", raw(ToNode::Delta(Content::of(11, &regions).with_pool(left).since(good, 5))))
        }
        7 => ("no weight", raw(ToNode::Delta(staffed(11).weighing("0").since(good, 5)))),
        8 => {
            let pods = r#"{"pods":[],"region":"eu"}"#;
            ("a pool without pods", raw(ToNode::Delta(staffed(11).with_raw("Pool", "of-eu", pods).since(good, 5))))
        }
        9 => {
            let spec = ["", "{", "[]", "null", r#"{"weight":"NaN"}"#, "\u{0}"][random.random_range(0..6)];
            ("an unreadable resource", raw(ToNode::Delta(next.with_raw("Region", "ap", spec).since(good, 5))))
        }
        10 => ("another base", raw(ToNode::Delta(next.since(&staffed(older), 5)))),
        11 => ("a weight that is none", with_plan(&|plan| plan.regions[0].weight = odd)),
        12 => ("a share that is none", with_plan(&|plan| plan.regions[1].share = odd)),
        13 => ("a region that is not known", with_plan(&|plan| plan.regions[0].region = "ap".into())),
        14 => {
            let (version, epoch) = if random.random() { (random.random_range(1..4), 5) } else { (5, older / 2) };
            ("an older plan", raw(ToNode::Plan(plan(version, epoch, &regions))))
        }
        _ => {
            let mut sealed = plan(5, 5, &regions);
            sealed.plan = sealed.plan.slice(..random.random_range(0..sealed.plan.len()));
            ("a truncated plan", raw(ToNode::Plan(sealed)))
        }
    }
}

#[test]
fn rests_are_jittered_and_bounded() {
    for failures in 1..100 {
        let (rest, most) = (rest(failures), REST.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST_REST));
        assert!(rest <= most && rest >= most / 2, "{failures} {rest:?}");
    }
}

/// Passes bytes on until it is told to swallow those of the connections that it has.
struct Proxy {
    address: std::net::SocketAddr,
    swallowing: watch::Sender<bool>,
}

impl Proxy {
    async fn start(server: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let swallowing = watch::Sender::new(false);
        let told = swallowing.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(server).await.unwrap();
                // Connections that come after it was told are none of those that it had.
                let swallows = if *told.borrow() { None } else { Some(told.subscribe()) };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(pass(from_client, to_server, swallows.clone()));
                tokio::spawn(pass(from_server, to_client, swallows));
            }
        });
        Self { address, swallowing }
    }

    fn swallow(&self) {
        self.swallowing.send_replace(true);
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    swallows: Option<watch::Receiver<bool>>,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if swallows.as_ref().is_some_and(|swallows| *swallows.borrow()) {
            continue;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
    // A half that ended is not told on either.
    std::future::pending::<()>().await;
}
