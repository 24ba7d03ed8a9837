//! A real gateway process that serves a world, and what the next version of that world costs it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustls::ClientConfig;
use spillway_core::resource;
use spillway_core::snapshot::Snapshot;
use spillway_runtime::snapshot;

use super::callers::{Answered, Caller};
use super::on_cpu;
use super::pki::Pki;
use super::world::{self, MARKER, REGION};
use crate::bench::process::{self, Process};

/// A gateway that is not ready after so long is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks whether the new version is served.
const LOOK: Duration = Duration::from_millis(2);
/// Pods are asked once a second whether they serve: this holds one round.
const IDLE: Duration = Duration::from_millis(1_050);
/// What looking costs is measured for so long before the change.
const BEFORE: Duration = Duration::from_millis(500);

pub struct Gateway {
    process: Process,
    pub address: SocketAddr,
    snapshot: PathBuf,
}

/// A world as a snapshot file.
#[derive(Clone, Debug)]
pub struct Sealed {
    pub bytes: Vec<u8>,
    /// CPU time from the operator's text to the file, as `spillway check -o` does it: read, checked, sealed.
    pub check: Duration,
    /// CPU time from the file to what is served from: each process does that.
    pub open: Duration,
}

/// What a new version cost.
#[derive(Clone, Copy, Debug)]
pub struct Applied {
    /// From the file's change to the first answer of the new version. A gateway looks at the file twice a second.
    pub served: Duration,
    /// The process's CPU time for it.
    pub cpu: Duration,
    /// The longest that a call took meanwhile, one at a time.
    pub longest_call: Duration,
}

impl Sealed {
    pub fn of(text: &str, version: u64) -> Result<Self> {
        let seal = || {
            let resources = resource::parse(text)?;
            Snapshot::compile(version, &resources)?;
            Ok(snapshot::seal(&resources, version))
        };
        let (sealed, check) = on_cpu(seal)?;
        let wrong = |faults: Vec<resource::Fault>| anyhow::anyhow!("the resources are wrong: {:?}", faults.first());
        let bytes = sealed.map_err(wrong)?;
        let (opened, open) = on_cpu(|| snapshot::open(&bytes))?;
        opened?;
        Ok(Self { bytes, check, open })
    }
}

impl Gateway {
    /// Starts it on one core; it serves when this returns.
    pub async fn start(
        spillway: &Path,
        folder: &Path,
        pki: &Pki,
        core: usize,
        world: &Sealed,
        client: &Arc<ClientConfig>,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let snapshot = folder.join("snapshot");
        std::fs::write(&snapshot, &world.bytes)?;
        let settings = folder.join("gateway.yaml");
        let pki = pki.folder().display();
        std::fs::write(
            &settings,
            format!(
                "region: {REGION}\nname: gw-0\n\
                 identity: {{ certificate: {pki}/gateway.crt, key: {pki}/gateway.key, trustBundle: {pki}/trust-bundle.pem }}\n\
                 snapshot: {}\nlisten: '127.0.0.1:0'\nadmin: '127.0.0.1:0'\nthreads: 1\naccessLog: {}\n",
                snapshot.display(),
                folder.join("access.log").display(),
            ),
        )?;
        let mut command = Command::new(spillway);
        command.arg("gateway").arg("--config").arg(&settings);
        let (process, line) = Process::start(&mut command, &[core], &folder.join("gateway.log"))?;
        let listening: serde_json::Value = serde_json::from_str(&line)?;
        let address = listening["listening"]["https"].as_str().context("the gateway does not say where it listens")?;
        let gateway = Self { process, address: address.parse()?, snapshot };
        let (start, model) = (Instant::now(), world::model(0));
        while let Err(error) = gateway.ask(client, &model).await {
            ensure!(start.elapsed() < PATIENCE, "the gateway does not serve: {error:#}");
            tokio::time::sleep(LOOK).await;
        }
        Ok(gateway)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// CPU time in each second without a call, ms.
    pub async fn idle(&self) -> Result<f64> {
        let (start, used) = (Instant::now(), self.cpu()?);
        tokio::time::sleep(IDLE).await;
        Ok(self.cpu()?.saturating_sub(used).as_secs_f64() * 1e3 / start.elapsed().as_secs_f64())
    }

    async fn ask(&self, client: &Arc<ClientConfig>, model: &str) -> Result<Answered> {
        Caller::connect(self.address, client).await?.call(model, "e-0").await
    }

    /// Puts the next version of the world, with [`MARKER`], where the gateway looks for it.
    pub async fn apply(&self, world: &Sealed, client: &Arc<ClientConfig>) -> Result<Applied> {
        let mut caller = Caller::connect(self.address, client).await?;
        let known = world::model(0);
        let (start, used) = (Instant::now(), self.cpu()?);
        while start.elapsed() < BEFORE {
            ensure!(caller.call(MARKER, "e-0").await? == Answered::Unknown, "the new version is there already");
            ensure!(caller.call(&known, "e-0").await? == Answered::Yes, "the gateway lost a model");
            tokio::time::sleep(LOOK).await;
        }
        let looking = (self.cpu()? - used).as_secs_f64() / start.elapsed().as_secs_f64();
        let new = self.snapshot.with_extension("new");
        std::fs::write(&new, &world.bytes)?;
        let (start, used, mut longest_call) = (Instant::now(), self.cpu()?, Duration::ZERO);
        std::fs::rename(&new, &self.snapshot)?;
        loop {
            let (asked, answered) = (Instant::now(), caller.call(MARKER, "e-0").await?);
            longest_call = longest_call.max(asked.elapsed());
            let (asked, still) = (Instant::now(), caller.call(&known, "e-0").await?);
            longest_call = longest_call.max(asked.elapsed());
            ensure!(still == Answered::Yes, "the gateway lost a model");
            if answered == Answered::Yes {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "the new version is not served after {PATIENCE:?}");
            tokio::time::sleep(LOOK).await;
        }
        let served = start.elapsed();
        let cpu = self.cpu()?.saturating_sub(used).saturating_sub(served.mul_f64(looking));
        Ok(Applied { served, cpu, longest_call })
    }

    fn cpu(&self) -> Result<Duration> {
        process::cpu(self.process.id())
    }
}
