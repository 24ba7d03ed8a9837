//! A real etcd cluster.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use spillway_control::store::{EtcdSettings, StoreSettings};
use spillway_core::units::Name;
use spillway_runtime::tls::IdentitySettings;

/// Three members, by the project's own script; killed when dropped.
pub struct Cluster {
    pub folder: tempfile::TempDir,
    port: u16,
}

impl Cluster {
    pub fn start() -> Self {
        let cluster = Self { folder: tempfile::tempdir().unwrap(), port: free_ports(6) };
        cluster.start_again();
        cluster
    }

    /// Those that are gone.
    pub fn start_again(&self) {
        self.run("start", None);
    }

    /// A crash: SIGKILL.
    pub fn kill(&self) {
        self.run("kill", None);
    }

    pub fn kill_member(&self, member: u16) {
        self.run("kill", Some(member));
    }

    pub fn settings(&self) -> StoreSettings {
        let tls = |file: &str| self.folder.path().join("tls").join(file);
        let identity =
            IdentitySettings { certificate: tls("client.crt"), key: tls("client.key"), trust_bundle: tls("ca.crt") };
        let endpoints = (0..3).map(|member| format!("https://127.0.0.1:{}", self.port + 2 * member)).collect();
        StoreSettings::Etcd(EtcdSettings { endpoints, identity, prefix: Name::parse("spillway").unwrap() })
    }

    /// Runs `etcdctl`.
    pub fn control(&self, arguments: &[&str]) {
        let tools = std::env::var("SPILLWAY_TOOLS")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools").to_owned());
        let tls = |file: &str| self.folder.path().join("tls").join(file);
        let mut command = Command::new(Path::new(&tools).join("etcd/bin/etcdctl"));
        command.arg("--endpoints").arg(format!("https://127.0.0.1:{}", self.port));
        command
            .arg("--cacert")
            .arg(tls("ca.crt"))
            .arg("--cert")
            .arg(tls("client.crt"))
            .arg("--key")
            .arg(tls("client.key"));
        let output = command.env("ETCDCTL_API", "3").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    fn run(&self, verb: &str, only: Option<u16>) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/servers/etcd.sh");
        let mut command = Command::new(script);
        command.arg(verb).arg(self.folder.path()).arg(self.port.to_string());
        if let Some(member) = only {
            command.env("ONLY", member.to_string());
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill();
    }
}

/// So many free ports in a row. Each call looks elsewhere, and each process begins elsewhere.
fn free_ports(count: u16) -> u16 {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    loop {
        let slot = (u64::from(std::process::id()) * 17 + CALLS.fetch_add(1, Ordering::SeqCst)) % 490;
        let first = 17_000 + slot as u16 * 10;
        if (first..first + count).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return first;
        }
    }
}
