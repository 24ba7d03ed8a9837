//! The processes of one machine that an injector may break, as its settings name them.
//!
//! The rule: a process is who its file of the process id says it is, asked anew each time; it is ended by signals and
//! begun by the command of its settings, which is run again until the process is there.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::Processes;
use super::settings::HeldProcess;

/// Between two runs of a command that begins a process: it takes a moment to write its file.
const AGAIN: Duration = Duration::from_secs(5);

pub struct Host {
    held: BTreeMap<String, HeldProcess>,
    callers: BTreeMap<String, Vec<IpAddr>>,
    begun: Mutex<BTreeMap<String, Instant>>,
}

impl Host {
    pub fn new(held: BTreeMap<String, HeldProcess>, callers: BTreeMap<String, Vec<IpAddr>>) -> Self {
        Self { held, callers, begun: Mutex::default() }
    }

    fn held(&self, name: &str) -> Result<&HeldProcess> {
        self.held.get(name).with_context(|| format!("no process is called '{name}'"))
    }

    fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        let held = self.held(name)?;
        let pid = running(held).with_context(|| format!("{}: no process has this id", held.pid_file.display()))?;
        kill(pid, signal).with_context(|| format!("{signal} to {pid}"))
    }
}

impl Processes for Host {
    fn names(&self) -> Vec<String> {
        self.held.keys().cloned().collect()
    }

    fn callers(&self) -> Vec<String> {
        self.held.keys().chain(self.callers.keys()).cloned().collect()
    }

    fn caller(&self, from: SocketAddr, _to: SocketAddr) -> Option<String> {
        let ip = from.ip().to_canonical();
        self.callers.iter().find(|(_, addresses)| addresses.contains(&ip)).map(|(name, _)| name.clone())
    }

    fn pid(&self, name: &str) -> Option<u32> {
        let pid = running(self.held.get(name)?)?;
        u32::try_from(pid.as_raw()).ok()
    }

    fn kill(&self, name: &str) -> Result<()> {
        if let Some(hold) = &self.held(name)?.hold {
            run(hold)?;
        }
        self.begun.lock().remove(name);
        self.signal(name, Signal::SIGKILL)
    }

    fn pause(&self, name: &str) -> Result<()> {
        self.signal(name, Signal::SIGSTOP)
    }

    fn resume(&self, name: &str) -> Result<()> {
        match self.held(name).map(running)? {
            // It died meanwhile: then nothing of the fault is left.
            None => Ok(()),
            Some(_) => self.signal(name, Signal::SIGCONT),
        }
    }

    fn start(&self, name: &str) -> Result<()> {
        let held = self.held(name)?;
        if running(held).is_some() {
            self.begun.lock().remove(name);
            return Ok(());
        }
        {
            let mut begun = self.begun.lock();
            if begun.get(name).is_some_and(|begun| begun.elapsed() < AGAIN) {
                return Ok(());
            }
            begun.insert(name.to_owned(), Instant::now());
        }
        begin(name, &held.start)
    }
}

/// The process of the file, if there is one that is no zombie.
fn running(held: &HeldProcess) -> Option<Pid> {
    let pid = Pid::from_raw(std::fs::read_to_string(&held.pid_file).ok()?.trim().parse().ok().filter(|pid| *pid > 1)?);
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let is_dead = state
        .rsplit_once(')')
        .is_some_and(|(_, rest)| matches!(rest.trim_start().as_bytes().first(), Some(b'Z' | b'X')));
    (!is_dead && kill(pid, None) != Err(Errno::ESRCH)).then_some(pid)
}

fn run(command: &[String]) -> Result<()> {
    let status = made(command)?.status().with_context(|| command.join(" "))?;
    ensure!(status.success(), "{}: {status}", command.join(" "));
    Ok(())
}

/// Nobody waits for it: it may be the process itself.
fn begin(name: &str, command: &[String]) -> Result<()> {
    let mut child = made(command)?.spawn().with_context(|| command.join(" "))?;
    let (name, command) = (name.to_owned(), command.join(" "));
    std::thread::spawn(move || match child.wait() {
        Ok(status) if status.success() => {}
        ended => eprintln!("{name}: {command}: {ended:?}"),
    });
    Ok(())
}

fn made(command: &[String]) -> Result<Command> {
    let (program, arguments) = command.split_first().context("an empty command")?;
    let mut made = Command::new(program);
    // A group of its own: what ends us does not end it.
    made.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that writes its id, and is begun by the same command.
    fn host(folder: &std::path::Path) -> Host {
        let (pid_file, held) = (folder.join("pid"), folder.join("held"));
        let script = format!("echo $$ > {}; exec sleep 60", pid_file.display());
        let start = ["sh", "-c", &script].map(str::to_owned).to_vec();
        let hold = Some(["touch", held.to_str().unwrap()].map(str::to_owned).to_vec());
        let process = HeldProcess { pid_file, hold, start };
        let callers = BTreeMap::from([("us/gateway-0".to_owned(), vec!["10.1.0.1".parse().unwrap()])]);
        Host::new(BTreeMap::from([("eu/gateway-0".to_owned(), process)]), callers)
    }

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < end, "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn state(pid: u32) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").map_or(String::new(), |(_, rest)| rest[..1].to_owned())
    }

    #[test]
    fn a_process_is_paused_resumed_killed_and_begun() {
        let folder = tempfile::tempdir().unwrap();
        let (host, name) = (host(folder.path()), "eu/gateway-0");
        assert!(host.pid(name).is_none() && host.pause(name).is_err() && host.kill("eu/other").is_err());
        host.start(name).unwrap();
        until("it runs", || host.pid(name).is_some());
        let first = host.pid(name).unwrap();
        host.pause(name).unwrap();
        until("it stands still", || state(first) == "T");
        host.resume(name).unwrap();
        until("it goes on", || state(first) == "S");
        host.kill(name).unwrap();
        assert!(folder.path().join("held").exists(), "its supervisor was told first");
        until("it is dead", || host.pid(name).is_none());
        host.resume(name).unwrap();
        until("it runs again", || {
            host.start(name).unwrap();
            host.pid(name).is_some_and(|pid| pid != first)
        });
        host.kill(name).unwrap();
    }

    #[test]
    fn callers_are_known_by_their_addresses() {
        let host = host(std::path::Path::new("/nowhere"));
        let to = "10.0.0.1:443".parse().unwrap();
        assert_eq!(host.caller("10.1.0.1:999".parse().unwrap(), to).as_deref(), Some("us/gateway-0"));
        assert_eq!(host.caller("[::ffff:10.1.0.1]:999".parse().unwrap(), to).as_deref(), Some("us/gateway-0"));
        assert_eq!(host.caller("10.1.0.2:999".parse().unwrap(), to), None);
        assert_eq!(host.callers(), ["eu/gateway-0", "us/gateway-0"]);
    }
}
