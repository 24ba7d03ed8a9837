//! One region: its authority, its resources, its sidecars and its gateway.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::tls::{IdentitySettings, Workload};

use super::client::Client;
use super::doubles::TritonDouble;
use super::metrics::{self, Metrics};
use super::process::{Process, spillway, spillway_ok};
use super::relay::Relay;
use super::run_folder::RunFolder;
use super::{eventually, ports};

pub const REGION: &str = "eu-west";
pub const TRUST_DOMAIN: &str = "spillway.test";
const POOL: &str = "scorers";
const LIFE: Duration = Duration::from_secs(3_600);
const READY: Duration = Duration::from_secs(30);

/// Laid out by [`Region::new`], changed at will, run by [`Region::start`].
pub struct Region {
    pub gateway: Option<Process>,
    /// Of [`Self::start_more_gateways`].
    pub more_gateways: Vec<Process>,
    pub sidecars: Vec<Process>,
    pub authority: Authority,
    /// Settings added to those of each sidecar; `features` come from [`Self::features`].
    pub sidecar_settings: String,
    /// Settings added to those of one pod's sidecar.
    pub pod_settings: BTreeMap<usize, String>,
    /// The `features` of the sidecars, indented by two.
    pub features: String,
    pub gateway_settings: String,
    /// Resource files by name.
    pub resources: BTreeMap<String, String>,
    pub pods: Vec<Pod>,
    /// Dropped last.
    pub folder: RunFolder,
}

#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub address: SocketAddr,
    /// What gateways dial: the pod itself, or a relay before it.
    pub dialled: SocketAddr,
}

