//! The backend triton against a model server that misbehaves on purpose: what the gateway gets, and that the next call is right.

use std::time::{Duration, Instant};

use crate::support::double::{Answer, Double};
use crate::support::fp32;
use crate::support::pod::{Client, Pod, code, joined_model, resources, text_parameter};
use spillway_core::inference::{InferRequest, Parameter, Parameters};
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse, ModelReadyRequest};
use spillway_runtime::oip;
use tonic::{Code, Request, Status};

const TRITON: &str = "  backend: triton\n  maxDeadline: 10s";

async fn pod(double: &Double) -> Pod {
    let resources = resources(&joined_model("phishing", TRITON));
    Pod::start(&resources, &format!("triton: {}\n", double.endpoint)).await.ready().await
}

fn request(id: &str) -> ModelInferRequest {
    oip::encode_request(&InferRequest {
        model: "phishing".into(),
        id: id.into(),
        inputs: vec![fp32("features", &[1, 9], &[0.0; 9])],
        ..InferRequest::default()
    })
}

/// A request with this much time, by the parameter that Triton defines.
fn within(time: Duration) -> ModelInferRequest {
    let mut request = request("timed");
    let micros = ParameterChoice::Int64Param(i64::try_from(time.as_micros()).unwrap());
    request.parameters = crate::support::pod::parameters([("timeout", micros)]);
    request
}

