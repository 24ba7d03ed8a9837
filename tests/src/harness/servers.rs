//! Redis, Cassandra and Triton, started by `tests/servers`. Killed when dropped, and when the test is killed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use super::ports;

/// One real server.
pub struct Server {
    name: &'static str,
    folder: PathBuf,
    arguments: Vec<String>,
    /// What clients of its main port dial.
    pub address: SocketAddr,
    /// Kills the server when our end of its standard input is gone.
    guard: Child,
}

/// How a Redis is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redis {
    Plain,
    /// TLS 1.3, user `spillway` with the password `spillway-password`.
    Tls,
    /// Three masters.
    Cluster,
}

impl Server {
    pub fn redis(run: &Path, mode: Redis) -> Self {
        let port = if mode == Redis::Cluster { ports::block(3) } else { ports::free() };
        let mode = match mode {
            Redis::Plain => "plain",
            Redis::Tls => "tls",
            Redis::Cluster => "cluster",
        };
        Self::start("redis", run, port, &[&port.to_string(), mode])
    }

    pub fn cassandra(run: &Path) -> Self {
        let (port, storage) = (ports::free(), ports::free());
        Self::start("cassandra", run, port, &[&port.to_string(), &storage.to_string()])
    }

    /// Three members with TLS; the first one's port.
    pub fn etcd(run: &Path) -> Self {
        let port = ports::block(6);
        Self::start("etcd", run, port, &[&port.to_string(), "3"])
    }

    /// Triton's gRPC port, with these of the models of `tests/servers/triton-models`.
    pub fn triton(run: &Path, models: &[&str]) -> Self {
        let [http, grpc, metrics] = [ports::free(), ports::free(), ports::free()].map(|port| port.to_string());
        let port = grpc.parse().expect("a port");
        Self::start("triton", run, port, &[&[http.as_str(), &grpc, &metrics], models].concat())
    }

    fn start(name: &'static str, run: &Path, port: u16, arguments: &[&str]) -> Self {
        let folder = run.join(name);
        let script = script(name);
        // Its own session: a test run that is killed as a group leaves the guard to clean up.
        let guard = Command::new("setsid")
            .args(["bash", "-c", r#"read -r _; exec "$0" kill "$1""#])
            .arg(&script)
            .arg(&folder)
            .stdin(Stdio::piped())
            .spawn()
            .expect("setsid and bash are there");
        let server = Self {
            name,
            folder,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            address: ports::local(port),
            guard,
        };
        server.run("start");
        server
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// SIGKILL; data stay.
    pub fn kill(&self) {
        self.run("kill");
    }

    /// Starts it again on the same port with the data that it had.
    pub fn restart(&self) {
        self.run("start");
    }

    /// It keeps its connections and answers nothing.
    pub fn hang(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let text = std::fs::read_to_string(self.folder.join(format!("{}.pid", self.name)));
        let pid = text.ok().and_then(|text| text.trim().parse().ok()).expect("its process id is known");
        signal::kill(Pid::from_raw(pid), signal).expect("it runs");
    }

    fn run(&self, action: &str) {
        let arguments = if action == "start" { &self.arguments[..] } else { &[] };
        let output = Command::new(script(self.name))
            .arg(action)
            .arg(&self.folder)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("bash is there");
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}.sh {action}: {problem}", self.name);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Waiting closes the guard's standard input, upon which it kills the server.
        let _ = self.guard.wait();
    }
}

fn script(name: &str) -> PathBuf {
    crate::root().join(format!("tests/servers/{name}.sh"))
}

/// The store of control nodes in such an etcd, as their settings say it.
pub fn etcd_settings(etcd: &Server) -> String {
    let members = (0..3).map(|member| format!("'https://127.0.0.1:{}'", etcd.address.port() + 2 * member));
    let tls = etcd.folder().join("tls");
    format!(
        "etcd: {{ endpoints: [{}], identity: {{ certificate: {tls}/client.crt, key: {tls}/client.key, trustBundle: {tls}/ca.crt }} }}",
        members.collect::<Vec<_>>().join(", "),
        tls = tls.display(),
    )
}

/// Runs one command of redis-cli against a plain Redis; returns what it printed.
pub fn redis_cli(server: &Server, arguments: &[&str]) -> String {
    let port = server.address.port().to_string();
    let output = Command::new("redis-cli").args(["-p", &port]).args(arguments).output().expect("redis-cli is there");
    assert!(output.status.success(), "redis-cli {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
