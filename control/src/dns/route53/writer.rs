//! Reads the records, compares, corrects.
//!
//! The rule: records are read before they are written, again and again: what somebody changed by hand is put right, and
//! nothing is written that is there. A leader that has been followed by another one writes nothing any more, nor does a
//! batch of its that comes late.
//!
//! ```text
//! a new view, or a minute ─▶ list ─▶ stamp newer? refused ─▶ no changes, stamp of this plan? done ─▶ one batch: stamp replaced, changes
//! ```

use std::sync::Arc;
use std::time::Duration;

use aws_sdk_route53::Client;
use aws_sdk_route53::config::retry::RetryConfig;
use aws_sdk_route53::config::timeout::TimeoutConfig;
use aws_sdk_route53::config::{BehaviorVersion, Config, Credentials, Region};
use aws_sdk_route53::error::{BuildError, DisplayErrorContext};
use aws_sdk_route53::types::{ChangeBatch, ResourceRecordSet, RrType};
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::{Chain, Metrics};
use tokio::sync::watch;
use tokio::time::timeout;

use super::credentials::{NoCredentials, find};
use super::records::{Stamp, changes, desired, restamp, stamp_name};
use super::settings::Route53Settings;
use crate::dns::view::View;

/// How often records are compared with the view though nothing changed.
pub const CORRECT_EVERY: Duration = Duration::from_secs(60);
/// Between two corrections: Route 53 takes five requests a second of an account (API Reference, throttling).
const SPACING: Duration = Duration::from_secs(2);
/// The whole of one correction: two lists and a batch.
const DEADLINE: Duration = Duration::from_secs(20);
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pages of 300 sets of one name: more than 100 regions have.
const MOST_PAGES: usize = 3;

/// What the leader wants to be there.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    pub epoch: u64,
    pub view: View,
}

/// What a correction changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Corrected {
    /// Sets that were created, changed or deleted; 0: all was as it should be.
    pub changes: usize,
}

/// Why records are not as they should be. All but `Superseded` are worth another try.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("the records are those of epoch {}, plan {}: a later leader's", .0.epoch, .0.version)]
    Superseded(Stamp),
    #[error("there are no credentials")]
    Credentials(#[from] NoCredentials),
    #[error("a record cannot be written")]
    Record(#[from] BuildError),
    #[error("the zone cannot be listed: {0}")]
    List(String),
    #[error("the batch was not taken: {0}")]
    Batch(String),
    #[error("Route 53 took longer than {} s", DEADLINE.as_secs())]
    Slow,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug)]
struct WriterMetrics {
    corrections: Family<Outcome, Counter>,
    changes: Counter,
    plan: Gauge,
}

/// Writes the records of one service.
#[derive(Clone, Debug)]
pub struct Writer {
    settings: Route53Settings,
    /// All but the credentials.
    config: Config,
    /// With the credentials of last time: most often they are those of now.
    client: Arc<Mutex<Option<(Credentials, Client)>>>,
    metrics: WriterMetrics,
}

