//! One sidecar in this process, over real mutual TLS, and gateways that call it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::resource;
use spillway_proto::feature::feature_service_client::FeatureServiceClient;
use spillway_proto::feature::value::Kind;
use spillway_proto::feature::{Key, PutRequest, Row, Value};
use spillway_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use spillway_proto::inference::{ModelInferResponse, ServerReadyRequest, infer_parameter::ParameterChoice};
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::drain::Drain;
use spillway_runtime::file::write_atomic;
use spillway_runtime::tls::{Workload, install_provider};
use spillway_runtime::upstream::Upstream;
use spillway_runtime::{settings, snapshot};
use spillway_sidecar::sidecar::Addresses;
use spillway_sidecar::{Sidecar, SidecarSettings};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tonic::transport::{Channel, Endpoint, Uri};

pub type Client = GrpcInferenceServiceClient<Channel>;

const SITE: [&str; 5] = ["age_of_domain", "is_popular", "long_url", "ip_in_url", "https"];
const PAGE: [&str; 4] =
    ["empty_server_form_handler", "popup_window", "request_from_other_domain", "anchor_from_other_domain"];

pub const GATEWAY: &str = "spiffe://spillway.test/region/eu/gateway/gw-0";
const OWN: &str = "spiffe://spillway.test/region/eu/sidecar/scorers/pod-0";

pub struct Pod {
    pub addresses: Addresses,
    pub drain: Drain,
    pub folder: tempfile::TempDir,
    authority: Authority,
    _models: tempfile::TempDir,
    serving: tokio::task::JoinHandle<()>,
}

/// The resources of one region; `models` is more YAML.
pub fn resources(models: &str) -> String {
    let group = |name: &str, fields: &[&str], default: &str| {
        let fields: String =
            fields.iter().map(|field| format!("\n  - {{name: {field}, datatype: FP32{default}}}")).collect();
        format!(
            "---\napiVersion: spillway/v1\nkind: FeatureGroup\nmetadata: {{name: {name}}}\nspec:\n  schemaVersion: 1\n  \
             freshFor: 1h\n  retainFor: 3650d\n  fields:{fields}\n"
        )
    };
    format!(
        "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: eu}}\nspec: {{trustDomain: spillway.test}}\n---\n\
         apiVersion: spillway/v1\nkind: Pool\nmetadata: {{name: scorers}}\nspec: {{region: eu, pods: [{{name: pod-0, address: '127.0.0.1:9'}}]}}\n\
         {}{}---\n{models}",
        group("site", &SITE, ""),
        group("page", &PAGE, ", default: 0.5"),
    )
}

/// The phishing model with its features bound; `more` is more of its spec.
pub fn joined_model(name: &str, more: &str) -> String {
    let of = |group: &str, fields: &[&str]| {
        fields.iter().map(|field| format!("{group}.{field}")).collect::<Vec<_>>().join(", ")
    };
    format!(
        "apiVersion: spillway/v1\nkind: Model\nmetadata: {{name: {name}}}\nspec:\n  pools: [scorers]\n  versions: ['1']\n  deadline: 2s\n  \
         entityInput: entity\n  inputs:\n  - {{name: features, datatype: FP32, shape: [-1, 9], features: [{}, {}]}}\n  outputs:\n  \
         - {{name: score, datatype: FP32, shape: [-1, 1]}}\n{more}\n",
        of("site", &SITE),
        of("page", &PAGE)
    )
}

fn seal(folder: &Path, yaml: &str, version: u64) {
    let resources = resource::parse(yaml).unwrap_or_else(|faults| panic!("{faults:?}"));
    let sealed = snapshot::seal(&resources, version);
    let new = folder.join("snapshot.new");
    std::fs::write(&new, sealed).unwrap();
    std::fs::rename(new, folder.join("snapshot.bin")).unwrap();
}

impl Pod {
    /// Starts a sidecar; `more` is more of its settings, in which `FOLDER` is the pod's. Features are in SQLite unless
    /// it says otherwise.
    pub async fn start(resources: &str, more: &str) -> Self {
        install_provider();
        let folder = tempfile::tempdir().unwrap();
        let models = super::models();
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        issue(&authority, OWN, &folder.path().join("own"));
        seal(folder.path(), resources, 1);
        let (at, own) = (folder.path().display(), folder.path().join("own"));
        // A machine that stands still for a moment is no store that is away.
        let patient = "features: {sqlite: {path: FOLDER/features.db, timeout: 400ms}}\n";
        let features = if more.contains("features:") { "" } else { patient };
        let more = format!("{features}{more}").replace("FOLDER", &at.to_string());
        let text = format!(
            "region: eu\npool: scorers\npod: pod-0\nlisten: 127.0.0.1:0\nsnapshot: {at}/snapshot.bin\nmodels: {}\n\
             identity: {{certificate: {own}/certificate.pem, key: {own}/key.pem, trustBundle: {own}/trust-bundle.pem}}\n\
             accessLog: {at}/access.log\ndrainTimeout: 5s\n{more}",
            models.path().display(),
            own = own.display(),
        );
        let settings: SidecarSettings = settings::parse(&text).unwrap_or_else(|faults| panic!("{faults:?}"));
        let drain = Drain::new(settings.common.drain_timeout);
        let sidecar = Sidecar::bind(settings, drain.clone()).await.unwrap();
        let addresses = sidecar.addresses();
        let serving = tokio::spawn(sidecar.serve());
        Self { addresses, drain, folder, authority, _models: models, serving }
    }

    pub fn publish(&self, resources: &str, version: u64) {
        seal(self.folder.path(), resources, version);
    }

    /// A connection of whoever the id names.
    pub async fn connect(&self, id: &str) -> Channel {
        connect(&self.workload(&self.authority, id), self.addresses.grpc).await
    }

