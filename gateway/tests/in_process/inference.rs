//! Predictions through a real gateway: every protocol gives the same, and says how it was made.

use crate::support::*;
use bytes::Bytes;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::*;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

fn request(entity: Option<&str>) -> ModelInferRequest {
    let entity = entity.map(|entity| {
        let value = ParameterChoice::StringParam(entity.to_owned());
        ("entity_id".to_owned(), InferParameter { parameter_choice: Some(value) })
    });
    let values = [1.5_f32, -2.0];
    ModelInferRequest {
        model_name: "double".into(),
        id: "call-7".into(),
        parameters: entity.into_iter().collect(),
        inputs: vec![InferInputTensor {
            name: "x".into(),
            datatype: "FP32".into(),
            shape: vec![2],
            ..Default::default()
        }],
        raw_input_contents: vec![values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()],
        ..Default::default()
    }
}

fn doubled() -> Bytes {
    [3.0_f32, -4.0].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

const JSON: &str = r#"{"id":"call-7","inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1.5,-2.0]}]}"#;

#[tokio::test]
async fn every_protocol_gives_the_same_prediction() {
    let world = World::start().await;
    let infer = "/v2/models/double/infer";
    for over in ["h1", "h2"] {
        let answer = if over == "h1" {
            world.http1().await.exchange(&h1_request("POST", infer, &["x-request-id: abc-1"], JSON.as_bytes())).await
        } else {
            let request = Http2::request("POST", infer, &[("x-request-id", "abc-1")]);
            world.http2().await.exchange(request, JSON.into()).await.unwrap()
        };
        assert_eq!(answer.status, 200, "{answer:?}");
        let json = answer.json();
        assert_eq!(json["outputs"][0]["data"], serde_json::json!([3.0, -4.0]), "{json}");
        assert_eq!((json["id"].as_str(), json["model_version"].as_str()), (Some("call-7"), Some("1")));
        assert_eq!(answer.header("x-request-id"), "abc-1");
        assert_eq!(answer.header("spillway-region"), "eu");
        assert_eq!(answer.header("spillway-model-version"), "1");
        assert_eq!(answer.header("spillway-degraded"), "1 stale-feature");
        assert_eq!(answer.header("spillway-feature-age-ms"), "250");
        assert_eq!(answer.header("cache-status"), "spillway; fwd=bypass");
        let timing = answer.header("server-timing");
        for part in ["auth;dur=", "queue;dur=", "features;dur=0.21", "model;dur=1.02", "total;dur="] {
            assert!(timing.contains(part), "{timing}");
        }
    }

    let json = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}}],"parameters":{"binary_data_output":true}}"#;
    let body = [json.as_bytes(), &request(None).raw_input_contents[0]].concat();
    let length = format!("inference-header-content-length: {}", json.len());
    let answer = world.http1().await.exchange(&h1_request("POST", infer, &[&length], &body)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let split: usize = answer.header("inference-header-content-length").parse().unwrap();
    assert_eq!(answer.body.slice(split..), doubled());

    let grpc = Grpc::call(&world.http2().await, INFER, &[], frame(&request(None))).await;
    assert_eq!(grpc.status, 0, "{grpc:?}");
    let response: ModelInferResponse = grpc.decode();
    assert_eq!((response.id.as_str(), &response.raw_output_contents[0]), ("call-7", &doubled()));
    assert_eq!(grpc.answer.header("spillway-degraded"), "1 stale-feature");
    assert_eq!(grpc.answer.headers.get_all("spillway-region").iter().count(), 1);
    let region = response.parameters["spillway-region"].parameter_choice.clone();
    assert_eq!(region, Some(ParameterChoice::StringParam("eu".into())));

    let line = world.logged("\"request_id\":\"abc-1\"").await;
    assert_eq!(
        (line["tenant"].as_str(), line["model"].as_str(), line["status"].as_u64()),
        (Some("acme"), Some("double"), Some(200))
    );
    assert_eq!(world.metric("spillway_gateway_requests_total{protocol=\"grpc\",method=\"infer\",code=\"0\"}").await, 1);
    world.stop().await;
}

