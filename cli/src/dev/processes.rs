//! The children of `spillway dev`: this same binary. They end with us, and one that dies is started again.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A child that is not up within this time will not be.
const START: Duration = Duration::from_secs(30);
/// What a child gets to drain.
const STOP: Duration = Duration::from_secs(10);
const RESTART_AFTER: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Processes {
    running: Vec<Process>,
}

struct Process {
    name: String,
    arguments: Vec<String>,
    config: PathBuf,
    child: Child,
}

impl Processes {
    /// Starts a child and returns when it says that it listens.
    pub async fn spawn(&mut self, name: &str, arguments: &[&str], config: &Path) -> Result<()> {
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let child = start(name, &arguments, config).await?;
        self.running.push(Process { name: name.to_owned(), arguments, config: config.to_owned(), child });
        Ok(())
    }

    /// Waits until a child dies, and starts it again.
    pub async fn tend(&mut self) -> Result<()> {
        let waits = self.running.iter_mut().map(|process| Box::pin(process.child.wait()));
        let (status, index, _) = futures_util::future::select_all(waits).await;
        let process = &mut self.running[index];
        eprintln!("{} ended ({}); starting it again", process.name, status?);
        tokio::time::sleep(RESTART_AFTER).await;
        process.child = start(&process.name, &process.arguments, &process.config).await?;
        Ok(())
    }

    /// Drains all children, the last started first, and kills those that take too long.
    pub async fn stop(&mut self) {
        for process in self.running.iter_mut().rev() {
            if let Some(pid) = process.child.id().and_then(|id| i32::try_from(id).ok()) {
                // Fails only when the child is gone.
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            if tokio::time::timeout(STOP, process.child.wait()).await.is_err() {
                eprintln!("{} does not end; killing it", process.name);
                let _ = process.child.kill().await;
            }
        }
        self.running.clear();
    }
}

async fn start(name: &str, arguments: &[String], config: &Path) -> Result<Child> {
    let log = config.with_extension("log");
    let open = || std::fs::File::options().create(true).append(true).open(&log);
    let mut child = Command::new(std::env::current_exe()?)
        .args(arguments)
        .arg(config)
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
