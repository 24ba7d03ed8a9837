//! Where and from what a figure comes.

use std::process::Command;

use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    /// Short, with a `+` if the tree has changes that no commit has.
    pub commit: String,
}

impl Machine {
    pub fn read() -> Self {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let commit = git(&["rev-parse", "--short", "HEAD"]);
        let changed = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
        Self {
            cpu: model.map_or("unknown", |(_, model)| model).to_owned(),
            cores: cpus.lines().filter(|line| line.starts_with("processor")).count(),
            kernel: kernel.trim().to_owned(),
            commit: if changed { format!("{commit}+") } else { commit },
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} cores, Linux {}, commit {}", self.cpu, self.cores, self.kernel, self.commit)
    }
}

/// UTC, to the minute.
pub fn now() -> String {
    said(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]))
}

fn git(arguments: &[&str]) -> String {
    said(Command::new("git").arg("-C").arg(crate::root()).args(arguments))
}

fn said(command: &mut Command) -> String {
    command.output().map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}
