//! Our own certificate, made anew by the control plane's authority while we run.
//!
//! ```text
//! no certificate --prepare(): key, request, token--> certificate
//! certificate --about half of its life: new key, request, by the certificate of now--> the next one
//!             --every few minutes--> the trust bundle
//! failed --rests, longer each time, asks another control node--> again
//! ```
//!
//! The rule: keys are made here and never leave the machine. What comes back is held against key, identity and bundle
//! before any file is touched, and files are replaced so that each moment has a whole identity ([`files`]). The files
//! are all that is shared with [`Workload`], which takes them as it takes an operator's. Without the authority
//! everything goes on until the certificate ends; when it is asked is decided by
//! [`spillway_core::authority::renewal`].

mod call;
mod files;
mod settings;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use spillway_core::authority::renewal::Life;
use spillway_core::identity::{ExpectedPeer, Role, SpiffeId};
use spillway_proto::control::IssueRequest;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

pub use self::settings::{BootstrapSettings, RenewalSettings};

use self::call::Servers;
use self::files::NextKey;
use crate::drain::Drain;
use crate::file::with_path;
use crate::telemetry::{Chain, Metrics};
use crate::tls::{IdentityError, IdentitySettings, Newcomer, PeerError, Workload, examine};

/// How long a process that has no certificate tries to get one before it gives up to who started it.
const FIRST: Duration = Duration::from_secs(60);
/// The wall clock may be set: a moment of it is looked at again after this.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// How long a new certificate may lie there until it is in use.
const TAKEN: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(100);
/// The rest after a success, as if after so many failures: a minute.
const SETTLED: u32 = 6;

/// Why there is no new certificate or bundle. The last good one stays.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// No control node answered; a retry may help.
    #[error("no control node answered: {0}")]
    Unreachable(String),
    /// The authority said no. For a token, a retry does not help.
    #[error("the authority denied it: {0}")]
    Denied(String),
    /// The authority's fault: what it gave is no identity of ours.
    #[error("what the authority gave cannot be used: {0}")]
    Unusable(String),
    #[error("a file of the identity cannot be replaced")]
    Files(#[from] std::io::Error),
    #[error("the new certificate was not taken into use")]
    NotTaken,
    #[error("a request cannot be made")]
    Request(#[from] rcgen::Error),
    #[error("identity")]
    Identity(#[from] IdentityError),
}

impl RenewalError {
    /// A stable word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Denied(_) => "denied",
            Self::Unusable(_) => "unusable",
            Self::Files(_) => "files",
            Self::NotTaken => "not-taken",
            Self::Request(_) => "request",
            Self::Identity(_) => "identity",
        }
    }
}

/// To be called before the identity is loaded: ends what a crash cut, and gets a certificate if there is none that is
/// valid and the settings say from where. `role` is who we must be.
pub async fn prepare(
    identity: &IdentitySettings,
    renew: Option<&RenewalSettings>,
    role: &Role,
) -> Result<(), RenewalError> {
    let Some(RenewalSettings { bootstrap, .. }) = renew else { return Ok(()) };
    let files = identity.clone();
    let present = aside(move || {
        files::recover(&files)?;
        Ok(is_valid(&files, SystemTime::now()))
    })
    .await?;
    let Some(bootstrap) = bootstrap.as_ref().filter(|_| !present) else { return Ok(()) };
    let began = Instant::now();
    let mut failures = 0;
    loop {
        match first_certificate(identity, bootstrap, role).await {
            Ok(life) => {
                tracing::info!(not_after = not_after(&life), "the first certificate has come");
                return Ok(());
            }
            Err(error @ RenewalError::Unreachable(_)) if began.elapsed() < FIRST => {
                tracing::warn!(error = %Chain(&error), "no first certificate yet");
            }
            Err(error) => return Err(error),
        }
        // As if for a life of an hour: a second, then longer, at most a minute.
        let hour = Life { not_before: SystemTime::UNIX_EPOCH, not_after: SystemTime::UNIX_EPOCH + 60 * FIRST };
        tokio::time::sleep(hour.rest(failures, rand::random())).await;
        failures += 1;
    }
}

