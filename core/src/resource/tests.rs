use super::*;
use crate::failover::MayLeave;
use crate::limit::Class;
use crate::snapshot::Snapshot;
use crate::units::DnsName;

const GOOD: &str = r#"
apiVersion: spillway/v1
kind: Region
metadata: { name: eu-west }
spec:
  trustDomain: spillway.test
  gateways:
    - { name: gw-0, address: "192.0.2.7:443" }
    - { name: gw-1, address: "[2001:db8::7]:443" }
  weight: 60
  capacity: 500/s
  cost: 1.5
---
apiVersion: spillway/v1
kind: Pool
metadata: { name: scorers }
spec:
  region: eu-west
  pods:
    - { name: pod-0, address: "127.0.0.1:9001" }
    - { name: pod-1, address: "127.0.0.1:9002", weight: 25 }
---
apiVersion: spillway/v1
kind: FeatureGroup
metadata: { name: site }
spec:
  schemaVersion: 1
  freshFor: 24h
  retainFor: 30d
  fields:
    - { name: age, datatype: FP32, default: 0 }
    - { name: https, datatype: FP32 }
---
apiVersion: spillway/v1
kind: Model
metadata: { name: phishing }
spec:
  pools: [scorers]
  versions: [1]
  backend: onnx
  tier: 1
  deadline: 200ms
  maxDeadline: 5s
  entityInput: site_id
  inputs:
    - { name: features, datatype: FP32, shape: [-1, 2], features: [site.age, site.https] }
  outputs:
    - { name: score, datatype: FP32, shape: [-1, 1] }
  cost: { request: 2, row: 1 }
  cache: { ttl: 5m, staleWhileRevalidate: 10s, staleIfError: 1m }
  routing: { policy: ring, loadFactor: 1.5, slowStart: 10s, hotEntity: { rate: 500/s, pods: 3 } }
  retries: { most: 2, budget: 20%, backoff: 50ms, longestBackoff: 1s }
  hedge: true
  breaker: { window: 50, failures: 40%, openFor: 5s, probes: 3 }
  bulkhead: { inFlight: 10, queue: 20 }
  degradation:
    levels: [1, 3, 4]
    predictionP95: 50ms
    errors: 2%
    enterAfter: 1s
    leaveAfter: 2s
    static: { score: [0.5] }
---
apiVersion: spillway/v1
kind: Tenant
metadata: { name: acme }
spec:
  priority: { default: normal, highest: high }
  inFlight: 50
  cacheControl: honour
  mayLeaveRegion: [eu-west]
  limits:
    - { name: all, per: tenant, rate: 1000/s, burst: 200, scope: region }
    - { name: rows, per: model, models: ["phis*"], of: cost, rate: 90/m }
    - { name: entity, per: entity, rate: 10/s }
---
apiVersion: spillway/v1
kind: Revocation
metadata: { name: lost }
spec:
  serials: ["0a:1b"]
  ids: ["spiffe://spillway.test/tenant/acme/client/web"]
  reason: a stolen laptop
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: { name: acme-infers }
spec:
  subjects: [{ tenant: acme }]
  models: ["phish*"]
  actions: [infer, metadata]
"#;

#[test]
fn good_resources_compile_to_a_snapshot() {
    let snapshot = Snapshot::compile(7, &parse(GOOD).unwrap()).unwrap();
    let model = &snapshot.models["phishing"];
    assert_eq!(model.version("").unwrap().as_str(), "1");
    assert_eq!(model.missing_feature, MissingFeature::Refuse);
    let region = Name::parse("eu-west").unwrap();
    let PodSource::Listed(pods) = &snapshot.pool_of(model, &region).unwrap().1.source else { panic!("a list") };
    assert_eq!(pods.iter().map(|pod| pod.weight.get()).collect::<Vec<_>>(), [100, 25]);
}

