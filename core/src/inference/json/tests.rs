use bytes::Bytes;

use super::*;
use crate::inference::{Datatype, InferRequest, InferResponse, InvalidRequest, Limits, Parameter, Parameters, Tensor};

fn decode(json: &str) -> Result<InferRequest, InvalidRequest> {
    decode_request(Bytes::copy_from_slice(json.as_bytes()), None, "m", "", &Limits::default())
}

/// One input `x` of the datatype and shape.
fn decode_data(datatype: &str, shape: &str, data: &str) -> Result<Bytes, InvalidRequest> {
    let request =
        decode(&format!(r#"{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}"#))?;
    Ok(request.inputs[0].data.clone())
}

fn with_binary(json: &str, binary: &[u8]) -> Result<InferRequest, InvalidRequest> {
    let body = [json.as_bytes(), binary].concat();
    decode_request(body.into(), Some(json.len()), "m", "", &Limits::default())
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, InvalidRequest>, code: &str) {
    assert_eq!(result.expect_err(code).code(), code);
}

fn tensor(name: &str, datatype: Datatype, shape: &[i64], data: &[u8]) -> Tensor {
    let data = Bytes::copy_from_slice(data);
    Tensor { name: name.into(), datatype, shape: shape.to_vec(), parameters: Parameters::default(), data }
}

#[test]
fn reads_what_triton_clients_send() {
    // As tritonclient.http writes it: one input binary, one not, outputs of both forms.
    let json = r#"{"id":"7","parameters":{"priority":1,"timeout":5000,"binary_data_output":true},
        "inputs":[
          {"name":"a","shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":8}},
          {"name":"b","shape":[2],"datatype":"BYTES","data":["x","\u00e9"]}],
        "outputs":[{"name":"y","parameters":{"binary_data":false}},{"name":"z"}], "later":{"a":[null]}}"#;
    let mut request = with_binary(json, &[0, 0, 128, 63, 0, 0, 0, 64]).unwrap();
    assert_eq!((&*request.model, &*request.id), ("m", "7"));
    assert_eq!(request.parameters.get("priority"), Some(&Parameter::Int(1)));
    assert_eq!(request.inputs[0].data[..], [0, 0, 128, 63, 0, 0, 0, 64]);
    assert!(request.inputs[0].parameters.is_empty(), "binary_data_size is not for the model");
    assert_eq!(request.inputs[1].data[..], *b"\x01\0\0\0x\x02\0\0\0\xc3\xa9");
    let forms = OutputForms::take(&mut request);
    assert!(!forms.is_binary("y") && forms.is_binary("z"));
    assert!(request.outputs[0].parameters.is_empty() && request.parameters.get("binary_data_output").is_none());
}

/// Written by `tritonclient.http` 2.73.0: `InferenceServerClient.generate_request_body` of five inputs from
/// numpy arrays, `request_id="7"`, `timeout=5000`, `parameters={"entity_id": "u1"}` and no outputs.
#[test]
fn reads_the_bytes_that_tritonclient_writes() {
    let json = concat!(
        r#"{"id":"7","inputs":[{"name":"a","shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":8}},"#,
        r#"{"name":"b","shape":[2],"datatype":"BYTES","data":["x","\u00E9"]},"#,
        r#"{"name":"c","shape":[2],"datatype":"BYTES","parameters":{"binary_data_size":10}},"#,
        r#"{"name":"d","shape":[2,1],"datatype":"INT64","data":[9007199254740993,-1]},"#,
        r#"{"name":"g","shape":[2],"datatype":"FP16","data":[1.5,-0.0]}],"#,
        r#""parameters":{"timeout":5000,"binary_data_output":true,"entity_id":"u1"}}"#,
    );
    let request = with_binary(json, b"\0\0\x80?\0\0\0\xc0\x01\0\0\0x\x01\0\0\0\xff").unwrap();
    let expected: [&[u8]; 5] = [
        &[0, 0, 128, 63, 0, 0, 0, 192],
        b"\x01\0\0\0x\x02\0\0\0\xc3\xa9",
        b"\x01\0\0\0x\x01\0\0\0\xff",
        &[1, 0, 0, 0, 0, 0, 32, 0, 255, 255, 255, 255, 255, 255, 255, 255],
        &[0, 0x3e, 0, 0x80],
    ];
    assert!(request.inputs.iter().map(|input| &input.data[..]).eq(expected));
    assert_eq!(request.parameters.text("entity_id"), Some("u1"));
    assert_eq!(request.parameters.integer("timeout"), Some(5_000));
}

