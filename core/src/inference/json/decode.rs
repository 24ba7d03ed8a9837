//! A request's body into core's form.

use bytes::Bytes;

use super::super::{
    Datatype, InferRequest, InvalidRequest, Limits, Parameter, Parameters, RawBytes, RequestedOutput, Tensor,
};
use super::data;
use super::scanner::Scanner;

/// Reads the value of the header `Inference-Header-Content-Length`, given all its occurrences.
pub fn header_length<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Result<Option<usize>, InvalidRequest> {
    let Some(value) = values.next() else { return Ok(None) };
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let length = std::str::from_utf8(value).ok().filter(|_| digits).and_then(|text| text.parse().ok());
    match (length, values.next()) {
        (Some(length), None) => Ok(Some(length)),
        _ => Err(InvalidRequest::HeaderLength),
    }
}

/// Reads the body of `POST /v2/models/MODEL[/versions/VERSION]/infer`.
///
/// `header_length` is the length of the JSON where binary tensors follow it. How outputs are to be
/// written stays in the parameters until [`super::OutputForms::take`].
pub fn decode_request(
    body: Bytes,
    header_length: Option<usize>,
    model: &str,
    version: &str,
    limits: &Limits,
) -> Result<InferRequest, InvalidRequest> {
    if body.len() > limits.body {
        return Err(InvalidRequest::Limit { what: "bytes of the body", limit: limits.body });
    }
    let head = header_length.unwrap_or(body.len());
    if head > body.len() {
        return Err(InvalidRequest::HeaderLength);
    }
    for (what, text) in [("bytes of the model's name", model), ("bytes of the model's version", version)] {
        if text.len() > limits.text {
            return Err(InvalidRequest::Limit { what, limit: limits.text });
        }
    }
    let text = std::str::from_utf8(&body[..head]).map_err(|_| InvalidRequest::Json("it is not UTF-8".into()))?;
    let mut request = InferRequest { model: model.to_owned(), version: version.to_owned(), ..InferRequest::default() };
    let mut binary = Binary { rest: body.slice(head..), declared: 0, given: (body.len() - head) as u64 };
    let mut scanner = Scanner::new(text, limits);
    let mut raw = RawBytes::within(limits);
    scanner.object(|scanner, key| match key {
        "id" if scanner.null() => Ok(()),
        "id" => {
            request.id = scanner.text("bytes of the id")?;
            Ok(())
        }
        "parameters" => {
            request.parameters = read_parameters(scanner, limits)?;
            check_flag(&request.parameters, "binary_data_output")
        }
        "inputs" => scanner.array(|scanner, index| {
            if index == limits.tensors {
                return Err(InvalidRequest::Limit { what: "inputs", limit: limits.tensors });
            }
            let input = read_input(scanner, &mut binary, limits)?;
            raw.add(&input)?;
            request.inputs.push(input);
            Ok(())
        }),
        "outputs" if scanner.null() => Ok(()),
        "outputs" => scanner.array(|scanner, index| {
            if index == limits.tensors {
                return Err(InvalidRequest::Limit { what: "outputs", limit: limits.tensors });
            }
            request.outputs.push(read_output(scanner, limits)?);
            Ok(())
        }),
        _ => scanner.skip(),
    })?;
    scanner.end()?;
    if binary.declared != binary.given {
        return Err(binary.fault());
    }
    request.check_names()?;
    Ok(request)
}

/// The binary data after the JSON, which the inputs take in their order.
struct Binary {
    rest: Bytes,
    declared: u64,
    given: u64,
}

impl Binary {
    fn take(&mut self, size: u64) -> Result<Bytes, InvalidRequest> {
        self.declared = self.declared.saturating_add(size);
        match usize::try_from(size) {
            Ok(size) if size <= self.rest.len() => Ok(self.rest.split_to(size)),
            _ => Err(self.fault()),
        }
    }

    fn fault(&self) -> InvalidRequest {
        InvalidRequest::BinarySize { declared: self.declared, found: self.given }
    }
}

