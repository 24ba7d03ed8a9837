//! When another region is asked, and what becomes of its answer.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_whose_pods_die_is_answered_by_its_peer() {
    let mut regions = two().await;
    let (eu, counts) =
        (Arc::new(regions.client("eu", "acme").await), Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]));
    let mut clients = tokio::task::JoinSet::new();
    let most = Arc::new(AtomicUsize::new(usize::MAX));
    for client in 0..4 {
        let (eu, counts, most) = (eu.clone(), counts.clone(), most.clone());
        clients.spawn(async move {
            for number in 0.. {
                if counts[0].load(Ordering::SeqCst) >= most.load(Ordering::SeqCst) {
                    return;
                }
                let answer = call(&eu, "double", &format!("e{client}-{number}")).await;
                counts[usize::from(answer.status != 0)].fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(8)).await;
            }
        });
    }
    until("they are answered here", async || counts[0].load(Ordering::SeqCst) >= 100).await;
    regions.kill_pods("eu");
    most.store(counts[0].load(Ordering::SeqCst) + 1_000, Ordering::SeqCst);
    let all = async { while clients.join_next().await.is_some() {} };
    tokio::time::timeout(SECOND * 60, all).await.expect("a thousand answers");
    let [good, bad] = [0, 1].map(|at| counts[at].load(Ordering::SeqCst));
    println!("{good} answered, {bad} failed");
    assert!(bad * 100 <= good + bad, "{good} answered, {bad} failed");

    let answer = call(&eu, "double", "plain").await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    let message: ModelInferResponse = answer.decode();
    assert_eq!(message.id, "7");
    let seen = regions.place("us").seen();
    assert!(seen.len() >= 1_000 && seen.iter().all(|seen| seen.metadata["x-spillway-tenant"] == "acme"));
    assert!(seen.iter().all(|seen| !seen.metadata.contains_key("spillway-forwarded")));

    let body = br#"{"id":"r","inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1.5,-2]}],"parameters":{"entity_id":"plain"}}"#;
    let mut rest = Http1::to(
        &regions.place("eu").id(0),
        regions.place("eu").gateways[0].https,
        &regions.workload("tenant/acme/client/web"),
    )
    .await
    .unwrap();
    let headers = ["content-type: application/json", "x-request-id: told-apart"];
    let answer = rest.exchange(&h1_request("POST", "/v2/models/double/infer", &headers, body)).await;
    assert_eq!((answer.status, answer.header("spillway-region")), (200, "us"), "{answer:?}");
    assert_eq!(answer.json()["outputs"][0]["data"], serde_json::json!([3.0, -4.0]));
    assert!(answer.header("server-timing").contains("model;dur="), "{answer:?}");
    // The tenant's limits were asked here, and not there again.
    assert!(!answer.header("ratelimit").is_empty());

    let (eu, us) = (regions.place("eu"), regions.place("us"));
    let line = eu.logged("told-apart").await;
    assert_eq!(
        (&line["spilled"], &line["tenant"], &line["pod"]),
        (&"us".into(), &"acme".into(), &serde_json::Value::Null)
    );
    let line = us.logged("told-apart").await;
    assert_eq!((&line["forwarded"], &line["tenant"], &line["client"]), (&"eu".into(), &"acme".into(), &"web".into()));
    assert_eq!(
        (&line["method"], &line["limit"], &line["class"]),
        (&"forwarded".into(), &serde_json::Value::Null, &"normal".into())
    );
    assert!(eu.metric("spillway_gateway_spilled_total", &["region=\"us\"", "outcome=\"answered\""]).await > 100);
    assert!(us.metric("spillway_gateway_forwarded_total", &["region=\"eu\"", "outcome=\"answered\""]).await > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn residence_is_a_promise() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let globex = regions.client("eu", "globex").await;
    until("its pods are known to be gone", async || call(&globex, "double", "a").await.code == "no-pod").await;
    assert!(regions.place("us").seen().is_empty());
    let eu = regions.place("eu");
    assert!(eu.metric("spillway_gateway_no_peer_total", &["reason=\"residence\""]).await > 0);

    // Those of initech may leave for us, and for no other region.
    let initech = regions.client("eu", "initech").await;
    assert_eq!(call(&initech, "double", "a").await.answer.header("spillway-region"), "us");
    regions.publish_and_wait(3, &[("mayLeaveRegion: [us]", "mayLeaveRegion: [eu]")]).await;
    until("its thread has the snapshot", async || call(&initech, "double", "a").await.code == "no-pod").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_is_served_elsewhere_alone_is_answered_from_there() {
    let regions = two().await;
    let eu = regions.client("eu", "acme").await;
    let answer = call(&eu, "abroad", "a").await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    let globex = regions.client("eu", "globex").await;
    assert_eq!(call(&globex, "abroad", "a").await.code, "no-pod");
    let labels = ["reason=\"no-pool\"", "outcome=\"answered\""];
    assert_eq!(regions.place("eu").metric("spillway_gateway_spilled_total", &labels).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_border_is_the_most() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    regions.kill_pods("us");
    let eu = regions.client("eu", "acme").await;
    let began = Instant::now();
    let answer = call(&eu, "double", "a").await;
    assert_eq!(answer.code, "no-pod", "{answer:?}");
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    until("the peer's refusal is counted", async || {
        let us = regions.place("us");
        us.metric("spillway_gateway_no_peer_total", &["reason=\"forwarded\""]).await == 1
    })
    .await;
    assert_eq!(regions.place("us").metric("spillway_gateway_spilled_total", &[]).await, 0);
    assert_eq!(regions.place("eu").metric("spillway_gateway_forwarded_total", &[]).await, 0);
    // What it said is remembered: a request that comes soon is not sent there.
    let metric = |name: &'static str, label: &'static str| async { regions.place("eu").metric(name, &[label]).await };
    until("it is not asked again", async || {
        let sent = metric("spillway_gateway_spilled_total", "outcome=\"overloaded\"").await;
        assert_eq!(call(&eu, "double", "a").await.code, "no-pod");
        let is_same = metric("spillway_gateway_spilled_total", "outcome=\"overloaded\"").await == sent;
        is_same && metric("spillway_gateway_no_peer_total", "reason=\"full\"").await > 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_a_peer_come_before_degraded_ones_and_are_not_kept() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    for _ in 0..2 {
        let answer = call(&eu, "kept", "plain").await;
        assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
        assert_eq!(answer.answer.header("spillway-degraded"), "");
        assert_eq!(answer.answer.header("cache-status"), "spillway; fwd=miss");
    }
    // The peer keeps it in its own cache, where its own feature changes are heard.
    assert_eq!(regions.place("us").seen().len(), 1);
    let answer = call(&eu, "kept", "plain").await;
    assert!(answer.answer.header("age").parse::<u64>().is_ok(), "{answer:?}");

    regions.kill_pods("us");
    let answer = call(&eu, "kept", "plain-2").await;
    assert_eq!(answer.answer.header("spillway-degraded"), "4 static-answer", "{answer:?}");
    assert_eq!(answer.answer.header("spillway-region"), "eu");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_level_2_the_whole_answer_of_a_peer_comes_before_the_fallback_models() {
    let mut regions = two().await;
    let (globex, acme) = (regions.client("eu", "globex").await, regions.client("eu", "acme").await);
    // Those of globex stay, so that only this region hears how slow its model is.
    let level = || async { regions.place("eu").metric("spillway_gateway_degradation_level", &["laddered"]).await };
    let began = Instant::now();
    while level().await != 2 {
        for _ in 0..10 {
            assert_eq!(call(&globex, "laddered", "slow").await.answer.header("spillway-region"), "eu");
        }
        assert!(began.elapsed() < SECOND * 30, "level 2 never came");
    }
    let degraded = |answer: &Grpc| answer.answer.header("spillway-degraded").to_owned();
    until("the level is served", async || degraded(&call(&globex, "laddered", "plain").await) == "2 fallback-model")
        .await;
    // 2 % find out whether the model has healed.
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(call(&acme, "laddered", "plain").await);
    }
    assert!(answers.iter().all(|answer| degraded(answer).is_empty()), "{answers:?}");
    assert!(answers.iter().filter(|answer| answer.answer.header("spillway-region") == "us").count() >= 18);

    regions.kill_pods("us");
    until("it is as good as here, or worse", async || {
        degraded(&call(&acme, "laddered", "plain").await) == "2 fallback-model"
    })
    .await;
    let labels = ["reason=\"degraded\"", "outcome=\"overloaded\""];
    assert_eq!(regions.place("eu").metric("spillway_gateway_spilled_total", &labels).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_overloaded_or_refuses_leaves_the_answer_to_the_origin() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    for (status, code, outcome) in [
        (Code::ResourceExhausted, "model-overloaded", "overloaded"),
        (Code::Unavailable, "model-unavailable", "overloaded"),
        (Code::Internal, "model-failed", "failed"),
    ] {
        regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Refuses(status, code)));
        let sent = || async { regions.place("eu").metric("spillway_gateway_spilled_total", &[outcome]).await };
        let before = sent().await;
        until("it is asked again", async || {
            assert_eq!(call(&eu, "double", "a").await.code, "no-pod");
            let answer = call(&eu, "kept", "plain").await;
            assert_eq!(answer.answer.header("spillway-degraded"), "4 static-answer", "{answer:?}");
            sent().await > before
        })
        .await;
    }
    // What is wrong with a request is told as the peer tells it.
    regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Well));
    until("it is asked again", async || call(&eu, "double", "a").await.status == 0).await;
    assert_eq!(call(&eu, "double", "missing").await.code, "missing-feature");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_at_its_bound_in_the_peer_leaves_that_to_others() {
    let regions = two().await;
    let (there, here) = (regions.client("us", "single").await, regions.client("eu", "single").await);
    let acme = regions.client("eu", "acme").await;
    let us = regions.place("us");
    let hangs = tokio::spawn(async move { call(&there, "abroad", "hangs").await });
    until("it has all that it may have", async || us.seen().len() == 1).await;
    let answer = call(&here, "abroad", "a").await;
    assert_eq!(answer.code, "no-pod", "{answer:?}");
    assert_eq!(answer.answer.header("spillway-refusal-concerns"), "", "clients are not told");
    let answer = call(&acme, "abroad", "a").await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    assert_eq!(us.metric("spillway_gateway_gate_refused_total", &["reason=\"tenant-full\""]).await, 1);
    let eu = regions.place("eu");
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &["outcome=\"tenant-full\""]).await, 1);
    hangs.abort();
    until("it may again", async || call(&here, "abroad", "a").await.status == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenants_bound_holds_for_what_is_with_another_region() {
    let regions = two().await;
    let (single, acme) = (Arc::new(regions.client("eu", "single").await), regions.client("eu", "acme").await);
    let (us, eu) = (regions.place("us"), regions.place("eu"));
    let own = single.clone();
    let hangs = tokio::spawn(async move { call(&own, "abroad", "hangs").await });
    until("it is there", async || us.seen().len() == 1).await;
    assert_eq!(call(&single, "abroad", "a").await.code, "no-pod");
    let labels = ["cause=\"no-pool\"", "reason=\"tenant-full\""];
    assert_eq!(eu.metric("spillway_gateway_no_peer_total", &labels).await, 1);
    assert_eq!(call(&acme, "abroad", "a").await.status, 0);
    hangs.abort();
    until("it may again", async || call(&single, "abroad", "a").await.status == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_pods_of_the_peer_do_not_survive_goes_to_no_other_region() {
    let (regions, acme) = three().await;
    let (us, ap) = (regions.place("us"), regions.place("ap"));
    let before = ap.seen().len();
    us.sidecars.iter().for_each(|pod| pod.behave(Manner::Resets));
    assert_eq!(call(&acme, "double", "a").await.code, "no-pod");
    us.sidecars.iter().for_each(|pod| pod.behave(Manner::Well));
    // Nor does it cost others the region.
    let initech = regions.client("eu", "initech").await;
    let answer = call(&initech, "double", "a").await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    assert_eq!(ap.seen().len(), before);
    let labels = ["region=\"us\"", "outcome=\"failed\""];
    assert_eq!(regions.place("eu").metric("spillway_gateway_spilled_total", &labels).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deadline_holds_across_regions() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    until("it goes on", async || call(&eu, "double", "a").await.status == 0).await;
    regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Hangs));
    let began = Instant::now();
    let answer = Grpc::call(&eu, INFER, &[("grpc-timeout", "300m")], request("double", "7", "a")).await;
    let took = began.elapsed();
    assert!(answer.status == Code::DeadlineExceeded as i32 || answer.code == "no-pod", "{answer:?}");
    assert!(took >= Duration::from_millis(250) && took < DEADLINE, "{took:?}");
    until("the peer's pod was let go", async || {
        regions.place("us").sidecars.iter().map(Sidecar::cancelled).sum::<usize>() > 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_of_the_peer_that_is_gone_is_passed_over() {
    let mut regions = Regions::start(&["eu", "us"], 2, MORE).await;
    regions.kill_pods("eu");
    let eu = regions.client("eu", "acme").await;
    until("both are asked", async || {
        call(&eu, "double", "a").await;
        let mut asked = 0;
        for gateway in &regions.place("us").gateways {
            let line = "spillway_gateway_forwarded_total{region=\"eu\",outcome=\"answered\"}";
            asked += usize::from(metric_of(gateway.admin, line).await > 0);
        }
        asked == 2
    })
    .await;
    let us = regions.places.iter_mut().find(|place| place.name == "us").unwrap();
    let gone = us.gateways.remove(0);
    us.drains[0].start();
    let ended = tokio::spawn(gone.finish());
    for _ in 0..100 {
        let answer = call(&eu, "double", "a").await;
        assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    ended.await.unwrap();
    for _ in 0..20 {
        assert_eq!(call(&eu, "double", "a").await.status, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_plan_has_no_room_for_is_refused_and_who_is_out_is_not_asked() {
    let mut regions = two().await;
    let name = |text| Name::parse(text).unwrap();
    // us is lost; eu carries what it can, and a quarter of all fits nowhere: the lowest of four equal classes.
    let region = |share| Region { planned: 100.0, share, capacity: Some(150.0), load: Some(100.0), overridden: None };
    let of = BTreeMap::from([(name("eu"), region(1.0)), (name("us"), region(0.0))]);
    let plan = Plan::of(5, &of, &Traffic { demand: None, classes: [1.0; 4] }, Duration::ZERO).unwrap();
    let standings = BTreeMap::from([(name("us"), (Standing::Out, "gone".to_owned()))]);
    let (gateway, drain) = regions.resumed("eu", &Published { epoch: 1, plan, standings }).await;
    let as_whom = regions.workload("tenant/acme/client/web");
    let http2 = Http2::to("spiffe://spillway.test/region/eu/gateway/gw-7", gateway.https, &as_whom).await.unwrap();
    let of_priority = async |priority: i64| {
        let mut message: ModelInferRequest = Message::decode(request("double", "7", "plain").slice(5..)).unwrap();
        let choice = Some(infer_parameter::ParameterChoice::Int64Param(priority));
        message.parameters.insert("priority".to_owned(), InferParameter { parameter_choice: choice });
        Grpc::call(&http2, INFER, &[], frame(&message)).await
    };
    for _ in 0..10 {
        assert_eq!(of_priority(3).await.status, 0);
        let low = of_priority(4).await;
        assert_eq!((&*low.code, low.status), ("overloaded", Code::Unavailable as i32), "{low:?}");
        assert!(!low.answer.header("grpc-retry-pushback-ms").is_empty());
    }
    let metric = async |line: &str| metric_of(gateway.admin, line).await;
    assert_eq!(metric("spillway_gateway_gate_refused_total{reason=\"planned\"}").await, 10);
    let text = ask_admin(gateway.admin, "GET", "/metrics", "").await;
    assert!(text.contains("spillway_capacity_factor{region=\"eu\"} 1.5"), "{text}");
    assert!(!text.contains("spillway_gateway_spilled_total{"), "what is shed by plan is not sent on: {text}");

    // It could be reached, but the plan says that it is out.
    regions.kill_pods("eu");
    until("its pods are known to be gone", async || of_priority(3).await.code == "no-pod").await;
    let text = ask_admin(gateway.admin, "GET", "/metrics", "").await;
    let stayed = text.lines().filter(|line| line.starts_with("spillway_gateway_no_peer_total{"));
    assert!(stayed.clone().count() > 0 && stayed.clone().all(|line| line.contains("reason=\"unhealthy\"")), "{text}");
    assert!(regions.place("us").seen().is_empty());
    drain.start();
    gateway.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forward_that_is_lost_has_its_region_probed_at_once() {
    let mut regions = two().await;
    regions.kill_pods("eu");
    let acme = regions.client("eu", "acme").await;
    until("it goes on", async || call(&acme, "double", "a").await.status == 0).await;
    // After a probe that failed no connection of probes is watched.
    let calls = |regions: &Regions| regions.place("us").sidecars.iter().map(Sidecar::calls).sum::<usize>();
    regions.place("us").sidecars.iter().for_each(|pod| pod.behave(Manner::Hangs));
    let eu = regions.place("eu");
    let labels = ["region=\"us\"", "outcome=\"failed\""];
    until("a probe failed", async || eu.metric("spillway_vantage_probes_total", &labels).await > 0).await;
    let nudges = eu.metric("spillway_vantage_nudges_total", &[]).await;
    let before = calls(&regions);
    let asking = tokio::spawn(async move { call(&acme, "double", "a").await });
    until("it is there", async || calls(&regions) > before).await;
    regions.place("us").drains[0].stop();
    assert_eq!(asking.await.unwrap().code, "no-pod");
    let eu = regions.place("eu");
    until("its probe is hurried", async || eu.metric("spillway_vantage_nudges_total", &[]).await > nudges).await;
    let labels = ["region=\"us\"", "outcome=\"refused\""];
    until("it is probed", async || eu.metric("spillway_vantage_probes_total", &labels).await > 0).await;
}
