//! A trust domain, control nodes, and operators who call them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use spillway_control::{Control, ControlSettings};
use spillway_core::identity::{ExpectedPeer, SpiffeId, TrustDomain};
use spillway_proto::control::intent_client::IntentClient;
use spillway_proto::control::{ApplyRequest, ApplyResponse, SourceFile};
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::dial::dial;
use spillway_runtime::drain::Drain;
use spillway_runtime::settings;
use spillway_runtime::tls::{IdentitySettings, Workload, install_provider};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

pub type Client = IntentClient<Channel>;

const HOUR: Duration = Duration::from_secs(3_600);

pub struct Domain {
    pub folder: tempfile::TempDir,
    authority: Authority,
    /// How long leaves of control nodes live which have an authority of their own.
    life: Option<Duration>,
}

impl Domain {
    pub fn create() -> Self {
        install_provider();
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), authority, life: None }
    }

    /// One whose control nodes issue leaves of this life, and have such.
    pub fn issuing(life: Duration) -> Self {
        let domain = Self { life: Some(life), ..Self::create() };
        domain.authority.save(domain.path("authority")).unwrap();
        domain
    }

    pub fn identity(&self, path: &str) -> IdentitySettings {
        self.identity_for(path, HOUR)
    }

    fn identity_for(&self, path: &str, life: Duration) -> IdentitySettings {
        let id = SpiffeId::parse(&format!("spiffe://spillway.test/{path}")).unwrap();
        let leaf = self.authority.issue(&LeafRequest::new(id, life)).unwrap();
        leaf.save_workload(self.folder.path().join(path.replace('/', "-")), self.authority.trust_bundle()).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Calls a control node as whoever `path` says.
    pub async fn caller(&self, path: &str, node: &Node) -> Client {
        let workload = Workload::load(&self.identity(path)).unwrap();
        let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
        let channel = dial(&workload, expected, &node.address.to_string(), Duration::from_secs(5)).await.unwrap();
        IntentClient::new(channel).max_decoding_message_size(usize::MAX)
    }

    pub async fn alice(&self, node: &Node) -> Client {
        self.caller("operator/alice", node).await
    }

    /// A node whose store is a file.
    pub async fn alone(&self) -> Node {
        self.node("c-0", &format!("sqlite: {}", self.path("control.db").display())).await
    }

    pub async fn node(&self, name: &str, store: &str) -> Node {
        let id = format!("region/eu/control/{name}");
        let IdentitySettings { certificate, key, trust_bundle } = self.identity_for(&id, self.life.unwrap_or(HOUR));
        let authority = self.life.map_or_else(String::new, |life| {
            let folder = self.path("authority");
            format!("authority: {{folder: {}, life: {}s}}\n", folder.display(), life.as_secs())
        });
        // Two processes never share a log.
        static NODES: AtomicU64 = AtomicU64::new(0);
        let audit = self.path(&format!("{name}-{}.audit", NODES.fetch_add(1, Ordering::Relaxed)));
        let text = format!(
            "region: eu\nname: {name}\nlisten: 127.0.0.1:0\nstore:\n  {store}\noperators: [alice, bob]\naudit: {}\n\
             rollout: {{gather: 1s, canaryDwell: 300ms, regionDwell: 300ms, patience: 3s}}\n\
             {authority}drainTimeout: 5s\nidentity: {{certificate: {}, key: {}, trustBundle: {}}}\n",
            audit.display(),
            certificate.display(),
            key.display(),
            trust_bundle.display()
        );
        let settings: ControlSettings = settings::parse(&text).unwrap();
        let drain = Drain::new(settings.drain_timeout);
        let control = Control::bind(settings, drain.clone()).await.unwrap();
        let parts = control.parts().clone();
        let address = control.addresses().grpc;
        let task = tokio::spawn(control.serve());
        let node = Node { address, parts, audit, drain, task };
        if store.starts_with("sqlite") {
            eventually("it leads", || node.parts.leading.fence().is_some()).await;
        }
        node
    }
}

pub struct Node {
    pub address: SocketAddr,
    pub parts: spillway_control::control::Parts,
    audit: PathBuf,
    drain: Drain,
    task: JoinHandle<()>,
}

impl Node {
    pub async fn stop(self) {
        self.drain.start();
        tokio::time::timeout(Duration::from_secs(10), self.task).await.expect("it ends").unwrap();
    }

    /// Events of the audit log so far, with that name.
    pub fn audited(&self, event: &str) -> Vec<serde_json::Value> {
        self.parts.audit.flush(Duration::from_secs(5));
        let text = std::fs::read_to_string(&self.audit).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        records.filter(|record| record["event"] == event).collect()
    }
}

pub fn region(name: &str) -> String {
    format!(
        "---\napiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: spillway.test}}\n"
    )
}

/// A pool with so many pods.
pub fn pool(name: &str, region: &str, pods: usize) -> String {
    let pods: Vec<String> =
        (0..pods).map(|pod| format!("{{name: pod-{pod}, address: '10.0.0.{}:9443'}}", pod + 1)).collect();
    format!(
        "---\napiVersion: spillway/v1\nkind: Pool\nmetadata: {{name: {name}}}\nspec: {{region: {region}, pods: [{}]}}\n",
        pods.join(", ")
    )
}

pub fn files(texts: &[String]) -> ApplyRequest {
    let file = |(number, yaml): (usize, &String)| SourceFile { path: format!("{number}.yaml"), yaml: yaml.clone() };
    ApplyRequest { files: texts.iter().enumerate().map(file).collect(), ..Default::default() }
}

pub async fn apply(client: &mut Client, texts: &[String]) -> ApplyResponse {
    client.apply(files(texts)).await.unwrap().into_inner()
}

/// The code, our word for it and the text.
pub fn refused<T: std::fmt::Debug>(answer: Result<Response<T>, Status>) -> (Code, String, String) {
    let status = answer.unwrap_err();
    let word = status.metadata().get("spillway-error").map(|word| word.to_str().unwrap().to_owned());
    (status.code(), word.unwrap_or_default(), status.message().to_owned())
}

/// A request in an operator's name.
pub fn in_the_name_of<T>(id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("spillway-operator", id.parse().unwrap());
    request
}

/// Waits for a condition, at most fifteen seconds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
