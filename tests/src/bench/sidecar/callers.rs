//! gRPC calls with any body over mTLS h2, every answer checked: in a closed loop, or at a fixed rate.
//!
//! The rule of the fixed rate: calls are planned at even distances, and a call's latency runs from the moment
//! that it was planned for, however late it was sent. A server that stalls so delays all calls planned meanwhile,
//! as it would for callers who do not know of each other. One that is refused because there are too many counts as
//! one that never came back.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::Extent;
use crate::bench::{process, statistics};

const INFER: &str = "https://localhost/inference.GRPCInferenceService/ModelInfer";
/// Large answers come without waiting for window updates.
const WINDOW: u32 = 8 << 20;
/// A call that is sent later than this after its moment counts as late.
const LATE: Duration = Duration::from_millis(1);
/// What `spillway-error` says of a request that finds too many before it.
const OVERLOADED: &str = "overloaded";
/// A connection waits for the server to say how many streams it takes.
const SETTINGS: Duration = Duration::from_millis(50);

/// What is asked, in turn, and what must come back.
pub struct Work {
    /// Framed gRPC messages.
    pub bodies: Vec<Bytes>,
    /// Judges the answer to the body of this number: head, trailers, framed message.
    #[expect(clippy::type_complexity, reason = "it is one closure")]
    pub check: Box<dyn Fn(usize, &HeaderMap, &[u8]) -> Result<()>>,
}

/// Open connections, for one thread with a `LocalSet`.
pub struct Callers {
    senders: Vec<SendRequest<Bytes>>,
    shared: Rc<Shared>,
}

struct Shared {
    work: Work,
    next: Cell<usize>,
    counting: Cell<bool>,
    /// Nanoseconds.
    latencies: RefCell<Vec<u32>>,
    late: Cell<u64>,
    /// Calls come at a fixed rate, whatever the server takes.
    insisting: Cell<bool>,
    refused: Cell<u64>,
}

/// What one window showed.
#[derive(Clone, Debug)]
pub struct Window {
    pub seconds: f64,
    /// Sorted nanoseconds.
    latencies: Vec<u32>,
    /// CPU time of each process that was watched.
    cpu: Vec<Duration>,
    /// Calls of a fixed rate that were sent more than a millisecond after their moment.
    pub late: u64,
    /// Calls of a fixed rate that were refused as too many; their latency is beyond all others.
    pub refused: u64,
}

impl Window {
    pub fn answered(&self) -> usize {
        self.latencies.len()
    }

    pub fn per_second(&self) -> f64 {
        self.answered() as f64 / self.seconds
    }

    pub fn quantile_us(&self, share: f64) -> f64 {
        f64::from(statistics::quantile(&self.latencies, share)) / 1e3
    }

    /// CPU of all watched processes together for each call, µs.
    pub fn cpu_us(&self) -> f64 {
        self.cpu.iter().sum::<Duration>().as_secs_f64() * 1e6 / self.answered() as f64
    }

    /// CPU of one of the watched processes for each call, µs.
    pub fn cpu_us_of(&self, process: usize) -> f64 {
        self.cpu.get(process).map_or(0.0, |cpu| cpu.as_secs_f64() * 1e6 / self.answered() as f64)
    }
}

impl Callers {
    pub async fn connect(address: SocketAddr, tls: &Arc<ClientConfig>, connections: usize, work: Work) -> Result<Self> {
        let connector = TlsConnector::from(tls.clone());
        let mut senders = Vec::with_capacity(connections);
        for _ in 0..connections {
            let stream = TcpStream::connect(address).await.with_context(|| format!("cannot reach {address}"))?;
            stream.set_nodelay(true)?;
            let stream = connector.connect(ServerName::try_from("localhost")?, stream).await.context("no TLS")?;
            let (sender, connection) = h2::client::Builder::new()
                .enable_push(false)
                .initial_window_size(WINDOW)
                .initial_connection_window_size(WINDOW)
                .max_send_buffer_size(WINDOW as usize)
                .handshake(stream)
                .await?;
            // Its error also reaches each call on it.
            tokio::task::spawn_local(connection);
            senders.push(sender);
        }
        tokio::time::sleep(SETTINGS).await;
        let shared = Shared {
            work,
            next: Cell::new(0),
            counting: Cell::new(false),
            latencies: RefCell::new(Vec::new()),
            late: Cell::new(0),
            insisting: Cell::new(false),
            refused: Cell::new(0),
        };
        Ok(Self { senders, shared: Rc::new(shared) })
    }

