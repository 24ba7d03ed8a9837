//! What `spillway dev` is made of beside its regions: the resources, a control node, a DNS node.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::certificates::{Certificates, Pace, of_process};
use super::region::{Backends, Region};

pub const TRUST_DOMAIN: &str = "spillway.test";
/// The name that all regions are called by.
pub const SERVICE: &str = "infer.spillway.test";
pub const MODEL: &str = "phishing";
pub const EXAMPLE_ENTITY: &str = "site-0001";
pub const CONTROL: &str = "control-0";
pub const DNS: &str = "dns-0";
/// Who gives orders.
pub const OPERATOR: &str = "operator";
/// Who may call, each with a certificate.
pub const TENANTS: [&str; 3] = ["acme", "globex", "initech"];
/// Each on an address of its own, so that all have the same port.
const REGIONS: [(&str, [u8; 4]); 3] =
    [("eu-west", [127, 0, 0, 1]), ("eu-central", [127, 0, 0, 2]), ("us-east", [127, 0, 0, 3])];
const DNS_PORT: u16 = 8053;
/// How what runs is called, while it runs.
pub const ENDPOINTS: &str = "endpoints.json";

const RESOURCES: [(&str, &str); 4] = [
    ("features.yaml", include_str!("../../dev/resources/features.yaml")),
    ("model.yaml", include_str!("../../dev/resources/model.yaml")),
    ("tenants.yaml", include_str!("../../dev/resources/tenants.yaml")),
    ("initech.yaml", include_str!("../../dev/resources/initech.yaml")),
];

pub struct Fleet {
    pub dir: PathBuf,
    pub regions: Vec<Region>,
    pub control: Member,
    /// Where those get their first certificate who have a token.
    pub bootstrap: SocketAddr,
    pub dns: Member,
    pub certificates: Certificates,
    pace: Pace,
}

/// One process.
pub struct Member {
    /// As its files are called, within `.dev`.
    pub path: String,
    pub id: String,
    pub config: PathBuf,
    /// Where it is called.
    pub address: SocketAddr,
    pub admin: SocketAddr,
}

impl Fleet {
    /// Makes the folder anew, but keeps what must not go back: the authority, whose certificates clients may hold, the
    /// control plane's store, and what processes keep.
    pub fn lay_out(dir: &Path, port: u16, pace: Pace, otlp: Option<&str>, backends: &Backends) -> Result<Self> {
        for folder in ["pki", "resources", DNS] {
            make(&dir.join(folder))?;
        }
        let mut certificates = Certificates::open(dir, &store(dir), pace)?;
        let mut ports = FreePorts::default();
        let port = match port {
            0 => ports.common()?,
            port => port,
        };
        let member = |path: &str, id: String, address, ports: &mut FreePorts| {
            let config = dir.join(format!("{path}.yaml"));
            Ok::<_, anyhow::Error>(Member { path: path.into(), id, config, address, admin: ports.take()? })
        };
        let id = |role: &str, name: &str| format!("spiffe://{TRUST_DOMAIN}/region/{}/{role}/{name}", REGIONS[0].0);
        let address = ports.take()?;
        let control = member(CONTROL, id("control", CONTROL), address, &mut ports)?;
        let bootstrap = ports.take()?;
        let address = if port == 8443 { SocketAddr::from(([127, 0, 0, 1], DNS_PORT)) } else { ports.take()? };
        let dns = member(DNS, id("dns", DNS), address, &mut ports)?;
        let mut regions = Vec::new();
        for (name, ip) in REGIONS {
            let service = SocketAddr::from((ip, port));
            ports.hold(service).with_context(|| format!("{service} is taken; --port 0 takes a free port"))?;
            regions.push(Region::lay_out(dir, name, service, &mut ports)?);
        }
        hold(&mut certificates, &regions, [&control, &dns])?;
        certificates.issue_all()?;
        // It would describe what ran before.
        let _ = std::fs::remove_file(dir.join(ENDPOINTS));
        let fleet = Self { dir: dir.to_owned(), regions, control, bootstrap, dns, certificates, pace };
        fleet.write_settings(otlp, backends)?;
        fleet.write_resources(backends)?;
        Ok(fleet)
    }

    fn write_settings(&self, otlp: Option<&str>, backends: &Backends) -> Result<()> {
        let common = |member: &Member, region: &str| {
            // Control nodes make no traces.
            let otlp = otlp.filter(|_| member.path != CONTROL);
            let files = of_process(&self.dir, &member.path);
            format!(
                "region: {region}\n\
                 identity:\n  certificate: {}\n  key: {}\n  trustBundle: {}\n  \
                 renew: {{ servers: [\"{}\"], every: {}ms }}\n\
                 admin: \"{}\"\n\
                 drainTimeout: 5s\n{}",
                quoted(&files.certificate),
                quoted(&files.key),
                quoted(&files.trust_bundle),
                self.control.address,
                self.pace.every().as_millis(),
                member.admin,
                otlp.map(|endpoint| format!("otlp: \"{endpoint}\"\n")).unwrap_or_default(),
            )
        };
        for region in &self.regions {
            region.write_settings(&common, self.control.address, backends)?;
        }
        let control = format!(
            "name: {CONTROL}\n{}listen: \"{}\"\nstore: {{ sqlite: {} }}\naudit: {}\noperators: [dev]\n\
             authority: {{ folder: {}, life: {}s, notice: {}ms, bootstrap: \"{}\" }}\n\
             health: {{ profile: dev }}\nrollout: {{ gather: 1s, canaryDwell: 1s, regionDwell: 1s, patience: 3s }}\n",
            common(&self.control, REGIONS[0].0),
            self.control.address,
            quoted(&store(&self.dir)),
            quoted(&self.dir.join(format!("{CONTROL}.audit.log"))),
            quoted(&self.dir.join("pki")),
            self.pace.life.as_secs(),
            self.pace.notice().as_millis(),
            self.bootstrap,
        );
        write(&self.control.config, &control)?;
        let dns = format!(
            "node: {DNS}\n{}listen: [\"{}\"]\nsnapshot: {}\ncontrol: {{ servers: [\"{}\"] }}\n\
             zone: {TRUST_DOMAIN}\nname: {SERVICE}\n\
             nameServers:\n  - {{ name: ns.{TRUST_DOMAIN}, addresses: [{}] }}\ncontact: hostmaster.{TRUST_DOMAIN}\n",
            common(&self.dns, REGIONS[0].0),
            self.dns.address,
            quoted(&self.dir.join(format!("{DNS}/snapshot"))),
            self.control.address,
            self.dns.address.ip(),
        );
        write(&self.dns.config, &dns)
    }

