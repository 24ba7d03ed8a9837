//! `ModelStreamInfer` through a real gateway: what each request gets, and what ends a stream.

use std::time::{Duration, Instant};

use crate::support::*;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::*;

#[tokio::test]
async fn a_stream_answers_each_request_and_tells_of_bad_ones() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[], request("double", "0", "a")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    for index in 1..50 {
        stream.send_data(request("double", &index.to_string(), "a"), false).unwrap();
    }
    for index in 1..50 {
        assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, index.to_string());
    }
    // A request that is not valid is told of; the stream goes on.
    stream.send_data(request("unknown", "bad", "a"), false).unwrap();
    let told = answers.next().await.unwrap();
    let response = told.infer_response.unwrap();
    let code = response.parameters["spillway-error"].parameter_choice.clone();
    assert_eq!((response.id.as_str(), code), ("bad", Some(ParameterChoice::StringParam("unknown-model".into()))));
    assert!(told.error_message.contains("no model 'unknown'"), "{}", told.error_message);
    // Half a request, then the rest.
    let whole = request("double", "halved", "a");
    stream.send_data(whole.slice(..7), false).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    stream.send_data(whole.slice(7..), true).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "halved");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("0".into(), String::new()));
    assert_eq!(world.seen().len(), 51);
    let pods: std::collections::BTreeSet<String> = world.seen().into_iter().map(|seen| seen.pod).collect();
    assert_eq!(pods.len(), 1, "one stream, one pod");
    world.stop().await;
}

#[tokio::test]
async fn a_stream_ends_where_it_is_not_allowed_and_with_its_deadline() {
    let world = World::start().await;
    let globex = Http2::connect(world.gateway.https, &world.client("globex")).await.unwrap();
    let grpc = Grpc::call(&globex, STREAM, &[], request("double", "0", "a")).await;
    assert_eq!((grpc.status, grpc.code.as_str()), (7, "not-allowed"));
    assert!(world.seen().is_empty());

    let http2 = world.http2().await;
    let (_stream, mut answers) = open(&http2, &[("grpc-timeout", "300m")], request("double", "0", "a")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("4".into(), "deadline-exceeded".into()));
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_resets_its_stream_resets_the_pods() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[("x-request-id", "reset-1")], request("double", "0", "hangs")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    stream.send_reset(h2::Reason::CANCEL);
    until("the pod is told", async || world.sidecars.iter().any(|sidecar| sidecar.cancelled() == 1)).await;
    assert_eq!(world.logged("reset-1").await["cancelled"], true);
    world.stop().await;
}

#[tokio::test]
async fn a_stream_has_the_shortest_of_the_times_that_its_client_asked_for() {
    let world = World::start().await;
    let http2 = world.http2().await;
    for headers in [&[("x-request-timeout-ms", "300")][..], &[("x-request-timeout-ms", "300"), ("grpc-timeout", "9S")]]
    {
        let began = Instant::now();
        let (_stream, mut answers) = open(&http2, headers, request("double", "0", "a")).await;
        assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
        assert!(answers.next().await.is_none());
        assert_eq!(answers.status().await, ("4".into(), "deadline-exceeded".into()));
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }
    world.stop().await;
}

#[tokio::test]
async fn t10_a_stream_ends_where_its_client_is_not_allowed_any_more() {
    for (code, replaced) in [
        ("not-allowed", &[("models: [\"*\"]", "models: [wide]")][..]),
        ("unknown-tenant", &[("name: acme }", "name: initech }"), ("tenant: acme }", "tenant: initech }")]),
    ] {
        let world = World::start().await;
        let http2 = world.http2().await;
        let (mut stream, mut answers) = open(&http2, &[], request("double", "0", "a")).await;
        assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
        world.publish(2, replaced).await;
        let unary = "/inference.GRPCInferenceService/ModelInfer";
        until("its thread has the snapshot", async || {
            Grpc::call(&http2, unary, &[], request("double", "1", "a")).await.code == code
        })
        .await;
        let (seen, before) = (world.seen().len(), world.rejected(code).await);
        stream.send_data(request("double", "2", "a"), false).unwrap();
        assert!(answers.next().await.is_none());
        assert_eq!(answers.status().await, ("7".into(), code.into()));
        assert_eq!((world.seen().len(), world.rejected(code).await), (seen, before + 1));
        world.stop().await;
    }
}

