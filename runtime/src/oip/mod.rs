//! OIP over gRPC: between the protocol's messages and core's form.
//!
//! The rule: what leaves a decoder has passed [`Tensor::check`] and the limits; raw contents stay
//! slices of the message; contents always leave raw, in the order of their tensors. Parameters of one
//! message are in name order, because a protobuf map has none.
//!
//! * [`decode_message`] guards the wire bytes first, so that a small message cannot become a large one.
//! * [`frame`] and [`frame_response`] write whole gRPC messages, large tensors uncopied.

mod contents;
mod frame;
mod guard;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message;
use spillway_core::inference::{
    Datatype, InferRequest, InferResponse, InvalidAnswer, InvalidRequest, Limits, ModelMetadata, Parameter, Parameters,
    RawBytes, RequestedOutput, ServerMetadata, Tensor,
};
use spillway_core::resource::TensorSpec;
use spillway_proto::inference as proto;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::model_metadata_response::TensorMetadata;

pub use frame::{FRAME_HEADER, NoMessage, frame, frame_header, frame_response, frame_with, message};

/// Reads a request from the bytes of its message, without the gRPC prefix.
pub fn decode_message(message: Bytes, limits: &Limits) -> Result<InferRequest, InvalidRequest> {
    guard::check(&message, limits)?;
    let request = proto::ModelInferRequest::decode(message).map_err(|_| guard::malformed())?;
    decode_request(request, limits)
}

/// Reads an answer from the bytes of its message, without the gRPC prefix.
pub fn decode_response_message(message: Bytes, limits: &Limits) -> Result<InferResponse, InvalidAnswer> {
    let response =
        proto::ModelInferResponse::decode(message).map_err(|_| InvalidAnswer::Malformed(guard::malformed()))?;
    decode_response(response, limits)
}

pub fn decode_request(request: proto::ModelInferRequest, limits: &Limits) -> Result<InferRequest, InvalidRequest> {
    check_text("bytes of the model's name", &request.model_name, limits)?;
    check_text("bytes of the model's version", &request.model_version, limits)?;
    check_text("bytes of the id", &request.id, limits)?;
    check_count("inputs", request.inputs.len(), limits.tensors)?;
    check_count("outputs", request.outputs.len(), limits.tensors)?;
    let mut raw = Raw::new(request.raw_input_contents, request.inputs.len())?;
    let mut sum = RawBytes::within(limits);
    let inputs = request.inputs.into_iter().map(|input| {
        let InferInputTensor { name, datatype, shape, parameters, contents } = input;
        let tensor = raw.tensor(name, &datatype, shape, parameters, contents, limits)?;
        sum.add(&tensor).map(|()| tensor)
    });
    let inputs = inputs.collect::<Result<_, _>>()?;
    let outputs = request.outputs.into_iter().map(|output| {
        check_text("bytes of a tensor's name", &output.name, limits)?;
        Ok(RequestedOutput { name: output.name, parameters: decode_parameters(output.parameters, limits)? })
    });
    let request = InferRequest {
        model: request.model_name,
        version: request.model_version,
        id: request.id,
        parameters: decode_parameters(request.parameters, limits)?,
        inputs,
        outputs: outputs.collect::<Result<_, _>>()?,
    };
    request.check_names()?;
    Ok(request)
}

/// Reads an answer; the limits are those on what a model server may say.
pub fn decode_response(response: proto::ModelInferResponse, limits: &Limits) -> Result<InferResponse, InvalidAnswer> {
    let decode = |response: proto::ModelInferResponse| -> Result<InferResponse, InvalidRequest> {
        check_text("bytes of the id", &response.id, limits)?;
        check_count("outputs", response.outputs.len(), limits.tensors)?;
        let mut raw = Raw::new(response.raw_output_contents, response.outputs.len())?;
        let mut sum = RawBytes::within(limits);
        let outputs = response.outputs.into_iter().map(|output| {
            let InferOutputTensor { name, datatype, shape, parameters, contents } = output;
            let tensor = raw.tensor(name, &datatype, shape, parameters, contents, limits)?;
            sum.add(&tensor).map(|()| tensor)
        });
        Ok(InferResponse {
            outputs: outputs.collect::<Result<_, _>>()?,
            model: response.model_name,
            version: response.model_version,
            id: response.id,
            parameters: decode_parameters(response.parameters, limits)?,
        })
    };
    decode(response).map_err(InvalidAnswer::Malformed)
}

