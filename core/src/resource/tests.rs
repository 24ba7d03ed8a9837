use super::*;
use crate::snapshot::Snapshot;

const GOOD: &str = r#"
apiVersion: spillway/v1
kind: Region
metadata: { name: eu-west }
spec: { trustDomain: spillway.test }
---
apiVersion: spillway/v1
kind: Pool
metadata: { name: scorers }
spec:
  region: eu-west
  pods:
    - { name: pod-0, address: "127.0.0.1:9001" }
    - { name: pod-1, address: "127.0.0.1:9002" }
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
  deadline: 200ms
  maxDeadline: 5s
  entityInput: site_id
  inputs:
    - { name: features, datatype: FP32, shape: [-1, 2], features: [site.age, site.https] }
  outputs:
    - { name: score, datatype: FP32, shape: [-1, 1] }
---
apiVersion: spillway/v1
kind: Tenant
metadata: { name: acme }
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
    assert_eq!(snapshot.pool_of(model, &region).unwrap().1.pods.len(), 2);
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
    assert!(has("5: Pool/bad name: spec.regoin: unknown key, expected one of pods, region"), "{shown:#?}");
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
        ("trustDomain: spillway.test", "trustDomain: Spillway", "spec.trustDomain"),
        ("name: score,", "name: \"\",", "spec.outputs[0].name"),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let faults = parse(&GOOD.replacen(from, to, 1)).unwrap_err();
        assert!(faults.iter().any(|fault| fault.field == field && fault.line > 0), "{to}: {faults:#?}");
    }
}

#[test]
fn references_that_do_not_resolve_are_faults() {
    for (from, to, field, says) in [
        ("pools: [scorers]", "pools: [gone]", "spec.pools[0]", "no Pool 'gone'"),
        ("region: eu-west", "region: gone", "spec.region", "no Region 'gone'"),
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
fn faults_stay_on_one_line_whatever_the_operator_wrote() {
    let faults = parse("apiVersion: \"a\\nb\\e[31m\"\nkind: Tenant\nmetadata: {name: x}\n").unwrap_err();
    assert!(faults.iter().all(|fault| !fault.to_string().chars().any(char::is_control)), "{faults:?}");
}