#[test]
fn traffic_is_read_as_it_is_written_and_has_defaults() {
    let snapshot = Snapshot::compile(7, &parse(GOOD).unwrap()).unwrap();
    let traffic = &snapshot.models["phishing"].traffic;
    assert_eq!(traffic.cost.of(3), 5);
    assert_eq!(traffic.cache.as_ref().unwrap().stale_if_error.as_secs(), 60);
    assert_eq!((traffic.routing.load_factor, traffic.routing.spread, traffic.routing.hot.threshold), (1.5, 3, 500));
    assert_eq!((traffic.retries.retries, traffic.budget.ratio, traffic.hedge), (2, 0.2, true));
    assert_eq!((traffic.breaker.window, traffic.breaker.failure_ratio, traffic.breaker.probes), (50, 0.4, 3));
    assert_eq!((traffic.bulkhead.tenant_in_flight, traffic.bulkhead.tenant_queue), (8, 10));
    let degradation = traffic.degradation.as_ref().unwrap();
    assert_eq!(degradation.settings.allowed, [true, false, true, true]);
    assert_eq!(degradation.fixed, [[FieldValue::Float(0.5)]]);
    let tenant = &snapshot.tenants["acme"];
    assert_eq!((tenant.default_class, tenant.highest_class), (Class::Normal, Class::High));
    let bursts: Vec<u32> = tenant.limits.iter().map(|limit| limit.burst).collect();
    assert_eq!(bursts, [200, 2, 10]);
    assert!(tenant.limits[1].applies_to("phishing") && !tenant.limits[1].applies_to("eta"));
    assert_eq!((snapshot.revoked.serials.len(), snapshot.revoked.ids.len()), (1, 1));

    let bare = GOOD.split("  cost: {").next().unwrap().to_owned()
        + "---\n"
        + GOOD.split("score: [0.5] }\n---\n").nth(1).unwrap();
    let resources = parse(&bare).unwrap();
    let Spec::Model(model) = &resources.iter().find(|resource| resource.name.as_str() == "phishing").unwrap().spec
    else {
        panic!("a model")
    };
    assert_eq!(model.traffic, Traffic::default());
}

#[test]
fn canonical_specs_read_back_as_the_same_resource() {
    for resource in parse(GOOD).unwrap() {
        let again = parse_canonical(resource.spec.kind(), resource.name.as_str(), &resource.canonical).unwrap();
        assert_eq!((again.spec, again.canonical), (resource.spec, resource.canonical));
    }
}

#[test]
fn every_fault_is_reported_with_its_line_and_what_is_expected() {
    let text = "apiVersion: spillway/v2\nkind: Pool\nmetadata: {name: bad name}\nspec:\n  regoin: eu\n  pods:\n    - {name: a, address: nowhere}\n";
    let faults = parse(text).unwrap_err();
    let shown: Vec<String> = faults.iter().map(|fault| format!("{}: {fault}", fault.line)).collect();
    let has = |text: &str| shown.iter().any(|line| line.contains(text));
    assert!(has("1: Pool/bad name: apiVersion: 'spillway/v2' is not valid: expected spillway/v1"), "{shown:#?}");
    assert!(has("3: Pool/bad name: metadata.name:"), "{shown:#?}");
    assert!(has("5: Pool/bad name: spec.regoin: unknown key, expected one of dns, pods, region"), "{shown:#?}");
    assert!(has("spec.region: is missing and required"), "{shown:#?}");
    assert!(has("7: Pool/bad name: spec.pods[0].address: 'nowhere' is not valid: expected an address"), "{shown:#?}");
}

