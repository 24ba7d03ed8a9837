//! A request that a model accepts and that nobody asked for: warm-ups and probes.
//!
//! The rule: it brings every input itself, zeros or empty texts, and names every output, so that it depends on no
//! stored feature and its whole answer can be checked. What it predicts means nothing.

use bytes::Bytes;

use super::{InferRequest, Limits, Parameters, RequestedOutput, Tensor};
use crate::resource::{Model, TensorSpec};

/// A request for that version with that id. None if one of its tensors would be larger than any request may be.
pub fn synthetic(name: &str, version: &str, id: &str, model: &Model) -> Option<InferRequest> {
    let batch = i64::try_from(model.max_batch).unwrap_or(i64::MAX).min(model.warm_up.batch.into());
    let inputs: Option<Vec<Tensor>> = model.inputs.iter().map(|input| zeros(&input.tensor, batch)).collect();
    Some(InferRequest {
        model: name.to_owned(),
        version: version.to_owned(),
        id: id.to_owned(),
        parameters: Parameters::default(),
        inputs: inputs?,
        outputs: all_outputs(model),
    })
}

/// What a request asks for that names no outputs: those of the manifest, as more would be a wrong answer.
pub fn all_outputs(model: &Model) -> Vec<RequestedOutput> {
    let output = |spec: &TensorSpec| RequestedOutput { name: spec.name.clone(), parameters: Parameters::default() };
    model.outputs.iter().map(output).collect()
}

fn zeros(spec: &TensorSpec, batch: i64) -> Option<Tensor> {
    let shape: Vec<i64> = spec.shape.iter().map(|&size| if size == -1 { batch } else { size }).collect();
    // An empty element of BYTES is its length alone.
    let width = spec.datatype.width().unwrap_or(size_of::<u32>());
    let bytes = shape.iter().try_fold(width, |bytes, &size| bytes.checked_mul(usize::try_from(size).ok()?))?;
    (bytes <= Limits::default().tensor).then(|| Tensor {
        name: spec.name.clone(),
        datatype: spec.datatype,
        shape,
        parameters: Parameters::default(),
        data: Bytes::from(vec![0; bytes]),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{check_against, entities};
    use super::*;
    use crate::resource::{Spec, parse};

    fn model(more: &str) -> Model {
        let text = format!(
            "apiVersion: spillway/v1\nkind: Model\nmetadata: {{name: m}}\nspec:\n  pools: [p]\n  versions: [1]\n  \
             backend: onnx\n  deadline: 200ms\n  entityInput: site\n  inputs:\n    \
             - {{name: f, datatype: FP32, shape: [-1, 2], features: [g.a, g.b]}}\n    \
             - {{name: t, datatype: BYTES, shape: [3]}}\n  outputs: [{{name: o, datatype: FP32, shape: [-1]}}]\n{more}"
        );
        let Spec::Model(model) = parse(&text).unwrap().remove(0).spec else { panic!("a Model") };
        *model
    }

    #[test]
    fn a_synthetic_request_needs_no_entity_and_passes_every_check_of_a_real_one() {
        let model = model("  warmUp: {batch: 4}\n  maxBatch: 3\n");
        let request = synthetic("m", "1", "probe", &model).unwrap();
        let whom = entities(&model, &request).unwrap();
        assert!(whom.is_empty());
        check_against(&model, &request, &whom).unwrap();
        let limits = Limits::default();
        for input in &request.inputs {
            input.check(&limits).unwrap();
        }
        assert_eq!(request.inputs[0].shape, [3, 2], "no more rows than the model takes");
        assert_eq!(request.inputs[1].data.len(), 12, "three empty texts");
        assert_eq!(request.outputs[0].name, "o");
    }

    #[test]
    fn a_tensor_beyond_all_limits_makes_no_request() {
        let mut model = model("");
        model.inputs[1].tensor.shape = vec![i64::from(u32::MAX), i64::from(u32::MAX), i64::from(u32::MAX)];
        assert_eq!(synthetic("m", "1", "probe", &model), None);
    }
}