#[tokio::test]
async fn an_entity_always_goes_to_its_own_pod() {
    let world = World::start().await;
    let http2 = world.http2().await;
    for entity in 0..20 {
        for _ in 0..3 {
            let grpc = Grpc::call(&http2, INFER, &[], frame(&request(Some(&format!("entity-{entity}"))))).await;
            assert_eq!(grpc.status, 0);
        }
    }
    let mut pods = std::collections::BTreeMap::new();
    for seen in world.seen() {
        let Some(ParameterChoice::StringParam(entity)) = seen.message.parameters["entity_id"].parameter_choice.clone()
        else {
            panic!("an entity");
        };
        assert_eq!(pods.entry(entity).or_insert_with(|| seen.pod.clone()), &seen.pod);
    }
    let distinct: std::collections::BTreeSet<_> = pods.values().collect();
    assert_eq!(distinct.len(), 2, "both pods have some");

    // A list of one names the same entity.
    for (entity, pod) in &pods {
        let named =
            InferInputTensor { name: "site".into(), datatype: "BYTES".into(), shape: vec![1], ..Default::default() };
        let x = InferInputTensor { name: "x".into(), datatype: "FP32".into(), shape: vec![1], ..Default::default() };
        let length = u32::try_from(entity.len()).unwrap().to_le_bytes();
        let listed = ModelInferRequest {
            inputs: vec![named, x],
            raw_input_contents: vec![
                [&length[..], entity.as_bytes()].concat().into(),
                Bytes::from_static(&[0, 0, 0x80, 0x3f]),
            ],
            ..request(None)
        };
        let grpc = Grpc::call(&http2, INFER, &[], frame(&listed)).await;
        let response: ModelInferResponse = grpc.decode();
        let answered = response.parameters["pod"].parameter_choice.clone();
        assert_eq!(answered, Some(ParameterChoice::StringParam(pod.clone())), "{entity}");
    }
    world.stop().await;
}

#[tokio::test]
async fn t21_nothing_of_a_clients_headers_reaches_a_pod() {
    let world = World::start().await;
    let headers = [
        ("x-spillway-tenant", "globex"),
        ("x-forwarded-client-cert", "By=spiffe://evil"),
        ("x-tenant", "globex"),
        ("x-spiffe-id", "spiffe://evil"),
        ("x_spillway_tenant", "globex"),
        ("x-forwarded-for", "10.0.0.1"),
        ("authorization", "secret"),
        ("cookie", "secret"),
        ("spillway-error", "x"),
        ("x-request-id", "abc-2"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("grpc-timeout", "1S"),
    ];
    let grpc = Grpc::call(&world.http2().await, INFER, &headers, frame(&request(None))).await;
    assert_eq!(grpc.status, 0);
    let seen = world.seen().pop().unwrap().metadata;
    let mut names: Vec<&str> = seen.keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    let expected = ["content-type", "grpc-timeout", "te", "traceparent", "x-request-id", "x-spillway-tenant"];
    assert_eq!(names, expected);
    assert_eq!(seen["x-spillway-tenant"], "acme");
    assert!(seen["traceparent"].to_str().unwrap().contains("0af7651916cd43dd8448eb211c80319c"));
    let left = seen["grpc-timeout"].to_str().unwrap();
    let left: u64 = left.strip_suffix('u').unwrap().parse().unwrap();
    assert!((500_000..1_000_000).contains(&left), "what is left of 1 s: {left}");
    world.stop().await;
}

#[tokio::test]
async fn who_may_not_use_a_model_learns_nothing_about_it() {
    let world = World::start().await;
    let globex = Http2::connect(world.gateway.https, &world.client("globex")).await.unwrap();
    for model in ["double", "unknown"] {
        let message = ModelInferRequest { model_name: model.into(), ..request(None) };
        let grpc = Grpc::call(&globex, INFER, &[], frame(&message)).await;
        assert_eq!((grpc.status, grpc.code.as_str()), (7, "not-allowed"), "{model}");
        let answer =
            globex.exchange(Http2::request("POST", &format!("/v2/models/{model}/infer"), &[]), JSON.into()).await;
        assert_eq!(answer.unwrap().status, 403);
    }
    let answer = globex.exchange(Http2::request("GET", "/v2/models/double", &[]), Bytes::new()).await.unwrap();
    assert_eq!(answer.json()["inputs"][1]["name"], "x");
    let acme = world.http2().await;
    let answer = acme.exchange(Http2::request("POST", "/v2/models/unknown/infer", &[]), JSON.into()).await.unwrap();
    assert_eq!((answer.status, answer.header("spillway-error")), (404, "unknown-model"));
    let nobody = Http2::connect(world.gateway.https, &world.client("stranger")).await.unwrap();
    let answer = nobody.exchange(Http2::request("GET", "/v2/health/live", &[]), Bytes::new()).await.unwrap();
    assert_eq!((answer.status, answer.header("spillway-error")), (403, "unknown-tenant"));
    assert!(world.seen().is_empty());
    assert_eq!(world.rejected("not-allowed").await, 4);
    world.stop().await;
}

#[tokio::test]
async fn a_sidecars_refusal_reaches_the_caller_in_its_own_protocol() {
    let world = World::start().await;
    let grpc = Grpc::call(&world.http2().await, INFER, &[], frame(&request(Some("missing")))).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (9, "missing-feature"));
    assert_eq!(grpc.message, "no features: 100 %25 of %C3%A9");
    let json =
        r#"{"parameters":{"entity_id":"missing"},"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#;
    let answer =
        world.http1().await.exchange(&h1_request("POST", "/v2/models/double/infer", &[], json.as_bytes())).await;
    assert_eq!((answer.status, answer.header("spillway-error")), (422, "missing-feature"));
    assert_eq!(answer.json()["error"], "no features: 100 % of \u{e9}");
    let grpc = Grpc::call(&world.http2().await, INFER, &[], frame(&request(Some("lies")))).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (13, "bad-model-answer"));
    world.stop().await;
}

