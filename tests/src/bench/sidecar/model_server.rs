//! A model server in a process of its own: KServe v2 over gRPC without TLS, as Triton stands beside a sidecar.
//!
//! As little work as an honest server can do. It knows two models: `phishing` answers each row of features with
//! the score that the training library gave it, so that a wrong feature is a wrong answer; `tensor` answers a
//! large tensor with its [`checksum`], so that a byte that changed on the way is one too.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use bytes::{BufMut, Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use prost::Message;
use spillway_proto::inference::model_infer_response::InferOutputTensor;
use spillway_proto::inference::model_metadata_response::TensorMetadata;
use spillway_proto::inference::{
    ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyResponse,
};
use tokio::net::{TcpListener, TcpStream};

use crate::bench::message::{PREFIX, frame, length, unframed};
use crate::harness::inference::{Case, FEATURES, MODEL, cases};

/// The model that takes one large tensor.
pub const TENSOR: &str = "tensor";
pub const TENSOR_INPUT: &str = "values";
/// FP32 values of a row: 1 MiB.
pub const TENSOR_COLUMNS: usize = (1 << 20) / size_of::<f32>();
pub const TENSOR_OUTPUT: &str = "sum";
/// The score of a row that no case has, such as those of a warm-up: no probability.
const UNKNOWN: f32 = 2.0;
const SERVICE: &str = "/inference.GRPCInferenceService/";
/// Large tensors come without waiting for window updates.
const WINDOW: u32 = 16 << 20;
const STREAMS: u32 = 1_000;

/// Serves until the process ends; says where as its first line, and ends when its input does.
pub async fn serve() -> Result<()> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let models = Rc::new(Models::new(&cases()));
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    println!("{}", serde_json::json!({ "listening": listener.local_addr()? }));
    loop {
        let (stream, _) = listener.accept().await?;
        let models = models.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = connection(stream, models).await {
                eprintln!("model server: {error:#}");
            }
        });
    }
}

async fn connection(stream: TcpStream, models: Rc<Models>) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut connection = h2::server::Builder::new()
        .max_concurrent_streams(STREAMS)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake::<_, Bytes>(stream)
        .await?;
    while let Some(call) = connection.accept().await {
        let (request, reply) = call?;
        let models = models.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = answer(request, reply, &models).await {
                eprintln!("model server: {error:#}");
            }
        });
    }
    Ok(())
}

async fn answer(request: Request<h2::RecvStream>, mut reply: SendResponse<Bytes>, models: &Models) -> Result<()> {
    let path = request.uri().path().to_owned();
    let mut body = request.into_body();
    let mut received = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        if received.is_empty() {
            received.reserve(length(&part).map_or(0, |length| length + PREFIX));
        }
        received.extend_from_slice(&part);
    }
    let answer = models.answer(path.strip_prefix(SERVICE).unwrap_or(&path), received.freeze());
    let head = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut send = reply.send_response(head, false)?;
    let status = match answer {
        Ok(message) => {
            send.send_data(message, false)?;
            "0"
        }
        Err(error) => {
            eprintln!("model server: {path}: {error:#}");
            "13"
        }
    };
    let status = (HeaderName::from_static("grpc-status"), HeaderValue::from_static(status));
    send.send_trailers(HeaderMap::from_iter([status]))?;
    Ok(())
}

struct Models {
    /// By the bytes of a row.
    scores: HashMap<Vec<u8>, f32>,
}

impl Models {
    fn new(cases: &[Case]) -> Self {
        let row = |case: &Case| case.features.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { scores: cases.iter().map(|case| (row(case), case.score)).collect() }
    }

    fn answer(&self, call: &str, whole: Bytes) -> Result<Bytes> {
        let asked = unframed(&whole).context("no whole gRPC message")?;
        match call {
            "ModelInfer" => Ok(frame(&self.infer(ModelInferRequest::decode(whole.slice_ref(asked))?)?)),
            "ModelMetadata" => Ok(frame(&metadata(ModelMetadataRequest::decode(asked)?)?)),
            "ModelReady" => Ok(frame(&ModelReadyResponse { ready: true })),
            _ => bail!("the call is not known"),
        }
    }

