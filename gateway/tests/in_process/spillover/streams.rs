//! Streams go to another region before they are taken, or not at all.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_no_pod_can_take_goes_to_another_region_and_stays_there() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let acme = regions.client("eu", "acme").await;
    let (mut stream, mut answers) =
        open(&acme, &[("x-request-id", "streamed-1")], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    for index in 1..30 {
        stream.send_data(request("double", &index.to_string(), "plain"), false).unwrap();
    }
    for index in 1..30 {
        assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, index.to_string());
    }
    // What is wrong with one of them is told of here as ever.
    stream.send_data(request("nothing", "bad", "plain"), false).unwrap();
    let told = answers.next().await.unwrap();
    assert!(told.error_message.contains("no model 'nothing'"), "{}", told.error_message);
    stream.send_data(request("double", "last", "plain"), true).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "last");
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("0".into(), String::new()));

    let (eu, us) = (regions.place("eu"), regions.place("us"));
    let seen = us.seen();
    assert_eq!(seen.len(), 31);
    let metadata =
        |seen: &Seen| (seen.metadata["x-spillway-tenant"] == "acme", seen.metadata.contains_key("spillway-forwarded"));
    assert!(seen.iter().all(|seen| metadata(seen) == (true, false)));
    let line = eu.logged("streamed-1").await;
    assert_eq!((&line["spilled"], &line["pod"]), (&"us".into(), &serde_json::Value::Null), "{line}");
    let line = us.logged("streamed-1").await;
    assert_eq!((&line["forwarded"], &line["method"]), (&"eu".into(), &"forwarded-stream".into()), "{line}");
    assert_eq!((&line["tenant"], &line["limit"]), (&"acme".into(), &serde_json::Value::Null));
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &["outcome=\"answered\""]).await, 1);
    assert_eq!(us.metric("spillway_gateway_forwarded_total", &["outcome=\"answered\""]).await, 1);

    // A model that only the other region serves.
    assert_eq!(Grpc::call(&acme, STREAM, &[], request("abroad", "0", "plain")).await.status, 0);
    let labels = ["reason=\"no-pool\"", "outcome=\"answered\""];
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &labels).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_stays_where_its_first_answer_came_from() {
    let mut regions = two().await;
    let acme = regions.client("eu", "acme").await;
    let (mut stream, mut answers) = open(&acme, &[], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    assert_eq!(regions.place("eu").seen().len(), 1);
    regions.kill_pods("eu");
    let _ = stream.send_data(request("double", "1", "plain"), false);
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("14".into(), "pod-lost".into()));
    assert!(regions.place("us").seen().is_empty());
    // Opened anew, it goes there.
    let (_stream, mut answers) = open(&acme, &[], request("double", "2", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "2");
    assert_eq!(regions.place("us").seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn residence_holds_for_streams_for_as_long_as_they_last() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let (globex, initech) = (regions.client("eu", "globex").await, regions.client("eu", "initech").await);
    let answer = Grpc::call(&globex, STREAM, &[], request("double", "0", "plain")).await;
    assert_eq!((answer.status, &*answer.code), (Code::Unavailable as i32, "no-pod"));
    assert!(regions.place("us").seen().is_empty());
    let (mut stream, mut answers) = open(&initech, &[], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    regions.publish_and_wait(3, &[("mayLeaveRegion: [us]", "mayLeaveRegion: [eu]")]).await;
    until("its thread has the snapshot", async || call(&initech, "double", "a").await.code == "no-pod").await;
    let seen = regions.place("us").seen().len();
    stream.send_data(request("double", "1", "plain"), false).unwrap();
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("14".into(), "pod-lost".into()));
    assert_eq!(regions.place("us").seen().len(), seen);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_the_peer_does_not_take_is_refused_in_time_and_goes_no_further() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let acme = regions.client("eu", "acme").await;
    let us = regions.place("us");
    let behave = |manner| us.sidecars.iter().for_each(|pod| pod.behave(manner));
    let streamed = async |http2: &Http2, headers: &[(&str, &str)]| {
        Grpc::call(http2, STREAM, headers, request("double", "0", "plain")).await
    };
    // What is wrong with a request is told on the stream, which goes on with the next.
    behave(Manner::Refuses(Code::InvalidArgument, "model-rejected"));
    let (mut stream, mut answers) = open(&acme, &[], request("double", "bad", "plain")).await;
    let told = answers.next().await.unwrap().infer_response.unwrap();
    let code = told.parameters["spillway-error"].parameter_choice.clone();
    assert_eq!(code, Some(infer_parameter::ParameterChoice::StringParam("model-rejected".into())));
    behave(Manner::Well);
    stream.send_data(request("double", "good", "plain"), true).unwrap();
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "good");
    assert_eq!(answers.status().await, ("0".into(), String::new()));

    behave(Manner::Hangs);
    let began = Instant::now();
    let answer = streamed(&acme, &[("grpc-timeout", "300m")]).await;
    assert!(answer.status == Code::DeadlineExceeded as i32 || answer.code == "no-pod", "{answer:?}");
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(250) && took < DEADLINE, "{took:?}");
    behave(Manner::Refuses(Code::ResourceExhausted, "model-overloaded"));
    until("it is asked again", async || {
        assert_eq!(streamed(&acme, &[]).await.code, "no-pod");
        regions.place("eu").metric("spillway_gateway_spilled_total", &["outcome=\"overloaded\""]).await > 0
    })
    .await;

    regions.kill_pods("us");
    let (eu, us) = (regions.place("eu"), regions.place("us"));
    until("its refusal is counted", async || {
        assert_eq!(streamed(&acme, &[]).await.code, "no-pod");
        us.metric("spillway_gateway_no_peer_total", &["reason=\"forwarded\""]).await > 0
    })
    .await;
    assert_eq!(us.metric("spillway_gateway_spilled_total", &[]).await, 0);
    assert_eq!(eu.metric("spillway_gateway_forwarded_total", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_a_pod_of_the_peer_had_goes_to_nobody_else() {
    let (mut regions, acme) = three().await;
    let before = regions.place("ap").seen().len();
    regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Hangs));
    let opened = tokio::spawn(async move { Grpc::call(&acme, STREAM, &[], request("double", "0", "plain")).await });
    let streams = |place: &Place| place.sidecars.iter().map(Sidecar::streams).sum::<usize>();
    until("a pod has it", async || streams(regions.place("us")) == 1).await;
    regions.kill_pods("us");
    let answer = opened.await.unwrap();
    assert_eq!((answer.status, &*answer.code), (Code::Unavailable as i32, "pod-lost"), "{answer:?}");
    let ap = regions.place("ap");
    assert_eq!((streams(ap), ap.seen().len()), (0, before));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_class_is_shed_here_goes_to_another_region() {
    let regions = two().await;
    let eu = regions.place("eu");
    eu.sidecars.iter().for_each(|pod| pod.slow_down(1, Duration::from_millis(60)));
    // Those of globex stay.
    let (globex, acme) = (Arc::new(regions.client("eu", "globex").await), regions.client("eu", "acme").await);
    let mut load = tokio::task::JoinSet::new();
    for caller in 0..90 {
        let globex = globex.clone();
        load.spawn(async move {
            loop {
                call(&globex, "double", &format!("e{caller}")).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    let mut low: ModelInferRequest = Message::decode(request("double", "7", "plain").slice(5..)).unwrap();
    let priority = InferParameter { parameter_choice: Some(infer_parameter::ParameterChoice::Int64Param(9)) };
    low.parameters.insert("priority".to_owned(), priority);
    let labels = ["region=\"us\"", "reason=\"shed\"", "outcome=\"answered\""];
    until("one goes on", async || {
        let answer = Grpc::call(&acme, STREAM, &[], frame(&low)).await;
        assert_eq!((answer.status, &*answer.code), (0, ""), "{answer:?}");
        eu.metric("spillway_gateway_spilled_total", &labels).await > 0
    })
    .await;
    load.abort_all();
    assert!(regions.place("us").seen().iter().all(|seen| seen.metadata["x-spillway-tenant"] == "acme"));
}
