//! A DNS node's own settings file.
//!
//! ```yaml
//! region: eu-west                   # where it stands; region and node are those of its certificate
//! node: dns-0
//! identity: {certificate: leaf.pem, key: leaf.key, trustBundle: bundle.pem}
//! snapshot: snapshot.bin
//! control: {servers: ['10.0.0.1:7443']}   # default: none; the file is followed and the Regions' weights hold
//! listen: ['192.0.2.53:53']         # UDP and TCP
//! zone: example.com
//! name: infer.example.com           # default: the zone
//! nameServers:                      # the zone's NS records; addresses for names in the zone
//!   - {name: ns1.example.com, addresses: [192.0.2.53]}
//! contact: hostmaster.example.com   # whom to write to, as a name
//! ttl: 30s                          # of an answer while its region is steady; also of what is not there
//! hurriedTtl: 5s                    # while it is not
//! addresses: 8                      # in an answer
//! rateLimit: {rate: 500/s, burst: 1000, networks: 65536, slip: 2}
//! tcp: {connections: 256, perNetwork: 32, idle: 10s}
//! ```
//!
//! and what all processes share: `admin`, `audit`, `drainTimeout`.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use spillway_core::failover::AnswerSettings;
use spillway_core::limit::{Gcra, InvalidLimit, Reserves};
use spillway_core::units::{DnsName, InvalidUnit, Name, Rate};
use spillway_runtime::settings::{
    CommonSettings, Field, Fields, FromNode, count, or_default, positive, read_optional, required,
};

use super::zone::{NameServer, ZoneSettings};

/// Longer, and a plan's change reaches nobody in time.
const LONGEST_TTL: Duration = Duration::from_secs(3_600);
/// As many fit into a datagram of 1,232 octets with the longest name.
const MOST_ADDRESSES: i64 = 30;
const MOST_NAME_SERVERS: usize = 8;
const MOST_LISTENERS: usize = 16;

#[derive(Clone, Debug)]
pub struct DnsSettings {
    pub region: Name,
    pub node: Name,
    pub common: CommonSettings,
    /// UDP and TCP; of port 0 a free one is taken. At least one.
    pub listen: Vec<SocketAddr>,
    pub zone: ZoneSettings,
    pub rate_limit: RateLimitSettings,
    pub tcp: TcpSettings,
}

/// `rateLimit`: what a network (/24, /56) is answered by UDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimitSettings {
    /// 500/s, and 1000 at once. A resolver's whole network is one, and asks for all its clients.
    pub rate: Rate,
    pub burst: u32,
    /// `networks` that are kept apart, 24 bytes each: 65536.
    pub networks: usize,
    /// Each so manieth answer over the limit is empty and says to come by TCP: 2; 0: none is.
    pub slip: u32,
}

/// `tcp`: what streams may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSettings {
    /// At a time: 256.
    pub connections: usize,
    /// Of them, from one network: 32.
    pub per_network: usize,
    /// Without a query: 10s.
    pub idle: Duration,
}

impl RateLimitSettings {
    pub fn gcra(&self) -> Result<Gcra, InvalidLimit> {
        let rate = spillway_core::limit::Rate { tokens: self.rate.count, per: self.rate.per };
        Gcra::new(rate, self.burst, Reserves::default())
    }
}

impl Default for RateLimitSettings {
    fn default() -> Self {
        let rate = Rate { count: 500, per: Duration::from_secs(1) };
        Self { rate, burst: 1_000, networks: 65_536, slip: 2 }
    }
}

impl Default for TcpSettings {
    fn default() -> Self {
        Self { connections: 256, per_network: 32, idle: Duration::from_secs(10) }
    }
}

impl FromNode for DnsSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let region = required(&fields, "region");
        let node = required(&fields, "node");
        let common = CommonSettings::read(&fields);
        let listen = listeners(&fields);
        let zone = read_zone(&fields);
        let rate_limit = or_default(&fields, "rateLimit", RateLimitSettings::default);
        let tcp = or_default(&fields, "tcp", TcpSettings::default);
        fields.finish();
        Some(Self {
            region: region?,
            node: node?,
            common: common?,
            listen: listen?,
            zone: zone?,
            rate_limit: rate_limit?,
            tcp: tcp?,
        })
    }
}

