use proptest::collection::vec;
use proptest::prelude::*;
use spillway_core::inference::json;

use super::*;
use proto::InferTensorContents;

fn input(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: shape.to_vec(),
        ..InferInputTensor::default()
    }
}

fn typed(datatype: &str, shape: &[i64], contents: InferTensorContents) -> Result<Bytes, InvalidRequest> {
    let input = InferInputTensor { contents: Some(contents), ..input("x", datatype, shape) };
    let request = proto::ModelInferRequest { inputs: vec![input], ..Default::default() };
    decode(&request).map(|request| request.inputs[0].data.clone())
}

fn decode(request: &proto::ModelInferRequest) -> Result<InferRequest, InvalidRequest> {
    decode_message(request.encode_to_vec().into(), &Limits::default())
}

fn choice(value: ParameterChoice) -> proto::InferParameter {
    proto::InferParameter { parameter_choice: Some(value) }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, InvalidRequest>, code: &str) {
    assert_eq!(result.expect_err(code).code(), code);
}

fn tensor(name: &str, data: Bytes) -> Tensor {
    let shape = vec![i64::try_from(data.len()).unwrap()];
    Tensor { name: name.into(), datatype: Datatype::Uint8, shape, parameters: Parameters::default(), data }
}

#[test]
fn typed_contents_become_raw() {
    let ints = |values: &[i32]| InferTensorContents { int_contents: values.to_vec(), ..Default::default() };
    let uints = |values: &[u32]| InferTensorContents { uint_contents: values.to_vec(), ..Default::default() };
    assert_eq!(typed("INT8", &[2], ints(&[-1, 127])).unwrap()[..], [255, 127]);
    assert_eq!(typed("INT16", &[1], ints(&[-2])).unwrap()[..], (-2_i16).to_le_bytes());
    assert_eq!(typed("INT32", &[1], ints(&[-2])).unwrap()[..], (-2_i32).to_le_bytes());
    assert_eq!(typed("UINT8", &[1], uints(&[255])).unwrap()[..], [255]);
    assert_eq!(typed("UINT16", &[1], uints(&[65_535])).unwrap()[..], [255, 255]);
    assert_eq!(typed("UINT32", &[1], uints(&[7])).unwrap()[..], [7, 0, 0, 0]);
    let contents = InferTensorContents { int64_contents: vec![i64::MIN], ..Default::default() };
    assert_eq!(typed("INT64", &[1], contents).unwrap()[..], i64::MIN.to_le_bytes());
    let contents = InferTensorContents { uint64_contents: vec![u64::MAX], ..Default::default() };
    assert_eq!(typed("UINT64", &[1], contents).unwrap()[..], u64::MAX.to_le_bytes());
    let contents = InferTensorContents { fp32_contents: vec![-0.0], ..Default::default() };
    assert_eq!(typed("FP32", &[1], contents).unwrap()[..], (-0.0_f32).to_le_bytes());
    let contents = InferTensorContents { fp64_contents: vec![f64::NAN], ..Default::default() };
    assert_eq!(typed("FP64", &[1], contents).unwrap()[..], f64::NAN.to_le_bytes());
    let contents = InferTensorContents { bool_contents: vec![true, false], ..Default::default() };
    assert_eq!(typed("BOOL", &[2], contents).unwrap()[..], [1, 0]);
    let contents = InferTensorContents { bytes_contents: vec![Bytes::from_static(b"ab")], ..Default::default() };
    assert_eq!(typed("BYTES", &[1], contents).unwrap()[..], *b"\x02\0\0\0ab");
}

#[test]
fn t07_typed_numbers_out_of_range_are_refused() {
    for (datatype, value) in [("INT8", 128), ("INT8", -129), ("INT16", 32_768)] {
        let contents = InferTensorContents { int_contents: vec![value], ..Default::default() };
        refused(typed(datatype, &[1], contents), "invalid-element");
    }
    for (datatype, value) in [("UINT8", 256), ("UINT16", 65_536)] {
        let contents = InferTensorContents { uint_contents: vec![value], ..Default::default() };
        refused(typed(datatype, &[1], contents), "invalid-element");
    }
}

