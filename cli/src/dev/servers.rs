//! The real servers of `spillway dev --with-servers`, started by the same scripts as in the tests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const REDIS: u16 = 16_379;
const CASSANDRA: u16 = 19_042;
const CASSANDRA_STORAGE: u16 = 17_000;
const TRITON_HTTP: u16 = 18_000;
const TRITON_GRPC: u16 = 18_001;
const TRITON_METRICS: u16 = 18_002;

/// Stopped when dropped.
pub struct Servers {
    scripts: PathBuf,
    running: Vec<(&'static str, PathBuf)>,
}

pub struct Addresses {
    pub redis: String,
    pub cassandra: String,
    pub triton: String,
}

impl Servers {
    pub fn start(dir: &Path) -> Result<Self> {
        let scripts = std::env::current_dir()?.join("tests/servers");
        ensure!(
            scripts.join("install.sh").is_file(),
            "--with-servers uses tests/servers of the Spillway repository: run it from the repository's root"
        );
        let status = Command::new(scripts.join("install.sh")).args(["redis", "cassandra", "triton"]).status()?;
        ensure!(status.success(), "tests/servers/install.sh failed");
        std::fs::create_dir_all(dir)?;
        let dir = std::path::absolute(dir)?.join("servers");
        let mut servers = Self { scripts, running: Vec::new() };
        servers.run("redis", &dir, &[REDIS])?;
        servers.run("cassandra", &dir, &[CASSANDRA, CASSANDRA_STORAGE])?;
        servers.run("triton", &dir, &[TRITON_HTTP, TRITON_GRPC, TRITON_METRICS])?;
        Ok(servers)
    }

    pub fn addresses(&self) -> Addresses {
        Addresses {
            redis: format!("127.0.0.1:{REDIS}"),
            cassandra: format!("127.0.0.1:{CASSANDRA}"),
            triton: format!("http://127.0.0.1:{TRITON_GRPC}"),
        }
    }

    fn run(&mut self, name: &'static str, dir: &Path, ports: &[u16]) -> Result<()> {
        eprintln!("starting {name}");
        let dir = dir.join(name);
        // A server left over from a run that was cut off would hold the ports.
        self.script(name, "stop", &dir, &[])?;
        self.running.push((name, dir.clone()));
        let mut arguments: Vec<String> = ports.iter().map(u16::to_string).collect();
        if name == "triton" {
            arguments.push(super::fleet::MODEL.to_owned());
        }
        self.script(name, "start", &dir, &arguments)
    }

    fn script(&self, name: &str, action: &str, dir: &Path, arguments: &[String]) -> Result<()> {
        let script = self.scripts.join(format!("{name}.sh"));
        let status = Command::new(&script)
            .arg(action)
            .arg(dir)
            .args(arguments)
            .status()
            .with_context(|| format!("cannot run {}", script.display()))?;
        ensure!(status.success(), "{} {action} failed", script.display());
        Ok(())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for (name, dir) in self.running.iter().rev() {
            if let Err(error) = self.script(name, "stop", dir, &[]) {
                eprintln!("{error:#}");
            }
        }
    }
}