    /// One call for each body, one after the other.
    pub async fn each_once(&self) -> Result<()> {
        let sender = self.senders.first().context("there is no connection")?;
        for _ in 0..self.shared.work.bodies.len() {
            self.shared.clone().call(sender.clone(), Instant::now()).await?;
        }
        Ok(())
    }

    /// So many calls in flight on each connection.
    pub async fn closed(&self, streams: usize, extent: &Extent, watched: &[u32]) -> Result<Window> {
        let (mut calls, ended) = (JoinSet::new(), Rc::new(Cell::new(false)));
        for sender in &self.senders {
            for _ in 0..streams {
                let (shared, sender, ended) = (self.shared.clone(), sender.clone(), ended.clone());
                calls.spawn_local(async move {
                    while !ended.get() {
                        shared.clone().call(sender.clone(), Instant::now()).await?;
                    }
                    Ok(())
                });
            }
        }
        let failed = async || match calls.join_next().await {
            Some(Ok(failed)) => failed,
            Some(Err(error)) => Err(error.into()),
            None => bail!("there are no callers"),
        };
        let window = self.window(extent, watched, failed).await?;
        ended.set(true);
        finish(calls).await?;
        Ok(window)
    }

    /// So many calls a second.
    pub async fn open(&self, rate: f64, extent: &Extent, watched: &[u32]) -> Result<Window> {
        let mut moments = Pacer::start(rate)?;
        let mut calls: JoinSet<Result<()>> = JoinSet::new();
        let mut senders = self.senders.iter().cycle();
        let failed = async || loop {
            tokio::select! {
                moment = moments.next() => {
                    let Some(sender) = senders.next() else { bail!("there is no connection") };
                    calls.spawn_local(self.shared.clone().call(sender.clone(), moment?));
                }
                Some(ended) = calls.join_next() => ended??,
            }
        };
        self.shared.insisting.set(true);
        let window = self.window(extent, watched, failed).await?;
        finish(calls).await?;
        self.shared.insisting.set(false);
        Ok(window)
    }

    /// Calls go on while `failed` runs, which ends at the first that is not answered rightly.
    async fn window(
        &self,
        extent: &Extent,
        watched: &[u32],
        mut failed: impl AsyncFnMut() -> Result<()>,
    ) -> Result<Window> {
        let cpu = || watched.iter().map(|pid| process::cpu(*pid)).collect::<Result<Vec<_>>>();
        let mut begun = None;
        let calls = failed();
        tokio::pin!(calls);
        for (counting, length) in [(false, extent.warm_up()), (true, extent.measure)] {
            if counting {
                begun = Some((Instant::now(), cpu()?));
            }
            self.shared.counting.set(counting);
            tokio::select! {
                ended = &mut calls => bail!(ended.err().unwrap_or_else(|| anyhow::anyhow!("the calls ended"))),
                () = tokio::time::sleep(length) => {}
            }
        }
        self.shared.counting.set(false);
        let (start, before) = begun.context("nothing was measured")?;
        let (seconds, after) = (start.elapsed().as_secs_f64(), cpu()?);
        let mut latencies = self.shared.latencies.take();
        ensure!(!latencies.is_empty(), "no call was answered in {:?}", extent.measure);
        latencies.sort_unstable();
        let cpu = before.into_iter().zip(after).map(|(before, after)| after.saturating_sub(before)).collect();
        Ok(Window { seconds, latencies, cpu, late: self.shared.late.take(), refused: self.shared.refused.take() })
    }
}

/// Waits for what is under way: many calls that are dropped at once are a flood of resets, which ends their connection.
async fn finish(mut calls: JoinSet<Result<()>>) -> Result<()> {
    while let Some(ended) = calls.join_next().await {
        ended??;
    }
    Ok(())
}