async fn infer(client: &mut Client, request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
    client.model_infer(request).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn t40_an_answer_with_a_wrong_id_shape_datatype_or_length_is_a_bad_answer() {
    let double = Double::start().await;
    let pod = pod(&double).await;
    let mut gateway = pod.gateway().await;
    let wrong = [Answer::WrongId, Answer::WrongShape, Answer::WrongDatatype, Answer::WrongLength, Answer::NoOutput];
    for answer in wrong {
        double.answers(answer);
        let status = infer(&mut gateway, request("a")).await.unwrap_err();
        assert_eq!((status.code(), code(&status)), (Code::Internal, "bad-model-answer"), "{answer:?}");
        double.answers(Answer::Right);
        assert_eq!(infer(&mut gateway, request("b")).await.unwrap().id, "b");
    }
    // With entities the number of rows is known as well.
    let (cases, _) = crate::support::expected();
    pod.put(&cases[..1], Duration::ZERO).await;
    double.answers(Answer::WrongRows);
    let mut joined = request("c");
    joined.inputs.clear();
    joined.raw_input_contents.clear();
    joined.parameters =
        crate::support::pod::parameters([("entity_id", ParameterChoice::StringParam(cases[0].entity.clone()))]);
    let status = infer(&mut gateway, joined).await.unwrap_err();
    assert_eq!(code(&status), "bad-model-answer");
    pod.assert_metric("spillway_sidecar_model_errors_total{model=\"phishing\",reason=\"bad-model-answer\"} 6").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_models_own_errors_keep_their_meaning_and_lose_their_paths() {
    let double = Double::start().await;
    let pod = pod(&double).await;
    let mut gateway = pod.gateway().await;
    for (answer, expected) in [
        (Answer::Full, (Code::ResourceExhausted, "model-overloaded")),
        (Answer::Invalid, (Code::InvalidArgument, "model-rejected")),
        (Answer::Broken, (Code::Internal, "model-failed")),
    ] {
        double.answers(answer);
        let status = infer(&mut gateway, request("a")).await.unwrap_err();
        assert_eq!((status.code(), code(&status)), expected);
        assert!(!status.message().contains("/srv"), "{}", status.message());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_never_answers_costs_no_more_than_the_deadline_and_is_cancelled() {
    let double = Double::start().await;
    let pod = pod(&double).await;
    double.answers(Answer::Never);
    let begun = Instant::now();
    let status = infer(&mut pod.gateway().await, within(Duration::from_millis(150))).await.unwrap_err();
    let took = begun.elapsed();
    assert_eq!((status.code(), code(&status)), (Code::DeadlineExceeded, "deadline-exceeded"));
    assert!(took >= Duration::from_millis(150) && took < Duration::from_millis(600), "{took:?}");
    double.wait_for_cancelled(1).await;
    double.answers(Answer::Right);
    infer(&mut pod.gateway().await, request("b")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_the_gateway_drops_is_cancelled_at_the_model() {
    let double = Double::start().await;
    let pod = pod(&double).await;
    double.answers(Answer::Never);
    let mut gateway = pod.gateway().await;
    let dropped =
        tokio::time::timeout(Duration::from_millis(200), gateway.model_infer(within(Duration::from_secs(10)))).await;
    assert!(dropped.is_err());
    double.wait_for_cancelled(1).await;
    pod.assert_metric("spillway_sidecar_requests_total{model=\"phishing\",outcome=\"cancelled\"} 1").await;
    pod.assert_metric("spillway_sidecar_requests_in_flight 0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_gets_what_is_its_own_and_the_time_that_is_left() {
    let double = Double::start().await;
    let pod = pod(&double).await;
    let (cases, _) = crate::support::expected();
    pod.put(&cases[..1], Duration::ZERO).await;
    let message = oip::encode_request(&InferRequest {
        model: "phishing".into(),
        id: "mine".into(),
        parameters: Parameters(vec![
            ("entity_id".into(), Parameter::Text(cases[0].entity.clone())),
            ("priority".into(), Parameter::Uint(3)),
            ("timeout".into(), Parameter::Int(5_000_000)),
            ("spillway-region".into(), Parameter::Text("eu".into())),
            ("top_k".into(), Parameter::Int(4)),
        ]),
        ..InferRequest::default()
    });
    let mut request = Request::new(message);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    request.metadata_mut().insert("x-spillway-tenant", "acme".parse().unwrap());
    request.metadata_mut().insert("grpc-timeout", "3S".parse().unwrap());
    pod.gateway().await.model_infer(request).await.unwrap();
    let (metadata, message) = double.state.last.lock().clone().unwrap();
    assert_eq!(message.inputs.len(), 1);
    assert_eq!(message.inputs[0].shape, [1, 9]);
    assert_eq!(message.model_version, "1");
    let mut names: Vec<&str> = message.parameters.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["priority", "timeout", "top_k"]);
    let Some(ParameterChoice::Int64Param(micros)) = message.parameters["timeout"].parameter_choice else {
        panic!("micros")
    };
    assert!((1..3_000_000).contains(&micros), "{micros}");
    assert_eq!(metadata.get("traceparent").unwrap(), parent);
    assert!(metadata.get("x-spillway-tenant").is_none());
    let timeout = metadata.get("grpc-timeout").unwrap().to_str().unwrap();
    let left = spillway_core::deadline::parse_grpc_timeout(timeout).unwrap();
    assert!(left < Duration::from_secs(3) && left > Duration::from_secs(1), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_yet_is_waited_for_and_one_that_comes_back_is_found() {
    // A port that nobody listens on until the double takes it.
    let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = port.local_addr().unwrap();
    drop(port);
    let resources = resources(&joined_model("phishing", TRITON));
    let pod = Pod::start(&resources, &format!("triton: http://{address}\n")).await;
    let mut gateway = pod.gateway().await;
    let status = infer(&mut gateway, request("early")).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (Code::Unavailable, "model-unavailable"));
    let ready = ModelReadyRequest { name: "phishing".into(), version: String::new() };
    assert!(!gateway.model_ready(ready).await.unwrap().into_inner().ready);
    let _double = Double::on(tokio::net::TcpListener::bind(address).await.unwrap()).await;
    let pod = pod.ready().await;
    infer(&mut gateway, request("late")).await.unwrap();
    pod.assert_metric("spillway_sidecar_model_ready{model=\"phishing\"} 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_that_contradicts_the_manifest_refuses_the_model_with_both_shapes() {
    let double = Double::start().await;
    *double.state.columns.lock() = 12;
    let resources = resources(&joined_model("phishing", TRITON));
    let pod = Pod::start(&resources, &format!("triton: {}\n", double.endpoint)).await;
    pod.assert_metric("spillway_sidecar_models_refused_total{model=\"phishing\"} 1").await;
    let reason = pod.page("/readyz").await;
    assert!(
        reason.contains("input 'features': the manifest says FP32 [-1, 9], the model says FP32 [-1, 12]"),
        "{reason}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_passes_every_answer_on_and_ends_at_the_model_when_the_client_goes() {
    let double = Double::start().await;
    let pod = pod(&double).await;
    double.answers(Answer::Many(3));
    let mut gateway = pod.gateway().await;
    // Equal ids, as clients may: each answer is still its own request's.
    let sent = vec![request("same"), request("same")];
    let mut stream = gateway.model_stream_infer(futures_util::stream::iter(sent)).await.unwrap().into_inner();
    let mut answers = 0;
    while let Some(message) = stream.message().await.unwrap() {
        let answer = message.infer_response.unwrap();
        assert_eq!((message.error_message.as_str(), answer.id.as_str()), ("", "same"));
        assert_eq!(text_parameter(&answer, "spillway-model-version"), Some("1"));
        answers += 1;
    }
    assert_eq!(answers, 6);

    double.answers(Answer::WrongShape);
    let mut stream =
        gateway.model_stream_infer(futures_util::stream::iter(vec![request("w")])).await.unwrap().into_inner();
    let failed = stream.message().await.unwrap().unwrap();
    assert_eq!(text_parameter(failed.infer_response.as_ref().unwrap(), "spillway-error"), Some("bad-model-answer"));

    double.answers(Answer::Never);
    let sent = futures_util::stream::iter(vec![within(Duration::from_millis(100))]);
    let mut stream = gateway.model_stream_infer(sent).await.unwrap().into_inner();
    let failed = stream.message().await.unwrap().unwrap();
    assert_eq!(text_parameter(failed.infer_response.as_ref().unwrap(), "spillway-error"), Some("deadline-exceeded"));
    assert!(stream.message().await.unwrap().is_none(), "the stream ends with its last request");

    let before = double.state.cancelled.load(std::sync::atomic::Ordering::SeqCst);
    // The client's end of the requests goes with the rest, as in a client that cancels its call.
    let (requests, open) = tokio::sync::mpsc::channel(1);
    requests.send(within(Duration::from_secs(10))).await.unwrap();
    let calls = double.calls();
    let stream = gateway.model_stream_infer(tokio_stream::wrappers::ReceiverStream::new(open)).await.unwrap();
    while double.calls() == calls {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop((requests, stream));
    double.wait_for_cancelled(before + 1).await;
    pod.assert_metric("spillway_sidecar_streams_open 0").await;
}
