//! What a second core brings: the gateway with one worker thread, and with two.
//!
//! With enough cores each side has its own. Else all share: gateway, upstream and load run on one core, the gateway
//! with one thread, then on two, the gateway with two. Calls per second then say what a second core brings to the
//! three together, and the gateway's CPU per call what its threads cost each other.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use spillway_figures::Goal;

use super::turns::ratio;
use crate::bench::load::part::Job;
use crate::bench::load::{Load, Window};
use crate::bench::message::Protocol;
use crate::bench::peers::{Kind, Proxy, Setting};
use crate::bench::process;
use crate::bench::results::{Results, figure, verdict};
use crate::bench::stand::Stand;
use crate::bench::statistics::median;

/// Of two threads, to one.
const GOAL: Goal = Goal::AtLeast(1.8);
/// Worker threads that are compared.
const THREADS: [usize; 2] = [1, 2];
/// Many connections with few calls on each, so that the kernel spreads them evenly over the threads' sockets.
const CONNECTIONS: usize = 32;
const STREAMS: usize = 2;
/// Two for the gateway, one for the upstream and the rest for the load, so that neither holds the gateway back.
const CORES_APART: usize = 6;
/// One of two threads that does more than this of the work: then the other one is not used.
const UNEVEN: f64 = 0.8;
/// Less than this of its cores, and calls per second are not the gateway's doing.
const SATURATED: f64 = 0.9;

#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub repetitions: usize,
    pub warm_up: Duration,
    pub measure: Duration,
}

impl Default for Extent {
    fn default() -> Self {
        Self { repetitions: 5, warm_up: Duration::from_millis(500), measure: Duration::from_millis(1_500) }
    }
}

impl Extent {
    /// Shows that it runs, and measures nothing.
    pub fn smoke() -> Self {
        Self { repetitions: 1, warm_up: Duration::from_millis(100), measure: Duration::from_millis(200) }
    }
}

/// Who runs where.
#[derive(Debug)]
enum Layout {
    /// Gateway, upstream and each process of the load on cores of their own.
    Apart { gateway: Vec<usize>, upstream: usize, load: Vec<usize> },
    /// All on the same cores, as many as the gateway has threads.
    Shared(Vec<usize>),
}

impl Layout {
    fn of(cores: &[usize]) -> Result<Self> {
        match cores {
            [first, second, upstream, load @ ..] if cores.len() >= CORES_APART => {
                Ok(Self::Apart { gateway: vec![*first, *second], upstream: *upstream, load: load.to_vec() })
            }
            [first, second, ..] => Ok(Self::Shared(vec![*first, *second])),
            _ => bail!("two worker threads need two cores"),
        }
    }

    /// Of the gateway with so many worker threads.
    fn gateway(&self, threads: usize) -> Vec<usize> {
        match self {
            Self::Apart { gateway, .. } => gateway.iter().copied().take(threads).collect(),
            Self::Shared(cores) => cores.iter().copied().take(threads).collect(),
        }
    }

    fn upstream(&self, threads: usize) -> Vec<usize> {
        match self {
            Self::Apart { upstream, .. } => vec![*upstream],
            Self::Shared(_) => self.gateway(threads),
        }
    }

    /// Of each process of the load.
    fn load(&self, threads: usize) -> Vec<Vec<usize>> {
        match self {
            Self::Apart { load, .. } => load.iter().map(|core| vec![*core]).collect(),
            Self::Shared(_) => vec![self.gateway(threads)],
        }
    }
}

/// One turn of one variant.
#[derive(Clone, Debug)]
struct Turn {
    per_second: f64,
    /// CPU of the gateway for each call, µs.
    cpu_us: f64,
    /// Cores that the gateway used.
    used: f64,
    /// What the busiest of its threads did of its work, 0 to 1.
    busiest: f64,
}

pub fn run(extent: &Extent, spillway: &Path, results: &mut Results) -> Result<()> {
    let layout = Layout::of(&process::cores()?)?;
    let stand = Stand::build(spillway)?;
    let mut turns: [Vec<Turn>; THREADS.len()] = Default::default();
    for repetition in 0..extent.repetitions {
        // Who begins changes.
        let mut order: Vec<usize> = (0..THREADS.len()).collect();
        if repetition % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let threads = THREADS[at];
            let turn = turn(&stand, &layout, threads, extent);
            turns[at].push(turn.with_context(|| format!("{threads} threads in repetition {repetition}"))?);
        }
    }
    report(extent, &layout, &turns, results)
}

fn turn(stand: &Stand, layout: &Layout, threads: usize, extent: &Extent) -> Result<Turn> {
    process::bind(stand.upstream.id(), &layout.upstream(threads))?;
    let cores = layout.gateway(threads);
    let setting = Setting { threads, cores: cores.clone(), ..stand.setting.clone() };
    let proxy = Proxy::start(Kind::Spillway, &setting)?;
    let before = process::threads(proxy.pid)?;
    let windows = load(stand, &layout.load(threads), &proxy, &cores, extent)?;
    let after = process::threads(proxy.pid)?;
    let work: Vec<Duration> =
        after.iter().map(|(thread, cpu)| cpu.saturating_sub(before.get(thread).copied().unwrap_or_default())).collect();
    let all: Duration = work.iter().sum();
    let busiest = work.iter().max().copied().unwrap_or_default().as_secs_f64() / all.as_secs_f64();
    let per_second: f64 = windows.iter().map(Window::per_second).sum();
    // Each process of the load has seen the same gateway at work.
    let used = windows.iter().map(Window::proxy_share).sum::<f64>() / windows.len() as f64;
    let turn = Turn { per_second, cpu_us: used * 1e6 / per_second, used, busiest };
    println!(
        "{threads} threads: {:.2} us/call, {per_second:.0} calls/s, {used:.2} cores, the busiest thread did {:.0} %",
        turn.cpu_us,
        busiest * 100.0
    );
    ensure!(
        threads == 1 || busiest <= UNEVEN,
        "one of {threads} threads did {:.0} % of the work: the others are not used",
        busiest * 100.0
    );
    Ok(turn)
}

