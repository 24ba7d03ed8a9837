//! What holds for any tensor and any bytes.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::value::RawValue;

use super::scanner::Scanner;
use super::{OutputForms, decode_request, encode_response};
use crate::inference::{Datatype, InferRequest, InferResponse, Limits, Parameters, Tensor};

/// Any tensor that JSON can carry.
fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let one = (proptest::sample::select(&Datatype::ALL[..]), vec(1_i64..4, 0..4)).prop_flat_map(|(datatype, shape)| {
        let elements = shape.iter().product::<i64>() as usize;
        let data = match datatype.width() {
            Some(width) => vec(any::<u8>(), elements * width).prop_map(move |bytes| finite(datatype, bytes)).boxed(),
            None => vec(".{0,6}", elements).prop_map(|texts| join(&texts)).boxed(),
        };
        (Just(datatype), Just(shape), data)
    });
    vec(one, 0..4).prop_map(|list| {
        let tensor = |(index, (datatype, shape, data)): (usize, (_, _, Vec<u8>))| Tensor {
            name: format!("t{index}"),
            datatype,
            shape,
            parameters: Parameters::default(),
            data: data.into(),
        };
        list.into_iter().enumerate().map(tensor).collect()
    })
}

fn finite(datatype: Datatype, mut bytes: Vec<u8>) -> Vec<u8> {
    // The lowest bit of the exponent's upper byte is cleared, so that it is never all ones.
    let (at, clear) = match datatype {
        Datatype::Bool => {
            bytes.iter_mut().for_each(|byte| *byte &= 1);
            return bytes;
        }
        Datatype::Fp16 => (1, 0x04),
        Datatype::Bf16 => (1, 0x01),
        Datatype::Fp32 => (3, 0x01),
        Datatype::Fp64 => (7, 0x01),
        _ => return bytes,
    };
    bytes.iter_mut().skip(at).step_by(at + 1).for_each(|byte| *byte &= !clear);
    bytes
}

fn join(texts: &[String]) -> Vec<u8> {
    texts.iter().flat_map(|text| [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()).collect()
}

/// The tensors as a request's body: an answer's body with `outputs` renamed.
fn body(tensors: &[Tensor], binary: bool) -> (Bytes, Option<usize>) {
    let json = if binary { r#"{"parameters":{"binary_data_output":true}}"# } else { "{}" };
    let mut asks = decode_request(json.into(), None, "m", "", &Limits::default()).unwrap();
    let response = InferResponse { outputs: tensors.to_vec(), ..InferResponse::default() };
    let written = encode_response(&response, &OutputForms::take(&mut asks)).unwrap();
    let head = std::str::from_utf8(&written.segments[0]).unwrap().replacen("\"outputs\":", "\"inputs\":", 1);
    let header_length = written.header_length.map(|_| head.len());
    let segments = std::iter::once(head.as_bytes()).chain(written.segments[1..].iter().map(|segment| &segment[..]));
    (segments.collect::<Vec<_>>().concat().into(), header_length)
}

fn decode(body: Bytes, header_length: Option<usize>) -> InferRequest {
    decode_request(body, header_length, "m", "", &Limits::default()).unwrap()
}

/// The flat `data` of a JSON document's tensors, nested as their shapes say.
fn nest(json: &str, tensors: &[Tensor]) -> String {
    let mut nested = json.to_owned();
    for tensor in tensors.iter().filter(|tensor| !tensor.shape.is_empty()) {
        let at = nested.find(&format!("\"name\":\"{}\"", tensor.name)).unwrap();
        let from = at + nested[at..].find("\"data\":").unwrap() + 7;
        let mut reader = serde_json::Deserializer::from_str(&nested[from..]).into_iter::<Vec<&RawValue>>();
        let mut items: Vec<String> = reader.next().unwrap().unwrap().iter().map(|item| item.get().to_owned()).collect();
        let to = from + reader.byte_offset();
        for size in tensor.shape.iter().rev() {
            items = items.chunks(*size as usize).map(|row| format!("[{}]", row.join(" , "))).collect();
        }
        nested.replace_range(from..to, &items[0]);
    }
    nested
}

proptest! {
    #[test]
    fn any_tensor_is_the_same_from_json_nested_json_and_binary(tensors in tensors()) {
        let (json, none) = body(&tensors, false);
        prop_assert_eq!(&decode(json.clone(), none).inputs, &tensors);
        let nested = nest(std::str::from_utf8(&json).unwrap(), &tensors);
        prop_assert_eq!(&decode(nested.into(), None).inputs, &tensors);
        let (binary, header_length) = body(&tensors, true);
        prop_assert_eq!(&decode(binary, header_length).inputs, &tensors);
    }

    #[test]
    fn any_bytes_never_panic(body in vec(any::<u8>(), 0..200), header_length in proptest::option::of(0_usize..220)) {
        let _ = decode_request(body.into(), header_length, "m", "", &Limits::default());
    }

    #[test]
    fn a_changed_body_never_panics(
        tensors in tensors(),
        binary: bool,
        changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let (body, header_length) = body(&tensors, binary);
        let mut body = body.to_vec();
        for (at, byte) in changes {
            *at.get_mut(&mut body) = byte;
        }
        let request = decode_request(body.into(), header_length, "m", "", &Limits::default());
        prop_assert!(request.iter().flat_map(|request| &request.inputs).all(|input| input.check_length().is_ok()));
    }

    /// The scanner against serde_json, on texts that are nearly JSON.
    #[test]
    fn the_scanner_accepts_what_serde_json_accepts(
        text in r#"([\[\]{},:]|"[a\\u0-9"é]{0,6}"|-?[0-9.]{1,3}(e[+-]?[0-9]{1,2})?|true|false|null| |\PC){0,12}"#,
        wrap: bool,
    ) {
        let text = if wrap { format!("[{text}]") } else { text };
        let mut scanner = Scanner::new(&text, &Limits::default());
        let ours = scanner.skip().and_then(|()| scanner.end());
        let theirs = serde_json::from_str::<serde_json::Value>(&text);
        let twice = ours.as_ref().is_err_and(|fault| fault.to_string().contains("a key twice"));
        if !twice {
            prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?} {:?}", ours, theirs);
        }
    }
}
