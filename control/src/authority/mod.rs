//! The certificate authority of the trust domain: leaves for workloads, tokens for their first ones, roots that follow
//! one another.
//!
//! ```text
//! node --CSR, by its certificate--------------> [service] --\
//! node --CSR, by a token--> [newcomers] ------> [service] ---> Authority::issue: what is proved, judged, signed
//! operator --token, rotation------------------> [service] --/                        |
//!                                              store: tokens/HASH, authority    folder: keys of intermediates
//! ```
//!
//! The rule: a caller gets a leaf for the identity that it proved, and for no other
//! ([`spillway_core::authority::request`]). Every node of the control plane can issue by a certificate, with or
//! without a store; what writes to the store is for the leader. Keys of authorities stay in the folder, and roots' keys
//! need not be there at all.

mod limit;
mod metrics;
mod newcomers;
mod refusal;
mod roots;
mod service;
mod settings;
mod signers;
mod tokens;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use spillway_core::authority::request::{Denied, Grant, Names, judge};
use spillway_core::authority::rotation::{Pace, Stage};
use spillway_core::identity::{Role, SpiffeId};
use spillway_proto::control::{IssueRequest, IssueResponse};
use spillway_runtime::audit::{Audit, Denial, Event};
use spillway_runtime::authority::{Authority as Signer, Csr, LeafRequest, names_of};
use spillway_runtime::drain::Drain;
use spillway_runtime::telemetry::{Chain, Metrics};
use spillway_runtime::tls::{Peer, Workload};
use tokio::sync::watch;
use tokio::time::Instant;

pub use self::newcomers::Newcomers;
pub use self::refusal::{BadToken, Refusal};
pub use self::service::Service;
pub use self::settings::AuthoritySettings;

use self::limit::Limit;
use self::metrics::AuthorityMetrics;
use self::roots::Roots;
use self::signers::Signers;
use self::tokens::Order;
use crate::intent::Operators;
use crate::store::{Condition, Fence, Store, StoreError, Write};

/// How often the leader looks whether a stage's time is over.
const TICK: Duration = Duration::from_millis(500);
/// How often the folder is read: files that are replaced there are taken after this.
const FOLDER: Duration = Duration::from_secs(5);
/// Certificates of one identity, and of all. A fleet of 10,000 nodes asks once in four seconds, or all together
/// after a long night.
const OF_ONE: limit::Pace = limit::Pace { a_second: 1, at_once: 20 };
const OF_ALL: limit::Pace = limit::Pace { a_second: 200, at_once: 1_000 };
/// A token lives so long unless its maker says otherwise, and at most so long.
const TOKEN_LIFE: Duration = Duration::from_secs(3_600);
const LONGEST_TOKEN_LIFE: Duration = Duration::from_secs(86_400);

/// The operator's fault: the authority cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: no authority of the trust domain can be read there: {}", folder.display(), faults.join("; "))]
    NoSigner { folder: PathBuf, faults: Vec<String> },
}

/// The authority of one control node. All nodes' authorities are one through the store.
#[derive(Debug)]
pub struct Authority {
    settings: AuthoritySettings,
    operators: Operators,
    workload: Arc<Workload>,
    store: Store,
    leading: watch::Receiver<Option<Fence>>,
    signers: ArcSwap<Signers>,
    /// `None`: it is not known which roots are trusted now.
    roots: ArcSwapOption<Roots>,
    limit: Limit,
    audit: Audit,
    metrics: AuthorityMetrics,
}

/// Who may come in by a certificate: workloads and operators. Clients are tenants', and their certificates their own
/// affair.
pub fn may_call(own: &SpiffeId, peer: &SpiffeId) -> bool {
    !matches!(peer.role, Role::Client { .. }) && own.trust_domain == peer.trust_domain
}

/// Who calls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller<'a> {
    /// `None`: it has shown no certificate.
    pub peer: Option<&'a Peer>,
    pub address: Option<SocketAddr>,
}

