//! What processes and cores have used so far, and what a window between two such accounts showed.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Load;
use crate::bench::process::{self, Core};
use crate::bench::statistics;

/// What all processes and cores have used so far.
#[derive(Debug)]
pub struct Account {
    at: Instant,
    proxy: Duration,
    upstream: Duration,
    load: Duration,
    proxy_cores: Vec<Core>,
    load_core: Core,
}

impl Account {
    pub fn read(load: &Load) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            proxy: process::cpu(load.proxy)?,
            upstream: process::cpu(load.upstream)?,
            load: process::cpu(std::process::id())?,
            proxy_cores: load.proxy_cores.iter().map(|core| process::core(*core)).collect::<Result<_>>()?,
            load_core: process::core(load.load_core)?,
        })
    }

    /// `latencies` in nanoseconds, at least one.
    pub fn until(&self, after: &Self, latencies: &mut [u32]) -> Window {
        latencies.sort_unstable();
        let micros = |nanos: u32| f64::from(nanos) / 1e3;
        let used = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() * 1e6;
        Window {
            seconds: (after.at - self.at).as_secs_f64(),
            answered: latencies.len() as u64,
            checked: latencies.len() as u64,
            p50_us: micros(statistics::quantile(latencies, 0.5)),
            p99_us: micros(statistics::quantile(latencies, 0.99)),
            max_us: micros(statistics::quantile(latencies, 1.0)),
            proxy_cpu_us: used(self.proxy, after.proxy),
            upstream_cpu_us: used(self.upstream, after.upstream),
            load_cpu_us: used(self.load, after.load),
            proxy_core_busy: self
                .proxy_cores
                .iter()
                .zip(&after.proxy_cores)
                .map(|(before, after)| before.busy_until(after))
                .sum(),
            load_core_busy: self.load_core.busy_until(&after.load_core),
        }
    }
}

/// What one window showed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Window {
    pub seconds: f64,
    pub answered: u64,
    /// Answers that were found right, those of the warm-up too.
    pub checked: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    pub proxy_cpu_us: f64,
    pub upstream_cpu_us: f64,
    pub load_cpu_us: f64,
    /// Shares of the window, 0 to 1 for each core.
    pub proxy_core_busy: f64,
    pub load_core_busy: f64,
}

impl Window {
    pub fn per_second(&self) -> f64 {
        self.answered as f64 / self.seconds
    }

    /// CPU of the proxy for each answered call, µs.
    pub fn proxy_us(&self) -> f64 {
        self.proxy_cpu_us / self.answered as f64
    }

    /// What the proxy's own account says of its core, 0 to 1.
    pub fn proxy_share(&self) -> f64 {
        self.proxy_cpu_us / 1e6 / self.seconds
    }

    /// The upstream's part of the load's core, 0 to 1.
    pub fn upstream_share(&self) -> f64 {
        self.upstream_cpu_us / 1e6 / self.seconds
    }

    /// The load's own part of its core, 0 to 1.
    pub fn load_share(&self) -> f64 {
        self.load_cpu_us / 1e6 / self.seconds
    }

    /// What others took of both cores, 0 to 2.
    pub fn others(&self) -> f64 {
        let ours = (self.proxy_cpu_us + self.upstream_cpu_us + self.load_cpu_us) / 1e6 / self.seconds;
        (self.proxy_core_busy + self.load_core_busy - ours).max(0.0)
    }
}
