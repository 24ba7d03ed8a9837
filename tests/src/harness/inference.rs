//! The requests of the phishing model, and what must come back.

use bytes::{BufMut, Bytes, BytesMut};
use http::Request;
use http_body_util::Full;
use serde::Deserialize;
use serde_json::{Value, json};
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::{InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse};

use super::client::{Answer, Client};

pub const MODEL: &str = "phishing";
pub const INFER: &str = "/v2/models/phishing/infer";
pub const FEATURES: usize = 9;
/// What scikit-learn, onnxruntime and tract agree within.
pub const TOLERANCE: f32 = 1e-5;

/// One entity of the data set and the score that the training library gave it.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    pub entity: String,
    pub features: Vec<f32>,
    pub score: f32,
}

/// The cases of `cli/dev/model/expected.json`.
pub fn cases() -> Vec<Case> {
    #[derive(Deserialize)]
    struct Expected {
        cases: Vec<Case>,
    }
    let path = crate::root().join("cli/dev/model/expected.json");
    let text = std::fs::read_to_string(path).expect("the expected scores lie in the repository");
    serde_json::from_str::<Expected>(&text).expect("they are JSON").cases
}

pub fn assert_scores(what: &str, found: &[f32], cases: &[Case]) {
    assert_eq!(found.len(), cases.len(), "{what}");
    for (found, case) in found.iter().zip(cases) {
        assert!((found - case.score).abs() <= TOLERANCE, "{what}: {case:?} got {found}");
    }
}

/// By the request parameter.
pub fn entity(entity: &str) -> Value {
    json!({ "parameters": { "entity_id": entity }, "inputs": [] })
}

/// By the BYTES input that the model names.
pub fn entities(cases: &[Case]) -> Value {
    let data: Vec<&str> = cases.iter().map(|case| case.entity.as_str()).collect();
    json!({ "inputs": [{ "name": "site_id", "datatype": "BYTES", "shape": [data.len()], "data": data }] })
}

/// With the client's own features.
pub fn features(cases: &[Case]) -> Value {
    let data: Vec<f32> = cases.iter().flat_map(|case| case.features.iter().copied()).collect();
    json!({ "inputs": [{ "name": "features", "datatype": "FP32", "shape": [cases.len(), FEATURES], "data": data }] })
}

/// The scores of a JSON answer, which must be one.
pub fn scores(answer: &Answer) -> Vec<f32> {
    assert_eq!(answer.status, 200, "{}: {}", answer.error_code(), String::from_utf8_lossy(&answer.body));
    let body = answer.json();
    let output = &body["outputs"][0];
    assert_eq!((output["name"].as_str(), output["datatype"].as_str()), (Some("score"), Some("FP32")), "{body}");
    let data: Vec<f32> = serde_json::from_value(output["data"].clone()).expect("numbers");
    assert_eq!(output["shape"], json!([data.len(), 1]), "{body}");
    data
}

/// A request of the binary tensor extension: `head` describes the inputs, `tensors` are their bytes.
pub fn binary(client: &Client, head: &Value, tensors: &[u8]) -> Request<Full<Bytes>> {
    let head = head.to_string();
    let body = [head.as_bytes(), tensors].concat();
    client
        .request("POST", INFER)
        .header("content-type", "application/octet-stream")
        .header("inference-header-content-length", head.len())
        .body(Full::from(body))
        .expect("a request")
}

/// Client-sent features, binary both ways.
pub fn binary_features(client: &Client, cases: &[Case]) -> Request<Full<Bytes>> {
    let tensor = feature_bytes(cases);
    let head = json!({
        "parameters": { "binary_data_output": true },
        "inputs": [{
            "name": "features", "datatype": "FP32", "shape": [cases.len(), FEATURES],
            "parameters": { "binary_data_size": tensor.len() },
        }],
    });
    binary(client, &head, &tensor)
}

/// Entities, binary both ways.
pub fn binary_entities(client: &Client, cases: &[Case]) -> Request<Full<Bytes>> {
    let tensor = entity_bytes(cases);
    let head = json!({
        "parameters": { "binary_data_output": true },
        "inputs": [{
            "name": "site_id", "datatype": "BYTES", "shape": [cases.len()],
            "parameters": { "binary_data_size": tensor.len() },
        }],
    });
    binary(client, &head, &tensor)
}

/// The scores of a binary answer, which must be one.
pub fn binary_scores(answer: &Answer) -> Vec<f32> {
    assert_eq!(answer.status, 200, "{}: {}", answer.error_code(), String::from_utf8_lossy(&answer.body));
    let length: usize = answer.header("inference-header-content-length").parse().expect("a binary answer");
    let head: Value = serde_json::from_slice(&answer.body[..length]).expect("a JSON head");
    let tensor = &answer.body[length..];
    assert_eq!(head["outputs"][0]["parameters"]["binary_data_size"], json!(tensor.len()), "{head}");
    floats(tensor)
}

/// What a gRPC request asks about.
pub enum Asked<'a> {
    Entity(&'a str),
    Entities(&'a [Case]),
    /// Typed contents.
    Features(&'a [Case]),
    /// Raw contents.
    RawFeatures(&'a [Case]),
}

pub fn message(asked: &Asked<'_>) -> ModelInferRequest {
    let mut message = ModelInferRequest { model_name: MODEL.into(), id: "a-1".into(), ..ModelInferRequest::default() };
    let tensor = |name: &str, datatype: &str, shape: Vec<usize>| InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: shape.into_iter().map(|size| i64::try_from(size).expect("a size")).collect(),
        ..InferInputTensor::default()
    };
    match *asked {
        Asked::Entity(entity) => {
            let parameter = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(entity.into())) };
            message.parameters.insert("entity_id".into(), parameter);
        }
        Asked::Entities(cases) => {
            message.inputs.push(tensor("site_id", "BYTES", vec![cases.len()]));
            message.raw_input_contents.push(entity_bytes(cases));
        }
        Asked::Features(cases) => {
            let mut input = tensor("features", "FP32", vec![cases.len(), FEATURES]);
            let values = cases.iter().flat_map(|case| case.features.iter().copied()).collect();
            input.contents = Some(InferTensorContents { fp32_contents: values, ..InferTensorContents::default() });
            message.inputs.push(input);
        }
        Asked::RawFeatures(cases) => {
            message.inputs.push(tensor("features", "FP32", vec![cases.len(), FEATURES]));
            message.raw_input_contents.push(feature_bytes(cases));
        }
    }
    message
}

/// The scores of a gRPC answer, raw or typed.
pub fn message_scores(answer: &ModelInferResponse) -> Vec<f32> {
    let [output] = &answer.outputs[..] else { panic!("one output: {answer:?}") };
    assert_eq!((output.name.as_str(), output.datatype.as_str()), ("score", "FP32"));
    match (&answer.raw_output_contents[..], &output.contents) {
        ([raw], None) => floats(raw),
        ([], Some(contents)) => contents.fp32_contents.clone(),
        _ => panic!("raw or typed contents: {answer:?}"),
    }
}

pub fn feature_bytes(cases: &[Case]) -> Bytes {
    cases.iter().flat_map(|case| &case.features).flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// BYTES elements, each after its length.
fn entity_bytes(cases: &[Case]) -> Bytes {
    let mut bytes = BytesMut::new();
    for case in cases {
        bytes.put_u32_le(u32::try_from(case.entity.len()).expect("a short id"));
        bytes.put_slice(case.entity.as_bytes());
    }
    bytes.freeze()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    assert_eq!(bytes.len() % 4, 0, "whole FP32 values");
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
}
