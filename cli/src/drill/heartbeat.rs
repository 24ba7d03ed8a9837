//! What a loss of the region would lose: an entity written there each second, and read everywhere else.
//!
//! The rule: only what was acknowledged counts as written, and only until the injection. What can be read elsewhere is
//! looked for under the fault, not after.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use spillway_core::drill::Heartbeat;
use spillway_core::drill::report::DataLoss;
use spillway_core::units::Name;
use spillway_proto::feature::feature_service_client::FeatureServiceClient;
use spillway_proto::feature::{GetRequest, Key, PutRequest, Row};
use spillway_runtime::tls::Workload;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::channel;
use super::place::{Place, Server};

const EVERY: Duration = Duration::from_secs(1);
const CALL: Duration = Duration::from_secs(2);
const ENTITY: &[u8] = b"spillway-drill-heartbeat";

/// Writes and reads until dropped.
pub struct Beating {
    seen: Arc<Mutex<Seen>>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Seen {
    written: u64,
    /// Event times, in microseconds since 1970.
    last_written: i64,
    last_read: Option<i64>,
    injected: bool,
    removed: bool,
}

impl Beating {
    /// None: there is nobody to write to, or nobody else to read from.
    pub fn start(place: &Place, target: &Name, heartbeat: &Heartbeat) -> Result<Option<Self>> {
        let pair = |region: &Name| Some((place.loaders.get(region)?, place.sidecars.get(region)?.first()?.clone()));
        let others = place.sidecars.keys().filter(|region| *region != target);
        let others: Vec<_> = others.filter_map(pair).collect();
        let Some(home) = pair(target).filter(|_| !others.is_empty()) else { return Ok(None) };
        let workload = |loader| Workload::load(loader).context("a loader's identity");
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut tasks = JoinSet::new();
        let key = Key { group: heartbeat.group.to_string(), entity: ENTITY.into(), tenant: String::new() };
        let (loader, home) = home;
        tasks.spawn(write(workload(loader)?, home, key.clone(), seen.clone()));
        for (loader, other) in others {
            tasks.spawn(read(workload(loader)?, other, key.clone(), seen.clone()));
        }
        Ok(Some(Self { seen, _tasks: tasks }))
    }

    /// From now on nothing that is written counts.
    pub fn injected(&self) {
        self.seen.lock().injected = true;
    }

    /// From now on nothing that is read counts.
    pub fn removed(&self) {
        self.seen.lock().removed = true;
    }

    pub fn loss(&self) -> DataLoss {
        let seen = self.seen.lock();
        let lost = |read: i64| u64::try_from((seen.last_written - read).max(0) / 1_000).unwrap_or_default();
        let rpo_ms = seen.last_read.filter(|_| seen.written > 0).map(lost);
        DataLoss { written: seen.written, rpo_ms }
    }
}

async fn write(workload: Arc<Workload>, home: Server, key: Key, seen: Arc<Mutex<Seen>>) {
    let mut client = None;
    let mut due = tokio::time::interval(EVERY);
    loop {
        due.tick().await;
        if seen.lock().injected {
            return;
        }
        let event = now();
        let row = Row { key: Some(key.clone()), event_time_micros: event, fields: Default::default() };
        let put = async {
            let client = connected(&workload, &home, &mut client).await?;
            let answer = client.put(PutRequest { rows: vec![row] }).await?.into_inner();
            anyhow::Ok(answer.written == 1)
        };
        match put.await {
            Ok(true) => {
                let mut seen = seen.lock();
                // An answer that comes after the injection was begun before it, but nobody can tell what it saw.
                if !seen.injected {
                    seen.written += 1;
                    seen.last_written = event;
                }
            }
            Ok(false) => {}
            Err(_) => client = None,
        }
    }
}

async fn read(workload: Arc<Workload>, other: Server, key: Key, seen: Arc<Mutex<Seen>>) {
    let mut client = None;
    let mut due = tokio::time::interval(EVERY);
    loop {
        due.tick().await;
        let get = async {
            let client = connected(&workload, &other, &mut client).await?;
            anyhow::Ok(client.get(GetRequest { keys: vec![key.clone()] }).await?.into_inner())
        };
        let Ok(answer) = get.await else {
            client = None;
            continue;
        };
        let found = answer.rows.into_iter().find(|found| found.present).and_then(|found| found.row);
        let mut seen = seen.lock();
        if seen.removed {
            return;
        }
        if let Some(row) = found {
            seen.last_read = seen.last_read.max(Some(row.event_time_micros));
        }
    }
}

async fn connected<'a>(
    workload: &Arc<Workload>,
    server: &Server,
    client: &'a mut Option<FeatureServiceClient<Channel>>,
) -> Result<&'a mut FeatureServiceClient<Channel>> {
    if client.is_none() {
        let channel = channel::connect(workload, &server.address, &server.id, CALL).await?;
        *client = Some(FeatureServiceClient::new(channel));
    }
    client.as_mut().context("it was just connected")
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "heartbeat_tests.rs"]
mod tests;
