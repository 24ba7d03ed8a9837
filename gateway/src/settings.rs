//! The gateway's settings file.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::time::Duration;

use spillway_core::inference::Limits as RequestLimits;
use spillway_core::units::{ByteSize, InvalidUnit, Name, parse_duration};
use spillway_runtime::settings::{CommonSettings, Field, FromNode, or_default, read_optional, required};
use spillway_runtime::store::RedisSettings;

use crate::results::ResultSettings;

/// Threads beyond this would only wait for each other.
const MAX_THREADS: i64 = 256;

/// A request waits for Redis no longer than this: a pod's answer takes little more.
const REDIS_TIMEOUT: Duration = Duration::from_millis(5);

#[derive(Clone, Debug, PartialEq)]
pub struct GatewaySettings {
    pub common: CommonSettings,
    /// `region`: the Region that is served.
    pub region: Name,
    /// `name`: this gateway's own name, the last part of its SPIFFE id.
    pub name: Name,
    /// `listen`: where clients connect; port 0 picks a free one.
    pub listen: SocketAddr,
    /// `threads`: worker threads; default one for each core.
    pub threads: NonZeroUsize,
    /// `limits`.
    pub limits: Limits,
    /// `results`: the result cache.
    pub results: ResultSettings,
    /// `redis`: what the region's gateways share; absent: nothing. Its `timeout` is 5ms by default.
    pub redis: Option<RedisSettings>,
    /// `quota`.
    pub quota: QuotaSettings,
    /// `dns`.
    pub dns: DnsSettings,
}

/// How limits of the scope `region` are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaSettings {
    /// `term`: the time between two askings of Redis for slices, 10ms to 20s; default 500ms.
    pub term: Duration,
    /// `gateways`: of the region, 1 to 10,000; what a gateway that Redis never answered divides by. Default 1.
    pub gateways: u32,
}

impl Default for QuotaSettings {
    fn default() -> Self {
        Self { term: Duration::from_millis(500), gateways: 1 }
    }
}

/// Whom to ask for the members of pools that DNS fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsSettings {
    /// `servers`: addresses and ports, at most 8; default: those of `/etc/resolv.conf`.
    pub servers: Vec<SocketAddr>,
    /// `timeout`: how long the answer to one question may take, at most 30s; default 2s.
    pub timeout: Duration,
}

impl Default for DnsSettings {
    fn default() -> Self {
        Self { servers: Vec::new(), timeout: Duration::from_secs(2) }
    }
}

/// What is accepted at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `connections`: open client connections; default 10,000.
    pub connections: usize,
    /// `body` (of a request; default 16MiB), `tensors` (inputs or outputs; default 64).
    pub request: RequestLimits,
    /// `answer`: bytes of a pod's answer; default what a sidecar answers at most, 65MiB.
    pub answer: usize,
    /// `bodiesInMemory`: bytes that bodies of requests and answers take at a time; default 512MiB.
    pub memory: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            request: RequestLimits::OF_CLIENTS,
            answer: RequestLimits::OF_SIDECARS.body,
            memory: 512 << 20,
        }
    }
}

impl Limits {
    /// What a pod may answer.
    pub fn of_answers(&self) -> RequestLimits {
        RequestLimits { body: self.answer, tensor: self.answer, ..RequestLimits::OF_SIDECARS }
    }
}

impl FromNode for GatewaySettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let common = CommonSettings::read(&fields);
        let region = required(&fields, "region");
        let name = required(&fields, "name");
        let listen = required(&fields, "listen");
        let threads = match fields.optional("threads") {
            Some(field) => field.number(1..=MAX_THREADS).and_then(|count| usize::try_from(count).ok()),
            None => Some(std::thread::available_parallelism().map_or(1, NonZeroUsize::get)),
        };
        let limits = or_default(&fields, "limits", Limits::default);
        let results = or_default(&fields, "results", ResultSettings::default);
        let redis = read_optional(&fields, "redis", |field| {
            RedisSettings::read(field, RedisSettings { timeout: REDIS_TIMEOUT, ..RedisSettings::default() })
        });
        let quota = or_default(&fields, "quota", QuotaSettings::default);
        let dns = or_default(&fields, "dns", DnsSettings::default);
        fields.finish();
        Some(Self {
            common: common?,
            region: region?,
            name: name?,
            listen: listen?,
            threads: NonZeroUsize::new(threads?)?,
            limits: limits?,
            results: results?,
            redis: redis?,
            quota: quota?,
            dns: dns?,
        })
    }
}