#[test]
fn each_wrong_value_names_its_field() {
    for (from, to, field) in [
        ("deadline: 200ms", "deadline: 200", "spec.deadline"),
        ("deadline: 200ms", "deadline: 0s", "spec.deadline"),
        ("maxDeadline: 5s", "maxDeadline: 1ms", "spec.maxDeadline"),
        ("backend: onnx", "backend: magic", "spec.backend"),
        ("entityInput: site_id", "entityInput: features", "spec.entityInput"),
        ("shape: [-1, 2]", "shape: [-1, 3]", "spec.inputs[0].features"),
        ("shape: [-1, 1] }", "shape: [-2, 0] }", "spec.outputs[0].shape[0]"),
        ("versions: [1]", "versions: []", "spec.versions"),
        ("versions: [1]", "versions: [1, 1]", "spec.versions[1]"),
        ("retainFor: 30d", "retainFor: 1h", "spec.retainFor"),
        ("datatype: FP32, default: 0", "datatype: FP32, default: NaN", "spec.fields[0].default"),
        ("datatype: FP32, default: 0", "datatype: BYTES", "spec.fields[0].datatype"),
        ("actions: [infer, metadata]", "actions: [infer, fly]", "spec.actions[1]"),
        ("models: [\"phish*\"]", "models: [\"phish/\"]", "spec.models[0]"),
        ("name: pod-1", "name: pod-0", "spec.pods[1]"),
        ("weight: 25", "weight: 0", "spec.pods[1].weight"),
        ("weight: 25", "weight: 101", "spec.pods[1].weight"),
        ("  pods:", "  dns: {srv: _oip._tcp.scorers}\n  pods:", "spec.dns"),
        ("trustDomain: spillway.test", "trustDomain: Spillway", "spec.trustDomain"),
        ("name: gw-1", "name: gw-0", "spec.gateways[1]"),
        ("[2001:db8::7]:443", "192.0.2.7:443", "spec.gateways[1]"),
        ("192.0.2.7:443", "192.0.2.7", "spec.gateways[0].address"),
        ("192.0.2.7:443", "192.0.2.7:0", "spec.gateways[0].address"),
        ("192.0.2.7:443", "0.0.0.0:443", "spec.gateways[0].address"),
        ("weight: 60", "weight: -1", "spec.weight"),
        ("weight: 60", "weight: inf", "spec.weight"),
        ("capacity: 500/s", "capacity: 500", "spec.capacity"),
        ("cost: 1.5", "cost: NaN", "spec.cost"),
        ("tier: 1", "tier: 0", "spec.tier"),
        ("mayLeaveRegion: [eu-west]", "mayLeaveRegion: yes", "spec.mayLeaveRegion"),
        ("mayLeaveRegion: [eu-west]", "mayLeaveRegion: []", "spec.mayLeaveRegion"),
        ("mayLeaveRegion: [eu-west]", "mayLeaveRegion: [eu/west]", "spec.mayLeaveRegion[0]"),
        ("name: score,", "name: \"\",", "spec.outputs[0].name"),
        ("cost: { request: 2, row: 1 }", "cost: { request: -1 }", "spec.cost.request"),
        ("ttl: 5m", "ttl: 0s", "spec.cache"),
        ("ttl: 5m", "ttl: 48h", "spec.cache.ttl"),
        ("loadFactor: 1.5", "loadFactor: 1", "spec.routing.loadFactor"),
        ("loadFactor: 1.5", "loadFactor: NaN", "spec.routing.loadFactor"),
        ("policy: ring", "policy: random", "spec.routing.policy"),
        ("pods: 3", "pods: 17", "spec.routing.hotEntity.pods"),
        ("budget: 20%", "budget: 0.2", "spec.retries.budget"),
        ("most: 2", "most: 4", "spec.retries.most"),
        ("hedge: true", "hedge: yes", "spec.hedge"),
        ("window: 50", "window: 5", "spec.breaker.window"),
        ("inFlight: 10,", "inFlight: 0,", "spec.bulkhead.inFlight"),
        ("levels: [1, 3, 4]", "levels: [1, 5]", "spec.degradation.levels[1]"),
        ("levels: [1, 3, 4]", "levels: [2]", "spec.degradation"),
        ("levels: [1, 3, 4]", "levels: []", "spec.degradation.levels"),
        ("  cache: { ttl: 5m, staleWhileRevalidate: 10s, staleIfError: 1m }\n", "", "spec.degradation"),
        ("rate: 500/s", "rate: 30/m", "spec.routing.hotEntity.rate"),
        ("score: [0.5]", "score: [0.5, 1]", "spec.degradation.static.score"),
        ("score: [0.5]", "scores: [0.5]", "spec.degradation.static.scores"),
        ("score: [0.5]", "score: [NaN]", "spec.degradation.static.score[0]"),
        ("highest: high", "highest: low", "spec.priority"),
        ("rate: 1000/s", "rate: 1000", "spec.limits[0].rate"),
        ("rate: 1000/s", "rate: 20000000/s", "spec.limits[0]"),
        ("rate: 90/m", "rate: 1/h, burst: 1000000", "spec.limits[1]"),
        ("per: entity", "per: client", "spec.limits[2].per"),
        ("name: entity, per: entity", "name: entity, per: entity, scope: region", "spec.limits[2]"),
        ("name: rows", "name: all", "spec.limits[1]"),
        ("rate: 1000/s, burst: 200", "rate: 30/h, burst: 1", "spec.limits[0]"),
        ("cacheControl: honour", "cacheControl: true", "spec.cacheControl"),
        ("0a:1b", "0x1b", "spec.serials[0]"),
        ("spiffe://spillway.test/tenant", "https://spillway.test/tenant", "spec.ids[0]"),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let faults = parse(&GOOD.replacen(from, to, 1)).unwrap_err();
        assert!(faults.iter().any(|fault| fault.field == field && fault.line > 0), "{to}: {faults:#?}");
    }
}

