//! Token buckets seen from outside: who is refused when, and what the answers say, in both protocols.

use crate::support::*;
use bytes::Bytes;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::{InferParameter, ModelInferRequest};

const INFER: &str = "/v2/models/double/infer";
const GRPC_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

const GLOBEX: (&str, &str) = ("models: [\"double\"]\n  actions: [metadata]", "models: [\"*\"]\n  actions: [infer]");

/// What gives a tenant more lines of its spec.
fn tenant(name: &str, spec: &str) -> [String; 2] {
    let from = format!("kind: Tenant\nmetadata: {{ name: {name} }}\n");
    let to = format!("{from}spec:\n{spec}\n");
    [from, to]
}

/// Both tenants may infer.
async fn limited(specs: &[(&str, &str)]) -> World {
    let specs: Vec<_> = specs.iter().map(|(name, spec)| tenant(name, spec)).collect();
    let mut replaced: Vec<_> = specs.iter().map(|[from, to]| (&**from, &**to)).collect();
    replaced.push(GLOBEX);
    World::serving(2, &replaced, "", "").await
}

fn body(entity: &str, priority: u64) -> Vec<u8> {
    let tensor = r#"{"name":"x","datatype":"FP32","shape":[1],"data":[1]}"#;
    format!(r#"{{"parameters":{{"entity_id":"{entity}","priority":{priority}}},"inputs":[{tensor}]}}"#).into_bytes()
}

fn message(entities: &[&str]) -> Bytes {
    let elements: Vec<u8> = entities
        .iter()
        .flat_map(|entity| [&(entity.len() as u32).to_le_bytes()[..], entity.as_bytes()].concat())
        .collect();
    let rows = entities.len() as i64;
    let input = |name: &str, datatype: &str| InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: vec![rows],
        ..Default::default()
    };
    frame(&ModelInferRequest {
        model_name: "double".into(),
        inputs: vec![input("x", "FP32"), input("site", "BYTES")],
        raw_input_contents: vec![vec![0; entities.len() * 4].into(), elements.into()],
        ..Default::default()
    })
}

async fn post(http1: &mut Http1, entity: &str, priority: u64) -> Answer {
    http1.exchange(&h1_request("POST", INFER, &[], &body(entity, priority))).await
}

#[tokio::test]
async fn t55_rest_is_refused_at_the_boundary_and_told_when_to_come_back() {
    let world = limited(&[("acme", "  limits: [{ name: all, per: tenant, rate: 60/h, burst: 5 }]")]).await;
    let mut http1 = world.http1().await;
    for left in (0..5).rev() {
        let answer = post(&mut http1, "a", 0).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("ratelimit-policy"), "\"all\";q=5;w=300");
        assert!(answer.header("ratelimit").starts_with(&format!("\"all\";r={left};t=")), "{answer:?}");
    }
    let answer = post(&mut http1, "a", 0).await;
    assert_eq!((answer.status, answer.header("spillway-error")), (429, "rate-limited"));
    let wait: u64 = answer.header("retry-after").parse().unwrap();
    assert!((50..=60).contains(&wait), "{wait}");
    assert_eq!(answer.header("ratelimit"), format!("\"all\";r=0;t={wait}"));
    assert!(answer.json()["error"].as_str().unwrap().starts_with("the limit 'all' is reached; again in "));
    assert_eq!(world.metric("spillway_gateway_limited_total{per=\"tenant\"}").await, 1);
    assert_eq!(world.rejected("rate-limited").await, 1);
    assert_eq!(world.seen().len(), 5, "no pod saw the sixth");

    // Metadata is not counted, and other tenants have no such headers.
    let answer = http1.exchange(&h1_request("GET", "/v2/models/double", &[], b"")).await;
    assert_eq!(answer.status, 200);
    let mut other = Http1::connect(world.gateway.https, &world.client("globex")).await.unwrap();
    let answer = post(&mut other, "a", 0).await;
    assert_eq!((answer.status, answer.headers.get("ratelimit")), (200, None));

    let acme = world.config("/admission/tenants/acme/limits/0").await;
    assert_eq!(
        (&acme["name"], &acme["burst"], &acme["buckets"][0]["remaining"]),
        (&"all".into(), &5.into(), &0.into())
    );
    assert_eq!(world.config("/admission/models/double/inFlight").await, 0);

    // The state survives a Snapshot: a burst that was all used still is.
    let [from, to] = tenant("acme", "  limits: [{ name: all, per: tenant, rate: 60/h, burst: 10 }]");
    world.publish(2, &[(&from, &to), GLOBEX]).await;
    until("the new limit holds", async || {
        let answer = post(&mut http1, "a", 0).await;
        assert_eq!(answer.status, 429);
        answer.header("ratelimit-policy") == "\"all\";q=10;w=600"
    })
    .await;
    world.publish(3, &[GLOBEX]).await;
    until("there is no limit any more", async || post(&mut http1, "a", 0).await.status == 200).await;
    world.stop().await;
}

