//! A client with a certificate: h1 or h2 over TLS 1.3, one connection at a time.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use spillway_runtime::tls::IdentitySettings;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// No answer of these tests takes so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// What was read of a connection before it ended is handed on by then.
const AFTER_THE_END: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    H1,
    H2,
}

/// Who calls, and whom.
#[derive(Clone)]
pub struct Client {
    pub address: SocketAddr,
    tls: Arc<ClientConfig>,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: HeaderMap,
}

/// One open connection.
pub struct Connection {
    sender: Sender,
    /// Closed when there is nobody left who could answer.
    ended: watch::Receiver<()>,
}

/// Runs the tasks of one connection, each of which holds the other end of [`Connection::ended`].
#[derive(Clone)]
struct Tasks(Arc<watch::Sender<()>>);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        let held = self.0.clone();
        tokio::spawn(async move {
            task.await;
            drop(held);
        });
    }
}

enum Sender {
    H1(http1::SendRequest<Full<Bytes>>),
    H2(http2::SendRequest<Full<Bytes>>),
}

impl Client {
    /// A client as any other: verifies the server's name by the trust bundle, shows its certificate.
    pub fn new(address: SocketAddr, identity: &IdentitySettings) -> Self {
        Self { address, tls: Arc::new(tls_config(Some(identity), &identity.trust_bundle)) }
    }

    /// A client that shows no certificate.
    pub fn anonymous(address: SocketAddr, trust_bundle: &Path) -> Self {
        Self { address, tls: Arc::new(tls_config(None, trust_bundle)) }
    }

    /// A client with a TLS configuration of its own.
    pub fn with_tls(address: SocketAddr, tls: Arc<ClientConfig>) -> Self {
        Self { address, tls }
    }

    /// The same client at another address.
    pub fn at(&self, address: SocketAddr) -> Self {
        Self { address, tls: self.tls.clone() }
    }

    /// The TLS connection alone.
    pub async fn handshake(&self, alpn: &[&[u8]]) -> std::io::Result<TlsStream<TcpStream>> {
        let mut tls = (*self.tls).clone();
        tls.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("localhost").map_err(std::io::Error::other)?;
        TlsConnector::from(Arc::new(tls)).connect(name, tcp).await
    }

    pub async fn connect(&self, protocol: Protocol) -> anyhow::Result<Connection> {
        let alpn: &[u8] = if protocol == Protocol::H1 { b"http/1.1" } else { b"h2" };
        let io = TokioIo::new(tokio::time::timeout(PATIENCE, self.handshake(&[alpn])).await??);
        let (end, ended) = watch::channel(());
        let tasks = Tasks(Arc::new(end));
        let sender = match protocol {
            Protocol::H1 => {
                let (sender, connection) = http1::handshake(io).await?;
                tasks.execute(connection);
                Sender::H1(sender)
            }
            Protocol::H2 => {
                let (sender, connection) = http2::handshake(tasks.clone(), io).await?;
                tasks.execute(connection);
                Sender::H2(sender)
            }
        };
        Ok(Connection { sender, ended })
    }

    /// One request on a connection of its own.
    pub async fn send(&self, protocol: Protocol, request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
        self.connect(protocol).await?.send(request).await
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send(Protocol::H2, self.request("GET", path).body(Full::default())?).await
    }

    /// POSTs JSON over h2.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.send(Protocol::H2, self.json(path, body)).await
    }

    pub fn json(&self, path: &str, body: &Value) -> Request<Full<Bytes>> {
        let request = self.request("POST", path).header(header::CONTENT_TYPE, "application/json");
        request.body(Full::from(body.to_string())).expect("a request")
    }

    pub fn request(&self, method: &str, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(format!("https://{}{path}", self.address))
    }
}

impl Connection {
    /// Another handle of the same HTTP/2 connection, for requests side by side.
    pub fn beside(&self) -> Self {
        let sender = match &self.sender {
            Sender::H1(_) => panic!("HTTP/1.1 has one request at a time"),
            Sender::H2(sender) => Sender::H2(sender.clone()),
        };
        Self { sender, ended: self.ended.clone() }
    }