impl FromNode for RateLimitSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = Self::default();
        let fields = field.map();
        let rate = read_optional(&fields, "rate", |field| field.parse(Rate::parse));
        let burst = count(&fields, "burst", default.burst as usize, 1_000_000);
        let networks = count(&fields, "networks", default.networks, 16 << 20);
        let slip = match fields.optional("slip") {
            Some(field) => field.number(0..=100).and_then(|slip| u32::try_from(slip).ok()),
            None => Some(default.slip),
        };
        fields.finish();
        let rate = rate?.unwrap_or(default.rate);
        let read = Self { rate, burst: u32::try_from(burst?).ok()?, networks: networks?, slip: slip? };
        read.gcra().map_err(|invalid| field.fault(invalid.to_string())).ok()?;
        Some(read)
    }
}

impl FromNode for TcpSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = Self::default();
        let fields = field.map();
        let connections = count(&fields, "connections", default.connections, 65_536);
        let per_network = count(&fields, "perNetwork", default.per_network, 65_536);
        let idle = positive(&fields, "idle", default.idle);
        fields.finish();
        Some(Self { connections: connections?, per_network: per_network?, idle: idle? })
    }
}

impl FromNode for NameServer {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const ADDRESS: InvalidUnit = InvalidUnit("an IP address, such as 192.0.2.53");
        let fields = field.map();
        let name = fields.required("name").and_then(|field| field.parse(DnsName::host));
        let items = fields.optional("addresses").map(|field| field.items()).unwrap_or_default();
        let addresses = items.iter().map(|field| field.parse(|text| text.parse::<IpAddr>().map_err(|_| ADDRESS)));
        let addresses: Option<Vec<IpAddr>> = addresses.collect();
        fields.finish();
        Some(Self { name: name?, addresses: addresses? })
    }
}

fn listeners(fields: &Fields<'_>) -> Option<Vec<SocketAddr>> {
    let field = fields.required("listen")?;
    let items = field.items();
    if !(1..=MOST_LISTENERS).contains(&items.len()) {
        field.fault(format!("expected 1 to {MOST_LISTENERS} addresses"));
        return None;
    }
    items.iter().map(SocketAddr::from_node).collect()
}

fn read_zone(fields: &Fields<'_>) -> Option<ZoneSettings> {
    let host = |field: &Field<'_>| field.parse(DnsName::host);
    let zone = fields.required("zone").and_then(|field| host(&field));
    let name = read_optional(fields, "name", host);
    let servers = fields.required("nameServers");
    let contact = fields.required("contact").and_then(|field| host(&field));
    let ttl = lasting(fields, "ttl", AnswerSettings::default().ttl);
    let hurried_ttl = lasting(fields, "hurriedTtl", AnswerSettings::default().hurried_ttl);
    let addresses = count(fields, "addresses", AnswerSettings::default().addresses, MOST_ADDRESSES);
    let name_servers = servers.and_then(|field| name_servers(&field));
    let zone = zone?;
    let below = |name: &DnsName| {
        let prefix = name.as_str().strip_suffix(zone.as_str());
        prefix.is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
    };
    let name = name?.unwrap_or_else(|| zone.clone());
    let name_servers = name_servers?;
    let mut fits = true;
    let mut fault = |key: &'static str, problem: String| {
        if let Some(field) = fields.optional(key) {
            field.fault(problem);
        }
        fits = false;
    };
    if !below(&name) {
        fault("name", format!("expected a name in the zone {zone}"));
    }
    for server in &name_servers {
        if server.name == name || server.name == zone {
            fault("nameServers", format!("{} is a name of the service", server.name));
        } else if below(&server.name) == server.addresses.is_empty() {
            let expected =
                if below(&server.name) { "at least one address" } else { "no address: it is another zone's" };
            fault("nameServers", format!("{}: expected {expected}", server.name));
        }
    }
    let answers = AnswerSettings { ttl: ttl?, hurried_ttl: hurried_ttl?, addresses: addresses? };
    let contact = contact?;
    fits.then_some(ZoneSettings { zone, name, name_servers, contact, answers })
}

fn name_servers(field: &Field<'_>) -> Option<Vec<NameServer>> {
    let items = field.items();
    if !(1..=MOST_NAME_SERVERS).contains(&items.len()) {
        field.fault(format!("expected 1 to {MOST_NAME_SERVERS} name servers"));
        return None;
    }
    items.iter().map(NameServer::from_node).collect()
}

/// Whole seconds, as answers say them.
pub(super) fn lasting(fields: &Fields<'_>, name: &'static str, default: Duration) -> Option<Duration> {
    let Some(field) = fields.optional(name) else { return Some(default) };
    let time = Duration::from_node(&field)?;
    if time.is_zero() || time > LONGEST_TTL || time.subsec_nanos() > 0 {
        field.fault("expected 1s to 1h, in whole seconds");
        return None;
    }
    Some(time)
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
