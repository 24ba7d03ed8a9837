//! The children of `spillway dev`: this same binary. They end with us, and one that dies is started again, unless it
//! was killed on purpose.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// A child that is not up within this time will not be.
const START: Duration = Duration::from_secs(30);
/// What a child gets to drain.
const STOP: Duration = Duration::from_secs(10);
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// All children, by name.
#[derive(Default)]
pub struct Processes {
    children: BTreeMap<String, Supervised>,
    /// In the order in which they were started.
    order: Vec<String>,
}

struct Supervised {
    orders: mpsc::Sender<(Order, oneshot::Sender<Result<()>>)>,
    task: JoinHandle<()>,
}

/// What may be done to a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// At once, and it stays dead until [`Order::Start`].
    Kill,
    /// It neither runs nor ends until [`Order::Resume`].
    Pause,
    Resume,
    Start,
    /// Drains, or is killed.
    Stop,
}

/// How a child is started.
#[derive(Clone)]
struct Program {
    name: String,
    command: &'static str,
    config: PathBuf,
}

impl Processes {
    /// Starts a child and returns when it says that it listens.
    pub async fn spawn(&mut self, name: &str, command: &'static str, config: &Path) -> Result<()> {
        let program = Program { name: name.to_owned(), command, config: config.to_owned() };
        let child = program.start().await?;
        self.keep(program, child);
        Ok(())
    }

    /// Starts several at once.
    pub async fn spawn_all(&mut self, programs: Vec<(String, &'static str, PathBuf)>) -> Result<()> {
        let programs = programs.into_iter().map(|(name, command, config)| Program { name, command, config });
        let started = programs.map(|program| async move {
            let child = program.start().await?;
            Ok::<_, anyhow::Error>((program, child))
        });
        for (program, child) in futures_util::future::try_join_all(started).await? {
            self.keep(program, child);
        }
        Ok(())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(String::as_str)
    }

    /// Returns when it is done.
    pub async fn order(&self, name: &str, order: Order) -> Result<()> {
        let child = self.children.get(name).with_context(|| format!("there is no process '{name}'"))?;
        let (tell, told) = oneshot::channel();
        child.orders.send((order, tell)).await.with_context(|| format!("{name} is gone"))?;
        told.await.with_context(|| format!("{name} is gone"))?
    }

    /// Drains all children, the last started first, and kills those that take too long.
    pub async fn stop(&mut self) {
        for name in std::mem::take(&mut self.order).into_iter().rev() {
            if let Err(error) = self.order(&name, Order::Stop).await {
                eprintln!("{error:#}");
            }
            if let Some(child) = self.children.remove(&name) {
                child.task.abort();
            }
        }
    }

    fn keep(&mut self, program: Program, child: Child) {
        let (orders, received) = mpsc::channel(4);
        let name = program.name.clone();
        let task = tokio::spawn(supervise(program, child, received));
        self.order.push(name.clone());
        self.children.insert(name, Supervised { orders, task });
    }
}

/// Until it is stopped or nobody can give orders any more.
async fn supervise(
    program: Program,
    child: Child,
    mut orders: mpsc::Receiver<(Order, oneshot::Sender<Result<()>>)>,
) {
    let mut child = Some(child);
    loop {
        let died = async {
            match &mut child {
                Some(child) => child.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            status = died => {
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                eprintln!("{} ended ({status}); starting it again", program.name);
                tokio::time::sleep(RESTART_AFTER).await;
                child = program.start().await.map_err(|error| eprintln!("{error:#}")).ok();
            }
            order = orders.recv() => {
                let Some((order, tell)) = order else { return };
                // Who asked may have gone; it is done all the same.
                let _ = tell.send(program.carry_out(order, &mut child).await);
                if order == Order::Stop {
                    return;
                }
            }
        }
    }
}

impl Program {
    async fn carry_out(&self, order: Order, child: &mut Option<Child>) -> Result<()> {
        let signal = |child: &Option<Child>, signal| {
            let pid = child.as_ref().and_then(Child::id).and_then(|id| i32::try_from(id).ok());
            let pid = pid.with_context(|| format!("{} does not run", self.name))?;
            kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot signal {}", self.name))
        };
        match order {
            Order::Kill => {
                signal(child, Signal::SIGKILL)?;
                if let Some(mut child) = child.take() {
                    child.wait().await?;
                }
                Ok(())
            }
            Order::Pause => signal(child, Signal::SIGSTOP),
            Order::Resume => signal(child, Signal::SIGCONT),
            Order::Start if child.is_some() => Ok(()),
            Order::Start => {
                *child = Some(self.start().await?);
                Ok(())
            }
            Order::Stop => {
                let Some(mut running) = child.take() else { return Ok(()) };
                if let Some(pid) = running.id().and_then(|id| i32::try_from(id).ok()) {
                    // Fails only when the child is gone. One that was paused must run to end.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
                    let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
                }
                if tokio::time::timeout(STOP, running.wait()).await.is_err() {
                    eprintln!("{} does not end; killing it", self.name);
                    running.kill().await?;
                }
                Ok(())
            }
        }
    }

    async fn start(&self) -> Result<Child> {
        let name = &self.name;
        let log = self.config.with_extension("log");
        let open = || std::fs::File::options().create(true).append(true).open(&log);
        let mut child = Command::new(std::env::current_exe()?)
            .args([self.command, "--config"])
            .arg(&self.config)
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
