use super::*;
use crate::inference::{Parameters, RequestedOutput};
use crate::resource::{Spec, parse};

/// `x` is joined, `text` must be sent, `weights` has no batch.
const MODEL: &str = "
apiVersion: spillway/v1
kind: Model
metadata: {name: m}
spec:
  pools: [p]
  versions: ['1']
  backend: onnx
  deadline: 1s
  maxBatch: 4
  entityInput: who
  inputs:
    - {name: x, datatype: FP32, shape: [-1, 2], features: [site.a, site.b]}
    - {name: text, datatype: INT8, shape: [-1]}
    - {name: weights, datatype: INT8, shape: [2]}
  outputs:
    - {name: y, datatype: FP32, shape: [-1]}
    - {name: label, datatype: INT8, shape: [-1]}
";

fn model() -> Model {
    match parse(MODEL).expect("the model is valid").remove(0).spec {
        Spec::Model(model) => *model,
        other => panic!("{other:?}"),
    }
}

fn tensor(name: &str, datatype: Datatype, shape: &[i64]) -> Tensor {
    let elements = Tensor::elements(name, shape).unwrap();
    let data = vec![0; elements * datatype.width().unwrap_or(0)];
    Tensor { name: name.into(), datatype, shape: shape.to_vec(), parameters: Parameters::default(), data: data.into() }
}

fn who(ids: &[&[u8]]) -> Tensor {
    let mut data = Vec::new();
    for id in ids {
        data.extend_from_slice(&(id.len() as u32).to_le_bytes());
        data.extend_from_slice(id);
    }
    Tensor { shape: vec![ids.len() as i64], data: data.into(), ..tensor("who", Datatype::Bytes, &[1]) }
}

/// A request of `rows` rows without `x`.
fn request(rows: i64) -> InferRequest {
    InferRequest {
        id: "7".into(),
        inputs: vec![tensor("text", Datatype::Int8, &[rows]), tensor("weights", Datatype::Int8, &[2])],
        ..InferRequest::default()
    }
}

fn about(id: &str, mut request: InferRequest) -> InferRequest {
    request.parameters.set(ENTITY_ID, Parameter::Text(id.into()));
    request
}

fn check(request: &InferRequest) -> Result<(), &'static str> {
    let model = model();
    let entities = entities(&model, request).map_err(|fault| fault.code())?;
    check_against(&model, request, &entities).map_err(|fault| fault.code())
}

#[test]
fn bound_inputs_may_be_left_to_the_join_but_others_not() {
    assert_eq!(check(&about("a", request(1))), Ok(()));
    assert_eq!(check(&request(1)), Err("missing-entity"));
    let mut sent = request(3);
    sent.inputs.push(tensor("x", Datatype::Fp32, &[3, 2]));
    assert_eq!(check(&sent), Ok(()));
    assert_eq!(check(&about("a", sent)), Ok(()), "the entity then says only where it goes");
    let mut lacking = about("a", request(1));
    lacking.inputs.remove(0);
    assert_eq!(check(&lacking), Err("missing-input"));
}

#[test]
fn joined_requests_have_one_row_for_each_entity() {
    let mut many = request(2);
    many.inputs.push(who(&[b"a", b"b"]));
    assert_eq!(check(&many), Ok(()));
    assert_eq!(rows(&model(), &many, &entities(&model(), &many).unwrap()), Some(2));
    many.inputs[0] = tensor("text", Datatype::Int8, &[3]);
    assert_eq!(check(&many), Err("tensor-mismatch"));
    assert_eq!(check(&about("a", request(2))), Err("tensor-mismatch"));
}

#[test]
fn t38_names_must_be_the_models_and_come_once() {
    let mut unknown = about("a", request(1));
    unknown.inputs.push(tensor("other", Datatype::Int8, &[1]));
    assert_eq!(check(&unknown), Err("unknown-tensor"));
    let mut twice = about("a", request(1));
    twice.inputs.push(tensor("text", Datatype::Int8, &[1]));
    assert_eq!(check(&twice), Err("duplicate-tensor"));
    let mut output = about("a", request(1));
    output.outputs.push(RequestedOutput { name: "other".into(), ..RequestedOutput::default() });
    assert_eq!(check(&output), Err("unknown-tensor"));
}

