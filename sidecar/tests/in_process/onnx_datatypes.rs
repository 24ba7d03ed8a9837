//! Which datatypes the embedded backend passes, on models of one Identity node made here.

use crate::support::{identity, manifest, name, soon};
use spillway_core::inference::{Datatype, InferRequest, Parameters, Tensor};
use spillway_runtime::telemetry::TraceParent;
use spillway_sidecar::model::onnx::{Compute, LoadError, Onnx};
use spillway_sidecar::model::{Backend, Call};

async fn load(datatype: i32, manifest_datatype: Datatype) -> Result<Onnx, LoadError> {
    let folder = tempfile::tempdir().unwrap();
    let version = folder.path().join("same/1");
    std::fs::create_dir_all(&version).unwrap();
    std::fs::write(version.join("model.onnx"), identity(datatype, 3, "x", "y")).unwrap();
    let manifest = manifest(|text| {
        text.replace(
            "name: features, datatype: FP32, shape: [-1, 9]",
            &format!("name: x, datatype: {manifest_datatype}, shape: [-1, 3]"),
        )
        .replace(
            "name: score, datatype: FP32, shape: [-1, 1]",
            &format!("name: y, datatype: {manifest_datatype}, shape: [-1, 3]"),
        )
    });
    let onnx = Onnx::load(folder.path(), &name("same"), &manifest, &Compute::new(1, 8, Default::default())).await?;
    onnx.facts(&name("1"), soon()).await.unwrap().check(&manifest).unwrap();
    Ok(onnx)
}

#[tokio::test]
async fn whole_numbers_floats_and_booleans_pass_bit_for_bit() {
    // ONNX's numbers of the types, from onnx.proto.
    let types = [
        (1, Datatype::Fp32),
        (2, Datatype::Uint8),
        (3, Datatype::Int8),
        (4, Datatype::Uint16),
        (5, Datatype::Int16),
        (6, Datatype::Int32),
        (7, Datatype::Int64),
        (9, Datatype::Bool),
        (11, Datatype::Fp64),
        (12, Datatype::Uint32),
        (13, Datatype::Uint64),
    ];
    for (number, datatype) in types {
        let onnx = load(number, datatype).await.unwrap_or_else(|fault| panic!("{datatype}: {fault}"));
        let bytes = 2 * 3 * datatype.width().unwrap();
        let data: Vec<u8> = (0..bytes)
            .map(|byte| if datatype == Datatype::Bool { u8::from(byte % 2 == 0) } else { byte as u8 })
            .collect();
        let sent = Tensor {
            name: "x".into(),
            datatype,
            shape: vec![2, 3],
            parameters: Parameters::default(),
            data: data.clone().into(),
        };
        let request =
            InferRequest { model: "same".into(), version: "1".into(), inputs: vec![sent], ..InferRequest::default() };
        let call = Call { deadline: soon(), trace: TraceParent::none() };
        let answer = onnx.infer(&request, &call).await.unwrap_or_else(|fault| panic!("{datatype}: {fault}"));
        assert_eq!((answer.outputs[0].datatype, &answer.outputs[0].shape[..]), (datatype, &[2, 3][..]));
        assert_eq!(answer.outputs[0].data, data, "{datatype}");
    }
}

#[tokio::test]
async fn texts_and_half_floats_are_refused_at_load_by_name() {
    for (number, datatype) in [(8, Datatype::Bytes), (10, Datatype::Fp16)] {
        let fault = load(number, datatype).await.unwrap_err();
        assert!(matches!(&fault, LoadError::Datatype { name, .. } if name == "x"), "{datatype}: {fault}");
    }
    // tract cannot read bfloat16 at all.
    assert!(matches!(load(16, Datatype::Bf16).await.unwrap_err(), LoadError::File { .. }));
}