#[test]
fn a_region_says_how_it_is_reached_and_what_it_may_take() {
    let region = |spec: &str| {
        let text = format!("apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: eu}}\nspec: {spec}\n");
        let Spec::Region(region) = parse(&text).unwrap().remove(0).spec else { panic!("a Region") };
        region
    };
    let bare = region("{trustDomain: spillway.test}");
    assert_eq!((bare.gateways.len(), bare.weight, bare.capacity, bare.cost), (0, 100.0, None, 1.0));
    let snapshot = Snapshot::compile(7, &parse(GOOD).unwrap()).unwrap();
    let full = &snapshot.regions["eu-west"];
    let gateways: Vec<String> = full.gateways.iter().map(|at| format!("{} {}", at.name, at.address)).collect();
    assert_eq!(gateways, ["gw-0 192.0.2.7:443", "gw-1 [2001:db8::7]:443"]);
    assert_eq!((full.weight, full.capacity.unwrap().per_second(), full.cost), (60.0, 500.0, 1.5));
    assert_eq!(snapshot.models["phishing"].tier, Tier::One);
    let standby = region("{trustDomain: spillway.test, weight: -0, cost: 0}");
    assert!(standby.weight.is_sign_positive() && standby.cost == 0.0);

    let many: Vec<String> = (1..=65).map(|n| format!("{{name: g{n}, address: \"192.0.2.{n}:443\"}}")).collect();
    let text = format!(
        "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: eu}}\nspec: {{trustDomain: td, gateways: [{}]}}\n",
        many.join(", ")
    );
    assert_eq!(parse(&text).unwrap_err()[0].field, "spec.gateways");
    let other = GOOD.split("---").next().unwrap().replace("name: eu-west", "name: us-east");
    let faults = Snapshot::compile(1, &parse(&format!("{GOOD}---{other}")).unwrap()).unwrap_err();
    assert!(faults.iter().all(|fault| fault.problem.contains("has the address") && fault.line > 0), "{faults:#?}");
    assert_eq!(faults.len(), 4, "{faults:#?}");
}

#[test]
fn a_tenant_leaves_its_region_only_where_it_is_said_to() {
    let tenant = |spec: &str| {
        let text = format!("apiVersion: spillway/v1\nkind: Tenant\nmetadata: {{name: acme}}\nspec: {spec}\n");
        let Spec::Tenant(tenant) = parse(&text).unwrap().remove(0).spec else { panic!("a Tenant") };
        tenant.may_leave_region
    };
    assert_eq!(tenant("{}"), MayLeave::No);
    assert_eq!(tenant("{mayLeaveRegion: false}"), MayLeave::No);
    assert_eq!(tenant("{mayLeaveRegion: true}"), MayLeave::Anywhere);
    let named = MayLeave::To(["us", "ap"].map(|name| Name::parse(name).unwrap()).into());
    assert_eq!(tenant("{mayLeaveRegion: [us, ap]}"), named);
}

#[test]
fn a_pools_members_may_come_from_dns() {
    let read = |members: &str| {
        let text =
            format!("apiVersion: spillway/v1\nkind: Pool\nmetadata: {{name: a}}\nspec: {{region: eu{members}}}\n");
        let resource = parse(&text)?.remove(0);
        let again = parse_canonical("Pool", "a", &resource.canonical).unwrap();
        assert_eq!(again.spec, resource.spec);
        let Spec::Pool(pool) = resource.spec else { panic!("a Pool") };
        Ok::<_, Vec<Fault>>(pool.source)
    };
    let name = |name| DnsName::host(name).unwrap();
    let hosts = PodSource::Dns(DnsSource::Hosts { name: name("scorers.svc"), port: 9_443.try_into().unwrap() });
    assert_eq!(read(", dns: {name: scorers.svc, port: 9443}").unwrap(), hosts);
    let services = PodSource::Dns(DnsSource::Services { name: DnsName::service("_oip._tcp.scorers").unwrap() });
    assert_eq!(read(", dns: {srv: _oip._tcp.scorers}").unwrap(), services);
    for (members, field) in [
        ("", "spec"),
        (", pods: []", "spec.pods"),
        (", dns: {}", "spec.dns"),
        (", dns: {name: scorers.svc}", "spec.dns"),
        (", dns: {port: 9443}", "spec.dns"),
        (", dns: {srv: _oip._tcp.scorers, port: 9443}", "spec.dns"),
        (", dns: {srv: _oip._tcp.scorers, name: scorers.svc, port: 9443}", "spec.dns"),
        (", dns: {name: scorers.svc, port: 0}", "spec.dns.port"),
        (", dns: {name: scorers.svc, port: 65536}", "spec.dns.port"),
        (", dns: {name: 10.0.0.7, port: 9443}", "spec.dns.name"),
        (", dns: {srv: scorers.svc}", "spec.dns.srv"),
        (", dns: {name: scorers.svc, port: 9443, ttl: 5s}", "spec.dns.ttl"),
    ] {
        let faults = read(members).unwrap_err();
        assert!(faults.iter().any(|fault| fault.field == field && fault.line > 0), "{members}: {faults:#?}");
    }
}

