//! Clients of one name: each asks DNS where it is, keeps that for its time to live, and calls what it was told.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::{ClientSubnet, EdnsOption};
use hickory_proto::rr::{Name, RData, RecordType};
use parking_lot::Mutex;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::client::{Client, Connection, Protocol};
use super::inference::{Case, INFER, assert_scores, entity, scores};

const DNS_PATIENCE: Duration = Duration::from_millis(500);
/// A client's own, for one request: many times the model's deadline, so that only what hangs is cut off.
const PATIENCE: Duration = Duration::from_secs(5);

/// What happened to one request.
#[derive(Clone, Debug)]
pub struct Call {
    pub client: usize,
    pub begun: Instant,
    /// Where DNS had sent the client.
    pub dialled: IpAddr,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A right answer, made in this region.
    Right { region: String },
    /// The gateway could not be reached, or the connection broke.
    Unreachable(String),
    /// It answered, and not well.
    Bad(String),
}

/// Clients that go on until stopped.
pub struct Crowd {
    stop: Arc<AtomicBool>,
    calls: Arc<Mutex<Vec<Call>>>,
    workers: JoinSet<()>,
}

/// Where a client was told to go, and until when that holds.
struct Told {
    addresses: Vec<IpAddr>,
    until: Instant,
}

impl Crowd {
    /// `clients` of as many subnets, each sending a request every `pause`; they ask these DNS nodes in turn.
    pub fn start(
        client: &Client,
        port: u16,
        dns: Vec<SocketAddr>,
        name: &str,
        clients: usize,
        pause: Duration,
        cases: &[Case],
    ) -> Self {
        let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (dns, name, cases): (Arc<[_]>, Arc<str>, Arc<[_]>) = (dns.into(), name.into(), cases.into());
        let mut workers = JoinSet::new();
        for number in 0..clients {
            let one = One {
                number,
                client: client.clone(),
                port,
                dns: dns.clone(),
                name: name.clone(),
                cases: cases.clone(),
            };
            let (stop, calls) = (stop.clone(), calls.clone());
            // Not all in step.
            let offset = pause.mul_f64(number as f64 / clients as f64);
            workers.spawn(async move {
                tokio::time::sleep(offset).await;
                one.run(pause, &stop, &calls).await;
            });
        }
        Self { stop, calls, workers }
    }

    /// What happened so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().clone()
    }

    /// Lets the running requests end; returns all in the order of their begin.
    pub async fn stop(self) -> Vec<Call> {
        self.stop.store(true, Ordering::Relaxed);
        self.workers.join_all().await;
        let mut calls = std::mem::take(&mut *self.calls.lock());
        calls.sort_by_key(|call| call.begun);
        calls
    }
}

struct One {
    number: usize,
    client: Client,
    port: u16,
    dns: Arc<[SocketAddr]>,
    name: Arc<str>,
    cases: Arc<[Case]>,
}