#[tokio::test]
async fn t55_connections_on_all_threads_share_one_bucket() {
    let world = limited(&[("acme", "  limits: [{ name: all, per: tenant, rate: 1/h, burst: 100 }]")]).await;
    let client = world.client("acme");
    let tasks = (0..8).map(|_| {
        let (client, address) = (client.clone(), world.gateway.https);
        tokio::spawn(async move {
            let mut http1 = Http1::connect(address, &client).await.unwrap();
            let mut admitted = 0;
            for _ in 0..40 {
                admitted += usize::from(post(&mut http1, "a", 0).await.status == 200);
            }
            admitted
        })
    });
    let admitted: Vec<usize> =
        futures_util::future::join_all(tasks).await.into_iter().map(|count| count.unwrap()).collect();
    assert_eq!(admitted.iter().sum::<usize>(), 100, "{admitted:?}");
    world.stop().await;
}

#[tokio::test]
async fn two_gateways_of_a_region_share_a_quota() {
    let redis = RedisServer::start();
    let settings = format!("redis: {{servers: ['{}']}}\nquota: {{term: 100ms, gateways: 2}}", redis.address());
    let [from, to] = tenant("acme", "  limits: [{ name: all, per: tenant, rate: 160/h, burst: 160, scope: region }]");
    let world = World::serving(1, &[(&from, &to)], &settings, "").await;
    // Two gateways of one name would be one to Redis.
    let other = world.named("gw-1", &settings).await;
    let client = world.client("acme");
    let mut http1 = world.http1().await;
    assert_eq!(post(&mut http1, "a", 0).await.header("ratelimit-policy"), "\"all\";q=160;w=3600", "that of the region");
    let share = async || world.config("/admission/tenants/acme/limits/0/buckets/0/share").await;
    until("the first has all of it", async || share().await["rate"].as_f64() > Some(0.04)).await;
    let gateway = "spiffe://spillway.test/region/eu/gateway/gw-1";
    let mut second = Http1::to(gateway, other.https, &client).await.unwrap();
    let mut admitted = 1;
    while post(&mut second, "a", 0).await.status == 200 {
        admitted += 1;
    }
    until("both are leased, and the second has more", async || share().await["rate"].as_f64() < Some(0.03)).await;
    while post(&mut http1, "a", 0).await.status == 200 {
        admitted += 1;
    }
    // The bound from when the first was leased, with j = 1 and σ = 1/16: 160 x 17/16 + 10 + 2 x 1, and some seconds of
    // 160 an hour. It may be far less: the second's floor is 10, and tokens that the first gives up are nobody's.
    assert!((11..=184).contains(&admitted), "{admitted}");
    until("it is counted", async || metric_of(other.admin, "spillway_gateway_quotas").await == 1).await;
    redis.kill();
    until("both say so", async || {
        let line = "spillway_gateway_quota_local";
        world.metric(line).await == 1 && metric_of(other.admin, line).await == 1
    })
    .await;
    assert_eq!(share().await["standing"], "local");
    world.stop().await;
}

#[tokio::test]
async fn grpc_is_refused_with_a_pushback() {
    let limits = "  limits:\n    - { name: rows, per: model, of: cost, rate: 60/h, burst: 5 }\n    - { name: each, per: entity, rate: 60/h, burst: 3 }";
    let [from, to] = tenant("acme", limits);
    let model = "metadata: { name: double }\nspec:\n";
    let costs = format!("{model}  cost: {{ request: 0, row: 1 }}\n");
    let world = World::serving(2, &[(&from, &to), (model, &costs)], "", "").await;
    let http2 = world.http2().await;
    let call = async |entities: &[&str]| Grpc::call(&http2, GRPC_INFER, &[], message(entities)).await;

    let first = call(&["a", "b", "a"]).await;
    assert_eq!((first.status, first.answer.header("ratelimit-policy")), (0, "\"rows\";q=5;w=300"), "{first:?}");
    assert!(first.answer.header("ratelimit").starts_with("\"rows\";r=2;t="), "{first:?}");
    let entity = call(&["c", "a", "a"]).await;
    assert_eq!((entity.status, &*entity.code), (8, "rate-limited"));
    let wait: u64 = entity.answer.header("grpc-retry-pushback-ms").parse().unwrap();
    assert!((55_000..=60_000).contains(&wait), "{wait}");
    assert_eq!(entity.answer.headers.get("retry-after"), None);
    assert!(entity.answer.header("ratelimit").starts_with("\"rows\";r=2;t="), "of two that refuse, the longer wait");
    let entity = call(&["a", "a"]).await;
    assert!(entity.answer.header("ratelimit").starts_with("\"each\";r=1;t="), "{entity:?}");
    let never = call(&["a", "b", "c", "d", "e", "f"]).await;
    assert_eq!((never.status, &*never.code), (8, "rate-limit-never"));
    assert_eq!(never.answer.header("grpc-retry-pushback-ms"), "-1");
    assert_eq!(call(&["b", "a"]).await.status, 0, "what was refused took nothing");
    assert_eq!(world.metric("spillway_gateway_limited_total{per=\"model\"}").await, 2);
    assert_eq!(world.metric("spillway_gateway_limited_total{per=\"entity\"}").await, 1);
    world.stop().await;
}

