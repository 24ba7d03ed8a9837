//! The open loop: calls begin when a plan says so, however long the earlier ones take, as those of clients
//! who do not know of each other do.
//!
//! The rule: latency runs from the planned moment, not from the one in which the call went out, so that a
//! proxy that stands still is charged for all who would have called meanwhile (Tene, "coordinated omission").
//! A call that is turned away, or takes longer than the model's deadline, counts as one that took all of it.
//! Gaps between arrivals are exponential (a Poisson process), from a fixed seed: each peer meets the same plan.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Caller, connector};
use crate::bench::identities::Identities;
use crate::bench::message::Protocol;
use crate::bench::process::{self, Core};
use crate::bench::statistics::quantile;

/// A call that goes out this long after its planned moment was sent late: the load or the connection held it up.
const LATE: Duration = Duration::from_millis(1);
/// What a call has lost that is not answered: the model's deadline in this bench, and the peers' timeouts.
const LOST: Duration = Duration::from_secs(1);
/// Calls without an answer from which on no more are sent, but lost: the proxy does not keep up with the plan.
const UNANSWERED: usize = 20_000;
/// How long the last answers may take after the last call.
const PATIENCE: Duration = Duration::from_secs(5);
/// From which all plans are drawn.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Open {
    pub pki: PathBuf,
    pub address: SocketAddr,
    pub protocol: Protocol,
    /// Calls that begin each second.
    pub rate: f64,
    pub connections: usize,
    pub warm_up: Duration,
    pub measure: Duration,
    /// The core that the proxy is bound to.
    pub proxy_core: usize,
    /// The core that the upstream and this process are bound to.
    pub load_core: usize,
}

/// What the calls showed that were planned for the window: all of them, since each is waited for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    pub calls: u64,
    /// Those that went out later than [`LATE`] after their moment.
    pub late: u64,
    /// Those that were turned away for the load, too late, or never sent: [`LOST`] each in the latencies.
    pub lost: u64,
    pub p50_us: f64,
    pub p90_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub max_us: f64,
    /// Shares of the window, 0 to 1.
    pub proxy_core_busy: f64,
    pub load_core_busy: f64,
}

impl Found {
    /// The share of calls that got no answer, 0 to 1.
    pub fn lost_share(&self) -> f64 {
        self.lost as f64 / self.calls as f64
    }

    /// The share of calls that went out late, 0 to 1.
    pub fn late_share(&self) -> f64 {
        self.late as f64 / self.calls as f64
    }
}

/// Runs inside a `LocalSet`. A wrong answer or a lost connection ends it with an error.
pub async fn run(job: &Open) -> Result<Found> {
    ensure!(job.rate.is_finite() && job.rate > 0.0, "{} calls a second cannot be planned", job.rate);
    let connector = connector(&Identities::at(&job.pki), job.protocol)?;
    let caller = Rc::new(Caller::new(job.protocol, false));
    let mut senders = Vec::with_capacity(job.connections);
    for _ in 0..job.connections {
        senders.push(caller.connect(job.address, &connector).await?);
    }
    let seen: Rc<RefCell<Seen>> = Rc::default();
    let start = Instant::now();
    let (counts_from, end) = (start + job.warm_up, start + job.warm_up + job.measure);
    let (plan, mut due) = mpsc::unbounded_channel();
    let gaps = Poisson::new(job.rate, SEED);
    let clock = std::thread::Builder::new().name("clock".into()).spawn(move || keep_to(gaps, start, end, &plan))?;
    let mut calls: JoinSet<Result<()>> = JoinSet::new();
    let (mut next, mut before) = (0, None);
    loop {
        tokio::select! {
            biased;
            planned = due.recv() => {
                let Some(planned) = planned else { break };
                let counts = planned >= counts_from;
                if counts && before.is_none() {
                    before = Some(Cores::read(job)?);
                }
                if calls.len() >= UNANSWERED {
                    if counts {
                        seen.borrow_mut().note(Duration::ZERO, None);
                    }
                    continue;
                }
                let (mut sender, caller, seen) = (senders[next].another()?, caller.clone(), counts.then(|| seen.clone()));
                next = (next + 1) % senders.len();
                calls.spawn_local(async move {
                    sender = sender.ready().await?;
                    let sent = planned.elapsed();
                    let answered = caller.call_or_lose(&mut sender).await?;
                    if let Some(seen) = seen {
                        seen.borrow_mut().note(sent, answered.then(|| planned.elapsed()));
                    }
                    Ok(())
                });
            }
            Some(ended) = calls.join_next() => ended??,
        }
    }
    let before = before.context("no call was planned to be counted")?;
    let after = Cores::read(job)?;
    let rest = async {
        while let Some(ended) = calls.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, rest)
        .await
        .with_context(|| format!("calls without an answer after {PATIENCE:?}"))??;
    if clock.join().is_err() {
        bail!("the clock broke");
    }
    let seen = seen.take();
    seen.found(before.proxy.busy_until(&after.proxy), before.load.busy_until(&after.load))
}

/// Sleeps from one planned moment to the next and tells each of them; ends with the plan, or when nobody
/// listens. A thread, since tokio's timers are of whole milliseconds.
fn keep_to(mut gaps: Poisson, start: Instant, end: Instant, plan: &mpsc::UnboundedSender<Instant>) {
    sleep_exactly();
    let mut planned = start + gaps.next();
    while planned < end {
        std::thread::sleep(planned.saturating_duration_since(Instant::now()));
        if plan.send(planned).is_err() {
            return;
        }
        planned += gaps.next();
    }
}