#[test]
fn t36_inputs_must_fit_the_manifest() {
    for (input, code) in [
        (tensor("x", Datatype::Fp64, &[1, 2]), "tensor-mismatch"),
        (tensor("x", Datatype::Fp32, &[1, 3]), "tensor-mismatch"),
        (tensor("x", Datatype::Fp32, &[2]), "tensor-mismatch"),
        (tensor("x", Datatype::Fp32, &[5, 2]), "limit-exceeded"),
    ] {
        let mut request = request(1);
        request.inputs.push(input);
        assert_eq!(check(&request), Err(code));
    }
    let mut weights = about("a", request(1));
    weights.inputs[1] = tensor("weights", Datatype::Int8, &[1]);
    assert_eq!(check(&weights), Err("tensor-mismatch"));
}

#[test]
fn t42_entity_ids_are_any_bytes_but_bounded() {
    let hostile: &[u8] = b"\r\n\0:{}'\"\xe2\x80\xae";
    let mut many = request(2);
    many.inputs.push(who(&[hostile, &[b'a'; 256]]));
    let found = entities(&model(), &many).unwrap();
    assert_eq!(found.ids(), [Bytes::from_static(hostile), Bytes::from_static(&[b'a'; 256])]);
    for ids in [&[&b""[..]][..], &[b"a", &[b'a'; 257]]] {
        many.inputs[2] = who(ids);
        assert_eq!(check(&many), Err("invalid-entity-id"));
    }
    many.inputs[2] = who(&[&b"a"[..]; 5]);
    assert_eq!(check(&many), Err("limit-exceeded"));
    many.inputs[2] = tensor("who", Datatype::Int8, &[2]);
    assert_eq!(check(&many), Err("tensor-mismatch"));
    many.inputs[2] = Tensor { shape: vec![1, 2], ..who(&[b"a", b"b"]) };
    assert_eq!(check(&many), Err("tensor-mismatch"));
    assert_eq!(check(&about("", request(1))), Err("invalid-entity-id"));
    assert_eq!(check(&about(&"a".repeat(257), request(1))), Err("invalid-entity-id"));
    let mut number = request(1);
    number.parameters.set(ENTITY_ID, Parameter::Int(7));
    assert_eq!(check(&number), Err("invalid-parameter"));
    let mut both = about("a", request(1));
    both.inputs.push(who(&[b"a"]));
    assert_eq!(check(&both), Err("two-entities"));
}

#[test]
fn t43_ids_are_compared_byte_for_byte() {
    let id = |text: &str| entities(&model(), &about(text, request(1))).unwrap();
    assert_ne!(id("\u{e9}"), id("e\u{301}"));
}

#[test]
fn t40_answers_to_something_else_are_refused() {
    let (y, label) = (tensor("y", Datatype::Fp32, &[2]), tensor("label", Datatype::Int8, &[2]));
    let answer = |id: &str, outputs: &[&Tensor]| {
        let outputs = outputs.iter().map(|output| (*output).clone()).collect();
        InferResponse { id: id.into(), outputs, ..InferResponse::default() }
    };
    let all = request(2);
    let judge = |response: &InferResponse| check_answer(&model(), &all, response, Some(2));
    assert_eq!(judge(&answer("7", &[&y, &label])), Ok(()));
    assert_eq!(judge(&answer("", &[&label, &y])), Ok(()));
    assert_eq!(judge(&answer("8", &[&y, &label])), Err(InvalidAnswer::Id));
    assert_eq!(judge(&answer("7", &[&y])), Err(InvalidAnswer::Missing("label".into())));
    assert_eq!(judge(&answer("7", &[&y, &label, &y])), Err(InvalidAnswer::Duplicate("y".into())));
    let mismatch =
        |output: &Tensor| matches!(judge(&answer("7", &[output, &label])), Err(InvalidAnswer::Mismatch { .. }));
    assert!(mismatch(&tensor("y", Datatype::Fp64, &[2])));
    assert!(mismatch(&tensor("y", Datatype::Fp32, &[2, 1])));
    let short = Tensor { data: Bytes::from_static(&[0; 7]), ..y.clone() };
    assert!(matches!(judge(&answer("7", &[&short, &label])), Err(InvalidAnswer::Malformed(_))));
    let rows = judge(&answer("7", &[&tensor("y", Datatype::Fp32, &[3]), &label]));
    assert_eq!(rows, Err(InvalidAnswer::Rows { output: "y".into(), expected: 2, found: 3 }));

    let mut one = request(2);
    one.outputs.push(RequestedOutput { name: "y".into(), ..RequestedOutput::default() });
    assert_eq!(check_answer(&model(), &one, &answer("7", &[&y]), None), Ok(()));
    let more = check_answer(&model(), &one, &answer("7", &[&y, &label]), None);
    assert_eq!(more, Err(InvalidAnswer::Unexpected("label".into())));
}
