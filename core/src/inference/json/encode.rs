//! An answer into a REST body.

use bytes::Bytes;
use half::{bf16, f16};
use serde::Serialize;

use super::super::{
    Datatype, InferRequest, InferResponse, InvalidRequest, Parameter, Parameters, Tensor, bytes_elements,
};

/// Which outputs the caller wants as binary data behind the JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputForms {
    /// `binary_data_output`: what holds for outputs that say nothing themselves.
    binary: bool,
    /// `binary_data` of each output.
    named: Vec<(String, bool)>,
}

impl OutputForms {
    /// Takes the forms out of the request: they are between this caller and us, not for the model.
    pub fn take(request: &mut InferRequest) -> Self {
        let flag = |parameters: &mut Parameters, name| match parameters.remove(name) {
            Some(Parameter::Bool(value)) => Some(value),
            _ => None,
        };
        let binary = flag(&mut request.parameters, "binary_data_output").unwrap_or(false);
        let named = request.outputs.iter_mut().filter_map(|output| {
            let value = flag(&mut output.parameters, "binary_data")?;
            Some((output.name.clone(), value))
        });
        Self { binary, named: named.collect() }
    }

    pub fn is_binary(&self, output: &str) -> bool {
        self.named.iter().find(|(name, _)| name == output).map_or(self.binary, |(_, binary)| *binary)
    }
}

/// The body of an answer: JSON, then the binary outputs in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestBody {
    /// The JSON first, then one segment for each binary output, uncopied.
    pub segments: Vec<Bytes>,
    /// `Inference-Header-Content-Length`: the JSON's length; `None` where nothing follows it.
    pub header_length: Option<usize>,
}

impl RestBody {
    pub fn content_type(&self) -> &'static str {
        if self.header_length.is_some() { "application/octet-stream" } else { "application/json" }
    }

    pub fn content_length(&self) -> usize {
        self.segments.iter().map(Bytes::len).sum()
    }
}

/// Writes an answer. Each output has passed [`Tensor::check`].
///
/// Fails where JSON was asked for but cannot carry an output: the caller can ask for binary.
pub fn encode_response(response: &InferResponse, forms: &OutputForms) -> Result<RestBody, InvalidRequest> {
    let mut out =
        Vec::with_capacity(256 + response.outputs.iter().map(|output| estimate(output, forms)).sum::<usize>());
    let mut binary = Vec::new();
    out.extend_from_slice(b"{\"model_name\":");
    put(&mut out, &response.model);
    out.extend_from_slice(b",\"model_version\":");
    put(&mut out, &response.version);
    if !response.id.is_empty() {
        out.extend_from_slice(b",\"id\":");
        put(&mut out, &response.id);
    }
    put_parameters(&mut out, &response.parameters, None);
    out.extend_from_slice(b",\"outputs\":[");
    for (index, output) in response.outputs.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.extend_from_slice(b"{\"name\":");
        put(&mut out, &output.name);
        out.extend_from_slice(b",\"datatype\":");
        put(&mut out, output.datatype.name());
        out.extend_from_slice(b",\"shape\":");
        put(&mut out, &output.shape);
        if forms.is_binary(&output.name) {
            put_parameters(&mut out, &output.parameters, Some(output.data.len()));
            binary.push(output.data.clone());
        } else {
            put_parameters(&mut out, &output.parameters, None);
            out.extend_from_slice(b",\"data\":[");
            put_data(&mut out, output)?;
            out.push(b']');
        }
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
    let header_length = (!binary.is_empty()).then_some(out.len());
    let mut segments = Vec::with_capacity(1 + binary.len());
    segments.push(Bytes::from(out));
    segments.append(&mut binary);
    Ok(RestBody { segments, header_length })
}

/// Bytes that an output's JSON is likely to take.
fn estimate(output: &Tensor, forms: &OutputForms) -> usize {
    let data = match output.datatype.width() {
        _ if forms.is_binary(&output.name) => 0,
        Some(1) => output.data.len() * 4,
        Some(_) => output.data.len() * 3,
        None => output.data.len(),
    };
    128 + output.name.len() + data
}