impl Authority {
    /// Reads the folder, and the store if it answers. `leading` says by which election this node leads.
    /// [`Authority::watch`] must run beside it.
    pub async fn open(
        settings: AuthoritySettings,
        operators: Operators,
        workload: Arc<Workload>,
        store: Store,
        leading: watch::Receiver<Option<Fence>>,
        audit: Audit,
        metrics: &Metrics,
    ) -> Result<Arc<Self>, OpenError> {
        let signers = read_folder(&settings, &workload).await;
        if signers.first().is_none() {
            let Signers { faults, .. } = signers;
            return Err(OpenError::NoSigner { folder: settings.folder, faults });
        }
        tell(&signers);
        let authority = Self {
            roots: ArcSwapOption::from(Roots::of_folder(&signers).map(Arc::new)),
            signers: ArcSwap::from_pointee(signers),
            settings,
            operators,
            workload,
            store,
            leading,
            limit: Limit::new(OF_ONE, OF_ALL),
            audit,
            metrics: AuthorityMetrics::register(metrics),
        };
        if let Err(error) = authority.read_store().await {
            tracing::warn!(error = %Chain(&error), "the roots are those of the folder until the store answers");
        }
        authority.show();
        Ok(Arc::new(authority))
    }

    /// Follows folder and store, and, where this node leads, brings the rotation from stage to stage. Until stopped.
    pub async fn watch(self: Arc<Self>, drain: Drain) {
        let mut changed = self.store.watch(roots::KEY);
        let mut unread = true;
        let mut folder_read = Instant::now();
        loop {
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                Ok(()) = changed.changed() => unread = true,
                () = drain.stopped() => return,
            }
            if folder_read.elapsed() >= FOLDER {
                self.read_folder().await;
                folder_read = Instant::now();
            }
            let outcome = async {
                if unread {
                    self.read_store().await?;
                }
                self.lead().await
            };
            match outcome.await {
                Ok(()) => unread = false,
                // Somebody else was first, or leads: what they wrote is read at the next tick.
                Err(StoreError::Conflict(_) | StoreError::Fenced(_)) => unread = true,
                Err(error) => {
                    unread = true;
                    tracing::debug!(error = %Chain(&error), "the authority waits for the store");
                }
            }
            self.show();
        }
    }

    /// A certificate for who proves to be somebody.
    pub(crate) async fn issue(&self, caller: Caller<'_>, request: &IssueRequest) -> Result<IssueResponse, Refusal> {
        let proof = if request.token.is_empty() { "certificate" } else { "token" };
        let (leaf, response) = self.leaf(caller, request).await?;
        self.metrics.issued(proof);
        tracing::info!(id = %leaf.0, serial = leaf.1, proof, "certificate issued");
        self.audit.record(Event::CertificateIssued {
            id: leaf.0.to_string(),
            serial: leaf.1,
            not_after: leaf.2.into(),
            proof,
            address: caller.address,
        });
        Ok(response)
    }

    async fn leaf(
        &self,
        caller: Caller<'_>,
        request: &IssueRequest,
    ) -> Result<((SpiffeId, String, SystemTime), IssueResponse), Refusal> {
        let now = SystemTime::now();
        let Csr { key, mut asked } = Csr::read(&request.csr)?;
        asked.life = (request.life_seconds > 0).then(|| Duration::from_secs(request.life_seconds));
        let asker = key.fingerprint();
        let peer = caller.peer.map(|peer| self.trusted(peer, now)).transpose()?;
        let (grant, token) = match peer {
            _ if !request.token.is_empty() => {
                let found = tokens::find(&self.store, &request.token, &asker, now).await?;
                (found.grant.clone(), Some(found))
            }
            Some(peer) => (granted(peer)?, None),
            None => return Err(Refusal::NoProof),
        };
        // Who has a certificate does not become somebody else by a token.
        if peer.is_some_and(|peer| peer.id != grant.id) {
            return Err(Denied::OtherIdentity.into());
        }
        if !self.limit.admits(&grant.id) {
            return Err(Refusal::Busy);
        }
        if self.workload.revokes(&grant.id) {
            return Err(Refusal::Revoked);
        }
        let approved = judge(&asked, &grant, self.settings.life)?;
        let signer = self.signer()?;
        if let Some(token) = token {
            token.redeem(&self.store, &self.fence()?, &asker, now).await?;
        }
        let certified = signer.certify(&LeafRequest::from(approved), &key)?;
        let response = IssueResponse {
            chain: certified.chain,
            trust_bundle: self.bundle()?,
            not_after_unix_ms: unix_ms(certified.not_after),
        };
        Ok(((grant.id, certified.serial.to_string(), certified.not_after), response))
    }

    /// PEM of the roots that are trusted now.
    pub fn bundle(&self) -> Result<String, Refusal> {
        self.roots.load().as_ref().map(|roots| roots.bundle()).ok_or(Refusal::NoSigner)
    }

    /// A token by which somebody may have the first certificate of an identity, and its end.
    pub(crate) async fn create_token(
        &self,
        by: &SpiffeId,
        grant: Grant,
        life: Option<Duration>,
    ) -> Result<(String, SystemTime), Refusal> {
        let life = life.unwrap_or(TOKEN_LIFE);
        if life.is_zero() || life > LONGEST_TOKEN_LIFE {
            return Err(Refusal::Argument("a token lives for 1s to 24h".into()));
        }
        if grant.id.trust_domain != self.workload.id().trust_domain {
            return Err(Refusal::Argument(format!("'{}' is of another trust domain", grant.id)));
        }
        if grant.names.len() > Names::MOST {
            return Err(Refusal::Argument("a leaf carries at most 64 names".into()));
        }
        let now = SystemTime::now();
        let order = Order { grant, until: now + life, by: by.clone() };
        let token = tokens::create(&self.store, &self.fence()?, &order, now).await?;
        let Order { grant, until, by } = order;
        let dns = grant.names.dns.iter().map(ToString::to_string);
        let names = dns.chain(grant.names.addresses.iter().map(ToString::to_string)).collect();
        tracing::info!(id = %grant.id, %by, "token created");
        let (id, by) = (grant.id.to_string(), by.to_string());
        self.audit.record(Event::TokenCreated { id, names, until: until.into(), by });
        Ok((token, until))
    }

    /// Trusts another root of the folder from now on, to sign under it when nodes had the time to hear of it.
    pub(crate) async fn announce(&self, by: &SpiffeId, digits: &str) -> Result<(), Refusal> {
        let fence = self.fence()?;
        self.read_folder().await;
        self.read_store().await?;
        let roots = self.roots.load_full().ok_or(Refusal::NoSigner)?;
        let signers = self.signers.load_full();
        let next = signers.find(digits, roots.rotation().signs).ok_or_else(|| {
            Refusal::Argument("the folder holds no such root, or several: name one by its first digits".into())
        })?;
        let roots = roots.announce(next.root_id(), next.trust_bundle(), SystemTime::now())?;
        self.agree(&fence, roots, Some(by)).await.map_err(Into::into)
    }

    /// Trusts the announced root no more.
    pub(crate) async fn withdraw(&self, by: &SpiffeId) -> Result<(), Refusal> {
        let fence = self.fence()?;
        self.read_store().await?;
        let roots = self.roots.load_full().ok_or(Refusal::NoSigner)?;
        self.agree(&fence, roots.withdraw()?, Some(by)).await.map_err(Into::into)
    }

    /// Counts a refusal; one that is a decision against somebody goes to the audit log.
    pub(crate) fn refused(&self, caller: Caller<'_>, action: &'static str, refusal: &Refusal) {
        self.metrics.refused(refusal.reason());
        tracing::debug!(action, error = %Chain(refusal), "refused");
        if refusal.is_denial() {
            self.audit.denied(|| Denial {
                id: caller.peer.map(|peer| peer.id.to_string()),
                action: Some(action),
                code: "certificate-denied".into(),
                reason: Some(refusal.reason()),
                address: caller.address,
                ..Denial::default()
            });
        }
    }

    /// A peer whose certificate is good now.
    pub(crate) fn trusted<'a>(&self, peer: &'a Peer, now: SystemTime) -> Result<&'a Peer, Refusal> {
        self.workload.still_trusted(peer, now).map_err(Refusal::Untrusted)?;
        Ok(peer)
    }

    pub(crate) fn operator<'a>(&self, caller: Caller<'a>) -> Result<&'a SpiffeId, Refusal> {
        let peer = self.trusted(caller.peer.ok_or(Refusal::NoProof)?, SystemTime::now())?;
        match &peer.id.role {
            Role::Operator { name } if self.operators.include(name) => Ok(&peer.id),
            _ => Err(Refusal::NotAnOperator),
        }
    }

    fn pace(&self) -> Pace {
        Pace { notice: self.settings.notice, longest_life: self.settings.life }
    }

    fn fence(&self) -> Result<Fence, Refusal> {
        self.leading.borrow().clone().ok_or(Refusal::NotLeading)
    }

    fn signer(&self) -> Result<Arc<Signer>, Refusal> {
        let roots = self.roots.load();
        let signs = roots.as_ref().ok_or(Refusal::NoSigner)?.rotation().signs;
        self.signers.load().get(signs).cloned().ok_or(Refusal::NoSigner)
    }

    async fn read_folder(&self) {
        let signers = read_folder(&self.settings, &self.workload).await;
        let before = self.signers.load();
        if signers.faults != before.faults {
            tell(&signers);
        }
        self.signers.store(Arc::new(signers.or_before(&before)));
    }

    async fn read_store(&self) -> Result<(), StoreError> {
        match self.store.get(roots::KEY).await? {
            Some(value) => {
                let roots = Roots::read(&value.bytes, value.revision);
                self.take(roots.ok_or_else(|| StoreError::Corrupt { key: roots::KEY.into() })?);
            }
            None => {
                // Nothing was agreed on yet: it begins with what this node knew, or with the folder itself.
                let signers = self.signers.load();
                let known = self.roots.load_full().map(|roots| roots.unwritten());
                let folder = || signers.first().map(|first| Roots::first(first.root_id(), first.trust_bundle()));
                self.roots.store(known.or_else(folder).map(Arc::new));
            }
        }
        Ok(())
    }

    /// What the leader does of itself.
    async fn lead(&self) -> Result<(), StoreError> {
        let Some(fence) = self.leading.borrow().clone() else { return Ok(()) };
        let Some(roots) = self.roots.load_full() else { return Ok(()) };
        if roots.revision.is_none() {
            return self.agree(&fence, Roots::clone(&roots), None).await;
        }
        let Some(next) = roots.advance(SystemTime::now(), &self.pace()) else { return Ok(()) };
        if self.signers.load().get(next.rotation().signs).is_none() {
            tracing::warn!(root = %next.rotation().signs, "the rotation waits: the key under the new root is not here");
            return Ok(());
        }
        self.agree(&fence, next, None).await
    }

    /// Writes what is agreed on from now on.
    async fn agree(&self, fence: &Fence, mut roots: Roots, by: Option<&SpiffeId>) -> Result<(), StoreError> {
        let key = roots::KEY.to_owned();
        let condition =
            roots.revision.map_or_else(|| Condition::Absent(key.clone()), |at| Condition::At(key.clone(), at));
        let write = Write::Put(key, roots.encode());
        roots.revision = Some(self.store.commit(fence, &[condition], vec![write]).await?);
        let rotation = *roots.rotation();
        self.audit.record(Event::RootsChanged {
            stage: rotation.stage.name(),
            signs: rotation.signs.to_string(),
            other: rotation.other().map(|other| other.to_string()),
            by: by.map(ToString::to_string),
        });
        self.take(roots);
        Ok(())
    }

    fn take(&self, roots: Roots) {
        let before = self.roots.load();
        if before.as_ref().is_none_or(|before| before.rotation() != roots.rotation()) {
            let rotation = roots.rotation();
            tracing::info!(stage = rotation.stage.name(), signs = %rotation.signs, "roots");
        }
        // A read that began before a commit of ours must not undo it.
        if before.as_ref().is_none_or(|before| before.revision <= roots.revision) {
            self.roots.store(Some(Arc::new(roots)));
        }
        self.show();
    }

    fn show(&self) {
        let roots = self.roots.load();
        let stage: Option<&Stage> = roots.as_ref().map(|roots| &roots.rotation().stage);
        self.metrics.show(stage, self.signer().ok().map(|signer| signer.not_after()));
    }
}

/// What a peer may have again: what its certificate says.
fn granted(peer: &Peer) -> Result<Grant, Refusal> {
    let leaf = peer.chain.first().ok_or(Refusal::NoProof)?;
    let names = names_of(leaf).ok_or(Denied::OtherNames)?;
    Ok(Grant { id: peer.id.clone(), names })
}

async fn read_folder(settings: &AuthoritySettings, workload: &Workload) -> Signers {
    let (folder, trust_domain) = (settings.folder.clone(), workload.id().trust_domain);
    let read = tokio::task::spawn_blocking(move || Signers::read(&folder, &trust_domain));
    // Fails only if the closure panicked, and it does not.
    read.await.unwrap_or_default()
}

fn tell(signers: &Signers) {
    for fault in &signers.faults {
        tracing::error!(fault, "an authority in the folder is left out");
    }
}

fn unix_ms(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
