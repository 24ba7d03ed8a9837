//! The end of who follows.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, stream};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::identity::ExpectedPeer;
use spillway_proto::control;
use spillway_proto::control::evidence_client::EvidenceClient;
use spillway_runtime::dial::dial;
use spillway_runtime::drain::Drain;
use spillway_runtime::link::{MOST_MESSAGE, SightingLog};
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::Workload;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tonic::Status;

use super::{BEAT, SILENCE, decode};
use crate::distribution::{Report, Standing};
use crate::store::Leader;

/// Connecting, and the leader's answer, each.
const OPENING: Duration = Duration::from_secs(2);
/// Before the leader is called again.
const REST: Duration = Duration::from_secs(1);

/// Tells the leader what this node saw, and hears what the leader heard.
pub struct Follower {
    workload: Arc<Workload>,
    standing: watch::Receiver<Standing>,
    log: SightingLog,
    reports: mpsc::Sender<Report>,
    open: Gauge,
}

impl Follower {
    /// Shows `spillway_control_evidence_shared`: 1 while the leader is told, and tells.
    pub fn new(
        workload: Arc<Workload>,
        standing: watch::Receiver<Standing>,
        reports: mpsc::Sender<Report>,
        metrics: &Metrics,
    ) -> Self {
        let dropped = "Results of probes that no leader took away in time";
        Self {
            workload,
            standing,
            log: SightingLog::new(metrics.register("control_sightings_dropped", dropped, Counter::default())),
            reports,
            open: metrics.register(
                "control_evidence_shared",
                "Whether the leader's evidence is heard",
                Gauge::default(),
            ),
        }
    }

    /// Where what was seen here waits for the leader.
    pub fn log(&self) -> SightingLog {
        self.log.clone()
    }

    /// Follows whoever leads until the drain is over.
    pub async fn run(self, drain: Drain) {
        let mut standing = self.standing.clone();
        loop {
            let now = standing.borrow_and_update().clone();
            if matches!(now, Standing::Leading(_)) {
                self.forget();
            }
            let goes_on = tokio::select! {
                never = self.follow(&now) => match never {},
                changed = standing.changed() => changed.is_ok(),
                () = drain.stopped() => false,
            };
            self.open.set(0);
            if !goes_on {
                return;
            }
        }
    }

    /// What waits is told to nobody any more, and would be old when there is a leader to tell.
    fn forget(&self) {
        while self.log.take().now_or_never().is_some() {}
    }

    async fn follow(&self, standing: &Standing) -> Infallible {
        let Standing::Following(leader) = standing else { return std::future::pending().await };
        let mut told = false;
        loop {
            let began = Instant::now();
            let ended = self.share(leader).await;
            self.open.set(0);
            told &= began.elapsed() < SILENCE;
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(leader = %leader.node, why = ended, "no evidence is shared with the leader");
            }
            tokio::time::sleep(REST).await;
        }
    }

    /// One stream, until it ends; why.
    async fn share(&self, leader: &Leader) -> String {
        let generation = self.workload.generation();
        let expected = ExpectedPeer::ControlOf { trust_domain: self.workload.id().trust_domain };
        let channel = match dial(&self.workload, expected, &leader.address, OPENING).await {
            Ok(channel) => channel,
            Err(error) => return error.to_string(),
        };
        let outgoing = stream::unfold(self.log.clone(), |log| async move {
            let sightings = timeout(BEAT, log.take()).await.unwrap_or_default();
            Some((control::Sightings { sightings }, log))
        });
        let mut client = EvidenceClient::new(channel).max_decoding_message_size(MOST_MESSAGE);
        let mut heard = match timeout(OPENING, client.share(outgoing)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return words(&status),
            Err(late) => return late.to_string(),
        };
        self.open.set(1);
        tracing::info!(leader = %leader.node, "evidence is shared with the leader");
        loop {
            match timeout(SILENCE, heard.message()).await {
                Ok(Ok(Some(message))) => {
                    if let Some(report) = decode(message) {
                        report.give(&self.reports).await;
                    }
                }
                Ok(Ok(None)) => return "it closed the stream".into(),
                Ok(Err(status)) => return words(&status),
                Err(_) => return format!("it was silent for {} s", SILENCE.as_secs()),
            }
            if self.workload.generation() != generation {
                return "the certificate is another one".into();
            }
        }
    }
}

fn words(status: &Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

#[cfg(test)]
mod tests {
    use spillway_core::identity::{SpiffeId, TrustDomain};
    use spillway_core::units::Name;
    use spillway_runtime::authority::{Authority, LeafRequest};

    use super::*;
    use crate::store::{Store, StoreSettings};

    #[tokio::test]
    async fn what_was_seen_before_this_node_led_is_told_to_nobody_after() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreSettings::Sqlite(folder.path().join("control.db"))).await.unwrap();
        let won = store.campaign(&Name::parse("c").unwrap(), "127.0.0.1:1").await.unwrap();
        let authority = Authority::create(TrustDomain::parse("td").unwrap()).unwrap();
        let id = SpiffeId::parse("spiffe://td/region/eu/control/c").unwrap();
        let leaf = authority.issue(&LeafRequest::new(id, Duration::from_secs(3_600))).unwrap();
        let files = leaf.save_workload(folder.path(), authority.trust_bundle()).unwrap();
        let (stands, standing) = watch::channel(Standing::Alone);
        let (reports, _heard) = mpsc::channel(1);
        let follower = Follower::new(Workload::load(&files).unwrap(), standing, reports, &Metrics::new("test"));
        let (log, drain) = (follower.log(), Drain::new(Duration::ZERO));
        log.record((0..3_000).map(|_| control::Sighting::default()));
        let task = tokio::spawn(follower.run(drain.clone()));
        stands.send_replace(Standing::Leading(won.fence.clone()));
        // Two batches are gone, and the third with them.
        let is_empty = async || {
            loop {
                match log.take().now_or_never() {
                    None => return,
                    Some(left) => log.record(left),
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(10), is_empty()).await.expect("nothing waits");
        drain.stop();
        task.await.unwrap();
    }
}
