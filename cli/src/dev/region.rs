//! What a dev region is made of: a folder with certificates, resources, settings files and a snapshot.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::resource::{self, Fault};
use spillway_core::snapshot::Snapshot;
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::file::write_atomic;
use spillway_runtime::snapshot;
use spillway_runtime::tls::IdentitySettings;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::servers::Addresses;

pub const REGION: &str = "eu-west";
pub const MODEL: &str = "phishing";
pub const EXAMPLE_ENTITY: &str = "site-0001";
const TRUST_DOMAIN: &str = "spillway.test";
const POOL: &str = "scorers";
const GATEWAY: &str = "gateway-0";
/// Who may call, each with a certificate.
pub const TENANTS: [&str; 3] = ["acme", "globex", "initech"];
/// Who writes features.
pub const LOADER: &str = "loader";
const PODS: [&str; 2] = ["pod-0", "pod-1"];
const LIFE: Duration = Duration::from_secs(3_600);
/// Clients are people at a keyboard: theirs live a day.
const CLIENT_LIFE: Duration = Duration::from_secs(86_400);
const READY: Duration = Duration::from_secs(30);

const ONNX: &[u8] = include_bytes!("../../dev/model/1/model.onnx");
const RESOURCES: [(&str, &str); 5] = [
    ("region.yaml", include_str!("../../dev/resources/region.yaml")),
    ("features.yaml", include_str!("../../dev/resources/features.yaml")),
    ("model.yaml", include_str!("../../dev/resources/model.yaml")),
    ("tenants.yaml", include_str!("../../dev/resources/tenants.yaml")),
    ("initech.yaml", include_str!("../../dev/resources/initech.yaml")),
];

/// Where features and models come from.
pub enum Backends {
    /// SQLite and in-process ONNX.
    Embedded,
    /// Redis, Cassandra and Triton.
    Servers(Addresses),
}

pub struct Region {
    pub dir: PathBuf,
    pub gateway: Member,
    pub sidecars: Vec<Member>,
    authority: Authority,
}

/// One process of the region.
pub struct Member {
    pub name: String,
    pub id: String,
    pub config: PathBuf,
    /// Where it is called.
    pub address: SocketAddr,
    pub admin: SocketAddr,
}

