//! Models of other kinds on a real Triton, through the whole path: all datatypes, many answers to one request, and
//! clients that go away.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::Request;
use http_body_util::Full;
use prost::Message;
use serde_json::{Value, json};
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use spillway_tests::harness::client::{Client, Protocol};
use spillway_tests::harness::doubles::{ECHO_BF16, TritonDouble};
use spillway_tests::harness::eventually;
use spillway_tests::harness::grpc::{self, MODEL_INFER};
use spillway_tests::harness::region::Region;
use spillway_tests::harness::servers::Server;

/// Name and datatype of a tensor, three values as JSON, and as the bytes on the wire.
struct Sample {
    name: &'static str,
    datatype: &'static str,
    values: Value,
    wire: Bytes,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_twelve_datatypes_and_text_pass_bit_for_bit_by_every_protocol() {
    let mut region = Region::new("models-datatypes");
    let triton = Server::triton(&region.folder, &["echo"]);
    let samples = samples();
    let tensors: Vec<(&str, &str)> = samples.iter().map(|sample| (sample.name, sample.datatype)).collect();
    add_model(&mut region, "echo", &tensors, &tensors, 1);
    use_triton(&mut region, &triton.address.to_string());
    region.start().await;
    echo_in_every_way(&region.client("acme"), "echo", &samples).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bf16_passes_bit_for_bit_by_every_protocol() {
    let triton = TritonDouble::start();
    let mut region = Region::new("models-bf16");
    add_model(&mut region, ECHO_BF16, &[("x", "BF16")], &[("x", "BF16")], 1);
    use_triton(&mut region, &triton.address.to_string());
    region.start().await;
    let wire = [0x3fc0_u16, 0xbe80, 0x4380].map(u16::to_le_bytes).concat();
    let sample = Sample { name: "x", datatype: "BF16", values: json!([1.5, -0.25, 256.0]), wire: wire.into() };
    echo_in_every_way(&region.client("acme"), ECHO_BF16, &[sample]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_of_a_stream_gets_many_answers_and_a_failed_one_ends_alone() {
    let mut region = Region::new("models-stream");
    let triton = Server::triton(&region.folder, &["tokens"]);
    // A decoupled model answers streams only: there is nothing to warm it up with.
    add_model(&mut region, "tokens", &[("n", "INT32")], &[("token", "BYTES")], 0);
    use_triton(&mut region, &triton.address.to_string());
    region.start().await;
    let client = region.client("acme");
    let mut body = BytesMut::new();
    for (id, n) in [("a", 3), ("b", -2), ("c", 0), ("d", 1)] {
        let message = ModelInferRequest { id: id.into(), ..number("tokens", "n", n) };
        body.extend_from_slice(&frame(&message));
    }
    let path = "/inference.GRPCInferenceService/ModelStreamInfer";
    let request = client.request("POST", path).header("content-type", "application/grpc").header("te", "trailers");
    let request = request.body(Full::new(body.freeze())).expect("a request");
    let answer = client.send(Protocol::H2, request).await.expect("an answer");
    assert_eq!(answer.trailers.get("grpc-status").map(|status| status.as_bytes()), Some(&b"0"[..]), "{answer:?}");
    let (mut tokens, mut errors) = (Vec::new(), Vec::new());
    for message in messages(&answer.body) {
        let response = message.infer_response.expect("each answer names its request");
        if message.error_message.is_empty() {
            let text = response.raw_output_contents[0][4..].to_vec();
            tokens.push((response.id, String::from_utf8(text).expect("text")));
        } else {
            errors.push(response.id);
        }
    }
    tokens.sort();
    let expected = [("a", "token-0"), ("a", "token-1"), ("a", "token-2"), ("b", "token-0"), ("b", "token-1")];
    let expected: Vec<(String, String)> =
        expected.into_iter().chain([("d", "token-0")]).map(|(id, token)| (id.into(), token.into())).collect();
    assert_eq!((tokens, errors), (expected, vec!["b".to_owned()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_cancels_the_model_itself() {
    let mut region = Region::new("models-cancelled");
    let triton = Server::triton(&region.folder, &["sleepy"]);
    add_model(&mut region, "sleepy", &[("ms", "INT32")], &[("ms", "INT32")], 1);
    use_triton(&mut region, &triton.address.to_string());
    region.start().await;
    let client = region.client("acme");
    let rest = json!({ "inputs": [{ "name": "ms", "datatype": "INT32", "shape": [1], "data": [20_000] }] });
    let log = triton.folder().join("triton.log");
    let cancelled = || std::fs::read_to_string(&log).unwrap_or_default().matches("sleepy: cancelled").count();
    let ways = [
        ("REST over h1", Protocol::H1, client.json("/v2/models/sleepy/infer", &rest)),
        ("REST over h2", Protocol::H2, client.json("/v2/models/sleepy/infer", &rest)),
        ("gRPC", Protocol::H2, grpc::request(&client, MODEL_INFER, &number("sleepy", "ms", 20_000), None)),
    ];
    for (way, protocol, mut request) in ways {
        let before = cancelled();
        let id = way.replace(' ', "-");
        request.headers_mut().insert("x-request-id", id.parse().expect("a header"));
        let mut open = client.connect(protocol).await.expect("a connection");
        let left = tokio::time::timeout(Duration::from_millis(400), open.send(request)).await;
        assert!(left.is_err(), "{way}: the model sleeps: {left:?}");
        drop(open);
        eventually(&format!("{way}: the model hears of it"), Duration::from_secs(5), async || {
            (cancelled() > before).then_some(())
        })
        .await;
        let record = region.record("gateway-0", "request_id", &id).await;
        assert_eq!((&record["cancelled"], &record["error"]), (&json!(true), &json!("cancelled")), "{record}");
    }
    // The one instance is free again.
    let answer = grpc::call_once(&client, MODEL_INFER, &number("sleepy", "ms", 1)).await.expect("an answer");
    assert_eq!(&answer.decode::<ModelInferResponse>().raw_output_contents[0][..], 1_i32.to_le_bytes());
}

fn samples() -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut add = |name, datatype, values: Value, wire: Vec<u8>| {
        samples.push(Sample { name, datatype, values, wire: wire.into() });
    };
    add("bool", "BOOL", json!([true, false, true]), vec![1, 0, 1]);
    add("uint8", "UINT8", json!([0, 7, u8::MAX]), vec![0, 7, u8::MAX]);
    add("uint16", "UINT16", json!([0, 7, u16::MAX]), [0, 7, u16::MAX].map(u16::to_le_bytes).concat());
    add("uint32", "UINT32", json!([0, 7, u32::MAX]), [0, 7, u32::MAX].map(u32::to_le_bytes).concat());
    add("uint64", "UINT64", json!([0, 7, u64::MAX]), [0, 7, u64::MAX].map(u64::to_le_bytes).concat());
    add("int8", "INT8", json!([i8::MIN, -1, i8::MAX]), [i8::MIN, -1, i8::MAX].map(i8::to_le_bytes).concat());
    add("int16", "INT16", json!([i16::MIN, -1, i16::MAX]), [i16::MIN, -1, i16::MAX].map(i16::to_le_bytes).concat());
    add("int32", "INT32", json!([i32::MIN, -1, i32::MAX]), [i32::MIN, -1, i32::MAX].map(i32::to_le_bytes).concat());
    add("int64", "INT64", json!([i64::MIN, -1, i64::MAX]), [i64::MIN, -1, i64::MAX].map(i64::to_le_bytes).concat());
    let halves = [0x3e00_u16, 0xb400, 0x63fe].map(u16::to_le_bytes).concat();
    add("fp16", "FP16", json!([1.5, -0.25, 1023.0]), halves);
    let singles = [1.5_f32, -0.25, 0.1].map(f32::to_le_bytes).concat();
    add("fp32", "FP32", json!([1.5, -0.25, 0.1]), singles);
    let doubles = [1.5_f64, -0.25, 5e-324].map(f64::to_le_bytes).concat();
    add("fp64", "FP64", json!([1.5, -0.25, 5e-324]), doubles);
    let texts = ["", "plain", "\u{4e16}\u{754c}"];
    let wire = texts.iter().flat_map(|text| [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()).collect();
    add("bytes", "BYTES", json!(texts), wire);
    samples
}

/// A model on Triton whose tensors are rows of any length, and a policy that lets acme use it.
fn add_model(region: &mut Region, name: &str, inputs: &[(&str, &str)], outputs: &[(&str, &str)], warm_ups: u32) {
    let list = |tensors: &[(&str, &str)]| {
        let shape = if tensors.len() == 1 && name != ECHO_BF16 { 1 } else { -1 };
        let line = |(name, datatype): &(&str, &str)| {
            format!("    - {{ name: {name}, datatype: {datatype}, shape: [{shape}] }}\n")
        };
        tensors.iter().map(line).collect::<String>()
    };
    let text = format!(
        "apiVersion: spillway/v1\nkind: Model\nmetadata: {{ name: {name} }}\nspec:\n  pools: [scorers]\n  versions: [\"1\"]\n  \
         backend: triton\n  deadline: 30s\n  warmUp: {{ requests: {warm_ups} }}\n  inputs:\n{}  outputs:\n{}",
        list(inputs),
        list(outputs)
    );
    region.resources.insert(format!("{name}.yaml"), text);
    region.edit("tenants.yaml", "models: [\"phishing\"]\n  actions: [infer", "models: [\"*\"]\n  actions: [infer");
}

/// The dev model stays in process; those of [`add_model`] are on this Triton.
fn use_triton(region: &mut Region, address: &str) {
    region.sidecar_settings.push_str(&format!("triton: \"http://{address}\"\n"));
}

async fn echo_in_every_way(client: &Client, model: &str, samples: &[Sample]) {
    let path = format!("/v2/models/{model}/infer");
    for protocol in [Protocol::H1, Protocol::H2] {
        let answer = client.send(protocol, client.json(&path, &json!({ "inputs": inputs(samples, false) }))).await;
        let answer = answer.expect("an answer");
        assert_eq!(answer.status, 200, "{protocol:?}: {}", String::from_utf8_lossy(&answer.body));
        let body = answer.json();
        let outputs = body["outputs"].as_array().expect("outputs");
        assert_eq!(outputs.len(), samples.len());
        for sample in samples {
            let output = outputs.iter().find(|output| output["name"] == sample.name).expect("each comes back");
            assert_eq!((&output["datatype"], &output["shape"]), (&json!(sample.datatype), &json!([3])));
            assert_eq!(numbers(&output["data"]), numbers(&sample.values), "{}", sample.datatype);
        }

        let head = json!({ "inputs": inputs(samples, true), "parameters": { "binary_data_output": true } });
        let answer = client.send(protocol, binary(client, &path, &head, samples)).await.expect("an answer");
        assert_eq!(answer.status, 200, "{protocol:?}: {}", String::from_utf8_lossy(&answer.body));
        let length = answer.header("inference-header-content-length").parse().expect("a binary answer");
        let head: Value = serde_json::from_slice(&answer.body[..length]).expect("a JSON head");
        let mut at = length;
        for output in head["outputs"].as_array().expect("outputs") {
            let size = output["parameters"]["binary_data_size"].as_u64().expect("a size") as usize;
            let sample = samples.iter().find(|sample| output["name"] == sample.name).expect("a name that was sent");
            assert_eq!(answer.body.slice(at..at + size), sample.wire, "{}", sample.datatype);
            at += size;
        }
        assert_eq!(at, answer.body.len());
    }
    let message = ModelInferRequest {
        model_name: model.into(),
        inputs: samples.iter().map(|sample| input(sample.name, sample.datatype, 3)).collect(),
        raw_input_contents: samples.iter().map(|sample| sample.wire.clone()).collect(),
        ..ModelInferRequest::default()
    };
    let answer: ModelInferResponse = grpc::call_once(client, MODEL_INFER, &message).await.expect("an answer").decode();
    assert_eq!(answer.outputs.len(), samples.len());
    for (output, raw) in answer.outputs.iter().zip(&answer.raw_output_contents) {
        let sample = samples.iter().find(|sample| output.name == sample.name).expect("a name that was sent");
        assert_eq!((output.datatype.as_str(), raw), (sample.datatype, &sample.wire));
    }
}

fn inputs(samples: &[Sample], binary: bool) -> Value {
    let input = |sample: &Sample| {
        let mut input = json!({ "name": sample.name, "datatype": sample.datatype, "shape": [3] });
        if binary {
            input["parameters"] = json!({ "binary_data_size": sample.wire.len() });
        } else {
            input["data"] = sample.values.clone();
        }
        input
    };
    samples.iter().map(input).collect()
}

fn binary(client: &Client, path: &str, head: &Value, samples: &[Sample]) -> Request<Full<Bytes>> {
    let mut body = head.to_string().into_bytes();
    let length = body.len();
    samples.iter().for_each(|sample| body.extend_from_slice(&sample.wire));
    let request = client.request("POST", path).header("content-type", "application/octet-stream");
    let request = request.header("inference-header-content-length", length);
    request.body(Full::from(body)).expect("a request")
}

/// Numbers as text where they are whole, since `1023` and `1023.0` are one value.
fn numbers(values: &Value) -> Vec<String> {
    let one = |value: &Value| match value.as_f64() {
        Some(_) if value.is_u64() || value.is_i64() => value.to_string(),
        Some(number) => number.to_string(),
        None => value.to_string(),
    };
    values.as_array().expect("a list").iter().map(one).collect()
}

fn input(name: &str, datatype: &str, size: i64) -> InferInputTensor {
    InferInputTensor { name: name.into(), datatype: datatype.into(), shape: vec![size], ..InferInputTensor::default() }
}

/// One INT32.
fn number(model: &str, name: &str, value: i32) -> ModelInferRequest {
    ModelInferRequest {
        model_name: model.into(),
        inputs: vec![input(name, "INT32", 1)],
        raw_input_contents: vec![Bytes::copy_from_slice(&value.to_le_bytes())],
        ..ModelInferRequest::default()
    }
}

fn frame(message: &impl Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0][..], &length.to_be_bytes(), &message].concat()
}

fn messages(mut body: &[u8]) -> Vec<ModelStreamInferResponse> {
    let mut found = Vec::new();
    while let Some((head, rest)) = body.split_first_chunk::<5>() {
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        found.push(ModelStreamInferResponse::decode(&rest[..length]).expect("a message"));
        body = &rest[length..];
    }
    found
}
