//! The degradation ladder through a real gateway: entered and left by what is measured, answered here where pods
//! cannot, and only for models that allow it.

use std::time::{Duration, Instant};

use crate::support::*;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::*;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const LEVEL: &str = "spillway_gateway_degradation_level{model=\"double\"}";
/// Where the model `double` of the test's resources says how its traffic is treated.
const PLACE: &str = "  maxDeadline: 10s\n  entityInput: site\n";

/// A region whose model `double` has this ladder.
async fn with_ladder(degradation: &str) -> World {
    let world = World::start().await;
    world.publish(2, &[(PLACE, &format!("{PLACE}  degradation: {degradation}\n"))]).await;
    until("the ladder is there", async || world.admin("/config").await.contains("\"double\":{\"level\":0")).await;
    world
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter { parameter_choice: Some(choice) }
}

fn request(entity: &str, more: &[(&str, i64)]) -> ModelInferRequest {
    let mut parameters: std::collections::HashMap<_, _> =
        more.iter().map(|(name, value)| ((*name).to_owned(), parameter(ParameterChoice::Int64Param(*value)))).collect();
    parameters.insert("entity_id".to_owned(), parameter(ParameterChoice::StringParam(entity.to_owned())));
    let x = InferInputTensor { name: "x".into(), datatype: "FP32".into(), shape: vec![2], ..Default::default() };
    let values = [1.5_f32, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    ModelInferRequest {
        model_name: "double".into(),
        id: "call-7".into(),
        parameters,
        inputs: vec![x],
        raw_input_contents: vec![values.into()],
        ..Default::default()
    }
}

async fn call(http2: &Http2, entity: &str, more: &[(&str, i64)]) -> Grpc {
    Grpc::call(http2, INFER, &[], frame(&request(entity, more))).await
}

/// Calls until the model is served at this level; all answers but `expected` are faults.
async fn until_level(world: &World, http2: &Http2, level: u64, entity: &str, expected: impl Fn(&Grpc) -> bool) {
    let began = Instant::now();
    while world.metric(LEVEL).await != level {
        for _ in 0..10 {
            let answer = call(http2, entity, &[]).await;
            assert!(expected(&answer), "{answer:?}");
        }
        assert!(began.elapsed() < Duration::from_secs(40), "level {level} never came");
    }
}

fn asked_for(world: &World, level: &str) -> usize {
    world.seen().iter().filter(|seen| seen.metadata.get("spillway-degrade").is_some_and(|value| value == level)).count()
}

fn is_ok(answer: &Grpc) -> bool {
    answer.status == 0
}

#[tokio::test]
async fn slow_predictions_bring_the_fallback_but_for_probes_and_the_model_comes_back() {
    let world =
        with_ladder("{levels: [2], fallback: brief, predictionP95: 20ms, enterAfter: 200ms, leaveAfter: 500ms}").await;
    let http2 = world.http2().await;
    until_level(&world, &http2, 2, "slow", is_ok).await;
    assert!(world.admin("/config").await.contains("\"double\":{\"level\":2,\"reason\":\"slow-predictions\"}"));
    let (before, asked) = (world.seen().len(), asked_for(&world, "2"));
    let mut fallbacks = 0;
    for _ in 0..300 {
        let answer = call(&http2, "slow", &[]).await;
        fallbacks += usize::from(answer.answer.header("spillway-degraded") == "2 fallback-model");
    }
    let (calls, asked) = (world.seen().len() - before, asked_for(&world, "2") - asked);
    assert_eq!((calls, asked), (300, fallbacks), "who asks for the fallback gets it");
    let probes = calls - asked;
    assert!((1..=30).contains(&probes), "{probes} probes");
    assert!(world.metric("spillway_gateway_degraded_total{level=\"2\"}").await >= 270);
    assert!(world.metric("spillway_gateway_degradation_probes_total").await >= probes as u64);
    until_level(&world, &http2, 0, "quick", is_ok).await;
    assert_eq!(call(&http2, "quick", &[]).await.answer.header("spillway-degraded"), "1 stale-feature");
    world.stop().await;
}

#[tokio::test]
async fn clients_do_not_see_probes_of_a_model_that_fails_or_hangs() {
    let world = with_ladder("{levels: [2], fallback: brief, enterAfter: 100ms}").await;
    let http2 = world.http2().await;
    until_level(&world, &http2, 2, "fails", |answer| matches!(answer.status, 0 | 13)).await;
    let before = world.seen().len();
    for _ in 0..200 {
        let answer = call(&http2, "fails", &[]).await;
        assert_eq!(answer.answer.header("spillway-degraded"), "2 fallback-model", "{answer:?}");
    }
    let attempts = world.seen().len() - before;
    assert!(attempts <= 220, "t54: {attempts} attempts for 200 requests");
    assert!(world.metric("spillway_gateway_degradation_probes_failed_total").await >= 1);
    // At least one a second is a probe; it hangs for half of its time.
    for _ in 0..3 {
        let answer = call(&http2, "hangs", &[]).await;
        assert_eq!(answer.answer.header("spillway-degraded"), "2 fallback-model", "{answer:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    world.stop().await;
}

#[tokio::test]
async fn what_pods_cannot_answer_is_answered_here_before_its_deadline() {
    let world = with_ladder("{levels: [4], static: {y: [7]}}").await;
    let http2 = world.http2().await;
    let answer = call(&http2, "fails", &[]).await;
    assert_eq!((answer.status, answer.answer.header("spillway-degraded")), (0, "4 static-answer"), "{answer:?}");
    let response: ModelInferResponse = answer.decode();
    assert_eq!((response.id.as_str(), response.model_version.as_str()), ("call-7", "1"));
    assert_eq!((&response.outputs[0].shape[..], response.outputs[0].name.as_str()), (&[2][..], "y"));
    assert_eq!(response.raw_output_contents[0], [7.0_f32, 7.0].map(f32::to_le_bytes).concat());
    let degraded = response.parameters["spillway-degraded"].parameter_choice.clone();
    assert_eq!(degraded, Some(ParameterChoice::StringParam("4 static-answer".into())));

    let began = Instant::now();
    let body =
        r#"{"parameters":{"entity_id":"hangs"},"inputs":[{"name":"x","datatype":"FP32","shape":[3],"data":[1,2,3]}]}"#;
    let headers = ["x-request-timeout-ms: 400"];
    let sent = h1_request("POST", "/v2/models/double/versions/2/infer", &headers, body.as_bytes());
    let answer = world.http1().await.exchange(&sent).await;
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    assert_eq!((answer.status, answer.header("spillway-degraded")), (200, "4 static-answer"), "{answer:?}");
    assert_eq!((answer.header("spillway-model-version"), answer.header("spillway-feature-age-ms")), ("2", ""));
    assert_eq!(answer.json()["outputs"][0]["data"], serde_json::json!([7.0, 7.0, 7.0]));
    assert_eq!(world.metric("spillway_gateway_degraded_total{level=\"4\"}").await, 2);

    // The caller's own faults stay what they are, and so do other models.
    let answer = call(&http2, "missing", &[]).await;
    assert_eq!((answer.status, answer.answer.header("spillway-error")), (9, "missing-feature"));
    let brief = ModelInferRequest { model_name: "brief".into(), ..request("fails", &[]) };
    let answer = Grpc::call(&http2, INFER, &[], frame(&brief)).await;
    assert_eq!((answer.status, answer.answer.header("spillway-error")), (13, "model-failed"));
    world.stop().await;
}

#[tokio::test]
async fn at_level_4_pods_are_left_alone_but_for_probes() {
    let world = with_ladder("{levels: [4], enterAfter: 100ms, static: {y: [7]}}").await;
    let http2 = world.http2().await;
    until_level(&world, &http2, 4, "fails", is_ok).await;
    let before = world.seen().len();
    for _ in 0..200 {
        let answer = call(&http2, "fails", &[]).await;
        assert_eq!(answer.answer.header("spillway-degraded"), "4 static-answer");
    }
    let probes = world.seen().len() - before;
    assert!((1..=20).contains(&probes), "{probes} probes");
    world.stop().await;
}

#[tokio::test]
async fn without_a_static_answer_level_4_refuses_the_lowest_class() {
    let world = with_ladder("{levels: [4], enterAfter: 100ms}").await;
    let http2 = world.http2().await;
    until_level(&world, &http2, 4, "fails", |answer| answer.status == 13).await;
    let (mut served, mut refused) = (0, 0);
    for _ in 0..50 {
        let answer = call(&http2, "quick", &[("priority", 4)]).await;
        match (answer.status, answer.answer.header("spillway-error")) {
            (14, "lowest-class") => refused += 1,
            (0, _) => served += 1,
            other => panic!("{other:?}"),
        }
        assert!(is_ok(&call(&http2, "quick", &[]).await), "others are served");
    }
    assert!(refused >= 40 && served <= 10, "only probes of the lowest class: {served} of {refused}");
    assert_eq!(world.rejected("lowest-class").await, refused);
    world.stop().await;
}

#[tokio::test]
async fn callers_in_a_hurry_do_not_take_a_model_down_its_ladder() {
    let world = with_ladder("{levels: [4], enterAfter: 0s, static: {y: [7]}}").await;
    let http2 = world.http2().await;
    for _ in 0..100 {
        let answer = call(&http2, "hangs", &[("timeout", 10_000)]).await;
        assert_eq!((answer.status, answer.answer.header("spillway-degraded")), (0, "4 static-answer"), "{answer:?}");
    }
    assert_eq!(world.metric(LEVEL).await, 0);
    assert_eq!(call(&http2, "quick", &[]).await.answer.header("spillway-degraded"), "1 stale-feature");
    world.stop().await;
}
