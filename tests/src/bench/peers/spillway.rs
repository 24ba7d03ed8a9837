//! Spillway's gateway as a peer: resources compiled by `spillway check`, then one gateway from a file.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Proxy, Running, Setting};
use crate::bench::process::Process;

/// `cache` is the model's `cache` field, or nothing.
pub(super) fn start(setting: &Setting, folder: PathBuf, cache: &str) -> Result<Proxy> {
    let resources = setting.fill("spillway.yaml", &folder, &[("cache", cache)])?;
    let settings = setting.fill("gateway.yaml", &folder, &[])?;
    let snapshot = folder.join("snapshot");
    let mut check = Command::new(&setting.spillway);
    check.arg("check").arg("-f").arg(&resources).arg("-o").arg(&snapshot);
    let output = check.output().with_context(|| format!("cannot run {}", setting.spillway.display()))?;
    let said = || String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "spillway check refused the resources: {}", said());
    let mut command = Command::new(&setting.spillway);
    command.arg("gateway").arg("--config").arg(&settings);
    let (process, line) = Process::start(&mut command, &setting.cores, &folder.join("gateway.log"))?;
    let listening: serde_json::Value =
        serde_json::from_str(&line).with_context(|| format!("not where it listens: {line}"))?;
    let address = listening["listening"]["https"].as_str().context("the gateway does not say where it listens")?;
    Ok(Proxy { address: address.parse()?, pid: process.id(), folder, _running: Running::Process(process) })
}
