use proptest::prelude::*;

use super::*;
use crate::inference::json::decode_request;
use crate::inference::{Datatype, Limits, entities};
use crate::resource;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// What an [`Identity`] borrows.
#[derive(Clone, Debug, PartialEq)]
struct Whose {
    tenant: Name,
    model: Name,
    version: Name,
    policy_epoch: [u8; 32],
    feature_epoch: u64,
}

impl Whose {
    fn identity(&self) -> Identity<'_> {
        Identity {
            tenant: &self.tenant,
            model: &self.model,
            version: &self.version,
            policy_epoch: self.policy_epoch,
            feature_epoch: self.feature_epoch,
        }
    }
}

fn acme() -> Whose {
    Whose { tenant: name("acme"), model: name("m"), version: name("1"), policy_epoch: [7; 32], feature_epoch: 3 }
}

fn tensor(name: &str, data: &[u8]) -> Tensor {
    Tensor {
        name: name.into(),
        datatype: Datatype::Int8,
        shape: vec![data.len() as i64],
        parameters: Parameters::default(),
        data: Bytes::copy_from_slice(data),
    }
}

fn output(name: &str) -> RequestedOutput {
    RequestedOutput { name: name.into(), parameters: Parameters::default() }
}

fn text(value: &str) -> Parameter {
    Parameter::Text(value.into())
}

fn request() -> InferRequest {
    InferRequest {
        model: "m".into(),
        version: String::new(),
        id: "7".into(),
        parameters: Parameters(vec![("entity_id".into(), text("user-1")), ("top_k".into(), Parameter::Int(5))]),
        inputs: vec![
            Tensor { parameters: Parameters(vec![("unit".into(), text("m"))]), ..tensor("b", &[1, 2, 3, 4]) },
            tensor("a", &[5, 6]),
        ],
        outputs: vec![output("y"), output("label")],
    }
}

fn key(whose: &Whose, request: &InferRequest) -> Key {
    Key::of(&whose.identity(), request).unwrap()
}

fn changed(change: impl FnOnce(&mut InferRequest)) -> InferRequest {
    let mut request = request();
    change(&mut request);
    request
}

fn json(body: &str) -> Key {
    let request = decode_request(Bytes::copy_from_slice(body.as_bytes()), None, "m", "", &Limits::default()).unwrap();
    key(&acme(), &request)
}

