//! What the authority shows.

use std::time::SystemTime;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::authority::rotation::Stage;
use spillway_runtime::telemetry::Metrics;

#[derive(Clone, Debug)]
pub(super) struct AuthorityMetrics {
    issued: Family<Proof, Counter>,
    refused: Family<Reason, Counter>,
    connections_refused: Family<Reason, Counter>,
    expiry: Gauge,
    stage: Family<ByStage, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Proof {
    proof: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByStage {
    stage: &'static str,
}

impl AuthorityMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let expiry = "When the authority can sign no more, Unix time; 0: it cannot sign now";
        Self {
            issued: metrics.family("authority_issued", "Certificates given, by what their askers showed"),
            refused: metrics.family("authority_refused", "Calls of the authority that were refused"),
            connections_refused: metrics
                .family("authority_connections_refused", "Connections without a certificate that were refused"),
            expiry: metrics.register("authority_expiry_seconds", expiry, Gauge::default()),
            stage: metrics.family("authority_stage", "1 for the stage of the roots' rotation"),
        }
    }

    pub fn issued(&self, proof: &'static str) {
        self.issued.get_or_create(&Proof { proof }).inc();
    }

    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    pub fn connection_refused(&self, reason: &'static str) {
        self.connections_refused.get_or_create(&Reason { reason }).inc();
    }

    pub fn show(&self, stage: Option<&Stage>, not_after: Option<SystemTime>) {
        for name in ["settled", "announced", "signing"] {
            let now = stage.is_some_and(|stage| stage.name() == name);
            self.stage.get_or_create(&ByStage { stage: name }).set(i64::from(now));
        }
        let since = not_after.and_then(|end| end.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.expiry.set(since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX)));
    }
}
