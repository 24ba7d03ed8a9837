//! The Open Inference Protocol (KServe v2) in one form, whatever the client spoke.
//!
//! The rule: a [`Tensor`]'s bytes are always raw (little-endian, row-major; `BYTES` elements behind a
//! 4-byte length) and always a slice of the buffer they arrived in. [`Tensor::check`] has passed for
//! every tensor in an [`InferRequest`] that left a decoder.
//!
//! * [`tensor`]: datatypes, shapes, elements.
//! * [`json`]: REST bodies, JSON and the binary tensor extension.
//! * [`check`]: a request and its answer held against the model's manifest.
//! * [`fixed`]: an answer that no model gave. [`synthetic`]: a request that nobody asked for.
//! * [`Limits`]: what is refused before memory is spent.

pub mod check;
pub mod fixed;
pub mod json;
pub mod synthetic;
pub mod tensor;

use bytes::Bytes;

pub use check::{Entities, InvalidAnswer, check_against, check_answer, entities, rows};
pub use tensor::{Datatype, Tensor};

use crate::resource::{Backend, Model, TensorSpec};

/// One inference call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InferRequest {
    pub model: String,
    /// Empty: the model's default version.
    pub version: String,
    /// The caller's own id, given back unchanged. May be empty.
    pub id: String,
    pub parameters: Parameters,
    pub inputs: Vec<Tensor>,
    /// Empty: all outputs.
    pub outputs: Vec<RequestedOutput>,
}

impl InferRequest {
    /// Refuses inputs and outputs that are named twice or not at all. For decoders.
    pub fn check_names(&self) -> Result<(), InvalidRequest> {
        let refuse = |names: &mut dyn Iterator<Item = &str>| {
            let mut seen = std::collections::BTreeSet::new();
            for name in names {
                if name.is_empty() {
                    return Err(InvalidRequest::Unnamed);
                }
                if !seen.insert(name) {
                    return Err(InvalidRequest::Duplicate(name.to_owned()));
                }
            }
            Ok(())
        };
        refuse(&mut self.inputs.iter().map(|input| &*input.name))?;
        refuse(&mut self.outputs.iter().map(|output| &*output.name))
    }
}

/// Adds up the raw bytes of a message's tensors. Text and typed contents can grow eightfold on their
/// way to raw ones, so that the body's own length says little.
#[derive(Debug)]
pub struct RawBytes {
    left: usize,
    limit: usize,
}

impl RawBytes {
    pub fn within(limits: &Limits) -> Self {
        Self { left: limits.body, limit: limits.body }
    }