#[tokio::test]
async fn t53_a_pod_that_hangs_costs_no_more_than_the_deadline() {
    let world = World::start().await;
    let http2 = world.http2().await;
    for (header, value, most) in
        [("grpc-timeout", "100m", 1_000), ("x-request-timeout-ms", "100", 1_000), ("grpc-timeout", "0S", 4_000)]
    {
        let began = std::time::Instant::now();
        let grpc = Grpc::call(&http2, INFER, &[(header, value)], frame(&request(Some("hangs")))).await;
        assert_eq!((grpc.status, grpc.code.as_str()), (4, "deadline-exceeded"), "{header}: {value}");
        assert!(began.elapsed().as_millis() < most, "{header}: {value}: {:?}", began.elapsed());
    }
    // Each may have been sent to both pods.
    let tried = world.seen().len();
    assert!((3..=6).contains(&tried), "{tried}");
    until("the pods are told", async || world.sidecars.iter().map(Sidecar::cancelled).sum::<usize>() == tried).await;
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_the_call() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let headers = [("content-type", "application/grpc"), ("x-request-id", "gone-2")];
    let mut send = http2.send.clone().ready().await.unwrap();
    let (response, mut stream) = send.send_request(Http2::request("POST", INFER, &headers), false).unwrap();
    stream.send_data(frame(&request(Some("hangs"))), true).unwrap();
    until("the pod has it", async || world.seen().len() == 1).await;
    stream.send_reset(h2::Reason::CANCEL);
    drop(response);
    until("the pod is told", async || world.sidecars.iter().any(|sidecar| sidecar.cancelled() == 1)).await;
    assert_eq!(world.logged("gone-2").await["cancelled"], true);

    let mut http1 = world.http1().await;
    let json =
        r#"{"parameters":{"entity_id":"hangs"},"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#;
    http1.send(&h1_request("POST", "/v2/models/double/infer", &["x-request-id: gone-1"], json.as_bytes())).await;
    until("the pod has it", async || world.seen().len() == 2).await;
    drop(http1);
    until("the pod is told", async || world.sidecars.iter().map(Sidecar::cancelled).sum::<usize>() == 2).await;
    assert_eq!(world.logged("gone-1").await["cancelled"], true);
    world.stop().await;
}

#[tokio::test]
async fn a_dead_pods_requests_go_to_the_other() {
    let mut world = World::start().await;
    world.sidecars[0].kill();
    let http2 = world.http2().await;
    for entity in 0..40 {
        let grpc = Grpc::call(&http2, INFER, &[], frame(&request(Some(&format!("e{entity}"))))).await;
        assert_eq!(grpc.status, 0, "{grpc:?}");
        let grpc = Grpc::call(&http2, INFER, &[], frame(&request(None))).await;
        assert_eq!(grpc.status, 0, "{grpc:?}");
    }
    world.sidecars[1].kill();
    let grpc = Grpc::call(&http2, INFER, &[], frame(&request(None))).await;
    assert_eq!((grpc.status, grpc.answer.header("grpc-retry-pushback-ms")), (14, "1000"), "{grpc:?}");
    until("it says that it is not ready", async || world.admin("/readyz").await.starts_with("HTTP/1.1 503")).await;
    let answer = world.http1().await.exchange(&h1_request("GET", "/v2/health/ready", &[], b"")).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
    world.check_alive().await;
    world.stop().await;
}
