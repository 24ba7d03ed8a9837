//! A gateway of real sockets and TLS, and a stand-in for the sidecar behind it.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part of this")]

mod client;
mod dns;
mod redis;
mod regions;
mod sidecar;
mod stream;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::resource;
use spillway_gateway::{Gateway, GatewaySettings};
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::drain::Drain;
use spillway_runtime::settings;
use spillway_runtime::snapshot::seal;
use spillway_runtime::tls::{IdentitySettings, Workload};

pub use client::*;
pub use dns::*;
pub use redis::*;
pub use regions::*;
pub use sidecar::*;
pub use stream::*;

pub const HOUR: Duration = Duration::from_secs(3_600);
pub const GATEWAY: &str = "spiffe://spillway.test/region/eu/gateway/gw-0";

/// One region: authority, gateway, two sidecars, clients.
pub struct World {
    pub folder: tempfile::TempDir,
    pub authority: Authority,
    pub sidecars: Vec<Sidecar>,
    pub gateway: Gateway,
    pub drain: Drain,
    /// More resources than those that every test has.
    more: String,
}

pub fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

pub fn workload(authority: &Authority, folder: &Path, text: &str, life: Duration) -> (IdentitySettings, Arc<Workload>) {
    let leaf = authority.issue(&LeafRequest::new(id(text), life).dialled_locally()).unwrap();
    let settings = leaf.save_workload(folder, authority.trust_bundle()).unwrap();
    let workload = Workload::load(&settings).unwrap();
    (settings, workload)
}

/// What a region needs before its gateway.
pub struct Ground {
    pub folder: tempfile::TempDir,
    pub authority: Authority,
}

impl Ground {
    pub fn new() -> Self {
        spillway_runtime::tls::install_provider();
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), authority }
    }

    /// A sidecar of the pool.
    pub async fn sidecar(&self, pod: &str) -> Sidecar {
        self.sidecar_at(&format!("scorers/{pod}"), "127.0.0.1:0").await
    }

    /// A sidecar that proves to be `POOL/POD`.
    pub async fn sidecar_at(&self, proves: &str, address: &str) -> Sidecar {
        sidecar_of(&self.authority, self.folder.path(), proves, address).await
    }
}

async fn sidecar_of(authority: &Authority, folder: &Path, proves: &str, address: &str) -> Sidecar {
    sidecar_in("eu", authority, folder, proves, address).await
}

async fn sidecar_in(region: &str, authority: &Authority, folder: &Path, proves: &str, address: &str) -> Sidecar {
    let (_, pod) = proves.split_once('/').unwrap();
    let text = format!("spiffe://spillway.test/region/{region}/sidecar/{proves}");
    let (_, workload) = workload(authority, &folder.join(pod), &text, HOUR);
    Sidecar::start_at(pod, workload, std::net::TcpListener::bind(address).unwrap()).await
}

impl World {
    pub async fn start() -> Self {
        Self::with("").await
    }

    /// `extra` are more lines of the gateway's settings.
    pub async fn with(extra: &str) -> Self {
        Self::of(2, extra, "").await
    }

    /// So many pods, and `more` resources.
    pub async fn of(pods: usize, extra: &str, more: &str) -> Self {
        Self::serving(pods, &[], extra, more).await
    }

    /// Serves the resources in which each `(from, to)` is replaced.
    pub async fn serving(pods: usize, replaced: &[(&str, &str)], extra: &str, more: &str) -> Self {
        let ground = Ground::new();
        let mut sidecars = Vec::new();
        for pod in 0..pods {
            sidecars.push(ground.sidecar(&format!("pod-{pod}")).await);
        }
        let text = replace(resources(&sidecars, None, more), replaced);
        let world = Self::on(ground, sidecars, &text, extra, more).await;
        until("the gateway is ready", async || world.admin("/readyz").await.starts_with("HTTP/1.1 200")).await;
        world
    }

    /// A gateway that need not be ready yet. `dns` says where the pool's members are from; none: listed.
    pub async fn unready(ground: Ground, sidecars: Vec<Sidecar>, dns: Option<&str>, extra: &str) -> Self {
        let text = resources(&sidecars, dns, "");
        Self::on(ground, sidecars, &text, extra, "").await
    }

    async fn on(ground: Ground, sidecars: Vec<Sidecar>, resources: &str, extra: &str, more: &str) -> Self {
        let Ground { folder, authority } = ground;
        std::fs::write(folder.path().join("snapshot"), seal(&resource::parse(resources).unwrap(), 1)).unwrap();
        workload(&authority, &folder.path().join("gateway"), GATEWAY, HOUR);
        let drain = Drain::new(Duration::from_secs(5));
        let gateway = gateway(folder.path(), extra, &drain).await;
        Self { folder, authority, sidecars, gateway, drain, more: more.to_owned() }
    }

