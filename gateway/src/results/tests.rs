//! The cache without a network: requests of many threads, a model that is a closure.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use prost::Message;
use spillway_core::cache::freshness::Times;
use spillway_core::cache::key::Key;
use spillway_core::feature::RowKey;
use spillway_core::inference::{Datatype, Entities, InferRequest, Limits, Parameter, Parameters, Tensor, entities};
use spillway_core::limit::Class;
use spillway_core::resource::{self, Scope};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::{ByteSize, Name};
use spillway_proto::inference::ModelInferResponse;
use spillway_runtime::feature_changes::Listener;
use spillway_runtime::telemetry::Metrics as Registry;
use tonic::Code;

use super::changes::{Changes, Ears, Hears};
use super::entry::{About, Entry, Made};
use super::memory::Memory;
use super::metrics::Metrics;
use super::purges::Purge;
use super::view::Finds;
use super::{Asked, Fresh, Kept, Look, ResultSettings, Results, Said, wish};
use crate::errors::Refusal;
use crate::exchange::Making;

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn key(text: &str) -> Key {
    let word = spillway_core::routing::key_hash(text.as_bytes()).to_le_bytes();
    Key { hash: std::array::from_fn(|index| word[index % 8] ^ index as u8), material: text.to_owned().into() }
}

pub fn entry(text: &str, message: Bytes) -> Entry {
    Entry {
        key: key(text),
        about: Arc::new(About { tenant: name("acme"), model: name("eta"), entities: Box::default() }),
        message,
        made: Made {
            model_version: Some(HeaderValue::from_static("1")),
            degraded: None,
            feature_age_ms: None,
            region: None,
        },
        times: Times { stored: Duration::from_secs(10), fresh_until: Duration::from_secs(70) },
        mark: 0,
        generation: None,
    }
}

const RESOURCES: &str = "
{apiVersion: spillway/v1, kind: Region, metadata: {name: eu}, spec: {trustDomain: td}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: acme}, spec: {cacheControl: honour}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: globex}}
---
{apiVersion: spillway/v1, kind: Pool, metadata: {name: p}, spec: {region: eu, pods: [{name: a, address: '10.0.0.1:1'}]}}
---
apiVersion: spillway/v1
kind: FeatureGroup
metadata: {name: site}
spec: {schemaVersion: 1, freshFor: 1h, retainFor: 30d, fields: [{name: age, datatype: FP32, default: 0}]}
---
apiVersion: spillway/v1
kind: Model
metadata: {name: plain}
spec:
  pools: [p]
  versions: ['2', '1']
  backend: onnx
  deadline: 1s
  inputs: [{name: x, datatype: FP32, shape: [1]}]
  outputs: [{name: y, datatype: FP32, shape: [1]}]
  cache: {ttl: 10s}
---
apiVersion: spillway/v1
kind: Model
metadata: {name: brief}
spec:
  pools: [p]
  versions: ['2']
  backend: onnx
  deadline: 1s
  inputs: [{name: x, datatype: FP32, shape: [1]}]
  outputs: [{name: y, datatype: FP32, shape: [1]}]
  cache: {ttl: 100ms, staleWhileRevalidate: 300ms, staleIfError: 10s}
---
apiVersion: spillway/v1
kind: Model
metadata: {name: joined}
spec:
  pools: [p]
  versions: ['2']
  backend: onnx
  deadline: 1s
  inputs: [{name: x, datatype: FP32, shape: [-1, 1], features: [site.age]}]
  outputs: [{name: y, datatype: FP32, shape: [-1]}]
  cache: {ttl: 10s}
---
apiVersion: spillway/v1
kind: Model
metadata: {name: uncached}
spec:
  pools: [p]
  versions: ['2']
  backend: onnx
  deadline: 1s
  inputs: [{name: x, datatype: FP32, shape: [1]}]
  outputs: [{name: y, datatype: FP32, shape: [1]}]
";

pub fn snapshot(version: u64) -> Snapshot {
    Snapshot::compile(version, &resource::parse(RESOURCES).unwrap()).unwrap()
}