pub fn encode_request(request: &InferRequest) -> proto::ModelInferRequest {
    proto::ModelInferRequest { raw_input_contents: raw_of(&request.inputs), ..request_head(request) }
}

pub fn encode_response(response: &InferResponse) -> proto::ModelInferResponse {
    proto::ModelInferResponse { raw_output_contents: raw_of(&response.outputs), ..response_head(response) }
}

pub fn encode_server_metadata(server: &ServerMetadata) -> proto::ServerMetadataResponse {
    proto::ServerMetadataResponse {
        name: server.name.clone(),
        version: server.version.clone(),
        extensions: server.extensions.clone(),
    }
}

pub fn encode_model_metadata(model: &ModelMetadata) -> proto::ModelMetadataResponse {
    let tensors = |specs: &[TensorSpec]| {
        let tensor = |spec: &TensorSpec| TensorMetadata {
            name: spec.name.clone(),
            datatype: spec.datatype.name().to_owned(),
            shape: spec.shape.clone(),
        };
        specs.iter().map(tensor).collect()
    };
    proto::ModelMetadataResponse {
        name: model.name.clone(),
        versions: model.versions.clone(),
        platform: model.platform.to_owned(),
        inputs: tensors(&model.inputs),
        outputs: tensors(&model.outputs),
    }
}

/// A request without its raw contents.
fn request_head(request: &InferRequest) -> proto::ModelInferRequest {
    let input = |tensor: &Tensor| InferInputTensor {
        name: tensor.name.clone(),
        datatype: tensor.datatype.name().to_owned(),
        shape: tensor.shape.clone(),
        parameters: encode_parameters(&tensor.parameters),
        contents: None,
    };
    let output = |output: &RequestedOutput| InferRequestedOutputTensor {
        name: output.name.clone(),
        parameters: encode_parameters(&output.parameters),
    };
    proto::ModelInferRequest {
        model_name: request.model.clone(),
        model_version: request.version.clone(),
        id: request.id.clone(),
        parameters: encode_parameters(&request.parameters),
        inputs: request.inputs.iter().map(input).collect(),
        outputs: request.outputs.iter().map(output).collect(),
        raw_input_contents: Vec::new(),
    }
}

/// An answer without its raw contents.
fn response_head(response: &InferResponse) -> proto::ModelInferResponse {
    let output = |tensor: &Tensor| InferOutputTensor {
        name: tensor.name.clone(),
        datatype: tensor.datatype.name().to_owned(),
        shape: tensor.shape.clone(),
        parameters: encode_parameters(&tensor.parameters),
        contents: None,
    };
    proto::ModelInferResponse {
        model_name: response.model.clone(),
        model_version: response.version.clone(),
        id: response.id.clone(),
        parameters: encode_parameters(&response.parameters),
        outputs: response.outputs.iter().map(output).collect(),
        raw_output_contents: Vec::new(),
    }
}

fn raw_of(tensors: &[Tensor]) -> Vec<Bytes> {
    tensors.iter().map(|tensor| tensor.data.clone()).collect()
}

/// The raw contents of a message, which its tensors take in their order; or none, and typed contents.
struct Raw(Option<std::vec::IntoIter<Bytes>>);