    /// Another gateway before the same pods; it ends with this world's drain.
    pub async fn another(&self, extra: &str) -> Gateway {
        let gateway = gateway(self.folder.path(), extra, &self.drain).await;
        ready(&gateway).await;
        gateway
    }

    /// Another gateway of the region, with a name of its own.
    pub async fn named(&self, name: &str, extra: &str) -> Gateway {
        let own = self.folder.path().join(name);
        workload(&self.authority, &own, &format!("spiffe://spillway.test/region/eu/gateway/{name}"), HOUR);
        let gateway = gateway_of(self.folder.path(), name, &own, extra, &self.drain).await;
        ready(&gateway).await;
        gateway
    }

    /// Serves other resources from now on: each `(from, to)` is replaced in the first ones.
    pub async fn publish(&self, version: u64, replaced: &[(&str, &str)]) {
        let text = replace(resources(&self.sidecars, None, &self.more), replaced);
        self.publish_text(version, &text).await;
    }

    /// Takes the pool's members from elsewhere from now on.
    pub async fn publish_dns(&self, version: u64, dns: &str) {
        self.publish_text(version, &resources(&self.sidecars, Some(dns), &self.more)).await;
    }

    async fn publish_text(&self, version: u64, text: &str) {
        let (new, path) = (self.folder.path().join("snapshot.new"), self.folder.path().join("snapshot"));
        std::fs::write(&new, seal(&resource::parse(text).unwrap(), version)).unwrap();
        std::fs::rename(new, path).unwrap();
        until("the snapshot is read", async || self.metric("spillway_snapshot_version").await == version).await;
    }

    /// Starts one more sidecar, which the next [`Self::publish`] names.
    pub async fn add_sidecar(&mut self) {
        let pod = format!("scorers/pod-{}", self.sidecars.len());
        self.sidecars.push(sidecar_of(&self.authority, self.folder.path(), &pod, "127.0.0.1:0").await);
    }

    /// A part of `/config`, by its JSON pointer.
    pub async fn config(&self, pointer: &str) -> serde_json::Value {
        let answer = self.admin("/config").await;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let config: serde_json::Value = serde_json::from_str(body).unwrap();
        config.pointer(pointer).cloned().unwrap_or_default()
    }

    /// A client of `tenant/NAME/client/web`.
    pub fn client(&self, tenant: &str) -> Arc<Workload> {
        let text = format!("spiffe://spillway.test/tenant/{tenant}/client/web");
        workload(&self.authority, &self.folder.path().join(format!("client-{tenant}")), &text, HOUR).1
    }

    pub async fn http1(&self) -> Http1 {
        Http1::connect(self.gateway.https, &self.client("acme")).await.unwrap()
    }

    pub async fn http2(&self) -> Http2 {
        Http2::connect(self.gateway.https, &self.client("acme")).await.unwrap()
    }

    /// Whether a new connection of this tenant is served. TLS 1.3 tells a client that it is refused only
    /// after its own side is done.
    pub async fn lets_in(&self, tenant: &str) -> bool {
        let Ok(http2) = Http2::connect(self.gateway.https, &self.client(tenant)).await else { return false };
        let answer = http2.exchange(Http2::request("GET", "/v2/health/live", &[]), Bytes::new()).await;
        answer.is_ok_and(|answer| answer.status == 200)
    }

    /// The raw answer of the admin port.
    pub async fn admin(&self, path: &str) -> String {
        ask_admin(self.gateway.admin, "GET", path, "").await
    }

    /// The value of a metric's line, or 0.
    pub async fn metric(&self, line: &str) -> u64 {
        metric_of(self.gateway.admin, line).await
    }

    pub async fn rejected(&self, reason: &str) -> u64 {
        self.metric(&format!("spillway_gateway_rejected_total{{reason=\"{reason}\"}}")).await
    }