impl FromNode for QuotaSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const TERMS: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(20);
        const MOST_GATEWAYS: i64 = 10_000;
        let default = Self::default();
        let fields = field.map();
        let term = match fields.optional("term") {
            Some(field) => field.parse(|text| match parse_duration(text)? {
                term if TERMS.contains(&term) => Ok(term),
                _ => Err(InvalidUnit("10ms to 20s")),
            }),
            None => Some(default.term),
        };
        let gateways = match fields.optional("gateways") {
            Some(field) => field.number(1..=MOST_GATEWAYS).and_then(|count| u32::try_from(count).ok()),
            None => Some(default.gateways),
        };
        fields.finish();
        Some(Self { term: term?, gateways: gateways? })
    }
}

impl FromNode for DnsSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const MOST_SERVERS: usize = 8;
        const LONGEST: Duration = Duration::from_secs(30);
        let default = Self::default();
        let fields = field.map();
        let servers = read_optional(&fields, "servers", |field| {
            let items = field.items();
            if items.is_empty() || items.len() > MOST_SERVERS {
                field.fault("expected 1 to 8 addresses");
                return None;
            }
            items.iter().map(SocketAddr::from_node).collect()
        });
        let timeout = match fields.optional("timeout") {
            Some(field) => field.parse(|text| match parse_duration(text)? {
                time if !time.is_zero() && time <= LONGEST => Ok(time),
                _ => Err(InvalidUnit("more than 0 and at most 30s")),
            }),
            None => Some(default.timeout),
        };
        fields.finish();
        Some(Self { servers: servers?.unwrap_or(default.servers), timeout: timeout? })
    }
}

impl FromNode for Limits {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = Self::default();
        let fields = field.map();
        let count = |name, or: usize, most| match fields.optional(name) {
            Some(field) => field.number(1..=most).and_then(|count| usize::try_from(count).ok()),
            None => Some(or),
        };
        let connections = count("connections", default.connections, 1_000_000);
        let tensors = count("tensors", default.request.tensors, RequestLimits::LARGEST_REQUEST.tensors as i64);
        let body = match fields.optional("body") {
            Some(field) => field.parse(body_size),
            None => Some(default.request.body),
        };
        let answer = or_default(&fields, "answer", || ByteSize(default.answer as u64));
        let needed = body.unwrap_or_default().max(answer.map_or(0, ByteSize::bytes));
        let memory = match fields.optional("bodiesInMemory") {
            Some(field) => field.parse(|text| memory_size(text, needed)),
            None => Some(default.memory.max(needed)),
        };
        fields.finish();
        let body = body?;
        Some(Self {
            connections: connections?,
            request: RequestLimits { body, tensor: body, tensors: tensors?, ..default.request },
            answer: answer?.bytes(),
            memory: memory?,
        })
    }
}

/// Sidecars take no more.
fn body_size(text: &str) -> Result<usize, InvalidUnit> {
    match ByteSize::parse(text)?.bytes() {
        size if size <= RequestLimits::LARGEST_REQUEST.body => Ok(size),
        _ => Err(InvalidUnit("at most 64MiB")),
    }
}

fn memory_size(text: &str, needed: usize) -> Result<usize, InvalidUnit> {
    match ByteSize::parse(text)?.bytes() {
        size if size >= needed => Ok(size),
        _ => Err(InvalidUnit("at least the larger of 'body' and 'answer'")),
    }
}

