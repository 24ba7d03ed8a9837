//! Questions to DNS: each bounded in time, all bounded in number.
//!
//! The rule: names are whole ones, and nothing is cached here, so that the times to live are those of the
//! servers and what is asked is what goes out.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use futures_util::StreamExt;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use spillway_core::members::{Answer, Roster, Round, Service, Targets, of_hosts};
use spillway_core::units::DnsName;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::metrics::Outcome;
use crate::settings::DnsSettings;

/// Questions of all pools at a time, and of one pool.
const MOST_QUESTIONS: usize = 64;
const MOST_OF_POOL: usize = 16;
/// A round's time. What was not answered by then has failed.
const ROUND: Duration = Duration::from_secs(30);

/// Whom to ask.
pub type Servers = TokioResolver;

pub struct Resolver {
    settings: DnsSettings,
    places: Semaphore,
    questions: Family<Outcome, Counter>,
}

/// What a round of questions gave.
pub struct Heard {
    /// None: nothing that says who is in the pool.
    pub round: Option<Round>,
    /// How long the first of the records that were used is good for.
    pub ttl: Duration,
    /// Why the round is not whole: a stable word.
    pub problem: Option<&'static str>,
}

impl Heard {
    pub fn nothing(problem: &'static str) -> Self {
        Self { round: None, ttl: Duration::ZERO, problem: Some(problem) }
    }

    fn of(round: Option<Round>, ttl: u32, problem: Option<&'static str>) -> Self {
        let problem = match &round {
            Some(round) if !round.partial => None,
            // A name whose records all say nothing is as good as no answer.
            _ => Some(problem.unwrap_or(NOTHING)),
        };
        Self { round, ttl: Duration::from_secs(ttl.into()), problem }
    }
}

/// What was said of a host.
struct Reply {
    answer: Answer,
    /// Seconds.
    ttl: u32,
    problem: Option<&'static str>,
}

/// There is no such name, or it has no such records.
const NOTHING: &str = "nothing";

impl Resolver {
    pub fn new(settings: DnsSettings, questions: Family<Outcome, Counter>) -> Self {
        Self { settings, places: Semaphore::new(MOST_QUESTIONS), questions }
    }

    /// The servers of the settings, or of `/etc/resolv.conf` as it is now.
    pub fn servers(&self) -> Result<Servers, NetError> {
        let mut builder = if self.settings.servers.is_empty() {
            TokioResolver::builder_tokio()?
        } else {
            let servers = self.settings.servers.iter().map(|server| name_server(*server)).collect();
            let config = ResolverConfig::from_name_servers(servers);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        // Two tries within the time, so that a server that is dead leaves time for another.
        options.timeout = self.settings.timeout / 2;
        options.attempts = 1;
        options.edns0 = true;
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        builder.build()
    }

    pub async fn hosts(&self, servers: &Servers, name: &DnsName, port: NonZeroU16) -> Heard {
        let reply = self.addresses(servers, &whole(name), Instant::now() + ROUND).await;
        Heard::of(of_hosts(reply.answer, port), reply.ttl, reply.problem)
    }

    pub async fn services(&self, servers: &Servers, name: &DnsName, last: &Roster) -> Heard {
        let until = Instant::now() + ROUND;
        let found = match self.look(servers, &whole(name), RecordType::SRV, until).await {
            Ok(found) => found,
            Err(problem) => return Heard::nothing(problem),
        };
        let (services, ttl) = records(&found, RecordType::SRV, service);
        let targets = Targets::of(services);
        let beside = beside(&found);
        let addresses = async |host: &str| match beside.get(host) {
            Some((addresses, ttl)) => Reply { answer: Answer::Addresses(addresses.clone()), ttl: *ttl, problem: None },
            None => self.addresses(servers, host, until).await,
        };
        let replies: Vec<Reply> =
            futures_util::stream::iter(targets.hosts()).map(addresses).buffered(MOST_OF_POOL).collect().await;
        let ttl = replies.iter().map(|reply| reply.ttl).fold(ttl, u32::min);
        let problem = replies.iter().find_map(|reply| reply.problem);
        let addresses = replies.into_iter().map(|reply| reply.answer).collect();
        Heard::of(targets.resolved(addresses, last), ttl, problem)
    }

    /// The addresses of a host: of IPv4, or if there are none, of IPv6. With both, a pod that has both would
    /// be two.
    async fn addresses(&self, servers: &Servers, host: &str, until: Instant) -> Reply {
        for kind in [RecordType::A, RecordType::AAAA] {
            match self.look(servers, host, kind, until).await {
                Ok(found) => {
                    let (addresses, ttl) = records(&found, kind, ip);
                    return Reply { answer: Answer::Addresses(addresses), ttl, problem: None };
                }
                Err(NOTHING) => {}
                Err(problem) => return Reply { answer: Answer::Failed, ttl: u32::MAX, problem: Some(problem) },
            }
        }
        Reply { answer: Answer::Nothing, ttl: u32::MAX, problem: None }
    }

    /// Asks one question and counts what came of it.
    async fn look(
        &self,
        servers: &Servers,
        name: &str,
        kind: RecordType,
        until: Instant,
    ) -> Result<Lookup, &'static str> {
        let look = async {
            let Ok(_place) = timeout_at(until, self.places.acquire()).await else { return Err("timeout") };
            let time = until.saturating_duration_since(Instant::now()).min(self.settings.timeout);
            // In a task of its own: a panic over the bytes of an answer costs the question alone.
            let mut task = JoinSet::new();
            let (servers, name) = (servers.clone(), name.to_owned());
            task.spawn(async move { servers.lookup(name, kind).await });
            match timeout(time, task.join_next()).await {
                Ok(Some(Ok(found))) => found.map_err(|error| reason(&error)),
                Ok(_) => Err("lost"),
                Err(_) => Err("timeout"),
            }
        };
        let looked = look.await;
        let outcome = looked.as_ref().err().copied().unwrap_or("answered");
        self.questions.get_or_create(&Outcome { outcome }).inc();
        looked
    }
}

