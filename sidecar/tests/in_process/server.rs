//! One sidecar over mutual TLS with the embedded defaults: ONNX in process, features in SQLite.

use std::time::{Duration, Instant};

use crate::support::pod::{Client, Pod, code, joined_model, resources, scores, text_parameter};
use crate::support::{Case, expected, fp32};
use http_body_util::BodyExt;
use spillway_core::inference::{Datatype, InferRequest, Parameter, Parameters, Tensor};
use spillway_proto::inference::{
    ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelReadyRequest, ServerLiveRequest,
    ServerReadyRequest,
};
use spillway_runtime::oip;
use spillway_runtime::upstream::OipBody;
use tonic::{Code, Request, Status};

const ONNX: &str = "  backend: onnx\n  missingFeature: refuse";
const WITH_DEFAULTS: &str = "  backend: onnx\n  missingFeature: default";

fn one_model(more: &str) -> String {
    resources(&joined_model("phishing", more))
}

fn request(inputs: Vec<Tensor>, parameters: Vec<(&str, Parameter)>) -> ModelInferRequest {
    let parameters = Parameters(parameters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
    oip::encode_request(&InferRequest { inputs, parameters, ..features(&[]) })
}

/// A request that brings these features along, if there are any.
fn features(row: &[f32]) -> InferRequest {
    let input = (!row.is_empty()).then(|| fp32("features", &[1, 9], row));
    InferRequest {
        model: "phishing".into(),
        id: "r-1".into(),
        inputs: input.into_iter().collect(),
        ..InferRequest::default()
    }
}

fn for_entity(entity: &str) -> ModelInferRequest {
    request(Vec::new(), vec![("entity_id", Parameter::Text(entity.into()))])
}

fn entities(cases: &[&Case]) -> Tensor {
    let data: Vec<u8> = cases
        .iter()
        .flat_map(|case| {
            [&u32::try_from(case.entity.len()).unwrap().to_le_bytes()[..], case.entity.as_bytes()].concat()
        })
        .collect();
    Tensor {
        name: "entity".into(),
        datatype: Datatype::Bytes,
        shape: vec![i64::try_from(cases.len()).unwrap()],
        parameters: Parameters::default(),
        data: data.into(),
    }
}

async fn infer(client: &mut Client, request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
    client.model_infer(request).await.map(tonic::Response::into_inner)
}

fn close(found: f32, expected: f32) -> bool {
    (found - expected).abs() <= 1e-5
}

#[tokio::test(flavor = "multi_thread")]
async fn sent_and_joined_features_give_the_scores_of_the_training_library() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let (cases, _) = expected();
    pod.put(&cases, Duration::ZERO).await;
    let mut gateway = pod.gateway().await;
    let sent = request(vec![fp32("features", &[1, 9], &cases[0].features)], Vec::new());
    let answer = infer(&mut gateway, sent).await.unwrap();
    assert!(close(scores(&answer)[0], cases[0].score));
    assert_eq!(text_parameter(&answer, "spillway-model-version"), Some("1"));
    assert_eq!(text_parameter(&answer, "spillway-region"), Some("eu"));
    assert!(!answer.parameters.contains_key("spillway-feature-age-ms"), "nothing was joined");

    for case in &cases[..8] {
        let response = gateway.model_infer(for_entity(&case.entity)).await.unwrap();
        let timing = response.metadata().get("server-timing").unwrap().to_str().unwrap().to_owned();
        assert!(timing.contains("features;dur=") && timing.contains("model;dur="), "{timing}");
        let answer = response.into_inner();
        assert_eq!(
            (answer.id.as_str(), answer.model_name.as_str(), answer.model_version.as_str()),
            ("r-1", "phishing", "1")
        );
        assert!(close(scores(&answer)[0], case.score), "{}", case.entity);
        assert_eq!(text_parameter(&answer, "spillway-degraded"), None);
        assert!(answer.parameters.contains_key("spillway-feature-age-ms"));
    }

    // Row i belongs to entity i, also in an order of the caller's own and with an entity twice.
    let picked: Vec<&Case> = [5, 0, 63, 5, 17].map(|index| &cases[index]).to_vec();
    let answer = infer(&mut gateway, request(vec![entities(&picked)], Vec::new())).await.unwrap();
    let found = scores(&answer);
    assert_eq!(found.len(), picked.len());
    for (case, score) in picked.iter().zip(found) {
        assert!(close(score, case.score), "{}", case.entity);
    }

    // What the client sends wins over what is stored.
    let both = request(
        vec![fp32("features", &[1, 9], &cases[1].features)],
        vec![("entity_id", Parameter::Text(cases[0].entity.clone()))],
    );
    assert!(close(scores(&infer(&mut gateway, both).await.unwrap())[0], cases[1].score));
    pod.assert_metric("spillway_sidecar_requests_total{model=\"phishing\",outcome=\"ok\"} 11").await;
    pod.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn t45_a_missing_feature_is_refused_or_the_declared_default_never_zero() {
    let refusing = Pod::start(&one_model(ONNX), "").await.ready().await;
    let status = infer(&mut refusing.gateway().await, for_entity("nobody")).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::FailedPrecondition, "missing-feature"));
    assert!(!status.message().contains("nobody"), "{}", status.message());
    refusing.assert_metric("spillway_sidecar_missing_features_total{model=\"phishing\"} 1").await;

    let with_site_defaults = one_model(WITH_DEFAULTS).replace("datatype: FP32}\n", "datatype: FP32, default: 0.5}\n");
    let defaulting =
        Pod::start(&with_site_defaults.replace("https, datatype: FP32}", "https, datatype: FP32, default: 0.5}"), "")
            .await
            .ready()
            .await;
    let mut gateway = defaulting.gateway().await;
    let defaulted = infer(&mut gateway, for_entity("nobody")).await.unwrap();
    assert_eq!(text_parameter(&defaulted, "spillway-degraded"), Some("1 default-feature"));
    let sent = request(vec![fp32("features", &[1, 9], &[0.5; 9])], Vec::new());
    assert_eq!(scores(&defaulted), scores(&infer(&mut gateway, sent).await.unwrap()));
    defaulting.assert_metric("spillway_sidecar_default_features_total{model=\"phishing\"} 9").await;
    defaulting.assert_metric("spillway_sidecar_degraded_total{model=\"phishing\",reason=\"default-feature\"} 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_value_is_served_and_said_to_be_stale() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let (cases, _) = expected();
    pod.put(&cases[..1], Duration::from_secs(2 * 3_600)).await;
    let answer = infer(&mut pod.gateway().await, for_entity(&cases[0].entity)).await.unwrap();
    assert_eq!(text_parameter(&answer, "spillway-degraded"), Some("1 stale-feature"));
    assert!(close(scores(&answer)[0], cases[0].score));
    pod.assert_metric("spillway_sidecar_degraded_total{model=\"phishing\",reason=\"stale-feature\"} 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_gateways_of_the_region_may_call() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    for stranger in [
        "spiffe://spillway.test/region/us/gateway/gw-0",
        "spiffe://spillway.test/region/eu/sidecar/scorers/pod-1",
        "spiffe://spillway.test/tenant/acme/client/web",
    ] {
        let mut client = Client::new(pod.connect(stranger).await);
        let status = client.server_live(ServerLiveRequest {}).await.unwrap_err();
        assert_eq!((status.code(), code(&status)), (Code::PermissionDenied, "not-a-gateway"), "{stranger}");
    }
    pod.assert_metric("spillway_sidecar_calls_refused_total{reason=\"not-a-gateway\"} 3").await;
    assert!(pod.gateway().await.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_and_the_next_one_is_right() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let mut gateway = pod.gateway().await;
    let (cases, _) = expected();
    let mut unknown = for_entity("a");
    unknown.model_name = "other".into();
    let mut version = for_entity("a");
    version.model_version = "9".into();
    let narrow = request(vec![fp32("features", &[1, 8], &[0.0; 8])], Vec::new());
    for (bad, expected) in [
        (unknown, (Code::NotFound, "unknown-model")),
        (version, (Code::NotFound, "unknown-version")),
        (narrow, (Code::InvalidArgument, "tensor-mismatch")),
        (request(Vec::new(), Vec::new()), (Code::InvalidArgument, "missing-entity")),
    ] {
        let status = infer(&mut gateway, bad).await.unwrap_err();
        assert_eq!((status.code(), code(&status)), expected);
        let right = request(vec![fp32("features", &[1, 9], &cases[0].features)], Vec::new());
        assert!(close(scores(&infer(&mut gateway, right).await.unwrap())[0], cases[0].score));
    }
    pod.assert_metric("spillway_sidecar_requests_total{model=\"-\",outcome=\"unknown-model\"} 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn t53_an_expired_request_never_reaches_the_model() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let sent = request(vec![fp32("features", &[1, 9], &[0.0; 9])], vec![("timeout", Parameter::Int(1))]);
    let status = infer(&mut pod.gateway().await, sent).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::DeadlineExceeded, "deadline-exceeded"));
    pod.assert_metric("spillway_sidecar_requests_total{model=\"phishing\",outcome=\"deadline-exceeded\"} 1").await;
    let text = pod.metrics().await;
    assert!(!text.contains("spillway_sidecar_model_duration_seconds_count"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn t57_the_access_log_has_one_line_for_each_request_and_no_entity() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let mut gateway = pod.gateway().await;
    let mut request = Request::new(for_entity("se\u{1b}cret\r\n\"entity\""));
    request.metadata_mut().insert("x-request-id", "rid-1".parse().unwrap());
    request.metadata_mut().insert("x-spillway-tenant", "acme".parse().unwrap());
    gateway.model_infer(request).await.unwrap_err();
    let folder = pod.stop().await;
    let lines = std::fs::read_to_string(folder.path().join("access.log")).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["request_id"], "rid-1");
    assert_eq!(lines[0]["tenant"], "acme");
    assert_eq!(lines[0]["gateway"], "gw-0");
    assert_eq!(lines[0]["outcome"], "missing-feature");
    assert_eq!(lines[0]["entities"], 1);
    assert!(!lines[0].to_string().contains("cret"), "{}", lines[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_come_change_and_go_with_the_snapshot() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let mut gateway = pod.gateway().await;
    let metadata = ModelMetadataRequest { name: "phishing".into(), version: String::new() };
    let described = gateway.model_metadata(metadata.clone()).await.unwrap().into_inner();
    assert_eq!(described.inputs.len(), 2, "the entity input and the features");

    // A manifest that the file contradicts is refused; the last good one goes on.
    pod.publish(&one_model(ONNX).replace("name: score, datatype: FP32", "name: score, datatype: FP64"), 2);
    pod.assert_metric("spillway_snapshot_version 2").await;
    pod.assert_metric("spillway_sidecar_models_refused_total{model=\"phishing\"} 1").await;
    let sent = request(vec![fp32("features", &[1, 9], &[0.0; 9])], Vec::new());
    infer(&mut gateway, sent.clone()).await.unwrap();

    pod.publish(&one_model(ONNX).replace("'1'", "'7'"), 3);
    pod.assert_metric("spillway_snapshot_version 3").await;
    infer(&mut gateway, sent.clone()).await.unwrap();

    pod.publish(&one_model(ONNX).replace("deadline: 2s", "deadline: 3s"), 4);
    pod.assert_metric("spillway_snapshot_version 4").await;
    infer(&mut gateway, sent.clone()).await.unwrap();

    pod.publish(resources("").trim_end_matches("---\n"), 5);
    pod.assert_metric("spillway_snapshot_version 5").await;
    let begun = Instant::now();
    loop {
        let result = infer(&mut gateway, sent.clone()).await;
        match result {
            Err(status) if code(&status) == "unknown-model" => break,
            _ => assert!(begun.elapsed() < Duration::from_secs(5), "{result:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_contradicts_its_manifest_is_not_ready_and_says_both_shapes() {
    let wide = one_model("  backend: onnx")
        .replace("name: score, datatype: FP32, shape: [-1, 1]", "name: score, datatype: FP32, shape: [-1, 2]");
    let pod = Pod::start(&wide, "").await;
    pod.assert_metric("spillway_sidecar_models_refused_total{model=\"phishing\"} 1").await;
    let reason = pod.page("/readyz").await;
    assert!(reason.starts_with("HTTP/1.1 503"), "{reason}");
    assert!(reason.contains("the manifest says FP32 [-1, 2], the model says FP32 [-1, 1]"), "{reason}");
    let mut gateway = pod.gateway().await;
    let ready = ModelReadyRequest { name: "phishing".into(), version: String::new() };
    assert!(!gateway.model_ready(ready).await.unwrap().into_inner().ready);
    assert!(!gateway.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let status = infer(&mut gateway, for_entity("a")).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::Unavailable, "model-unavailable"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_answered_whole_or_never_taken_when_the_pod_ends() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let gateway = pod.upstream();
    let load = tokio::spawn(async move {
        let frame = oip::frame(&features(&[0.0; 9]));
        let mut answered = 0_usize;
        loop {
            let mut call = http::Request::post("/inference.GRPCInferenceService/ModelInfer");
            call = call.header("content-type", "application/grpc").header("te", "trailers");
            match gateway.call(call.body(OipBody::segments(frame.clone())).unwrap()).await {
                Ok(answer) => {
                    let trailers = answer.into_body().collect().await.unwrap().trailers().cloned().unwrap();
                    assert_eq!(trailers["grpc-status"], "0");
                    answered += 1;
                }
                Err(error) => return (answered, error),
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let begun = Instant::now();
    pod.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(3), "idle connections do not hold the drain");
    let (answered, error) = load.await.unwrap();
    assert!(answered > 0 && error.never_processed(), "{answered} answers, then {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_answers_each_request_and_tells_errors_in_band() {
    let pod = Pod::start(&one_model(ONNX), "").await.ready().await;
    let (cases, _) = expected();
    pod.put(&cases[..1], Duration::ZERO).await;
    let mut sent = vec![
        request(vec![fp32("features", &[1, 9], &cases[1].features)], Vec::new()),
        for_entity("nobody"),
        for_entity(&cases[0].entity),
    ];
    for (index, message) in sent.iter_mut().enumerate() {
        message.id = format!("s-{index}");
    }
    let mut gateway = pod.gateway().await;
    let mut stream = gateway.model_stream_infer(futures_util::stream::iter(sent)).await.unwrap().into_inner();
    let mut seen = std::collections::BTreeMap::new();
    while let Some(message) = stream.message().await.unwrap() {
        seen.insert(message.infer_response.clone().unwrap().id, message);
    }
    assert_eq!(seen.len(), 3);
    assert!(close(scores(seen["s-0"].infer_response.as_ref().unwrap())[0], cases[1].score));
    assert!(close(scores(seen["s-2"].infer_response.as_ref().unwrap())[0], cases[0].score));
    assert_eq!(text_parameter(seen["s-0"].infer_response.as_ref().unwrap(), "spillway-region"), Some("eu"));
    assert!(!seen["s-1"].error_message.is_empty());
    let failed = seen["s-1"].infer_response.as_ref().unwrap();
    assert_eq!(text_parameter(failed, "spillway-error"), Some("missing-feature"));
    pod.assert_metric("spillway_sidecar_requests_total{model=\"phishing\",outcome=\"ok\"} 2").await;
}
