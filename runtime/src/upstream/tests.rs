//! Calls to a real h2 server over mTLS on loopback.

use std::convert::Infallible;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

use super::*;
use crate::fixture::*;
use crate::tls::{Offer, accept};

/// A sidecar that answers with the body that it got.
struct Server {
    address: SocketAddr,
    seen: Arc<Seen>,
    task: AbortHandle,
    /// Sends GOAWAY on every connection.
    goaway: Arc<tokio::sync::Notify>,
}

#[derive(Debug, Default)]
struct Seen {
    connections: AtomicUsize,
    calls: AtomicUsize,
    /// Calls to `/hang` whose stream the server saw end.
    cancelled: Arc<AtomicUsize>,
    last: Mutex<Option<(Uri, usize)>>,
    broken: AtomicBool,
}

struct Cancelled(Arc<AtomicUsize>);

impl Drop for Cancelled {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Server {
    async fn start(workload: Arc<Workload>, listen: &str) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, goaway) = (Arc::new(Seen::default()), Arc::new(tokio::sync::Notify::new()));
        let (counts, ends) = (seen.clone(), goaway.clone());
        let task = tokio::spawn(async move {
            // Connections end with the server.
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (seen, workload, goaway) = (counts.clone(), workload.clone(), ends.clone());
                connections.spawn(async move {
                    let Ok(accepted) = accept(&workload, stream, Offer::H2, Duration::from_secs(5)).await else {
                        return;
                    };
                    seen.connections.fetch_add(1, Ordering::SeqCst);
                    let service = service_fn(move |request| answer(seen.clone(), request));
                    let io = TokioIo::new(accepted.stream);
                    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let mut connection = std::pin::pin!(http.serve_connection(io, service));
                    tokio::select! {
                        _ = connection.as_mut() => return,
                        () = goaway.notified() => connection.as_mut().graceful_shutdown(),
                    }
                    let _ = connection.await;
                });
            }
        });
        Self { address, seen, task: task.abort_handle(), goaway }
    }

    fn connections(&self) -> usize {
        self.seen.connections.load(Ordering::SeqCst)
    }
}

