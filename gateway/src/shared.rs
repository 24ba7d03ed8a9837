//! What all threads of the process share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::HeaderValue;
use spillway_core::units::Name;
use spillway_runtime::access_log::AccessLog;
use spillway_runtime::audit::Audit;
use spillway_runtime::drain::Drain;
use spillway_runtime::plan::{Plans, Published};
use spillway_runtime::telemetry::Traces;
use spillway_runtime::tls::Workload;
use spillway_runtime::upstream::UpstreamMetrics;
use spillway_runtime::vantage::Nudges;

use crate::admission::Admission;
use crate::clock::Clock;
use crate::degrade::Degradation;
use crate::members::Membership;
use crate::metrics::Metrics;
use crate::peers::metrics::PeerMetrics;
use crate::peers::places::Places;
use crate::peers::rests::Rests;
use crate::peers::shed::PlanMetrics;
use crate::pods::book::Book;
use crate::request::memory::Memory;
use crate::results::Results;
use crate::settings::Limits;
use crate::traffic::Tally;

pub struct Shared {
    pub region: Name,
    pub name: Name,
    pub region_header: HeaderValue,
    pub clock: Clock,
    pub limits: Limits,
    pub metrics: Metrics,
    pub access_log: AccessLog,
    /// What the control plane is told.
    pub traffic: Arc<Tally>,
    pub audit: Audit,
    pub traces: Traces,
    pub workload: Arc<Workload>,
    /// What the control plane decided of all regions.
    pub plans: Arc<Plans>,
    pub membership: Arc<Membership>,
    /// What is known of the pods.
    pub book: Book,
    pub degradation: Degradation,
    pub admission: Admission,
    pub results: Arc<Results>,
    /// What the bodies of requests and answers take.
    pub memory: Arc<Memory>,
    pub drain: Drain,
    pub upstream_metrics: UpstreamMetrics,
    /// Places of requests that are with other regions.
    pub spilling: Places,
    /// Places of streams that are.
    pub streams_spilling: Places,
    /// Whom to probe soon.
    pub nudges: Nudges,
    /// Another region can be reached that may answer requests of this one, as the threads' ways saw it last.
    pub peers_reached: AtomicBool,
    /// Other regions that have no room just now.
    pub rests: Rests,
    pub peer_metrics: PeerMetrics,
    pub plan_metrics: PlanMetrics,
}

impl Shared {
    /// What is decided of all regions; none: nobody has said.
    pub fn plan(&self) -> Option<Arc<Published>> {
        self.plans.current()
    }

    /// Whether new traffic is wanted: not draining, and somebody answers.
    pub fn is_ready(&self) -> bool {
        self.drain.is_serving() && self.has_answers()
    }

    /// Whether a pod of this region answers, or another region can be asked.
    pub fn has_answers(&self) -> bool {
        self.book.any_serving() || self.peers_reached.load(Ordering::Relaxed)
    }

    /// Whether the region itself answers, for those who judge it.
    pub fn serves_itself(&self) -> bool {
        self.drain.is_serving() && self.book.any_serving()
    }
}