/// `inputs` of one tensor `x`.
fn json_of(datatype: &str, shape: &str, data: &str) -> String {
    format!(r#"{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}"#)
}

#[test]
fn t01_one_body_from_two_tenants_has_two_keys() {
    let globex = Whose { tenant: name("globex"), ..acme() };
    assert!(!key(&acme(), &request()).is(&key(&globex, &request())));
    assert_ne!(key(&acme(), &request()).hash, key(&globex, &request()).hash);
}

#[test]
fn t02_a_forced_hash_collision_is_another_key() {
    let key = |request: &InferRequest| Key::hashed_by(&acme().identity(), request, |_| [0; 32]).unwrap();
    let (one, other) = (key(&request()), key(&changed(|request| request.id = "8".into())));
    assert!(one.is(&other));
    for length in [10, MOST_MATERIAL * 2] {
        let with = |byte: u8| key(&changed(|request| request.inputs.push(tensor("c", &vec![byte; length]))));
        assert_eq!(with(1).hash, with(2).hash);
        assert!(with(1).is(&with(1)) && !with(1).is(&with(2)), "{length} bytes");
    }
}

/// Every member that is keyed, changed alone.
#[test]
fn t03_whatever_is_keyed_makes_another_key() {
    type Change = fn(&mut Whose, &mut InferRequest);
    let changes: [(&str, Change); 26] = [
        ("tenant", |whose, _| whose.tenant = name("globex")),
        ("model", |whose, _| whose.model = name("n")),
        ("version", |whose, _| whose.version = name("2")),
        ("policy epoch", |whose, _| whose.policy_epoch[31] ^= 1),
        ("feature epoch", |whose, _| whose.feature_epoch += 1),
        ("entity", |_, request| request.parameters.set("entity_id", text("user-2"))),
        ("no entity", |_, request| drop(request.parameters.remove("entity_id"))),
        ("parameter", |_, request| request.parameters.set("top_k", Parameter::Int(6))),
        ("parameter's type", |_, request| request.parameters.set("top_k", Parameter::Uint(5))),
        ("parameter's name", |_, request| request.parameters.0[1].0 = "top_n".into()),
        ("unknown parameter", |_, request| request.parameters.set("seed", Parameter::Bool(false))),
        ("zero's sign", |_, request| request.parameters.set("top_k", Parameter::Double(-0.0))),
        ("zero", |_, request| request.parameters.set("top_k", Parameter::Double(0.0))),
        ("an input's parameter", |_, request| request.inputs[1].parameters.set("timeout", Parameter::Int(1))),
        ("an input's parameter gone", |_, request| request.inputs[0].parameters = Parameters::default()),
        ("an input's name", |_, request| request.inputs[1].name = "c".into()),
        ("an input's datatype", |_, request| request.inputs[1].datatype = Datatype::Uint8),
        ("an input's shape", |_, request| request.inputs[0].shape = vec![2, 2]),
        ("an input's bytes", |_, request| request.inputs[1].data = Bytes::from_static(&[5, 7])),
        ("inputs' bytes swapped", |_, request| {
            let (a, b) = (tensor("a", &[1, 2, 3, 4]), tensor("b", &[5, 6]));
            request.inputs = vec![a, Tensor { parameters: request.inputs[0].parameters.clone(), ..b }];
        }),
        ("an input more", |_, request| request.inputs.push(tensor("c", &[1]))),
        ("an input less", |_, request| drop(request.inputs.pop())),
        ("an output more", |_, request| request.outputs.push(output("z"))),
        ("an output less", |_, request| drop(request.outputs.pop())),
        ("all outputs", |_, request| request.outputs.clear()),
        ("an output's parameter", |_, request| request.outputs[0].parameters.set("timeout", Parameter::Int(1))),
    ];
    let mut keys = vec![("unchanged", key(&acme(), &request()))];
    for (what, change) in changes {
        let (mut whose, mut request) = (acme(), request());
        change(&mut whose, &mut request);
        keys.push((what, key(&whose, &request)));
    }
    for (index, (one, first)) in keys.iter().enumerate() {
        for (other, second) in keys.iter().skip(index + 1) {
            assert!(!first.is(second) && first.hash != second.hash, "{one} and {other}");
        }
    }
}

/// Every member that is not keyed, changed alone.
#[test]
fn t03_what_cannot_change_the_answer_is_not_keyed() {
    type Change = fn(&mut InferRequest);
    let changes: [(&str, Change); 9] = [
        ("id", |request| request.id = "8".into()),
        ("default version by name", |request| request.version = "1".into()),
        ("timeout", |request| request.parameters.set("timeout", Parameter::Int(5_000))),
        ("priority", |request| request.parameters.set("priority", Parameter::Uint(1))),
        ("form of outputs", |request| request.parameters.set("binary_data_output", Parameter::Bool(true))),
        ("form of an output", |request| request.outputs[0].parameters.set("binary_data", Parameter::Bool(true))),
        ("form of an input", |request| request.inputs[0].parameters.set("binary_data_size", Parameter::Int(4))),
        ("order of inputs and outputs", |request| {
            request.inputs.reverse();
            request.outputs.reverse();
        }),
        ("order of parameters", |request| request.parameters.0.reverse()),
    ];
    let expected = key(&acme(), &request());
    for (what, change) in changes {
        assert!(key(&acme(), &changed(change)).is(&expected), "{what}");
    }
}

#[test]
fn t04_a_byte_moved_over_a_boundary_is_another_key() {
    let named = |tenant: &str, model: &str, version: &str| {
        let whose = Whose { tenant: name(tenant), model: name(model), version: name(version), ..acme() };
        key(&whose, &request())
    };
    let inputs = |inputs: &[(&str, &[u8])]| {
        let inputs = inputs.iter().map(|(name, data)| tensor(name, data)).collect();
        key(&acme(), &changed(|request| request.inputs = inputs))
    };
    let flat = |name: &str, data: &'static [u8]| {
        let flat = Tensor { shape: vec![], data: Bytes::from_static(data), ..tensor(name, &[]) };
        key(&acme(), &changed(|request| request.inputs = vec![flat]))
    };
    let parameter = |name: &str, value: &str| {
        key(&acme(), &changed(|request| request.parameters = Parameters(vec![(name.into(), text(value))])))
    };
    let outputs = |names: &[&str]| {
        key(&acme(), &changed(|request| request.outputs = names.iter().map(|name| output(name)).collect()))
    };
    let placed = |place: fn(&mut InferRequest) -> &mut Parameters| {
        key(&acme(), &changed(|request| place(request).set("a", text("b"))))
    };
    for (one, other) in [
        (named("ab", "c", "1"), named("a", "bc", "1")),
        (named("a", "b1", "1"), named("a", "b", "11")),
        (inputs(&[("a", &[1, 2]), ("b", &[3])]), inputs(&[("a", &[1]), ("b", &[2, 3])])),
        (inputs(&[("a", &[1, 2, 3])]), inputs(&[("a", &[1]), ("b", &[2, 3])])),
        (flat("ab", b"c"), flat("a", b"bc")),
        (parameter("ab", "c"), parameter("a", "bc")),
        (outputs(&["ab"]), outputs(&["a", "b"])),
        (placed(|request| &mut request.parameters), placed(|request| &mut request.inputs[1].parameters)),
        (placed(|request| &mut request.inputs[1].parameters), placed(|request| &mut request.outputs[0].parameters)),
    ] {
        assert!(!one.is(&other) && one.hash != other.hash, "{one:?} {other:?}");
    }
}

