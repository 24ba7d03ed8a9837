//! Bytes that no well-behaved client sends, over a real TLS connection.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::client::Client;

pub struct Raw(TlsStream<TcpStream>);

/// What came back before the connection ended or fell silent.
#[derive(Debug)]
pub struct RawAnswer {
    pub text: String,
    pub closed: bool,
}

impl Raw {
    /// An HTTP/1.1 connection by ALPN.
    pub async fn h1(client: &Client) -> Self {
        Self(client.handshake(&[b"http/1.1"]).await.expect("the gateway takes the connection"))
    }

    /// An HTTP/2 connection by ALPN; nothing is sent yet.
    pub async fn h2(client: &Client) -> Self {
        Self(client.handshake(&[b"h2"]).await.expect("the gateway takes the connection"))
    }

    /// The peer may have ended the connection already: reading shows it.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        if self.0.write_all(bytes.as_ref()).await.is_ok() {
            let _ = self.0.flush().await;
        }
    }

    /// Reads until the end, or until nothing came for `silence`.
    pub async fn read(&mut self, silence: Duration) -> RawAnswer {
        let (bytes, closed) = self.read_bytes(silence).await;
        RawAnswer { text: String::from_utf8_lossy(&bytes).into_owned(), closed }
    }

    pub async fn read_bytes(&mut self, silence: Duration) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        let mut part = vec![0; 16 << 10];
        loop {
            match tokio::time::timeout(silence, self.0.read(&mut part)).await {
                Ok(Ok(0) | Err(_)) => return (bytes, true),
                Ok(Ok(count)) => bytes.extend_from_slice(&part[..count]),
                Err(_) => return (bytes, false),
            }
        }
    }
}

impl RawAnswer {
    /// The status of the first answer; 0 when there is none.
    pub fn status(&self) -> u16 {
        self.text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or(0)
    }

    /// How many answers there are.
    pub fn count(&self) -> usize {
        self.text.matches("HTTP/1.1 ").count()
    }

    pub fn header(&self, name: &str) -> &str {
        let lines = self.text.split("\r\n").take_while(|line| !line.is_empty());
        let found = lines.filter_map(|line| line.split_once(':')).find(|(found, _)| found.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.trim()).unwrap_or_default()
    }
}
