//! Three regions, their control nodes and DNS nodes, all on this machine.
//!
//! Each region has an IP address of its own and all the same port, so that DNS alone says where clients go.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use spillway_core::identity::TrustDomain;
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::tls::IdentitySettings;

use super::client::Client;
use super::process::{Process, spillway, spillway_ok};
use super::region::{TRUST_DOMAIN, id, text, wait_until_ready};
use super::run_folder::RunFolder;
use super::servers::Server;
use super::{eventually, ports};

pub const SERVICE: &str = "infer.spillway.test";
pub const REGIONS: [&str; 3] = ["eu-west", "eu-central", "us-east"];
const LIFE: Duration = Duration::from_secs(3_600);

/// What control nodes keep their intent in.
pub enum Store {
    /// A SQLite file: one control node.
    Sqlite,
    /// A real etcd of three members: this many control nodes.
    Etcd(Server, usize),
}

/// Laid out by [`Fleet::new`], changed at will, run by [`Fleet::start`].
pub struct Fleet {
    pub regions: Vec<Site>,
    pub controls: Vec<Node>,
    pub dns: Vec<Node>,
    pub store: Store,
    pub authority: Authority,
    /// The gateways' port.
    pub port: u16,
    /// Settings added to those of all control nodes; at first a rollout without long waits.
    pub control_settings: String,
    pub gateway_settings: String,
    leaves: Option<Leaves>,
    /// Resource files by name.
    pub resources: BTreeMap<String, String>,
    /// Dropped last.
    pub folder: RunFolder,
}

/// Of processes, which renew them at the control nodes.
#[derive(Clone, Copy)]
struct Leaves {
    life: Duration,
    /// How often the trust bundle is asked for.
    every: Duration,
}

/// One region.
pub struct Site {
    pub name: &'static str,
    pub gateways: Vec<Node>,
    pub sidecars: Vec<Node>,
}

/// A process that may be dead.
pub struct Node {
    /// As its files are called.
    pub name: String,
    pub kind: &'static str,
    /// The path of its SPIFFE id.
    pub id: String,
    pub listen: SocketAddr,
    pub process: Option<Process>,
    settings: String,
}

impl Node {
    pub fn process(&self) -> &Process {
        self.process.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name))
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }
}

impl Site {
    /// SIGKILL to all of it at once.
    pub fn kill(&mut self) {
        for node in self.gateways.iter_mut().chain(&mut self.sidecars) {
            node.kill();
        }
    }

    pub fn address(&self) -> IpAddr {
        self.gateways[0].listen.ip()
    }
}

impl Fleet {
    /// Three regions of a gateway and a sidecar each, and a DNS node.
    pub fn new(name: &str, store: Store) -> Self {
        let folder = RunFolder::new(name);
        let authority = Authority::create(TrustDomain::parse(TRUST_DOMAIN).expect("a trust domain")).expect("keys");
        let port = ports::free();
        let mut fleet = Self {
            regions: Vec::new(),
            controls: Vec::new(),
            dns: Vec::new(),
            store,
            authority,
            port,
            control_settings: "rollout: { gather: 2s, canaryDwell: 500ms, regionDwell: 500ms }\n".into(),
            gateway_settings: String::new(),
            leaves: None,
            resources: BTreeMap::new(),
            folder,
        };
        let controls = match &fleet.store {
            Store::Sqlite => 1,
            Store::Etcd(_, nodes) => *nodes,
        };
        for index in 0..controls {
            fleet.controls.push(node(
                &format!("control-{index}"),
                "control",
                "eu-west",
                "control",
                ports::local(ports::free()),
            ));
        }
        fleet.add_dns();
        for (index, region) in (1..).zip(REGIONS) {
            let ip = Ipv4Addr::new(127, 0, 0, index);
            let at = |role: &str, name: &str, address| {
                node(&format!("{region}.{name}"), kind_of(role), region, role, address)
            };
            fleet.regions.push(Site {
                name: region,
                gateways: vec![at("gateway", "gateway-0", (ip, port).into())],
                sidecars: vec![at(&format!("sidecar/scorers-{region}"), "pod-0", ports::local(ports::free()))],
            });
        }
        fleet.write_resources();
        for (name, path) in [("operator", "operator/test"), ("acme", "tenant/acme/client/web")] {
            fleet.issue(name, path, &[]);
        }
        for region in REGIONS {
            fleet.issue(&format!("{region}.loader"), &format!("region/{region}/loader/one"), &[]);
        }
        fleet
    }

