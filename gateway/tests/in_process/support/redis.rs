//! A real Redis, and a link to it that can be made slow.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// By the project's own script; stopped when dropped.
pub struct RedisServer {
    script: PathBuf,
    folder: tempfile::TempDir,
    pub port: u16,
    mode: &'static str,
}

impl RedisServer {
    pub fn start() -> Self {
        Self::of("plain")
    }

    pub fn of(mode: &'static str) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/servers/redis.sh");
        // Cluster nodes also take their port + 10,000.
        let server = Self { script, folder: tempfile::tempdir().unwrap(), port: free_ports(3), mode };
        server.restart();
        server
    }

    pub fn restart(&self) {
        self.run("start", &[&self.port.to_string(), self.mode]);
    }

    /// A crash: SIGKILL.
    pub fn kill(&self) {
        self.run("kill", &[]);
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn cli(&self, arguments: &[&str]) -> String {
        let output =
            Command::new("redis-cli").args(["-c", "-p", &self.port.to_string()]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// The keys of stored results.
    pub fn results(&self) -> Vec<String> {
        let keys = self.cli(&["keys", "spillway:eu:r:*}"]);
        keys.lines().map(str::to_owned).filter(|key| !key.is_empty()).collect()
    }

    fn run(&self, verb: &str, arguments: &[&str]) {
        let output = Command::new(&self.script).arg(verb).arg(self.folder.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.run("kill", &[]);
    }
}

/// So many free ports in a row. Each call looks elsewhere, and each process begins elsewhere.
fn free_ports(count: u16) -> u16 {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    loop {
        let slot = (u64::from(std::process::id()) * 17 + CALLS.fetch_add(1, Ordering::SeqCst)) % 900;
        let first = 12_000 + slot as u16 * 10;
        if (first..first + count).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return first;
        }
    }
}

/// A TCP link to a server whose every answer can be delayed.
pub struct Link {
    pub address: SocketAddr,
    delay_ms: Arc<AtomicU64>,
}

impl Link {
    pub async fn to(server: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let delay_ms = Arc::new(AtomicU64::new(0));
        let delay = delay_ms.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(upstream) = tokio::net::TcpStream::connect(&server).await else { continue };
                let delay = delay.clone();
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = upstream.into_split();
                    let back = async {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
                            tokio::time::sleep(Duration::from_millis(delay.load(Ordering::Relaxed))).await;
                            if to_client.write_all(&buffer[..count]).await.is_err() {
                                break;
                            }
                        }
                    };
                    let forth = tokio::io::copy(&mut from_client, &mut to_server);
                    tokio::select! { () = back => {}, _ = forth => {} }
                });
            }
        });
        Self { address, delay_ms }
    }

    pub fn delay(&self, delay: Duration) {
        self.delay_ms.store(delay.as_millis() as u64, Ordering::Relaxed);
    }
}
