//! Clients that say exactly what a test wants said: raw HTTP/1.1 bytes, and single h2 streams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use prost::Message;
use spillway_runtime::tls::Workload;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{GATEWAY, id};

const PATIENCE: Duration = Duration::from_secs(20);

pub async fn tls(address: SocketAddr, client: &Workload, alpn: &[u8]) -> std::io::Result<TlsStream<TcpStream>> {
    tls_over(TcpStream::connect(address).await?, client, alpn).await
}

async fn tls_over(tcp: TcpStream, client: &Workload, alpn: &[u8]) -> std::io::Result<TlsStream<TcpStream>> {
    tls_to(GATEWAY, tcp, client, alpn).await
}

async fn tls_to(
    gateway: &str,
    tcp: TcpStream,
    client: &Workload,
    alpn: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut config = (*client.client_config(id(gateway))).clone();
    config.alpn_protocols = vec![alpn.to_vec()];
    tcp.set_nodelay(true)?;
    let name = rustls_pki_types::ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: HeaderMap,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {:?}", self.body))
    }
}

pub fn h1_request(method: &str, path: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    [format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}{length}\r\n").as_bytes(), body].concat()
}

pub struct Http1 {
    pub stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
}

impl Http1 {
    pub async fn connect(address: SocketAddr, client: &Workload) -> std::io::Result<Self> {
        Ok(Self { stream: tls(address, client, b"http/1.1").await?, buffer: Vec::new() })
    }

    /// To a gateway with this SPIFFE id.
    pub async fn to(gateway: &str, address: SocketAddr, client: &Workload) -> std::io::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        Ok(Self { stream: tls_to(gateway, tcp, client, b"http/1.1").await?, buffer: Vec::new() })
    }

    pub async fn over(tcp: TcpStream, client: &Workload) -> std::io::Result<Self> {
        Ok(Self { stream: tls_over(tcp, client, b"http/1.1").await?, buffer: Vec::new() })
    }

    pub async fn send(&mut self, wire: &[u8]) {
        self.stream.write_all(wire).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub async fn exchange(&mut self, wire: &[u8]) -> Answer {
        // The gateway may answer and close before it has taken everything.
        let _ = self.stream.write_all(wire).await;
        let _ = self.stream.flush().await;
        self.answer().await.expect("an answer")
    }

    /// The next answer; `None` if the connection ended instead.
    pub async fn answer(&mut self) -> Option<Answer> {
        loop {
            if let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = String::from_utf8(self.buffer[..end].to_vec()).unwrap();
                let mut lines = head.split("\r\n");
                let status: u16 = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
                let mut headers = HeaderMap::new();
                for line in lines {
                    let (name, value) = line.split_once(':').unwrap();
                    let name: http::HeaderName = name.to_ascii_lowercase().parse().unwrap();
                    headers.append(name, value.trim().parse().unwrap());
                }
                self.buffer.drain(..end + 4);
                if status == 100 {
                    continue;
                }
                let length: usize =
                    headers.get("content-length").map_or(0, |value| value.to_str().unwrap().parse().unwrap());
                while self.buffer.len() < length {
                    if !self.fill().await {
                        return None;
                    }
                }
                let body = self.buffer.drain(..length).collect::<Vec<u8>>().into();
                return Some(Answer { status, headers, body, trailers: HeaderMap::new() });
            }
            if !self.fill().await {
                return None;
            }
        }
    }

    async fn fill(&mut self) -> bool {
        let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await.expect("no answer");
        matches!(read, Ok(1..))
    }

    /// Whether the gateway has closed, with nothing more to say.
    pub async fn is_closed(&mut self) -> bool {
        self.buffer.is_empty() && !self.fill().await
    }
}

pub struct Http2 {
    pub send: SendRequest<Bytes>,
    pub connection: tokio::task::JoinHandle<Result<(), h2::Error>>,
}

impl Http2 {
    pub async fn connect(
        address: SocketAddr,
        client: &Workload,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Self::over(TcpStream::connect(address).await?, client).await
    }

    pub async fn over(tcp: TcpStream, client: &Workload) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Self::begin(tls_over(tcp, client, b"h2").await?).await
    }

    /// To a gateway with this SPIFFE id.
    pub async fn to(
        gateway: &str,
        address: SocketAddr,
        client: &Workload,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Self::begin(tls_to(gateway, TcpStream::connect(address).await?, client, b"h2").await?).await
    }

    async fn begin(stream: TlsStream<TcpStream>) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let (send, connection) =
            h2::client::Builder::new().max_header_list_size(1 << 20).handshake::<_, Bytes>(stream).await?;
        Ok(Self { send, connection: tokio::spawn(connection) })
    }

    pub fn request(method: &str, path: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().method(method).uri(format!("https://localhost{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    pub async fn exchange(&self, request: Request<()>, body: Bytes) -> Result<Answer, h2::Error> {
        let mut send = self.send.clone().ready().await?;
        let (response, mut stream) = send.send_request(request, body.is_empty())?;
        if !body.is_empty() {
            // The gateway may have answered already and not want it.
            let _ = stream.send_data(body, true);
        }
        Self::answer(response).await
    }

    pub async fn answer(response: h2::client::ResponseFuture) -> Result<Answer, h2::Error> {
        let (head, mut incoming) = tokio::time::timeout(PATIENCE, response).await.expect("no answer")?.into_parts();
        let mut body = Vec::new();
        while let Some(data) = incoming.data().await {
            let data = data?;
            incoming.flow_control().release_capacity(data.len())?;
            body.extend_from_slice(&data);
        }
        let trailers = incoming.trailers().await?.unwrap_or_default();
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body: body.into(), trailers })
    }
}

/// A length-prefixed message.
pub fn frame(message: &impl Message) -> Bytes {
    let encoded = message.encode_to_vec();
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(encoded.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(&encoded);
    frame.into()
}

/// What came of a gRPC call.
#[derive(Debug)]
pub struct Grpc {
    pub status: i32,
    pub code: String,
    pub message: String,
    pub answer: Answer,
}

impl Grpc {
    pub async fn call(http2: &Http2, path: &str, headers: &[(&str, &str)], body: Bytes) -> Self {
        let mut all = vec![("content-type", "application/grpc"), ("te", "trailers")];
        all.extend_from_slice(headers);
        let answer = http2.exchange(Http2::request("POST", path, &all), body).await.unwrap();
        Self::of(answer)
    }

    pub fn of(answer: Answer) -> Self {
        let either = |name: &str| {
            let value = answer.trailers.get(name).or_else(|| answer.headers.get(name));
            value.map_or(String::new(), |value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(answer.status, 200, "{answer:?}");
        let status = either("grpc-status").parse().unwrap_or_else(|_| panic!("no grpc-status: {answer:?}"));
        Self { status, code: either("spillway-error"), message: either("grpc-message"), answer }
    }

    pub fn decode<M: Message + Default>(&self) -> M {
        M::decode(self.answer.body.slice(5..)).unwrap()
    }
}
