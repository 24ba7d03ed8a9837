//! The proxies that are compared, each set up as it is for this job: mTLS in, the client's SPIFFE id judged for
//! the path, a rate limit that is never reached, a JSON line for each call, mTLS out. The templates lie in `tests/bench`.
//!
//! The rule: what one of them checks, all check as well as they can; where one cannot, its template says so.

pub mod envoy;
mod haproxy;
mod nginx;
mod spillway;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::identities::{self, Identities};
use super::message::{self, grpc, rest};
use super::process::{self, Process};
use super::results::Results;
pub use envoy::version as envoy_version;

/// How long a proxy may take until it serves.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// What each of them writes of a call that it answered.
const OK: &[u8] = br#""status":200"#;
/// How long its log may be behind: Envoy and nginx write blocks, at the latest after 1 s.
const LOGGED_WITHIN: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Kind {
    Spillway,
    /// Spillway with a result cache for the model.
    Caching,
    Envoy,
    /// Envoy that answers itself, always the same.
    EnvoyConstant,
    Haproxy,
    /// HAProxy that answers itself, always the same.
    HaproxyConstant,
    Nginx,
}

impl Kind {
    /// Its name on the command line, in files and in figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Spillway => "spillway",
            Self::Caching => "caching",
            Self::Envoy => "envoy",
            Self::EnvoyConstant => "envoy-constant",
            Self::Haproxy => "haproxy",
            Self::HaproxyConstant => "haproxy-constant",
            Self::Nginx => "nginx",
        }
    }

    /// What it answers itself has no trailers.
    pub fn has_no_trailers(self) -> bool {
        matches!(self, Self::EnvoyConstant | Self::HaproxyConstant)
    }

    /// Its name for people, with its version.
    pub fn title(self) -> Result<String> {
        Ok(match self {
            Self::Spillway | Self::Caching => "Spillway".to_owned(),
            Self::Envoy | Self::EnvoyConstant => format!("Envoy {}", envoy::version()?),
            Self::Haproxy | Self::HaproxyConstant => format!("HAProxy {}", haproxy::version()?),
            Self::Nginx => format!("nginx {}", nginx::version()?),
        })
    }
}

/// Writes down beside whom Spillway is measured.
pub fn record_versions(results: &mut Results) -> Result<()> {
    results.peer("Envoy", &envoy::version()?);
    results.peer("HAProxy", &haproxy::version()?);
    results.peer("nginx", &nginx::version()?);
    Ok(())
}

/// Where a bench keeps its files, and what the proxies share.
#[derive(Clone, Debug)]
pub struct Setting {
    pub folder: PathBuf,
    pub identities: Identities,
    pub upstream: SocketAddr,
    /// The cores that proxies are bound to.
    pub cores: Vec<usize>,
    /// Their worker threads.
    pub threads: usize,
    /// The binary that is measured.
    pub spillway: PathBuf,
}

/// A proxy that serves; it ends with this value.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    /// The process that does the work, whose CPU time and memory are counted.
    pub pid: u32,
    folder: PathBuf,
    _running: Running,
}

/// What ends the process when it goes.
#[derive(Debug)]
#[expect(dead_code, reason = "held for their drop")]
enum Running {
    Process(Process),
    Envoy(envoy::Envoy),
    Foreground(Foreground),
}

impl Proxy {
    pub fn start(kind: Kind, setting: &Setting) -> Result<Self> {
        let folder = setting.folder.join(kind.name());
        std::fs::create_dir_all(&folder)?;
        match kind {
            Kind::Spillway => spillway::start(setting, folder, ""),
            Kind::Caching => spillway::start(setting, folder, "cache: { ttl: 60s }"),
            Kind::Envoy => Self::envoy(setting, folder, false),
            Kind::EnvoyConstant => Self::envoy(setting, folder, true),
            Kind::Haproxy => haproxy::start(setting, folder, false),
            Kind::HaproxyConstant => haproxy::start(setting, folder, true),
            Kind::Nginx => nginx::start(setting, folder),
        }
    }

    fn envoy(setting: &Setting, folder: PathBuf, constant: bool) -> Result<Self> {
        let config = envoy::config(setting, &folder, constant)?;
        let envoy = envoy::start(&folder, &config, &setting.cores, setting.threads)?;
        Ok(Self { address: envoy.address, pid: envoy.pid, folder, _running: Running::Envoy(envoy) })
    }