#[tokio::test]
async fn a_stream_leaves_a_pod_that_is_not_in_the_fleet_any_more() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[], request("brief", "0", "a")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    let gone = world.seen()[0].pod.clone();
    stream.send_data(request("brief", "1", "late"), false).unwrap();
    until("the pod has it", async || world.seen().len() == 2).await;
    let left = world.sidecars.iter().find(|sidecar| sidecar.name == gone).unwrap();
    let line = format!("    - {{ name: {}, address: \"{}\" }}\n", left.name, left.address);
    world.publish(2, &[(&line, "")]).await;
    // Each thread reads the snapshot by itself: new streams say when this one's has.
    until("its thread has the snapshot", async || {
        let (_stream, mut answers) = open(&http2, &[], request("double", "n", "a")).await;
        answers.next().await.unwrap();
        world.seen().last().unwrap().pod != gone && {
            let mut pods = world.seen().into_iter().rev().filter(|seen| seen.message.id == "n");
            pods.next().is_some_and(|seen| seen.pod != gone)
        }
    })
    .await;
    stream.send_data(request("double", "2", "a"), false).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "1", "what it has is answered");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("14".into(), "pod-lost".into()));
    assert!(world.seen().iter().all(|seen| seen.message.id != "2"));
    world.stop().await;
}

#[tokio::test]
async fn a_late_request_is_told_of_and_the_stream_goes_on() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[], request("brief", "0", "late")).await;
    stream.send_data(request("double", "1", "a"), false).unwrap();
    let late = answers.next().await.expect("an answer in band");
    assert_eq!((late.error_message.as_str(), late.infer_response.unwrap().id.as_str()), ("the deadline passed", "0"));
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "1");
    // One that says nothing at all is given up.
    let began = Instant::now();
    stream.send_data(request("brief", "2", "silent"), false).unwrap();
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("4".into(), "deadline-exceeded".into()));
    assert!((1..4).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    world.stop().await;
}

#[tokio::test]
async fn the_end_of_an_answer_without_parts_is_for_those_who_asked() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[], request("brief", "first", "a")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "first");
    stream.send_data(request("brief", "0", "none"), false).unwrap();
    let mut asks: ModelInferRequest = prost::Message::decode(request("brief", "1", "none").slice(5..)).unwrap();
    let wanted = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
    asks.parameters.insert("triton_enable_empty_final_response".into(), wanted.clone());
    stream.send_data(frame(&asks), false).unwrap();
    let end = answers.next().await.unwrap().infer_response.unwrap();
    assert_eq!((end.id.as_str(), end.outputs.len(), &end.parameters["triton_final_response"]), ("1", 0, &wanted));
    // The ends count as the pod's word: nothing is overdue.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    stream.send_data(request("brief", "2", "a"), true).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "2");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await.0, "0");
    world.stop().await;
}

#[tokio::test]
async fn a_dead_pods_streams_go_to_the_other() {
    // Where a check finds the dead pod before the first stream does, nothing is tried there.
    for _ in 0..20 {
        if streams_beside_a_dead_pod().await >= 1 {
            return;
        }
    }
    panic!("no stream was tried again");
}

/// How many were tried again.
async fn streams_beside_a_dead_pod() -> u64 {
    let mut world = World::start().await;
    world.sidecars[0].kill();
    let http2 = world.http2().await;
    for entity in 0..20 {
        let first = request("double", "0", &format!("e{entity}"));
        let (mut stream, mut answers) = open(&http2, &[], first).await;
        stream.send_data(request("double", "1", "a"), true).unwrap();
        for id in ["0", "1"] {
            assert_eq!(answers.next().await.expect("an answer").infer_response.unwrap().id, id);
        }
        assert!(answers.next().await.is_none());
        assert_eq!(answers.status().await.0, "0", "{entity}");
    }
    let retries = world.metric("spillway_gateway_retries_total").await;
    world.stop().await;
    retries
}

#[tokio::test]
async fn a_streams_answers_say_where_they_were_made() {
    let world = World::start().await;
    let http2 = world.http2().await;
    let (stream, mut answers) = open(&http2, &[], request("double", "0", "a")).await;
    let answer = answers.next().await.unwrap().infer_response.unwrap();
    let region = answer.parameters["spillway-region"].parameter_choice.clone();
    assert_eq!(region, Some(ParameterChoice::StringParam("eu".into())));
    drop((stream, answers));
    world.stop().await;
}