fn read_input(scanner: &mut Scanner<'_>, binary: &mut Binary, limits: &Limits) -> Result<Tensor, InvalidRequest> {
    let mut name = None;
    let mut datatype = None;
    let mut shape = None;
    let mut parameters = Parameters::default();
    let mut data = None;
    // `data` that came before what it takes to read it.
    let mut later = None;
    scanner.object(|scanner, key| {
        match key {
            "name" => name = Some(scanner.text("bytes of a tensor's name")?),
            "datatype" => datatype = Some(scanner.text("bytes of a datatype")?),
            "shape" => shape = Some(read_shape(scanner, limits)?),
            "parameters" => parameters = read_parameters(scanner, limits)?,
            "data" => match (&name, &datatype, &shape) {
                (Some(name), Some(datatype), Some(shape)) => {
                    data = Some(data::read(scanner, name, parse_datatype(name, datatype)?, shape, limits)?);
                }
                _ => {
                    later = Some(scanner.clone());
                    scanner.skip()?;
                }
            },
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    let missing = |key: &str| InvalidRequest::Json(format!("an input lacks the key '{key}'"));
    let name = name.ok_or_else(|| missing("name"))?;
    let datatype = parse_datatype(&name, &datatype.ok_or_else(|| missing("datatype"))?)?;
    let shape = shape.ok_or_else(|| missing("shape"))?;
    if let Some(mut earlier) = later {
        data = Some(data::read(&mut earlier, &name, datatype, &shape, limits)?);
    }
    let data = match (data, parameters.remove("binary_data_size")) {
        (Some(data), None) => data,
        (None, Some(size)) => {
            let size = match size {
                Parameter::Int(size) => u64::try_from(size).ok(),
                Parameter::Uint(size) => Some(size),
                _ => None,
            };
            let problem = "must be a whole number of bytes";
            let fault = || InvalidRequest::Parameter { name: "binary_data_size".into(), problem };
            binary.take(size.ok_or_else(fault)?)?
        }
        (Some(_), Some(_)) => return Err(InvalidRequest::MixedContents(name)),
        (None, None) => return Err(missing("data")),
    };
    let tensor = Tensor { name, datatype, shape, parameters, data };
    tensor.check(limits)?;
    Ok(tensor)
}

fn read_output(scanner: &mut Scanner<'_>, limits: &Limits) -> Result<RequestedOutput, InvalidRequest> {
    let mut name = None;
    let mut parameters = Parameters::default();
    scanner.object(|scanner, key| {
        match key {
            "name" => name = Some(scanner.text("bytes of a tensor's name")?),
            "parameters" => parameters = read_parameters(scanner, limits)?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    check_flag(&parameters, "binary_data")?;
    let name = name.ok_or_else(|| InvalidRequest::Json("an output lacks the key 'name'".into()))?;
    Ok(RequestedOutput { name, parameters })
}

fn parse_datatype(tensor: &str, text: &str) -> Result<Datatype, InvalidRequest> {
    let fault = || InvalidRequest::Datatype { tensor: tensor.to_owned(), datatype: text.chars().take(32).collect() };
    Datatype::parse(text).ok_or_else(fault)
}

fn read_shape(scanner: &mut Scanner<'_>, limits: &Limits) -> Result<Vec<i64>, InvalidRequest> {
    let mut shape = Vec::new();
    scanner.array(|scanner, index| {
        if index == limits.dimensions {
            return Err(InvalidRequest::Limit { what: "dimensions of one tensor", limit: limits.dimensions });
        }
        let size = scanner.number()?.parse().map_err(|_| scanner.fault("a whole number of 64 bits before this"))?;
        shape.push(size);
        Ok(())
    })?;
    Ok(shape)
}

fn read_parameters(scanner: &mut Scanner<'_>, limits: &Limits) -> Result<Parameters, InvalidRequest> {
    let mut parameters = Parameters::default();
    if scanner.null() {
        return Ok(parameters);
    }
    scanner.object(|scanner, key| {
        if parameters.0.len() == limits.parameters {
            return Err(InvalidRequest::Limit { what: "parameters", limit: limits.parameters });
        }
        if key.len() > limits.text {
            return Err(InvalidRequest::Limit { what: "bytes of a parameter's name", limit: limits.text });
        }
        let value = read_parameter(scanner, key)?;
        // The scanner sees to it that no key comes twice.
        parameters.0.push((key.to_owned(), value));
        Ok(())
    })?;
    parameters.check_offered()?;
    Ok(parameters)
}

fn read_parameter(scanner: &mut Scanner<'_>, name: &str) -> Result<Parameter, InvalidRequest> {
    let fault = |problem| InvalidRequest::Parameter { name: name.to_owned(), problem };
    match scanner.peek() {
        Some(b'"') => scanner.text("bytes of a parameter's value").map(Parameter::Text),
        Some(b'-' | b'0'..=b'9') => {
            let text = scanner.number()?;
            if text.bytes().any(|byte| matches!(byte, b'.' | b'e' | b'E')) {
                let value = text.parse::<f64>().ok().filter(|value| value.is_finite()).map(Parameter::Double);
                return value.ok_or_else(|| fault("the number is out of range"));
            }
            let value = text.parse().map(Parameter::Int).or_else(|_| text.parse().map(Parameter::Uint));
            value.map_err(|_| fault("the whole number is out of range"))
        }
        _ => scanner.boolean().map(Parameter::Bool).ok_or_else(|| fault("must be a string, a number or a boolean")),
    }
}

fn check_flag(parameters: &Parameters, name: &str) -> Result<(), InvalidRequest> {
    match parameters.get(name) {
        None | Some(Parameter::Bool(_)) => Ok(()),
        Some(_) => Err(InvalidRequest::Parameter { name: name.to_owned(), problem: "must be true or false" }),
    }
}