#[test]
fn t37_contents_come_in_one_form_and_number() {
    let fp32 = InferTensorContents { fp32_contents: vec![1.0], ..Default::default() };
    let with_contents = InferInputTensor { contents: Some(fp32.clone()), ..input("x", "FP32", &[1]) };
    let one = Bytes::from_static(&[0; 4]);
    let request = |inputs: &[&InferInputTensor], raw: &[&Bytes]| {
        decode(&proto::ModelInferRequest {
            inputs: inputs.iter().copied().cloned().collect(),
            raw_input_contents: raw.iter().copied().cloned().collect(),
            ..Default::default()
        })
    };
    let (x, y) = (input("x", "FP32", &[1]), input("y", "FP32", &[1]));
    assert!(request(&[&x, &y], &[&one, &one]).is_ok());
    let beside = InferInputTensor { contents: Some(InferTensorContents::default()), ..x.clone() };
    assert!(request(&[&beside], &[&one]).is_ok(), "an empty message beside raw contents says nothing");
    refused(request(&[&with_contents], &[&one]), "mixed-contents");
    refused(request(&[&with_contents, &y], &[&one]), "raw-count-mismatch");
    refused(request(&[&x], &[&one, &one]), "raw-count-mismatch");
    refused(request(&[], &[&one]), "raw-count-mismatch");
    refused(request(&[&x], &[]), "data-length-mismatch");
    refused(typed("FP32", &[2], fp32.clone()), "data-length-mismatch");
    refused(typed("FP32", &[1], InferTensorContents { bool_contents: vec![true], ..fp32.clone() }), "mixed-contents");
    refused(typed("FP64", &[1], fp32.clone()), "mixed-contents");
    refused(typed("FP16", &[1], fp32), "invalid-element");
    let past = Bytes::from_static(b"\x09\0\0\0a");
    refused(request(&[&input("x", "BYTES", &[1])], &[&past]), "invalid-element");
}

#[test]
fn t36_raw_lengths_must_fit_the_shape() {
    for shape in [&[-1][..], &[0], &[i64::MAX, i64::MAX]] {
        let request = proto::ModelInferRequest {
            inputs: vec![input("x", "FP32", shape)],
            raw_input_contents: vec![Bytes::from_static(&[0; 4])],
            ..Default::default()
        };
        refused(decode(&request), "invalid-shape");
    }
    let request = proto::ModelInferRequest {
        inputs: vec![input("x", "FP32", &[2])],
        raw_input_contents: vec![Bytes::from_static(&[0; 7])],
        ..Default::default()
    };
    refused(decode(&request), "data-length-mismatch");
}

#[test]
fn t38_t39_names_and_parameters_are_checked() {
    let raw = vec![Bytes::from_static(&[0]); 2];
    let twice = vec![input("x", "INT8", &[1]); 2];
    refused(
        decode(&proto::ModelInferRequest { inputs: twice, raw_input_contents: raw, ..Default::default() }),
        "duplicate-tensor",
    );
    let parameters = |name: &str, value: proto::InferParameter| {
        decode(&proto::ModelInferRequest { parameters: HashMap::from([(name.into(), value)]), ..Default::default() })
    };
    let text = |text: &str| choice(ParameterChoice::StringParam(text.into()));
    refused(parameters("shared_memory_region", text("r")), "shared-memory");
    refused(parameters("a", proto::InferParameter::default()), "invalid-parameter");
    refused(parameters("a", text(&"b".repeat(1_025))), "limit-exceeded");
    refused(parameters(&"a".repeat(1_025), text("b")), "limit-exceeded");
    let known = parameters("timeout", choice(ParameterChoice::Uint64Param(5))).unwrap().parameters;
    assert_eq!(known.integer("timeout"), Some(5));
}

#[test]
fn t41_malformed_messages_are_refused() {
    for bytes in [&[0x0a][..], &[0x0a, 5, b'a'], &[0x0a, 1, 0xff], &[0xff; 16], &[0x0b], &[0x08, 1]] {
        refused(decode_message(Bytes::copy_from_slice(bytes), &Limits::default()), "invalid-protobuf");
        let long = [&[0x1a, 0x80, 0x28][..], &[b'i'; 5_120], bytes].concat();
        refused(decode_message(long.into(), &Limits::default()), "invalid-protobuf");
    }
    assert!(decode_response_message(Bytes::from_static(&[0xff; 4]), &Limits::default()).is_err());
}

