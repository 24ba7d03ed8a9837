//! `ModelStreamInfer` from the client's side: streams that are opened, fed and read to their end.

use std::time::Duration;

use bytes::Bytes;
use spillway_proto::inference::infer_parameter::ParameterChoice;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::*;

use super::{Http2, frame};

pub const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
const HEADERS: [(&str, &str); 2] = [("content-type", "application/grpc"), ("te", "trailers")];

/// A framed request for one row, about an entity.
pub fn request(model: &str, id: &str, entity: &str) -> Bytes {
    let entity = InferParameter { parameter_choice: Some(ParameterChoice::StringParam(entity.into())) };
    frame(&ModelInferRequest {
        model_name: model.into(),
        id: id.into(),
        parameters: [("entity_id".to_owned(), entity)].into(),
        inputs: vec![InferInputTensor {
            name: "x".into(),
            datatype: "FP32".into(),
            shape: vec![1],
            ..Default::default()
        }],
        raw_input_contents: vec![Bytes::copy_from_slice(&1.0_f32.to_le_bytes())],
        ..Default::default()
    })
}

/// The answers on a stream, until its end.
pub struct Answers {
    incoming: h2::RecvStream,
    buffer: Vec<u8>,
}

impl Answers {
    pub async fn next(&mut self) -> Option<ModelStreamInferResponse> {
        loop {
            if let Some(length) = self.buffer.get(1..5) {
                let whole = 5 + u32::from_be_bytes(length.try_into().unwrap()) as usize;
                if self.buffer.len() >= whole {
                    let frame: Vec<u8> = self.buffer.drain(..whole).collect();
                    return Some(prost::Message::decode(&frame[5..]).unwrap());
                }
            }
            let data = tokio::time::timeout(Duration::from_secs(10), self.incoming.data()).await.expect("an answer")?;
            let data = data.ok()?;
            self.incoming.flow_control().release_capacity(data.len()).unwrap();
            self.buffer.extend_from_slice(&data);
        }
    }

    /// `grpc-status` and `spillway-error` at the end.
    pub async fn status(&mut self) -> (String, String) {
        let trailers = self.incoming.trailers().await.unwrap().unwrap();
        let text = |name: &str| trailers.get(name).map_or(String::new(), |value| value.to_str().unwrap().to_owned());
        (text("grpc-status"), text("spillway-error"))
    }
}

/// Opens a stream with its first request.
pub async fn open(http2: &Http2, headers: &[(&str, &str)], first: Bytes) -> (h2::SendStream<Bytes>, Answers) {
    let mut all = HEADERS.to_vec();
    all.extend_from_slice(headers);
    let mut send = http2.send.clone().ready().await.unwrap();
    let (response, mut stream) = send.send_request(Http2::request("POST", STREAM, &all), false).unwrap();
    stream.send_data(first, false).unwrap();
    let response = tokio::time::timeout(Duration::from_secs(10), response).await.expect("a head").unwrap();
    assert_eq!(response.status(), 200);
    (stream, Answers { incoming: response.into_body(), buffer: Vec::new() })
}
