//! Processes of a bench: bound to a core, accounted by the kernel, gone when the bench is.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A child that is killed when this value goes.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts a command on some cores and returns its first line of output, which says that it is ready.
    pub fn start(command: &mut Command, cores: &[usize], log: &Path) -> Result<(Self, String)> {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let child = on_cores(cores, || command.spawn())?.with_context(|| format!("cannot start {name}"))?;
        let mut process = Self { child };
        let mut output = BufReader::new(process.child.stdout.take().context("there is no output")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "{name} ended before it was ready; see {}", log.display());
        drain(output);
        Ok((process, line))
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either it runs and is killed, or it has ended: both are what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Output that nobody reads would stop the process.
fn drain(mut output: BufReader<ChildStdout>) {
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
}

/// The cores that this process may use.
pub fn cores() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false)).collect())
}

/// Runs `start` while this thread is bound to some cores; children inherit that.
pub fn on_cores<T>(cores: &[usize], start: impl FnOnce() -> T) -> Result<T> {
    let this = Pid::from_raw(0);
    let before = sched_getaffinity(this)?;
    sched_setaffinity(this, &set_of(cores)?).with_context(|| format!("cannot use cores {cores:?}"))?;
    let started = start();
    sched_setaffinity(this, &before)?;
    Ok(started)
}

/// The same on one core.
pub fn on_core<T>(core: usize, start: impl FnOnce() -> T) -> Result<T> {
    on_cores(&[core], start)
}

/// Binds a process that runs already, with all of its threads.
pub fn bind(pid: u32, cores: &[usize]) -> Result<()> {
    let only = set_of(cores)?;
    for thread in threads(pid)?.into_keys() {
        let thread = Pid::from_raw(i32::try_from(thread)?);
        sched_setaffinity(thread, &only).with_context(|| format!("process {pid} cannot use cores {cores:?}"))?;
    }
    Ok(())
}

fn set_of(cores: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(set)
}

/// CPU time that all threads of a process have used, to the nanosecond.
pub fn cpu(pid: u32) -> Result<Duration> {
    Ok(threads(pid)?.values().sum())
}

/// CPU time that each thread of a process has used, by its number.
pub fn threads(pid: u32) -> Result<BTreeMap<u32, Duration>> {
    let mut used = BTreeMap::new();
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} is gone"))?;
    for thread in threads {
        let thread = thread?;
        // A thread that ended between the two reads has no file, and took next to nothing.
        let Ok(text) = std::fs::read_to_string(thread.path().join("schedstat")) else { continue };
        let nanos = text.split(' ').next().and_then(|number| number.parse::<u64>().ok());
        let number =
            thread.file_name().to_str().and_then(|name| name.parse().ok()).context("a thread has no number")?;
        used.insert(number, Duration::from_nanos(nanos.context("schedstat has no time on the CPU")?));
    }
    Ok(used)
}

/// Resident memory of a process, bytes.
pub fn resident(pid: u32) -> Result<u64> {
    memory(pid, "VmRSS:")
}

/// What of it belongs to no file, bytes: the rest are pages of the binary that the kernel may drop.
pub fn anonymous(pid: u32) -> Result<u64> {
    memory(pid, "RssAnon:")
}

fn memory(pid: u32, label: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix(label)?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.context("the process has no memory")? * 1024)
}

/// Clock ticks of one core so far, as /proc/stat counts them.
#[derive(Clone, Copy, Debug)]
pub struct Core {
    idle: u64,
    all: u64,
}

impl Core {
    /// The share of the time since then that the core was busy, 0 to 1.
    pub fn busy_until(&self, after: &Self) -> f64 {
        let all = after.all.saturating_sub(self.all).max(1) as f64;
        1.0 - after.idle.saturating_sub(self.idle) as f64 / all
    }
}

pub fn core(number: usize) -> Result<Core> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let label = format!("cpu{number} ");
    let line = stat.lines().find_map(|line| line.strip_prefix(&label)).context("/proc/stat lacks a core")?;
    let ticks: Vec<u64> = line.split(' ').filter_map(|number| number.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests are counted in user and nice already (proc(5)).
    ensure!(ticks.len() >= 8, "/proc/stat has too few columns");
    Ok(Core { idle: ticks[3] + ticks[4], all: ticks[..8].iter().sum() })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn own_work_is_accounted() {
        let own = std::process::id();
        let before = cpu(own).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        assert!(cpu(own).unwrap() > before);
        assert!(resident(own).unwrap() > 100_000);
        assert!((1..=resident(own).unwrap()).contains(&anonymous(own).unwrap()));
    }

    #[test]
    fn each_thread_has_an_account_of_its_own() {
        let own = std::process::id();
        let thread = std::thread::spawn(move || {
            let this = nix::unistd::gettid().as_raw().unsigned_abs();
            let before = threads(own).unwrap()[&this];
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(50) {
                std::hint::spin_loop();
            }
            (threads(own).unwrap()[&this] - before, start.elapsed())
        });
        let (used, elapsed) = thread.join().unwrap();
        assert!(used > Duration::ZERO && used <= elapsed, "{used:?} of {elapsed:?}");
    }

    #[test]
    fn a_running_process_is_bound_with_all_its_threads() {
        let last = *cores().unwrap().last().unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let bound = bind(child.id(), &[last]);
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        bound.unwrap();
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        assert_eq!(list.trim(), last.to_string());
    }

    #[test]
    fn a_child_runs_on_its_core_only() {
        let last = *cores().unwrap().last().unwrap();
        let allowed = || std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let bound = on_cores(&[last], allowed).unwrap();
        let list = bound.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        assert_eq!(list.trim(), last.to_string());
    }
}
