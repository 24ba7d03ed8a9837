//! Served with less: features from near, the fallback model, and that each answer says so. And what each answer
//! says of the pod's load.

use std::time::{Duration, Instant};

use crate::support::double::{Answer, Double};
use crate::support::pod::{Client, Pod, code, joined_model, resources, scores, text_parameter};
use crate::support::{Case, expected, fp32};
use spillway_core::inference::{InferRequest, Parameter, Parameters};
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse, ServerReadyRequest};
use spillway_runtime::oip;
use tonic::{Code, Request, Response, Status};

const LOAD: &str = "endpoint-load-metrics";

/// The model `big` of a Triton server, for which the model `phishing` of another pool stands in.
fn with_fallback(more: &str) -> String {
    let elsewhere = "apiVersion: spillway/v1\nkind: Pool\nmetadata: {name: elsewhere}\n\
                     spec: {region: eu, pods: [{name: pod-9, address: '127.0.0.1:9'}]}\n---\n";
    let big = joined_model("big", &format!("  backend: triton\n{more}"));
    let small = joined_model("phishing", "  backend: onnx").replace("pools: [scorers]", "pools: [elsewhere]");
    resources(&format!("{elsewhere}{big}---\n{small}"))
}

const BOTH: &str = "  degradation: {levels: [1, 2], fallback: phishing}";

async fn pod(double: &Double, more: &str) -> Pod {
    let pod = Pod::start(&with_fallback(more), &format!("triton: {}\n", double.endpoint)).await.ready().await;
    if more.contains('2') {
        pod.assert_metric("spillway_sidecar_fallback_ready{model=\"phishing\"} 1").await;
    }
    pod
}

fn sent(model: &str, row: &[f32]) -> ModelInferRequest {
    oip::encode_request(&InferRequest {
        model: model.into(),
        id: "r-1".into(),
        inputs: vec![fp32("features", &[1, 9], row)],
        ..InferRequest::default()
    })
}

fn for_entity(model: &str, case: &Case) -> ModelInferRequest {
    oip::encode_request(&InferRequest {
        model: model.into(),
        parameters: Parameters(vec![("entity_id".into(), Parameter::Text(case.entity.clone()))]),
        ..InferRequest::default()
    })
}

/// A call that asks for a level.
async fn at(
    level: &str,
    client: &mut Client,
    message: ModelInferRequest,
) -> Result<Response<ModelInferResponse>, Status> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("spillway-degrade", level.parse().unwrap());
    client.model_infer(request).await
}

fn assert_score(answer: &ModelInferResponse, case: &Case) {
    assert!((scores(answer)[0] - case.score).abs() <= 1e-5, "{}: {:?}", case.entity, scores(answer));
}