impl Shared {
    async fn call(self: Rc<Self>, sender: SendRequest<Bytes>, moment: Instant) -> Result<()> {
        let number = self.next.get();
        self.next.set((number + 1) % self.work.bodies.len());
        let body = self.work.bodies[number].clone();
        let mut sender = sender.ready().await?;
        if self.counting.get() && moment.elapsed() > LATE {
            self.late.set(self.late.get() + 1);
        }
        let (said, message) = exchange(&mut sender, body).await?;
        let mut took = u32::try_from(moment.elapsed().as_nanos()).unwrap_or(u32::MAX);
        if self.insisting.get() && said.get("spillway-error").is_some_and(|code| code == OVERLOADED) {
            took = u32::MAX;
            self.refused.set(self.refused.get() + u64::from(self.counting.get()));
        } else {
            ensure!(said.get("grpc-status").is_some_and(|status| status == "0"), "a wrong answer: {said:?}");
            (self.work.check)(number, &said, &message).with_context(|| format!("a wrong answer: {said:?}"))?;
        }
        if self.counting.get() {
            self.latencies.borrow_mut().push(took);
        }
        Ok(())
    }
}

/// One call: head and trailers in one, and the framed answer.
async fn exchange(sender: &mut SendRequest<Bytes>, body: Bytes) -> Result<(HeaderMap, Bytes)> {
    let request = Request::post(INFER)
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "spillway-bench")
        .body(())?;
    let (response, mut send) = sender.send_request(request, false)?;
    send.send_data(body, true)?;
    let (head, mut body) = response.await.context("no answer")?.into_parts();
    ensure!(head.status == 200, "a wrong answer: {} {:?}", head.status, head.headers);
    let mut parts = Vec::new();
    while let Some(part) = body.data().await {
        let part = part.context("no whole answer")?;
        body.flow_control().release_capacity(part.len())?;
        parts.push(part);
    }
    let mut said = head.headers;
    // An error without a message has its status in the head.
    said.extend(body.trailers().await.context("no trailers")?.unwrap_or_default());
    Ok((said, joined(parts)))
}

fn joined(mut parts: Vec<Bytes>) -> Bytes {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    let mut whole = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    for part in parts {
        whole.extend_from_slice(&part);
    }
    whole.freeze()
}

/// A thread that says when a call is due: a runtime's own timer has steps of a millisecond.
struct Pacer {
    moments: mpsc::UnboundedReceiver<Instant>,
    ended: Arc<AtomicBool>,
}

impl Pacer {
    fn start(rate: f64) -> Result<Self> {
        let distance = Duration::try_from_secs_f64(1.0 / rate).context("a rate must be more than 0")?;
        let (tell, moments) = mpsc::unbounded_channel();
        let ended = Arc::new(AtomicBool::new(false));
        let stop = ended.clone();
        std::thread::spawn(move || {
            let mut moment = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                moment += distance;
                std::thread::sleep(moment.saturating_duration_since(Instant::now()));
                if tell.send(moment).is_err() {
                    return;
                }
            }
        });
        Ok(Self { moments, ended })
    }

    async fn next(&mut self) -> Result<Instant> {
        self.moments.recv().await.context("the pacer is gone")
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(latencies: Vec<u32>) -> Window {
        Window {
            seconds: 2.0,
            latencies,
            cpu: vec![Duration::from_micros(30), Duration::from_micros(10)],
            late: 0,
            refused: 0,
        }
    }

    #[test]
    fn cpu_is_told_for_each_call() {
        let window = window(vec![1_000, 2_000, 3_000, 4_000]);
        assert_eq!((window.cpu_us(), window.cpu_us_of(0), window.cpu_us_of(1)), (10.0, 7.5, 2.5));
        assert_eq!((window.per_second(), window.quantile_us(0.5), window.quantile_us(1.0)), (2.0, 2.0, 4.0));
    }

    #[test]
    fn parts_are_joined_in_order() {
        let parts =
            |texts: &[&'static str]| joined(texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect());
        assert_eq!((parts(&[]), parts(&["a"]), parts(&["a", "bc", "d"])), ("".into(), "a".into(), "abcd".into()));
    }

    #[tokio::test]
    async fn a_late_reader_gets_all_moments_at_even_distances() {
        let mut pacer = Pacer::start(1_000.0).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let first = pacer.next().await.unwrap();
        let mut last = first;
        for _ in 0..10 {
            last = pacer.next().await.unwrap();
        }
        assert_eq!(last - first, Duration::from_millis(10));
    }
}