impl Raw {
    fn new(raw: Vec<Bytes>, tensors: usize) -> Result<Self, InvalidRequest> {
        if raw.is_empty() {
            return Ok(Self(None));
        }
        if raw.len() != tensors {
            return Err(InvalidRequest::RawCount { tensors, found: raw.len() });
        }
        Ok(Self(Some(raw.into_iter())))
    }

    fn tensor(
        &mut self,
        name: String,
        datatype: &str,
        shape: Vec<i64>,
        parameters: HashMap<String, proto::InferParameter>,
        contents: Option<proto::InferTensorContents>,
        limits: &Limits,
    ) -> Result<Tensor, InvalidRequest> {
        check_text("bytes of a tensor's name", &name, limits)?;
        check_count("dimensions of one tensor", shape.len(), limits.dimensions)?;
        let parameters = decode_parameters(parameters, limits)?;
        let Some(datatype) = Datatype::parse(datatype) else {
            return Err(InvalidRequest::Datatype { tensor: name, datatype: datatype.chars().take(32).collect() });
        };
        let data = match (self.0.as_mut().and_then(Iterator::next), contents) {
            (Some(raw), None) => raw,
            // Some libraries set an empty message beside raw contents.
            (Some(raw), Some(typed)) if typed == proto::InferTensorContents::default() => raw,
            (Some(_), Some(_)) => return Err(InvalidRequest::MixedContents(name)),
            (None, typed) => contents::to_raw(&name, datatype, &shape, typed.unwrap_or_default(), limits)?,
        };
        let tensor = Tensor { name, datatype, shape, parameters, data };
        tensor.check(limits)?;
        Ok(tensor)
    }
}

fn decode_parameters(
    parameters: HashMap<String, proto::InferParameter>,
    limits: &Limits,
) -> Result<Parameters, InvalidRequest> {
    check_count("parameters", parameters.len(), limits.parameters)?;
    let mut decoded = Vec::with_capacity(parameters.len());
    for (name, value) in parameters {
        check_text("bytes of a parameter's name", &name, limits)?;
        let value = match value.parameter_choice {
            Some(ParameterChoice::BoolParam(value)) => Parameter::Bool(value),
            Some(ParameterChoice::Int64Param(value)) => Parameter::Int(value),
            Some(ParameterChoice::Uint64Param(value)) => Parameter::Uint(value),
            Some(ParameterChoice::DoubleParam(value)) => Parameter::Double(value),
            Some(ParameterChoice::StringParam(value)) => {
                check_text("bytes of a parameter's value", &value, limits)?;
                Parameter::Text(value)
            }
            None => return Err(InvalidRequest::Parameter { name, problem: "has no value" }),
        };
        decoded.push((name, value));
    }
    decoded.sort_unstable_by(|(left, _), (right, _)| left.cmp(right));
    let decoded = Parameters(decoded);
    decoded.check_offered()?;
    Ok(decoded)
}

fn encode_parameters(parameters: &Parameters) -> HashMap<String, proto::InferParameter> {
    parameters.0.iter().map(|(name, value)| (name.clone(), encode_parameter(value))).collect()
}

fn encode_parameter(value: &Parameter) -> proto::InferParameter {
    let choice = match value {
        Parameter::Bool(value) => ParameterChoice::BoolParam(*value),
        Parameter::Int(value) => ParameterChoice::Int64Param(*value),
        Parameter::Uint(value) => ParameterChoice::Uint64Param(*value),
        Parameter::Double(value) => ParameterChoice::DoubleParam(*value),
        Parameter::Text(value) => ParameterChoice::StringParam(value.clone()),
    };
    proto::InferParameter { parameter_choice: Some(choice) }
}

fn check_text(what: &'static str, text: &str, limits: &Limits) -> Result<(), InvalidRequest> {
    check_count(what, text.len(), limits.text)
}

fn check_count(what: &'static str, count: usize, limit: usize) -> Result<(), InvalidRequest> {
    if count > limit { Err(InvalidRequest::Limit { what, limit }) } else { Ok(()) }
}