    /// One more DNS node.
    pub fn add_dns(&mut self) {
        let name = format!("dns-{}", self.dns.len());
        self.dns.push(node(&name, "dns", "eu-west", "dns", ports::local(ports::free())));
    }

    /// Has the control nodes issue the leaves of all processes, from the folder `authority`. To be called before the start.
    pub fn renew(&mut self, life: Duration, notice: Duration) {
        let folder = self.folder.join("authority");
        self.authority.save(&folder).expect("a folder");
        writeln!(
            self.control_settings,
            "authority: {{ folder: {}, life: {}ms, notice: {}ms }}",
            folder.display(),
            life.as_millis(),
            notice.as_millis()
        )
        .expect("memory");
        self.leaves = Some(Leaves { life, every: notice / 4 });
    }

    fn write_resources(&mut self) {
        let dev = crate::root().join("cli/dev/resources");
        for name in ["features.yaml", "model.yaml", "tenants.yaml"] {
            let text = std::fs::read_to_string(dev.join(name)).expect("a dev resource");
            let plain = text.split_once("  # Under trouble").map_or(text.as_str(), |(plain, _)| plain);
            let pools = REGIONS.map(|region| format!("scorers-{region}")).join(", ");
            self.resources.insert(name.into(), plain.replace("pools: [scorers]", &format!("pools: [{pools}]")));
        }
        for site in &self.regions {
            let mut text = format!(
                "apiVersion: spillway/v1\nkind: Region\nmetadata: {{ name: {} }}\nspec:\n  trustDomain: {TRUST_DOMAIN}\n  gateways:\n",
                site.name
            );
            for gateway in &site.gateways {
                writeln!(text, "    - {{ name: {}, address: \"{}\" }}", last(&gateway.id), gateway.listen)
                    .expect("memory");
            }
            writeln!(
                text,
                "---\napiVersion: spillway/v1\nkind: Pool\nmetadata: {{ name: scorers-{0} }}\nspec:\n  region: {0}\n  pods:",
                site.name
            )
            .expect("memory");
            for pod in &site.sidecars {
                writeln!(text, "    - {{ name: {}, address: \"{}\" }}", last(&pod.id), pod.listen).expect("memory");
            }
            self.resources.insert(format!("{}.yaml", site.name), text);
        }
    }

    /// Replaces text in a resource; it must be there.
    pub fn edit(&mut self, file: &str, from: &str, to: &str) {
        let text = self.resources.get_mut(file).unwrap_or_else(|| panic!("no resource file {file}"));
        assert!(text.contains(from), "{from:?} is not in {file}");
        *text = text.replace(from, to);
    }

    /// Control nodes, resources, DNS nodes, sidecars, features, gateways, in this order; back when all are ready.
    pub async fn start(&mut self) {
        for index in 0..self.controls.len() {
            self.start_control(index);
        }
        self.apply("first").await;
        self.write_node_settings();
        for node in &mut self.dns {
            start(&self.folder, node);
        }
        // All of them before anything is waited for: where gateways are seconds late, their region is judged to be down.
        for site in &mut self.regions {
            for node in site.sidecars.iter_mut().chain(&mut site.gateways) {
                start(&self.folder, node);
            }
        }
        for site in &self.regions {
            wait_until_ready(site.sidecars[0].process()).await;
            self.load_features(site);
        }
        for site in &self.regions {
            wait_until_ready(site.gateways[0].process()).await;
        }
    }

    /// Starts a control node, again or for the first time.
    pub fn start_control(&mut self, index: usize) {
        let store = match &self.store {
            Store::Sqlite => format!("sqlite: {}", self.folder.join("control.sqlite").display()),
            Store::Etcd(etcd, _) => super::servers::etcd_settings(etcd),
        };
        let node = &self.controls[index];
        let settings = format!(
            "{}name: {}\nlisten: \"{}\"\nstore: {{ {store} }}\noperators: [test]\nhealth: {{ profile: dev }}\n{}",
            self.common(node, "eu-west"),
            last(&node.id),
            node.listen,
            self.control_settings,
        );
        let node = &mut self.controls[index];
        node.settings = settings;
        start(&self.folder, node);
    }

    /// Starts a node that was killed, with the files that it had.
    pub fn restart(&mut self, region: &str) {
        let site = self.regions.iter_mut().find(|site| site.name == region).expect("a region");
        for node in site.sidecars.iter_mut().chain(&mut site.gateways) {
            if node.process.is_none() {
                start(&self.folder, node);
            }
        }
    }

