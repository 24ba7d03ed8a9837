//! The port that operators and probes look at: `/livez`, `/readyz`, `/metrics`, `/config`, `POST /drain`,
//! and what a process adds.
//!
//! The rule: only loopback gets an answer unless the settings say otherwise, and no client can hold
//! more than a little of the process. What is posted takes more than reading does: it is for loopback alone,
//! and needs a header that no web page can have a browser send. It does not serve traffic.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::drain::{Drain, Phase};
use crate::telemetry::Metrics;

/// Connections at a time; probes and scrapers need a handful.
const CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// The whole life of a connection: a scraper that stays comes again.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);
/// How long a body may take to come: others wait for their turn meanwhile.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The header that says what is meant. A browser asks before it sends such a header for a page of another
/// origin, and gets no leave.
pub const MEANT: &str = "x-spillway-admin";

const TEXT: &str = "text/plain; charset=utf-8";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminSettings {
    /// Default: a free port of 127.0.0.1.
    pub listen: SocketAddr,
    /// Whether others than loopback get an answer. Default: no.
    pub remote: bool,
}

impl Default for AdminSettings {
    fn default() -> Self {
        Self { listen: (Ipv4Addr::LOCALHOST, 0).into(), remote: false }
    }
}

/// What must be so before traffic comes: checks by name. Cheap to clone; all clones are the same.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Mutex<Vec<Check>>>);

struct Check {
    name: &'static str,
    check: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
}

impl Readiness {
    /// Adds a check, which must be quick: it reads a state, it does not find one out.
    /// An error says what is not so, for the operator.
    pub fn check(&self, name: &'static str, check: impl Fn() -> Result<(), String> + Send + Sync + 'static) {
        self.0.lock().push(Check { name, check: Box::new(check) });
    }

    /// The checks that fail, with their reasons. Empty: ready.
    pub fn failing(&self) -> Vec<(&'static str, String)> {
        let checks = self.0.lock();
        checks.iter().filter_map(|Check { name, check }| check().err().map(|reason| (*name, reason))).collect()
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.lock().iter().map(|check| check.name)).finish()
    }
}

/// What an operator may have done: `POST` to a path, with the header `x-spillway-admin: WORD`.
#[derive(Clone)]
pub struct Action {
    pub path: &'static str,
    pub word: &'static str,
    /// Bytes of body that it takes; 0: none is read.
    pub most_body: usize,
    /// Does it, and says what came of it; must end by itself.
    pub run: Arc<dyn Fn(Asked) -> BoxFuture<'static, (StatusCode, serde_json::Value)> + Send + Sync>,
}

/// A request for an [`Action`].
#[derive(Debug)]
pub struct Asked {
    /// The URL's query.
    pub query: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    pub metrics: Metrics,
    pub readiness: Readiness,
    /// What `/config` shows; no secrets.
    pub config: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// Beside `/drain`.
    pub actions: Vec<Action>,
    pub drain: Drain,
}

/// The bound port; nothing is answered before [`Admin::serve`].
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    remote: bool,
}

impl Admin {
    pub async fn bind(settings: &AdminSettings) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(settings.listen).await?, remote: settings.remote })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until stopped: also while draining, so that the drain can be watched.
    pub async fn serve(self, pages: Pages) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        let bodies = Arc::new(Semaphore::new(1));
        let stopped = pages.drain.clone();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stopped.stopped() => return,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "admin port cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // At the bound, the newest goes: its client sees a closed connection and comes again.
            let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
            let access = match from.ip().to_canonical().is_loopback() {
                true => Access::Change,
                false if self.remote => Access::Read,
                false => Access::None,
            };
            let (pages, bodies) = (pages.clone(), bodies.clone());
            tokio::spawn(async move {
                let stopped = pages.drain.clone();
                tokio::select! {
                    _ = tokio::time::timeout(CONNECTION_LIFE, connection(stream, access, pages, bodies)) => {}
                    () = stopped.stopped() => {}
                }
                drop(slot);
            });
        }
    }
}

/// What a client may do, by where it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    None,
    Read,
    Change,
}

