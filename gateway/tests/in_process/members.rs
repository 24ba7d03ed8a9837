//! Pools whose members DNS names: they come and go as it says, and stay when it says nothing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::support::*;
use hickory_resolver::proto::rr::RecordType;

const NAME: &str = "scorers.test.";
const SRV: &str = "_oip._tcp.scorers.test.";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

fn hosts(port: u16) -> String {
    format!("name: scorers.test, port: {port}")
}

/// Sidecars that prove to be these, at one port of 127.0.0.2, 127.0.0.3 and so on.
async fn sidecars(ground: &Ground, proves: &[&str]) -> (Vec<Sidecar>, u16) {
    let mut sidecars: Vec<Sidecar> = Vec::new();
    for (index, proves) in proves.iter().enumerate() {
        let port = sidecars.first().map_or(0, |first| first.address.port());
        sidecars.push(ground.sidecar_at(proves, &format!("127.0.0.{}:{port}", index + 2)).await);
    }
    let port = sidecars[0].address.port();
    (sidecars, port)
}

/// Clients that call all the time. No call may fail.
struct Callers {
    task: tokio::task::JoinHandle<()>,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Callers {
    async fn of(world: &World) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (connections, ended) = ([world.http2().await, world.http2().await], stop.clone());
        let task = tokio::spawn(async move {
            for index in 0_usize.. {
                if ended.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                let message = request("double", &index.to_string(), &format!("entity-{}", index % 32));
                let answer = Grpc::call(&connections[index % 2], INFER, &[], message).await;
                assert_eq!(answer.status, 0, "{answer:?}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        Self { task, stop }
    }

    async fn stop(self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

/// Waits until exactly these pods get what the callers ask.
async fn until_served_by(world: &World, pods: &[&str]) {
    until(&format!("the pods are {pods:?}"), async || {
        let before: Vec<usize> = world.sidecars.iter().map(|sidecar| sidecar.seen().len()).collect();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let serving = world.sidecars.iter().zip(before).filter(|(sidecar, before)| sidecar.seen().len() > *before);
        serving.map(|(sidecar, _)| sidecar.name.as_str()).collect::<BTreeSet<_>>() == pods.iter().copied().collect()
    })
    .await;
}

async fn until_ready(world: &World) {
    until("the gateway is ready", async || world.admin("/readyz").await.starts_with("HTTP/1.1 200")).await;
}

async fn rounds(world: &World, outcome: &str) -> u64 {
    world.metric(&format!("spillway_gateway_members_rounds_total{{outcome=\"{outcome}\"}}")).await
}

#[tokio::test]
async fn pods_come_and_go_with_the_addresses_of_a_name() {
    let (ground, dns) = (Ground::new(), Dns::start().await);
    let (sidecars, port) = sidecars(&ground, &["scorers/a", "scorers/b"]).await;
    let world = World::unready(ground, sidecars, Some(&hosts(port)), &dns.settings()).await;
    until("it was asked", async || rounds(&world, "kept").await > 0).await;
    assert!(world.admin("/readyz").await.starts_with("HTTP/1.1 503"), "nothing is known yet");
    let answer = Grpc::call(&world.http2().await, INFER, &[], request("double", "0", "e")).await;
    assert_eq!((answer.status, answer.code.as_str()), (14, "no-pod"), "{answer:?}");

    dns.say(vec![address(NAME, 1, "127.0.0.2")]);
    until_ready(&world).await;
    let callers = Callers::of(&world).await;
    until_served_by(&world, &["a"]).await;
    dns.say(vec![address(NAME, 1, "127.0.0.3"), address(NAME, 1, "127.0.0.2")]);
    until_served_by(&world, &["a", "b"]).await;
    assert_eq!(world.metric("spillway_gateway_members{pool=\"scorers\"}").await, 2);
    // By way of another name, and with too much for a datagram.
    dns.mood(Mood::Truncates);
    dns.say(vec![alias(NAME, 1, "real.test."), address("real.test.", 300, "127.0.0.3")]);
    until_served_by(&world, &["b"]).await;
    // With addresses of IPv6 alone: here one that stands for an address of IPv4.
    dns.say(vec![address(NAME, 1, "::ffff:127.0.0.2")]);
    until_served_by(&world, &["a"]).await;
    callers.stop().await;
    assert_eq!(world.metric("spillway_gateway_members_changes_total").await, 4);
    world.stop().await;
}

#[tokio::test]
async fn the_last_answer_stays_while_dns_says_nothing() {
    let (ground, mut dns) = (Ground::new(), Dns::start().await);
    let (sidecars, port) = sidecars(&ground, &["scorers/a", "scorers/b"]).await;
    let world = World::unready(ground, sidecars, Some(&hosts(port)), &dns.settings()).await;
    let both = vec![address(NAME, 1, "127.0.0.2"), address(NAME, 1, "127.0.0.3")];
    dns.say(both.clone());
    until_ready(&world).await;
    let callers = Callers::of(&world).await;
    until_served_by(&world, &["a", "b"]).await;
    let question = async |outcome: &str| {
        world.metric(&format!("spillway_gateway_members_questions_total{{outcome=\"{outcome}\"}}")).await
    };
    for (mood, outcome) in [
        (Mood::ServFail, "server-error"),
        (Mood::NxDomain, "nothing"),
        (Mood::Empty, "nothing"),
        (Mood::Silent, "timeout"),
        (Mood::Garbage, "malformed"),
    ] {
        let (kept, whole, counted) =
            (rounds(&world, "kept").await, rounds(&world, "whole").await, question(outcome).await);
        dns.mood(mood);
        until(&format!("{mood:?} is noticed"), async || {
            rounds(&world, "kept").await > kept && question(outcome).await > counted
        })
        .await;
        dns.mood(Mood::Answers);
        until(&format!("{mood:?} is over"), async || rounds(&world, "whole").await > whole).await;
    }
    dns.kill().await;
    until("nobody listens", async || question("unreachable").await + question("timeout").await > 0).await;
    until("the answer gets old", async || {
        let text = world.admin("/metrics").await;
        let age =
            text.lines().find_map(|line| line.strip_prefix("spillway_gateway_members_age_seconds{pool=\"scorers\"} "));
        age.unwrap().parse::<f64>().unwrap() > 3.0
    })
    .await;
    until_served_by(&world, &["a", "b"]).await;
    callers.stop().await;
    assert_eq!(world.metric("spillway_gateway_members_changes_total").await, 1, "it never lost one");
    world.stop().await;
}

#[tokio::test]
async fn times_to_live_are_obeyed() {
    let (ground, dns) = (Ground::new(), Dns::start().await);
    let (sidecars, port) = sidecars(&ground, &["scorers/a"]).await;
    dns.say(vec![address(NAME, 2, "127.0.0.2")]);
    let world = World::unready(ground, sidecars, Some(&hosts(port)), &dns.settings()).await;
    until("it is asked three times", async || dns.asked(RecordType::A).len() >= 3).await;
    let asked = dns.asked(RecordType::A);
    let pauses: Vec<Duration> = asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(pauses.iter().all(|pause| *pause >= Duration::from_millis(1_950)), "{pauses:?}");
    assert!(dns.asked(RecordType::AAAA).is_empty(), "there are addresses of IPv4");
    // With a long time to live it is left alone for longer than with the short one.
    dns.say(vec![address(NAME, 3_600, "127.0.0.2")]);
    until("it is asked once more", async || dns.asked(RecordType::A).len() > asked.len()).await;
    let (count, since) = (dns.asked(RecordType::A).len(), Instant::now());
    until("two short ones are over", async || since.elapsed() > Duration::from_secs(4)).await;
    assert_eq!(dns.asked(RecordType::A).len(), count);
    world.stop().await;
}

#[tokio::test]
async fn targets_of_services_must_prove_their_names() {
    let (ground, dns) = (Ground::new(), Dns::start().await);
    let mut sidecars = Vec::new();
    for pod in ["pod-0", "pod-1", "pod-2", "spare"] {
        sidecars.push(ground.sidecar(pod).await);
    }
    let port = |index: usize| sidecars[index].address.port();
    dns.say(vec![
        service(SRV, 1, 5, "pod-0.scorers.test.", port(0)),
        service(SRV, 1, 5, "Pod-1.Scorers.test.", port(1)),
        // Says that it is pod-9, and is pod-2.
        service(SRV, 1, 5, "pod-9.scorers.test.", port(2)),
        service(SRV, 1, 9, "spare.scorers.test.", port(3)),
        address("pod-1.scorers.test.", 1, "127.0.0.1"),
        address("pod-9.scorers.test.", 1, "127.0.0.1"),
        address("spare.scorers.test.", 1, "127.0.0.1"),
    ]);
    // Comes with the records of the service, and is not known by itself.
    dns.say_beside(vec![address("POD-0.scorers.test.", 1, "127.0.0.1")]);
    let world = World::unready(ground, sidecars, Some("srv: _oip._tcp.scorers.test"), &dns.settings()).await;
    until_ready(&world).await;
    until("the health checks of the others are done", async || {
        world.metric("spillway_gateway_pods_unhealthy").await == 1
    })
    .await;
    let callers = Callers::of(&world).await;
    until_served_by(&world, &["pod-0", "pod-1"]).await;
    assert_eq!(world.metric("spillway_gateway_members{pool=\"scorers\"}").await, 3);
    assert!(world.metric("spillway_upstream_connects_total{outcome=\"tls\"}").await > 0);
    assert!(world.sidecars[2].seen().is_empty(), "the impostor is asked nothing");
    callers.stop().await;
    world.stop().await;
}

#[tokio::test]
async fn hosts_must_prove_to_be_of_the_pool() {
    let (ground, dns) = (Ground::new(), Dns::start().await);
    let (sidecars, port) = sidecars(&ground, &["scorers/whoever", "rankers/stranger"]).await;
    dns.say(vec![address(NAME, 60, "127.0.0.2"), address(NAME, 60, "127.0.0.3")]);
    let world = World::unready(ground, sidecars, Some(&hosts(port)), &dns.settings()).await;
    until_ready(&world).await;
    until("the stranger is refused", async || world.metric("spillway_gateway_pods_unhealthy").await == 1).await;
    let callers = Callers::of(&world).await;
    until_served_by(&world, &["whoever"]).await;
    callers.stop().await;
    assert!(world.sidecars[1].seen().is_empty());
    world.stop().await;
}

#[tokio::test]
async fn a_pool_that_moves_to_dns_keeps_its_pods_until_the_name_answers() {
    let (ground, dns) = (Ground::new(), Dns::start().await);
    let (sidecars, port) = sidecars(&ground, &["scorers/a", "scorers/b"]).await;
    let world = World::unready(ground, sidecars, None, &dns.settings()).await;
    until_ready(&world).await;
    let callers = Callers::of(&world).await;
    until_served_by(&world, &["a", "b"]).await;
    assert_eq!(dns.asked(RecordType::A).len(), 0, "a list needs no DNS");
    world.publish_dns(2, &hosts(port)).await;
    until("it was asked", async || rounds(&world, "kept").await > 0).await;
    until_served_by(&world, &["a", "b"]).await;
    dns.say(vec![address(NAME, 1, "127.0.0.3")]);
    until_served_by(&world, &["b"]).await;
    // Back to the list: DNS is asked no more, and what it still says changes nothing.
    world.publish(3, &[]).await;
    until_served_by(&world, &["a", "b"]).await;
    assert!(!world.admin("/metrics").await.contains("spillway_gateway_members_age_seconds{"));
    callers.stop().await;
    world.stop().await;
}
