//! The answer that an operator wrote down for a model, for when nothing better can be given (level 4).
//!
//! The rule: it passes [`super::check_answer`] for its request, one written row for each row asked about.

use bytes::{Bytes, BytesMut};

use super::{Entities, InferRequest, InferResponse, Parameters, Tensor, rows};
use crate::feature::value_bytes;
use crate::resource::Model;

/// `None` if the model has no such answer, if nothing says how many rows there are, or if it would be larger
/// than `most` bytes. Its version and parameters are empty.
pub fn fixed_answer(model: &Model, request: &InferRequest, entities: &Entities, most: usize) -> Option<InferResponse> {
    let fixed = &model.traffic.degradation.as_ref()?.fixed;
    if fixed.len() != model.outputs.len() {
        return None;
    }
    let rows = rows(model, request, entities).or_else(|| sent_rows(model, request));
    let asked = |name: &str| request.outputs.is_empty() || request.outputs.iter().any(|output| output.name == name);
    let mut left = most;
    let mut outputs = Vec::with_capacity(fixed.len());
    for (spec, values) in model.outputs.iter().zip(fixed).filter(|(spec, _)| asked(&spec.name)) {
        let (mut shape, mut times) = (spec.shape.clone(), 1);
        if let Some(batch) = shape.first_mut().filter(|size| **size == -1) {
            times = rows?;
            *batch = i64::try_from(times).ok()?;
        }
        let width = spec.datatype.width()?.checked_mul(values.len())?;
        left = left.checked_sub(width.checked_mul(times)?)?;
        let mut row = BytesMut::with_capacity(width);
        for value in values {
            row.extend_from_slice(value_bytes(*value, spec.datatype)?.as_ref());
        }
        outputs.push(Tensor {
            name: spec.name.clone(),
            datatype: spec.datatype,
            shape,
            parameters: Parameters::default(),
            data: if times == 1 { row.freeze() } else { Bytes::from(row.repeat(times)) },
        });
    }
    Some(InferResponse { model: request.model.clone(), id: request.id.clone(), outputs, ..InferResponse::default() })
}

/// The rows of the inputs that the client sent; their leading `-1` is the batch.
fn sent_rows(model: &Model, request: &InferRequest) -> Option<usize> {
    request.inputs.iter().find_map(|sent| {
        let spec = &model.input(&sent.name)?.tensor;
        let batch = sent.shape.first().filter(|_| spec.shape.first() == Some(&-1))?;
        usize::try_from(*batch).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Datatype, Parameter, RequestedOutput, check_answer, entities};
    use super::*;
    use crate::resource::{self, Spec};

    fn model(more: &str) -> Model {
        let text = format!(
            "apiVersion: spillway/v1\nkind: Model\nmetadata: {{name: m}}\nspec:\n  pools: [p]\n  versions: [1]\n  backend: onnx\n  \
             deadline: 1s\n  entityInput: site\n  inputs: [{{name: x, datatype: FP32, shape: [-1, 2], features: [g.a, g.b]}}]\n  \
             outputs:\n  - {{name: score, datatype: FP32, shape: [-1, 1]}}\n  - {{name: class, datatype: INT64, shape: [2]}}\n{more}"
        );
        let resources = resource::parse(&text).unwrap_or_else(|faults| panic!("{faults:?}"));
        let Spec::Model(model) = &resources[0].spec else { panic!("a model") };
        (**model).clone()
    }

    const STATIC: &str = "  degradation: {levels: [4], static: {score: [0.5], class: [7, -1]}}\n";

    fn named(ids: &[&str]) -> InferRequest {
        let data =
            ids.iter().flat_map(|id| [&u32::try_from(id.len()).unwrap().to_le_bytes()[..], id.as_bytes()].concat());
        let site = Tensor {
            name: "site".into(),
            datatype: Datatype::Bytes,
            shape: vec![i64::try_from(ids.len()).unwrap()],
            parameters: Parameters::default(),
            data: data.collect::<Vec<u8>>().into(),
        };
        InferRequest { model: "m".into(), id: "i".into(), inputs: vec![site], ..InferRequest::default() }
    }

    fn sent(rows: i64) -> InferRequest {
        let x = Tensor {
            name: "x".into(),
            datatype: Datatype::Fp32,
            shape: vec![rows, 2],
            parameters: Parameters::default(),
            data: vec![0; usize::try_from(rows).unwrap() * 8].into(),
        };
        InferRequest { inputs: vec![x], ..named(&[]) }
    }

    fn answer(request: &InferRequest, most: usize) -> Option<InferResponse> {
        let model = model(STATIC);
        let entities = entities(&model, request).unwrap();
        let answer = fixed_answer(&model, request, &entities, most)?;
        check_answer(&model, request, &answer, rows(&model, request, &entities)).unwrap();
        Some(answer)
    }

    #[test]
    fn each_row_asked_about_gets_the_written_one() {
        let one = InferRequest {
            parameters: Parameters(vec![("entity_id".into(), Parameter::Text("a".into()))]),
            inputs: Vec::new(),
            ..named(&[])
        };
        for (request, rows) in [(one, 1), (named(&["a", "b", "c"]), 3), (sent(4), 4)] {
            let answer = answer(&request, 1_000).unwrap();
            assert_eq!((answer.id.as_str(), &answer.outputs[0].shape[..]), ("i", &[rows, 1][..]));
            assert!(answer.outputs[0].data.chunks_exact(4).all(|value| value == 0.5_f32.to_le_bytes()));
            let class: Vec<u8> = [7_i64, -1].iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!((&answer.outputs[1].shape[..], &answer.outputs[1].data[..]), (&[2][..], &class[..]));
        }
    }

    #[test]
    fn only_the_outputs_asked_for_are_given() {
        let class = RequestedOutput { name: "class".into(), parameters: Parameters::default() };
        let answer = answer(&InferRequest { outputs: vec![class], ..named(&["a"]) }, 1_000).unwrap();
        assert_eq!(answer.outputs.iter().map(|output| &*output.name).collect::<Vec<_>>(), ["class"]);
    }

    #[test]
    fn there_is_none_beyond_its_bound_without_rows_or_where_none_is_written() {
        assert!(answer(&named(&["a", "b"]), 24).is_some());
        assert_eq!(answer(&named(&["a", "b"]), 23), None);
        assert_eq!(answer(&InferRequest { inputs: Vec::new(), ..named(&[]) }, 1_000), None);
        let request = named(&["a"]);
        for none in ["", "  degradation: {levels: [4]}\n"] {
            let model = model(none);
            assert_eq!(fixed_answer(&model, &request, &entities(&model, &request).unwrap(), 1_000), None);
        }
    }
}