async fn connection(stream: TcpStream, access: Access, pages: Pages, bodies: Arc<Semaphore>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (pages, bodies) = (pages.clone(), bodies.clone());
        async move {
            Ok::<_, Infallible>(match access {
                Access::None => text(StatusCode::FORBIDDEN, "forbidden\n"),
                Access::Read | Access::Change => answer(request, access, &pages, &bodies).await,
            })
        }
    });
    // A client that breaks off is its own affair.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(
    request: Request<Incoming>,
    access: Access,
    pages: &Pages,
    bodies: &Semaphore,
) -> Response<Full<Bytes>> {
    if let Some(action) = pages.actions.iter().find(|action| action.path == request.uri().path()) {
        return act(action, request, access, bodies).await;
    }
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    match (request.uri().path(), reads) {
        ("/livez", true) => text(StatusCode::OK, "ok\n"),
        ("/readyz", true) => ready(pages),
        ("/metrics", true) => match pages.metrics.encode() {
            Ok(metrics) => page(StatusCode::OK, crate::telemetry::METRICS_CONTENT_TYPE, metrics),
            Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n"),
        },
        ("/config", true) => json(StatusCode::OK, &(pages.config)()),
        ("/drain", false) if request.method() == Method::POST => {
            if let Some(refused) = refuses(&request, access, "drain") {
                return refused;
            }
            tracing::info!("asked to drain by the admin port");
            pages.drain.start();
            text(StatusCode::ACCEPTED, "draining\n")
        }
        ("/livez" | "/readyz" | "/metrics" | "/config" | "/drain", _) => {
            text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
        }
        _ => text(StatusCode::NOT_FOUND, "not found\n"),
    }
}

/// `bodies`: whoever has one has its turn; a body may be large, so that they are taken one by one.
async fn act(action: &Action, request: Request<Incoming>, access: Access, bodies: &Semaphore) -> Response<Full<Bytes>> {
    if request.method() != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
    }
    if let Some(refused) = refuses(&request, access, action.word) {
        return refused;
    }
    let query = request.uri().query().unwrap_or_default().to_owned();
    let (head, body) = request.into_parts();
    let (mut taken, mut turn) = (Bytes::new(), None);
    if action.most_body > 0 {
        turn = bodies.acquire().await.ok();
        taken = match take(body, action.most_body).await {
            Ok(taken) => taken,
            Err(refused) => return refused,
        };
    }
    let (status, said) = (action.run)(Asked { query, headers: head.headers, body: taken }).await;
    drop(turn);
    json(status, &said)
}

/// A body of at most so many bytes.
async fn take(body: Incoming, most: usize) -> Result<Bytes, Response<Full<Bytes>>> {
    let too_large = || page(StatusCode::PAYLOAD_TOO_LARGE, TEXT, format!("the body has more than {most} bytes\n"));
    if body.size_hint().lower() > most as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, most).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(text(StatusCode::BAD_REQUEST, "the body broke off\n")),
        Err(_) => Err(text(StatusCode::REQUEST_TIMEOUT, "the body took longer than 10 s\n")),
    }
}

/// Why nothing is done, if nothing is.
fn refuses(request: &Request<Incoming>, access: Access, word: &str) -> Option<Response<Full<Bytes>>> {
    if access != Access::Change {
        return Some(text(StatusCode::FORBIDDEN, "only from loopback\n"));
    }
    let meant = request.headers().get(MEANT).is_some_and(|meant| meant == word);
    let missing = || page(StatusCode::FORBIDDEN, TEXT, format!("send the header {MEANT}: {word}\n"));
    (!meant).then(missing)
}

fn ready(pages: &Pages) -> Response<Full<Bytes>> {
    let mut failing = pages.readiness.failing();
    if pages.drain.phase() != Phase::Serving {
        failing.push(("drain", "no new work is taken".into()));
    }
    let ready = failing.is_empty();
    let failing: serde_json::Map<_, _> =
        failing.into_iter().map(|(name, reason)| (name.to_owned(), reason.into())).collect();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(status, &serde_json::json!({ "ready": ready, "failing": failing }))
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    page(status, TEXT, body)
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Full<Bytes>> {
    page(status, "application/json", format!("{value}\n"))
}

fn page(status: StatusCode, media_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(media_type));
    response.headers_mut().insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
#[path = "admin_tests.rs"]
mod tests;
