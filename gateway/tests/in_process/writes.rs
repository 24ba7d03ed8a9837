//! How many TLS records answers take. Each is a write, a call of the kernel at both ends: a small answer leaves in one, and
//! answers that are ready together share one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::*;

const ANSWERS: usize = 16;

/// Passes one connection on, and counts the TLS records that come back.
struct Relay {
    address: SocketAddr,
    records: Arc<AtomicUsize>,
}

impl Relay {
    async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, records) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counted = records.clone();
        tokio::spawn(async move {
            let (client, _) = listener.accept().await.unwrap();
            let server = TcpStream::connect(server).await.unwrap();
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            // RFC 8446, section 5.1: type, version, length.
            let mut head = [0; 5];
            while from_server.read_exact(&mut head).await.is_ok() {
                let mut record = head.to_vec();
                record.resize(5 + usize::from(u16::from_be_bytes([head[3], head[4]])), 0);
                from_server.read_exact(&mut record[5..]).await.unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
                to_client.write_all(&record).await.unwrap();
            }
        });
        Self { address, records }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    fn records(&self) -> usize {
        self.records.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn an_answer_over_http1_is_one_record() {
    let world = World::with("").await;
    let relay = Relay::to(world.gateway.https).await;
    let mut http1 = Http1::over(relay.connect().await, &world.client("acme")).await.unwrap();
    let metadata = h1_request("GET", "/v2/models/double", &[], b"");
    // The session's tickets come before the first.
    assert_eq!(http1.exchange(&metadata).await.status, 200);
    let before = relay.records();
    for _ in 0..ANSWERS {
        assert_eq!(http1.exchange(&metadata).await.status, 200);
    }
    assert_eq!(relay.records() - before, ANSWERS);
    world.stop().await;
}

#[tokio::test]
async fn answers_that_are_ready_together_share_records() {
    let world = World::with("").await;
    let relay = Relay::to(world.gateway.https).await;
    let http2 = Http2::over(relay.connect().await, &world.client("acme")).await.unwrap();
    let ask = async || http2.exchange(Http2::request("GET", "/v2/models/double", &[]), Bytes::new()).await.unwrap();
    assert_eq!(ask().await.status, 200);
    let before = relay.records();
    assert!(join_all((0..ANSWERS).map(|_| ask())).await.iter().all(|answer| answer.status == 200));
    let records = relay.records() - before;
    assert!(records <= ANSWERS / 2, "{ANSWERS} answers in {records} records");
    world.stop().await;
}
