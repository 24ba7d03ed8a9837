//! Pods that misbehave cost their clients next to nothing, and come back when they have healed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::*;
use tokio::task::JoinSet;
use tonic::Code;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const SECOND: Duration = Duration::from_secs(1);

/// Clients that call one after the other, until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    answered: AtomicUsize,
    failed: AtomicUsize,
    slowest_ms: AtomicUsize,
}

impl Load {
    /// Each client calls `model` every 10 ms about other entities, or about none if there are 0.
    async fn start(world: &World, clients: usize, model: &'static str, entities: usize) -> Self {
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        let mut set = JoinSet::new();
        for client in 0..clients {
            let (http2, stop, counts) = (world.http2().await, stop.clone(), counts.clone());
            set.spawn(async move {
                let mut ticks = tokio::time::interval(Duration::from_millis(10));
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
                for number in client.. {
                    ticks.tick().await;
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let entity = if entities == 0 { String::new() } else { format!("e{}", number * 7 % entities) };
                    let began = Instant::now();
                    let grpc = Grpc::call(&http2, INFER, &[], call(model, &entity)).await;
                    counts.slowest_ms.fetch_max(began.elapsed().as_millis() as usize, Ordering::SeqCst);
                    let count = if grpc.status == 0 { &counts.answered } else { &counts.failed };
                    count.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        Self { stop, clients: set, counts }
    }

    fn answered(&self) -> usize {
        self.counts.answered.load(Ordering::SeqCst)
    }

    fn failed(&self) -> usize {
        self.counts.failed.load(Ordering::SeqCst)
    }

    async fn stop(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while self.clients.join_next().await.is_some() {}
    }
}

fn call(model: &str, entity: &str) -> bytes::Bytes {
    if !entity.is_empty() {
        return request(model, "1", entity);
    }
    let mut message: spillway_proto::inference::ModelInferRequest =
        prost::Message::decode(request(model, "1", "-").slice(5..)).unwrap();
    message.parameters.clear();
    frame(&message)
}

async fn standing(world: &World, pod: &str) -> String {
    let standing = world.config(&format!("/pods/scorers/pods/{pod}/standing")).await;
    standing.as_str().unwrap_or("?").to_owned()
}

/// One of four pods is bad and heals, with requests by entity and without.
async fn one_bad_pod(manner: Manner) {
    let world = World::of(4, "", &model("free", "  routing: { policy: least_request }")).await;
    let keyed = Load::start(&world, 3, "double", 1_000).await;
    let free = Load::start(&world, 3, "free", 0).await;
    until("enough is known", async || keyed.answered() > 150 && free.answered() > 150).await;
    assert_eq!(keyed.failed() + free.failed(), 0);
    let bad = &world.sidecars[2];
    bad.behave(manner);
    let began = Instant::now();
    until("it is ejected", async || standing(&world, "pod-2").await == "ejected").await;
    assert!(began.elapsed() < SECOND, "{manner:?}: ejected after {:?}", began.elapsed());
    tokio::time::sleep(SECOND * 3).await;
    let failed = keyed.failed() + free.failed();
    assert!(failed <= 5, "{manner:?}: {failed} client failures");
    let ejections = world.config("/pods/scorers/pods/pod-2").await;
    bad.behave(Manner::Well);
    let healed = Instant::now();
    let calls = bad.calls();
    until("it is back", async || standing(&world, "pod-2").await == "usable" && bad.calls() > calls + 20).await;
    assert!(healed.elapsed() < SECOND * 15, "{manner:?}: back after {:?}, {ejections}", healed.elapsed());
    let failed = keyed.failed() + free.failed();
    assert!(failed <= 5, "{manner:?}: {failed} client failures");
    println!(
        "{manner:?}: {} answered, {failed} failed, slowest {} ms, back after {:?}",
        keyed.answered() + free.answered(),
        keyed.counts.slowest_ms.load(Ordering::SeqCst).max(free.counts.slowest_ms.load(Ordering::SeqCst)),
        healed.elapsed(),
    );
    keyed.stop().await;
    free.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t54_one_pod_of_four_that_resets() {
    one_bad_pod(Manner::Resets).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t54_one_pod_of_four_that_hangs() {
    one_bad_pod(Manner::Hangs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t54_one_pod_of_four_that_answers_internal() {
    one_bad_pod(Manner::Refuses(Code::Internal, "model-failed")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t54_one_pod_of_four_that_answers_http_500() {
    one_bad_pod(Manner::Http(500)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t54_one_pod_of_four_that_answers_garbage() {
    one_bad_pod(Manner::Garbage).await;
    one_bad_pod(Manner::Nonsense).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t54_a_pool_that_fails_as_a_whole_costs_a_tenth_more_attempts() {
    let world = World::of(4, "", "").await;
    for sidecar in &world.sidecars {
        sidecar.behave(Manner::Refuses(Code::Internal, "model-failed"));
    }
    let http2 = world.http2().await;
    const REQUESTS: usize = 600;
    for number in 0..REQUESTS {
        let entity = if number % 2 == 0 { format!("e{number}") } else { String::new() };
        let grpc = Grpc::call(&http2, INFER, &[], call("double", &entity)).await;
        assert_eq!((grpc.status, grpc.code.as_str()), (13, "model-failed"));
    }
    let attempts: usize = world.sidecars.iter().map(Sidecar::calls).sum();
    assert!(attempts > REQUESTS && attempts * 10 <= REQUESTS * 11, "{attempts} attempts");
    let counted = world.metric("spillway_gateway_attempts_total{outcome=\"failure\"}").await;
    assert_eq!(counted, attempts as u64);
    assert_eq!(world.metric("spillway_gateway_retries_total").await, (attempts - REQUESTS) as u64);
    assert!(world.metric("spillway_gateway_not_repeated_total{reason=\"budget\"}").await > 0);
    assert!(world.metric("spillway_gateway_choices_total{reason=\"panic\"}").await > 0, "nobody is left out");
    for sidecar in &world.sidecars {
        sidecar.behave(Manner::Well);
    }
    until("it answers again", async || Grpc::call(&http2, INFER, &[], call("double", "")).await.status == 0).await;
    world.stop().await;
}

#[tokio::test]
async fn overload_is_neither_repeated_nor_a_failure() {
    for manner in [
        Manner::Refuses(Code::ResourceExhausted, "model-overloaded"),
        Manner::Refuses(Code::Unavailable, "model-overloaded"),
        Manner::Http(429),
        Manner::Http(503),
        Manner::Refuses(Code::InvalidArgument, "model-rejected"),
    ] {
        let world = World::start().await;
        world.sidecars.iter().for_each(|sidecar| sidecar.behave(manner));
        let http2 = world.http2().await;
        for _ in 0..30 {
            assert!(Grpc::call(&http2, INFER, &[], call("double", "")).await.status != 0);
        }
        assert_eq!(world.sidecars.iter().map(Sidecar::calls).sum::<usize>(), 30, "{manner:?}");
        for pod in ["pod-0", "pod-1"] {
            assert_eq!(standing(&world, pod).await, "usable", "{manner:?}");
        }
        assert_eq!(world.metric("spillway_gateway_retries_total").await, 0);
        world.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_fails_quickly_attracts_no_traffic() {
    let world = World::of(4, "", &model("free", "  routing: { policy: least_request }\n  retries: { most: 0 }")).await;
    for sidecar in &world.sidecars {
        sidecar.behave(Manner::Slow(Duration::from_millis(30)));
    }
    world.sidecars[1].behave(Manner::Refuses(Code::Internal, "model-failed"));
    let load = Load::start(&world, 8, "free", 0).await;
    tokio::time::sleep(SECOND * 4).await;
    let (bad, all) = (world.sidecars[1].calls(), world.sidecars.iter().map(Sidecar::calls).sum::<usize>());
    assert!(all > 200 && bad * 10 < all, "{bad} of {all}");
    load.stop().await;
    world.stop().await;
}

#[tokio::test]
async fn a_pod_that_hangs_before_anything_is_known_costs_half_of_a_deadline() {
    let world = World::start().await;
    world.sidecars[0].behave(Manner::Hangs);
    let (http2, counted) = (world.http2().await, "spillway_gateway_repeated_total{reason=\"overdue\"}");
    let mut repeated = 0;
    // The budget of a model that is new allows for four.
    for number in 0.. {
        if repeated == 4 {
            break;
        }
        let began = Instant::now();
        let grpc = Grpc::call(&http2, INFER, &[("grpc-timeout", "1S")], call("double", &format!("e{number}"))).await;
        assert_eq!(grpc.status, 0, "{grpc:?}");
        assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
        repeated = world.metric(counted).await;
    }
    until("the losers are told", async || world.sidecars[0].cancelled() as u64 == repeated).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hedge_wins_and_the_loser_is_cancelled() {
    let world = World::of(2, "", &model("hedged", "  hedge: true\n  routing: { policy: least_request }")).await;
    let http2 = world.http2().await;
    for _ in 0..150 {
        assert_eq!(Grpc::call(&http2, INFER, &[], call("hedged", "")).await.status, 0);
    }
    let hedges = async |event: &str| world.metric(&format!("spillway_gateway_hedges_total{{event=\"{event}\"}}")).await;
    let before = hedges("won").await;
    world.sidecars[0].behave(Manner::Slow(Duration::from_millis(800)));
    while hedges("won").await < before + 3 {
        assert_eq!(Grpc::call(&http2, INFER, &[], call("hedged", "")).await.status, 0);
    }
    assert!(hedges("started").await >= before + 3);
    until("a loser is told", async || world.sidecars[0].cancelled() > 0).await;
    until("no call is left", async || world.config("/pods/scorers/pods/pod-0/inFlight").await == 0).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_have_as_many_calls_as_they_take_get_no_more_until_one_ends() {
    let world = World::start().await;
    // The gate is told of the pods' limits each 100 ms.
    tokio::time::sleep(Duration::from_millis(250)).await;
    world.sidecars.iter().for_each(|sidecar| sidecar.behave(Manner::Slow(Duration::from_millis(700))));
    let http2 = world.http2().await;
    // Two pods with 20 each, the limit that they begin with.
    let calls = futures_util::future::join_all((0..50).map(|_| Grpc::call(&http2, INFER, &[], call("double", ""))));
    let looks = async {
        tokio::time::sleep(Duration::from_millis(350)).await;
        let waiting = world.metric("spillway_gateway_gate_waiting").await;
        (waiting, world.sidecars.iter().map(Sidecar::calls).sum::<usize>())
    };
    let (answers, inside) = futures_util::future::join(calls, looks).await;
    assert_eq!(inside, (10, 40));
    assert!(answers.iter().all(|grpc| grpc.status == 0));
    assert_eq!(world.metric("spillway_gateway_pods_full_total").await, 0);
    assert_eq!(standing(&world, "pod-0").await, "usable");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_breaker_leaves_one_model_on_one_pod_alone() {
    let broken = model("broken", "  routing: { policy: weighted_round_robin }\n  retries: { most: 0 }");
    let world = World::of(2, "", &broken).await;
    let (http2, pod) = (world.http2().await, &world.sidecars[0]);
    let mut entity = 0;
    while pod.calls() == 0 {
        entity += 1;
        Grpc::call(&http2, INFER, &[], call("double", &format!("e{entity}"))).await;
    }
    for number in 0.. {
        assert!(number < 60, "no breaker opened");
        pod.behave(Manner::Refuses(Code::Internal, "model-failed"));
        Grpc::call(&http2, INFER, &[], call("broken", "")).await;
        // Good calls of another model keep the pod from five failures in a row.
        pod.behave(Manner::Well);
        Grpc::call(&http2, INFER, &[], call("double", &format!("e{entity}"))).await;
        if world.metric("spillway_gateway_breaker_transitions_total{to=\"open\"}").await == 1 {
            break;
        }
    }
    let breakers = world.config("/pods/scorers/pods/pod-0/breakers").await;
    assert_eq!((breakers["broken"]["state"].as_str(), breakers.get("double")), (Some("open"), None), "{breakers}");
    assert_eq!(standing(&world, "pod-0").await, "usable");
    let calls = pod.calls();
    for _ in 0..20 {
        assert_eq!(Grpc::call(&http2, INFER, &[], call("broken", "")).await.status, 0);
    }
    assert_eq!(pod.calls(), calls);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_whose_streams_fail_gets_no_more_of_them() {
    for manner in [Manner::Refuses(Code::Internal, "model-failed"), Manner::Resets, Manner::Http(500)] {
        let world = World::of(4, "", &model("free", "  routing: { policy: weighted_round_robin }")).await;
        world.sidecars[1].behave(manner);
        let http2 = world.http2().await;
        let mut failed = 0;
        for _ in 0..40 {
            let (mut stream, mut answers) = open(&http2, &[], request("free", "0", "a")).await;
            let Some(answer) = answers.next().await else {
                failed += 1;
                continue;
            };
            assert_eq!(answer.infer_response.unwrap().id, "0");
            stream.send_data(bytes::Bytes::new(), true).unwrap();
            assert!(answers.next().await.is_none());
        }
        // Five in a row, and then one each time that it is probed.
        assert!((5..=8).contains(&failed), "{manner:?}: {failed}");
        assert_ne!(standing(&world, "pod-1").await, "usable", "{manner:?}");
        until("no stream is left", async || world.config("/pods/scorers/pods/pod-0/inFlight").await == 0).await;
        world.stop().await;
    }
}
