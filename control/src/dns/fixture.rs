//! A zone, views of it and queries, for tests.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, OpCode, Query};
use hickory_proto::rr::rdata::opt::{ClientSubnet, EdnsOption};
use hickory_proto::rr::{DNSClass, Name as HickoryName, RecordType};
use spillway_core::failover::{AnswerSettings, Standing};
use spillway_core::units::{DnsName, Name, Rate};
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::Metrics;
use tokio::task::JoinHandle;

use super::metrics::DnsMetrics;
use super::server::{Server, Sockets};
use super::settings::{RateLimitSettings, TcpSettings};
use super::view::{Place, View};
use super::zone::{NameServer, ZoneSettings};

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// `example.com` with the service `infer.example.com`.
pub fn zone() -> ZoneSettings {
    let host = |text| DnsName::host(text).unwrap();
    ZoneSettings {
        zone: host("example.com"),
        name: host("infer.example.com"),
        name_servers: vec![
            NameServer { name: host("ns1.example.com"), addresses: addresses(&["192.0.2.53", "2001:db8::53"]) },
            NameServer { name: host("ns2.example.net"), addresses: Vec::new() },
        ],
        contact: host("hostmaster.example.com"),
        answers: AnswerSettings::default(),
    }
}

pub fn place(weight: f64, standing: Standing, of: &[&str]) -> Place {
    let (v4, v6) = addresses(of).into_iter().partition(IpAddr::is_ipv4);
    Place { weight, standing, v4, v6, port: 443 }
}

/// `eu-west` with 80 and `us-east` with 20 of 100; only the first has IPv6.
pub fn view() -> View {
    View {
        serial: 7,
        regions: [
            (name("eu-west"), place(80.0, Standing::Steady, &["198.51.100.1", "198.51.100.2", "2001:db8:e::1"])),
            (name("us-east"), place(20.0, Standing::Steady, &["203.0.113.1"])),
        ]
        .into(),
    }
}

pub fn unlimited() -> RateLimitSettings {
    let rate = Rate { count: 10_000_000, per: Duration::from_secs(1) };
    RateLimitSettings { rate, burst: 1_000_000, networks: 1_024, slip: 2 }
}

/// A server on loopback, stopped when dropped.
pub struct Running {
    pub server: Arc<Server>,
    pub address: SocketAddr,
    pub metrics: Metrics,
    pub drain: Drain,
    task: JoinHandle<()>,
}

impl Running {
    pub fn start(zone: ZoneSettings, limit: &RateLimitSettings, tcp: TcpSettings) -> Self {
        let metrics = Metrics::new("test");
        let server = Arc::new(Server::new(zone, limit, DnsMetrics::register(&metrics)).unwrap());
        let sockets = Sockets::bind(&["127.0.0.1:0".parse().unwrap()], 2).unwrap();
        let address = sockets.addresses()[0];
        let drain = Drain::new(Duration::from_secs(1));
        let task = tokio::spawn(sockets.serve(Arc::clone(&server), tcp, drain.clone()));
        Self { server, address, metrics, drain, task }
    }

    /// The value of a metric, 0 if it is not there.
    pub fn metric(&self, line: &str) -> f64 {
        let text = self.metrics.encode().unwrap();
        let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.drain.stop();
        self.task.abort();
    }
}

/// A query as hickory writes it.
pub struct Ask(Message);

impl Ask {
    pub fn of(name: &str, kind: RecordType) -> Self {
        let mut query = Query::query(HickoryName::from_ascii(name).unwrap(), kind);
        query.set_query_class(DNSClass::IN);
        let mut message = Message::new(4_711, hickory_proto::op::MessageType::Query, OpCode::Query);
        message.add_query(query);
        Self(message)
    }

    pub fn edns(mut self, payload: u16) -> Self {
        self.0.edns.get_or_insert_with(Edns::new).set_max_payload(payload);
        self
    }

    pub fn subnet(mut self, address: IpAddr, source: u8) -> Self {
        let edns = self.0.edns.get_or_insert_with(Edns::new);
        edns.set_max_payload(1_232);
        edns.options_mut().insert(EdnsOption::Subnet(ClientSubnet::new(address, source, 0)));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.to_vec().unwrap()
    }
}