    /// A connection of whoever the id names by the word of another authority.
    pub async fn connect_from(&self, authority: &Authority, id: &str) -> Channel {
        connect(&self.workload(authority, id), self.addresses.grpc).await
    }

    /// A gateway's own client.
    pub fn upstream(&self) -> Upstream {
        Upstream::new(self.workload(&self.authority, GATEWAY), self.addresses.grpc, own())
    }

    /// The bytes of a connection of whoever the id names, for who speaks HTTP/2 by hand.
    pub async fn raw(&self, id: &str) -> TlsStream<TcpStream> {
        handshake(self.workload(&self.authority, id).client_config(own()), self.addresses.grpc).await.unwrap()
    }

    fn workload(&self, authority: &Authority, id: &str) -> Arc<Workload> {
        let folder = tempfile::tempdir().unwrap();
        let request = LeafRequest::new(SpiffeId::parse(id).unwrap(), Duration::from_secs(3_600));
        let leaf = authority.issue(&request).unwrap();
        Workload::load(&leaf.save_workload(folder.path(), self.authority.trust_bundle()).unwrap()).unwrap()
    }

    /// Has the sidecar trust its own authority and these others.
    pub fn trust(&self, others: &[&Authority]) {
        let mut bundle = self.authority.trust_bundle().to_owned();
        others.iter().for_each(|other| bundle.push_str(other.trust_bundle()));
        write_atomic(&self.folder.path().join("own/trust-bundle.pem"), bundle.as_bytes(), 0o644).unwrap();
    }

    pub async fn gateway(&self) -> Client {
        GrpcInferenceServiceClient::new(self.connect(GATEWAY).await)
    }

    /// Waits until the pod says that it is ready.
    pub async fn ready(self) -> Self {
        let mut gateway = self.gateway().await;
        for _ in 0..200 {
            if gateway.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready {
                return self;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("not ready: {}", self.metrics().await);
    }

    /// Puts the rows of these cases, their events as old as `age`.
    pub async fn put(&self, cases: &[super::Case], age: Duration) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let event_time_micros = i64::try_from((now - age).as_micros()).unwrap();
        let row = |case: &super::Case, group: &str, names: &[&str], values: &[f32]| Row {
            key: Some(Key { group: group.into(), entity: case.entity.clone().into(), tenant: String::new() }),
            event_time_micros,
            fields: names
                .iter()
                .zip(values)
                .map(|(name, value)| ((*name).to_owned(), Value { kind: Some(Kind::DoubleValue(f64::from(*value))) }))
                .collect(),
        };
        let rows = cases
            .iter()
            .flat_map(|case| {
                [row(case, "site", &SITE, &case.features[..5]), row(case, "page", &PAGE, &case.features[5..])]
            })
            .collect();
        let mut features = FeatureServiceClient::new(self.connect(GATEWAY).await);
        let answer = features.put(PutRequest { rows }).await.unwrap().into_inner();
        assert!(answer.rejections.is_empty(), "{:?}", answer.rejections);
    }

    /// What `/metrics` shows.
    pub async fn metrics(&self) -> String {
        self.page("/metrics").await
    }

    /// A page of the admin port, head and body.
    pub async fn page(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = TcpStream::connect(self.addresses.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    pub async fn assert_metric(&self, line: &str) {
        for _ in 0..200 {
            if self.metrics().await.contains(line) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no '{line}' in\n{}", self.metrics().await);
    }

    /// Drains to the end; the folder still holds what was written.
    pub async fn stop(self) -> tempfile::TempDir {
        self.drain.start();
        self.serving.await.unwrap();
        self.folder
    }
}

fn issue(authority: &Authority, id: &str, folder: &Path) -> spillway_runtime::tls::IdentitySettings {
    let request = LeafRequest::new(SpiffeId::parse(id).unwrap(), Duration::from_secs(3_600));
    authority.issue(&request).unwrap().save_workload(folder, authority.trust_bundle()).unwrap()
}

fn own() -> SpiffeId {
    SpiffeId::parse(OWN).unwrap()
}

async fn handshake(config: Arc<ClientConfig>, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let name = tokio_rustls::rustls::pki_types::ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(config).connect(name, stream).await
}

async fn connect(workload: &Arc<Workload>, address: SocketAddr) -> Channel {
    let config = workload.client_config(own());
    let connector = tower::service_fn(move |_: Uri| {
        let handshake = handshake(Arc::clone(&config), address);
        async move { Ok::<_, std::io::Error>(TokioIo::new(handshake.await?)) }
    });
    Endpoint::from_static("http://sidecar").connect_with_connector(connector).await.unwrap()
}

/// A text parameter of an answer.
pub fn text_parameter<'a>(answer: &'a ModelInferResponse, name: &str) -> Option<&'a str> {
    match answer.parameters.get(name)?.parameter_choice.as_ref()? {
        ParameterChoice::StringParam(text) => Some(text),
        other => panic!("{name} is {other:?}"),
    }
}

/// The scores of an answer.
pub fn scores(answer: &ModelInferResponse) -> Vec<f32> {
    answer.raw_output_contents[0].chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

pub fn code(status: &tonic::Status) -> &str {
    status.metadata().get("spillway-error").map_or("", |value| value.to_str().unwrap())
}

pub fn parameters<const N: usize>(
    parameters: [(&str, ParameterChoice); N],
) -> HashMap<String, spillway_proto::inference::InferParameter> {
    let parameter = |choice| spillway_proto::inference::InferParameter { parameter_choice: Some(choice) };
    parameters.into_iter().map(|(name, choice)| (name.to_owned(), parameter(choice))).collect()
}
