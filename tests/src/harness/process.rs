//! One process of the real binary.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

const START: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(30);

/// The binary under test: `spillway` beside the folder of the test executables.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.ancestors().find(|folder| folder.join("spillway").is_file());
    folder
        .unwrap_or_else(|| panic!("no binary 'spillway' beside {}: run cargo build -p spillway", test.display()))
        .join("spillway")
}

/// Runs a command of the binary to its end.
pub fn spillway(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).stdin(Stdio::null()).output().expect("the binary runs")
}

/// Runs a command of the binary that must succeed; returns what it printed.
pub fn spillway_ok(arguments: &[&str]) -> String {
    let output = spillway(arguments);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "spillway {arguments:?}: {}\n{stdout}{stderr}", output.status);
    stdout.into_owned()
}

/// A gateway or a sidecar. Killed when dropped.
pub struct Process {
    pub name: String,
    /// Where clients or gateways are served.
    pub address: SocketAddr,
    pub admin: SocketAddr,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts it and returns when it says that it listens.
    pub fn start(name: &str, kind: &str, config: &Path) -> Self {
        Self::try_start(name, kind, config).unwrap_or_else(|problem| panic!("{problem}"))
    }

    /// Like [`Self::start`]; the error holds what it wrote.
    pub fn try_start(name: &str, kind: &str, config: &Path) -> Result<Self, String> {
        let log = config.with_extension("log");
        let open = || File::options().create(true).append(true).open(&log).expect("a log can be opened");
        let mut child = Command::new(binary())
            .args([kind, "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(open())
            .spawn()
            .expect("the binary starts");
        let stdout = child.stdout.take().expect("it is piped");
        let (tell, told) = mpsc::channel();
        let mut rest = open();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = tell.send(line.clone());
                let _ = writeln!(rest, "{line}");
            }
        });
        let first = told.recv_timeout(START).ok();
        let listening = first.as_deref().and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let address = |names: &[&str]| {
            let all = listening.as_ref()?.get("listening")?;
            names.iter().find_map(|name| {
                let said = all.get(name)?;
                said.get(0).unwrap_or(said).as_str()?.parse().ok()
            })
        };
        let Some((address, admin)) = address(&["https", "grpc", "dns"]).zip(address(&["admin"])) else {
            let _ = child.kill();
            let status = child.wait().expect("it can be waited for");
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            return Err(format!("{name} did not start ({status}), its first line: {first:?}\n{log}"));
        };
        Ok(Self { name: name.to_owned(), address, admin, log, child })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"))
    }

    pub fn signal(&self, signal: Signal) {
        signal::kill(self.pid(), signal).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("it can be waited for").is_none()
    }

    /// SIGKILL, and back when it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end, which must come.
    pub async fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + END;
        loop {
            if let Some(status) = self.child.try_wait().expect("it can be waited for") {
                return status;
            }
            assert!(Instant::now() < end, "{} does not end", self.name);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGTERM, and back when it is gone.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended().await
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- last lines of {}", self.name);
            for line in &lines[lines.len().saturating_sub(30)..] {
                eprintln!("{line}");
            }
        }
    }
}