impl One {
    async fn run(&self, pause: Duration, stop: &AtomicBool, calls: &Mutex<Vec<Call>>) {
        let mut told: Option<Told> = None;
        let mut open: Option<(IpAddr, Connection)> = None;
        let mut turn = self.number;
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            if told.as_ref().is_none_or(|told| told.until <= begun) {
                // Old addresses are better than none.
                if let Some(found) = self.resolve().await {
                    told = Some(found);
                }
            }
            if let Some(told) = &told {
                let dialled = told.addresses[0];
                let case = &self.cases[turn % self.cases.len()];
                let call = tokio::time::timeout(PATIENCE, self.call(dialled, &mut open, case)).await;
                let outcome = call.unwrap_or_else(|_| {
                    open = None;
                    Outcome::Unreachable("no answer in time".into())
                });
                calls.lock().push(Call { client: self.number, begun, dialled, outcome });
                turn += 1;
            }
            tokio::time::sleep_until((begun + pause).into()).await;
        }
    }

    async fn resolve(&self) -> Option<Told> {
        for server in self.dns.iter() {
            if let Ok((addresses, ttl)) = resolve(*server, &self.name, subnet(self.number)).await
                && !addresses.is_empty()
            {
                return Some(Told { addresses, until: Instant::now() + ttl });
            }
        }
        None
    }

    async fn call(&self, dialled: IpAddr, open: &mut Option<(IpAddr, Connection)>, case: &Case) -> Outcome {
        let client = self.client.at((dialled, self.port).into());
        if open.as_ref().is_none_or(|(at, connection)| *at != dialled || connection.is_closed()) {
            *open = match client.connect(Protocol::H2).await {
                Ok(connection) => Some((dialled, connection)),
                Err(error) => return Outcome::Unreachable(format!("{error:#}")),
            };
        }
        let (_, connection) = open.as_mut().expect("just opened");
        match connection.send(client.json(INFER, &entity(&case.entity))).await {
            Ok(answer) if answer.is_ok() => {
                assert_scores("the crowd", &scores(&answer), std::slice::from_ref(case));
                Outcome::Right { region: answer.header("spillway-region").to_owned() }
            }
            Ok(answer) => Outcome::Bad(format!("{} {}", answer.status, answer.error_code())),
            Err(error) => {
                *open = None;
                Outcome::Unreachable(format!("{error:#}"))
            }
        }
    }
}

/// Each client has its own: 10.x.y.0/24.
pub fn subnet(client: usize) -> IpAddr {
    let number = u32::try_from(client).expect("not that many clients");
    Ipv4Addr::from_bits((10 << 24) | (number << 8)).into()
}

/// One A query for a client of a subnet; the addresses, and how long they may be kept.
pub async fn resolve(server: SocketAddr, name: &str, subnet: IpAddr) -> Result<(Vec<IpAddr>, Duration)> {
    let mut query = Message::new(1, MessageType::Query, OpCode::Query);
    query.add_query(Query::query(Name::from_ascii(format!("{name}."))?, RecordType::A));
    let mut edns = Edns::new();
    edns.set_max_payload(1_232);
    edns.options_mut().insert(EdnsOption::Subnet(ClientSubnet::new(subnet, 24, 0)));
    query.set_edns(edns);
    let socket = UdpSocket::bind(("127.0.0.1", 0)).await?;
    socket.connect(server).await?;
    socket.send(&query.to_vec()?).await?;
    let mut buffer = [0; 4_096];
    let read = tokio::time::timeout(DNS_PATIENCE, socket.recv(&mut buffer)).await.context("no answer in time")??;
    let answer = Message::from_vec(&buffer[..read])?;
    ensure!(answer.metadata.id == query.metadata.id, "an answer to another query");
    ensure!(answer.metadata.response_code == ResponseCode::NoError, "{}", answer.metadata.response_code);
    let mut ttl = u32::MAX;
    let mut addresses = Vec::new();
    for record in &answer.answers {
        if let RData::A(address) = &record.data {
            addresses.push(IpAddr::V4(address.0));
            ttl = ttl.min(record.ttl);
        }
    }
    Ok((addresses, Duration::from_secs(ttl.into())))
}

/// How long after `begun` this share of the clients had dialled `lost` for the last time. Whose last call went there has
/// not moved, and who called no more is not known to have: `Duration::MAX`.
pub fn moved_after(calls: &[Call], clients: usize, lost: IpAddr, share: f64, begun: Instant) -> Duration {
    let mut moved: Vec<Duration> = vec![Duration::MAX; clients];
    let mut left: Vec<Duration> = vec![Duration::ZERO; clients];
    // In the order of their begin.
    for call in calls.iter().filter(|call| call.begun >= begun) {
        if call.dialled == lost {
            left[call.client] = call.begun - begun;
            moved[call.client] = Duration::MAX;
        } else {
            moved[call.client] = left[call.client];
        }
    }
    super::load::percentile(&mut moved, share)
}