impl Region {
    /// Embedded defaults, two pods, the resources of `spillway dev` without cache and degradation.
    pub fn new(name: &str) -> Self {
        let folder = RunFolder::new(name);
        let domain = TrustDomain::parse(TRUST_DOMAIN).expect("a trust domain");
        let authority = Authority::create(domain).expect("an authority");
        let dev = crate::root().join("cli/dev");
        let mut resources = BTreeMap::new();
        for name in ["features.yaml", "model.yaml", "tenants.yaml"] {
            let text = std::fs::read_to_string(dev.join("resources").join(name)).expect("a dev resource");
            // A scenario opts in to what it is about.
            let plain = text.split_once("  # Under trouble").map_or(text.as_str(), |(plain, _)| plain);
            resources.insert(name.to_owned(), plain.replace(", mayLeaveRegion: true", ""));
        }
        let region = format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{ name: {REGION} }}\nspec: {{ trustDomain: {TRUST_DOMAIN} }}\n"
        );
        resources.insert("region.yaml".into(), region);
        let models = folder.join("models/phishing/1");
        std::fs::create_dir_all(&models).expect("a folder");
        std::fs::copy(dev.join("model/1/model.onnx"), models.join("model.onnx")).expect("the model");
        // Machines that run tests stand still for longer than the 50 ms after which a default would be taken instead.
        let file = folder.join("features.sqlite");
        let features = format!("  memory: 64MiB\n  sqlite: {{ path: {}, timeout: 400ms }}\n", file.display());
        let mut region = Self {
            gateway: None,
            more_gateways: Vec::new(),
            sidecars: Vec::new(),
            authority,
            sidecar_settings: String::new(),
            pod_settings: BTreeMap::new(),
            features,
            gateway_settings: String::new(),
            resources,
            pods: Vec::new(),
            folder,
        };
        region.set_pods(2);
        for (name, id) in [
            ("loader", "region/eu-west/loader/one"),
            ("acme", "tenant/acme/client/web"),
            ("globex", "tenant/globex/client/web"),
        ] {
            region.issue(name, id, LIFE);
        }
        region
    }

    /// Gives the region this many pods; before it is started.
    pub fn set_pods(&mut self, count: usize) {
        let pod = |index| {
            let address = ports::local(ports::free());
            Pod { name: format!("pod-{index}"), address, dialled: address }
        };
        self.pods = (0..count).map(pod).collect();
        self.write_pool();
    }

    /// Gateways reach each pod over a link of its own.
    pub async fn relay_pods(&mut self) -> Vec<Relay> {
        let mut relays = Vec::with_capacity(self.pods.len());
        for pod in &mut self.pods {
            let relay = Relay::to(pod.address).await;
            pod.dialled = relay.address;
            relays.push(relay);
        }
        self.write_pool();
        relays
    }

    /// Each pod has a model server of its own.
    pub fn use_doubles(&mut self) -> Vec<TritonDouble> {
        self.edit("model.yaml", "backend: onnx", "backend: triton");
        let doubles: Vec<TritonDouble> = self.pods.iter().map(|_| TritonDouble::start()).collect();
        for (index, double) in doubles.iter().enumerate() {
            self.pod_settings.insert(index, format!("triton: \"http://{}\"\n", double.address));
        }
        doubles
    }

    fn write_pool(&mut self) {
        let mut text = format!(
            "apiVersion: spillway/v1\nkind: Pool\nmetadata: {{ name: {POOL} }}\nspec:\n  region: {REGION}\n  pods:\n"
        );
        for pod in &self.pods {
            writeln!(text, "    - {{ name: {}, address: \"{}\" }}", pod.name, pod.dialled).expect("memory");
        }
        self.resources.insert("pool.yaml".into(), text);
    }

    /// Replaces text in a resource; it must be there.
    pub fn edit(&mut self, file: &str, from: &str, to: &str) {
        let text = self.resources.get_mut(file).unwrap_or_else(|| panic!("no resource file {file}"));
        assert!(text.contains(from), "{from:?} is not in {file}");
        *text = text.replace(from, to);
    }

    /// Models run on this Triton.
    pub fn use_triton(&mut self, address: SocketAddr) {
        self.edit("model.yaml", "backend: onnx", "backend: triton");
        writeln!(self.sidecar_settings, "triton: \"http://{address}\"").expect("memory");
    }

    /// Features live in this Redis and this Cassandra.
    pub fn use_stores(&mut self, redis: Option<SocketAddr>, cassandra: SocketAddr) {
        self.features = "  memory: 64MiB\n".into();
        if let Some(redis) = redis {
            writeln!(self.features, "  redis: {{ servers: [\"{redis}\"], timeout: 20ms }}").expect("memory");
        }
        writeln!(
            self.features,
            "  cassandra: {{ contactPoints: [\"{cassandra}\"], keyspace: spillway, createSchema: true, \
             replicationFactor: 1, timeout: 100ms }}"
        )
        .expect("memory");
    }

    pub fn identity(&self, name: &str) -> IdentitySettings {
        let folder = self.folder.join("pki").join(name);
        IdentitySettings {
            certificate: folder.join("certificate.pem"),
            key: folder.join("key.pem"),
            trust_bundle: folder.join("trust-bundle.pem"),
        }
    }

    /// A leaf of the region's authority in a folder of its own; `path` is that of the SPIFFE id.
    pub fn issue(&self, name: &str, path: &str, life: Duration) -> IdentitySettings {
        self.issue_by(&self.authority, name, path, life)
    }

    /// A leaf of any authority of the same trust domain; it trusts the region's.
    pub fn issue_by(&self, authority: &Authority, name: &str, path: &str, life: Duration) -> IdentitySettings {
        let request = LeafRequest::new(id(path), life).dialled_locally();
        let leaf = authority.issue(&request).expect("a leaf");
        leaf.save_workload(self.folder.join("pki").join(name), self.authority.trust_bundle()).expect("a folder")
    }

    /// Writes the resources and compiles them as the next version, through `spillway check`.
    pub fn apply(&self) {
        let output = self.try_apply();
        assert!(output.status.success(), "{output:?}");
    }

    pub fn try_apply(&self) -> Output {
        let folder = self.folder.join("resources");
        std::fs::create_dir_all(&folder).expect("a folder");
        for (name, text) in &self.resources {
            std::fs::write(folder.join(name), text).expect("a resource is written");
        }
        spillway(&["check", "-f", text(&folder), "-o", text(&self.snapshot())])
    }

    pub fn snapshot(&self) -> PathBuf {
        self.folder.join("snapshot")
    }

    /// Applies the resources, starts the sidecars, loads the features, starts the gateway, waits until all are ready.
    pub async fn start(&mut self) {
        self.start_sidecars().await;
        self.load_features();
        self.start_gateway().await;
    }

    pub async fn start_sidecars(&mut self) {
        self.apply();
        for index in 0..self.pods.len() {
            let sidecar = self.spawn_sidecar(index);
            self.sidecars.push(sidecar);
        }
        for sidecar in &self.sidecars {
            wait_until_ready(sidecar).await;
        }
    }

    /// Starts the sidecar of a pod, again or for the first time.
    pub fn spawn_sidecar(&self, index: usize) -> Process {
        let Pod { name, address, .. } = &self.pods[index];
        self.issue(name, &format!("region/{REGION}/sidecar/{POOL}/{name}"), LIFE);
        let settings = format!(
            "{}pool: {POOL}\npod: {name}\nmodels: {}\n{}{}features:\n{}",
            self.common(name, *address),
            self.folder.join("models").display(),
            self.sidecar_settings,
            self.pod_settings.get(&index).map_or("", String::as_str),
            self.features,
        );
        self.spawn(name, "sidecar", &settings)
    }

    pub async fn start_gateway(&mut self) {
        let gateway = self.spawn_gateway("gateway-0");
        wait_until_ready(&gateway).await;
        self.gateway = Some(gateway);
    }

    /// Starts `gateway-1`, `gateway-2` … beside `gateway-0`.
    pub async fn start_more_gateways(&mut self, count: usize) {
        let gateways: Vec<Process> = (1..=count).map(|index| self.spawn_gateway(&format!("gateway-{index}"))).collect();
        for gateway in &gateways {
            wait_until_ready(gateway).await;
        }
        self.more_gateways.extend(gateways);
    }

    /// A client of a tenant at each gateway.
    pub fn clients(&self, name: &str) -> Vec<Client> {
        let gateways = self.gateway.iter().chain(&self.more_gateways);
        gateways.map(|gateway| Client::new(gateway.address, &self.identity(name))).collect()
    }

    /// A gateway on a free port.
    pub fn spawn_gateway(&self, name: &str) -> Process {
        self.spawn_gateway_at(name, ports::local(0))
    }

    fn spawn_gateway_at(&self, name: &str, listen: SocketAddr) -> Process {
        self.issue(name, &format!("region/{REGION}/gateway/{name}"), LIFE);
        let settings = format!("{}name: {name}\n{}", self.common(name, listen), self.gateway_settings);
        self.spawn(name, "gateway", &settings)
    }

    /// Starts the gateway anew beside itself, on the same port, and then stops the old one.
    pub async fn replace_gateway(&mut self) {
        let next = self.spawn_gateway_at("gateway-0", self.gateway().address);
        wait_until_ready(&next).await;
        let before = self.gateway.replace(next);
        if let Some(mut before) = before {
            before.stop().await;
        }
    }

    fn spawn(&self, name: &str, kind: &str, settings: &str) -> Process {
        let config = self.folder.join(format!("{name}.yaml"));
        std::fs::write(&config, settings).expect("settings are written");
        Process::start(name, kind, &config)
    }

    fn common(&self, name: &str, listen: SocketAddr) -> String {
        let files = self.identity(name);
        format!(
            "region: {REGION}\nidentity:\n  certificate: {}\n  key: {}\n  trustBundle: {}\nsnapshot: {}\n\
             listen: \"{listen}\"\nadmin: \"127.0.0.1:0\"\naccessLog: {}\ndrainTimeout: 10s\n",
            files.certificate.display(),
            files.key.display(),
            files.trust_bundle.display(),
            self.snapshot().display(),
            self.access_log(name).display(),
        )
    }

    /// Loads the dev features by `spillway features load` through the first sidecar.
    pub fn load_features(&self) {
        for group in ["site", "page"] {
            let file = crate::root().join(format!("cli/dev/model/{group}.csv"));
            // A copy: the loader keeps its progress beside the file.
            let copy = self.folder.join(format!("{group}.csv"));
            std::fs::copy(&file, &copy).expect("the features are copied");
            spillway_ok(&self.load_arguments(group, text(&copy), 0).iter().map(String::as_str).collect::<Vec<_>>());
        }
    }

    /// The command line that loads a file through a sidecar.
    pub fn load_arguments(&self, group: &str, file: &str, pod: usize) -> Vec<String> {
        let files = self.identity("loader");
        let pod = &self.pods[pod];
        let fixed = ["features", "load", "--group", group, file, "--sidecar", &pod.address.to_string()];
        let mut arguments: Vec<String> = fixed.map(str::to_owned).into();
        let id = id(&format!("region/{REGION}/sidecar/{POOL}/{}", pod.name)).to_string();
        for (option, value) in [
            ("--sidecar-id", id.as_str()),
            ("--certificate", text(&files.certificate)),
            ("--key", text(&files.key)),
            ("--trust-bundle", text(&files.trust_bundle)),
        ] {
            arguments.extend([option.to_owned(), value.to_owned()]);
        }
        arguments
    }

    pub fn gateway(&self) -> &Process {
        self.gateway.as_ref().expect("the gateway was started")
    }

    /// A client of a tenant.
    pub fn client(&self, name: &str) -> Client {
        Client::new(self.gateway().address, &self.identity(name))
    }

    /// A caller of a sidecar that checks its identity; `name` is a folder of certificates.
    pub fn caller_of_pod(&self, name: &str, pod: usize) -> Client {
        spillway_runtime::tls::install_provider();
        let workload = Workload::load(&self.identity(name)).expect("an identity");
        let expected = id(&format!("region/{REGION}/sidecar/{POOL}/{}", self.pods[pod].name));
        Client::with_tls(self.pods[pod].address, workload.client_config(expected))
    }

    pub fn gateway_metrics(&self) -> Metrics {
        Metrics::of(self.gateway().admin)
    }

    /// The sum of a counter over all sidecars that run.
    pub fn sidecars_sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.sidecars.iter().map(|sidecar| Metrics::of(sidecar.admin).sum(name, labels)).sum()
    }

    /// Returns when every sidecar serves by this version of the snapshot: it goes on with the old one until what the
    /// new one says of its models has passed their checks.
    pub async fn sidecars_serve(&self, snapshot: u64) {
        let serves = |sidecar: &Process| {
            let (_, said) = metrics::get(sidecar.admin, "/config").expect("the admin port answers");
            let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
            let models = said["models"].as_object().expect("models");
            models.values().all(|model| model["snapshot"] == snapshot)
        };
        eventually("the sidecars serve by the snapshot", READY, async || {
            self.sidecars.iter().all(serves).then_some(())
        })
        .await;
    }

    fn access_log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.access.log"))
    }

    /// The records of a process's access log so far.
    pub fn records(&self, name: &str) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.access_log(name)).unwrap_or_default();
        // The last line may be half written.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a record of a process in which a field has this value.
    pub async fn record(&self, name: &str, field: &str, value: &str) -> serde_json::Value {
        eventually(&format!("{name} logs {field} = {value}"), Duration::from_secs(5), async || {
            self.records(name).into_iter().find(|record| record[field] == value)
        })
        .await
    }
}

/// Waits until a process says that it is ready.
pub async fn wait_until_ready(process: &Process) {
    eventually(&format!("{} is ready", process.name), READY, async || {
        metrics::get(process.admin, "/readyz").is_ok_and(|(status, _)| status == 200).then_some(())
    })
    .await;
}

/// An id of the region's trust domain.
pub fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://{TRUST_DOMAIN}/{path}")).expect("a SPIFFE id")
}

/// A path of ours as text.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}