    pub fn add(&mut self, tensor: &Tensor) -> Result<(), InvalidRequest> {
        let left = self.left.checked_sub(tensor.data.len());
        self.left = left.ok_or(InvalidRequest::TooLarge { limit: self.limit })?;
        Ok(())
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestedOutput {
    pub name: String,
    pub parameters: Parameters,
}

/// One answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InferResponse {
    pub model: String,
    pub version: String,
    pub id: String,
    pub parameters: Parameters,
    pub outputs: Vec<Tensor>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Parameter {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    Text(String),
}

/// Named parameters, few of them, in the order they came.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters(pub Vec<(String, Parameter)>);

impl Parameters {
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Sets a parameter, replacing one of the same name.
    pub fn set(&mut self, name: &str, value: Parameter) {
        match self.0.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    pub fn remove(&mut self, name: &str) -> Option<Parameter> {
        let at = self.0.iter().position(|(key, _)| key == name)?;
        Some(self.0.remove(at).1)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Parameter::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Refuses parameters that ask for what is not offered. For decoders.
    pub fn check_offered(&self) -> Result<(), InvalidRequest> {
        for (name, _) in &self.0 {
            if name.starts_with("shared_memory_") {
                return Err(InvalidRequest::SharedMemory);
            }
            if name == "classification" {
                let problem = "the classification extension is not offered here";
                return Err(InvalidRequest::Parameter { name: name.clone(), problem });
            }
        }
        Ok(())
    }

    /// An integer, whichever of the two integer forms the client's library chose.
    pub fn integer(&self, name: &str) -> Option<i64> {
        match self.get(name)? {
            Parameter::Int(value) => Some(*value),
            Parameter::Uint(value) => i64::try_from(*value).ok(),
            _ => None,
        }
    }
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerMetadata {
    pub name: String,
    pub version: String,
    pub extensions: Vec<String>,
}

/// What a server says of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelMetadata {
    pub name: String,
    pub versions: Vec<String>,
    pub platform: &'static str,
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
}

impl ModelMetadata {
    /// As callers see the model: the entity input is one of the inputs, joined inputs may be sent too.
    pub fn of(name: &str, model: &Model) -> Self {
        let entity_input = model.entity_input.iter().map(|name| TensorSpec {
            name: name.to_string(),
            datatype: Datatype::Bytes,
            shape: vec![-1],
        });
        Self {
            name: name.to_owned(),
            versions: model.versions.iter().map(ToString::to_string).collect(),
            platform: match model.backend {
                Backend::Onnx => "onnx_onnxv1",
                Backend::Triton => "triton",
            },
            inputs: entity_input.chain(model.inputs.iter().map(|input| input.tensor.clone())).collect(),
            outputs: model.outputs.clone(),
        }
    }
}

/// What one message may hold, checked before memory is spent on it.
///
/// ```text
/// client --default or set--> gateway --LARGEST_REQUEST--> sidecar --> model server
/// client <-- gateway <--OF_SIDECARS, or set-- sidecar <--OF_MODELS-- model server
/// ```
///
/// Each hop takes what the hop before it can have let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the whole body, decompressed; and of all its tensors once they are raw.
    pub body: usize,
    /// Input tensors, and requested outputs.
    pub tensors: usize,
    /// Bytes of one tensor.
    pub tensor: usize,
    /// Dimensions of one tensor.
    pub dimensions: usize,
    /// Parameters of the request, of each input and of each output.
    pub parameters: usize,
    /// Bytes of a model name, tensor name, id, parameter name or parameter value.
    pub text: usize,
    /// Nesting of JSON.
    pub json_depth: usize,
}

impl Limits {
    /// What a client may send, unless the gateway's settings say otherwise.
    pub const OF_CLIENTS: Self = Self {
        body: 16 << 20,
        tensors: 64,
        tensor: 16 << 20,
        dimensions: 8,
        parameters: 32,
        text: 1_024,
        json_depth: 64,
    };

    /// The most that a gateway can be set to let through, so what a sidecar takes.
    pub const LARGEST_REQUEST: Self = Self { body: 64 << 20, tensors: 1_024, tensor: 64 << 20, ..Self::OF_CLIENTS };

    /// What a model server may answer; wider than what a caller may ask.
    pub const OF_MODELS: Self =
        Self { body: 64 << 20, tensors: 256, tensor: 64 << 20, parameters: 64, text: 4_096, ..Self::OF_CLIENTS };

    /// What a sidecar may answer: a model's answer, and beside it what is said about how it was made.
    pub const OF_SIDECARS: Self =
        Self { body: Self::OF_MODELS.body + (1 << 20), parameters: Self::OF_MODELS.parameters + 16, ..Self::OF_MODELS };

    /// The longest message with tensors of `body` bytes: names, shapes and parameters come on top.
    pub const fn message(self) -> usize {
        self.body + (16 << 20)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::OF_CLIENTS
    }
}

/// The request is the caller's fault. Sending it again unchanged is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRequest {
    #[error("the body is not the JSON of an inference request: {0}")]
    Json(String),
    #[error("JSON is nested deeper than {0}")]
    JsonDepth(usize),
    #[error("{0}")]
    Protobuf(String),
    #[error("inference-header-content-length must be a whole number, given once, of at most the body's length")]
    HeaderLength,
    #[error("the binary data after the JSON has {found} bytes, but binary_data_size adds up to {declared}")]
    BinarySize { declared: u64, found: u64 },
    #[error("tensor '{0}' is given in more than one way")]
    MixedContents(String),
    #[error("there are {tensors} tensors but raw contents for {found}")]
    RawCount { tensors: usize, found: usize },
    #[error("tensor '{tensor}': unknown datatype '{datatype}'")]
    Datatype { tensor: String, datatype: String },
    #[error("tensor '{tensor}': {problem}")]
    Shape { tensor: String, problem: &'static str },
    #[error("tensor '{tensor}': shape and datatype need {expected} bytes or elements, but there are {found}")]
    Length { tensor: String, expected: u64, found: u64 },
    #[error("tensor '{tensor}': {problem}")]
    Element { tensor: String, problem: String },
    #[error("tensor '{0}' is given twice")]
    Duplicate(String),
    #[error("a tensor has no name")]
    Unnamed,
    #[error("the model has no {what} '{name}'")]
    Unknown { what: &'static str, name: String },
    #[error("input '{0}' is missing")]
    Missing(String),
    #[error("input '{0}' is joined from features: name the entity, or send the input")]
    MissingEntity(String),
    #[error("the entity is named twice: by the parameter 'entity_id' and by the input '{0}'")]
    TwoEntities(String),
    #[error("entity {index}: expected an id of 1 to 256 bytes")]
    EntityId { index: usize },
    #[error("tensor '{tensor}' must be {expected}, not {found}")]
    Mismatch { tensor: String, expected: String, found: String },
    #[error("{what}: at most {limit} are accepted")]
    Limit { what: &'static str, limit: usize },
    #[error("the tensors have more than {limit} bytes in all")]
    TooLarge { limit: usize },
    #[error("parameter '{name}': {problem}")]
    Parameter { name: String, problem: &'static str },
    #[error("shared memory is not offered here; send the tensor in the request")]
    SharedMemory,
    #[error("output '{output}' holds {problem}, which JSON cannot carry; ask for it as binary data")]
    OutputNotJson { output: String, problem: &'static str },
}

impl InvalidRequest {
    /// The stable `spillway-error` code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Json(_) => "invalid-json",
            Self::JsonDepth(_) => "json-too-deep",
            Self::Protobuf(_) => "invalid-protobuf",
            Self::HeaderLength => "invalid-header-length",
            Self::BinarySize { .. } => "binary-size-mismatch",
            Self::MixedContents(_) => "mixed-contents",
            Self::RawCount { .. } => "raw-count-mismatch",
            Self::Datatype { .. } => "unknown-datatype",
            Self::Shape { .. } => "invalid-shape",
            Self::Length { .. } => "data-length-mismatch",
            Self::Element { .. } => "invalid-element",
            Self::Duplicate(_) => "duplicate-tensor",
            Self::Unnamed => "unnamed-tensor",
            Self::Unknown { .. } => "unknown-tensor",
            Self::Missing(_) => "missing-input",
            Self::MissingEntity(_) => "missing-entity",
            Self::TwoEntities(_) => "two-entities",
            Self::EntityId { .. } => "invalid-entity-id",
            Self::Mismatch { .. } => "tensor-mismatch",
            Self::Limit { .. } => "limit-exceeded",
            Self::TooLarge { .. } => "body-too-large",
            Self::Parameter { .. } => "invalid-parameter",
            Self::SharedMemory => "shared-memory",
            Self::OutputNotJson { .. } => "output-not-json",
        }
    }
}

/// Reads the raw bytes of a `BYTES` tensor as its elements, without copying.
pub fn bytes_elements(data: &Bytes) -> impl Iterator<Item = Bytes> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let length = u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?) as usize;
        let from = at + 4;
        at = from.checked_add(length)?;
        (at <= data.len()).then(|| data.slice(from..at))
    })
}
