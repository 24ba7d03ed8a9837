//! A request and its answer held against the model's manifest.
//!
//! The rule: what passes can be joined, sent to the model and given back row by row without another
//! look. Does not choose a version or a deadline.

use bytes::Bytes;

use super::{Datatype, InferRequest, InferResponse, InvalidRequest, Parameter, Tensor, bytes_elements};
use crate::resource::{Model, TensorSpec};

/// The request parameter that names one entity.
pub const ENTITY_ID: &str = "entity_id";

/// Bytes of an entity id.
pub const ENTITY_ID_MAX: usize = 256;

/// Whom a request is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Entities {
    #[default]
    None,
    /// The parameter `entity_id`.
    One(Bytes),
    /// The model's entity input; row i of the answer belongs to entity i.
    Many(Vec<Bytes>),
}

impl Entities {
    pub fn ids(&self) -> &[Bytes] {
        match self {
            Self::None => &[],
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }

    pub fn len(&self) -> usize {
        self.ids().len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids().is_empty()
    }
}

/// Whom the request is about. Ids are compared byte for byte, in no normal form.
pub fn entities(model: &Model, request: &InferRequest) -> Result<Entities, InvalidRequest> {
    let input = model.entity_input.as_ref().and_then(|name| find(request, name.as_str()));
    let fits = |id: &Bytes| (1..=ENTITY_ID_MAX).contains(&id.len());
    match (request.parameters.get(ENTITY_ID), input) {
        (None, None) => Ok(Entities::None),
        (Some(_), Some(input)) => Err(InvalidRequest::TwoEntities(input.name.clone())),
        (Some(Parameter::Text(id)), None) => {
            let id = Bytes::copy_from_slice(id.as_bytes());
            if fits(&id) { Ok(Entities::One(id)) } else { Err(InvalidRequest::EntityId { index: 0 }) }
        }
        (Some(_), None) => Err(InvalidRequest::Parameter { name: ENTITY_ID.into(), problem: "must be a string" }),
        (None, Some(input)) => {
            let count = match input.shape[..] {
                [count] if input.datatype == Datatype::Bytes => usize::try_from(count).unwrap_or(0),
                _ => {
                    return Err(InvalidRequest::Mismatch {
                        tensor: input.name.clone(),
                        expected: "BYTES [-1]".into(),
                        found: describe(input),
                    });
                }
            };
            if count > model.max_batch {
                return Err(InvalidRequest::Limit { what: "entities in one call", limit: model.max_batch });
            }
            let ids: Vec<Bytes> = bytes_elements(&input.data).collect();
            match ids.iter().position(|id| !fits(id)) {
                Some(index) => Err(InvalidRequest::EntityId { index }),
                None => Ok(Entities::Many(ids)),
            }
        }
    }
}

/// The number of rows that inputs and answer must have; `None` where entities do not fix it.
///
/// A request that names one entity but sends every input itself has as many rows as it likes: the
/// entity then says only where it goes.
pub fn rows(model: &Model, request: &InferRequest, entities: &Entities) -> Option<usize> {
    match entities {
        Entities::None => None,
        Entities::Many(ids) => Some(ids.len()),
        Entities::One(_) => joins(model, request).then_some(1),
    }
}

/// Whether a bound input is left to the join.
fn joins(model: &Model, request: &InferRequest) -> bool {
    model.inputs.iter().any(|input| !input.features.is_empty() && find(request, &input.tensor.name).is_none())
}

/// Whether the model can serve the request, after the join where `entities` names somebody.
///
/// After the join itself, with all inputs in place, it holds as well.
pub fn check_against(model: &Model, request: &InferRequest, entities: &Entities) -> Result<(), InvalidRequest> {
    request.check_names()?;
    let rows = rows(model, request, entities);
    for input in &request.inputs {
        if model.entity_input.as_ref().is_some_and(|name| name.as_str() == input.name) {
            continue;
        }
        let Some(binding) = model.input(&input.name) else {
            return Err(InvalidRequest::Unknown { what: "input", name: input.name.clone() });
        };
        check_input(&binding.tensor, input, rows, model.max_batch)?;
    }
    for binding in &model.inputs {
        if find(request, &binding.tensor.name).is_some() {
            continue;
        }
        if binding.features.is_empty() {
            return Err(InvalidRequest::Missing(binding.tensor.name.clone()));
        }
        if entities.is_empty() {
            return Err(InvalidRequest::MissingEntity(binding.tensor.name.clone()));
        }
    }
    for output in &request.outputs {
        if model.output(&output.name).is_none() {
            return Err(InvalidRequest::Unknown { what: "output", name: output.name.clone() });
        }
    }
    Ok(())
}

fn check_input(spec: &TensorSpec, input: &Tensor, rows: Option<usize>, max_batch: usize) -> Result<(), InvalidRequest> {
    let mismatch = |expected| InvalidRequest::Mismatch { tensor: input.name.clone(), expected, found: describe(input) };
    if spec.datatype != input.datatype || !spec.accepts(&input.shape) {
        return Err(mismatch(spec.to_string()));
    }
    // A leading -1 is the batch.
    if let (Some(-1), Some(&batch)) = (spec.shape.first(), input.shape.first()) {
        let batch = usize::try_from(batch).unwrap_or(0);
        if batch > max_batch {
            return Err(InvalidRequest::Limit { what: "rows in one call", limit: max_batch });
        }
        if let Some(rows) = rows.filter(|rows| *rows != batch) {
            return Err(mismatch(format!("{spec} with one row for each of {rows} entities")));
        }
    }
    Ok(())
}

/// The model server answered what was not asked. Its fault; another server may do better.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAnswer {
    #[error("the answer carries another request's id")]
    Id,
    #[error("the answer lacks the output '{0}'")]
    Missing(String),
    #[error("the answer has an output '{0}' that was not asked for")]
    Unexpected(String),
    #[error("the answer has the output '{0}' twice")]
    Duplicate(String),
    #[error("the output '{output}' must be {expected}, not {found}")]
    Mismatch { output: String, expected: String, found: String },
    #[error("the output '{output}' has {found} rows for {expected} entities")]
    Rows { output: String, expected: usize, found: i64 },
    #[error("the answer is not well formed: {0}")]
    Malformed(#[source] InvalidRequest),
}

impl InvalidAnswer {
    /// The stable `spillway-error` code.
    pub fn code(&self) -> &'static str {
        "bad-model-answer"
    }
}

