//! The children of `spillway dev`: this same binary. They end with us, and one that dies is started again, unless it
//! was killed on purpose.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::injector;

/// A child that is not up within this time will not be.
const START: Duration = Duration::from_secs(30);
/// What a child gets to drain.
const STOP: Duration = Duration::from_secs(10);
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// Orders that wait for one child.
const ORDERS: usize = 16;

/// All children, by name.
#[derive(Default)]
pub struct Processes {
    children: BTreeMap<String, Supervised>,
    /// In the order in which they were started.
    order: Vec<String>,
}

struct Supervised {
    orders: mpsc::Sender<Order>,
    task: JoinHandle<()>,
    /// 0 while it does not run.
    pid: Arc<AtomicU32>,
}

/// What may be done to a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
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

    /// Who may break them: those that run now.
    pub fn handles(&self) -> Handles {
        let handle = |(name, child): (&String, &Supervised)| {
            (name.clone(), Handle { orders: child.orders.clone(), pid: child.pid.clone() })
        };
        Handles(self.children.iter().map(handle).collect())
    }

    /// Drains all children, the last started first, and kills those that take too long.
    pub async fn stop(&mut self) {
        for name in std::mem::take(&mut self.order).into_iter().rev() {
            let Some(child) = self.children.remove(&name) else { continue };
            // It is gone already if its supervisor is.
            let _ = child.orders.send(Order::Stop).await;
            if let Err(error) = child.task.await {
                eprintln!("{name}: {error}");
            }
        }
    }

    fn keep(&mut self, program: Program, child: Child) {
        let (orders, received) = mpsc::channel(ORDERS);
        let (name, pid) = (program.name.clone(), Arc::new(AtomicU32::new(0)));
        let task = tokio::spawn(supervise(program, child, received, pid.clone()));
        self.order.push(name.clone());
        self.children.insert(name, Supervised { orders, task, pid });
    }
}

/// Orders for children, from wherever. What is ordered is done soon; what fails is told on standard error.
pub struct Handles(BTreeMap<String, Handle>);

struct Handle {
    orders: mpsc::Sender<Order>,
    pid: Arc<AtomicU32>,
}

impl Handles {
    fn order(&self, name: &str, order: Order) -> Result<()> {
        let handle = self.0.get(name).with_context(|| format!("there is no process '{name}'"))?;
        handle.orders.try_send(order).with_context(|| format!("{name} takes no orders"))
    }
}

impl injector::Processes for Handles {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn pid(&self, name: &str) -> Option<u32> {
        self.0.get(name).map(|handle| handle.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    fn kill(&self, name: &str) -> Result<()> {
        self.order(name, Order::Kill)
    }

    fn pause(&self, name: &str) -> Result<()> {
        self.order(name, Order::Pause)
    }

    fn resume(&self, name: &str) -> Result<()> {
        self.order(name, Order::Resume)
    }

    fn start(&self, name: &str) -> Result<()> {
        self.order(name, Order::Start)
    }
}

/// Until it is stopped or nobody can give orders any more.
async fn supervise(program: Program, child: Child, mut orders: mpsc::Receiver<Order>, pid: Arc<AtomicU32>) {
    let mut child = Some(child);
    loop {
        pid.store(child.as_ref().and_then(Child::id).unwrap_or_default(), Ordering::Relaxed);
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
                let Some(order) = order else { return };
                if let Err(error) = program.carry_out(order, &mut child).await {
                    eprintln!("{error:#}");
                }
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