impl Region {
    /// Makes the folder anew, but keeps an authority that is there: clients may hold its certificates.
    pub fn lay_out(dir: &Path, port: u16, otlp: Option<&str>, backends: &Backends) -> Result<Self> {
        for folder in ["pki", "resources", &format!("models/{MODEL}/1")] {
            let folder = dir.join(folder);
            std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        std::fs::write(dir.join(format!("models/{MODEL}/1/model.onnx")), ONNX)?;
        let authority = authority(&dir.join("pki"))?;
        let mut ports = FreePorts::default();
        let gateway_address = match port {
            0 => ports.take()?,
            port => {
                let address = SocketAddr::from(([127, 0, 0, 1], port));
                TcpListener::bind(address)
                    .with_context(|| format!("port {port} is taken; --port 0 takes a free one"))?;
                address
            }
        };
        let member = |name: &str, id: String, address, ports: &mut FreePorts| {
            let config = dir.join(format!("{name}.yaml"));
            Ok::<_, anyhow::Error>(Member { name: name.into(), id, config, address, admin: ports.take()? })
        };
        let id = format!("spiffe://{TRUST_DOMAIN}/region/{REGION}/gateway/{GATEWAY}");
        let gateway = member(GATEWAY, id, gateway_address, &mut ports)?;
        let mut sidecars = Vec::new();
        for pod in PODS {
            let address = ports.take()?;
            sidecars.push(member(pod, sidecar_id(pod), address, &mut ports)?);
        }
        let region = Self { dir: dir.to_owned(), gateway, sidecars, authority };
        region.issue_all()?;
        region.write_settings(otlp, backends)?;
        region.write_snapshot(backends)?;
        Ok(region)
    }

    /// New leaves for all, under the same names: every process notices and swaps.
    pub fn renew_certificates(&self) -> Result<()> {
        self.issue_all()?;
        eprintln!("certificates renewed");
        Ok(())
    }

    /// Returns when the gateway says that it is ready.
    pub async fn wait_until_ready(&self) -> Result<()> {
        let end = Instant::now() + READY;
        while Instant::now() < end {
            if is_ready(self.gateway.admin).await {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("the gateway is not ready after {} s; {}/*.log say why", READY.as_secs(), self.dir.display())
    }

    fn issue_all(&self) -> Result<()> {
        let issue = |name: &str, id: &str, life, dialled: bool| -> Result<()> {
            let request = LeafRequest::new(SpiffeId::parse(id)?, life);
            let request = if dialled { request.dialled_locally() } else { request };
            let files = identity(&self.dir, name);
            Ok(self.authority.issue(&request)?.save(files.certificate, files.key)?)
        };
        issue(&self.gateway.name, &self.gateway.id, LIFE, true)?;
        for pod in &self.sidecars {
            issue(&pod.name, &pod.id, LIFE, false)?;
        }
        issue(LOADER, &format!("spiffe://{TRUST_DOMAIN}/region/{REGION}/control/{LOADER}"), LIFE, false)?;
        for tenant in TENANTS {
            issue(tenant, &format!("spiffe://{TRUST_DOMAIN}/tenant/{tenant}/client/dev"), CLIENT_LIFE, false)?;
        }
        Ok(())
    }

    fn write_settings(&self, otlp: Option<&str>, backends: &Backends) -> Result<()> {
        let path = |name: &str| quoted(&self.dir.join(name));
        let common = |member: &Member| {
            let files = identity(&self.dir, &member.name);
            format!(
                "region: {REGION}\n\
                 identity:\n  certificate: {}\n  key: {}\n  trustBundle: {}\n\
                 snapshot: {}\n\
                 listen: \"{}\"\n\
                 admin: \"{}\"\n\
                 accessLog: {}\n\
                 drainTimeout: 5s\n{}",
                quoted(&files.certificate),
                quoted(&files.key),
                quoted(&files.trust_bundle),
                path("snapshot"),
                member.address,
                member.admin,
                path(&format!("{}.access.log", member.name)),
                otlp.map(|endpoint| format!("otlp: \"{endpoint}\"\n")).unwrap_or_default(),
            )
        };
        let redis = match backends {
            Backends::Embedded => String::new(),
            Backends::Servers(at) => format!("redis: {{ servers: [\"{}\"] }}\n", at.redis),
        };
        let audit = path(&format!("{GATEWAY}.audit.log"));
        let gateway = format!("{}name: {GATEWAY}\nthreads: 1\naudit: {audit}\n{redis}", common(&self.gateway));
        write(&self.gateway.config, &gateway)?;
        let backends = match backends {
            // By default a read that takes 50 ms gives declared defaults; machines that people work on stand still for longer.
            Backends::Embedded => format!(
                "models: {}\nfeatures:\n  memory: 64MiB\n  sqlite: {{ path: {}, timeout: 400ms }}\n",
                path("models"),
                path("features.sqlite")
            ),
            Backends::Servers(at) => format!(
                "triton: \"{}\"\nfeatures:\n  memory: 64MiB\n  redis: {{ servers: [\"{}\"] }}\n  cassandra:\n    contactPoints: [\"{}\"]\n    keyspace: spillway\n    createSchema: true\n    replicationFactor: 1\n",
                at.triton, at.redis, at.cassandra
            ),
        };
        for pod in &self.sidecars {
            write(&pod.config, &format!("{}pool: {POOL}\npod: {}\n{backends}", common(pod), pod.name))?;
        }
        Ok(())
    }

    fn write_snapshot(&self, backends: &Backends) -> Result<()> {
        let mut resources = Vec::new();
        let pods: String = self
            .sidecars
            .iter()
            .map(|pod| format!("    - {{ name: {}, address: \"{}\" }}\n", pod.name, pod.address))
            .collect();
        let pool = format!(
            "apiVersion: spillway/v1\nkind: Pool\nmetadata: {{ name: {POOL} }}\nspec:\n  region: {REGION}\n  pods:\n{pods}"
        );
        let files = RESOURCES.iter().map(|(name, text)| (*name, (*text).to_owned())).chain([("pool.yaml", pool)]);
        for (name, text) in files {
            let text = match backends {
                Backends::Embedded => text,
                Backends::Servers(_) => text.replace("backend: onnx", "backend: triton"),
            };
            write(&self.dir.join("resources").join(name), &text)?;
            resources.extend(resource::parse(&text).map_err(|faults| told(name, &faults))?);
        }
        let file = self.dir.join("snapshot");
        // A snapshot never goes back, also not across runs.
        let version =
            std::fs::read(&file).ok().and_then(|bytes| snapshot::open(&bytes).ok()).map_or(1, |s| s.version + 1);
        Snapshot::compile(version, &resources).map_err(|faults| told("resources", &faults))?;
        write_atomic(&file, &snapshot::seal(&resources, version), 0o644)
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The files of one workload or client in the folder of a region.
pub fn identity(dir: &Path, name: &str) -> IdentitySettings {
    let pki = dir.join("pki");
    IdentitySettings {
        certificate: pki.join(format!("{name}.pem")),
        key: pki.join(format!("{name}.key")),
        trust_bundle: pki.join("trust-bundle.pem"),
    }
}

pub fn sidecar_id(pod: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/region/{REGION}/sidecar/{POOL}/{pod}")
}

/// The authority in a folder, or a new one.
fn authority(folder: &Path) -> Result<Authority> {
    if folder.join("root.key").exists() {
        return Authority::load(folder)
            .with_context(|| format!("{} holds a broken authority; remove it", folder.display()));
    }
    let authority = Authority::create(TrustDomain::parse(TRUST_DOMAIN)?)?;
    authority.save(folder)?;
    Ok(authority)
}

/// Ports that nobody listens on now, each given once. They are held until all are taken, so that the
/// kernel does not hand one out twice.
#[derive(Default)]
struct FreePorts(Vec<TcpListener>);

impl FreePorts {
    fn take(&mut self) -> Result<SocketAddr> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        self.0.push(listener);
        Ok(address)
    }
}

async fn is_ready(admin: SocketAddr) -> bool {
    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(admin).await?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.take(64).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer.starts_with(b"HTTP/1.1 200"))
    };
    matches!(tokio::time::timeout(Duration::from_secs(1), ask).await, Ok(Ok(true)))
}

fn told(what: &str, faults: &[Fault]) -> anyhow::Error {
    let lines: Vec<String> = faults.iter().map(|fault| format!("{what}:{}: {fault}", fault.line)).collect();
    anyhow::anyhow!("{}", lines.join("\n"))
}

/// A path as a YAML scalar.
fn quoted(path: &Path) -> String {
    serde_json::Value::from(path.to_string_lossy()).to_string()
}

fn write(path: &Path, text: &str) -> Result<()> {
    ensure!(!text.contains('\0'), "{}: a NUL", path.display());
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
