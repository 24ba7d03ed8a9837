//! One synthetic client: it does what a sensible client does, and says how it went.
//!
//! The rule: an answer of DNS is used for its TTL and no longer, its first address first. A connection is kept. What
//! fails is tried again at the next address, a bounded number of times within one deadline, after a jittered rest; what
//! is refused for good is not. While DNS says nothing, the last addresses are used (RFC 8767).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Request as HttpRequest, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use spillway_core::drill::Load;
use spillway_core::drill::record::{Failure, Request, Served};
use spillway_core::limit::Class;
use spillway_core::units::Name;
use spillway_runtime::tls::IdentitySettings;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use super::resolver::{Answer, Resolver, subnet_of};

/// TCP and TLS.
const CONNECT: Duration = Duration::from_secs(1);
/// Before the second attempt; it doubles. Each rest is 10 % shorter or longer by chance.
const REST: Duration = Duration::from_millis(50);
/// No good answer is larger.
const MOST_ANSWER: usize = 1 << 20;
/// How soon DNS is asked again that did not answer.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What all clients of a run share.
pub struct World {
    /// When the run began.
    pub began: Instant,
    pub load: Load,
    pub resolver: Resolver,
    pub port: u16,
    pub server_name: ServerName<'static>,
    pub tls: Arc<ClientConfig>,
    pub model: String,
    pub entity: String,
    /// Whose gateway an address is.
    pub regions: BTreeMap<IpAddr, Name>,
}

/// TLS as any client of the service does it: the server's name by the trust bundle, our certificate.
pub fn tls(identity: &IdentitySettings) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(&identity.trust_bundle).context("the trust bundle")? {
        roots.add(root?)?;
    }
    let chain = CertificateDer::pem_file_iter(&identity.certificate).context("the client's certificate")?;
    let chain = chain.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(&identity.key).context("the client's key")?;
    let config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13]);
    let mut config = config.with_root_certificates(roots).with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Sends one request after the other until dropped, or until nobody listens.
pub async fn run(number: u32, world: Arc<World>, requests: mpsc::Sender<Request>) {
    let mut client = Client { number, world: world.clone(), answer: None, connection: None };
    // Spread over the interval.
    tokio::time::sleep(world.load.interval.mul_f64(rand::random())).await;
    let mut due = tokio::time::interval(world.load.interval);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if requests.send(client.request().await).await.is_err() {
            return;
        }
    }
}

/// The class of a client's requests: of ten clients 1 is critical, 2 high, 5 normal and 2 low.
pub fn class_of(client: u32) -> Class {
    match client % 10 {
        0 => Class::Critical,
        1 | 2 => Class::High,
        3 | 4 => Class::Low,
        _ => Class::Normal,
    }
}

struct Client {
    number: u32,
    world: Arc<World>,
    /// What DNS said last, and until when that holds.
    answer: Option<(Answer, Instant)>,
    connection: Option<Connection>,
}

struct Connection {
    to: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
    /// Ends with it.
    _driver: JoinSet<()>,
}

impl Client {
    async fn request(&mut self) -> Request {
        let world = self.world.clone();
        let began = Instant::now();
        let until = began + world.load.deadline;
        let class = class_of(self.number);
        let addresses = self.addresses().await;
        let first = addresses.first().and_then(|address| world.regions.get(address)).cloned();
        let mut outcome = Err(Failure::Unresolved);
        let mut retries = 0;
        for attempt in 0..world.load.attempts {
            let place = usize::try_from(attempt).unwrap_or_default() % addresses.len().max(1);
            let Some(address) = addresses.get(place) else { break };
            if attempt > 0 {
                let rest = REST.mul_f64(f64::from(1 << (attempt - 1).min(8)) * (0.9 + 0.2 * rand::random::<f64>()));
                if Instant::now() + rest >= until {
                    break;
                }
                tokio::time::sleep(rest).await;
                retries += 1;
            }
            // So that a silent address leaves time for another.
            let left = until.saturating_duration_since(Instant::now());
            let share = left / (world.load.attempts - attempt);
            outcome = self.attempt(SocketAddr::new(*address, world.port), class, share).await;
            match outcome {
                Ok(_) | Err(Failure::Rejected) => break,
                Err(_) => {}
            }
        }
        let sent = began.saturating_duration_since(world.began);
        Request { client: self.number, class, sent, took: began.elapsed(), first, retries, outcome }
    }