/// All processes of the load at once.
fn load(stand: &Stand, parts: &[Vec<usize>], proxy: &Proxy, cores: &[usize], extent: &Extent) -> Result<Vec<Window>> {
    std::thread::scope(|scope| {
        let running: Vec<_> = parts
            .iter()
            .map(|on| {
                let job = Job::Load(Load {
                    pki: stand.setting.identities.folder().to_owned(),
                    address: proxy.address,
                    protocol: Protocol::Grpc,
                    connections: CONNECTIONS.div_ceil(parts.len()),
                    streams: STREAMS,
                    distinct: false,
                    status_in_head: false,
                    warm_up: extent.warm_up,
                    measure: extent.measure,
                    proxy: proxy.pid,
                    upstream: stand.upstream.id(),
                    proxy_cores: cores.to_vec(),
                    load_core: on[0],
                });
                scope.spawn(move || job.start::<Window>(on))
            })
            .collect();
        running.into_iter().map(|part| part.join().ok().context("a part of the load broke")?).collect()
    })
}

fn report(extent: &Extent, layout: &Layout, turns: &[Vec<Turn>; THREADS.len()], results: &mut Results) -> Result<()> {
    let how = match layout {
        Layout::Apart { load, .. } => format!(
            "Each worker thread has a core of its own, and so have the upstream and the load, which runs on {}.",
            load.len()
        ),
        Layout::Shared(_) => {
            "This machine has too few cores to give load and upstream their own: all three share one core,\n\
             then two, so that calls/s are what a second core brings to all three together."
                .to_owned()
        }
    };
    let mut text = format!(
        "## One worker thread and two\n\n\
         The small unary gRPC call, closed loop: {CONNECTIONS} connections, {STREAMS} calls in flight on each; {} turns of {} s each, interleaved. {how}\n\
         Median [95 % interval].\n\n\
         | threads | calls/s | CPU of the gateway µs/call | cores that it used | the busiest thread's part |\n|---|---|---|---|---|\n",
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let of = |turns: &[Turn], value: &dyn Fn(&Turn) -> f64| turns.iter().map(value).collect::<Vec<f64>>();
    for (threads, turns) in THREADS.iter().zip(turns) {
        let subject = format!("{threads} threads");
        let cpu = of(turns, &|turn| turn.cpu_us);
        let rate = of(turns, &|turn| turn.per_second);
        results.sample("cores", &subject, "CPU a call", "us", &cpu);
        results.sample("cores", &subject, "calls", "1/s", &rate);
        writeln!(
            text,
            "| {threads} | {:.0} | {} | {:.2} | {:.0} % |",
            median(&rate),
            median(&cpu),
            median(&of(turns, &|turn| turn.used)).value,
            median(&of(turns, &|turn| turn.busiest)).value * 100.0,
        )?;
    }
    let [one, two] = turns;
    let calls = ratio(&of(two, &|turn| turn.per_second), &of(one, &|turn| turn.per_second));
    let cpu = ratio(&of(two, &|turn| turn.cpu_us), &of(one, &|turn| turn.cpu_us));
    write!(
        text,
        "\nTwo threads to one, calls/s: **{calls}**; goal at least 1.8: {}. CPU of the gateway per call: {cpu}.",
        verdict(calls.value, GOAL)
    )?;
    figure("speed.cores.ratio", calls.value, "ratio", GOAL);
    figure("speed.cores.cpu_ratio", cpu.value, "ratio", Goal::None);
    let idle = THREADS
        .iter()
        .zip(turns)
        .any(|(threads, turns)| median(&of(turns, &|turn| turn.used)).value < SATURATED * *threads as f64);
    if matches!(layout, Layout::Apart { .. }) && idle {
        write!(text, "\n\n**The gateway did not fill its cores: calls/s are a lower bound.**")?;
    }
    results.add(text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_few_cores_all_share() {
        assert!(Layout::of(&[0]).is_err());
        for cores in [vec![0, 1], vec![0, 1, 2, 3, 4]] {
            let layout = Layout::of(&cores).unwrap();
            assert_eq!([layout.gateway(1), layout.upstream(1), layout.load(1).concat()], [[0]; 3].map(Vec::from));
            assert_eq!([layout.gateway(2), layout.upstream(2), layout.load(2).concat()], [[0, 1]; 3].map(Vec::from));
        }
    }

    #[test]
    fn with_many_nobody_shares() {
        let layout = Layout::of(&[2, 3, 4, 5, 6, 7]).unwrap();
        assert_eq!((layout.gateway(1), layout.gateway(2)), (vec![2], vec![2, 3]));
        for threads in THREADS {
            assert_eq!(layout.upstream(threads), [4]);
            assert_eq!(layout.load(threads), [[5], [6], [7]]);
        }
    }
}