async fn answer(seen: Arc<Seen>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    seen.calls.fetch_add(1, Ordering::SeqCst);
    let uri = request.uri().clone();
    if uri.path() == "/hang" {
        let _cancelled = Cancelled(seen.cancelled.clone());
        std::future::pending::<()>().await;
    }
    if uri.path() == "/slow" {
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    match request.into_body().collect().await {
        Ok(body) => {
            let body = body.to_bytes();
            *seen.last.lock() = Some((uri, body.len()));
            Ok(Response::new(Full::new(body)))
        }
        Err(_) => {
            seen.broken.store(true, Ordering::SeqCst);
            Ok(Response::new(Full::default()))
        }
    }
}

fn request(path: &str, body: impl Into<OipBody>) -> Request<OipBody> {
    Request::post(path).body(body.into()).unwrap()
}

async fn text(response: Response<UpstreamBody>) -> Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

async fn pair() -> (Domain, Server, Upstream) {
    let domain = Domain::create();
    let server = Server::start(domain.workload(SIDECAR), "127.0.0.1:0").await;
    let upstream = Upstream::new(domain.workload(GATEWAY), server.address, id(SIDECAR));
    (domain, server, upstream)
}

#[tokio::test]
async fn many_calls_share_one_connection_that_is_made_once() {
    let (_domain, server, upstream) = pair().await;
    assert_eq!(server.connections(), 0);
    let calls: Vec<_> = (0..100_u32)
        .map(|number| {
            let upstream = upstream.clone();
            tokio::spawn(async move {
                let sent = Bytes::from(format!("call {number}"));
                let response = upstream.call(request("/echo", sent.clone())).await.unwrap();
                assert_eq!(text(response).await, sent);
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!((server.connections(), server.seen.calls.load(Ordering::SeqCst)), (1, 100));
    assert_eq!(upstream.in_flight(), 0);
    let authority = server.address.to_string();
    let (uri, _) = server.seen.last.lock().clone().unwrap();
    assert_eq!((uri.scheme_str(), uri.authority().map(Authority::as_str)), (Some("https"), Some(&authority[..])));
}

#[tokio::test]
async fn large_bodies_in_segments_come_back_whole() {
    let (_domain, _server, upstream) = pair().await;
    let segments = vec![Bytes::from_static(b"head"), Bytes::from(vec![7; 9 << 20]), Bytes::from(vec![8; 1 << 20])];
    let expected = segments.concat();
    let response = upstream.call(request("/echo", OipBody::segments(segments))).await.unwrap();
    assert!(text(response).await == expected);
}

#[tokio::test]
async fn a_call_of_nothing_ends_with_its_head() {
    let (_domain, server, upstream) = pair().await;
    for body in [OipBody::empty(), OipBody::segments([Bytes::new()])] {
        assert_eq!(text(upstream.call(request("/echo", body)).await.unwrap()).await, "");
    }
    assert!(!server.seen.broken.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_server_that_ends_a_streamed_call_is_told_to_its_sender() {
    let (_domain, server, upstream) = pair().await;
    let (sender, body) = OipBody::stream();
    let call = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/hang", body)).await.map(drop) }
    });
    eventually("the server has the call", || server.seen.calls.load(Ordering::SeqCst) == 1).await;
    server.task.abort();
    assert!(call.await.unwrap().is_err());
    let told = async { while sender.send(Bytes::from_static(b"more")).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(5), told).await.unwrap();
}

#[tokio::test]
async fn a_dropped_call_resets_its_stream_and_the_connection_stays() {
    let (_domain, server, upstream) = pair().await;
    let hanging = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/hang", OipBody::empty())).await }
    });
    eventually("the server has the call", || server.seen.calls.load(Ordering::SeqCst) == 1).await;
    assert_eq!(upstream.in_flight(), 1);
    hanging.abort();
    eventually("the server sees it end", || server.seen.cancelled.load(Ordering::SeqCst) == 1).await;
    assert_eq!(upstream.in_flight(), 0);
    upstream.call(request("/echo", OipBody::empty())).await.unwrap();
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_deadline_ends_the_call_and_resets_its_stream() {
    let (_domain, server, upstream) = pair().await;
    upstream.connect().await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_millis(50);
    let error = upstream.call_by(request("/hang", OipBody::empty()), deadline).await.unwrap_err();
    assert!(matches!(error, UpstreamError::Deadline { sent: true }) && !error.never_processed());
    eventually("the server sees it end", || server.seen.cancelled.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn the_deadline_bounds_the_connect_too() {
    let domain = Domain::create();
    // Accepts and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = Upstream::new(domain.workload(GATEWAY), listener.local_addr().unwrap(), id(SIDECAR));
    let deadline = std::time::Instant::now() + Duration::from_millis(50);
    let error = upstream.call_by(request("/echo", OipBody::empty()), deadline).await.unwrap_err();
    assert!(matches!(error, UpstreamError::Deadline { sent: false }) && error.never_processed());
    let error = upstream.call(request("/echo", OipBody::empty())).await.unwrap_err();
    assert_eq!((error.reason(), error.never_processed()), ("timeout", true));
}

#[tokio::test]
async fn a_killed_server_is_reconnected_to_when_it_is_back() {
    let (domain, server, upstream) = pair().await;
    upstream.call(request("/echo", OipBody::empty())).await.unwrap();
    let hanging = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/hang", OipBody::empty())).await }
    });
    eventually("the server has the call", || server.seen.calls.load(Ordering::SeqCst) == 2).await;
    server.task.abort();
    let lost = hanging.await.unwrap().unwrap_err();
    assert!(!lost.never_processed(), "{lost}");
    let refused = loop {
        match upstream.call(request("/echo", OipBody::empty())).await.unwrap_err() {
            // The listener closes a moment after its connections.
            UpstreamError::Lost(_) => tokio::task::yield_now().await,
            error => break error,
        }
    };
    assert!(refused.never_processed(), "{refused}");
    // While resting, no other connect is tried: the answer comes at once.
    let asked = Instant::now();
    let resting = upstream.call(request("/echo", OipBody::empty())).await.unwrap_err();
    assert!(resting.never_processed() && asked.elapsed() < Duration::from_millis(30));
    let back = Server::start(domain.workload(SIDECAR), &server.address.to_string()).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while upstream.call(request("/echo", OipBody::empty())).await.is_err() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(back.connections(), 1);
}

#[tokio::test]
async fn goaway_loses_no_call() {
    let (_domain, server, upstream) = pair().await;
    upstream.connect().await.unwrap();
    let slow = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/slow", Bytes::from_static(b"begun"))).await }
    });
    eventually("the server has the call", || server.seen.calls.load(Ordering::SeqCst) == 1).await;
    server.goaway.notify_waiters();
    for _ in 0..50 {
        match upstream.call(request("/echo", Bytes::from_static(b"next"))).await {
            Ok(response) => assert_eq!(text(response).await, "next"),
            // Sent while the GOAWAY was under way: refused, and said to be unprocessed.
            Err(error) => assert!(error.never_processed(), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(text(slow.await.unwrap().unwrap()).await, "begun");
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn t49_a_new_certificate_means_a_new_connection_and_begun_calls_end_well() {
    let domain = Domain::create();
    let server = Server::start(domain.workload(SIDECAR), "127.0.0.1:0").await;
    let settings = domain.settings(GATEWAY, None);
    let gateway = Workload::load(&settings).unwrap();
    let upstream = Upstream::new(gateway.clone(), server.address, id(SIDECAR));
    upstream.connect().await.unwrap();
    let slow = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/slow", Bytes::from_static(b"begun"))).await }
    });
    eventually("the server has the call", || server.seen.calls.load(Ordering::SeqCst) == 1).await;
    domain.issue(GATEWAY).save(&settings.certificate, &settings.key).unwrap();
    assert!(gateway.reload().unwrap());
    upstream.call(request("/echo", OipBody::empty())).await.unwrap();
    assert_eq!(server.connections(), 2);
    assert_eq!(text(slow.await.unwrap().unwrap()).await, "begun");
}

#[tokio::test]
async fn a_server_that_is_someone_else_gets_no_call() {
    let domain = Domain::create();
    let server = Server::start(domain.workload(SIDECAR), "127.0.0.1:0").await;
    let other = id("spiffe://spillway.test/region/eu/sidecar/scorers/pod-1");
    let upstream = Upstream::new(domain.workload(GATEWAY), server.address, other);
    let error = upstream.call(request("/echo", OipBody::empty())).await.unwrap_err();
    assert_eq!((error.reason(), error.never_processed()), ("tls", true));
    assert_eq!(server.seen.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_server_that_does_not_trust_us_is_said_to_have_seen_nothing() {
    let (domain, stranger) = (Domain::create(), Domain::create());
    // It trusts another root of the same trust domain; its own leaf is of ours.
    let settings = domain.settings(SIDECAR, Some(stranger.authority.trust_bundle()));
    let server = Server::start(Workload::load(&settings).unwrap(), "127.0.0.1:0").await;
    let upstream = Upstream::new(domain.workload(GATEWAY), server.address, id(SIDECAR));
    for _ in 0..20 {
        let error = upstream.call(request("/echo", OipBody::empty())).await.unwrap_err();
        assert_eq!((error.reason(), error.never_processed()), ("closed", true));
    }
    assert_eq!(server.seen.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_peer_that_hangs_is_noticed_by_pings() {
    let domain = Domain::create();
    // A link that can be cut without a word.
    let server = Server::start(domain.workload(SIDECAR), "127.0.0.1:0").await;
    let link = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = link.local_addr().unwrap();
    let behind = server.address;
    let cut = Arc::new(tokio::sync::Notify::new());
    let cutting = cut.clone();
    tokio::spawn(async move {
        let (mut near, _) = link.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(behind).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            () = cutting.notified() => std::future::pending::<()>().await,
        }
    });
    let settings = UpstreamSettings {
        ping_every: Some(Duration::from_millis(50)),
        ping_timeout: Duration::from_millis(100),
        ..UpstreamSettings::default()
    };
    let workload = domain.workload(GATEWAY);
    let upstream = Upstream::with(workload, address, id(SIDECAR), settings, UpstreamMetrics::default());
    upstream.call(request("/echo", OipBody::empty())).await.unwrap();
    let hanging = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/hang", OipBody::empty())).await }
    });
    eventually("the server has the call", || server.seen.calls.load(Ordering::SeqCst) == 2).await;
    cut.notify_one();
    let lost = tokio::time::timeout(Duration::from_secs(5), hanging).await.unwrap().unwrap().unwrap_err();
    assert_eq!((lost.reason(), lost.never_processed()), ("lost", false));
}

#[tokio::test]
async fn a_streamed_call_sends_as_it_goes_and_half_of_one_is_not_taken_for_a_whole() {
    let (_domain, server, upstream) = pair().await;
    let (sender, body) = OipBody::stream();
    let call = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/echo", body)).await }
    });
    for _ in 0..10 {
        sender.send(Bytes::from_static(b"message ")).await.unwrap();
    }
    sender.finish().await.unwrap();
    assert_eq!(text(call.await.unwrap().unwrap()).await, b"message ".repeat(10));
    let (sender, body) = OipBody::stream();
    let call = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.call(request("/echo", body)).await.map(drop) }
    });
    sender.send(Bytes::from_static(b"half")).await.unwrap();
    drop(sender);
    let _ = call.await.unwrap();
    eventually("the server sees the break", || server.seen.broken.load(Ordering::SeqCst)).await;
}

