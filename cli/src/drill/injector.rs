//! The way to who breaks things: the injector of `spillway dev`, or those of the machines of a deployment.
//!
//! The rule: each fault goes to the injectors that reach what it names, and all of them hold the same lease. One that
//! does not do its part is as if none did: the others are told to take theirs away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::future::join_all;
use parking_lot::Mutex;
use serde_json::Value;
use spillway_core::drill::Act;
use spillway_proto::drill as proto;
use spillway_proto::drill::fault::Act as ActCode;
use spillway_proto::drill::injector_client::InjectorClient;
use spillway_runtime::dial::dial;
use spillway_runtime::tls::Workload;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::place::{Breakers, Place, Server};
use crate::injector::Fault;

/// Of one call: killing and restarting takes a moment.
const CALL: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(2);

/// All injectors of a drill. Cheap to clone.
#[derive(Clone)]
pub struct Injectors(Arc<[Remote]>);

/// One injector.
struct Remote {
    /// For people.
    name: String,
    client: InjectorClient<Channel>,
    /// None: it knows us by our certificate.
    secret: Option<MetadataValue<Ascii>>,
    reaches: Mutex<Reaches>,
}

/// What it said last.
#[derive(Clone, Default)]
struct Reaches {
    processes: BTreeSet<String>,
    links: BTreeSet<String>,
    /// It has a part in the drill.
    takes_part: bool,
}

/// What all of them reach together.
#[derive(Debug, Default)]
pub struct Reach {
    pub processes: Vec<String>,
    pub links: Vec<String>,
    /// The drills that run.
    pub drills: Vec<String>,
}

/// Why it was not done what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The lease is over, and its faults are gone.
    #[error("the lease is over")]
    Over,
    /// One refused, or could not be reached; a retry may help with the latter.
    #[error("{0}")]
    Failed(String),
}

impl Injectors {
    /// Connects with the first call, where it can be told without one.
    pub async fn open(place: &Place) -> Result<Self> {
        let remotes: Vec<Remote> = match &place.injectors {
            Breakers::File(file) => return Self::of_dev(file).await,
            Breakers::Nodes(nodes) if nodes.is_empty() => bail!("/injectors names none: nobody can break anything"),
            Breakers::Nodes(nodes) => {
                let workload = Workload::load(&place.operator).context("/operator")?;
                let all = join_all(nodes.iter().map(|node| Remote::of_node(&workload, node))).await;
                all.into_iter().collect::<Result<_>>()?
            }
        };
        Ok(Self(remotes.into()))
    }

    /// That of `spillway dev` alone.
    pub async fn of_dev(file: &Path) -> Result<Self> {
        Ok(Self([Remote::of_dev(file).await?].into()))
    }

    /// Whom they can break, and which drills run. To be asked before anything is injected.
    pub async fn reach(&self) -> Result<Reach, RemoteError> {
        let mut all = Reach::default();
        let mut reached = BTreeMap::new();
        for (remote, told) in self.0.iter().zip(join_all(self.0.iter().map(Remote::reach)).await) {
            let told = told?;
            let processes = told.processes.iter().map(|name| ("the process", name));
            for (what, name) in processes.chain(told.links.iter().map(|name| ("the link to", name))) {
                if let Some(other) = reached.insert((what, name.clone()), &remote.name) {
                    return Err(RemoteError::Failed(format!("{other} and {} both reach {what} {name}", remote.name)));
                }
            }
            all.processes.extend(told.processes);
            all.links.extend(told.links);
            all.drills.extend(Some(told.drill).filter(|drill| !drill.is_empty()));
        }
        Ok(all)
    }

    /// Whole or not at all.
    pub async fn inject(&self, lease: u64, drill: &str, faults: &[Fault]) -> Result<(), RemoteError> {
        let parts = self.0.iter().map(|remote| (remote, remote.part(faults))).filter(|(_, part)| !part.is_empty());
        let done = join_all(parts.map(|(remote, part)| remote.inject(lease, drill, part))).await;
        let Some(refused) = done.into_iter().find_map(Result::err) else { return Ok(()) };
        // What cannot be told ends with its lease.
        let _ = self.remove(lease).await;
        Err(refused)
    }

    pub async fn renew(&self, lease: u64) -> Result<(), RemoteError> {
        worst(join_all(self.taking_part().map(|remote| remote.renew(lease))).await)
    }

    /// The faults are gone when it returns.
    pub async fn remove(&self, lease: u64) -> Result<(), RemoteError> {
        worst(join_all(self.taking_part().map(|remote| remote.remove(lease))).await)
    }

    fn taking_part(&self) -> impl Iterator<Item = &Remote> {
        self.0.iter().filter(|remote| remote.reaches.lock().takes_part)
    }
}