fn put_parameters(out: &mut Vec<u8>, parameters: &Parameters, binary_data_size: Option<usize>) {
    let mut first = true;
    let mut open = |out: &mut Vec<u8>| {
        out.extend_from_slice(if first { b",\"parameters\":{" } else { b"," });
        first = false;
    };
    if let Some(size) = binary_data_size {
        open(out);
        out.extend_from_slice(b"\"binary_data_size\":");
        put(out, &size);
    }
    for (name, value) in &parameters.0 {
        // Ours alone to say.
        if name == "binary_data_size" {
            continue;
        }
        open(out);
        put(out, name);
        out.push(b':');
        match value {
            Parameter::Bool(value) => put(out, value),
            Parameter::Int(value) => put(out, value),
            Parameter::Uint(value) => put(out, value),
            Parameter::Double(value) => put(out, value),
            Parameter::Text(value) => put(out, value),
        }
    }
    if !first {
        out.push(b'}');
    }
}

fn put_data(out: &mut Vec<u8>, output: &Tensor) -> Result<(), InvalidRequest> {
    match output.datatype {
        Datatype::Bool => numbers(out, output, |[byte]| Some(byte != 0)),
        Datatype::Uint8 => numbers(out, output, |bytes| Some(u8::from_le_bytes(bytes))),
        Datatype::Uint16 => numbers(out, output, |bytes| Some(u16::from_le_bytes(bytes))),
        Datatype::Uint32 => numbers(out, output, |bytes| Some(u32::from_le_bytes(bytes))),
        Datatype::Uint64 => numbers(out, output, |bytes| Some(u64::from_le_bytes(bytes))),
        Datatype::Int8 => numbers(out, output, |bytes| Some(i8::from_le_bytes(bytes))),
        Datatype::Int16 => numbers(out, output, |bytes| Some(i16::from_le_bytes(bytes))),
        Datatype::Int32 => numbers(out, output, |bytes| Some(i32::from_le_bytes(bytes))),
        Datatype::Int64 => numbers(out, output, |bytes| Some(i64::from_le_bytes(bytes))),
        Datatype::Fp16 => numbers(out, output, |bytes| finite(f16::from_le_bytes(bytes).to_f32())),
        Datatype::Bf16 => numbers(out, output, |bytes| finite(bf16::from_le_bytes(bytes).to_f32())),
        Datatype::Fp32 => numbers(out, output, |bytes| finite(f32::from_le_bytes(bytes))),
        Datatype::Fp64 => {
            numbers(out, output, |bytes| Some(f64::from_le_bytes(bytes)).filter(|value| value.is_finite()))
        }
        Datatype::Bytes => {
            for (index, element) in bytes_elements(&output.data).enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                let text = std::str::from_utf8(&element);
                put(out, text.map_err(|_| not_json(output, "bytes that are not UTF-8"))?);
            }
            Ok(())
        }
    }
}

fn finite(value: f32) -> Option<f32> {
    value.is_finite().then_some(value)
}

fn numbers<const WIDTH: usize, T: Serialize>(
    out: &mut Vec<u8>,
    output: &Tensor,
    read: impl Fn([u8; WIDTH]) -> Option<T>,
) -> Result<(), InvalidRequest> {
    let (elements, _) = output.data.as_chunks::<WIDTH>();
    for (index, element) in elements.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        put(out, &read(*element).ok_or_else(|| not_json(output, "NaN or an infinity"))?);
    }
    Ok(())
}

fn not_json(output: &Tensor, problem: &'static str) -> InvalidRequest {
    InvalidRequest::OutputNotJson { output: output.name.clone(), problem }
}

/// Writes one JSON value. Numbers are the shortest text that reads back as the same value.
fn put<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    // A Vec takes every write, and texts and numbers always serialize.
    let _ = serde_json::to_writer(out, value);
}