#[tokio::test]
async fn a_server_that_is_gone_lets_its_upstream_rest_and_a_round_trip_is_measured() {
    let domain = Domain::create();
    let server = Server::start(domain.workload(SIDECAR), "127.0.0.1:0").await;
    let settings = UpstreamSettings { rest: Duration::from_secs(1), ..UpstreamSettings::default() };
    let metrics = UpstreamMetrics::default();
    let upstream = Upstream::with(domain.workload(GATEWAY), server.address, id(SIDECAR), settings, metrics);
    assert_eq!((upstream.is_resting(), upstream.round_trip()), (false, None));
    upstream.connect().await.unwrap();
    let round_trip = upstream.round_trip().unwrap();
    assert!(!upstream.is_resting() && round_trip < Duration::from_secs(1), "{round_trip:?}");
    server.task.abort();
    eventually("the connection is gone", || {
        tokio::spawn({
            let upstream = upstream.clone();
            async move { upstream.connect().await.is_err() }
        });
        upstream.is_resting()
    })
    .await;
}

#[tokio::test]
async fn a_server_beside_us_is_called_in_the_clear_over_tcp_and_a_unix_socket() {
    async fn serve(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, seen: Arc<Seen>) {
        let service = service_fn(move |request| answer(seen.clone(), request));
        let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = http.serve_connection(TokioIo::new(stream), service).await;
    }
    let seen = Arc::new(Seen::default());
    let folder = tempfile::tempdir().unwrap();
    let (tcp, path) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), folder.path().join("model.sock"));
    let unix = tokio::net::UnixListener::bind(&path).unwrap();
    let address = tcp.local_addr().unwrap();
    let authority = format!("localhost:{}", address.port());
    for (server, expected) in
        [(Beside::Tcp(authority.parse().unwrap()), authority.as_str()), (Beside::Unix(path), "localhost")]
    {
        let settings = UpstreamSettings { ping_every: None, ..UpstreamSettings::default() };
        let upstream = Upstream::beside(server, settings, UpstreamMetrics::default());
        let called = upstream.call(request("/echo", Bytes::from_static(b"tensor")));
        let answered = async { text(called.await.unwrap()).await };
        let serving = async {
            tokio::select! {
                Ok((stream, _)) = tcp.accept() => serve(stream, seen.clone()).await,
                Ok((stream, _)) = unix.accept() => serve(stream, seen.clone()).await,
            }
        };
        let answer = tokio::select! {
            answer = answered => answer,
            () = serving => panic!("the server ended"),
        };
        assert_eq!(answer, "tensor");
        let (uri, _) = seen.last.lock().take().unwrap();
        assert_eq!((uri.scheme_str(), uri.authority().unwrap().as_str()), (Some("http"), expected));
        assert_eq!(upstream.expected(), None);
    }
}