/// A failure before a lease that is over: it is to be tried again.
fn worst(done: Vec<Result<(), RemoteError>>) -> Result<(), RemoteError> {
    let mut over = Ok(());
    for one in done {
        match one {
            Err(failed @ RemoteError::Failed(_)) => return Err(failed),
            Err(RemoteError::Over) => over = Err(RemoteError::Over),
            Ok(()) => {}
        }
    }
    over
}

impl Remote {
    /// By the file that `spillway dev` wrote.
    async fn of_dev(file: &Path) -> Result<Self> {
        let told = || {
            format!(
                "{}: it says where the injector is, and `spillway dev` writes it while it runs; in a deployment \
                 `injectors` of --endpoints says it (spillway drill --help)",
                file.display()
            )
        };
        let text = tokio::fs::read(file).await.with_context(told)?;
        let json: Value = serde_json::from_slice(&text).with_context(told)?;
        let address: SocketAddr = json["address"].as_str().and_then(|text| text.parse().ok()).with_context(told)?;
        let secret = json["secret"].as_str().with_context(told)?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.connect_timeout(CONNECT).timeout(CALL);
        let secret = format!("Bearer {secret}").parse().with_context(told)?;
        Ok(Self::new("the injector".to_owned(), endpoint.connect_lazy(), Some(secret)))
    }

    async fn of_node(workload: &Arc<Workload>, node: &Server) -> Result<Self> {
        let channel = dial(workload, node.id.clone(), &node.address, CONNECT).await;
        let channel = channel.with_context(|| format!("the injector {} at {}", node.id, node.address))?;
        Ok(Self::new(node.id.to_string(), channel, None))
    }

    fn new(name: String, channel: Channel, secret: Option<MetadataValue<Ascii>>) -> Self {
        Self { name, client: InjectorClient::new(channel), secret, reaches: Mutex::default() }
    }

    async fn reach(&self) -> Result<proto::ReachResponse, RemoteError> {
        let answer = self.client.clone().reach(self.asked(proto::ReachRequest {})).await;
        let told = answer.map_err(|status| self.failed(&status))?.into_inner();
        let mut reaches = self.reaches.lock();
        reaches.processes = told.processes.iter().cloned().collect();
        reaches.links = told.links.iter().cloned().collect();
        drop(reaches);
        Ok(told)
    }

    /// What it can do of these faults.
    fn part(&self, faults: &[Fault]) -> Vec<Fault> {
        let reaches = self.reaches.lock();
        let of = |fault: &Fault| {
            let reached = if fault.act.is_of_links() { &reaches.links } else { &reaches.processes };
            let on: Vec<String> = fault.on.iter().filter(|name| reached.contains(*name)).cloned().collect();
            (!on.is_empty()).then(|| Fault { on, ..fault.clone() })
        };
        faults.iter().filter_map(of).collect()
    }

    async fn inject(&self, lease: u64, drill: &str, faults: Vec<Fault>) -> Result<(), RemoteError> {
        // Also where the answer is lost.
        self.reaches.lock().takes_part = true;
        let faults = faults.iter().map(message).collect();
        let request = proto::InjectRequest { lease, drill: drill.to_owned(), faults };
        self.client.clone().inject(self.asked(request)).await.map(drop).map_err(|status| self.failed(&status))
    }

    async fn renew(&self, lease: u64) -> Result<(), RemoteError> {
        let answer = self.client.clone().renew(self.asked(proto::LeaseRequest { lease })).await;
        answer.map(drop).map_err(|status| self.failed(&status))
    }

    async fn remove(&self, lease: u64) -> Result<(), RemoteError> {
        let answer = self.client.clone().remove(self.asked(proto::LeaseRequest { lease })).await;
        answer.map(drop).map_err(|status| self.failed(&status))
    }

    fn asked<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(CALL);
        if let Some(secret) = &self.secret {
            request.metadata_mut().insert("authorization", secret.clone());
        }
        request
    }

    fn failed(&self, status: &Status) -> RemoteError {
        match status.code() {
            Code::NotFound => RemoteError::Over,
            _ => RemoteError::Failed(format!("{}: {}", self.name, status.message())),
        }
    }
}

fn message(fault: &Fault) -> proto::Fault {
    let (act, delay) = match fault.act {
        Act::Kill => (ActCode::Kill, Duration::ZERO),
        Act::Pause => (ActCode::Pause, Duration::ZERO),
        Act::Refuse => (ActCode::Refuse, Duration::ZERO),
        Act::Delay(delay) => (ActCode::Delay, delay),
        Act::Drop => (ActCode::Drop, Duration::ZERO),
    };
    proto::Fault {
        act: act.into(),
        on: fault.on.clone(),
        from: fault.from.clone(),
        delay_ms: u32::try_from(delay.as_millis()).unwrap_or(u32::MAX),
    }
}
