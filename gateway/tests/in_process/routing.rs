//! Which pod gets what, by the policy of the model.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::support::*;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

async fn ask(http2: &Http2, model: &str, entity: &str) {
    let grpc = Grpc::call(http2, INFER, &[], request(model, entity, entity)).await;
    assert_eq!(grpc.status, 0, "{grpc:?}");
}

fn calls(world: &World) -> Vec<usize> {
    world.sidecars.iter().map(Sidecar::calls).collect()
}

/// Where each entity was last.
fn places(world: &World) -> BTreeMap<String, String> {
    world.seen().into_iter().map(|seen| (seen.message.id, seen.pod)).collect()
}

#[tokio::test]
async fn a_new_pod_takes_its_share_of_the_entities_and_no_others_move() {
    const ENTITIES: usize = 500;
    let mut world = World::of(4, "", &model("keyed", "  routing: { slowStart: 0s }")).await;
    let http2 = world.http2().await;
    for entity in 0..ENTITIES {
        ask(&http2, "keyed", &format!("e{entity}")).await;
    }
    let before = places(&world);
    world.add_sidecar().await;
    world.publish(2, &[]).await;
    until("the thread has the new pod", async || {
        ask(&http2, "keyed", &format!("new-{}", rand::random::<u64>())).await;
        world.sidecars[4].calls() > 0
    })
    .await;
    for sidecar in &world.sidecars {
        sidecar.forget();
    }
    for entity in 0..ENTITIES {
        ask(&http2, "keyed", &format!("e{entity}")).await;
    }
    let after = places(&world);
    let moved: Vec<&String> =
        before.iter().filter(|(entity, pod)| after[*entity] != **pod).map(|(entity, _)| entity).collect();
    let share = moved.len() as f64 / ENTITIES as f64;
    assert!(share > 0.05 && share <= 0.25 + 0.02, "{share} moved");
    assert!(moved.iter().all(|entity| after[*entity] == "pod-4"), "they move to the new pod alone");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_entity_is_spread_and_a_cold_one_is_not() {
    let hot = "  routing: { hotEntity: { rate: 20/s, pods: 3 } }";
    let world = World::of(4, "", &model("hot", hot)).await;
    let http2 = world.http2().await;
    for _ in 0..15 {
        ask(&http2, "hot", "cold").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(calls(&world).iter().filter(|calls| **calls > 0).count(), 1, "{:?}", calls(&world));
    for _ in 0..300 {
        ask(&http2, "hot", "popular").await;
    }
    let spread = world.seen().into_iter().filter(|seen| seen.message.id == "popular");
    let pods: std::collections::BTreeSet<String> = spread.map(|seen| seen.pod).collect();
    assert_eq!(pods.len(), 3, "{pods:?}");
    assert!(world.metric("spillway_gateway_choices_total{reason=\"spread\"}").await > 100);
    assert_eq!(world.config("/pods/scorers/models/hot/hotEntities").await, 1);
    world.stop().await;
}

#[tokio::test]
async fn one_address_has_one_pod_and_turns_are_even() {
    let policies = format!(
        "{}{}",
        model("pinned", "  routing: { policy: source_address }"),
        model("turns", "  routing: { policy: weighted_round_robin }"),
    );
    let world = World::of(4, "", &policies).await;
    let http2 = world.http2().await;
    for number in 0..40 {
        ask(&http2, "pinned", &format!("e{number}")).await;
    }
    assert_eq!(calls(&world).iter().filter(|calls| **calls > 0).count(), 1, "{:?}", calls(&world));
    let before = calls(&world);
    for number in 0..40 {
        ask(&http2, "turns", &format!("e{number}")).await;
    }
    let turns: Vec<usize> = calls(&world).iter().zip(before).map(|(after, before)| after - before).collect();
    assert_eq!(turns, [10; 4]);
    world.stop().await;
}

#[tokio::test]
async fn a_pod_that_reports_load_gets_less() {
    let world = World::of(2, "", &model("free", "  routing: { policy: least_request }")).await;
    world.sidecars[0].report("TEXT application_utilization=0.9, named_metrics.queue=3");
    world.sidecars[1].report("nonsense");
    let http2 = world.http2().await;
    for _ in 0..50 {
        ask(&http2, "free", "a").await;
    }
    let calls = calls(&world);
    // A report says nothing after a second; then the pod gets a call, and reports anew.
    assert!(calls[0] * 4 < calls[1], "{calls:?}");
    assert_eq!(world.config("/pods/scorers/pods/pod-0/load/utilisation").await, 0.9);
    let counted = async |result: &str| {
        world.metric(&format!("spillway_gateway_load_reports_total{{result=\"{result}\"}}")).await as usize
    };
    assert_eq!([counted("read").await, counted("unreadable").await], [calls[0], calls[1]]);
    world.stop().await;
}

#[tokio::test]
async fn a_new_pod_starts_slowly_also_where_nothing_is_busy() {
    const START: Duration = Duration::from_secs(5);
    let models = format!(
        "{}{}",
        model("free", "  routing: { policy: least_request, slowStart: 5s }"),
        model("turns", "  routing: { policy: weighted_round_robin, slowStart: 5s }"),
    );
    let mut world = World::of(2, "", &models).await;
    let http2 = world.http2().await;
    // The first pods' own start.
    tokio::time::sleep(START).await;
    world.add_sidecar().await;
    world.publish(2, &[]).await;
    until("the pod is known", async || world.config("/pods/scorers/ringPods").await == 3).await;
    let began = Instant::now();
    let mut asked = 0;
    // As long as its share is below a fifth.
    while began.elapsed() < START / 5 {
        ask(&http2, "turns", "a").await;
        ask(&http2, "free", "a").await;
        asked += 2;
    }
    let early = world.sidecars[2].calls();
    assert!(early > 0 && early * 5 < asked, "{early} of {asked}");
    tokio::time::sleep(START).await;
    assert_eq!(world.config("/pods/scorers/models/turns/weights").await, serde_json::Value::Null);
    for _ in 0..100 {
        ask(&http2, "turns", "a").await;
        ask(&http2, "free", "a").await;
    }
    let late = world.sidecars[2].calls() - early;
    assert!(late > 40, "{late} of 200");
    world.stop().await;
}

#[tokio::test]
async fn the_config_page_shows_what_is_known() {
    let world = World::start().await;
    let http2 = world.http2().await;
    for number in 0..5 {
        ask(&http2, "double", &format!("e{number}")).await;
    }
    until("its answers are counted", async || world.config("/pods/scorers/models/double/answers").await == 5).await;
    let pool = world.config("/pods/scorers").await;
    assert_eq!((pool["ringPods"].as_u64(), pool["panic"].as_bool()), (Some(2), Some(false)));
    let pod = &pool["pods"]["pod-1"];
    assert_eq!((pod["standing"].as_str(), pod["health"].as_str()), (Some("usable"), Some("serving")));
    assert_eq!((pod["inFlight"].as_u64(), pod["limit"].as_u64()), (Some(0), Some(20)));
    assert_eq!(pod["address"].as_str().unwrap(), world.sidecars[1].address.to_string());
    let model = &pool["models"]["double"];
    assert_eq!(model["policy"], "ring");
    assert!(model["p50Us"].as_u64().unwrap() > 0 && model["budgetLeft"].as_f64().unwrap() > 1.0);
    world.stop().await;
}