async fn first_certificate(
    identity: &IdentitySettings,
    bootstrap: &BootstrapSettings,
    role: &Role,
) -> Result<Life, RenewalError> {
    let (files, token) = (identity.clone(), bootstrap.token.clone());
    let (key, token, bundle) = aside(move || {
        let token = std::fs::read_to_string(&token).map_err(|error| with_path(&token, &error))?;
        let bundle = std::fs::read(&files.trust_bundle).map_err(|error| with_path(&files.trust_bundle, &error))?;
        Ok((NextKey::make(&files)?, token.trim().to_owned(), bundle))
    })
    .await?;
    let newcomer = Newcomer::new(&bundle)?;
    let id = SpiffeId { trust_domain: newcomer.trust_domain().clone(), role: role.clone() };
    let servers = Servers { servers: &bootstrap.servers, config: newcomer.client_config(), draw: rand::random() };
    obtain(identity, &servers, key, &id, token).await
}

/// Asks for a certificate, and puts it in place.
async fn obtain(
    identity: &IdentitySettings,
    servers: &Servers<'_>,
    key: NextKey,
    id: &SpiffeId,
    token: String,
) -> Result<Life, RenewalError> {
    let request = IssueRequest { csr: key.request(id)?.into(), token, life_seconds: 0 };
    let answer = servers.issue(request).await?;
    let texts = [answer.chain.clone(), key.pem(), answer.trust_bundle.clone()].map(String::into_bytes);
    let unusable = |problem: String| RenewalError::Unusable(problem);
    let (found, life) = examine(&texts, SystemTime::now()).map_err(|error| unusable(Chain(&error).to_string()))?;
    if found != *id {
        return Err(unusable(format!("it names '{found}'")));
    }
    let files = identity.clone();
    aside(move || key.install(&files, &answer.chain, &answer.trust_bundle)).await?;
    Ok(life)
}

/// Whether certificate and key lie there, not expired. Whether they are good otherwise is for [`Workload::load`].
fn is_valid(identity: &IdentitySettings, now: SystemTime) -> bool {
    let read = |path| std::fs::read(path).ok();
    let files = (read(&identity.certificate), read(&identity.key), read(&identity.trust_bundle));
    let (Some(certificate), Some(key), Some(bundle)) = files else { return false };
    let expired = |error| matches!(error, IdentityError::Certificate(PeerError::Expired));
    !examine(&[certificate, key, bundle], now).is_err_and(expired)
}

