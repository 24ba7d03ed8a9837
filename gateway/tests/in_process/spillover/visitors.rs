//! Other regions' gateways that speak for clients, and those that only ask whether a region is well.

use super::*;

/// What a gateway of `eu` says of a client's request to `us`.
fn passage() -> Passage {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let now = Duration::from_millis(u64::try_from(now.as_millis()).unwrap());
    let name = |text| Name::parse(text).unwrap();
    Passage {
        client: id("spiffe://spillway.test/tenant/acme/client/web"),
        serial: Serial::parse("0a").unwrap(),
        not_after: now + SECOND * 60,
        class: Class::Normal,
        from: name("eu"),
        to: name("us"),
        path: INFER.to_owned(),
        request_id: "forged".to_owned(),
        issued: now,
        expires: now + SECOND * 5,
        hops: 1,
    }
}

async fn forward(http2: &Http2, token: &str) -> Grpc {
    Grpc::call(http2, INFER, &[("spillway-forwarded", token)], request("double", "7", "plain")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t21_only_another_regions_gateway_speaks_for_a_client() {
    let revoked = "---\n{apiVersion: spillway/v1, kind: Revocation, metadata: {name: lost}, spec: {serials: ['0b']}}\n";
    let regions = Regions::start(&["eu", "us"], 1, &(MORE.to_owned() + revoked)).await;
    let gateway = regions.workload("region/eu/gateway/gw-9");
    let from_eu = regions.connect("us", 0, &gateway).await;
    let token = |passage: Passage| issue(&gateway, &passage).unwrap();

    let answer = forward(&from_eu, &token(passage())).await;
    assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "us"), "{answer:?}");
    assert_eq!(answer.answer.header("x-request-id"), "forged");

    let good = passage();
    let other = regions.workload("region/eu/gateway/gw-8");
    for (token, code) in [
        (issue(&other, &good).unwrap(), "forwarded-unsigned"),
        (token(good.clone()).replace(" normal ", " critical "), "forwarded-unsigned"),
        ("1 nonsense".to_owned(), "forwarded-unreadable"),
        (token(Passage { from: Name::parse("us").unwrap(), ..good.clone() }), "forwarded-by-stranger"),
        (token(Passage { to: Name::parse("eu").unwrap(), ..good.clone() }), "forwarded-elsewhere"),
        (token(Passage { path: "/v2/models/double/infer".into(), ..good.clone() }), "forwarded-elsewhere"),
        (token(Passage { hops: 2, ..good.clone() }), "forwarded-twice"),
        (
            token(Passage { issued: good.issued - SECOND * 60, expires: good.expires - SECOND * 60, ..good.clone() }),
            "forwarded-stale",
        ),
        (token(Passage { expires: good.expires + SECOND * 60, ..good.clone() }), "forwarded-stale"),
        (token(Passage { serial: Serial::parse("0b").unwrap(), ..good.clone() }), "forwarded-untrusted"),
        (token(Passage { not_after: good.issued - SECOND, ..good.clone() }), "forwarded-untrusted"),
        (
            token(Passage { client: id("spiffe://spillway.test/tenant/globex/client/web"), ..good.clone() }),
            "forwarded-residence",
        ),
        (
            token(Passage { client: id("spiffe://spillway.test/tenant/nobody/client/web"), ..good.clone() }),
            "unknown-tenant",
        ),
        (token(Passage { client: gateway.id(), ..good.clone() }), "not-a-client"),
    ] {
        let answer = forward(&from_eu, &token).await;
        assert_eq!((answer.status, &*answer.code), (Code::PermissionDenied as i32, code), "{token}");
    }
    assert_eq!(regions.place("us").seen().len(), 1, "only the good one reached a pod");
    let us = regions.place("us");
    let line = us.audited("forwarded-unsigned").await.to_string();
    assert!(line.contains("region/eu/gateway/gw-9"), "{line}");
    assert_eq!(us.metric("spillway_gateway_rejected_total", &["forwarded-unsigned"]).await, 2);

    // The same words over other connections: of a client they mean nothing, of others nobody is let through.
    let token = token(passage());
    let client = regions.client("us", "globex").await;
    let answer = forward(&client, &token).await;
    assert_eq!(answer.status, 0, "{answer:?}");
    assert_eq!(us.seen().last().unwrap().metadata["x-spillway-tenant"], "globex");
    for path in [
        "region/us/gateway/gw-9",
        "region/mars/gateway/gw-9",
        "region/eu/control/c-0",
        "region/eu/dns/d-0",
        "region/eu/sidecar/scorers-eu/pod-0",
    ] {
        let stranger = regions.workload(path);
        let http2 = regions.connect("us", 0, &stranger).await;
        let answer = forward(&http2, &issue(&stranger, &passage()).unwrap()).await;
        assert!(["forwarded-by-stranger", "not-a-client"].contains(&&*answer.code), "{path}: {answer:?}");
    }
    // A gateway's own requests are refused as ever, whatever it asks for.
    let answer = call(&from_eu, "double", "plain").await;
    assert_eq!(answer.code, "not-a-client");
    for (method, path) in [("GET", "/v2"), ("GET", "/v2/models/double"), ("POST", "/v2/models/double/infer")] {
        let answer =
            from_eu.exchange(Http2::request(method, path, &[("spillway-forwarded", &token)]), bytes::Bytes::new());
        assert_eq!(answer.await.unwrap().status, 403, "{path}");
    }
    // A stream has a passage of its own, and its client is judged for as long as it lasts.
    let streamed = async |token: &str| {
        Grpc::call(&from_eu, STREAM, &[("spillway-forwarded", token)], request("double", "7", "plain")).await
    };
    assert_eq!(streamed(&token).await.code, "forwarded-elsewhere");
    let own = issue(&gateway, &Passage { path: STREAM.to_owned(), ..passage() }).unwrap();
    assert_eq!(streamed(&own).await.status, 0);
    assert_eq!(forward(&from_eu, &own).await.code, "forwarded-elsewhere");
    let answer = Grpc::call(&from_eu, STREAM, &[("spillway-probe", "1")], request("double", "7", "plain")).await;
    assert_eq!(answer.code, "not-a-client");
    let (mut stream, mut answers) =
        open(&from_eu, &[("spillway-forwarded", &own)], request("double", "0", "plain")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "0");
    regions.publish_and_wait(3, &[("serials: ['0b']", "serials: ['0a']")]).await;
    until("its thread has the snapshot", async || forward(&from_eu, &token).await.code == "forwarded-untrusted").await;
    let seen = regions.place("us").seen().len();
    stream.send_data(request("double", "1", "plain"), false).unwrap();
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await, ("7".into(), "forwarded-untrusted".into()));
    assert_eq!(regions.place("us").seen().len(), seen);
}