#[test]
fn t41_small_wire_does_not_become_large_memory() {
    let many = |field: &[u8]| decode_message(field.repeat(1 << 20).into(), &Limits::default());
    // Empty inputs, outputs, raw contents, parameters.
    for key in [0x2a, 0x32, 0x3a, 0x22] {
        refused(many(&[key, 0]), "limit-exceeded");
    }
    let inside = |inner: &[u8], count: usize| {
        let inner = inner.repeat(count);
        let request = proto::ModelInferRequest { id: "i".repeat(1_000), ..Default::default() };
        let mut message = request.encode_to_vec();
        message.push(0x2a);
        prost::encoding::encode_varint(inner.len() as u64, &mut message);
        message.extend_from_slice(&inner);
        decode_message(message.into(), &Limits::default())
    };
    refused(inside(&[0x18, 1], 4_096), "limit-exceeded");
    refused(inside(&[0x1a, 2, 1, 1], 2_048), "limit-exceeded");
    refused(inside(&[0x22, 0], 4_096), "limit-exceeded");
    refused(inside(&[0x2a, 0], 4_096), "limit-exceeded");
    let mut elements = vec![0x2a];
    prost::encoding::encode_varint(2 << 20, &mut elements);
    elements.extend([0x42, 0].repeat(1 << 20));
    refused(inside(&elements, 1), "limit-exceeded");
    let limits = Limits { body: 10, ..Limits::default() };
    refused(decode_message(vec![0; 11].into(), &limits), "limit-exceeded");
}

#[test]
fn t25_typed_numbers_that_grow_on_their_way_to_bytes_are_added_up() {
    let limits = Limits { body: 8_000, ..Limits::default() };
    let of = |count: usize| {
        // A byte each on the wire, eight as INT64.
        let contents = InferTensorContents { int64_contents: vec![1; 300], ..Default::default() };
        let input = |index: usize| InferInputTensor {
            contents: Some(contents.clone()),
            ..input(&index.to_string(), "INT64", &[300])
        };
        let request = proto::ModelInferRequest { inputs: (0..count).map(input).collect(), ..Default::default() };
        decode_message(request.encode_to_vec().into(), &limits)
    };
    assert!(of(3).is_ok());
    refused(of(4), "body-too-large");
}

#[test]
fn t40_wrong_answers_are_the_servers_fault() {
    let output = InferOutputTensor { name: "y".into(), datatype: "FP32".into(), shape: vec![2], ..Default::default() };
    let answer = |raw: Vec<Bytes>, datatype: &str| {
        let output = InferOutputTensor { datatype: datatype.into(), ..output.clone() };
        let response =
            proto::ModelInferResponse { outputs: vec![output], raw_output_contents: raw, ..Default::default() };
        decode_response_message(response.encode_to_vec().into(), &Limits::default())
    };
    assert_eq!(answer(vec![Bytes::from_static(&[0; 8])], "FP32").unwrap().outputs[0].shape, [2]);
    for (raw, datatype) in [
        (vec![Bytes::from_static(&[0; 7])], "FP32"),
        (vec![], "FP32"),
        (vec![Bytes::new(); 2], "FP32"),
        (vec![Bytes::from_static(&[0; 8])], "FP8"),
    ] {
        assert_eq!(answer(raw, datatype).unwrap_err().code(), "bad-model-answer");
    }
}

#[test]
fn large_tensors_are_segments_of_their_own_and_never_copied() {
    let large = Bytes::from(vec![7; 4_096]);
    let small = Bytes::from(vec![8; 4_095]);
    let inputs =
        vec![tensor("a", small.clone()), tensor("b", large.clone()), tensor("c", large.clone()), tensor("d", small)];
    let request = InferRequest { model: "m".into(), inputs, ..InferRequest::default() };
    let segments = frame(&request);
    let own: Vec<_> = segments.iter().filter(|segment| segment.as_ptr() == large.as_ptr()).collect();
    assert_eq!((segments.len(), own.len()), (5, 2));
    let message = Bytes::from(segments.concat()).slice(5..);
    let decoded = decode_message(message.clone(), &Limits::default()).unwrap();
    assert_eq!(decoded, request);
    let range = message.as_ptr_range();
    assert!(decoded.inputs.iter().all(|input| range.contains(&input.data.as_ptr())), "raw contents are slices");
    assert_eq!(frame(&InferRequest::default()).concat(), [0; 5]);
}

