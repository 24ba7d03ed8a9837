//! What the tests of this crate share: the resources of one region with the phishing model, and its expected scores.

pub mod double;
pub mod pod;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use spillway_core::inference::{Datatype, Parameters, Tensor};
use spillway_core::resource::{self, Model, Resource, Spec};
use spillway_core::units::Name;
use tract_onnx::pb;

pub const MODEL: &str = "phishing";

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

/// A folder as `models` in the sidecar's settings wants it (`<folder>/<model>/1/model.onnx`): of the dev model, and of
/// two whose scores are the features themselves.
pub fn models() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let dev = std::fs::read(dev_model().join("1/model.onnx")).unwrap();
    let same = identity(1, 9, "features", "score");
    for (name, file) in [(MODEL, &dev), ("refusing", &same), ("defaulting", &same)] {
        let version = folder.path().join(name).join("1");
        std::fs::create_dir_all(&version).unwrap();
        std::fs::write(version.join("model.onnx"), file).unwrap();
    }
    folder
}

/// An ONNX file whose output is its input, `[any, columns]` of this element type (ONNX `TensorProto.DataType`).
pub fn identity(datatype: i32, columns: i64, input: &str, output: &str) -> Vec<u8> {
    use pb::tensor_shape_proto::{Dimension, dimension::Value as Size};
    let fixed = Dimension { value: Some(Size::DimValue(columns)), ..Dimension::default() };
    let shape = pb::TensorShapeProto { dim: vec![Dimension::default(), fixed] };
    let value = |name: &str| pb::ValueInfoProto {
        name: name.into(),
        r#type: Some(pb::TypeProto {
            value: Some(pb::type_proto::Value::TensorType(pb::type_proto::Tensor {
                elem_type: datatype,
                shape: Some(shape.clone()),
            })),
            ..pb::TypeProto::default()
        }),
        ..pb::ValueInfoProto::default()
    };
    let node = pb::NodeProto {
        input: vec![input.into()],
        output: vec![output.into()],
        name: "same".into(),
        op_type: "Identity".into(),
        ..pb::NodeProto::default()
    };
    let graph = pb::GraphProto {
        name: "g".into(),
        node: vec![node],
        input: vec![value(input)],
        output: vec![value(output)],
        ..pb::GraphProto::default()
    };
    let opset = pb::OperatorSetIdProto { domain: String::new(), version: 17 };
    pb::ModelProto { ir_version: 8, opset_import: vec![opset], graph: Some(graph), ..pb::ModelProto::default() }
        .encode_to_vec()
}

fn dev_model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../cli/dev/model")
}

/// One case of `expected.json`: an entity, its nine features, the score of the training library.
pub struct Case {
    pub entity: String,
    pub features: Vec<f32>,
    pub score: f32,
}

/// The cases and the tolerance.
pub fn expected() -> (Vec<Case>, f32) {
    let text = std::fs::read_to_string(dev_model().join("expected.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let number = |value: &serde_json::Value| value.as_f64().unwrap() as f32;
    let case = |case: &serde_json::Value| Case {
        entity: case["entity"].as_str().unwrap().to_owned(),
        features: case["features"].as_array().unwrap().iter().map(number).collect(),
        score: number(&case["score"]),
    };
    (json["cases"].as_array().unwrap().iter().map(case).collect(), number(&json["tolerance"]))
}

/// A Model resource of backend onnx whose features come from the client; `edit` changes the text first.
pub fn manifest(edit: impl FnOnce(String) -> String) -> Arc<Model> {
    let text = edit(
        "apiVersion: spillway/v1\nkind: Model\nmetadata: {name: phishing}\nspec:\n  pools: [scorers]\n  versions: ['1']\n  \
         backend: onnx\n  deadline: 2s\n  inputs:\n  - {name: features, datatype: FP32, shape: [-1, 9]}\n  outputs:\n  \
         - {name: score, datatype: FP32, shape: [-1, 1]}\n"
            .to_owned(),
    );
    let resources: Vec<Resource> = resource::parse(&text).unwrap_or_else(|faults| panic!("{faults:?}"));
    match &resources[0].spec {
        Spec::Model(model) => Arc::new((**model).clone()),
        other => panic!("not a model: {other:?}"),
    }
}

pub fn fp32(name: &str, shape: &[i64], values: &[f32]) -> Tensor {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor {
        name: name.into(),
        datatype: Datatype::Fp32,
        shape: shape.to_vec(),
        parameters: Parameters::default(),
        data: Bytes::from(data),
    }
}

pub fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}