    fn write_node_settings(&mut self) {
        let servers: Vec<String> = self.controls.iter().map(|node| format!("\"{}\"", node.listen)).collect();
        let follows = |name: &str| {
            std::fs::create_dir_all(self.folder.join(name)).expect("a folder");
            format!(
                "snapshot: {}\ncontrol: {{ servers: [{}] }}\n",
                self.folder.join(name).join("snapshot").display(),
                servers.join(", ")
            )
        };
        let mut settings = Vec::new();
        for node in &self.dns {
            settings.push(format!(
                "{}node: {}\nlisten: [\"{}\"]\n{}zone: {TRUST_DOMAIN}\nname: {SERVICE}\nnameServers: [{{ name: ns.{TRUST_DOMAIN}, addresses: [127.0.0.1] }}]\ncontact: hostmaster.{TRUST_DOMAIN}\n",
                self.common(node, "eu-west"),
                last(&node.id),
                node.listen,
                follows(&node.name),
            ));
        }
        let models = crate::root().join("cli/dev/model");
        let folder = self.folder.join("models/phishing/1");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::copy(models.join("1/model.onnx"), folder.join("model.onnx")).expect("the model");
        for site in &self.regions {
            for pod in &site.sidecars {
                settings.push(format!(
                    "{}listen: \"{}\"\n{}accessLog: {}\npool: scorers-{}\npod: {}\nmodels: {}\nfeatures:\n  memory: 64MiB\n  sqlite: {{ path: {}, timeout: 400ms }}\n",
                    self.common(pod, site.name),
                    pod.listen,
                    follows(&pod.name),
                    self.folder.join(format!("{}.access.log", pod.name)).display(),
                    site.name,
                    last(&pod.id),
                    self.folder.join("models").display(),
                    self.folder.join(format!("{}.sqlite", site.name)).display(),
                ));
            }
            for gateway in &site.gateways {
                settings.push(format!(
                    "{}listen: \"{}\"\n{}accessLog: {}\nname: {}\n{}",
                    self.common(gateway, site.name),
                    gateway.listen,
                    follows(&gateway.name),
                    self.folder.join(format!("{}.access.log", gateway.name)).display(),
                    last(&gateway.id),
                    self.gateway_settings,
                ));
            }
        }
        let sites = self.regions.iter_mut().flat_map(|site| site.sidecars.iter_mut().chain(&mut site.gateways));
        for (node, settings) in self.dns.iter_mut().chain(sites).zip(settings) {
            node.settings = settings;
        }
    }

    fn common(&self, node: &Node, region: &str) -> String {
        let life = self.leaves.map_or(LIFE, |leaves| leaves.life);
        let files = self.issue_for(life, &node.name, &node.id, &[node.listen.ip()]);
        let renew = self.leaves.map_or_else(String::new, |leaves| {
            let servers: Vec<String> = self.controls.iter().map(|node| format!("\"{}\"", node.listen)).collect();
            format!("  renew: {{ servers: [{}], every: {}ms }}\n", servers.join(", "), leaves.every.as_millis())
        });
        format!(
            "region: {region}\nidentity:\n  certificate: {}\n  key: {}\n  trustBundle: {}\n{renew}admin: \"127.0.0.1:0\"\ndrainTimeout: 10s\n",
            files.certificate.display(),
            files.key.display(),
            files.trust_bundle.display(),
        )
    }

    /// A leaf in a folder of its own; `path` is that of the SPIFFE id.
    pub fn issue(&self, name: &str, path: &str, dialled: &[IpAddr]) -> IdentitySettings {
        self.issue_for(LIFE, name, path, dialled)
    }

    fn issue_for(&self, life: Duration, name: &str, path: &str, dialled: &[IpAddr]) -> IdentitySettings {
        let mut request = LeafRequest::new(id(path), life).dialled_locally();
        request.dns_names.push(SERVICE.into());
        request.addresses.extend(dialled.iter().filter(|ip| **ip != IpAddr::from(Ipv4Addr::LOCALHOST)));
        let leaf = self.authority.issue(&request).expect("a leaf");
        leaf.save_workload(self.folder.join("pki").join(name), self.authority.trust_bundle()).expect("a folder")
    }

