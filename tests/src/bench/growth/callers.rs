//! Who calls a gateway: a closed loop over all models, many entities and some tenants, every answer checked.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use http::Request;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{message, world};
use crate::bench::{process, statistics};

const URI: &str = "https://localhost/inference.GRPCInferenceService/ModelInfer";
/// Entities that are asked about.
const ENTITIES: u64 = 10_000;
/// gRPC's status where a model is not known.
const NOT_FOUND: &str = "5";

/// One connection.
#[derive(Clone)]
pub struct Caller {
    sender: SendRequest<Bytes>,
}

/// What a call got that was answered rightly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    Yes,
    /// There is no such model.
    Unknown,
}

impl Caller {
    pub async fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot reach {address}"))?;
        stream.set_nodelay(true)?;
        let connector = TlsConnector::from(config.clone());
        let stream = connector.connect(ServerName::try_from("localhost")?, stream).await.context("no TLS")?;
        let (sender, connection) = h2::client::Builder::new().enable_push(false).handshake(stream).await?;
        // Its error also reaches each call on it.
        tokio::task::spawn_local(connection);
        Ok(Self { sender })
    }

    /// Any other answer than the right one is an error.
    pub async fn call(&mut self, model: &str, entity: &str) -> Result<Answered> {
        let request = Request::post(URI)
            .version(http::Version::HTTP_2)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let mut sender = self.sender.clone().ready().await?;
        let (response, mut send) = sender.send_request(request, false)?;
        send.send_data(message::request(model, entity), true)?;
        let (head, mut body) = response.await.context("no answer")?.into_parts();
        let mut received = BytesMut::new();
        while let Some(part) = body.data().await {
            let part = part.context("no whole answer")?;
            body.flow_control().release_capacity(part.len())?;
            received.extend_from_slice(&part);
        }
        let trailers = body.trailers().await.context("no trailers")?;
        // An answer without a message has its status in the head.
        let status = trailers.as_ref().unwrap_or(&head.headers).get("grpc-status");
        if status.is_some_and(|status| status == NOT_FOUND) {
            return Ok(Answered::Unknown);
        }
        let right = status.is_some_and(|status| status == "0") && message::is_answer(&received, model, entity);
        ensure!(right, "a wrong answer for {model}: {status:?} {:?} {received:?}", head.headers);
        Ok(Answered::Yes)
    }
}

/// What is called, and how.
pub struct Calls {
    pub address: SocketAddr,
    /// The process whose CPU time is taken.
    pub gateway: u32,
    /// One for each connection.
    pub clients: Vec<Arc<ClientConfig>>,
    /// In flight on each connection.
    pub streams: usize,
    pub models: usize,
    pub warm_up: Duration,
    pub measure: Duration,
}

#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The gateway's, µs a call.
    pub cpu_us: f64,
    pub per_second: f64,
    pub p99_us: f64,
}

/// Runs inside a `LocalSet`. A wrong answer or a lost connection ends it with an error.
pub async fn run(calls: &Calls) -> Result<Found> {
    let latencies: Rc<Latencies> = Rc::default();
    let turn = Rc::new(Cell::new(0_u64));
    let mut callers = tokio::task::JoinSet::new();
    for client in &calls.clients {
        let caller = Caller::connect(calls.address, client).await?;
        for _ in 0..calls.streams {
            callers.spawn_local(call_for_ever(caller.clone(), calls.models, turn.clone(), latencies.clone()));
        }
    }
    let mut failed = async || match callers.join_next().await {
        Some(Ok(Err(error))) => error,
        Some(Err(error)) => error.into(),
        _ => anyhow::anyhow!("there are no callers"),
    };
    tokio::select! {
        error = failed() => bail!(error),
        () = tokio::time::sleep(calls.warm_up) => {}
    }
    let (start, before) = (Instant::now(), process::cpu(calls.gateway)?);
    latencies.counting.set(true);
    tokio::select! {
        error = failed() => bail!(error),
        () = tokio::time::sleep(calls.measure) => {}
    }
    latencies.counting.set(false);
    let (seconds, used) = (start.elapsed().as_secs_f64(), process::cpu(calls.gateway)?.saturating_sub(before));
    let mut nanos = latencies.nanos.take();
    ensure!(!nanos.is_empty(), "no call was answered in {:?}", calls.measure);
    nanos.sort_unstable();
    Ok(Found {
        cpu_us: used.as_secs_f64() * 1e6 / nanos.len() as f64,
        per_second: nanos.len() as f64 / seconds,
        p99_us: statistics::quantile(&nanos, 0.99) as f64 / 1e3,
    })
}

#[derive(Default)]
struct Latencies {
    counting: Cell<bool>,
    nanos: RefCell<Vec<u64>>,
}

async fn call_for_ever(mut caller: Caller, models: usize, turn: Rc<Cell<u64>>, latencies: Rc<Latencies>) -> Result<()> {
    loop {
        let random = mix(turn.replace(turn.get() + 1));
        let model = world::model(usize::try_from(random % models as u64)?);
        let entity = format!("e-{:05}", mix(random) % ENTITIES);
        let start = Instant::now();
        let answered = caller.call(&model, &entity).await?;
        ensure!(answered == Answered::Yes, "the gateway does not know {model}");
        if latencies.counting.get() {
            latencies.nanos.borrow_mut().push(u64::try_from(start.elapsed().as_nanos())?);
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
pub fn mix(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