const READY: &str = "/inference.GRPCInferenceService/ServerReady";

async fn probe(http2: &Http2, model: &str) -> Grpc {
    Grpc::call(http2, INFER, &[("spillway-probe", "1")], request(model, "asked", "plain")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_ask_the_region_itself_and_are_nobodys_traffic() {
    let mut regions = two().await;
    let gateway = regions.workload("region/us/gateway/gw-9");
    let others = ["region/us/control/c-0", "region/us/dns/d-0"].map(|path| regions.workload(path));
    for prober in [&gateway].into_iter().chain(&others) {
        let http2 = regions.connect("eu", 0, prober).await;
        let answer = probe(&http2, "double").await;
        assert_eq!((answer.status, answer.answer.header("spillway-region")), (0, "eu"), "{answer:?}");
        assert_eq!(answer.answer.header("ratelimit"), "");
        // Of tier 2, and not there at all.
        assert_eq!(probe(&http2, "kept").await.code, "unknown-model");
        assert_eq!(probe(&http2, "gone").await.code, "unknown-model");
        let empty = || bytes::Bytes::from_static(&[0; 5]);
        let ready = Grpc::call(&http2, READY, &[("spillway-probe", "1")], empty()).await;
        assert_eq!((ready.status, &ready.answer.body[5..]), (0, &[8, 1][..]), "ready: true");
        assert_eq!(Grpc::call(&http2, READY, &[], empty()).await.code, "not-a-client");
        for (name, value) in [("spillway-probe", "0"), ("spillway-probe", "yes"), ("x-spillway-probe", "1")] {
            let answer = Grpc::call(&http2, INFER, &[(name, value)], request("double", "7", "plain")).await;
            assert_eq!(answer.code, "not-a-client", "{name}: {value}");
        }
    }
    let eu = regions.place("eu");
    let requests = eu.metric("spillway_gateway_requests_total", &["code=\"0\""]).await;
    assert_eq!(requests, 0, "no client asked");
    // And the other region's gateway probes, too.
    assert!(eu.metric("spillway_gateway_probes_total", &["outcome=\"answered\""]).await >= 6);
    assert_eq!(eu.seen().iter().filter(|seen| seen.message.id == "asked").count(), 3);
    assert_eq!(eu.metric("spillway_gateway_probes_total", &["outcome=\"unknown-model\""]).await, 6);
    assert!(eu.seen().iter().all(|seen| !seen.metadata.contains_key("x-spillway-tenant")));

    // A client that says so is no prober: its limits count.
    let client = regions.client("eu", "acme").await;
    let answer = probe(&client, "double").await;
    assert!(answer.status == 0 && !answer.answer.header("ratelimit").is_empty(), "{answer:?}");

    regions.kill_pods("eu");
    let http2 = regions.connect("eu", 0, &gateway).await;
    until("clients are answered by the peer", async || {
        call(&client, "double", "a").await.answer.header("spillway-region") == "us"
    })
    .await;
    let before = regions.place("us").seen().len();
    assert_eq!(probe(&http2, "double").await.code, "no-pod", "the region itself cannot");
    assert_eq!(regions.place("us").seen().len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_pods_is_ready_while_another_region_can_answer_and_down_for_those_who_probe_it() {
    let mut regions = two().await;
    let client = regions.client("eu", "acme").await;
    let prober = regions.connect("eu", 0, &regions.workload("region/us/gateway/gw-9")).await;
    regions.kill_pods("eu");
    let eu = regions.place("eu");
    until("its pods are known to be gone", async || eu.metric("spillway_gateway_pods_unhealthy", &[]).await == 2).await;
    let page = async || ask_admin(eu.gateways[0].admin, "GET", "/readyz", "").await;
    assert!(page().await.starts_with("HTTP/1.1 200"), "{}", page().await);
    let health = async || client.exchange(Http2::request("GET", "/v2/health/ready", &[]), bytes::Bytes::new()).await;
    assert_eq!(health().await.unwrap().status, 200);
    let ready = async |http2: &Http2, headers: &[(&str, &str)]| {
        let answer = Grpc::call(http2, READY, headers, bytes::Bytes::from_static(&[0; 5])).await;
        assert_eq!(answer.status, 0, "{answer:?}");
        ServerReadyResponse::decode(&answer.answer.body[5..]).unwrap().ready
    };
    assert!(ready(&client, &[]).await);
    assert!(!ready(&prober, &[("spillway-probe", "1")]).await, "the region itself is not");
    assert_eq!(probe(&prober, "double").await.code, "no-pod");
    assert!(regions.place("us").seen().is_empty(), "no probe was sent on");
    assert_eq!(eu.metric("spillway_gateway_spilled_total", &[]).await, 0);

    // Nobody's requests may leave: then there is nobody to answer.
    regions
        .publish_and_wait(
            3,
            &[("mayLeaveRegion: true", "mayLeaveRegion: false"), ("mayLeaveRegion: [us]", "mayLeaveRegion: false")],
        )
        .await;
    until("it is not ready", async || page().await.starts_with("HTTP/1.1 503")).await;
    assert!(page().await.contains("no other region can be asked"), "{}", page().await);
    assert_eq!(health().await.unwrap().status, 503);
    regions.publish_and_wait(4, &[]).await;
    until("it is ready again", async || page().await.starts_with("HTTP/1.1 200")).await;
    // The other region's gateway is gone.
    let place = regions.places.iter_mut().find(|place| place.name == "us").unwrap();
    let gone = place.gateways.remove(0);
    place.drains[0].start();
    gone.finish().await;
    let eu = regions.place("eu");
    until("it is not ready", async || {
        ask_admin(eu.gateways[0].admin, "GET", "/readyz", "").await.starts_with("HTTP/1.1 503")
    })
    .await;
}