    pub fn identity(&self, name: &str) -> IdentitySettings {
        let folder = self.folder.join("pki").join(name);
        IdentitySettings {
            certificate: folder.join("certificate.pem"),
            key: folder.join("key.pem"),
            trust_bundle: folder.join("trust-bundle.pem"),
        }
    }

    /// Runs a command as the operator, at the first control node that runs.
    pub fn operator(&self, arguments: &[&str]) -> Output {
        let control = self.controls.iter().find(|node| node.process.is_some()).unwrap_or(&self.controls[0]);
        self.operator_at(control, arguments)
    }

    /// Runs a command as the operator, at this control node.
    pub fn operator_at(&self, control: &Node, arguments: &[&str]) -> Output {
        let address = control.listen.to_string();
        let files = self.identity("operator");
        spillway(&[arguments, &["--control", &address], &as_options(&files)].concat())
    }

    pub fn operator_ok(&self, arguments: &[&str]) -> String {
        let output = self.operator(arguments);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {stdout}{stderr}");
        stdout.into_owned()
    }

    /// Writes the resources and applies them, when there is a leader.
    pub async fn apply(&self, message: &str) {
        let folder = self.write_files();
        eventually("the resources are applied", Duration::from_secs(30), async || {
            let output = self.operator(&["apply", "-f", text(&folder), "-m", message]);
            if !output.status.success() {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            output.status.success().then_some(())
        })
        .await;
    }

    /// The folder of the resources as they are now.
    pub fn write_files(&self) -> PathBuf {
        let folder = self.folder.join("resources");
        std::fs::create_dir_all(&folder).expect("a folder");
        for (name, text) in &self.resources {
            std::fs::write(folder.join(name), text).expect("a resource is written");
        }
        folder
    }

    /// `spillway status -o json`.
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.operator_ok(&["status", "-o", "json"])).expect("JSON")
    }

    /// The same, to be asked again where nobody answers now.
    pub fn try_status(&self) -> Option<serde_json::Value> {
        let output = self.operator(&["status", "-o", "json"]);
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
    }

    fn load_features(&self, site: &Site) {
        let pod = &site.sidecars[0];
        let files = self.identity(&format!("{}.loader", site.name));
        for group in ["site", "page"] {
            // A copy: the loader keeps its progress beside the file.
            let copy = self.folder.join(format!("{}.{group}.csv", site.name));
            std::fs::copy(crate::root().join(format!("cli/dev/model/{group}.csv")), &copy).expect("a copy");
            let (address, id) = (pod.listen.to_string(), id(&pod.id).to_string());
            let load = ["features", "load", "--group", group, text(&copy), "--sidecar", &address, "--sidecar-id", &id];
            spillway_ok(&[&load[..], &as_options(&files)].concat());
        }
    }

    /// A client of a tenant at a region's gateway.
    pub fn client(&self, tenant: &str, region: &str) -> Client {
        Client::new(self.region(region).gateways[0].listen, &self.identity(tenant))
    }

    pub fn region(&self, name: &str) -> &Site {
        self.regions.iter().find(|site| site.name == name).expect("a region")
    }

    pub fn region_mut(&mut self, name: &str) -> &mut Site {
        self.regions.iter_mut().find(|site| site.name == name).expect("a region")
    }

    /// The region whose gateways have this address.
    pub fn region_at(&self, address: IpAddr) -> &'static str {
        self.regions.iter().find(|site| site.address() == address).expect("an address of a region").name
    }
}

/// The options of a command that say who asks.
pub fn as_options(files: &IdentitySettings) -> [&str; 6] {
    let IdentitySettings { certificate, key, trust_bundle } = files;
    ["--certificate", text(certificate), "--key", text(key), "--trust-bundle", text(trust_bundle)]
}

fn kind_of(role: &str) -> &'static str {
    if role == "gateway" { "gateway" } else { "sidecar" }
}

fn node(name: &str, kind: &'static str, region: &str, role: &str, listen: SocketAddr) -> Node {
    let own = name.rsplit('.').next().unwrap_or(name);
    let id = format!("region/{region}/{role}/{own}");
    Node { name: name.into(), kind, id, listen, process: None, settings: String::new() }
}

fn start(folder: &RunFolder, node: &mut Node) {
    let config = folder.join(format!("{}.yaml", node.name));
    std::fs::write(&config, &node.settings).expect("settings are written");
    node.process = Some(Process::start(&node.name, node.kind, &config));
}

fn last(id: &str) -> &str {
    id.rsplit('/').next().unwrap_or(id)
}