#[tokio::test]
async fn a_higher_class_borrows_what_lower_ones_may_not_have() {
    let spec = "  priority: { default: normal, highest: critical }\n  limits: [{ name: all, per: tenant, rate: 1/h, burst: 10 }]";
    let world =
        limited(&[("acme", spec), ("globex", "  limits: [{ name: all, per: tenant, rate: 1/h, burst: 10 }]")]).await;
    let mut http1 = world.http1().await;
    let mut admitted = async |priority: u64| {
        let mut count = 0;
        while post(&mut http1, "a", priority).await.status == 200 {
            count += 1;
        }
        count
    };
    // Low leaves 50 %, normal 20 %, high 10 %.
    let counts = [admitted(9).await, admitted(0).await, admitted(2).await, admitted(1).await, admitted(9).await];
    assert_eq!(counts, [5, 3, 1, 1, 0]);
    // A tenant without classes above normal has the whole bucket for it, however it asks.
    let mut http1 = Http1::connect(world.gateway.https, &world.client("globex")).await.unwrap();
    let mut count = 0;
    while post(&mut http1, "a", 1).await.status == 200 {
        count += 1;
    }
    assert_eq!(count, 10);
    world.stop().await;
}

#[tokio::test]
async fn a_streams_requests_are_counted_and_the_stream_goes_on() {
    let world = limited(&[("acme", "  limits: [{ name: all, per: tenant, rate: 1/h, burst: 2 }]")]).await;
    let http2 = world.http2().await;
    let (mut stream, mut answers) = open(&http2, &[], request("double", "1", "a")).await;
    assert_eq!(answers.next().await.unwrap().infer_response.unwrap().id, "1");
    for id in ["2", "3"] {
        stream.send_data(request("double", id, "a"), false).unwrap();
    }
    // The gateway's own answer need not wait for the pod's.
    let mut two = [answers.next().await.unwrap(), answers.next().await.unwrap()];
    two.sort_by_key(|answer| answer.error_message.clone());
    assert_eq!(two[0].error_message, "");
    assert!(two[1].error_message.starts_with("the limit 'all' is reached"), "{two:?}");
    let refused = two[1].infer_response.clone().unwrap();
    let code = ParameterChoice::StringParam("rate-limited".into());
    assert_eq!(
        (&*refused.id, &refused.parameters["spillway-error"]),
        ("3", &InferParameter { parameter_choice: Some(code) })
    );
    stream.send_data(Bytes::new(), true).unwrap();
    assert!(answers.next().await.is_none());
    assert_eq!(answers.status().await.0, "0");
    world.stop().await;
}

#[tokio::test]
async fn t56_a_tenant_that_sweeps_a_million_entities_harms_nobody() {
    const BATCH: usize = 500;
    const ROUNDS: usize = 2_000;
    let limit = "  limits: [{ name: each, per: entity, rate: 1/h, burst: 2 }]";
    let world = limited(&[("acme", limit), ("globex", limit)]).await;
    let resident = async || world.metric("spillway_process_resident_memory_bytes").await;
    let before = resident().await;
    let (client, address) = (world.client("acme"), world.gateway.https);
    let sweeps = (0..4).map(|sweep| {
        let client = client.clone();
        tokio::spawn(async move {
            let http2 = Http2::connect(address, &client).await.unwrap();
            let mut refused = 0;
            for round in (sweep..ROUNDS).step_by(4) {
                let entities: Vec<String> = (0..BATCH).map(|index| format!("e{}", round * BATCH + index)).collect();
                let entities: Vec<&str> = entities.iter().map(String::as_str).collect();
                let answer = Grpc::call(&http2, GRPC_INFER, &[], message(&entities)).await;
                assert!([0, 8].contains(&answer.status), "{answer:?}");
                refused += usize::from(answer.status == 8);
            }
            refused
        })
    });
    let refused: usize = futures_util::future::join_all(sweeps).await.into_iter().map(|count| count.unwrap()).sum();
    // Half of the places, 917,504, are one tenant's; a batch of which one entity finds none is refused.
    assert!((1..ROUNDS / 3).contains(&refused), "{refused}");
    until("the keys are counted", async || world.metric("spillway_gateway_limit_keys").await > 500_000).await;
    assert!(world.metric("spillway_gateway_limit_keys").await <= 917_504);
    assert!(world.metric("spillway_gateway_limit_overflowed_total").await > 0);
    let grown = resident().await.saturating_sub(before);
    assert!(grown < 150 << 20, "{grown} bytes");
    let mut other = Http1::connect(address, &world.client("globex")).await.unwrap();
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(post(&mut other, "e999999", 0).await.status);
    }
    assert_eq!(statuses, [200, 200, 429]);
    world.stop().await;
}