    /// The access log so far, once it has a line that contains `text`.
    pub async fn logged(&self, text: &str) -> serde_json::Value {
        let path = self.folder.path().join("access.log");
        let mut found = None;
        until("the line is logged", async || {
            let log = std::fs::read_to_string(&path).unwrap_or_default();
            found = log.lines().find(|line| line.contains(text)).map(|line| serde_json::from_str(line).unwrap());
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// What all sidecars have seen, in no order.
    pub fn seen(&self) -> Vec<Seen> {
        self.sidecars.iter().flat_map(|sidecar| sidecar.seen()).collect()
    }

    /// The next request on another connection is right.
    pub async fn check_alive(&self) {
        let answer = self.http1().await.exchange(&h1_request("GET", "/v2/health/live", &[], b"")).await;
        assert_eq!(answer.status, 200);
    }

    pub async fn stop(self) {
        self.drain.start();
        self.gateway.finish().await;
    }
}

async fn ready(gateway: &Gateway) {
    until("the gateway is ready", async || {
        ask_admin(gateway.admin, "GET", "/readyz", "").await.starts_with("HTTP/1.1 200")
    })
    .await;
}

/// Starts a gateway of the files in a folder.
async fn gateway(folder: &Path, extra: &str, drain: &Drain) -> Gateway {
    gateway_of(folder, "gw-0", &folder.join("gateway"), extra, drain).await
}

/// The same, of this name and with the identity in its `own` folder.
async fn gateway_of(folder: &Path, name: &str, own: &Path, extra: &str, drain: &Drain) -> Gateway {
    gateway_in("eu", folder, name, own, extra, drain).await
}

/// The same, of this region.
async fn gateway_in(region: &str, folder: &Path, name: &str, own: &Path, extra: &str, drain: &Drain) -> Gateway {
    let (path, own) = (folder.display(), own.display());
    let file = format!(
        "region: {region}
name: {name}
listen: 127.0.0.1:0
threads: 2
identity:
  certificate: {own}/certificate.pem
  key: {own}/key.pem
  trustBundle: {own}/trust-bundle.pem
snapshot: {path}/snapshot
accessLog: {path}/access.log
{extra}
"
    );
    let settings: GatewaySettings = settings::parse(&file).unwrap();
    Gateway::start(settings, drain.clone()).await.unwrap()
}

/// The raw answer of an admin port; `header` is a whole line, or nothing.
pub async fn ask_admin(admin: SocketAddr, method: &str, path: &str, header: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut tcp = tokio::net::TcpStream::connect(admin).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: a\r\n{header}connection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    tcp.read_to_string(&mut text).await.unwrap();
    text
}

/// The value of a metric's line of any gateway, or 0.
pub async fn metric_of(admin: SocketAddr, line: &str) -> u64 {
    let text = ask_admin(admin, "GET", "/metrics", "").await;
    text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0)
}

/// Waits for a condition, at most 10 s.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let since = std::time::Instant::now();
    while since.elapsed() < Duration::from_secs(10) {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within 10 s: {what}");
}

fn replace(text: String, replaced: &[(&str, &str)]) -> String {
    replaced.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

/// A model of this name that doubles, with these lines in its spec.
pub fn model(name: &str, lines: &str) -> String {
    format!(
        "---
apiVersion: spillway/v1
kind: Model
metadata: {{ name: {name} }}
spec:
  pools: [scorers]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs:
    - {{ name: x, datatype: FP32, shape: [-1] }}
  outputs:
    - {{ name: y, datatype: FP32, shape: [-1] }}
{lines}
"
    )
}

fn resources(sidecars: &[Sidecar], dns: Option<&str>, more: &str) -> String {
    let listed = |sidecar: &Sidecar| format!("    - {{ name: {}, address: \"{}\" }}\n", sidecar.name, sidecar.address);
    let members = match dns {
        Some(dns) => format!("  dns: {{ {dns} }}\n"),
        None => format!("  pods:\n{}", sidecars.iter().map(listed).collect::<String>()),
    };
    format!(
        r#"
apiVersion: spillway/v1
kind: Region
metadata: {{ name: eu }}
spec: {{ trustDomain: spillway.test }}
---
apiVersion: spillway/v1
kind: Pool
metadata: {{ name: scorers }}
spec:
  region: eu
{members}---
apiVersion: spillway/v1
kind: Model
metadata: {{ name: double }}
spec:
  pools: [scorers]
  versions: [1, 2]
  backend: onnx
  deadline: 2s
  maxDeadline: 10s
  entityInput: site
  inputs:
    - {{ name: x, datatype: FP32, shape: [-1] }}
  outputs:
    - {{ name: y, datatype: FP32, shape: [-1] }}
---
apiVersion: spillway/v1
kind: Model
metadata: {{ name: wide }}
spec:
  pools: [scorers]
  versions: [1]
  backend: onnx
  deadline: 10s
  inputs:
    - {{ name: x, datatype: FP32, shape: [1, -1] }}
  outputs:
    - {{ name: y, datatype: FP32, shape: [-1] }}
---
apiVersion: spillway/v1
kind: Model
metadata: {{ name: brief }}
spec:
  pools: [scorers]
  versions: [1]
  backend: onnx
  deadline: 300ms
  inputs:
    - {{ name: x, datatype: FP32, shape: [-1] }}
  outputs:
    - {{ name: y, datatype: FP32, shape: [-1] }}
---
apiVersion: spillway/v1
kind: Tenant
metadata: {{ name: acme }}
---
apiVersion: spillway/v1
kind: Tenant
metadata: {{ name: globex }}
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: {{ name: acme }}
spec:
  subjects: [{{ tenant: acme }}]
  models: ["*"]
  actions: [infer, metadata]
---
apiVersion: spillway/v1
kind: AccessPolicy
metadata: {{ name: globex }}
spec:
  subjects: [{{ tenant: globex }}]
  models: ["double"]
  actions: [metadata]
{more}"#
    )
}