impl Writer {
    /// Counts `spillway_control_route53_corrections_total{outcome}` and `…_changes_total`; shows `…_plan`, the version
    /// that the records were found or made to be.
    pub fn new(settings: Route53Settings, metrics: &Metrics) -> Self {
        let http = Builder::new().tls_provider(Provider::Rustls(CryptoMode::AwsLc)).build_https();
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).connect_timeout(ATTEMPT).build();
        let mut config = Config::builder()
            .behavior_version(BehaviorVersion::latest())
            // Route 53 is one for all regions; requests are signed for this one.
            .region(Region::new("us-east-1"))
            .retry_config(RetryConfig::standard().with_max_attempts(3))
            .timeout_config(timeouts)
            .http_client(http);
        if let Some(endpoint) = &settings.endpoint {
            config = config.endpoint_url(endpoint);
        }
        let corrections = "Comparisons with the records of Route 53, by outcome";
        let metrics = WriterMetrics {
            corrections: metrics.family("control_route53_corrections", corrections),
            changes: metrics.register("control_route53_changes", "Record sets changed", Counter::default()),
            plan: metrics.register("control_route53_plan", "Version of the plan in Route 53", Gauge::default()),
        };
        Self { settings, config: config.build(), client: Arc::default(), metrics }
    }

    /// With the credentials of now.
    async fn client(&self) -> Result<Client, WriteError> {
        let settings = self.settings.credentials.clone();
        let found = tokio::task::spawn_blocking(move || find(&settings, |name| std::env::var(name).ok()));
        // It is lost only where the process ends.
        let found = found.await.map_err(|_| NoCredentials::Nowhere)??;
        let mut known = self.client.lock();
        if let Some((_, client)) = known.as_ref().filter(|(credentials, _)| *credentials == found) {
            return Ok(client.clone());
        }
        let client = Client::from_conf(self.config.to_builder().credentials_provider(found.clone()).build());
        *known = Some((found, client.clone()));
        Ok(client)
    }

    /// Corrects what differs, whenever what is wanted changes and each minute, until stopped. None is wanted of who is
    /// not the leader.
    pub async fn follow(self, mut wanted: watch::Receiver<Option<Arc<Wanted>>>, drain: Drain) {
        loop {
            let now = wanted.borrow_and_update().clone();
            if let Some(now) = now {
                match self.correct(&now).await {
                    Ok(Corrected { changes: 0 }) => {}
                    Ok(Corrected { changes }) => {
                        tracing::info!(changes, plan = now.view.serial, "records of Route 53 corrected");
                    }
                    Err(error) => {
                        let error = Chain(&error);
                        tracing::error!(%error, plan = now.view.serial, "records of Route 53 stay as they are");
                    }
                }
            }
            let next = async {
                tokio::time::sleep(SPACING).await;
                // An error is the end of whoever wants something: what is there stays.
                let _ = timeout(CORRECT_EVERY, wanted.changed()).await;
            };
            tokio::select! {
                () = next => {}
                () = drain.stopped() => return,
            }
        }
    }

    /// Makes the records those of the view. May be called again at any time.
    pub async fn correct(&self, wanted: &Wanted) -> Result<Corrected, WriteError> {
        let corrected = timeout(DEADLINE, self.try_correct(wanted)).await.map_err(|_| WriteError::Slow).flatten();
        let outcome = match &corrected {
            Ok(Corrected { changes: 0 }) => "unchanged",
            Ok(_) => "corrected",
            Err(WriteError::Superseded(_)) => "superseded",
            Err(_) => "failed",
        };
        self.metrics.corrections.get_or_create(&Outcome { outcome }).inc();
        if let Ok(Corrected { changes }) = corrected {
            self.metrics.changes.inc_by(changes as u64);
            self.metrics.plan.set(i64::try_from(wanted.view.serial).unwrap_or(i64::MAX));
        }
        corrected
    }

    async fn try_correct(&self, wanted: &Wanted) -> Result<Corrected, WriteError> {
        let name = stamp_name(&self.settings.name);
        let stamps = self.list(&name, RrType::Txt).await?;
        let read = stamps.iter().find(|set| *set.r#type() == RrType::Txt);
        let found = read.and_then(Stamp::read);
        let stamp = Stamp::after(found, wanted.epoch, wanted.view.serial);
        if let Some(later) = found.filter(|found| *found > stamp) {
            return Err(WriteError::Superseded(later));
        }
        let listed = self.list(&format!("{}.", self.settings.name), RrType::A).await?;
        let listed: Vec<_> =
            listed.into_iter().filter(|set| matches!(set.r#type(), RrType::A | RrType::Aaaa)).collect();
        let of_sets = changes(&listed, &desired(&wanted.view, &self.settings.answers, &self.settings.name)?)?;
        let corrected = Corrected { changes: of_sets.len() };
        // Records that are right under another plan's stamp are stamped: else what is on its way from there would come.
        if of_sets.is_empty() && found.map(Stamp::plan) == Some(stamp.plan()) {
            return Ok(corrected);
        }
        let of_stamp = restamp(read, stamp.record(&self.settings.name)?)?;
        let batch = ChangeBatch::builder()
            .set_changes(Some([of_stamp, of_sets].concat()))
            .comment(format!("spillway: epoch {}, plan {}", stamp.epoch, stamp.version))
            .build()?;
        let client = self.client().await?;
        let request = client.change_resource_record_sets().hosted_zone_id(&self.settings.hosted_zone);
        let sent = request.change_batch(batch).send();
        sent.await.map_err(|error| WriteError::Batch(DisplayErrorContext(error).to_string()))?;
        Ok(corrected)
    }

    /// The sets of one name, from this type on.
    async fn list(&self, name: &str, from: RrType) -> Result<Vec<ResourceRecordSet>, WriteError> {
        let client = self.client().await?;
        let mut sets = Vec::new();
        let (mut kind, mut identifier) = (from, None);
        for _ in 0..MOST_PAGES {
            let page = client
                .list_resource_record_sets()
                .hosted_zone_id(&self.settings.hosted_zone)
                .start_record_name(name)
                .start_record_type(kind)
                .set_start_record_identifier(identifier)
                .send()
                .await
                .map_err(|error| WriteError::List(DisplayErrorContext(error).to_string()))?;
            let of_name = |set: &&ResourceRecordSet| set.name() == name;
            let before = sets.len();
            sets.extend(page.resource_record_sets().iter().filter(of_name).cloned());
            let all_of_name = sets.len() - before == page.resource_record_sets().len();
            let goes_on = page.is_truncated() && page.next_record_name() == Some(name) && all_of_name;
            let Some(next) = page.next_record_type().filter(|_| goes_on) else { return Ok(sets) };
            (kind, identifier) = (next.clone(), page.next_record_identifier().map(str::to_owned));
        }
        Err(WriteError::List(format!("{name} has more than {MOST_PAGES} pages of records")))
    }
}

#[cfg(test)]
#[path = "fence_tests.rs"]
mod fence_tests;
#[cfg(test)]
#[path = "moto_tests.rs"]
mod tests;
