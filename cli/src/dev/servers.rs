//! The real servers of `spillway dev --with-servers`, started by the same scripts as in the tests.
//!
//! The rule: they end with us, however we end: a shell waits for the end of a pipe that we hold, and stops them.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

const REDIS: u16 = 16_379;
const CASSANDRA: u16 = 19_042;
const CASSANDRA_STORAGE: u16 = 17_000;
const TRITON_HTTP: u16 = 18_000;
const TRITON_GRPC: u16 = 18_001;
const TRITON_METRICS: u16 = 18_002;

/// Of a shell: the scripts, then the servers' folder.
const STOP: &str = r#"read -r _; for server in triton cassandra redis; do "$0/$server.sh" stop "$1/$server"; done"#;

/// Stopped when dropped.
pub struct Servers {
    scripts: PathBuf,
    dir: PathBuf,
    /// Stops them when its standard input ends.
    stopper: Child,
}

pub struct Addresses {
    pub redis: SocketAddr,
    pub cassandra: String,
    pub triton: String,
}

impl Servers {
    /// `lock` is held until they are stopped.
    pub fn start(dir: &Path, lock: &File) -> Result<Self> {
        let scripts = std::env::current_dir()?.join("tests/servers");
        ensure!(
            scripts.join("install.sh").is_file(),
            "--with-servers uses tests/servers of the Spillway repository: run it from the repository's root"
        );
        let status = Command::new(scripts.join("install.sh")).args(["redis", "cassandra", "triton"]).status()?;
        ensure!(status.success(), "tests/servers/install.sh failed");
        let dir = std::path::absolute(dir)?.join("servers");
        let stopper = stopper(&scripts, &dir, lock)?;
        let servers = Self { scripts, dir, stopper };
        servers.run("redis", &[REDIS])?;
        servers.run("cassandra", &[CASSANDRA, CASSANDRA_STORAGE])?;
        servers.run("triton", &[TRITON_HTTP, TRITON_GRPC, TRITON_METRICS])?;
        Ok(servers)
    }

    pub fn addresses(&self) -> Addresses {
        Addresses {
            redis: SocketAddr::from(([127, 0, 0, 1], REDIS)),
            cassandra: format!("127.0.0.1:{CASSANDRA}"),
            triton: format!("http://127.0.0.1:{TRITON_GRPC}"),
        }
    }

    fn run(&self, name: &str, ports: &[u16]) -> Result<()> {
        eprintln!("starting {name}");
        // A server left over from a run that was cut off would hold the ports.
        self.script(name, "stop", &[])?;
        let mut arguments: Vec<String> = ports.iter().map(u16::to_string).collect();
        if name == "triton" {
            arguments.push(super::fleet::MODEL.to_owned());
        }
        self.script(name, "start", &arguments)
    }

    fn script(&self, name: &str, action: &str, arguments: &[String]) -> Result<()> {
        let script = self.scripts.join(format!("{name}.sh"));
        let status = Command::new(&script)
            .arg(action)
            .arg(self.dir.join(name))
            .args(arguments)
            .status()
            .with_context(|| format!("cannot run {}", script.display()))?;
        ensure!(status.success(), "{} {action} failed", script.display());
        Ok(())
    }
}

fn stopper(scripts: &Path, dir: &Path, lock: &File) -> Result<Child> {
    let mut command = Command::new("sh");
    command.args(["-c", STOP]).args([scripts, dir]).stdin(Stdio::piped()).stdout(lock.try_clone()?);
    // A signal from the terminal is for us.
    command.process_group(0).spawn().context("cannot run sh")
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stopper.stdin.take();
        if let Err(error) = self.stopper.wait() {
            eprintln!("the servers may run on: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn when_we_are_gone_the_servers_are_stopped_before_another_may_run_here() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["redis", "cassandra", "triton"] {
            let script = at(&format!("{name}.sh"));
            let log = at("log").display().to_string();
            std::fs::write(&script, format!("#!/bin/sh\nsleep 0.1; echo $1 ${{2##*/}} >>{log}\n")).unwrap();
            std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let lock = File::create(at("lock")).unwrap();
        lock.lock().unwrap();
        let mut stopper = stopper(folder.path(), &at("servers"), &lock).unwrap();
        // As with all that a dead process held.
        drop((stopper.stdin.take(), lock));
        File::open(at("lock")).unwrap().lock().unwrap();
        let log = std::fs::read_to_string(at("log")).unwrap();
        assert_eq!(log, "stop triton\nstop cassandra\nstop redis\n");
        stopper.wait().unwrap();
    }
}