fn degraded(answer: &ModelInferResponse) -> Option<&str> {
    text_parameter(answer, "spillway-degraded")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fallback_serves_while_the_model_hangs() {
    let double = Double::start().await;
    let pod = pod(&double, BOTH).await;
    let (cases, _) = expected();
    double.answers(Answer::Never);
    let mut hanging = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let (mut client, message) = (pod.gateway().await, sent("big", &cases[0].features));
        hanging.spawn(async move { client.model_infer(message).await });
    }
    while double.calls() < 32 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut gateway = pod.gateway().await;
    for case in &cases[..8] {
        let began = Instant::now();
        let answer = at("2", &mut gateway, sent("big", &case.features)).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(1));
        let timing = answer.metadata().get("server-timing").unwrap().to_str().unwrap().to_owned();
        assert!(timing.contains("fallback;dur=") && !timing.contains("model;dur="), "{timing}");
        let answer = answer.into_inner();
        assert_score(&answer, case);
        assert_eq!(degraded(&answer), Some("2 fallback-model"));
        assert_eq!(
            (answer.id.as_str(), answer.model_name.as_str(), answer.model_version.as_str()),
            ("r-1", "big", "1")
        );
    }
    assert_eq!(double.calls(), 32, "the model is not asked");
    pod.assert_metric("spillway_sidecar_fallbacks_total{model=\"big\",reason=\"asked\"} 8").await;
    pod.assert_metric("spillway_sidecar_degraded_total{model=\"big\",reason=\"fallback-model\"} 8").await;
    hanging.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_falls_back_by_itself_when_its_model_server_cannot_be_reached() {
    let double = Double::start().await;
    let pod = pod(&double, BOTH).await;
    let (cases, _) = expected();
    double.answers(Answer::Gone);
    let mut gateway = pod.gateway().await;
    let answer = gateway.model_infer(sent("big", &cases[0].features)).await.unwrap().into_inner();
    assert_score(&answer, &cases[0]);
    assert_eq!(degraded(&answer), Some("2 fallback-model"));
    pod.assert_metric("spillway_sidecar_fallbacks_total{model=\"big\",reason=\"unreachable\"} 1").await;
    double.answers(Answer::Right);
    let answer = gateway.model_infer(sent("big", &cases[0].features)).await.unwrap().into_inner();
    assert_eq!(degraded(&answer), None);
    let folder = pod.stop().await;
    let log = std::fs::read_to_string(folder.path().join("access.log")).unwrap();
    let line: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!((line["outcome"].as_str(), line["degraded"].as_str()), (Some("ok"), Some("fallback-model")));
    assert!(line["fallback_us"].is_u64(), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_keeps_failing_is_left_alone_and_found_again() {
    let double = Double::start().await;
    let more = "  breaker: {window: 20, openFor: 300ms, probes: 1}\n  degradation: {levels: [2], fallback: phishing}";
    let pod = pod(&double, more).await;
    let (cases, _) = expected();
    let mut gateway = pod.gateway().await;
    double.answers(Answer::Broken);
    let mut failures = 0;
    loop {
        match gateway.model_infer(sent("big", &cases[0].features)).await {
            Ok(answer) => break assert_score(&answer.into_inner(), &cases[0]),
            Err(status) => assert_eq!(code(&status), "model-failed"),
        }
        failures += 1;
        assert!(failures <= 20);
    }
    let calls = double.calls();
    let answer = gateway.model_infer(sent("big", &cases[1].features)).await.unwrap().into_inner();
    assert_eq!((degraded(&answer), double.calls()), (Some("2 fallback-model"), calls));
    double.answers(Answer::Right);
    let began = Instant::now();
    while degraded(&gateway.model_infer(sent("big", &cases[1].features)).await.unwrap().into_inner()).is_some() {
        assert!(began.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_level_that_the_model_does_not_allow_is_not_served() {
    let double = Double::start().await;
    let pod = pod(&double, "  degradation: {levels: [1], fallback: phishing}").await;
    let (cases, _) = expected();
    let mut gateway = pod.gateway().await;
    for level in ["2", "3", "0", "22", "two"] {
        let answer = at(level, &mut gateway, sent("big", &cases[0].features)).await.unwrap().into_inner();
        assert_eq!(degraded(&answer), None, "{level}");
    }
    assert_eq!(double.calls(), 5);
    double.answers(Answer::Gone);
    let status = gateway.model_infer(sent("big", &cases[0].features)).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::Unavailable, "model-unavailable"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_file_a_fallback_is_not_there_and_the_pod_serves() {
    let double = Double::start().await;
    let models =
        with_fallback("  degradation: {levels: [2], fallback: small}").replace("name: phishing", "name: small");
    let pod = Pod::start(&models, &format!("triton: {}\n", double.endpoint)).await.ready().await;
    pod.assert_metric("spillway_sidecar_fallback_ready{model=\"small\"} 0").await;
    assert!(
        pod.page("/config")
            .await
            .contains("\"fallbacks\":{\"small\":{\"ready\":false,\"snapshot\":null,\"versions\":null}}")
    );
    let mut gateway = pod.gateway().await;
    assert!(gateway.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let answer = at("2", &mut gateway, sent("big", &[0.0; 9])).await.unwrap().into_inner();
    assert_eq!((degraded(&answer), double.calls()), (None, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn at_level_1_the_durable_store_is_not_asked() {
    let asked = async |pod: &Pod| {
        let metrics = pod.metrics().await;
        let reads = metrics.lines().filter(|line| line.starts_with("spillway_sidecar_feature_reads_total{tier=\"l3\""));
        reads.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
    };
    let model =
        |name: &str, more: &str| joined_model(name, &format!("  backend: onnx\n  missingFeature: refuse{more}"));
    let allowed = model("phishing", "\n  degradation: {levels: [1]}");
    let models = resources(&allowed).replace("datatype: FP32}\n", "datatype: FP32, default: 0.5}\n");
    let models = models.replace("https, datatype: FP32}", "https, datatype: FP32, default: 0.5}");
    let pod = Pod::start(&models, "").await.ready().await;
    let (cases, _) = expected();
    pod.put(&cases[..2], Duration::ZERO).await;
    let mut gateway = pod.gateway().await;
    let near = at("1", &mut gateway, for_entity("phishing", &cases[0])).await.unwrap().into_inner();
    assert_eq!(degraded(&near), Some("1 default-feature"));
    assert_eq!(asked(&pod).await, 0);
    let right = gateway.model_infer(for_entity("phishing", &cases[0])).await.unwrap().into_inner();
    assert_score(&right, &cases[0]);
    assert_eq!(asked(&pod).await, 2);
    // Now they are near.
    let near = at("1", &mut gateway, for_entity("phishing", &cases[0])).await.unwrap().into_inner();
    assert_score(&near, &cases[0]);
    assert_eq!(degraded(&near), None);

    // Not allowed: as if not asked for. And without defaults there is nothing to say.
    let pod = Pod::start(&resources(&model("phishing", "")), "").await.ready().await;
    pod.put(&cases[..1], Duration::ZERO).await;
    let mut gateway = pod.gateway().await;
    assert_score(&at("1", &mut gateway, for_entity("phishing", &cases[0])).await.unwrap().into_inner(), &cases[0]);
    let pod = Pod::start(&resources(&allowed), "").await.ready().await;
    let status = at("1", &mut pod.gateway().await, for_entity("phishing", &cases[0])).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::Unavailable, "features-unavailable"));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_and_errors_say_the_load() {
    let double = Double::start().await;
    *double.state.statistics.lock() = Some([0; 3]);
    let pod = pod(&double, BOTH).await;
    let mut gateway = pod.gateway().await;
    let answer = gateway.model_infer(sent("big", &[0.0; 9])).await.unwrap();
    let said = answer.metadata().get(LOAD).unwrap().to_str().unwrap();
    assert!(said.starts_with("TEXT application_utilization=0.") && said.contains("named_metrics.in_flight="), "{said}");
    let status = gateway.model_infer(sent("other", &[0.0; 9])).await.unwrap_err();
    assert!(status.metadata().contains_key(LOAD));

    // 10 requests waited 3 ms each and computed 1 ms each.
    tokio::time::sleep(Duration::from_millis(100)).await;
    *double.state.statistics.lock() = Some([10, 30_000_000, 10_000_000]);
    let began = Instant::now();
    loop {
        let answer = gateway.model_infer(sent("big", &[0.0; 9])).await.unwrap();
        let said = answer.metadata().get(LOAD).unwrap().to_str().unwrap();
        if said.starts_with("TEXT application_utilization=0.750,") && said.ends_with("model_queue_us=3000") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{said}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    *double.state.statistics.lock() = None;
    let polls = Instant::now();
    while !pod.metrics().await.contains("spillway_sidecar_load_polls_failed_total 1") {
        assert!(polls.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(150)).await;
    let answer = gateway.model_infer(sent("big", &[0.0; 9])).await.unwrap();
    let said = answer.metadata().get(LOAD).unwrap().to_str().unwrap();
    assert!(!said.contains("model_queue_us"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_model_at_work_is_load() {
    let pod = Pod::start(&resources(&joined_model("phishing", "  backend: onnx")), "").await.ready().await;
    let rows = vec![0.5; 9 * 512];
    let batch = oip::encode_request(&InferRequest {
        model: "phishing".into(),
        inputs: vec![fp32("features", &[512, 9], &rows)],
        ..InferRequest::default()
    });
    let busy = std::thread::available_parallelism().map_or(1, usize::from) * 4;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..busy {
        let (mut client, batch) = (pod.gateway().await, batch.clone());
        clients.spawn(async move {
            loop {
                client.model_infer(batch.clone()).await.unwrap();
            }
        });
    }
    let mut gateway = pod.gateway().await;
    let began = Instant::now();
    loop {
        let answer = gateway.model_infer(batch.clone()).await.unwrap();
        let said = answer.metadata().get(LOAD).unwrap().to_str().unwrap();
        let utilization = said.split(['=', ',']).nth(1).unwrap().parse::<f64>().unwrap();
        if utilization > 0.5 && said.contains("named_metrics.queue=") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{said}");
    }
    clients.shutdown().await;
}
