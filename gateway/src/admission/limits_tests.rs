use std::collections::HashMap;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use spillway_core::limit::{Class, TableBounds};
use spillway_core::resource::{Spec, parse};
use spillway_runtime::telemetry::Metrics;

use super::*;
use crate::admission::metrics::QuotaMetrics;
use crate::clock::Clock;

const SECOND: u64 = 1_000_000_000;

/// A tenant of these limits, `{ name: …, … }` each.
fn tenant(limits: &[&str]) -> Tenant {
    let items: String = limits.iter().map(|limit| format!("    - {limit}\n")).collect();
    let text = format!("apiVersion: spillway/v1\nkind: Tenant\nmetadata: {{name: acme}}\nspec:\n  limits:\n{items}");
    match parse(&text).unwrap().remove(0).spec {
        Spec::Tenant(tenant) => tenant,
        _ => panic!("a tenant"),
    }
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn tenant_limits(number: u32) -> Arc<TenantLimits> {
    Arc::new(TenantLimits::new(name("acme"), number))
}

struct Books {
    limits: Arc<TenantLimits>,
    entities: EntityBuckets,
    quotas: Quotas,
    numbers: AtomicU32,
}

impl Books {
    fn of(limits: &[&str]) -> Self {
        Self::bounded(limits, TableBounds::default())
    }

    fn bounded(limits: &[&str], bounds: TableBounds) -> Self {
        let metrics = QuotaMetrics::new(&Metrics::new("test"));
        let books = Self {
            limits: tenant_limits(7),
            entities: EntityBuckets::new(&bounds),
            quotas: Quotas::new(QuotaSettings::default(), Clock::start(), None, &name("eu"), name("gw"), metrics),
            numbers: AtomicU32::new(1),
        };
        books.follow(limits, 0);
        books
    }

    fn follow(&self, limits: &[&str], now_ns: u64) {
        let quota = QuotaSettings { gateways: 4, ..QuotaSettings::default() };
        self.limits.follow(&tenant(limits), quota, |model| model != "gone", &self.numbers, now_ns);
    }

    fn ask(&self, model: &str, entities: &[&str], cost: u32, now_ns: u64) -> Taken {
        let entities: Vec<Bytes> = entities.iter().map(|entity| Bytes::copy_from_slice(entity.as_bytes())).collect();
        let charge = Charge { model, class: Class::Normal, cost, entity_cost: cost, entities: &entities, now_ns };
        self.limits.take(&charge, &self.entities, &self.quotas)
    }

    /// The name of the limit that refuses; empty if none does.
    fn refuser(&self, model: &str, entities: &[&str], cost: u32, now_ns: u64) -> String {
        let taken = self.ask(model, entities, cost, now_ns);
        taken.standing.filter(|_| taken.refused).map_or(String::new(), |standing| standing.limit.to_string())
    }

    /// How often it is admitted at once.
    fn drain(&self, model: &str, entities: &[&str], now_ns: u64) -> usize {
        (0..1_000).take_while(|_| !self.ask(model, entities, 1, now_ns).refused).count()
    }
}

#[test]
fn t55_a_bucket_is_exact_at_its_boundary() {
    let books = Books::of(&["{ name: all, per: tenant, rate: 10/s, burst: 20 }"]);
    assert_eq!(books.drain("a", &[], 0), 20);
    let standing = books.ask("a", &[], 1, 0).standing.unwrap();
    assert_eq!((standing.remaining, standing.reset), (0, Some(Duration::from_millis(100))));
    assert_eq!(standing.policy, "\"all\";q=20;w=2");
    assert_eq!(standing.header(), "\"all\";r=0;t=1");
    assert!(books.ask("a", &[], 1, SECOND / 10 - 1).refused);
    assert_eq!(books.drain("a", &[], SECOND / 10), 1);
    assert_eq!(books.drain("a", &[], SECOND * 60), 20);
}

#[test]
fn a_request_takes_from_all_buckets_or_from_none() {
    let books = Books::of(&[
        "{ name: all, per: tenant, rate: 1/h, burst: 10 }",
        "{ name: each, per: model, models: [\"m*\"], rate: 1/h, burst: 3 }",
        "{ name: entity, per: entity, rate: 1/h, burst: 2 }",
    ]);
    assert_eq!(books.drain("m1", &[], 0), 3);
    assert_eq!(books.refuser("m1", &[], 1, 0), "each");
    assert_eq!(books.drain("m2", &["x"], 0), 2);
    assert_eq!(books.refuser("m2", &["x"], 1, 0), "entity");
    assert_eq!(books.drain("m2", &[], 0), 1, "what the entity refused, the model kept");
    assert_eq!(books.drain("other", &[], 0), 4, "and the tenant");
    assert_eq!(books.refuser("other", &[], 1, 0), "all");
}

#[test]
fn each_entity_of_a_batch_pays_and_all_or_none() {
    let books = Books::of(&["{ name: entity, per: entity, rate: 1/h, burst: 2 }"]);
    assert!(!books.ask("a", &["x", "y", "x"], 1, 0).refused);
    assert_eq!(books.refuser("a", &["z", "x"], 1, 0), "entity");
    assert_eq!(books.drain("a", &["z", "y"], 0), 1, "y has one left");
    assert_eq!(books.drain("a", &["z"], 0), 1, "z paid once");
    let never = books.ask("a", &["v", "v", "v"], 1, 0).standing.unwrap();
    assert_eq!(never.reset, None, "one entity more often than its bucket holds");
    assert_eq!(books.drain("a", &["v"], 0), 2);
}

#[test]
fn what_several_entity_limits_took_is_given_back() {
    let limits =
        ["{ name: wide, per: entity, rate: 1/h, burst: 9 }", "{ name: narrow, per: entity, rate: 1/h, burst: 2 }"];
    for bounds in [TableBounds::default(), TableBounds { keys: 0, keys_of_owner: 0 }] {
        let overflows = bounds.keys == 0;
        let books = Books::bounded(&limits, bounds);
        assert_eq!(books.ask("a", &["x"], 1, 0).overflowed, 2 * u64::from(overflows));
        assert_eq!(books.drain("a", &["x"], 0), 1);
        (0..20).for_each(|_| assert_eq!(books.refuser("a", &["x"], 1, 0), "narrow"));
        books.follow(&limits[..1], 0);
        assert_eq!(books.drain("a", &["x"], 0), 7, "two of nine were taken");
    }
}

#[test]
fn a_cost_above_the_burst_is_never_admitted_and_changes_nothing() {
    let books = Books::of(&["{ name: rows, per: tenant, of: cost, rate: 1/h, burst: 8 }"]);
    let taken = books.ask("a", &[], 9, 0);
    assert!(taken.refused);
    assert_eq!((taken.standing.as_ref().unwrap().remaining, taken.standing.unwrap().reset), (8, None));
    assert!(!books.ask("a", &[], 8, 0).refused);
    assert!(books.ask("a", &[], 1, 0).refused);
}

#[test]
fn the_longest_wait_is_told_and_the_tightest_limit() {
    let books = Books::of(&[
        "{ name: minute, per: tenant, rate: 2/m, burst: 2 }",
        "{ name: second, per: model, rate: 2/s, burst: 3 }",
        "{ name: cost, per: tenant, of: cost, rate: 100/s, burst: 10 }",
    ]);
    let standing = books.ask("a", &[], 9, 0).standing.unwrap();
    assert_eq!(standing.limit.as_str(), "cost", "not one more such request");
    let standing = books.ask("b", &[], 1, 0).standing.unwrap();
    assert_eq!((standing.limit.as_str(), standing.remaining), ("minute", 0), "not in the order of the list");
    assert_eq!(books.refuser("a", &[], 9, 0), "minute", "30 s against 90 ms");
}

#[test]
fn buckets_outlive_snapshots_and_go_with_their_limit() {
    let all = |burst: u32| format!("{{ name: all, per: tenant, rate: 1/h, burst: {burst} }}");
    let each = "{ name: each, per: model, rate: 1/h, burst: 4 }";
    let entity = "{ name: entity, per: entity, rate: 1/h, burst: 2 }";
    let books = Books::of(&[&all(10), each, entity]);
    (0..2).for_each(|_| assert!(!books.ask("gone", &["x"], 1, 0).refused));
    (0..3).for_each(|_| assert!(!books.ask("m", &[], 1, 0).refused));
    books.follow(&[entity, &all(20), each], 0);
    assert_eq!(books.refuser("m", &["x"], 1, 0), "entity", "an entity's bucket stays");
    assert_eq!(books.drain("m", &[], 0), 1, "a model's bucket stays");
    assert_eq!(books.drain("gone", &[], 0), 4, "that of a model that went is a new one");
    books.follow(&[&all(20)], 0);
    assert_eq!(books.drain("m", &[], 0), 5, "the fraction used stays: 5 of 10 are 10 of 20, and 5 more were used");
    books.follow(&[], 0);
    books.follow(&[&all(20), entity], 0);
    assert_eq!(books.drain("m", &[], 0), 20, "a limit that went and came is new");
    assert_eq!(books.refuser("m", &[], 1, 0), "all");
}

/// At one moment nothing comes back, so a bucket is a number that falls.
#[test]
fn any_sequence_takes_what_a_plain_count_says() {
    let books = Books::of(&[
        "{ name: all, per: tenant, of: cost, rate: 1/h, burst: 900 }",
        "{ name: each, per: model, rate: 1/h, burst: 150 }",
        "{ name: entity, per: entity, rate: 1/h, burst: 12 }",
        "{ name: heavy, per: entity, of: cost, rate: 1/h, burst: 20 }",
    ]);
    let mut left: HashMap<(&str, String), u32> = HashMap::new();
    let mut state = 11_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut admitted = 0;
    for _ in 0..5_000 {
        let model = ["a", "b", "c", "d"][random(4) as usize];
        let names: Vec<String> = (0..random(5)).map(|_| format!("e{}", random(60))).collect();
        let entities: Vec<&str> = names.iter().map(String::as_str).collect();
        let cost = 1 + random(3) as u32;
        let mut pays: HashMap<(&str, String), (u32, u32)> = HashMap::new();
        pays.insert(("all", String::new()), (cost, 900));
        pays.insert(("each", model.into()), (1, 150));
        for name in &names {
            pays.entry(("entity", name.clone())).or_insert((0, 12)).0 += 1;
            pays.entry(("heavy", name.clone())).or_insert((0, 20)).0 += cost;
        }
        let right = pays.iter().all(|(key, (pay, burst))| *left.entry(key.clone()).or_insert(*burst) >= *pay);
        assert_eq!(!books.ask(model, &entities, cost, 5).refused, right, "{model} {names:?} {cost}");
        if right {
            admitted += 1;
            pays.into_iter().for_each(|(key, (pay, _))| *left.get_mut(&key).unwrap() -= pay);
        }
    }
    assert!(admitted > 300, "{admitted}");
}

#[test]
fn t55_threads_take_no_more_than_a_bucket_has() {
    let books = Books::of(&[
        "{ name: all, per: tenant, rate: 1/h, burst: 5000 }",
        "{ name: each, per: model, rate: 1/h, burst: 4000 }",
        "{ name: entity, per: entity, rate: 1/h, burst: 30 }",
    ]);
    let (models, per_entity): (Vec<AtomicU32>, Vec<AtomicU32>) =
        ((0..2).map(|_| AtomicU32::new(0)).collect(), (0..200).map(|_| AtomicU32::new(0)).collect());
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (books, models, per_entity) = (&books, &models, &per_entity);
            scope.spawn(move || {
                for turn in 0..5_000 {
                    let (model, entity) = ((thread + turn) % 2, turn * 7 % 200);
                    let name = format!("e{entity}");
                    if !books.ask(["a", "b"][model], &[&name], 1, 1).refused {
                        models[model].fetch_add(1, Ordering::Relaxed);
                        per_entity[entity].fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let counts = |counts: &[AtomicU32]| counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
    assert_eq!(counts(&models).iter().sum::<u32>(), 5_000);
    assert!(counts(&models).iter().all(|count| *count <= 4_000));
    assert!(counts(&per_entity).iter().all(|count| *count <= 30));
}

#[test]
fn t56_a_tenant_that_sweeps_a_million_entities_takes_no_place_of_others() {
    let limit = ["{ name: entity, per: entity, rate: 1/h, burst: 3 }"];
    let bounds = TableBounds { keys: 200, keys_of_owner: 100 };
    let books = Books::bounded(&limit, bounds);
    let other = tenant_limits(8);
    other.follow(&tenant(&limit), QuotaSettings::default(), |_| true, &books.numbers, 0);
    let mut overflowed = 0;
    for number in 0..50_000 {
        overflowed += books.ask("a", &[&format!("e{number}")], 1, 1).overflowed;
    }
    assert!(books.entities.len() <= 64 * 100, "{}", books.entities.len());
    assert!(overflowed > 40_000, "{overflowed}");
    let entity = [Bytes::from_static(b"e49999")];
    let charge = Charge { model: "a", class: Class::Normal, cost: 1, entity_cost: 1, entities: &entity, now_ns: 1 };
    let admitted = (0..9).filter(|_| !other.take(&charge, &books.entities, &books.quotas).refused).count();
    assert_eq!(admitted, 3, "another tenant's entity of the same name has its own bucket");
}
