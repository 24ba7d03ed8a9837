//! The proxies that are compared, each set up for the same task: mTLS h2 in, the client's SPIFFE id
//! judged, a JSON line for each call, mTLS h2 out. The templates lie in `tests/bench`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::identities::{self, Identities};
use super::message;
use super::process::{self, Process};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Spillway,
    /// Spillway with a result cache for the model.
    Caching,
    Envoy,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Spillway => "spillway",
            Self::Caching => "spillway-caching",
            Self::Envoy => "envoy",
        }
    }
}

/// Where a bench keeps its files, and what the proxies share.
#[derive(Clone, Debug)]
pub struct Setting {
    pub folder: PathBuf,
    pub identities: Identities,
    pub upstream: SocketAddr,
    /// The core that proxies are bound to.
    pub core: usize,
    /// The binary that is measured.
    pub spillway: PathBuf,
}

/// A proxy that serves; it ends with this value.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    pub pid: u32,
    folder: PathBuf,
    running: Running,
}

#[derive(Debug)]
enum Running {
    Spillway {
        _process: Process,
    },
    /// Started by its script in a session of its own. The guard kills it when its standard input ends:
    /// when this value goes, or when the bench was killed.
    Envoy {
        guard: Child,
    },
}

impl Proxy {
    pub fn start(kind: Kind, setting: &Setting) -> Result<Self> {
        let folder = setting.folder.join(kind.name());
        std::fs::create_dir_all(&folder)?;
        match kind {
            Kind::Spillway => Self::spillway(setting, folder, ""),
            Kind::Caching => Self::spillway(setting, folder, "cache: { ttl: 60s }"),
            Kind::Envoy => Self::envoy(setting, folder),
        }
    }

    fn spillway(setting: &Setting, folder: PathBuf, cache: &str) -> Result<Self> {
        let resources = setting.fill("spillway.yaml", &folder, cache)?;
        let settings = setting.fill("gateway.yaml", &folder, cache)?;
        let snapshot = folder.join("snapshot");
        let mut check = Command::new(&setting.spillway);
        check.arg("check").arg("-f").arg(&resources).arg("-o").arg(&snapshot);
        let output = check.output().with_context(|| format!("cannot run {}", setting.spillway.display()))?;
        let said = || String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "spillway check refused the resources: {}", said());
        let mut command = Command::new(&setting.spillway);
        command.arg("gateway").arg("--config").arg(&settings);
        let (process, line) = Process::start(&mut command, setting.core, &folder.join("gateway.log"))?;
        let listening: serde_json::Value =
            serde_json::from_str(&line).with_context(|| format!("not where it listens: {line}"))?;
        let address = listening["listening"]["https"].as_str().context("the gateway does not say where it listens")?;
        Ok(Self {
            address: address.parse()?,
            pid: process.id(),
            folder,
            running: Running::Spillway { _process: process },
        })
    }

    fn envoy(setting: &Setting, folder: PathBuf) -> Result<Self> {
        let config = setting.fill("envoy.yaml", &folder, "")?;
        let script = crate::root().join("tests/servers/envoy.sh");
        let guard = Command::new("setsid")
            .args(["bash", "-c", r#"read -r _; exec "$0" kill "$1""#])
            .args([&script, &folder])
            .stdin(Stdio::piped())
            .spawn()
            .context("setsid and bash are needed")?;
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut proxy = Self { address, pid: 0, folder, running: Running::Envoy { guard } };
        let mut start = Command::new(&script);
        start.arg("start").args([&proxy.folder, &config]).env("CONCURRENCY", "1").stdin(Stdio::null());
        let output = process::on_core(setting.core, || start.output())??;
        ensure!(output.status.success(), "envoy.sh: {}", String::from_utf8_lossy(&output.stderr));
        proxy.pid = std::fs::read_to_string(proxy.folder.join("envoy.pid"))?.trim().parse()?;
        let listeners = proxy.envoy_admin("/listeners")?;
        let address = listeners.lines().find_map(|line| line.strip_prefix("edge::"));
        proxy.address = address.with_context(|| format!("Envoy has no listener: {listeners}"))?.parse()?;
        Ok(proxy)
    }

    /// What Envoy's admin port answers.
    fn envoy_admin(&self, path: &str) -> Result<String> {
        let address: SocketAddr = std::fs::read_to_string(self.folder.join("admin"))?.trim().parse()?;
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.split_once("\r\n\r\n").context("no HTTP answer")?.1.to_owned())
    }

    /// Lines in the access log so far.
    pub fn logged(&self) -> Result<usize> {
        let log = std::fs::read(self.folder.join("access.log"))?;
        Ok(log.iter().filter(|byte| **byte == b'\n').count())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Running::Envoy { guard } = &mut self.running {
            // Waiting closes the guard's standard input first.
            let _ = guard.wait();
        }
        // Some hundred megabytes for each turn.
        let _ = std::fs::remove_file(self.folder.join("access.log"));
    }
}

impl Setting {
    /// Fills a template of `tests/bench` in and writes it into the folder.
    fn fill(&self, template: &str, folder: &Path, cache: &str) -> Result<PathBuf> {
        let mut text = std::fs::read_to_string(crate::root().join("tests/bench").join(template))?;
        for (name, value) in [
            ("pki", self.identities.folder().display().to_string()),
            ("folder", folder.display().to_string()),
            ("cache", cache.to_owned()),
            ("path", message::PATH.to_owned()),
            ("client", identities::CLIENT.to_owned()),
            ("upstream_id", identities::UPSTREAM.to_owned()),
            ("upstream_port", self.upstream.port().to_string()),
            ("trust_domain", identities::TRUST_DOMAIN.to_owned()),
            ("model", message::MODEL.to_owned()),
            ("input", message::INPUT.to_owned()),
            ("columns", message::COLUMNS.to_string()),
            ("output", message::OUTPUT.to_owned()),
            ("scores", message::SCORES.to_string()),
        ] {
            text = text.replace(&format!("{{{{{name}}}}}"), &value);
        }
        ensure!(!text.contains("{{"), "{template} has a place that nothing fills");
        let path = folder.join(template);
        std::fs::write(&path, text)?;
        Ok(path)
    }
}

/// The version that Envoy's binary names.
pub fn envoy_version() -> Result<String> {
    let tools = std::env::var_os("SPILLWAY_TOOLS").map_or_else(|| crate::root().join(".tools"), PathBuf::from);
    let output = Command::new(tools.join("bin/envoy"))
        .arg("--version")
        .output()
        .context("there is no Envoy; run tests/servers/install.sh envoy")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `envoy  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL`
    let version = text.split_once("version: ").and_then(|(_, rest)| rest.split('/').nth(1));
    Ok(version.context("Envoy names no version")?.to_owned())
}
