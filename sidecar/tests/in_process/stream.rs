//! Requests of one stream beside each other: order, deadlines, ends and traces.

use std::time::Duration;

use crate::features_harness::Server;
use crate::support::double::{Answer, Double};
use crate::support::fp32;
use crate::support::pod::{Client, Pod, joined_model, resources, text_parameter};
use futures_util::stream;
use spillway_core::inference::{InferRequest, Parameter, Parameters};
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use spillway_runtime::oip;
use tonic::Request;

const TRITON: &str = "  backend: triton\n  maxDeadline: 10s";

async fn pod(double: &Double, more: &str) -> Pod {
    let resources = resources(&joined_model("phishing", TRITON));
    Pod::start(&resources, &format!("triton: {}\n{more}", double.endpoint)).await.ready().await
}

fn parameters(timeout: Duration) -> Parameters {
    Parameters(vec![("timeout".into(), Parameter::Int(i64::try_from(timeout.as_micros()).unwrap()))])
}

fn request(id: &str, timeout: Duration) -> ModelInferRequest {
    oip::encode_request(&InferRequest {
        model: "phishing".into(),
        id: id.into(),
        parameters: parameters(timeout),
        inputs: vec![fp32("features", &[1, 9], &[0.0; 9])],
        ..InferRequest::default()
    })
}

/// A request that must look its features up.
fn joined(id: &str, entity: &str, timeout: Duration) -> ModelInferRequest {
    let mut parameters = parameters(timeout);
    parameters.set("entity_id", Parameter::Text(entity.into()));
    oip::encode_request(&InferRequest {
        model: "phishing".into(),
        id: id.into(),
        parameters,
        ..InferRequest::default()
    })
}

/// The whole stream, with the answer in each message.
async fn answers(client: &mut Client, sent: Vec<ModelInferRequest>) -> Vec<(String, ModelInferResponse)> {
    let mut stream = client.model_stream_infer(stream::iter(sent)).await.unwrap().into_inner();
    let mut answers = Vec::new();
    while let Some(ModelStreamInferResponse { error_message, infer_response }) = stream.message().await.unwrap() {
        answers.push((error_message, infer_response.unwrap()));
    }
    answers
}

fn is_last(answer: &ModelInferResponse) -> bool {
    match &answer.parameters["triton_final_response"].parameter_choice {
        Some(ParameterChoice::BoolParam(last)) => *last,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn t53_a_request_that_waits_behind_a_slow_one_ends_at_its_deadline_and_is_never_sent() {
    let redis = Server::redis("plain");
    let double = Double::start().await;
    let features =
        format!("features: {{sqlite: FOLDER/features.db, redis: {{servers: ['{}'], timeout: 1s}}}}\n", redis.address());
    let pod = pod(&double, &features).await;
    let (slow, long) = (Duration::from_secs(2), Duration::from_secs(8));
    redis.freeze();
    let sent = vec![
        // Its look-up hangs in Redis until the tier's time is over.
        joined("slow", "nobody", slow),
        request("short", Duration::from_millis(100)),
        request("long", long),
    ];
    let answers = answers(&mut pod.gateway().await, sent).await;
    redis.thaw();
    let told: Vec<(&str, Option<&str>)> =
        answers.iter().map(|(_, answer)| (answer.id.as_str(), text_parameter(answer, "spillway-error"))).collect();
    assert_eq!(told[0], ("short", Some("deadline-exceeded")), "told before the slow one's look-up is over");
    assert_eq!(told[1].0, "slow");
    assert_eq!(told[2], ("long", None));
    assert_eq!(told.len(), 3);
    let (_, message) = double.state.last.lock().clone().unwrap();
    let Some(ParameterChoice::Int64Param(left)) = message.parameters["timeout"].parameter_choice else { panic!() };
    assert!(left > 0, "0 would be no limit");
    assert_eq!(double.calls(), 1, "neither the expired nor the failed one reached the model");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_ends_with_a_last_message_also_one_that_its_model_never_answers() {
    let double = Double::start().await;
    let pod = pod(&double, "").await;
    let mut gateway = pod.gateway().await;
    let soon = Duration::from_secs(5);
    for parts in [0, 2] {
        double.answers(Answer::ThenEmpty(parts));
        let answers = answers(&mut gateway, vec![request("r", soon)]).await;
        assert_eq!(answers.len(), parts + 1);
        let (end, before) = answers.split_last().unwrap();
        assert!(before.iter().all(|(error, answer)| error.is_empty() && !is_last(answer) && answer.outputs.len() == 1));
        assert!(is_last(&end.1) && end.0.is_empty() && end.1.outputs.is_empty());
        assert_eq!(
            (end.1.id.as_str(), end.1.model_name.as_str(), end.1.model_version.as_str()),
            ("r", "phishing", "1")
        );
    }
    double.answers(Answer::Many(2));
    let answers = answers(&mut gateway, vec![request("r", soon)]).await;
    let last: Vec<bool> = answers.iter().map(|(_, answer)| is_last(answer)).collect();
    assert_eq!(last, [false, true], "no further message where the last answer is one");
    assert!(answers.iter().all(|(_, answer)| text_parameter(answer, "spillway-region") == Some("eu")));
    pod.assert_metric("spillway_sidecar_requests_total{model=\"phishing\",outcome=\"ok\"} 3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_sees_the_sidecars_span_as_its_parent() {
    let double = Double::start().await;
    // Nobody takes the spans; that they are made is enough.
    let pod = pod(&double, "otlp: {endpoint: 'http://127.0.0.1:9', sample: 100%}\n").await;
    let (trace, caller) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let mut gateway = pod.gateway().await;
    let soon = Duration::from_secs(5);
    for streamed in [false, true] {
        let parent = format!("00-{trace}-{caller}-01").parse().unwrap();
        if streamed {
            let mut call = Request::new(stream::iter(vec![request("r", soon)]));
            call.metadata_mut().insert("traceparent", parent);
            let mut answers = gateway.model_stream_infer(call).await.unwrap().into_inner();
            while answers.message().await.unwrap().is_some() {}
        } else {
            let mut call = Request::new(request("r", soon));
            call.metadata_mut().insert("traceparent", parent);
            gateway.model_infer(call).await.unwrap();
        }
        let (metadata, _) = double.state.last.lock().take().unwrap();
        let seen = metadata.get("traceparent").unwrap().to_str().unwrap().to_owned();
        assert!(seen.contains(trace) && !seen.contains(caller), "streamed: {streamed}: {seen}");
    }
}