#[test]
fn t05_equal_json_may_share_a_key_and_unequal_never() {
    let same = [
        json_of("FP32", "[2]", "[1.5, 2]"),
        json_of("FP32", " [ 2 ] ", "[ 1.50,\n2e0 ]"),
        r#"{"id":"9","inputs":[{"data":[15e-1,2.0],"shape":[2],"name":"\u0078","datatype":"FP32"}],"outputs":null}"#
            .into(),
        r#"{"parameters":{"timeout":9},"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1.5,2]}]}"#.into(),
    ];
    for body in &same {
        assert!(json(body).is(&json(&same[0])), "{body}");
    }
    for (datatype, shape, data) in [
        ("FP32", "[2]", "[1.5,2.0000002]"),
        ("FP32", "[2]", "[2,1.5]"),
        ("FP32", "[1,2]", "[1.5,2]"),
        ("FP64", "[2]", "[1.5,2]"),
        ("FP32", "[3]", "[1.5,2,0]"),
    ] {
        assert!(!json(&json_of(datatype, shape, data)).is(&json(&same[0])), "{datatype} {shape} {data}");
    }
    let strings = |data: &str| json(&json_of("BYTES", "[2]", data));
    assert!(!strings(r#"["ab","c"]"#).is(&strings(r#"["a","bc"]"#)));
    let (composed, decomposed) = (strings(r#"["\u00e9",""]"#), strings(r#"["e\u0301",""]"#));
    assert!(!composed.is(&decomposed), "no Unicode normal form");
}

#[test]
fn t07_integers_beyond_2_to_53_have_keys_of_their_own() {
    let int = |data: &str| json(&json_of("INT64", "[1]", data));
    assert!(!int("[9007199254740993]").is(&int("[9007199254740992]")));
    assert!(int("[-0]").is(&int("[0]")), "one integer");
    let float = |data: &str| json(&json_of("FP64", "[1]", data));
    assert!(!float("[-0.0]").is(&float("[0.0]")), "two floats");
}

#[test]
fn t08_nan_is_keyed_by_its_bits() {
    let of = |bits: u32| {
        let data = Bytes::copy_from_slice(&bits.to_le_bytes());
        key(&acme(), &changed(|request| request.inputs[1] = Tensor { data, ..tensor("a", &[]) }))
    };
    let (quiet, payload, signalling) = (0x7fc0_0000, 0x7fc0_0001, 0x7f80_0001);
    assert!(of(quiet).is(&of(quiet)), "found again, though NaN is not equal to itself");
    assert!(!of(quiet).is(&of(payload)) && !of(quiet).is(&of(signalling)));
    let parameter =
        |value: f64| key(&acme(), &changed(|request| request.parameters.set("x", Parameter::Double(value))));
    assert!(parameter(f64::NAN).is(&parameter(f64::NAN)));
}

#[test]
fn a_long_request_is_kept_as_its_digest() {
    let of = |length: usize, last: u8| {
        let mut data = vec![0; length];
        data.push(last);
        key(&acme(), &changed(|request| request.inputs.push(tensor("c", &data))))
    };
    assert!(of(8 << 10, 0).material.len() > 8 << 10);
    let long = of(1 << 20, 0);
    assert!(long.material.len() < 256, "{} bytes", long.material.len());
    assert!(long.is(&of(1 << 20, 0)));
    assert!(!long.is(&of(1 << 20, 1)) && !long.is(&of((1 << 20) + 1, 0)));
    for length in MOST_MATERIAL - 600..MOST_MATERIAL + 100 {
        assert!(of(length, 0).material.len() <= MOST_MATERIAL);
    }
    let many = |value: &str| {
        let long = text(&value.repeat(2_000));
        let parameters = (0..32).map(|index| (format!("p{index}"), long.clone())).collect();
        key(&acme(), &changed(|request| request.parameters = Parameters(parameters)))
    };
    assert!(many("a").material.len() < 256, "nor do parameters grow it");
    assert!(!many("a").is(&many("b")));
}

#[test]
fn a_key_shows_nothing_of_the_request() {
    let shown = format!("{:?}", key(&acme(), &request()));
    assert_eq!(shown.len(), "Key(0123456789abcdef…)".len(), "{shown}");
}

#[test]
fn what_belongs_to_one_request_alone_has_no_key() {
    for (parameter, value, expected) in [
        ("sequence_id", Parameter::Int(5), Uncacheable::Sequence),
        ("sequence_id", text("a"), Uncacheable::Sequence),
        ("sequence_start", Parameter::Bool(true), Uncacheable::Sequence),
        ("sequence_end", Parameter::Bool(false), Uncacheable::Sequence),
        ("triton_enable_empty_final_response", Parameter::Bool(true), Uncacheable::Stream),
    ] {
        let request = changed(|request| request.parameters.set(parameter, value));
        assert_eq!(Key::of(&acme().identity(), &request), Err(expected), "{parameter}");
    }
}

fn parameters() -> impl Strategy<Value = Parameters> {
    let value = prop_oneof![
        any::<bool>().prop_map(Parameter::Bool),
        (0_i64..2).prop_map(Parameter::Int),
        (0_u64..2).prop_map(Parameter::Uint),
        proptest::sample::select(&[0.0, -0.0, 1.0][..]).prop_map(Parameter::Double),
        "[ab]{0,2}".prop_map(Parameter::Text),
    ];
    let names = proptest::sample::select(&["a", "b", "timeout", "binary_data", "binary_data_size"][..]);
    proptest::collection::vec((names.prop_map(str::to_owned), value), 0..3).prop_map(Parameters)
}

fn requests() -> impl Strategy<Value = InferRequest> {
    let datatype = proptest::sample::select(&[Datatype::Int8, Datatype::Bytes][..]);
    let shape = proptest::collection::vec(1_i64..3, 0..3);
    let data = proptest::collection::vec(0_u8..2, 0..3).prop_map(Bytes::from);
    let input = ("[ab]{0,2}", datatype, shape, parameters(), data)
        .prop_map(|(name, datatype, shape, parameters, data)| Tensor { name, datatype, shape, parameters, data });
    let output = ("[ab]{0,2}", parameters()).prop_map(|(name, parameters)| RequestedOutput { name, parameters });
    let lists = (proptest::collection::vec(input, 0..3), proptest::collection::vec(output, 0..3));
    (parameters(), lists).prop_map(|(parameters, (inputs, outputs))| InferRequest {
        parameters,
        inputs,
        outputs,
        ..InferRequest::default()
    })
}

/// The request with what is not keyed taken out, and in the order of names: what the key stands for.
fn normal(mut request: InferRequest) -> String {
    let tidy = |parameters: &mut Parameters, unkeyed: &str| {
        parameters.0.retain(|(name, _)| name != unkeyed);
        parameters.0.sort_by(|a, b| a.0.cmp(&b.0));
    };
    tidy(&mut request.parameters, "timeout");
    request.inputs.iter_mut().for_each(|input| tidy(&mut input.parameters, "binary_data_size"));
    request.outputs.iter_mut().for_each(|output| tidy(&mut output.parameters, "binary_data"));
    request.inputs.sort_by(|a, b| a.name.cmp(&b.name));
    request.outputs.sort_by(|a, b| a.name.cmp(&b.name));
    format!("{request:?}")
}

proptest! {
    #[test]
    fn t03_keys_are_equal_if_and_only_if_all_that_is_keyed_is(
        requests in proptest::collection::vec(requests(), 2),
        digested: bool,
    ) {
        let [mut one, mut other] = <[_; 2]>::try_from(requests).unwrap();
        if digested {
            let long = tensor("long", &vec![0; MOST_MATERIAL]);
            one.inputs.insert(0, long.clone());
            other.inputs.push(long);
        }
        let (first, second) = (key(&acme(), &one), key(&acme(), &other));
        prop_assert_eq!(first.is(&second), normal(one) == normal(other));
        prop_assert_eq!(first.is(&second), first.hash == second.hash);
    }

    #[test]
    fn t03_the_order_that_a_client_chose_is_not_keyed(request in requests(), turns in 0_usize..3) {
        // Two of one name would be told apart by their order: no decoder lets them in.
        prop_assume!(request.check_names().is_ok());
        let mut turned = request.clone();
        let by = |length: usize| if length == 0 { 0 } else { turns % length };
        turned.inputs.rotate_left(by(request.inputs.len()));
        turned.outputs.rotate_left(by(request.outputs.len()));
        prop_assert!(key(&acme(), &request).is(&key(&acme(), &turned)));
    }
}

const RESOURCES: &str = "
{apiVersion: spillway/v1, kind: Region, metadata: {name: eu}, spec: {trustDomain: td}}
---
apiVersion: spillway/v1
kind: Pool
metadata: {name: p}
spec: {region: eu, pods: [{name: pod-1, address: '127.0.0.1:1'}]}
---
apiVersion: spillway/v1
kind: FeatureGroup
metadata: {name: site}
spec:
  scope: shared
  schemaVersion: 1
  freshFor: 10m
  retainFor: 1d
  fields: [{name: age, datatype: FP32}]
---
apiVersion: spillway/v1
kind: FeatureGroup
metadata: {name: user}
spec:
  scope: tenant
  schemaVersion: 1
  freshFor: 1m
  retainFor: 1d
  fields: [{name: clicks, datatype: FP32}, {name: orders, datatype: FP32}]
---
apiVersion: spillway/v1
kind: Model
metadata: {name: m}
spec:
  pools: [p]
  versions: ['1']
  backend: onnx
  deadline: 1s
  maxBatch: 600
  entityInput: who
  inputs:
    - {name: x, datatype: FP32, shape: [-1, 3], features: [user.clicks, site.age, user.orders]}
    - {name: z, datatype: FP32, shape: [-1, 1], features: [site.age]}
    - {name: w, datatype: INT8, shape: [-1]}
  outputs:
    - {name: y, datatype: FP32, shape: [-1]}
";

fn about(ids: &[&str], sent: &[&str]) -> Result<Dependencies, Uncacheable> {
    let snapshot = Snapshot::compile(1, &resource::parse(RESOURCES).unwrap()).unwrap();
    let mut request = InferRequest::default();
    for name in sent {
        request.inputs.push(tensor(name, &[0]));
    }
    let data: Vec<u8> =
        ids.iter().flat_map(|id| [&(id.len() as u32).to_le_bytes()[..], id.as_bytes()].concat()).collect();
    let who = Tensor { datatype: Datatype::Bytes, shape: vec![ids.len() as i64], ..tensor("who", &data) };
    request.inputs.push(who);
    let model = &snapshot.models["m"];
    let entities = entities(model, &request).unwrap();
    Dependencies::of(&snapshot, model, &name("acme"), &request, &entities)
}

/// As the change channel names them.
fn rows(texts: &[&str]) -> Vec<u64> {
    let row = |text: &&str| dependency(RowKey::parse(text).unwrap().as_str());
    let mut rows: Vec<u64> = texts.iter().map(row).collect();
    rows.sort_unstable();
    rows
}

#[test]
fn a_result_depends_on_the_rows_that_change_messages_name() {
    let dependencies = about(&["u 1", "u2"], &["w"]).unwrap();
    let texts = ["{s:u%201}:site", "{s:u2}:site", "{t4:acme:u%201}:user", "{t4:acme:u2}:user"];
    assert_eq!(dependencies.rows, rows(&texts));
    assert_eq!(dependencies.fresh_for, Some(Duration::from_secs(60)), "the shorter of the two groups");
    assert_eq!(about(&["u2", "u2"], &["w"]), about(&["u2"], &["w"]), "each row once");
}

#[test]
fn an_input_that_the_client_sent_depends_on_no_row() {
    let dependencies = about(&["u"], &["w", "x"]).unwrap();
    assert_eq!(dependencies, Dependencies { rows: rows(&["{s:u}:site"]), fresh_for: Some(Duration::from_secs(600)) });
    assert_eq!(about(&["u"], &["w", "x", "z"]), Ok(Dependencies::default()));
}

#[test]
fn a_result_of_too_many_rows_is_not_stored() {
    let ids: Vec<String> = (0..=MOST_ROWS / 2).map(|index| format!("u{index}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    assert_eq!(about(&ids[1..], &["w"]).unwrap().rows.len(), MOST_ROWS);
    assert_eq!(about(&ids, &["w"]), Err(Uncacheable::TooManyRows));
    assert!(about(&ids, &["w", "x"]).is_ok(), "one group");
}