/// A gateway's cache, and what its requests say.
pub struct World {
    pub results: Arc<Results>,
    snapshot: Snapshot,
    calls: AtomicU64,
    /// Whether the feature channel is heard.
    pub hears: Arc<AtomicBool>,
}

/// One request.
#[derive(Clone)]
pub struct Ask {
    pub tenant: &'static str,
    pub model: &'static str,
    pub entity: &'static str,
    pub number: f32,
    pub cache_control: &'static str,
    pub class: Class,
    pub patience: Duration,
}

pub fn ask(model: &'static str, number: f32) -> Ask {
    let patience = Duration::from_secs(10);
    Ask { tenant: "acme", model, entity: "e", number, cache_control: "", class: Class::Normal, patience }
}

/// What a pod says beside its answer.
pub fn said() -> Making {
    Making { model_version: Some(HeaderValue::from_static("2")), ..Making::default() }
}

/// The same, of one that read rows when it knew the changes up to `number`.
pub fn read_at(number: u64) -> Making {
    Making {
        feature_age_ms: Some(5),
        feature_sequence: Some(number),
        feature_fresh: Some(Duration::from_secs(60)),
        ..said()
    }
}

impl World {
    pub fn new() -> Self {
        Self::of(false)
    }

    /// `numbered`: with a channel, which is heard and at 10.
    pub fn of(numbered: bool) -> Self {
        let registry = Registry::new("test");
        let answers = Limits::OF_SIDECARS;
        let (results, _) = Results::open(&ResultSettings::default(), None, &name("eu"), answers, &registry);
        let hears = Arc::new(AtomicBool::new(true));
        let mut results = Arc::into_inner(results).unwrap();
        if numbered {
            let hears = hears.clone();
            let hears: Box<Hears> = Box::new(move |_| hears.load(Ordering::SeqCst));
            results.changes = Changes::new(Some(hears), results.origin);
        }
        let world = Self { hears, ..Self::with(results.into()) };
        world.flush(10);
        world
    }

    pub fn with(results: Arc<Results>) -> Self {
        Self { results, snapshot: snapshot(1), calls: AtomicU64::new(0), hears: Arc::default() }
    }

    pub fn changed(&self, number: u64, row: &str) {
        assert!(Ears(self.results.clone()).changed(number, row));
    }