#[test]
fn binary_inputs_stay_slices_of_the_body() {
    let json = r#"{"inputs":[{"name":"a","shape":[8],"datatype":"UINT8","parameters":{"binary_data_size":8}}]}"#;
    let body = Bytes::from([json.as_bytes(), &[7; 8]].concat());
    let end = body.as_ptr() as usize + json.len();
    let request = decode_request(body, Some(json.len()), "m", "", &Limits::default()).unwrap();
    assert_eq!(request.inputs[0].data.as_ptr() as usize, end);
}

#[test]
fn data_may_come_before_what_it_takes_to_read_it() {
    let request = decode(r#"{"inputs":[{"data":[1,2],"shape":[2],"datatype":"INT8","name":"x"}]}"#).unwrap();
    assert_eq!(request.inputs[0].data[..], [1, 2]);
}

#[test]
fn data_is_flat_or_nested_as_the_shape_says() {
    for data in ["[1,2,3,4,5,6]", "[[1,2,3],[4,5,6]]", " [ [ 1 , 2,3 ] ,\n[4,5,6 ]\t] "] {
        assert_eq!(decode_data("UINT8", "[2,3]", data).unwrap()[..], [1, 2, 3, 4, 5, 6], "{data}");
    }
    assert_eq!(decode_data("UINT8", "[]", "[5]").unwrap()[..], [5]);
    for data in
        ["[[1,2],[3,4],[5,6]]", "[[1,2,3],[4,5]]", "[[1,2,3],4,5,6]", "[[[1,2,3],[4,5,6]]]", "[[1,2,3,4],[5,6]]"]
    {
        refused(decode_data("UINT8", "[2,3]", data), "invalid-shape");
    }
    refused(decode_data("UINT8", "[2]", "[1,[2]]"), "invalid-element");
    for data in ["[]", "[1]", "[1,2,3]"] {
        refused(decode_data("UINT8", "[2]", data), "data-length-mismatch");
    }
    for data in ["1", "\"a\"", "{}", "null"] {
        refused(decode_data("UINT8", "[1]", data), "invalid-json");
    }
}

#[test]
fn t06_a_key_given_twice_anywhere_is_refused() {
    for json in [
        r#"{"id":"a","id":"b"}"#,
        r#"{"inputs":[],"inputs":[]}"#,
        r#"{"id":"a","\u0069d":"b"}"#,
        r#"{"parameters":{"a":1,"a":1}}"#,
        r#"{"inputs":[{"name":"x","name":"x","datatype":"BOOL","shape":[1],"data":[true]}]}"#,
        r#"{"unknown":[{"deep":{"a":1,"b":2,"a":1}}]}"#,
        r#"{"unknown":1,"unknown":1}"#,
    ] {
        refused(decode(json), "invalid-json");
    }
}

#[test]
fn t07_numbers_are_exact_for_their_datatype_or_refused() {
    let int64 = |text: &str| decode_data("INT64", "[1]", &format!("[{text}]"));
    for value in [9_007_199_254_740_993_i64, i64::MAX, i64::MIN, 0] {
        assert_eq!(int64(&value.to_string()).unwrap()[..], value.to_le_bytes());
    }
    let max = decode_data("UINT64", "[1]", "[18446744073709551615]").unwrap();
    assert_eq!(max[..], u64::MAX.to_le_bytes());
    assert_eq!(decode_data("FP32", "[1]", "[-0.0]").unwrap()[..], (-0.0_f32).to_le_bytes());
    assert_eq!(decode_data("FP64", "[1]", "[-0]").unwrap()[..], (-0.0_f64).to_le_bytes());
    // A halfway case that would be rounded twice on its way through f64.
    assert_eq!(
        decode_data("FP32", "[1]", "[1.00000017881393432617187499]").unwrap()[..],
        0x3f80_0001_u32.to_le_bytes()
    );
    assert_eq!(decode_data("FP16", "[2]", "[65504,-2]").unwrap()[..], [0xff, 0x7b, 0, 0xc0]);
    assert_eq!(decode_data("BF16", "[2]", "[1.5,-0.0]").unwrap()[..], [0xc0, 0x3f, 0, 0x80]);
    for (datatype, number) in [
        ("INT64", "9223372036854775808"),
        ("UINT64", "18446744073709551616"),
        ("UINT64", "-1"),
        ("INT8", "128"),
        ("UINT8", "256"),
        ("INT16", "-32769"),
        ("UINT16", "65536"),
        ("INT32", "2147483648"),
        ("UINT32", "4294967296"),
        ("INT32", "1.0"),
        ("INT32", "1e2"),
        ("FP64", "1e400"),
        ("FP64", "-1e400"),
        ("FP32", "3.5e38"),
        ("FP16", "65520"),
        ("BF16", "3.4e38"),
        ("FP32", "true"),
        ("FP32", "\"1\""),
        ("FP32", "null"),
        ("BOOL", "1"),
        ("BYTES", "1"),
    ] {
        refused(decode_data(datatype, "[1]", &format!("[{number}]")), "invalid-element");
    }
    for text in ["01", "+1", "1.", ".5", "1e", "-", "0x10", "1_0"] {
        assert!(decode_data("FP64", "[1]", &format!("[{text}]")).is_err(), "{text}");
    }
    refused(decode(r#"{"parameters":{"a":18446744073709551616}}"#), "invalid-parameter");
    refused(decode(r#"{"parameters":{"a":1e400}}"#), "invalid-parameter");
    let parameters =
        decode(r#"{"parameters":{"a":18446744073709551615,"b":-9223372036854775808}}"#).unwrap().parameters;
    assert_eq!(parameters.0, [("a".into(), Parameter::Uint(u64::MAX)), ("b".into(), Parameter::Int(i64::MIN))]);
}

#[test]
fn t08_nan_and_infinity_tokens_are_refused() {
    for token in ["NaN", "nan", "Infinity", "-Infinity", "inf", "-inf"] {
        assert!(decode_data("FP64", "[1]", &format!("[{token}]")).is_err(), "{token}");
        refused(decode(&format!(r#"{{"unknown":{token}}}"#)), "invalid-json");
    }
}

#[test]
fn t32_depth_is_refused_before_it_is_descended_into() {
    let nested = |depth: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(depth - 1), "]".repeat(depth - 1));
    assert!(decode(&nested(64)).is_ok());
    refused(decode(&nested(65)), "json-too-deep");
    refused(decode(&"[{\"a\":".repeat(1 << 20)), "invalid-json");
    refused(decode(&format!("{{\"a\":{}", "[".repeat(1 << 22))), "json-too-deep");
    let limitless = Limits { json_depth: usize::MAX, ..Limits::default() };
    let deep = Bytes::from(format!("{{\"a\":{}", "[{\"a\":".repeat(1 << 20)));
    refused(decode_request(deep, None, "m", "", &limitless), "json-too-deep");
}

#[test]
fn t33_the_header_length_is_one_whole_number_within_the_body() {
    let read = |values: &[&str]| header_length(values.iter().map(|value| value.as_bytes()));
    assert_eq!(read(&[]), Ok(None));
    assert_eq!(read(&["12"]), Ok(Some(12)));
    for values in [&["-1"][..], &[""], &["1.0"], &["+1"], &[" 1"], &["0x1"], &["99999999999999999999"], &["1", "1"]] {
        refused(read(values), "invalid-header-length");
    }
    let body = Bytes::from_static(b"{}");
    refused(decode_request(body, Some(3), "m", "", &Limits::default()), "invalid-header-length");
}

#[test]
fn t34_binary_sizes_add_up_to_what_follows_the_json() {
    let json = |size: &str| {
        format!(
            r#"{{"inputs":[{{"name":"x","datatype":"UINT8","shape":[2],"parameters":{{"binary_data_size":{size}}}}}]}}"#
        )
    };
    assert!(with_binary(&json("2"), &[1, 2]).is_ok());
    refused(with_binary(&json("2"), &[1, 2, 3]), "binary-size-mismatch");
    refused(with_binary(&json("2"), &[1]), "binary-size-mismatch");
    refused(with_binary(&json("18446744073709551615"), &[1]), "binary-size-mismatch");
    for size in ["-1", "\"2\"", "2.0", "true"] {
        refused(with_binary(&json(size), &[1, 2]), "invalid-parameter");
    }
    refused(decode(&json("2")), "binary-size-mismatch");
    refused(with_binary("{}", &[1]), "binary-size-mismatch");
    let both =
        r#"{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1],"parameters":{"binary_data_size":1}}]}"#;
    refused(with_binary(both, &[1]), "mixed-contents");
}

#[test]
fn t35_t36_no_shape_makes_us_allocate() {
    for shape in ["[1000000000]", "[9223372036854775807,9223372036854775807]", "[4611686018427387904,4]"] {
        let code = decode_data("FP64", shape, "[1,2,3]").unwrap_err().code();
        assert!(matches!(code, "limit-exceeded" | "invalid-shape"), "{shape}: {code}");
    }
    for shape in ["[-1]", "[0]", "[2,0]"] {
        refused(decode_data("FP64", shape, "[]"), "invalid-shape");
    }
    for shape in ["[1.0]", "[\"1\"]", "[9223372036854775808]", "1", "null"] {
        refused(decode_data("FP64", shape, "[1]"), "invalid-json");
    }
    refused(decode_data("FP64", "[1,1,1,1,1,1,1,1,1]", "[1]"), "limit-exceeded");
    // Within the limits, but the text holds three: what is reserved is bounded by the text.
    refused(decode_data("FP64", "[2000000]", "[1,2,3]"), "data-length-mismatch");
}

#[test]
fn t37_bytes_prefixes_stay_within_the_binary_data() {
    let json = r#"{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":5}}]}"#;
    assert!(with_binary(json, b"\x01\0\0\0a").is_ok());
    refused(with_binary(json, b"\x02\0\0\0a"), "invalid-element");
    refused(with_binary(json, b"\xff\xff\xff\xffa"), "invalid-element");
    refused(with_binary(json, b"\0\0\0\0a"), "invalid-element");
}

#[test]
fn t38_unknown_datatypes_and_missing_or_repeated_names_are_refused() {
    refused(decode_data("FP8", "[1]", "[1]"), "unknown-datatype");
    refused(decode_data("fp32", "[1]", "[1]"), "unknown-datatype");
    let x = r#"{"name":"x","datatype":"BOOL","shape":[1],"data":[true]}"#;
    refused(decode(&format!(r#"{{"inputs":[{x},{x}]}}"#)), "duplicate-tensor");
    refused(decode(r#"{"outputs":[{"name":"y"},{"name":"y"}]}"#), "duplicate-tensor");
    refused(decode(r#"{"outputs":[{"name":""}]}"#), "unnamed-tensor");
    for json in [
        r#"{"outputs":[{}]}"#,
        r#"{"inputs":[{"datatype":"BOOL","shape":[1],"data":[true]}]}"#,
        r#"{"inputs":[{"name":"x","shape":[1],"data":[true]}]}"#,
        r#"{"inputs":[{"name":"x","datatype":"BOOL","data":[true]}]}"#,
        r#"{"inputs":[{"name":"x","datatype":"BOOL","shape":[1]}]}"#,
        r#"{"inputs":{}}"#,
        r#"{"inputs":null}"#,
        r#"{"id":7}"#,
    ] {
        refused(decode(json), "invalid-json");
    }
}

#[test]
fn t39_shared_memory_and_classification_are_refused() {
    let input = |parameter: &str| {
        decode(&format!(r#"{{"inputs":[{{"name":"x","datatype":"BOOL","shape":[1],"parameters":{{{parameter}}}}}]}}"#))
    };
    refused(input(r#""shared_memory_region":"r","shared_memory_byte_size":1"#), "shared-memory");
    refused(decode(r#"{"outputs":[{"name":"y","parameters":{"shared_memory_region":"r"}}]}"#), "shared-memory");
    refused(decode(r#"{"outputs":[{"name":"y","parameters":{"classification":3}}]}"#), "invalid-parameter");
}

#[test]
fn what_is_no_json_is_refused() {
    for json in [
        "",
        " ",
        "[]",
        "null",
        "{",
        "{}x",
        "{} {}",
        "{,}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{a:1}",
        "{'a':1}",
        "{\"a\":[1,]}",
        "{\"a\":[,1]}",
        "{\"a\":tru}",
        "{\"a\":\"\n\"}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"\\ud800\"}",
        "{\"a\":\"\\",
        "{\"a\":\"",
        "{\"a\":01}",
        "\u{feff}{}",
        "{}\0",
        "/**/{}",
    ] {
        refused(decode(json), "invalid-json");
    }
    let latin1 = Bytes::from_static(b"{\"id\":\"\xe9\"}");
    refused(decode_request(latin1, None, "m", "", &Limits::default()), "invalid-json");
}

#[test]
fn limits_hold() {
    let limits = Limits { body: 400, tensors: 2, tensor: 16, dimensions: 2, parameters: 2, text: 8, json_depth: 6 };
    let decode = |json: &str| decode_request(Bytes::copy_from_slice(json.as_bytes()), None, "m", "", &limits);
    let input = |shape: &str, data: &str| {
        decode(&format!(r#"{{"inputs":[{{"name":"x","datatype":"UINT64","shape":{shape},"data":{data}}}]}}"#))
    };
    let text = |length: usize| format!(r#"{{"id":"{}"}}"#, "a".repeat(length));
    assert!(decode(&text(8)).is_ok());
    assert!(decode(r#"{"id":"\u0061\u0061\u0061\u0061\u0061\u0061\u0061\u0061"}"#).is_ok());
    assert!(decode(r#"{"outputs":[{"name":"a"},{"name":"b"}]}"#).is_ok());
    assert!(input("[2]", "[1,2]").is_ok());
    for json in [
        text(9),
        text(49),
        " ".repeat(401),
        r#"{"id":"\u0061\u0061\u0061\u0061\u0061\u0061\u0061\u0061\u0061"}"#.into(),
        r#"{"outputs":[{"name":"a"},{"name":"b"},{"name":"c"}]}"#.into(),
        r#"{"outputs":[{"name":"123456789"}]}"#.into(),
        r#"{"parameters":{"a":1,"b":2,"c":3}}"#.into(),
        r#"{"parameters":{"123456789":1}}"#.into(),
        r#"{"parameters":{"a":"123456789"}}"#.into(),
        r#"{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["12345678901234567"]}]}"#.into(),
    ] {
        refused(decode(&json), "limit-exceeded");
    }
    refused(input("[3]", "[1,2,3]"), "limit-exceeded");
    refused(input("[1,1,1]", "[1]"), "limit-exceeded");
    let keys: String = (0..300).map(|key| format!("\"{key}\":0,")).collect();
    let many = Bytes::from(format!("{{{keys}\"a\":0}}"));
    refused(decode_request(many, None, "m", "", &Limits::default()), "limit-exceeded");
}

#[test]
fn t25_tensors_that_are_small_as_text_and_large_as_bytes_are_added_up() {
    let limits = Limits { body: 400, tensor: 160, ..Limits::default() };
    let of = |count: usize| {
        // 40 bytes of text, 160 of FP64.
        let data = ["1"; 20].join(",");
        let input = |index| format!(r#"{{"name":"{index}","datatype":"FP64","shape":[20],"data":[{data}]}}"#);
        let inputs: Vec<String> = (0..count).map(input).collect();
        let json = format!(r#"{{"inputs":[{}]}}"#, inputs.join(","));
        assert!(json.len() <= limits.body);
        decode_request(json.into(), None, "m", "", &limits)
    };
    assert!(of(2).is_ok());
    refused(of(3), "body-too-large");
}

#[test]
fn answers_are_written_as_triton_does() {
    let mut response = InferResponse {
        model: "m".into(),
        version: "1".into(),
        id: "a\"b".into(),
        outputs: vec![
            tensor("y", Datatype::Fp32, &[1, 2], &[0, 0, 0, 63, 0, 0, 0, 128]),
            tensor("z", Datatype::Bytes, &[1], b"\x02\0\0\0hi"),
        ],
        ..InferResponse::default()
    };
    response.parameters.set("spillway-model-version", Parameter::Text("1".into()));
    let json = encode_response(&response, &OutputForms::default()).unwrap();
    assert_eq!(json.header_length, None);
    assert_eq!(json.content_type(), "application/json");
    let expected = r#"{"model_name":"m","model_version":"1","id":"a\"b","parameters":{"spillway-model-version":"1"},"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[0.5,-0.0]},{"name":"z","datatype":"BYTES","shape":[1],"data":["hi"]}]}"#;
    assert_eq!(std::str::from_utf8(&json.segments[0]).unwrap(), expected);

    let mut asks = decode(r#"{"outputs":[{"name":"z","parameters":{"binary_data":true}},{"name":"y"}]}"#).unwrap();
    let binary = encode_response(&response, &OutputForms::take(&mut asks)).unwrap();
    assert_eq!(binary.header_length, Some(binary.segments[0].len()));
    assert_eq!(binary.segments[1][..], *b"\x02\0\0\0hi");
    assert_eq!(binary.content_length(), binary.segments[0].len() + 6);
    let head: serde_json::Value = serde_json::from_slice(&binary.segments[0]).unwrap();
    assert_eq!(head["outputs"][1]["parameters"]["binary_data_size"], 6);
    assert!(head["outputs"][1].get("data").is_none());
}

#[test]
fn t08_outputs_that_json_cannot_carry_ask_for_binary() {
    for output in [
        tensor("y", Datatype::Fp32, &[1], &f32::NAN.to_le_bytes()),
        tensor("y", Datatype::Fp64, &[1], &f64::INFINITY.to_le_bytes()),
        tensor("y", Datatype::Fp16, &[1], &[0, 0x7c]),
        tensor("y", Datatype::Bf16, &[1], &[0xc0, 0x7f]),
        tensor("y", Datatype::Bytes, &[1], b"\x01\0\0\0\xff"),
    ] {
        let response = InferResponse { outputs: vec![output], ..InferResponse::default() };
        refused(encode_response(&response, &OutputForms::default()), "output-not-json");
        let mut asks = decode(r#"{"parameters":{"binary_data_output":true}}"#).unwrap();
        let binary = encode_response(&response, &OutputForms::take(&mut asks)).unwrap();
        assert_eq!(binary.segments[1], response.outputs[0].data);
    }
    refused(decode(r#"{"parameters":{"binary_data_output":1}}"#), "invalid-parameter");
    refused(decode(r#"{"outputs":[{"name":"y","parameters":{"binary_data":"yes"}}]}"#), "invalid-parameter");
}

#[test]
fn documents_have_the_keys_of_kserve() {
    assert_eq!(error("no \"x\"")[..], *br#"{"error":"no \"x\""}"#);
    assert_eq!(live(true)[..], *br#"{"live":true}"#);
    assert_eq!(ready(false)[..], *br#"{"ready":false}"#);
    assert_eq!(model_ready("m", true)[..], *br#"{"name":"m","ready":true}"#);
}