/// Whether the answer is one to this request. `rows` is what [`rows`] said before the join.
///
/// Outputs are those that the request names, or all of the manifest; more are not accepted, so a
/// sidecar names the manifest's where the client named none.
pub fn check_answer(
    model: &Model,
    request: &InferRequest,
    response: &InferResponse,
    rows: Option<usize>,
) -> Result<(), InvalidAnswer> {
    if !response.id.is_empty() && response.id != request.id {
        return Err(InvalidAnswer::Id);
    }
    let asked = |name: &str| request.outputs.is_empty() || request.outputs.iter().any(|output| output.name == name);
    for (index, output) in response.outputs.iter().enumerate() {
        let Some(spec) = model.output(&output.name).filter(|spec| asked(&spec.name)) else {
            return Err(InvalidAnswer::Unexpected(output.name.clone()));
        };
        if response.outputs[..index].iter().any(|earlier| earlier.name == output.name) {
            return Err(InvalidAnswer::Duplicate(output.name.clone()));
        }
        check_output(spec, output, rows)?;
    }
    let missing = model
        .outputs
        .iter()
        .find(|spec| asked(&spec.name) && !response.outputs.iter().any(|output| output.name == spec.name));
    missing.map_or(Ok(()), |spec| Err(InvalidAnswer::Missing(spec.name.clone())))
}

fn check_output(spec: &TensorSpec, output: &Tensor, rows: Option<usize>) -> Result<(), InvalidAnswer> {
    if spec.datatype != output.datatype || !spec.accepts(&output.shape) {
        return Err(InvalidAnswer::Mismatch {
            output: output.name.clone(),
            expected: spec.to_string(),
            found: describe(output),
        });
    }
    output.check_length().map_err(InvalidAnswer::Malformed)?;
    if let (Some(rows), Some(-1), Some(&found)) = (rows, spec.shape.first(), output.shape.first())
        && usize::try_from(found) != Ok(rows)
    {
        return Err(InvalidAnswer::Rows { output: output.name.clone(), expected: rows, found });
    }
    Ok(())
}

fn find<'a>(request: &'a InferRequest, name: &str) -> Option<&'a Tensor> {
    request.inputs.iter().find(|input| input.name == name)
}

fn describe(tensor: &Tensor) -> String {
    format!("{} {:?}", tensor.datatype, tensor.shape)
}

#[cfg(test)]
mod tests;