/// Asks the kernel not to add its 50 µs of timer slack to this thread's sleeps (proc_pid_timerslack_ns(5)).
/// Where it refuses, calls go out that much later, and their latency says so.
fn sleep_exactly() {
    let thread = std::fs::read_link("/proc/thread-self");
    if let Some(number) = thread.as_deref().ok().and_then(|thread| thread.file_name()) {
        let _ = std::fs::write(std::path::Path::new("/proc").join(number).join("timerslack_ns"), "1");
    }
}

/// Gaps between arrivals at random: exponential, with a mean of one over the rate.
#[derive(Debug)]
struct Poisson {
    rate: f64,
    random: u64,
}

impl Poisson {
    fn new(rate: f64, seed: u64) -> Self {
        Self { rate, random: seed }
    }

    fn next(&mut self) -> Duration {
        // xorshift64 (Marsaglia 2003, triple 13, 7, 17); its upper 53 bits as a number in (0, 1].
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let uniform = ((self.random >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(-uniform.ln() / self.rate)
    }
}

struct Cores {
    proxy: Core,
    load: Core,
}

impl Cores {
    fn read(job: &Open) -> Result<Self> {
        Ok(Self { proxy: process::core(job.proxy_core)?, load: process::core(job.load_core)? })
    }
}

/// Calls that count.
#[derive(Debug, Default)]
struct Seen {
    /// From the planned moment, ns.
    latencies: Vec<u64>,
    late: u64,
    lost: u64,
}

impl Seen {
    /// `sent`, `answered`: after the planned moment.
    fn note(&mut self, sent: Duration, answered: Option<Duration>) {
        let latency = answered.unwrap_or(LOST);
        self.latencies.push(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        self.lost += u64::from(answered.is_none());
        self.late += u64::from(sent > LATE);
    }

    fn found(mut self, proxy_core_busy: f64, load_core_busy: f64) -> Result<Found> {
        self.latencies.sort_unstable();
        ensure!(!self.latencies.is_empty(), "no call was answered");
        let micros = |share| quantile(&self.latencies, share) as f64 / 1e3;
        Ok(Found {
            calls: self.latencies.len() as u64,
            late: self.late,
            lost: self.lost,
            p50_us: micros(0.5),
            p90_us: micros(0.9),
            p99_us: micros(0.99),
            p999_us: micros(0.999),
            max_us: micros(1.0),
            proxy_core_busy,
            load_core_busy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_exponential_and_the_same_each_time() {
        const COUNT: usize = 100_000;
        let gaps = |seed| {
            let mut gaps = Poisson::new(1_000.0, seed);
            (0..COUNT).map(|_| gaps.next().as_secs_f64() * 1e3).collect::<Vec<_>>()
        };
        let found = gaps(SEED);
        let mean = found.iter().sum::<f64>() / COUNT as f64;
        let variance = found.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / COUNT as f64;
        // Of an exponential distribution the standard deviation is the mean, and exp(-1) lie above it.
        let above = found.iter().filter(|gap| **gap > mean).count() as f64 / COUNT as f64;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        assert!((variance.sqrt() - mean).abs() < 0.02, "{variance}");
        assert!((above - (-1.0_f64).exp()).abs() < 0.01, "{above}");
        assert_eq!(found, gaps(SEED));
        assert_ne!(found, gaps(SEED + 1));
    }

    #[test]
    fn the_clock_tells_moments_of_the_plan_and_none_early() {
        let (plan, mut due) = mpsc::unbounded_channel();
        let start = Instant::now();
        let end = start + Duration::from_millis(50);
        keep_to(Poisson::new(2_000.0, SEED), start, end, &plan);
        drop(plan);
        let mut expected = Poisson::new(2_000.0, SEED);
        let mut at = start;
        let mut told = 0;
        while let Some(planned) = due.blocking_recv() {
            at += expected.next();
            assert_eq!(planned, at);
            told += 1;
        }
        assert!((50..200).contains(&told), "{told}");
        assert!(at < end && at + expected.next() >= end);
        assert!(Instant::now() >= at, "a moment was told before it came");
    }

    #[test]
    fn waiting_counts_from_the_planned_moment() {
        let mut seen = Seen::default();
        for call in 1..=1_000_u64 {
            // Sent when it was 0.2 ms over time; every hundredth was held up.
            let sent = Duration::from_micros(if call.is_multiple_of(100) { 2_000 } else { 200 });
            seen.note(sent, Some(Duration::from_micros(call * 10)));
        }
        let found = seen.found(0.5, 0.25).unwrap();
        assert_eq!((found.calls, found.late), (1_000, 10));
        assert_eq!([found.p50_us, found.p99_us, found.p999_us, found.max_us], [5_000.0, 9_900.0, 9_990.0, 10_000.0]);
        assert!(Seen::default().found(0.0, 0.0).is_err());
    }

    #[test]
    fn a_call_that_is_turned_away_at_once_is_none_that_was_quick() {
        let mut seen = Seen::default();
        for call in 0..100 {
            seen.note(Duration::ZERO, (call >= 2).then_some(Duration::from_millis(2)));
        }
        let found = seen.found(0.5, 0.25).unwrap();
        assert_eq!((found.lost, found.p90_us, found.p99_us), (2, 2_000.0, LOST.as_secs_f64() * 1e6));
    }
}