/// Keeps a process's certificate and trust bundle fresh.
#[derive(Debug)]
pub struct Renewal {
    identity: IdentitySettings,
    settings: RenewalSettings,
    workload: Arc<Workload>,
    renewals: Family<Outcome, Counter>,
    bundles: Family<Outcome, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Renewal {
    /// Shows `spillway_identity_renewals_total{outcome}` and `spillway_identity_bundles_total{outcome}`.
    pub fn new(
        identity: IdentitySettings,
        settings: RenewalSettings,
        workload: Arc<Workload>,
        metrics: &Metrics,
    ) -> Self {
        let renewals = metrics.family("identity_renewals", "Certificates asked of the authority, by what became of it");
        let bundles = metrics.family("identity_bundles", "Trust bundles asked of the authority, by what became of it");
        Self { identity, settings, workload, renewals, bundles }
    }

    /// Works until the drain has begun. [`Workload::watch`] must run beside it.
    pub async fn run(self, drain: Drain) {
        tokio::select! {
            () = self.certificates() => {}
            () = self.trust_bundles() => {}
            () = drain.draining() => {}
        }
    }

    async fn certificates(&self) {
        loop {
            let life = self.workload.life();
            let due = life.first_attempt(rand::random());
            self.until(due, &life).await;
            let mut failures = 0;
            // A certificate that somebody else has put there is as good.
            while self.workload.life() == life {
                let outcome = self.renew(&life).await;
                let label = outcome.as_ref().map_or_else(RenewalError::reason, |()| "renewed");
                self.renewals.get_or_create(&Outcome { outcome: label }).inc();
                let Err(error) = outcome else {
                    tracing::info!(not_after = not_after(&self.workload.life()), "certificate renewed");
                    // To a clock that is far ahead every leaf is old: it asks once a minute, not all the time.
                    tokio::time::sleep(self.workload.life().rest(SETTLED, 1.0)).await;
                    break;
                };
                let rest = life.rest(failures, rand::random());
                tracing::warn!(
                    error = %Chain(&error),
                    failures,
                    rest_ms = rest.as_millis() as u64,
                    not_after = not_after(&life),
                    "certificate not renewed"
                );
                failures = failures.saturating_add(1);
                tokio::time::sleep(rest).await;
            }
        }
    }

    /// Returns when the time has come, or another certificate is in use.
    async fn until(&self, due: SystemTime, life: &Life) {
        while let Ok(left) = due.duration_since(SystemTime::now()) {
            if left.is_zero() || self.workload.life() != *life {
                return;
            }
            tokio::time::sleep(left.min(LONGEST_SLEEP)).await;
        }
    }

    async fn renew(&self, old: &Life) -> Result<(), RenewalError> {
        let files = self.identity.clone();
        let key = aside(move || NextKey::make(&files)).await?;
        obtain(&self.identity, &self.servers(), key, &self.workload.id(), String::new()).await?;
        let deadline = Instant::now() + TAKEN;
        while self.workload.life() == *old {
            if Instant::now() > deadline {
                return Err(RenewalError::NotTaken);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    async fn trust_bundles(&self) {
        loop {
            // Up to a tenth earlier: a fleet that started together does not ask together.
            tokio::time::sleep(self.settings.every.mul_f64(1.0 - 0.1 * rand::random::<f64>())).await;
            let outcome = self.trust_bundle().await;
            let label = match &outcome {
                Ok(true) => "changed",
                Ok(false) => "same",
                Err(error) => error.reason(),
            };
            self.bundles.get_or_create(&Outcome { outcome: label }).inc();
            match outcome {
                Ok(true) => tracing::info!("the trust bundle has changed"),
                Ok(false) => {}
                Err(error @ RenewalError::Unreachable(_)) => {
                    tracing::debug!(error = %Chain(&error), "no news of the trust bundle");
                }
                Err(error) => tracing::error!(error = %Chain(&error), "the trust bundle stays as it is"),
            }
        }
    }

    /// Whether it has changed. One that our own certificate does not lead to would cut us off from everybody: it comes
    /// with the next certificate.
    async fn trust_bundle(&self) -> Result<bool, RenewalError> {
        let bundle = self.servers().bundle().await?;
        let files = self.identity.clone();
        let (certificate, key, bundle) = aside(move || {
            let read = |path: &std::path::Path| std::fs::read(path).map_err(|error| with_path(path, &error));
            Ok((read(&files.certificate)?, read(&files.key)?, bundle))
        })
        .await?;
        let texts = [certificate, key, bundle.clone().into_bytes()];
        examine(&texts, SystemTime::now()).map_err(|error| RenewalError::Unusable(Chain(&error).to_string()))?;
        let files = self.identity.clone();
        aside(move || files::save_bundle(&files, &bundle)).await.map_err(Into::into)
    }

    fn servers(&self) -> Servers<'_> {
        let control = ExpectedPeer::ControlOf { trust_domain: self.workload.id().trust_domain };
        let config = self.workload.client_config(control);
        Servers { servers: &self.settings.servers, config, draw: rand::random() }
    }
}

/// Does what blocks on the file system.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|lost| Err(std::io::Error::other(lost)))
}

/// For a log's field: Unix time in seconds.
fn not_after(life: &Life) -> u64 {
    life.not_after.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