    /// Waits until the access log has a line with status 200 for each of `calls`.
    pub fn await_log(&self, calls: u64) -> Result<()> {
        let (path, end) = (self.folder.join("access.log"), Instant::now() + LOGGED_WITHIN);
        loop {
            let mut lines = 0;
            let log = std::fs::File::open(&path).with_context(|| format!("there is no log: {}", path.display()))?;
            for line in BufReader::new(log).split(b'\n') {
                lines += u64::from(contains(&line?, OK));
            }
            if lines >= calls {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{calls} calls were answered, but only {lines} are in the access log");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn contains(line: &[u8], part: &[u8]) -> bool {
    line.windows(part.len()).any(|window| window == part)
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Some hundred megabytes for each turn. Its process may still write: the file goes when that ends.
        let _ = std::fs::remove_file(self.folder.join("access.log"));
    }
}

/// A server that stays in the foreground. The kernel ends it when the bench is killed.
#[derive(Debug)]
struct Foreground(Child);

impl Foreground {
    /// Starts it on some cores and waits until it takes connections at the address, which was free before.
    fn start(
        name: &str,
        arguments: &[&str],
        output: Stdio,
        errors: &Path,
        cores: &[usize],
        address: SocketAddr,
    ) -> Result<Self> {
        let mut start = Command::new("setpriv");
        let errors_file = std::fs::OpenOptions::new().create(true).append(true).open(errors)?;
        start.args(["--pdeathsig", "TERM", "--"]).arg(tool(name)).args(arguments);
        start.stdin(Stdio::null()).stdout(output).stderr(errors_file);
        let child = process::on_cores(cores, || start.spawn())?.context("setpriv is needed")?;
        let (mut server, end) = (Self(child), Instant::now() + READY_WITHIN);
        while TcpStream::connect(address).is_err() {
            let said = || std::fs::read_to_string(errors).unwrap_or_default();
            if let Some(status) = server.0.try_wait()? {
                bail!("{} ended, {status}: {}", name, said());
            }
            ensure!(Instant::now() < end, "{} was not ready in time: {}", name, said());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        // With SIGTERM it takes its workers along; SIGKILL would leave them behind.
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

/// A program that `tests/servers/install.sh` put there.
fn tool(name: &str) -> PathBuf {
    let tools = std::env::var_os("SPILLWAY_TOOLS").map_or_else(|| crate::root().join(".tools"), PathBuf::from);
    tools.join("bin").join(name)
}

/// What a program says of its version, on either output.
fn said(name: &str, option: &str) -> Result<String> {
    let output = Command::new(tool(name)).arg(option).output();
    let output = output.with_context(|| format!("there is no {name}; run tests/servers/install.sh {name}"))?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// An address on loopback that nobody listens on, for servers that take no port 0.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?.local_addr()?)
}

impl Setting {
    /// Fills a template of `tests/bench` in and writes it into the folder.
    fn fill(&self, template: &str, folder: &Path, more: &[(&str, &str)]) -> Result<PathBuf> {
        let mut text = std::fs::read_to_string(crate::root().join("tests/bench").join(template))?;
        let places = [
            ("pki", self.identities.folder().display().to_string()),
            ("folder", folder.display().to_string()),
            ("threads", self.threads.to_string()),
            ("path", grpc::PATH.to_owned()),
            ("rest_path", rest::PATH.to_owned()),
            ("client", identities::CLIENT.to_owned()),
            ("upstream_id", identities::UPSTREAM.to_owned()),
            ("upstream_port", self.upstream.port().to_string()),
            ("trust_domain", identities::TRUST_DOMAIN.to_owned()),
            ("model", message::MODEL.to_owned()),
            ("input", message::INPUT.to_owned()),
            ("columns", message::COLUMNS.to_string()),
            ("output", message::OUTPUT.to_owned()),
            ("scores", message::SCORES.to_string()),
        ];
        let shared = places.iter().map(|(name, value)| (*name, value.as_str()));
        for (name, value) in more.iter().copied().chain(shared) {
            text = text.replace(&format!("{{{{{name}}}}}"), value);
        }
        ensure!(!text.contains("{{"), "{template} has a place that nothing fills");
        let path = folder.join(template);
        std::fs::write(&path, text)?;
        Ok(path)
    }
}