    fn write_resources(&self, backends: &Backends) -> Result<()> {
        let pools: Vec<String> = self.regions.iter().map(Region::pool).collect();
        for (name, text) in RESOURCES {
            let mut text = text.replace("pools: [scorers]", &format!("pools: [{}]", pools.join(", ")));
            if matches!(backends, Backends::Servers(_)) {
                text = text.replace("backend: onnx", "backend: triton");
            }
            write(&self.dir.join("resources").join(name), &text)?;
        }
        for region in &self.regions {
            write(&self.dir.join(format!("resources/{}.yaml", region.name)), &region.resources())?;
        }
        Ok(())
    }
}

/// Who is to have a certificate.
fn hold(certificates: &mut Certificates, regions: &[Region], nodes: [&Member; 2]) -> Result<()> {
    for region in regions {
        let gateway = &region.gateway;
        certificates.process(&gateway.path, &gateway.id, Some(region.service.ip()))?;
        for pod in &region.sidecars {
            certificates.process(&pod.path, &pod.id, None)?;
        }
        certificates.caller(&region.loader(), &region.loader_id())?;
    }
    for member in nodes {
        certificates.process(&member.path, &member.id, None)?;
    }
    certificates.caller(OPERATOR, &format!("spiffe://{TRUST_DOMAIN}/operator/dev"))?;
    for tenant in TENANTS {
        certificates.caller(tenant, &format!("spiffe://{TRUST_DOMAIN}/tenant/{tenant}/client/dev"))?;
    }
    Ok(())
}

fn store(dir: &Path) -> PathBuf {
    dir.join("control.sqlite")
}

/// Ports that nobody listens on now, each given once. They are held until all are taken, so that the
/// kernel does not hand one out twice.
#[derive(Default)]
pub struct FreePorts(Vec<TcpListener>);

impl FreePorts {
    pub fn take(&mut self) -> Result<SocketAddr> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        self.0.push(listener);
        Ok(address)
    }

    /// This one; fails if it is taken.
    fn hold(&mut self, address: SocketAddr) -> Result<()> {
        self.0.push(TcpListener::bind(address)?);
        Ok(())
    }

    /// A port that is free on the addresses of all regions; not held.
    fn common(&self) -> Result<u16> {
        const TRIES: usize = 100;
        for _ in 0..TRIES {
            let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
            if REGIONS.iter().all(|(_, ip)| TcpListener::bind((IpAddr::from(*ip), port)).is_ok()) {
                return Ok(port);
            }
        }
        bail!("no port is free on all of 127.0.0.1 to 127.0.0.{}", REGIONS.len())
    }
}

/// A path as a YAML scalar.
pub fn quoted(path: &Path) -> String {
    serde_json::Value::from(path.to_string_lossy()).to_string()
}

pub fn write(path: &Path, text: &str) -> Result<()> {
    ensure!(!text.contains('\0'), "{}: a NUL", path.display());
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

pub fn make(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use spillway_control::ControlSettings;
    use spillway_control::dns::DnsSettings;
    use spillway_gateway::GatewaySettings;
    use spillway_runtime::settings::read;
    use spillway_sidecar::SidecarSettings;

    use super::super::servers::Addresses;
    use super::*;

    #[test]
    fn each_process_can_read_its_settings() {
        spillway_runtime::tls::install_provider();
        let servers = Addresses {
            redis: SocketAddr::from(([127, 0, 0, 1], 1)),
            cassandra: "127.0.0.1:2".into(),
            triton: "http://127.0.0.1:3".into(),
        };
        let otlp = "http://127.0.0.1:4317";
        for (backends, otlp) in [(Backends::Embedded, None), (Backends::Servers(servers), Some(otlp))] {
            let folder = tempfile::tempdir().unwrap();
            let old = folder.path().join(ENDPOINTS);
            std::fs::write(&old, "{}").unwrap();
            let fleet = Fleet::lay_out(folder.path(), 0, Pace::parse("1h").unwrap(), otlp, &backends).unwrap();
            assert!(!old.exists(), "it describes what does not run any more");
            read::<ControlSettings>(&fleet.control.config).unwrap();
            read::<DnsSettings>(&fleet.dns.config).unwrap();
            for region in &fleet.regions {
                let gateway = read::<GatewaySettings>(&region.gateway.config).unwrap();
                assert_eq!(gateway.common.otlp.is_some(), otlp.is_some());
                for pod in &region.sidecars {
                    let sidecar = read::<SidecarSettings>(&pod.config).unwrap();
                    assert_eq!(sidecar.common.otlp.is_some(), otlp.is_some());
                }
            }
        }
    }
}
