//! Steady calls, and what they met.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::task::JoinSet;

use super::client::{Answer, Client, NotSent, Protocol};

/// One call.
#[derive(Clone, Debug)]
pub struct Shot {
    pub ended: Instant,
    pub took: Duration,
    pub outcome: Result<(), String>,
    /// Connections that had closed before they took it.
    pub moved: usize,
}

/// Calls that go on until stopped; those that run then are finished.
pub struct Load {
    stop: Arc<AtomicBool>,
    workers: JoinSet<Vec<Shot>>,
}

type Make = dyn Fn(&Client, usize) -> Request<Full<Bytes>> + Send + Sync;
type Judge = dyn Fn(usize, &Answer) -> Result<(), String> + Send + Sync;

impl Load {
    /// Each worker keeps one connection and sends its calls one after the other, `pause` apart. It opens a new
    /// connection when the server ends the old one; a request that such a connection never took is sent again,
    /// as every client does.
    pub fn start(
        client: &Client,
        protocol: Protocol,
        workers: usize,
        pause: Duration,
        make: impl Fn(&Client, usize) -> Request<Full<Bytes>> + Send + Sync + 'static,
        judge: impl Fn(usize, &Answer) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (make, judge): (Arc<Make>, Arc<Judge>) = (Arc::new(make), Arc::new(judge));
        let mut set = JoinSet::new();
        for worker in 0..workers {
            let (client, stop, make, judge) = (client.clone(), stop.clone(), make.clone(), judge.clone());
            set.spawn(async move {
                let mut shots = Vec::new();
                let mut connection = None;
                let mut number = worker;
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let mut moved = 0;
                    let outcome = shoot(&client, protocol, &mut connection, number, &*make, &*judge, &mut moved).await;
                    let ended = Instant::now();
                    shots.push(Shot { ended, took: ended - begun, outcome, moved });
                    number += workers;
                    tokio::time::sleep(pause).await;
                }
                shots
            });
        }
        Self { stop, workers: set }
    }

    /// Lets the running calls end; returns all shots in the order of their ends.
    pub async fn stop(self) -> Vec<Shot> {
        self.stop.store(true, Ordering::Relaxed);
        let mut shots: Vec<Shot> = self.workers.join_all().await.into_iter().flatten().collect();
        shots.sort_by_key(|shot| shot.ended);
        shots
    }
}

/// Calls that come at a steady rate, whether or not earlier ones were answered; `label` says what kind each is.
/// They are spread over as many connections as keep a server's bound on streams out of the way.
pub async fn open_loop<L: Clone + Send + 'static>(
    client: &Client,
    rate: f64,
    during: Duration,
    mut make: impl FnMut(usize) -> (L, Request<Full<Bytes>>),
) -> Vec<(L, Duration, Result<Answer, String>)> {
    const CONNECTIONS: usize = 32;
    let mut connections = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        connections.push(client.connect(Protocol::H2).await.expect("a connection"));
    }
    let mut calls = JoinSet::new();
    let begun = tokio::time::Instant::now();
    let mut number = 0;
    loop {
        let due = begun + Duration::from_secs_f64(number as f64 / rate);
        if due >= begun + during {
            break;
        }
        tokio::time::sleep_until(due).await;
        let mut connection = connections[number % CONNECTIONS].beside();
        let (label, request) = make(number);
        calls.spawn(async move {
            let answer = connection.send(request).await.map_err(|error| format!("{error:#}"));
            (label, due.elapsed(), answer)
        });
        number += 1;
    }
    calls.join_all().await
}

pub fn failures(shots: &[Shot]) -> Vec<&String> {
    shots.iter().filter_map(|shot| shot.outcome.as_ref().err()).collect()
}

async fn shoot(
    client: &Client,
    protocol: Protocol,
    connection: &mut Option<super::client::Connection>,
    number: usize,
    make: &Make,
    judge: &Judge,
    moved: &mut usize,
) -> Result<(), String> {
    const TRIES: usize = 3;
    let mut last = String::new();
    for _ in 0..TRIES {
        if connection.as_ref().is_none_or(super::client::Connection::is_closed) {
            *connection = Some(client.connect(protocol).await.map_err(|error| format!("connect: {error:#}"))?);
        }
        let open = connection.as_mut().expect("just opened");
        match open.send(make(client, number)).await {
            Ok(answer) => return judge(number, &answer),
            Err(error) => {
                *connection = None;
                last = format!("{error:#}");
                if !error.is::<NotSent>() {
                    break;
                }
                *moved += 1;
            }
        }
    }
    Err(last)
}

/// Of durations, the one that `share` of them do not exceed.
pub fn percentile(durations: &mut [Duration], share: f64) -> Duration {
    durations.sort_unstable();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let index = ((durations.len() as f64 - 1.0) * share).round() as usize;
    durations[index]
}
