//! Connections that wait: each makes one call, which is answered rightly, and then stays open and silent.
//!
//! The rule: what is counted is what the proxy's resident memory grew by, from a proxy that has already
//! served calls on a few connections, which stay open, to one that holds all of them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Caller, Sender, connector};
use crate::bench::identities::Identities;
use crate::bench::message::Protocol;
use crate::bench::process;

/// Connections before the first look, and calls on each: what a proxy sets up once is there then.
const FIRST: usize = 16;
const FIRST_CALLS: usize = 32;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Idle {
    pub pki: PathBuf,
    pub address: SocketAddr,
    pub connections: usize,
    /// Until buffers and timers of the last call are gone, before memory is read.
    pub settle: Duration,
    pub proxy: u32,
}

/// Resident memory of the proxy, bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Found {
    pub before: u64,
    pub after: u64,
    pub connections: usize,
}

impl Found {
    /// Memory of one connection, bytes.
    pub fn each(&self) -> f64 {
        (self.after as f64 - self.before as f64) / self.connections as f64
    }
}

pub async fn run(job: &Idle) -> Result<Found> {
    let connector = connector(&Identities::at(&job.pki), Protocol::Grpc)?;
    let caller = Caller::new(Protocol::Grpc, false);
    let mut open: Vec<Sender> = Vec::with_capacity(FIRST + job.connections);
    for _ in 0..FIRST {
        let mut sender = caller.connect(job.address, &connector).await?;
        for _ in 0..FIRST_CALLS {
            caller.call(&mut sender).await?;
        }
        open.push(sender);
    }
    tokio::time::sleep(job.settle).await;
    let before = process::resident(job.proxy)?;
    for number in 0..job.connections {
        let mut sender = caller.connect(job.address, &connector).await?;
        caller.call(&mut sender).await.with_context(|| format!("connection {number}"))?;
        open.push(sender);
    }
    tokio::time::sleep(job.settle).await;
    let after = process::resident(job.proxy)?;
    // One that had been closed meanwhile would have cost nothing.
    for sender in open {
        let mut sender = sender.ready().await.context("an idle connection was closed")?;
        caller.call(&mut sender).await.context("an idle connection takes no call")?;
    }
    ensure!(after > before, "{} connections took no memory", job.connections);
    Ok(Found { before, after, connections: job.connections })
}
