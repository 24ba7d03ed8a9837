//! Real servers, and a link to one that can be made worse.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

/// Else the first writes would wait until all leases of the server before this one must have run out.
const LISTED_FOR_LONG: &str = "
    local time = redis.call('TIME')
    local us = time[1] * 1000000 + time[2]
    local server = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    local since, seen = string.format('%.0f', us - 60000000), math.floor(us / 1000)
    redis.call('HSET', KEYS[1], 'since', since, 'seen', seen, 'server', server)";

/// A real server, by the project's own script; stopped when dropped.
pub struct Server {
    script: PathBuf,
    pub folder: tempfile::TempDir,
    pub port: u16,
    host: String,
    environment: Vec<(&'static str, String)>,
    start: Vec<String>,
}

impl Server {
    pub fn redis(mode: &str) -> Self {
        // Cluster nodes also take their port + 10,000.
        let port = free_ports(3, 12_000..21_900);
        let server = Self::new("redis.sh", port, vec![port.to_string(), mode.into()]);
        server.start();
        if mode != "tls" {
            server.redis_cli(&["eval", LISTED_FOR_LONG, "1", "spillway:eu:features:listeners"]);
        }
        server
    }

    /// Not started.
    pub fn cassandra() -> Self {
        let port = free_ports(2, 22_000..31_000);
        Self::new("cassandra.sh", port, vec![port.to_string(), (port + 1).to_string()])
    }

    /// Not started: three nodes of one ring on 127.0.0.1 to .3, a third of the tokens each.
    pub fn cassandra_ring() -> [Self; 3] {
        let port = free_ports(2, 22_000..31_000);
        let storage = port + 1;
        let seeds = format!("127.0.0.1:{storage},127.0.0.2:{storage},127.0.0.3:{storage}");
        let mut number = 0;
        Self::TOKENS.map(|token| {
            number += 1;
            let mut server = Self::new("cassandra.sh", port, vec![port.to_string(), storage.to_string()]);
            server.host = format!("127.0.0.{number}");
            let environment =
                [("ADDRESS", server.host.clone()), ("SEEDS", seeds.clone()), ("TOKEN", token.to_string())];
            server.environment = environment.into();
            server
        })
    }

    /// Where each node's part of the ring ends.
    pub const TOKENS: [i64; 3] = [i64::MIN, -3_074_457_345_618_258_603, 3_074_457_345_618_258_602];

    fn new(script: &str, port: u16, start: Vec<String>) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/servers").join(script);
        let (host, environment) = ("127.0.0.1".into(), Vec::new());
        Self { script, folder: tempfile::tempdir().unwrap(), port, host, environment, start }
    }

    pub fn start(&self) {
        self.run("start", &self.start);
    }

    /// A crash: SIGKILL.
    pub fn kill(&self) {
        self.run("kill", &[]);
    }

    /// Stops the processes where they are: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    pub fn redis_cli(&self, arguments: &[&str]) -> String {
        let output =
            Command::new("redis-cli").args(["-c", "-p", &self.port.to_string()]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    fn run(&self, verb: &str, arguments: &[String]) {
        let mut command = Command::new(&self.script);
        command.arg(verb).arg(self.folder.path()).args(arguments).envs(self.environment.iter().cloned());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn signal(&self, signal: &str) {
        for pid in pids(self.folder.path()) {
            assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.thaw();
        self.run("kill", &[]);
    }
}

fn pids(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "pid") {
            found.push(std::fs::read_to_string(path).unwrap().trim().to_owned());
        } else if path.is_dir() {
            found.extend(pids(&path));
        }
    }
    found
}

/// So many free ports in a row. Each call looks elsewhere, and each process begins elsewhere.
fn free_ports(count: u16, range: std::ops::Range<u16>) -> u16 {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let slots = u64::from((range.end - range.start) / 10);
    loop {
        let slot = (u64::from(std::process::id()) * 17 + CALLS.fetch_add(1, Ordering::SeqCst)) % slots;
        let first = range.start + slot as u16 * 10;
        if (first..first + count).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return first;
        }
    }
}

/// A TCP link to a server whose every answer can be delayed, or made nonsense of, or that carries nothing for a while.
pub struct Link {
    pub address: SocketAddr,
    delay_ms: Arc<AtomicU64>,
    garbled: Arc<AtomicBool>,
    held: Arc<watch::Sender<bool>>,
}

impl Link {
    pub async fn to(server: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let delay_ms = Arc::new(AtomicU64::new(0));
        let delay = delay_ms.clone();
        let garbled = Arc::new(AtomicBool::new(false));
        let nonsense = garbled.clone();
        let held = Arc::new(watch::Sender::new(false));
        let hold = held.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(upstream) = tokio::net::TcpStream::connect(&server).await else { continue };
                let (delay, nonsense) = (delay.clone(), nonsense.clone());
                let (mut back_held, mut forth_held) = (hold.subscribe(), hold.subscribe());
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = upstream.into_split();
                    let back = async {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
                            tokio::time::sleep(Duration::from_millis(delay.load(Ordering::Relaxed))).await;
                            let _ = back_held.wait_for(|held| !held).await;
                            if nonsense.load(Ordering::Relaxed) {
                                buffer[..count].fill(b'!');
                            }
                            if to_client.write_all(&buffer[..count]).await.is_err() {
                                break;
                            }
                        }
                    };
                    let forth = async {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
                            let _ = forth_held.wait_for(|held| !held).await;
                            if to_server.write_all(&buffer[..count]).await.is_err() {
                                break;
                            }
                        }
                    };
                    tokio::select! { () = back => {}, () = forth => {} }
                });
            }
        });
        Self { address, delay_ms, garbled, held }
    }

    pub fn delay(&self, delay: Duration) {
        self.delay_ms.store(delay.as_millis() as u64, Ordering::Relaxed);
    }
    /// Connections stay open and nothing comes through, until it all does.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }
    pub fn garble(&self, garbled: bool) {
        self.garbled.store(garbled, Ordering::Relaxed);
    }
}
