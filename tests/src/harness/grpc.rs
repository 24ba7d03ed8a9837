//! Unary gRPC on a connection of [`super::client`], with nothing hidden: status, metadata, message.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::Full;
use prost::Message;
use tonic::Code;

use super::client::{Answer, Client, Connection, Protocol};

pub const MODEL_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

/// A gRPC answer; `metadata` holds headers and trailers.
#[derive(Clone, Debug)]
pub struct GrpcAnswer {
    pub code: Code,
    pub message: String,
    pub metadata: HeaderMap,
    body: Bytes,
}

impl GrpcAnswer {
    /// The message of a call that succeeded.
    pub fn decode<M: Message + Default>(&self) -> M {
        assert_eq!(self.code, Code::Ok, "{} {:?}", self.message, self.metadata);
        M::decode(self.body.get(5..).expect("a message")).expect("a message of this type")
    }

    pub fn header(&self, name: &str) -> &str {
        self.metadata.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    pub fn error_code(&self) -> &str {
        self.header("spillway-error")
    }

    fn of(answer: Answer) -> anyhow::Result<Self> {
        let mut metadata = answer.headers;
        metadata.extend(answer.trailers);
        let text = |name| metadata.get(name).and_then(|value| value.to_str().ok());
        let code = text("grpc-status").and_then(|code| code.parse().ok());
        let code = code.ok_or_else(|| anyhow::anyhow!("no grpc-status: {} {metadata:?}", answer.status))?;
        let message = text("grpc-message").unwrap_or_default().to_owned();
        Ok(Self { code: Code::from_i32(code), message, metadata, body: answer.body })
    }
}

/// A unary call on an open connection.
pub async fn call(
    connection: &mut Connection,
    client: &Client,
    path: &str,
    message: &impl Message,
    timeout: Option<Duration>,
) -> anyhow::Result<GrpcAnswer> {
    GrpcAnswer::of(connection.send(request(client, path, message, timeout)).await?)
}

/// A unary call on a connection of its own.
pub async fn call_once(client: &Client, path: &str, message: &impl Message) -> anyhow::Result<GrpcAnswer> {
    call(&mut client.connect(Protocol::H2).await?, client, path, message, None).await
}

pub fn request(client: &Client, path: &str, message: &impl Message, timeout: Option<Duration>) -> Request<Full<Bytes>> {
    request_of_bytes(client, path, &message.encode_to_vec(), timeout)
}

/// A call whose message is any bytes.
pub fn request_of_bytes(
    client: &Client,
    path: &str,
    message: &[u8],
    timeout: Option<Duration>,
) -> Request<Full<Bytes>> {
    let mut body = BytesMut::with_capacity(message.len() + 5);
    body.put_u8(0);
    body.put_u32(u32::try_from(message.len()).expect("a message of less than 4 GiB"));
    body.put_slice(message);
    let mut request = client.request("POST", path).header("content-type", "application/grpc").header("te", "trailers");
    if let Some(timeout) = timeout {
        request = request.header("grpc-timeout", format!("{}m", timeout.as_millis()));
    }
    request.body(Full::new(body.freeze())).expect("a request")
}

/// Reads the answer to a request that was built by hand.
pub fn read(answer: Answer) -> anyhow::Result<GrpcAnswer> {
    GrpcAnswer::of(answer)
}
