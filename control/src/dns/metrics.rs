//! What operators see of the DNS node.
//!
//! The rule: labels are of closed sets, or regions of the view; handles of what each datagram touches are looked up
//! once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use parking_lot::RwLock;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use spillway_core::units::Name;
use spillway_runtime::telemetry::Metrics;

use super::answer::Said;

const KINDS: [&str; 8] = ["A", "AAAA", "HTTPS", "SOA", "NS", "ANY", "other", "unreadable"];
const CODES: [&str; 8] = ["noerror", "nodata", "formerr", "servfail", "nxdomain", "notimp", "refused", "badvers"];

/// From 10 µs to 10 ms.
const SECONDS: [f64; 10] = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2];

/// Handles of all metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    queries: Arc<[[Counter; CODES.len()]; KINDS.len()]>,
    by_region: Family<ByRegion, Counter>,
    /// Of regions of the view, and of those that were in it.
    regions: Arc<RwLock<BTreeMap<Name, Counter>>>,
    seconds: Histogram,
    pub truncated: Counter,
    /// Over the limit of their network.
    pub slipped: Counter,
    pub dropped: Counter,
    /// Responses, and what is no message.
    pub mute: Counter,
    pub oversized: Counter,
    /// The network took no more.
    pub unsent: Counter,
    pub unreceived: Counter,
    pub connections: Gauge,
    pub connections_refused: Counter,
    pub serial: Gauge,
    pub views_kept: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    r#type: &'static str,
    rcode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRegion {
    region: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Action {
    action: &'static str,
}

impl DnsMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let queries: Family<Asked, Counter> =
            metrics.family("dns_queries", "Queries answered, by type asked and code answered");
        let queries =
            KINDS.map(|kind| CODES.map(|rcode| queries.get_or_create(&Asked { r#type: kind, rcode }).clone()));
        let limited: Family<Action, Counter> =
            metrics.family("dns_limited", "Datagrams over their network's limit, by what became of them");
        let limited = |action| limited.get_or_create(&Action { action }).clone();
        let counter = |name: &str, help: &str| metrics.register(name, help, Counter::default());
        let gauge = |name: &str, help: &str| metrics.register(name, help, Gauge::default());
        Self {
            queries: Arc::new(queries),
            by_region: metrics.family("dns_region_answers", "Answers of the service, by the region given"),
            regions: Arc::default(),
            seconds: metrics.register(
                "dns_answer_seconds",
                "From a datagram taken to its answer given to the network",
                Histogram::new(SECONDS),
            ),
            truncated: counter("dns_truncated", "Answers that did not fit, or were cut for the limit"),
            slipped: limited("slipped"),
            dropped: limited("dropped"),
            mute: counter("dns_mute", "Messages without an answer: responses, and what is no message"),
            oversized: counter("dns_oversized", "Messages longer than any query of ours"),
            unsent: counter("dns_unsent", "Answers that the network did not take"),
            unreceived: counter("dns_unreceived", "Failures of receiving"),
            connections: gauge("dns_connections", "TCP connections that are open"),
            connections_refused: counter("dns_connections_refused", "TCP connections over a bound"),
            serial: gauge("dns_serial", "Version of the plan that is answered, or of the Snapshot without one"),
            views_kept: counter("dns_views_kept", "Views without an address, for which the last ones' were kept"),
        }
    }

    pub fn said(&self, said: &Said<'_>) {
        let counter = self.queries.get(kind(said)).and_then(|codes| codes.get(code(said)));
        if let Some(counter) = counter {
            counter.inc();
        }
        if said.is_truncated {
            self.truncated.inc();
        }
        if let Some(region) = said.region
            && let Some(counter) = self.regions.read().get(region)
        {
            counter.inc();
        }
    }

    pub fn took(&self, time: Duration) {
        self.seconds.observe(time.as_secs_f64());
    }

    /// From now on answers of these regions are counted. Bounded by the regions that there ever were.
    pub fn know<'a>(&self, regions: impl Iterator<Item = &'a Name>) {
        let mut known = self.regions.write();
        for region in regions {
            let counter = || self.by_region.get_or_create(&ByRegion { region: region.to_string() }).clone();
            known.entry(region.clone()).or_insert_with(counter);
        }
    }

    /// Answers of each region since the start.
    pub fn answers(&self) -> BTreeMap<Name, u64> {
        self.regions.read().iter().map(|(name, counter)| (name.clone(), counter.get())).collect()
    }
}

fn kind(said: &Said<'_>) -> usize {
    match said.kind {
        Some(RecordType::A) => 0,
        Some(RecordType::AAAA) => 1,
        Some(RecordType::HTTPS) => 2,
        Some(RecordType::SOA) => 3,
        Some(RecordType::NS) => 4,
        Some(RecordType::ANY) => 5,
        Some(_) => 6,
        None => 7,
    }
}

fn code(said: &Said<'_>) -> usize {
    match said.code {
        ResponseCode::NoError if said.is_no_data => 1,
        ResponseCode::FormErr => 2,
        ResponseCode::ServFail => 3,
        ResponseCode::NXDomain => 4,
        ResponseCode::NotImp => 5,
        ResponseCode::Refused => 6,
        ResponseCode::BADVERS => 7,
        _ => 0,
    }
}