/// The records of an answer, and for how many seconds it is good: as long as the aliases on the way, too.
fn records<T>(found: &Lookup, kind: RecordType, read: impl Fn(&RData) -> Option<T>) -> (Vec<T>, u32) {
    let (mut records, mut ttl) = (Vec::new(), u32::MAX);
    for record in found.answers() {
        match record.record_type() {
            found if found == kind => records.extend(read(&record.data)),
            RecordType::CNAME => {}
            _ => continue,
        }
        ttl = ttl.min(record.ttl);
    }
    (records, ttl)
}

/// The addresses that came with SRV records, by host, so that they need not be asked for.
fn beside(found: &Lookup) -> HashMap<String, (Vec<IpAddr>, u32)> {
    let mut hosts: HashMap<String, (Vec<IpAddr>, u32)> = HashMap::new();
    for record in found.additionals() {
        if let Some(address) = ip(&record.data) {
            let (addresses, ttl) = hosts.entry(lower(&record.name)).or_insert((Vec::new(), u32::MAX));
            addresses.push(address);
            *ttl = record.ttl.min(*ttl);
        }
    }
    hosts
}

fn ip(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(address) => Some(address.0.into()),
        RData::AAAA(address) => Some(address.0.into()),
        _ => None,
    }
}

fn service(data: &RData) -> Option<Service> {
    let RData::SRV(record) = data else { return None };
    let (priority, weight, port) = (record.priority, record.weight, record.port);
    Some(Service { priority, weight, port, target: lower(&record.target) })
}

fn lower(name: &Name) -> String {
    name.to_lowercase().to_ascii()
}

/// With the dot at its end, no search list applies.
fn whole(name: &DnsName) -> String {
    format!("{name}.")
}

fn name_server(address: SocketAddr) -> NameServerConfig {
    let at = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    NameServerConfig::new(address.ip(), true, vec![at(ConnectionConfig::udp()), at(ConnectionConfig::tcp())])
}

/// A stable word for a metric's label.
fn reason(error: &NetError) -> &'static str {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(_)) => NOTHING,
        NetError::Dns(_) => "server-error",
        NetError::Timeout => "timeout",
        NetError::Io(_) | NetError::NoConnections => "unreachable",
        NetError::Busy => "busy",
        _ => "malformed",
    }
}
