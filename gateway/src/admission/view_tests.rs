use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use spillway_core::inference::{Entities, InferRequest, Parameter, Parameters};
use spillway_core::resource::{self, Model};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::telemetry::Metrics;

use super::*;
use crate::admission::gate::Place;
use crate::clock::Clock;
use crate::settings::QuotaSettings;

const RESOURCES: &str = "
{apiVersion: spillway/v1, kind: Region, metadata: {name: eu}, spec: {trustDomain: td}}
---
apiVersion: spillway/v1
kind: Tenant
metadata: {name: acme}
spec:
  priority: {highest: high}
  inFlight: 5
  limits:
    - {name: all, per: tenant, rate: 1/h, burst: 4}
    - {name: each, per: model, of: cost, rate: 60/h, burst: 8, scope: region}
    - {name: site, per: entity, rate: 1/h, burst: 2}
    - {name: others, per: tenant, models: [other], rate: 1/h, burst: 9}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: globex}}
---
apiVersion: spillway/v1
kind: Pool
metadata: {name: p}
spec: {region: eu, pods: [{name: a, address: '10.0.0.1:1'}]}
---
apiVersion: spillway/v1
kind: Model
metadata: {name: m}
spec:
  pools: [p]
  versions: ['1']
  backend: onnx
  deadline: 1s
  cost: {request: 2}
  bulkhead: {inFlight: 2, queue: 3, tenantInFlight: 2, tenantQueue: 3}
  inputs: [{name: x, datatype: FP32, shape: [1]}]
  outputs: [{name: y, datatype: FP32, shape: [1]}]
";

struct World {
    admission: Admission,
    model: Arc<Model>,
}

impl World {
    fn new() -> Self {
        let snapshot = Snapshot::compile(1, &resource::parse(RESOURCES).unwrap()).unwrap();
        let (region, name) = (Name::parse("eu").unwrap(), Name::parse("a").unwrap());
        // A region of two, without Redis.
        let quota = QuotaSettings { term: Duration::from_millis(500), gateways: 2 };
        let admission = Admission::new(Clock::start(), region, name, quota, None, &Metrics::new("test"));
        admission.follow(&snapshot);
        Self { admission, model: snapshot.models["m"].clone() }
    }

    fn with<T>(&self, tenant: &str, entity: &'static str, priority: u64, act: impl FnOnce(&Ask<'_>) -> T) -> T {
        let tenant = Name::parse(tenant).unwrap();
        let parameters = Parameters([("priority".to_owned(), Parameter::Uint(priority))].into());
        let request = InferRequest { parameters, ..InferRequest::default() };
        let entities = Entities::One(Bytes::from_static(entity.as_bytes()));
        act(&Ask { tenant: &tenant, name: "m", model: &self.model, request: &request, entities: &entities })
    }

    fn admits(&self, entity: &'static str) -> bool {
        self.with("acme", entity, 0, |ask| !self.admission.judge(ask).taken.refused)
    }

    fn would(&self, entity: &'static str, priority: u64) -> WouldAdmit {
        let until = Instant::now() + Duration::from_secs(1);
        self.with("acme", entity, priority, |ask| self.admission.would_admit(ask, until))
    }

    async fn enter(&self) -> Place {
        let guest = self.with("acme", "e", 0, |ask| self.admission.judge(ask).guest);
        self.admission.enter(&guest, "m", Instant::now() + Duration::from_secs(1)).await.unwrap().unwrap()
    }
}

/// The name, what is left and whether it passes, of each limit.
fn told(would: &WouldAdmit) -> Vec<(&str, u32, bool)> {
    would.limits.iter().map(|limit| (&*limit.limit, limit.remaining, limit.passes)).collect()
}

#[test]
fn what_limits_would_say_is_what_they_say_and_changes_nothing() {
    let world = World::new();
    let shown = || serde_json::to_value(world.admission.view()).unwrap().to_string();
    let before = shown();
    for _ in 0..9 {
        // Of 8 tokens each of two gateways has 4.
        assert_eq!(told(&world.would("e", 0)), [("all", 3, true), ("each", 2, true), ("site", 1, true)]);
        assert_eq!(world.would("e", 9).class, "low");
        assert_eq!(world.would("e", 1).class, "high", "capped by the tenant's highest");
    }
    assert_eq!(shown(), before);
    assert!(world.admits("e") && world.admits("e"));
    let would = world.would("e", 0);
    assert_eq!(told(&would), [("all", 1, true), ("each", 0, false), ("site", 0, false)]);
    let waits: Vec<_> = would.limits.iter().map(|limit| limit.retry_after_ms.map(|wait| wait / 60_000)).collect();
    // 2 tokens of half of one a minute, whole thousandths of a token a second; one of 1 an hour.
    assert_eq!(waits, [None, Some(4), Some(59)]);
    assert_eq!(told(&world.would("other", 0)), [("all", 1, true), ("each", 0, false), ("site", 1, true)]);
    assert!(!world.admits("other"));
}

#[test]
fn a_tenants_limits_are_shown_with_their_shares() {
    let world = World::new();
    assert!(world.admits("e"));
    let view = serde_json::to_value(world.admission.view()).unwrap();
    assert_eq!(view["entityKeys"], 1);
    assert_eq!(view["tenants"].as_object().unwrap().len(), 1, "only those with limits: {view}");
    let limits = &view["tenants"]["acme"]["limits"];
    assert_eq!(limits[0]["buckets"], serde_json::json!([{ "remaining": 3, "burst": 4 }]));
    let share = serde_json::json!({ "rate": 0.008, "demand": 0.0, "standing": "local" });
    let bucket = serde_json::json!({ "model": "m", "remaining": 2, "burst": 4, "share": share });
    assert_eq!((&limits[1]["of"], &limits[1]["burst"], &limits[1]["buckets"][0]), (&"cost".into(), &8.into(), &bucket));
    assert_eq!((&limits[2]["per"], &limits[2]["buckets"]), (&"entity".into(), &serde_json::json!([])));
}

#[tokio::test]
async fn what_a_gate_would_say_is_what_it_says() {
    let world = World::new();
    let gate = |would: WouldAdmit| would.gate.unwrap();
    assert_eq!((gate(world.would("e", 0)).would, gate(world.would("e", 0)).let_in), ("enter", 1.0));
    let places = (world.enter().await, world.enter().await);
    let would = gate(world.would("e", 0));
    assert_eq!(
        (would.would, would.model.in_flight, would.model.most_in_flight, would.of_pool.lets_in),
        ("wait", 2, 2, 4.0)
    );
    let until = Instant::now();
    let late = world.with("acme", "e", 0, |ask| world.admission.would_admit(ask, until));
    assert_eq!(gate(late).would, "too-short");
    let view = world.admission.view();
    assert_eq!((view.tenants["acme"].in_flight, view.tenants["acme"].most_in_flight), (2, Some(5)));
    assert_eq!((view.models["m"].waiting, &*view.models["m"].pool, view.pools["p"].in_flight), (0, "p", 2));
    drop(places);
    let pool = Name::parse("p").unwrap();
    world.admission.fit(&pool, 1);
    let _place = world.enter().await;
    let would = gate(world.would("e", 0));
    assert_eq!((would.would, would.of_pool.room), ("wait", Some(1)), "the model has a place, the pool none");
    let unknown = world.with("gone", "e", 0, |ask| world.admission.would_admit(ask, until));
    assert_eq!((unknown.class, unknown.limits.len()), ("low", 0));
}
