//! One region of `spillway dev`: a gateway, two sidecars, their settings and what is said of them to all others.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::fleet::{FreePorts, MODEL, Member, TRUST_DOMAIN, make, quoted, write};
use super::servers::Addresses;

const GATEWAY: &str = "gateway-0";
const PODS: [&str; 2] = ["pod-0", "pod-1"];
const READY: Duration = Duration::from_secs(30);
const ONNX: &[u8] = include_bytes!("../../dev/model/1/model.onnx");

/// Where features and models come from.
pub enum Backends {
    /// SQLite and in-process ONNX.
    Embedded,
    /// Redis, Cassandra and Triton.
    Servers(Addresses),
}

pub struct Region {
    pub name: String,
    pub dir: PathBuf,
    /// Where clients, peers and probes call it: a link that drills can break, before the gateway.
    pub service: SocketAddr,
    /// Where its processes find Redis, if there is one: a link, too.
    pub redis: SocketAddr,
    pub gateway: Member,
    pub sidecars: Vec<Member>,
}

impl Region {
    pub fn lay_out(fleet: &Path, name: &str, service: SocketAddr, ports: &mut FreePorts) -> Result<Self> {
        let dir = fleet.join(name);
        make(&dir.join(format!("models/{MODEL}/1")))?;
        std::fs::write(dir.join(format!("models/{MODEL}/1/model.onnx")), ONNX)?;
        let member = |member: &str, role: String, address, ports: &mut FreePorts| {
            let config = dir.join(format!("{member}.yaml"));
            make(&dir.join(member))?;
            let id = format!("spiffe://{TRUST_DOMAIN}/region/{name}/{role}");
            Ok::<_, anyhow::Error>(Member {
                path: format!("{name}/{member}"),
                id,
                config,
                address,
                admin: ports.take()?,
            })
        };
        let address = ports.take()?;
        let gateway = member(GATEWAY, format!("gateway/{GATEWAY}"), address, ports)?;
        let mut sidecars = Vec::new();
        for pod in PODS {
            let address = ports.take()?;
            sidecars.push(member(pod, format!("sidecar/{}/{pod}", pool(name)), address, ports)?);
        }
        Ok(Self { name: name.to_owned(), dir, service, redis: ports.take()?, gateway, sidecars })
    }

    pub fn pool(&self) -> String {
        pool(&self.name)
    }

    /// Who writes features here, as its files are called.
    pub fn loader(&self) -> String {
        loader(&self.name)
    }

    pub fn loader_id(&self) -> String {
        format!("spiffe://{TRUST_DOMAIN}/region/{}/loader/one", self.name)
    }

    /// What an operator would write of this region.
    pub fn resources(&self) -> String {
        let name = &self.name;
        let pods: String = self
            .sidecars
            .iter()
            .map(|pod| format!("    - {{ name: {}, address: \"{}\" }}\n", last(&pod.path), pod.address))
            .collect();
        format!(
            "# Written by `spillway dev`, which knows the addresses.\n\
             apiVersion: spillway/v1\nkind: Region\nmetadata: {{ name: {name} }}\nspec:\n  \
             trustDomain: {TRUST_DOMAIN}\n  weight: 100\n  capacity: 500/s\n  gateways:\n    \
             - {{ name: {GATEWAY}, address: \"{address}\" }}\n---\n\
             apiVersion: spillway/v1\nkind: Pool\nmetadata: {{ name: {pool} }}\nspec:\n  region: {name}\n  pods:\n{pods}",
            address = self.service,
            pool = self.pool(),
        )
    }

    pub fn write_settings(
        &self,
        common: &dyn Fn(&Member, &str) -> String,
        control: SocketAddr,
        backends: &Backends,
    ) -> Result<()> {
        let path = |name: &str| quoted(&self.dir.join(name));
        let node = |member: &Member| {
            let (name, shared) = (last(&member.path), common(member, &self.name));
            // What is pushed is kept in a folder of each process's own.
            let files = format!(
                "snapshot: {}\naccessLog: {}\n",
                path(&format!("{name}/snapshot")),
                path(&format!("{name}.access.log"))
            );
            format!("{shared}listen: \"{}\"\n{files}control: {{ servers: [\"{control}\"] }}\n", member.address)
        };
        let redis = match backends {
            Backends::Embedded => String::new(),
            Backends::Servers(_) => format!("redis: {{ servers: [\"{}\"] }}\n", self.redis),
        };
        let audit = path(&format!("{GATEWAY}.audit.log"));
        let gateway = format!("{}name: {GATEWAY}\nthreads: 1\naudit: {audit}\n{redis}", node(&self.gateway));
        write(&self.gateway.config, &gateway)?;
        let backends = match backends {
            // By default a read that takes 50 ms gives declared defaults; machines that people work on stand still for longer.
            Backends::Embedded => format!(
                "models: {}\nfeatures:\n  memory: 64MiB\n  sqlite: {{ path: {}, timeout: 400ms }}\n",
                path("models"),
                // One file of all regions: it stands for a database that is replicated between them.
                quoted(&self.dir.with_file_name("features.sqlite"))
            ),
            Backends::Servers(at) => format!(
                "triton: \"{}\"\nfeatures:\n  memory: 64MiB\n  redis: {{ servers: [\"{}\"] }}\n  cassandra:\n    contactPoints: [\"{}\"]\n    keyspace: spillway\n    createSchema: true\n    replicationFactor: 1\n",
                at.triton, self.redis, at.cassandra
            ),
        };
        for pod in &self.sidecars {
            let settings = format!("{}pool: {}\npod: {}\n{backends}", node(pod), self.pool(), last(&pod.path));
            write(&pod.config, &settings)?;
        }
        Ok(())
    }
}

impl Member {
    /// Returns when it says that it is ready.
    pub async fn wait_until_ready(&self) -> Result<()> {
        let end = Instant::now() + READY;
        while Instant::now() < end {
            if is_ready(self.admin).await {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (seconds, log) = (READY.as_secs(), self.config.with_extension("log"));
        bail!("{} is not ready after {seconds} s; {} says why", self.path, log.display())
    }
}

/// The identity's files of who writes features in a region.
pub fn loader(region: &str) -> String {
    format!("{region}/loader")
}

fn pool(region: &str) -> String {
    format!("scorers-{region}")
}

/// `pod-0` of `eu-west/pod-0`.
fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
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