    async fn addresses(&mut self) -> Vec<IpAddr> {
        let now = Instant::now();
        if self.answer.as_ref().is_none_or(|(_, until)| *until <= now) {
            let first = usize::try_from(self.number).unwrap_or_default();
            match self.world.resolver.ask(subnet_of(self.number), first).await {
                Ok(answer) => {
                    let until = now + answer.ttl;
                    self.answer = Some((answer, until));
                }
                Err(_) => {
                    if let Some((_, until)) = &mut self.answer {
                        *until = now + ASK_AGAIN;
                    }
                }
            }
        }
        self.answer.as_ref().map(|(answer, _)| answer.addresses.clone()).unwrap_or_default()
    }

    async fn attempt(&mut self, to: SocketAddr, class: Class, within: Duration) -> Result<Served, Failure> {
        let until = Instant::now() + within;
        let mut sender = match timeout_at(until, self.connected(to)).await {
            Ok(Ok(sender)) => sender,
            Ok(Err(_)) => return Err(Failure::Unreachable),
            Err(_) => return Err(Failure::TimedOut),
        };
        let request = self.http_request(class, within);
        let exchange = async {
            sender.ready().await?;
            let (head, body) = sender.send_request(request).await?.into_parts();
            // An answer that breaks off is none.
            let whole = Limited::new(body, MOST_ANSWER).collect().await.is_ok();
            Ok::<_, hyper::Error>((head, whole))
        };
        let outcome = match timeout_at(until, exchange).await {
            Err(_) => Err(Failure::TimedOut),
            Ok(Err(_) | Ok((_, false))) => Err(Failure::Unreachable),
            Ok(Ok((head, true))) => match head.status {
                StatusCode::OK => {
                    let region = head.headers.get("spillway-region").and_then(|value| value.to_str().ok());
                    Ok(Served { region: region.and_then(|region| Name::parse(region).ok()) })
                }
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Err(Failure::Overloaded),
                StatusCode::GATEWAY_TIMEOUT => Err(Failure::TimedOut),
                status if status.is_client_error() => Err(Failure::Rejected),
                _ => Err(Failure::Failed),
            },
        };
        // A connection on which nothing came back may never do better.
        if matches!(outcome, Err(Failure::TimedOut | Failure::Unreachable)) {
            self.connection = None;
        }
        outcome
    }

    async fn connected(&mut self, to: SocketAddr) -> Result<SendRequest<Full<Bytes>>> {
        let open = self.connection.as_ref().filter(|open| open.to == to && !open.sender.is_closed());
        if let Some(open) = open {
            return Ok(open.sender.clone());
        }
        self.connection = None;
        let connect = async {
            let tcp = TcpStream::connect(to).await?;
            tcp.set_nodelay(true)?;
            TlsConnector::from(self.world.tls.clone()).connect(self.world.server_name.clone(), tcp).await
        };
        let stream = timeout(CONNECT, connect).await??;
        let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // How it ended is what the requests on it say.
            let _ = connection.await;
        });
        self.connection = Some(Connection { to, sender: sender.clone(), _driver: driver });
        Ok(sender)
    }

    fn http_request(&self, class: Class, within: Duration) -> HttpRequest<Full<Bytes>> {
        let world = &self.world;
        let priority = match class {
            Class::Critical => 1,
            Class::High => 2,
            Class::Normal => 3,
            Class::Low => 4,
        };
        let body = json!({ "parameters": { "entity_id": world.entity, "priority": priority }, "inputs": [] });
        let host = world.server_name.to_str();
        let request = HttpRequest::post(format!("https://{host}:{}/v2/models/{}/infer", world.port, world.model))
            .header("content-type", "application/json")
            // Where the tenant may say so: what a cache remembers proves little.
            .header("cache-control", "no-cache")
            .header("x-request-timeout-ms", within.as_millis().max(1).to_string())
            .body(Full::from(body.to_string()));
        // The model and the name were checked when they were read.
        request.unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
