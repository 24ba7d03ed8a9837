//! How models come into service: warmed up first, each by itself, and undisturbed by what is not their own.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::support::double::Double;
use crate::support::pod::{Client, Pod, code, joined_model, resources, text_parameter};
use crate::support::{expected, fp32};
use spillway_core::inference::{InferRequest, Parameter, Parameters};
use spillway_proto::inference::ModelReadyRequest;
use spillway_runtime::oip;

const TRITON: &str = "  backend: triton\n  warmUp: {requests: 2}";

async fn pod(double: &Double, models: &str) -> Pod {
    Pod::start(&resources(models), &format!("triton: {}\n", double.endpoint)).await
}

async fn is_ready(gateway: &mut Client, model: &str) -> bool {
    let asked = ModelReadyRequest { name: model.into(), version: String::new() };
    gateway.model_ready(asked).await.unwrap().into_inner().ready
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(10), "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_ready_when_its_models_have_answered_their_warm_ups() {
    let double = Double::start().await;
    double.warms_up("phishing", false);
    let pod = pod(&double, &joined_model("phishing", TRITON)).await;
    let mut gateway = pod.gateway().await;
    double.wait_for_warm_up().await;
    let page = pod.page("/readyz").await;
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("phishing: starting"), "{page}");
    assert!(!is_ready(&mut gateway, "phishing").await);
    let sent = InferRequest {
        model: "phishing".into(),
        inputs: vec![fp32("features", &[1, 9], &[0.0; 9])],
        ..InferRequest::default()
    };
    let status = gateway.model_infer(oip::encode_request(&sent)).await.unwrap_err();
    assert_eq!((code(&status), double.calls()), ("model-unavailable", 0));
    double.warms_up("phishing", true);
    until("the pod is ready", async || pod.page("/readyz").await.starts_with("HTTP/1.1 200")).await;
    assert_eq!(double.warm_ups(), 2, "as many as the manifest says");
    gateway.model_infer(oip::encode_request(&sent)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_starts_slowly_keeps_no_other_waiting() {
    let double = Double::start().await;
    double.warms_up("slow", false);
    let models = [joined_model("phishing", TRITON), joined_model("slow", TRITON)].join("---\n");
    let pod = pod(&double, &models).await;
    let mut gateway = pod.gateway().await;
    until("one is ready", async || is_ready(&mut gateway, "phishing").await).await;
    double.state.away.lock().insert("phishing".into());
    until("it is seen to go", async || !is_ready(&mut gateway, "phishing").await).await;
    double.state.away.lock().clear();
    until("it is started again", async || is_ready(&mut gateway, "phishing").await).await;
    assert!(!is_ready(&mut gateway, "slow").await);
    double.warms_up("slow", true);
    until("the slow one is ready, too", async || is_ready(&mut gateway, "slow").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_goes_on_while_snapshots_change_and_ends_with_the_newest() {
    let double = Double::start().await;
    double.warms_up("phishing", false);
    let pod = pod(&double, &joined_model("phishing", TRITON)).await;
    double.wait_for_warm_up().await;
    // Another group's freshness, and another model: the manifest of this one stays.
    let models = [joined_model("phishing", TRITON), joined_model("later", TRITON)].join("---\n");
    pod.publish(&resources(&models), 2);
    pod.assert_metric("spillway_snapshot_version 2").await;
    pod.publish(&resources(&models).replace("freshFor: 1h", "freshFor: 5h"), 3);
    pod.assert_metric("spillway_snapshot_version 3").await;
    let mut gateway = pod.gateway().await;
    until("the new model is ready", async || is_ready(&mut gateway, "later").await).await;
    assert_eq!(double.state.cancelled.load(Ordering::SeqCst), 0, "the warm-up was not broken off");
    double.warms_up("phishing", true);
    until("the model is ready", async || is_ready(&mut gateway, "phishing").await).await;
    assert_eq!(double.warm_ups(), 4, "two of each model");
    // Two hours old is stale by the first snapshot and fresh by the last.
    let (cases, _) = expected();
    pod.put(&cases[..1], Duration::from_secs(2 * 3_600)).await;
    let joined = InferRequest {
        model: "phishing".into(),
        parameters: Parameters(vec![("entity_id".into(), Parameter::Text(cases[0].entity.clone()))]),
        ..InferRequest::default()
    };
    let answer = gateway.model_infer(oip::encode_request(&joined)).await.unwrap().into_inner();
    assert_eq!(text_parameter(&answer, "spillway-degraded"), None);
}
