//! What is counted of requests between regions. Regions are those of the Snapshot, all other labels our own lists.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use spillway_core::units::Name;
use spillway_runtime::telemetry::Metrics as Registry;

use crate::peers::cause::Cause;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sent {
    region: String,
    reason: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Came {
    region: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stayed {
    cause: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    outcome: &'static str,
}

pub struct PeerMetrics {
    sent: Family<Sent, Counter>,
    stayed: Family<Stayed, Counter>,
    came: Family<Came, Counter>,
    probes: Family<Ended, Counter>,
}

impl PeerMetrics {
    pub fn new(registry: &Registry) -> Self {
        let sent = "Calls to gateways of other regions for requests that could not be served here, by region, why, \
                    and what became of the call";
        let stayed = "Requests that could not be served here and were sent to no other region, by why they could not \
                      be served and why they stayed";
        let came = "Requests that other regions' gateways sent here, by region and what became of them";
        let probes = "Probes of this region by gateways and control nodes, by what became of them";
        Self {
            sent: registry.family("gateway_spilled", sent),
            stayed: registry.family("gateway_no_peer", stayed),
            came: registry.family("gateway_forwarded", came),
            probes: registry.family("gateway_probes", probes),
        }
    }

    pub fn sent(&self, region: &Name, cause: Cause, outcome: &'static str) {
        self.sent.get_or_create(&Sent { region: region.to_string(), reason: cause.word(), outcome }).inc();
    }

    /// `reason`: of a [`NoPeer`], or of a [`NoPlace`].
    ///
    /// [`NoPeer`]: spillway_core::failover::NoPeer
    /// [`NoPlace`]: crate::peers::places::NoPlace
    pub fn stayed(&self, cause: Cause, reason: &'static str) {
        self.stayed.get_or_create(&Stayed { cause: cause.word(), reason }).inc();
    }

    /// A request from another region ended, with this HTTP status.
    pub fn came(&self, region: &Name, status: u16) {
        let outcome = match status {
            200 => "answered",
            400..=428 | 430..=498 => "refused",
            499 => "cancelled",
            429 | 503 => "overloaded",
            _ => "failed",
        };
        self.came.get_or_create(&Came { region: region.to_string(), outcome }).inc();
    }

    /// `reason`: of its refusal, as in `spillway_gateway_rejected_total`; none: it was answered.
    pub fn probed(&self, reason: Option<&'static str>) {
        self.probes.get_or_create(&Ended { outcome: reason.unwrap_or("answered") }).inc();
    }
}