    /// Whether the server has ended it.
    pub fn is_closed(&self) -> bool {
        match &self.sender {
            Sender::H1(sender) => sender.is_closed(),
            Sender::H2(sender) => sender.is_closed(),
        }
    }

    /// Sends a request when the connection can take it. An error before that is [`NotSent`].
    pub async fn send(&mut self, mut request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
        let mut ended = self.ended.clone();
        // A request that is handed to hyper in the very moment in which its connection ends can stay in their channel for as long
        // as there is a sender: seen once in some 100,000 on busy cores.
        let forgotten = async {
            while ended.changed().await.is_ok() {}
            tokio::time::sleep(AFTER_THE_END).await;
        };
        let answer = async {
            let response = match &mut self.sender {
                Sender::H1(sender) => {
                    sender.ready().await.map_err(|error| NotSent(Some(error)))?;
                    // h1 wants the path alone, and the host beside it.
                    let authority = request.uri().authority().expect("it was built with one").to_string();
                    let path = request.uri().path_and_query().expect("it was built with one").clone();
                    *request.uri_mut() = path.into();
                    let host = authority.parse().expect("a host");
                    request.headers_mut().entry(header::HOST).or_insert(host);
                    sender.send_request(request).await
                }
                Sender::H2(sender) => {
                    sender.ready().await.map_err(|error| NotSent(Some(error)))?;
                    sender.send_request(request).await
                }
            };
            let response = response.map_err(|error| match was_not_taken(&error) {
                true => anyhow::Error::new(NotSent(Some(error))),
                false => anyhow::Error::new(error),
            })?;
            let (head, body) = response.into_parts();
            let body = body.collect().await?;
            let trailers = body.trailers().cloned().unwrap_or_default();
            Ok(Answer { status: head.status, headers: head.headers, body: body.to_bytes(), trailers })
        };
        tokio::select! {
            biased;
            answer = tokio::time::timeout(PATIENCE, answer) => {
                answer.map_err(|_| anyhow::anyhow!("no answer in {PATIENCE:?}"))?
            }
            () = forgotten => Err(NotSent(None).into()),
        }
    }
}

/// The request never reached the server: every client sends it again elsewhere.
#[derive(Debug, thiserror::Error)]
#[error("the connection took no request")]
pub struct NotSent(#[source] Option<hyper::Error>);

/// The connection ended before the request, or a GOAWAY says that it was not begun.
fn was_not_taken(error: &hyper::Error) -> bool {
    if error.is_canceled() {
        return true;
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            let refused = h2.reason() == Some(h2::Reason::REFUSED_STREAM);
            return h2.is_remote() && (refused || h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR));
        }
        source = cause.source();
    }
    false
}

impl Answer {
    pub fn is_ok(&self) -> bool {
        self.status == 200
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// A header as text; empty when it is absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The stable code of a refusal; empty when there is none.
    pub fn error_code(&self) -> &str {
        let trailing = self.trailers.get("spillway-error").and_then(|value| value.to_str().ok());
        match self.header("spillway-error") {
            "" => trailing.unwrap_or_default(),
            code => code,
        }
    }
}

fn tls_config(identity: Option<&IdentitySettings>, trust_bundle: &Path) -> ClientConfig {
    spillway_runtime::tls::install_provider();
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(trust_bundle).expect("a trust bundle") {
        roots.add(root.expect("a certificate")).expect("a root");
    }
    let config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13]).with_root_certificates(roots);
    match identity {
        None => config.with_no_client_auth(),
        Some(identity) => {
            let chain = CertificateDer::pem_file_iter(&identity.certificate).expect("a certificate file");
            let chain = chain.map(|certificate| certificate.expect("a certificate")).collect();
            let key = PrivateKeyDer::from_pem_file(&identity.key).expect("a key");
            config.with_client_auth_cert(chain, key).expect("a key that fits")
        }
    }
}