#[cfg(test)]
mod tests {
    use spillway_core::limit::{self, Rate};
    use spillway_runtime::settings::parse;

    use super::*;

    const FILE: &str = "\
region: eu
name: gw-0
listen: 127.0.0.1:0
identity: {certificate: a.pem, key: a.key, trustBundle: roots.pem}
snapshot: snapshot
";

    #[test]
    fn what_is_absent_has_its_default() {
        let settings: GatewaySettings = parse(FILE).unwrap();
        assert_eq!(settings.limits, Limits::default());
        assert_eq!(settings.dns, DnsSettings { servers: Vec::new(), timeout: Duration::from_secs(2) });
        assert_eq!(settings.name.as_str(), "gw-0");
    }

    #[test]
    fn unknown_keys_and_bare_numbers_are_faults() {
        let bad = format!("{FILE}limits: {{body: 1000, tensor: 5}}\nthreads: 0\nextra: 1\n");
        let faults = parse::<GatewaySettings>(&bad).unwrap_err();
        let fields: Vec<&str> = faults.iter().map(|fault| fault.field.as_str()).collect();
        for field in ["limits.body", "limits.tensor", "threads", "extra"] {
            assert!(fields.contains(&field), "{field} in {fields:?}");
        }
    }

    #[test]
    fn dns_servers_are_addresses_and_their_answers_bounded_in_time() {
        let with = |dns: &str| parse::<GatewaySettings>(&format!("{FILE}dns: {{{dns}}}\n"));
        let dns = with("servers: ['127.0.0.1:53', '[::1]:5353'], timeout: 500ms").unwrap().dns;
        assert_eq!((dns.servers.len(), dns.timeout), (2, Duration::from_millis(500)));
        let many = format!("servers: [{}]", "'127.0.0.1:53', ".repeat(9));
        for bad in
            ["servers: []", "servers: [resolver]", "servers: ['127.0.0.1']", "timeout: 0s", "timeout: 31s", &many]
        {
            assert!(with(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_quotas_term_and_gateways_are_those_that_core_takes() {
        let with = |quota: &str| parse::<GatewaySettings>(&format!("{FILE}quota: {{{quota}}}\n"));
        let core = |quota: QuotaSettings| {
            let rate = Rate { tokens: 1, per: Duration::from_secs(1) };
            let settings = limit::QuotaSettings::new(rate, 1);
            limit::Quota::new(&limit::QuotaSettings { term: quota.term, gateways: quota.gateways, ..settings })
        };
        for good in ["", "term: 10ms", "term: 20s, gateways: 10000"] {
            assert!(core(with(good).unwrap().quota).is_ok(), "{good}");
        }
        for bad in ["term: 9ms", "term: 21s", "term: 500", "gateways: 0", "gateways: 10001", "period: 1s"] {
            assert!(with(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn limits_that_could_not_be_kept_are_faults() {
        let with = |limits: &str| parse::<GatewaySettings>(&format!("{FILE}limits: {{{limits}}}\n"));
        let limits = with("body: 64MiB, tensors: 1024, bodiesInMemory: 65MiB").unwrap().limits;
        assert_eq!((limits.request.body, limits.request.tensor, limits.memory), (64 << 20, 64 << 20, 65 << 20));
        for bad in ["body: 65MiB", "tensors: 1025", "bodiesInMemory: 64MiB", "answer: 80MiB, bodiesInMemory: 79MiB"] {
            assert!(with(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_sidecar_takes_and_answers_fits_the_gateways_limits() {
        let sidecar = RequestLimits::LARGEST_REQUEST;
        let request = Limits::default().request;
        assert!(request.body <= sidecar.body && request.tensors <= sidecar.tensors);
        assert!(request.text <= sidecar.text && request.parameters <= sidecar.parameters);
        let (answers, models) = (Limits::default().of_answers(), RequestLimits::OF_MODELS);
        assert!(answers.body > models.body && answers.tensors >= models.tensors);
        assert!(answers.parameters > models.parameters && answers.text >= models.text);
    }
}