    fn infer(&self, request: ModelInferRequest) -> Result<ModelInferResponse> {
        let [raw] = &request.raw_input_contents[..] else { bail!("expected one raw input") };
        let (name, datatype, shape, bytes) = if request.model_name == TENSOR {
            (TENSOR_OUTPUT, "UINT64", vec![1, 1], Bytes::copy_from_slice(&checksum(raw).to_le_bytes()))
        } else {
            let rows = raw.chunks(FEATURES * size_of::<f32>());
            let mut scores = BytesMut::new();
            for row in rows {
                scores.put_f32_le(self.scores.get(row).copied().unwrap_or(UNKNOWN));
            }
            ("score", "FP32", vec![i64::try_from(scores.len() / size_of::<f32>())?, 1], scores.freeze())
        };
        let output =
            InferOutputTensor { name: name.into(), datatype: datatype.into(), shape, ..InferOutputTensor::default() };
        Ok(ModelInferResponse {
            model_name: request.model_name,
            model_version: "1".into(),
            id: request.id,
            outputs: vec![output],
            raw_output_contents: vec![bytes],
            ..ModelInferResponse::default()
        })
    }
}

fn metadata(asked: ModelMetadataRequest) -> Result<ModelMetadataResponse> {
    let tensor = |name: &str, datatype: &str, shape: &[i64]| TensorMetadata {
        name: name.into(),
        datatype: datatype.into(),
        shape: shape.to_vec(),
    };
    let (input, output) = match asked.name.as_str() {
        MODEL => (tensor("features", "FP32", &[-1, FEATURES as i64]), tensor("score", "FP32", &[-1, 1])),
        TENSOR => {
            (tensor(TENSOR_INPUT, "FP32", &[-1, TENSOR_COLUMNS as i64]), tensor(TENSOR_OUTPUT, "UINT64", &[-1, 1]))
        }
        other => bail!("there is no model {other}"),
    };
    Ok(ModelMetadataResponse {
        name: asked.name,
        versions: vec!["1".into()],
        platform: "bench".into(),
        inputs: vec![input],
        outputs: vec![output],
    })
}

/// The sum of a tensor's 8-byte words, each times its place: bytes that changed or changed places show.
pub fn checksum(bytes: &[u8]) -> u64 {
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    };
    (1_u64..).zip(bytes.chunks(8)).fold(0, |sum, (place, chunk)| sum.wrapping_add(word(chunk).wrapping_mul(place)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::inference::{Asked, message as ask, message_scores};

    #[test]
    fn each_row_gets_the_score_of_its_case() {
        let cases = cases();
        let models = Models::new(&cases);
        let answer = models.answer("ModelInfer", frame(&ask(&Asked::RawFeatures(&cases)))).unwrap();
        let answer = ModelInferResponse::decode(&answer[PREFIX..]).unwrap();
        crate::harness::inference::assert_scores("the model server", &message_scores(&answer), &cases);
    }

    #[test]
    fn an_unknown_row_gets_no_probability() {
        let mut case = cases().remove(0);
        case.features[0] = 7.5;
        let answer = Models::new(&cases()).infer(ask(&Asked::RawFeatures(&[case]))).unwrap();
        assert_eq!(message_scores(&answer), [UNKNOWN]);
    }

    #[test]
    fn the_checksum_sees_each_byte_and_its_place() {
        let bytes: Vec<u8> = (0..100).collect();
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            assert_ne!(checksum(&wrong), checksum(&bytes), "byte {at}");
        }
        let mut turned = bytes.clone();
        turned.swap(3, 80);
        assert_ne!(checksum(&turned), checksum(&bytes));
    }
}
