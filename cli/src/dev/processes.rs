//! The children of `spillway dev`: this same binary.
//!
//! The rule: each becomes what is wanted of it, however often that takes: one that dies is started again until it is up,
//! unless it was killed on purpose. They end with us, however we end, also those that are paused (`--parent`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::injector;

/// A child that is not up within this time will not be.
const START: Duration = Duration::from_secs(30);
/// What a child gets to drain.
const STOP: Duration = Duration::from_secs(10);
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// All children, by name.
#[derive(Default)]
pub struct Processes {
    /// In the order in which they were started.
    children: Vec<(String, JoinHandle<()>)>,
    handles: Arc<Handles>,
}

/// What a child is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Running,
    /// It neither runs nor ends.
    Paused,
    Dead,
    /// Drained, or killed if that takes too long. Nothing comes after it.
    Stopped,
}

/// How a child is started.
#[derive(Clone)]
struct Program {
    executable: PathBuf,
    name: String,
    command: &'static str,
    config: PathBuf,
}

impl Processes {
    /// Starts a child and returns when it says that it listens.
    pub async fn spawn(&mut self, name: &str, command: &'static str, config: &Path) -> Result<()> {
        self.spawn_all(vec![(name.to_owned(), command, config.to_owned())]).await
    }

    /// Starts several at once.
    pub async fn spawn_all(&mut self, programs: Vec<(String, &'static str, PathBuf)>) -> Result<()> {
        let executable = std::env::current_exe()?;
        let started = programs.into_iter().map(|(name, command, config)| {
            let program = Program { executable: executable.clone(), name, command, config };
            async move {
                let child = program.start().await?;
                Ok::<_, anyhow::Error>((program, child))
            }
        });
        for (program, child) in futures_util::future::try_join_all(started).await? {
            self.keep(program, child);
        }
        Ok(())
    }

    /// Who may break them, those of later too.
    pub fn handles(&self) -> Arc<Handles> {
        self.handles.clone()
    }

    /// Drains all children, the last started first, and kills those that take too long.
    pub async fn stop(&mut self) {
        for (name, task) in std::mem::take(&mut self.children).into_iter().rev() {
            // It is gone already if its supervisor is.
            let _ = self.handles.want(&name, Wanted::Stopped);
            if let Err(error) = task.await {
                eprintln!("{name}: {error}");
            }
        }
    }

    fn keep(&mut self, program: Program, child: Child) {
        let (wanted, heard) = watch::channel(Wanted::Running);
        let (name, pid) = (program.name.clone(), Arc::new(AtomicU32::new(child.id().unwrap_or_default())));
        let task = tokio::spawn(supervise(program, child, heard, pid.clone()));
        self.handles.0.lock().insert(name.clone(), Handle { wanted, pid });
        self.children.push((name, task));
    }
}

/// What is wanted of children, from wherever. It is brought about soon; what fails is told on standard error.
#[derive(Default)]
pub struct Handles(Mutex<BTreeMap<String, Handle>>);

struct Handle {
    wanted: watch::Sender<Wanted>,
    /// 0 while it does not run.
    pid: Arc<AtomicU32>,
}

impl Handles {
    fn wanted(&self, name: &str) -> Option<Wanted> {
        self.0.lock().get(name).map(|handle| *handle.wanted.borrow())
    }

    fn want(&self, name: &str, wanted: Wanted) -> Result<()> {
        let handles = self.0.lock();
        let handle = handles.get(name).with_context(|| format!("there is no process '{name}'"))?;
        if wanted == Wanted::Dead {
            // Nobody is to take it for one that was started again.
            handle.pid.store(0, Ordering::Relaxed);
        }
        handle.wanted.send(wanted).with_context(|| format!("{name} is not looked after any more"))
    }
}

impl injector::Processes for Handles {
    fn names(&self) -> Vec<String> {
        self.0.lock().keys().cloned().collect()
    }

    fn pid(&self, name: &str) -> Option<u32> {
        let pid = self.0.lock().get(name)?.pid.load(Ordering::Relaxed);
        (pid != 0).then_some(pid)
    }

    fn kill(&self, name: &str) -> Result<()> {
        self.want(name, Wanted::Dead)
    }