/// Any request that a client could mean.
fn requests() -> impl Strategy<Value = InferRequest> {
    let parameter = prop_oneof![
        any::<bool>().prop_map(Parameter::Bool),
        any::<i64>().prop_map(Parameter::Int),
        (i64::MAX as u64 + 1..).prop_map(Parameter::Uint),
        proptest::num::f64::NORMAL.prop_map(Parameter::Double),
        ".{0,5}".prop_map(Parameter::Text),
    ];
    let parameters = proptest::collection::btree_map("[a-r]{1,4}", parameter, 0..4)
        .prop_map(|map| Parameters(map.into_iter().collect()));
    let tensor = (proptest::sample::select(&Datatype::ALL[..]), vec(1_i64..40, 0..4), parameters.clone());
    let tensor = tensor.prop_flat_map(|(datatype, shape, parameters)| {
        let elements = shape.iter().product::<i64>() as usize;
        let data = match datatype.width() {
            Some(width) => any::<u8>().prop_map(move |byte| vec![byte; elements * width]).boxed(),
            None => vec(any::<u8>(), 0..4)
                .prop_map(move |text| [&(text.len() as u32).to_le_bytes()[..], &text].concat().repeat(elements))
                .boxed(),
        };
        data.prop_map(move |data| Tensor {
            name: String::new(),
            datatype,
            shape: shape.clone(),
            parameters: parameters.clone(),
            data: data.into(),
        })
    });
    let inputs = vec(tensor, 0..4).prop_map(|mut tensors| {
        for (index, tensor) in tensors.iter_mut().enumerate() {
            tensor.name = format!("t{index}");
        }
        tensors
    });
    let outputs = vec(parameters.clone(), 0..3).prop_map(|list| {
        let output = |(index, parameters)| RequestedOutput { name: format!("o{index}"), parameters };
        list.into_iter().enumerate().map(output).collect()
    });
    (".{0,5}", ".{0,5}", ".{0,5}", parameters, inputs, outputs).prop_map(
        |(model, version, id, parameters, inputs, outputs)| InferRequest {
            model,
            version,
            id,
            parameters,
            inputs,
            outputs,
        },
    )
}

fn deframe(segments: &[Bytes]) -> Bytes {
    let whole = Bytes::from(segments.concat());
    assert_eq!(whole[0], 0);
    assert_eq!(u32::from_be_bytes(whole[1..5].try_into().unwrap()) as usize, whole.len() - 5);
    whole.slice(5..)
}

proptest! {
    #[test]
    fn any_request_is_the_same_after_its_frame(request in requests()) {
        let message = deframe(&frame(&request));
        prop_assert_eq!(proto::ModelInferRequest::decode(message.clone()).unwrap(), encode_request(&request));
        prop_assert_eq!(decode_message(message, &Limits::default()).unwrap(), request);
    }

    #[test]
    fn any_answer_is_the_same_after_its_frame(request in requests()) {
        let response = InferResponse {
            model: request.model,
            version: request.version,
            id: request.id,
            parameters: request.parameters,
            outputs: request.inputs,
        };
        let message = deframe(&frame_response(&response));
        prop_assert_eq!(proto::ModelInferResponse::decode(message.clone()).unwrap(), encode_response(&response));
        prop_assert_eq!(decode_response_message(message, &Limits::default()).unwrap(), response);
    }

    #[test]
    fn rest_binary_and_grpc_give_the_same_tensors(request in requests()) {
        let ask = r#"{"parameters":{"binary_data_output":true}}"#;
        let mut ask = json::decode_request(ask.into(), None, "m", "", &Limits::default()).unwrap();
        let response = InferResponse { outputs: request.inputs.clone(), ..InferResponse::default() };
        let body = json::encode_response(&response, &json::OutputForms::take(&mut ask)).unwrap();
        let head = std::str::from_utf8(&body.segments[0]).unwrap().replacen("\"outputs\":", "\"inputs\":", 1);
        let header_length = body.header_length.map(|_| head.len());
        let rest = [head.as_bytes(), &body.segments[1..].concat()].concat();
        let rest = json::decode_request(rest.into(), header_length, "m", "", &Limits::default()).unwrap();
        let grpc = decode_message(deframe(&frame(&request)), &Limits::default()).unwrap();
        prop_assert_eq!(rest.inputs, grpc.inputs);
    }

    #[test]
    fn any_bytes_never_panic(message in vec(any::<u8>(), 0..200), padding in prop_oneof![Just(0_usize), Just(5_000)]) {
        // Padding leads past the size that is not guarded.
        let message = [&proto::ModelInferRequest { id: "i".repeat(padding), ..Default::default() }.encode_to_vec()[..], &message].concat();
        let _ = decode_message(message.clone().into(), &Limits::default());
        let _ = decode_response_message(message.into(), &Limits::default());
    }

    #[test]
    fn a_changed_message_never_panics(
        request in requests(),
        changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut message = deframe(&frame(&request)).to_vec();
        for (at, byte) in changes {
            if !message.is_empty() {
                *at.get_mut(&mut message) = byte;
            }
        }
        if let Ok(request) = decode_message(message.into(), &Limits::default()) {
            prop_assert!(request.inputs.iter().all(|input| input.check_length().is_ok()));
        }
    }
}