    pub fn flush(&self, number: u64) {
        Ears(self.results.clone()).flush(number);
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// What the request is answered with, and what it says of the cache. `model` answers with a text.
    pub async fn infer(
        &self,
        ask: &Ask,
        model: impl AsyncFnOnce() -> Result<(&'static str, Making), Refusal>,
    ) -> (Result<String, Refusal>, String) {
        let mut said = Said::default();
        let answer = self.answer(ask, model, &mut said).await;
        (answer, said.status.map_or_else(String::new, |status| status.to_string()))
    }

    async fn answer(
        &self,
        ask: &Ask,
        model: impl AsyncFnOnce() -> Result<(&'static str, Making), Refusal>,
        said: &mut Said,
    ) -> Result<String, Refusal> {
        let request = request(ask);
        let found = &self.snapshot.models[ask.model];
        let entities = entities(found, &request).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("cache-control", HeaderValue::from_static(ask.cache_control));
        let asked = Asked {
            snapshot: &self.snapshot,
            tenant: &name(ask.tenant),
            model: found,
            request: &request,
            entities: &entities,
            wish: wish(&self.snapshot, &name(ask.tenant), found, &headers),
            class: ask.class,
            until: Instant::now() + ask.patience,
        };
        let text = |kept: &Kept| ModelInferResponse::decode(kept.entry.message.clone()).unwrap().model_name;
        let permit = match self.results.look(&asked, said).await? {
            Look::Ask(permit) => permit,
            Look::Kept(kept, None) => return Ok(text(&kept)),
            Look::Kept(kept, Some(permit)) => {
                let (fresh, making) = self.call(model).await?;
                permit.keep(&self.results, &Fresh { message: &fresh, making: &making, took: Duration::ZERO }, said);
                return Ok(text(&kept));
            }
        };
        match self.call(model).await {
            Ok((message, making)) => {
                let fresh = Fresh { message: &message, making: &making, took: Duration::from_millis(1) };
                permit.keep(&self.results, &fresh, said);
                Ok(ModelInferResponse::decode(&*message).unwrap().model_name)
            }
            Err(refusal) => permit.fail(&self.results, &refusal, said).map(|kept| text(&kept)).ok_or(refusal),
        }
    }

    async fn call(
        &self,
        model: impl AsyncFnOnce() -> Result<(&'static str, Making), Refusal>,
    ) -> Result<(Vec<u8>, Making), Refusal> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let (text, making) = model().await?;
        let answer = ModelInferResponse { model_name: text.into(), id: "of the leader".into(), ..Default::default() };
        Ok((answer.encode_to_vec(), making))
    }

    pub fn key(&self, ask: &Ask) -> Key {
        let (tenant, request, entities) = (name(ask.tenant), request(ask), Entities::None);
        let asked = Asked {
            snapshot: &self.snapshot,
            tenant: &tenant,
            model: &self.snapshot.models[ask.model],
            request: &request,
            entities: &entities,
            wish: Default::default(),
            class: Class::Normal,
            until: Instant::now(),
        };
        self.results.key(&asked).unwrap()
    }

    /// The request, answered with `text` if the model is asked.
    pub async fn get(&self, ask: &Ask, text: &'static str, making: Making) -> (String, String) {
        let (answer, status) = self.infer(ask, async || Ok((text, making))).await;
        (answer.unwrap(), status)
    }
}

fn request(ask: &Ask) -> InferRequest {
    let joined = ask.model == "joined";
    let x = Tensor {
        name: "x".into(),
        datatype: Datatype::Fp32,
        shape: vec![1],
        parameters: Parameters::default(),
        data: Bytes::copy_from_slice(&ask.number.to_le_bytes()),
    };
    InferRequest {
        model: ask.model.into(),
        parameters: Parameters(if joined {
            vec![("entity_id".into(), Parameter::Text(ask.entity.into()))]
        } else {
            vec![]
        }),
        inputs: if joined { vec![] } else { vec![x] },
        ..InferRequest::default()
    }
}

/// The name of an entity's row, as the channel says it.
pub fn row(entity: &str) -> String {
    RowKey::new(Scope::Shared, "", entity.as_bytes(), &name("site")).unwrap().as_str().to_owned()
}

pub const MISS: &str = "spillway; fwd=miss; stored";

pub fn is_hit(status: &str) -> bool {
    status.starts_with("spillway; hit; ttl=")
}

#[tokio::test]
async fn an_answer_is_given_again() {
    let world = World::new();
    let ask = ask("plain", 1.0);
    assert_eq!(world.get(&ask, "one", said()).await, ("one".into(), MISS.into()));
    let (answer, status) = world.get(&ask, "two", said()).await;
    assert!(answer == "one" && is_hit(&status), "{answer} {status}");
    let other = Ask { number: 2.0, ..ask.clone() };
    assert_eq!(world.get(&other, "two", said()).await.0, "two");
    assert_eq!(world.calls(), 2);
    let off = Ask { model: "uncached", ..ask };
    assert_eq!(world.get(&off, "three", said()).await, ("three".into(), "spillway; fwd=bypass".into()));
}

#[tokio::test]
async fn t01_two_tenants_with_one_body_have_two_entries() {
    let world = World::new();
    let ask = ask("plain", 1.0);
    assert_eq!(world.get(&ask, "acme's", said()).await.0, "acme's");
    let globex = Ask { tenant: "globex", ..ask.clone() };
    assert_eq!(world.get(&globex, "globex's", said()).await, ("globex's".into(), MISS.into()));
    assert_eq!(world.get(&ask, "-", said()).await.0, "acme's");
    assert_eq!(world.get(&globex, "-", said()).await.0, "globex's");
}

#[test]
fn t02_a_forced_collision_is_a_miss() {
    let metrics = Arc::new(Metrics::new(&Registry::new("test")));
    let memory = Memory::new(1 << 20, metrics);
    let stored = Arc::new(entry("one", Bytes::from_static(b"answer")));
    assert!(memory.insert(&stored, &[]));
    let other = Key { material: Bytes::from_static(b"another"), ..stored.key.clone() };
    assert!(memory.get(&stored.key).is_some() && memory.get(&other).is_none() && memory.peek(&other).is_none());
}

#[tokio::test]
async fn t09_what_is_degraded_or_of_another_version_is_not_stored() {
    let world = World::new();
    let degraded = Making { degraded: Some(HeaderValue::from_static("1 stale-feature")), ..said() };
    let other = Making { model_version: Some(HeaderValue::from_static("1")), ..said() };
    let unknown = Making::default();
    for (making, number) in [(degraded, 1.0), (other, 2.0), (unknown, 3.0)] {
        let ask = ask("plain", number);
        assert_eq!(world.get(&ask, "one", making.clone()).await.1, "spillway; fwd=miss");
        assert_eq!(world.get(&ask, "two", making).await.0, "two");
    }
    let failing = ask("plain", 4.0);
    let (answer, status) = world.infer(&failing, async || Err(Refusal::BadAnswer)).await;
    assert!(answer.is_err() && status == "spillway; fwd=miss");
    assert_eq!(world.get(&failing, "now", said()).await.0, "now");
}

#[tokio::test]
async fn a_stale_answer_stands_in_for_a_failing_model_and_for_nothing_else() {
    let world = World::new();
    let ask = ask("brief", 1.0);
    world.get(&ask, "old", said()).await;
    tokio::time::sleep(Duration::from_millis(450)).await;
    let (answer, status) = world.infer(&ask, async || Err(Refusal::NoPod)).await;
    assert_eq!((answer.unwrap(), status.as_str()), ("old".into(), "spillway; fwd=stale; detail=stale-if-error"));
    let missing = Refusal::Sidecar { status: Code::FailedPrecondition, code: "-".into(), message: String::new() };
    assert!(world.infer(&ask, async || Err(missing)).await.0.is_err());
    let strict = Ask { cache_control: "max-age=0", ..ask.clone() };
    assert!(world.infer(&strict, async || Err(Refusal::NoPod)).await.0.is_err());
    assert_eq!(world.get(&ask, "new", said()).await, ("new".into(), "spillway; fwd=stale; stored".into()));
}

#[tokio::test]
async fn wishes_are_honoured_for_tenants_that_may() {
    let world = World::new();
    let plain = ask("plain", 1.0);
    let with = |cache_control| Ask { cache_control, ..plain.clone() };
    let (refused, status) = world.infer(&with("only-if-cached"), async || panic!("not asked")).await;
    assert!(matches!(refused, Err(Refusal::NotCached)) && status == "spillway; detail=only-if-cached");
    assert_eq!(world.get(&with("no-store"), "one", said()).await, ("one".into(), "spillway; fwd=miss".into()));
    assert_eq!(world.get(&plain, "two", said()).await, ("two".into(), MISS.into()));
    assert_eq!(world.get(&with("only-if-cached"), "-", said()).await.0, "two");
    let asked = world.get(&with("no-cache"), "three", said()).await;
    assert_eq!(asked, ("three".into(), "spillway; fwd=request; stored".into()));
    assert_eq!(world.get(&plain, "-", said()).await.0, "three");
    let globex = Ask { tenant: "globex", ..with("no-cache") };
    world.get(&globex, "four", said()).await;
    assert_eq!(world.get(&globex, "five", said()).await.0, "four", "it may not wish");
}

#[tokio::test]
async fn a_purge_ends_what_it_names_and_what_was_under_way() {
    let world = World::new();
    let (plain, brief) = (ask("plain", 1.0), ask("brief", 1.0));
    let globex = Ask { tenant: "globex", ..plain.clone() };
    for ask in [&plain, &brief, &globex] {
        world.get(ask, "old", said()).await;
    }
    let purged = world.results.purge(Purge::Model(name("plain"))).await;
    assert_eq!((purged.entries, purged.region), (2, None));
    assert_eq!(world.results.metrics.entries.get(), 1);
    let during = async || {
        world.results.purge(Purge::Model(name("plain"))).await;
        Ok(("old", said()))
    };
    assert_eq!(world.infer(&plain, during).await.0.unwrap(), "old");
    assert_eq!(world.get(&plain, "new", said()).await, ("new".into(), MISS.into()));
    world.get(&globex, "new", said()).await;
    world.results.purge(Purge::Tenant(name("acme"))).await;
    assert_eq!(world.get(&globex, "-", said()).await.0, "new");
    assert_eq!(world.get(&plain, "newer", said()).await.0, "newer");

    let (one, other) = (ask("joined", 0.0), Ask { entity: "f", ..ask("joined", 0.0) });
    for ask in [&one, &other] {
        world.get(ask, "old", Making { feature_sequence: None, ..read_at(0) }).await;
    }
    assert_eq!(world.results.purge(Purge::entity(b"e")).await.entries, 1);
    assert_eq!(world.get(&one, "new", read_at(0)).await.0, "new");
    assert_eq!(world.get(&other, "-", read_at(0)).await.0, "old");
}

#[tokio::test]
async fn requests_of_sequences_are_left_alone() {
    let world = World::new();
    let found = &world.snapshot.models["plain"];
    let mut request = request(&ask("plain", 1.0));
    request.parameters.set("sequence_id", Parameter::Int(7));
    let (tenant, entities) = (name("acme"), Entities::None);
    let asked = Asked {
        snapshot: &world.snapshot,
        tenant: &tenant,
        model: found,
        request: &request,
        entities: &entities,
        wish: Default::default(),
        class: Class::Normal,
        until: Instant::now(),
    };
    let mut said = Said::default();
    assert!(matches!(world.results.look(&asked, &mut said).await, Ok(Look::Ask(_))));
    assert_eq!(said.status.unwrap().fixed(), Some("spillway; fwd=bypass; detail=uncacheable"));
    assert_eq!(world.results.would_find(&asked).finds, Finds::Uncacheable);
}

#[tokio::test]
async fn t13_a_flood_of_one_tenant_leaves_anothers_share() {
    let registry = Registry::new("test");
    let settings = ResultSettings { memory: ByteSize(1 << 20) };
    let (results, _) = Results::open(&settings, None, &name("eu"), Limits::OF_SIDECARS, &registry);
    let world = World::with(results);
    let mine: Vec<Ask> = (0..200).map(|number| Ask { tenant: "globex", ..ask("plain", number as f32) }).collect();
    for ask in &mine {
        world.get(ask, "mine", said()).await;
    }
    for number in 0..4_000 {
        world.get(&ask("plain", number as f32), "flood", said()).await;
    }
    let before = world.calls();
    for ask in &mine {
        world.get(ask, "again", said()).await;
    }
    assert!(world.calls() - before <= 10, "{} of 200 are gone", world.calls() - before);
    let view = world.results.view();
    assert!(view.bytes as u64 <= 1 << 20 && view.tenants.len() == 2, "{view:?}");
}

#[tokio::test]
async fn what_a_request_would_find_is_told_and_changes_nothing() {
    let world = World::new();
    let find = || {
        let (tenant, entities, request) = (name("acme"), Entities::None, request(&ask("brief", 1.0)));
        let asked = Asked {
            snapshot: &world.snapshot,
            tenant: &tenant,
            model: &world.snapshot.models["brief"],
            request: &request,
            entities: &entities,
            wish: Default::default(),
            class: Class::Normal,
            until: Instant::now(),
        };
        let last = world.results.last_cached(&asked).map(|kept| kept.entry.made.clone());
        (world.results.would_find(&asked), last)
    };
    let (would, last) = find();
    assert!(would.finds == Finds::Miss && would.key.unwrap().len() == 64 && last.is_none());
    world.get(&ask("brief", 1.0), "one", said()).await;
    assert_eq!((find().0.finds, find().0.ttl), (Finds::Fresh, Some(0)));
    tokio::time::sleep(Duration::from_millis(120)).await;
    assert_eq!((find().0.finds, find().0.ttl), (Finds::Stale, Some(-1)));
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(find().0.finds, Finds::IfError);
    assert!(find().1.is_some(), "the last one stays for the ladder");
    assert_eq!(world.calls(), 1);
}
