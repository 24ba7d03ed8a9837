//! Loads that run in a process of their own, so that their CPU time is nobody else's: a job goes there as
//! JSON, and what it found comes back as JSON.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Load;
use super::handshakes::{self, Handshakes};
use super::idle::{self, Idle};
use super::open::{self, Open};
use crate::bench::process;

/// What such a process is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    Load(Load),
    Open(Open),
    Handshakes(Handshakes),
    Idle(Idle),
}

impl Job {
    /// Does the job in a new process on some cores and returns what it found.
    pub fn start<T: DeserializeOwned>(&self, cores: &[usize]) -> Result<T> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("part").arg(serde_json::to_string(self)?).stdin(Stdio::null());
        let output = process::on_cores(cores, || command.output())??;
        ensure!(output.status.success(), "the load ended early: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).context("the load's report cannot be read")
    }
}

/// Does a job and prints what it found as its only line. Runs inside a `LocalSet`.
pub async fn run(job: &str) -> Result<()> {
    let job = serde_json::from_str(job).context("this is no job")?;
    let found = match &job {
        Job::Load(job) => serde_json::to_string(&super::run(job).await?),
        Job::Open(job) => serde_json::to_string(&open::run(job).await?),
        Job::Handshakes(job) => serde_json::to_string(&handshakes::run(job).await?),
        Job::Idle(job) => serde_json::to_string(&idle::run(job).await?),
    };
    println!("{}", found?);
    Ok(())
}