    fn pause(&self, name: &str) -> Result<()> {
        // The dead stay dead.
        if self.wanted(name) == Some(Wanted::Dead) { Ok(()) } else { self.want(name, Wanted::Paused) }
    }

    fn resume(&self, name: &str) -> Result<()> {
        self.want(name, Wanted::Running)
    }

    fn start(&self, name: &str) -> Result<()> {
        self.want(name, Wanted::Running)
    }
}

/// Until it is stopped or nobody can want anything any more.
async fn supervise(program: Program, child: Child, mut wanted: watch::Receiver<Wanted>, pid: Arc<AtomicU32>) {
    let mut child = Some(child);
    let mut rest = Duration::ZERO;
    loop {
        let now = *wanted.borrow_and_update();
        if let Err(error) = program.bring(&mut child, now).await {
            eprintln!("{}: {error:#}", program.name);
        }
        if now == Wanted::Stopped {
            return;
        }
        pid.store(child.as_ref().and_then(Child::id).unwrap_or_default(), Ordering::Relaxed);
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                rest = Duration::ZERO;
            }
            status = ended(&mut child) => {
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                eprintln!("{} ended ({status}); starting it again", program.name);
                child = None;
                rest = RESTART_AFTER;
            }
            started = program.start_after(rest), if child.is_none() && now != Wanted::Dead => {
                rest = RESTART_AFTER;
                child = started.inspect_err(|error| eprintln!("{error:#}")).ok();
            }
        }
    }
}

/// Never, while there is none.
async fn ended(child: &mut Option<Child>) -> std::io::Result<ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

impl Program {
    /// All but a start, which takes its time.
    async fn bring(&self, child: &mut Option<Child>, wanted: Wanted) -> Result<()> {
        match wanted {
            Wanted::Running => signal(child.as_ref(), Signal::SIGCONT),
            Wanted::Paused => signal(child.as_ref(), Signal::SIGSTOP),
            Wanted::Dead => match child.take() {
                Some(mut child) => Ok(child.kill().await?),
                None => Ok(()),
            },
            Wanted::Stopped => {
                // Fails only when the child is gone. One that was paused must run to end.
                let _ = signal(child.as_ref(), Signal::SIGTERM);
                let _ = signal(child.as_ref(), Signal::SIGCONT);
                let Some(mut running) = child.take() else { return Ok(()) };
                if tokio::time::timeout(STOP, running.wait()).await.is_err() {
                    eprintln!("{} does not end; killing it", self.name);
                    running.kill().await?;
                }
                Ok(())
            }
        }
    }

    async fn start_after(&self, rest: Duration) -> Result<Child> {
        tokio::time::sleep(rest).await;
        self.start().await
    }

    async fn start(&self) -> Result<Child> {
        let name = &self.name;
        let log = self.config.with_extension("log");
        let open = || std::fs::File::options().create(true).append(true).open(&log);
        let mut child = Command::new(&self.executable)
            .args([self.command, "--config"])
            .arg(&self.config)
            .args(["--parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(open().with_context(|| format!("cannot write {}", log.display()))?)
            // A signal from the terminal is for us: we drain the children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let Some(stdout) = child.stdout.take() else { bail!("{name} has no standard output") };
        let mut lines = BufReader::new(stdout).lines();
        let first = tokio::time::timeout(START, lines.next_line()).await;
        match first {
            Ok(Ok(Some(line))) if line.contains("\"listening\"") => {}
            Ok(_) => bail!("{name} did not start; {} says why", log.display()),
            Err(_) => bail!("{name} is not up after {} s; {} says more", START.as_secs(), log.display()),
        }
        // What follows on standard output goes where the rest of its log is.
        let mut rest = tokio::fs::File::from_std(open()?);
        let mut stdout = lines.into_inner();
        tokio::spawn(async move { tokio::io::copy_buf(&mut stdout, &mut rest).await });
        Ok(child)
    }
}

fn signal(child: Option<&Child>, signal: Signal) -> Result<()> {
    match child.and_then(Child::id).and_then(|id| i32::try_from(id).ok()) {
        Some(pid) => kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} cannot be sent")),
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "processes_tests.rs"]
mod tests;
