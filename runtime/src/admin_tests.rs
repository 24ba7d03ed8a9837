use super::*;
use prometheus_client::metrics::counter::Counter;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const DRAIN: &str = "POST /drain HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-spillway-admin: drain\r\n\r\n";

struct Running {
    address: SocketAddr,
    pages: Pages,
    warm: Arc<AtomicBool>,
}

async fn running(settings: AdminSettings) -> Running {
    let metrics = Metrics::new("test");
    metrics.register("thing", "Things", Counter::<u64>::default()).inc();
    let warm = Arc::new(AtomicBool::new(false));
    let readiness = Readiness::default();
    let state = warm.clone();
    readiness.check("model", move || state.load(Ordering::Relaxed).then_some(()).ok_or("not warm".into()));
    let drain = Drain::new(Duration::from_secs(5));
    let config = Arc::new(|| serde_json::json!({ "region": "eu" }));
    let run = |Asked { query, body, .. }: Asked| -> BoxFuture<'static, _> {
        Box::pin(async move { (StatusCode::ACCEPTED, serde_json::json!({ "asked": query, "body": body.len() })) })
    };
    let action = |path, most_body| Action { path, word: "sweep", most_body, run: Arc::new(run) };
    let actions = vec![action("/sweep", 0), action("/weigh", 1_000)];
    let pages = Pages { metrics, readiness, config, actions, drain };
    let admin = Admin::bind(&settings).await.unwrap();
    let address = admin.address().unwrap();
    tokio::spawn(admin.serve(pages.clone()));
    Running { address, pages, warm }
}

/// Sends raw bytes and reads to the end: (status, the whole answer).
async fn ask(address: SocketAddr, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    (answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0), answer)
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    ask(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
}

#[tokio::test]
async fn the_pages_say_how_the_process_is() {
    let Running { address, warm, .. } = running(AdminSettings::default()).await;
    assert_eq!(get(address, "/livez").await.0, 200);
    let (status, answer) = get(address, "/readyz").await;
    assert!(status == 503 && answer.contains(r#"{"failing":{"model":"not warm"},"ready":false}"#), "{answer}");
    warm.store(true, Ordering::Relaxed);
    assert_eq!(get(address, "/readyz").await.0, 200);
    let (status, answer) = get(address, "/metrics").await;
    assert!(status == 200 && answer.contains("spillway_thing_total 1\n") && answer.contains("openmetrics-text"));
    assert!(get(address, "/config").await.1.contains(r#"{"region":"eu"}"#));
    assert_eq!(get(address, "/").await.0, 404);
    assert_eq!(get(address, "/drain").await.0, 405);
}

#[tokio::test]
async fn a_drain_can_be_asked_for_and_watched() {
    let Running { address, pages, warm } = running(AdminSettings::default()).await;
    warm.store(true, Ordering::Relaxed);
    for without in ["", "x-spillway-admin: \r\n", "x-spillway-admin: stop\r\n", "origin: http://evil\r\n"] {
        let post = format!("POST /drain HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{without}\r\n");
        assert_eq!(ask(address, &post).await.0, 403, "{without}");
        assert!(pages.drain.is_serving());
    }
    let preflight = "OPTIONS /drain HTTP/1.1\r\nhost: x\r\norigin: http://evil\r\nconnection: close\r\n\r\n";
    let (status, answer) = ask(address, preflight).await;
    assert!(status == 405 && !answer.contains("access-control"), "{answer}");
    assert_eq!(ask(address, DRAIN).await.0, 202);
    assert!(!pages.drain.is_serving());
    let (status, answer) = get(address, "/readyz").await;
    assert!(status == 503 && answer.contains("drain"), "{answer}");
    assert_eq!(get(address, "/livez").await.0, 200);
    pages.drain.stop();
    crate::fixture::eventually("the port closes", || std::net::TcpStream::connect(address).is_err()).await;
}

#[tokio::test]
async fn t58_who_is_not_on_loopback_is_refused_unless_settings_allow() {
    // An address of this machine that is not loopback: the source of a route outwards. Nothing is sent.
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let outwards = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr());
    let Ok(own) = outwards.map(|address| address.ip()) else {
        assert!(std::env::var_os("CI").is_none(), "this machine has no address but loopback");
        eprintln!("SKIPPED t58 over a real address: this machine has none but loopback");
        return;
    };
    for (remote, expected) in [(false, 403), (true, 200)] {
        let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let Running { address, pages, .. } = running(AdminSettings { listen, remote }).await;
        let from_elsewhere = SocketAddr::new(own, address.port());
        for path in ["/livez", "/metrics", "/config"] {
            assert_eq!(get(from_elsewhere, path).await.0, expected, "{path}");
        }
        assert_eq!(ask(from_elsewhere, DRAIN).await.0, 403, "who may read may not drain");
        assert!(pages.drain.is_serving());
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, address.port()));
        assert_eq!(get(loopback, "/livez").await.0, 200);
    }
}

#[tokio::test]
async fn slow_and_many_clients_hold_little() {
    let Running { address, .. } = running(AdminSettings::default()).await;
    // More silent connections than there are slots: the newest are closed at once.
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut over = TcpStream::connect(address).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(2), over.read_u8()).await;
    assert!(closed.expect("closed at once").is_err());
    // Those that say nothing go after the header timeout, and the port answers again.
    let gone = tokio::time::timeout(HEADER_TIMEOUT * 2, silent[0].read_u8()).await;
    assert!(gone.expect("closed after the header timeout").is_err());
    drop(silent);
    crate::fixture::eventually("a slot is free", || std::net::TcpStream::connect(address).is_ok()).await;
    assert_eq!(get(address, "/livez").await.0, 200);
}

#[tokio::test]
async fn a_process_may_have_changes_of_its_own_and_they_must_be_meant() {
    let Running { address, .. } = running(AdminSettings::default()).await;
    let post = async |header: &str| {
        ask(address, &format!("POST /sweep?a=b HTTP/1.1\r\nhost: x\r\n{header}connection: close\r\n\r\n")).await
    };
    let (status, answer) = post("x-spillway-admin: sweep\r\n").await;
    assert!(status == 202 && answer.ends_with("{\"asked\":\"a=b\",\"body\":0}\n"), "{answer}");
    for header in ["", "x-spillway-admin: drain\r\n"] {
        let (status, answer) = post(header).await;
        assert!(status == 403 && answer.contains("x-spillway-admin: sweep"), "{answer}");
    }
    assert_eq!(get(address, "/sweep").await.0, 405);
}

#[tokio::test]
async fn t58_a_body_is_taken_up_to_its_bound() {
    let Running { address, .. } = running(AdminSettings::default()).await;
    let post = async |header: &str, body: &str| {
        let head = "POST /weigh HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-spillway-admin: sweep\r\n";
        ask(address, &format!("{head}{header}\r\n{body}")).await
    };
    let (status, answer) = post("content-length: 1000\r\n", &"x".repeat(1_000)).await;
    assert!(status == 202 && answer.contains("\"body\":1000"), "{answer}");
    // Nothing of it is read: it need not come.
    let (status, answer) = post("content-length: 1001\r\n", "").await;
    assert!(status == 413 && answer.ends_with("the body has more than 1000 bytes\n"), "{answer}");
    let chunked = format!("3e9\r\n{}\r\n0\r\n\r\n", "x".repeat(1_001));
    assert_eq!(post("transfer-encoding: chunked\r\n", &chunked).await.0, 413);
    assert_eq!(ask(address, "POST /weigh HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.0, 403);
}