#[test]
fn references_that_do_not_resolve_are_faults() {
    for (from, to, field, says) in [
        ("pools: [scorers]", "pools: [gone]", "spec.pools[0]", "no Pool 'gone'"),
        ("region: eu-west", "region: gone", "spec.region", "no Region 'gone'"),
        ("mayLeaveRegion: [eu-west]", "mayLeaveRegion: [gone, eu-west]", "spec.mayLeaveRegion", "no Region 'gone'"),
        ("tenant: acme }", "tenant: gone }", "spec.subjects[0].tenant", "no Tenant 'gone'"),
        ("site.https", "site.gone", "spec.inputs[0].features[1]", "no field 'gone'"),
        ("site.https", "gone.https", "spec.inputs[0].features[1]", "no FeatureGroup 'gone'"),
        ("name: https, datatype: FP32", "name: https, datatype: INT64", "spec.inputs[0].features[1]", "expected FP32"),
        ("entityInput: site_id", "missingFeature: default", "spec.inputs[0].features[1]", "expected a default"),
    ] {
        let resources = parse(&GOOD.replacen(from, to, 1)).unwrap();
        let faults = Snapshot::compile(1, &resources).unwrap_err();
        let found = faults.iter().any(|fault| fault.field == field && fault.problem.contains(says) && fault.line > 0);
        assert!(found, "{to}: {faults:#?}");
    }
    let twice = format!("{GOOD}\n---\napiVersion: spillway/v1\nkind: Tenant\nmetadata: {{name: acme}}\n");
    assert!(Snapshot::compile(1, &parse(&twice).unwrap()).is_err());
    assert!(Snapshot::compile(1, &[]).is_err(), "no region at all");
}

#[test]
fn a_fallback_is_another_onnx_model_with_the_same_tensors_and_none_of_its_own() {
    let with = |fallback: &str| {
        let small = GOOD.split("kind: Model").nth(1).unwrap().split("  cost: {").next().unwrap();
        let small = small.replace("name: phishing", "name: small");
        let primary = GOOD.replacen("levels: [1, 3, 4]", &format!("levels: [1, 2]\n    fallback: {fallback}"), 1);
        format!("{primary}\n---\napiVersion: spillway/v1\nkind: Model{small}")
    };
    let compiled = |text: &str| Snapshot::compile(1, &parse(text).unwrap());
    let snapshot = compiled(&with("small")).unwrap();
    assert_eq!(snapshot.models["phishing"].fallback().unwrap().as_str(), "small");
    let pool = Name::parse("scorers").unwrap();
    let names: Vec<&str> = snapshot.fallbacks_of(&pool).map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["small"]);

    let small = |from: &str, to: &str| {
        let text = with("small");
        let at = text.rfind(from).unwrap();
        format!("{}{to}{}", &text[..at], &text[at + from.len()..])
    };
    for (text, says) in [
        (with("gone"), "no Model 'gone'"),
        (with("phishing"), "is the model itself"),
        (small("backend: onnx", "backend: triton"), "is not of the backend onnx"),
        (
            small("deadline: 200ms", "deadline: 200ms\n  degradation: {levels: [2], fallback: phishing}"),
            "a fallback itself",
        ),
        (
            small("name: score, datatype: FP32", "name: score, datatype: FP64"),
            "is FP32 [-1, 1] here and FP64 [-1, 1] there",
        ),
        (small("name: score,", "name: other,"), "the output 'score' is FP32 [-1, 1] here and absent there"),
        (small("name: features,", "name: columns,"), "the input 'features' is FP32 [-1, 2] here and absent there"),
        (
            small("shape: [-1, 1] }", "shape: [-1, 1] }\n    - { name: more, datatype: FP32, shape: [1] }"),
            "'more' is absent here",
        ),
    ] {
        let faults = compiled(&text).unwrap_err();
        let found = faults
            .iter()
            .any(|fault| fault.field == "spec.degradation.fallback" && fault.problem.contains(says) && fault.line > 0);
        assert!(found, "{says}: {faults:#?}");
    }
    let off = with("small").replacen("levels: [1, 2]", "levels: [1]", 1);
    assert_eq!(compiled(&off).unwrap().fallbacks_of(&pool).count(), 0, "level 2 is not allowed");
}

#[test]
fn faults_stay_on_one_line_whatever_the_operator_wrote() {
    let faults = parse("apiVersion: \"a\\nb\\e[31m\"\nkind: Tenant\nmetadata: {name: x}\n").unwrap_err();
    assert!(faults.iter().all(|fault| !fault.to_string().chars().any(char::is_control)), "{faults:?}");
}
