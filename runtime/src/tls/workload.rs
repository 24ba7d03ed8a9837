//! Our own identity: certificate, key and trust bundle as one value that is replaced while serving.
//!
//! The rule: what cannot be used is refused and the last good value stays. Our id never changes while
//! we run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spillway_core::authority::renewal::Life;
use spillway_core::identity::{ExpectedPeer, Revoked, Serial, SpiffeId};

use super::accept::Offer;
use super::peer::{Leaf, Peer, PeerError, Side};
use super::provider::provider;
use super::tickets::{TICKETS, Tickets};
use super::trust::{Clients, ExpectedServer, Trust};
use crate::audit::{Audit, Event, Hash, clipped};
use crate::drain::Drain;
use crate::file::Watched;
use crate::snapshot::Subscription;
use crate::telemetry::{Chain, Metrics};

const POLL: Duration = Duration::from_millis(500);
/// Certificate and key are two files: between their renames they do not match. A refusal is final
/// after so many more looks.
const SECOND_LOOKS: u32 = 3;
const SECOND_LOOK_AFTER: Duration = Duration::from_millis(100);
/// No PEM file of ours is near this.
const MAX_FILE: u64 = 1 << 20;

/// Where a workload's identity lies: three PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentitySettings {
    /// The leaf, then the intermediates.
    pub certificate: PathBuf,
    /// The leaf's key, PKCS#8.
    pub key: PathBuf,
    /// The roots of our trust domain.
    pub trust_bundle: PathBuf,
}

/// The operator's fault: the files do not make an identity. A retry helps once they changed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("a file of the identity cannot be read")]
    Unreadable(#[from] std::io::Error),
    #[error("the certificate cannot be used")]
    Certificate(#[from] PeerError),
    #[error("the certificate file is no PEM with at least one certificate")]
    NoCertificate,
    #[error("the key file is no PEM with a private key that can be used")]
    Key,
    #[error("certificate and key do not belong together")]
    Mismatch,
    #[error("the trust bundle cannot be used: {0}")]
    Bundle(String),
    #[error("the certificate names '{found}', but this process is '{running}'; start it anew to change that")]
    OtherId { found: Box<SpiffeId>, running: Box<SpiffeId> },
}

/// A process's own identity. Shared as an `Arc`; [`Workload::watch`] keeps it fresh.
#[derive(Debug)]
pub struct Workload {
    id: SpiffeId,
    current: ArcSwap<Identity>,
    files: Mutex<Files>,
    reloads: Family<Outcome, Counter>,
    expiry: Gauge,
    full_handshakes: Counter,
    resumed_handshakes: Counter,
}

#[derive(Debug)]
struct Files {
    watched: Watched,
    /// When the leaf that was refused last becomes valid, if it was refused for being early: the only
    /// refusal that passes without a change of the files.
    usable_from: Option<SystemTime>,
}

/// What is replaced as a whole.
#[derive(Debug)]
struct Identity {
    generation: u64,
    key: Arc<CertifiedKey>,
    trust: Arc<Trust>,
    origin: Origin,
    tickets: Tickets,
    server: Arc<ServerConfig>,
    h2_server: Arc<ServerConfig>,
}

/// What the audit log says of the files that an identity is made of.
#[derive(Clone, Debug)]
struct Origin {
    serial: Serial,
    life: Life,
    trust_bundle: Hash,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Workload {
    /// Reads the files; our own id is the leaf's. Blocks on the file system.
    pub fn load(settings: &IdentitySettings) -> Result<Arc<Self>, IdentityError> {
        let IdentitySettings { certificate, key, trust_bundle } = settings.clone();
        let mut watched = Watched::new(vec![certificate, key, trust_bundle], MAX_FILE);
        let contents = watched.changed()?.unwrap_or_default();
        let (identity, leaf) = Identity::read(1, &contents, Arc::default())?;
        leaf.check_time(SystemTime::now())?;
        let workload = Self {
            id: leaf.id.clone(),
            current: ArcSwap::from_pointee(identity),
            files: Mutex::new(Files { watched, usable_from: None }),
            reloads: Family::default(),
            expiry: Gauge::default(),
            full_handshakes: Counter::default(),
            resumed_handshakes: Counter::default(),
        };
        workload.expiry.set(seconds(leaf.not_after));
        Ok(Arc::new(workload))
    }

    /// Shows `spillway_identity_reloads_total`, `spillway_identity_expiry_seconds` (Unix time), and how clients proved who
    /// they are: `spillway_identity_handshakes_full_total`, `spillway_identity_handshakes_resumed_total`.
    pub fn register(&self, metrics: &Metrics) {
        let help = "Changes of our certificate, key or trust bundle, by what became of them";
        metrics.register("identity_reloads", help, self.reloads.clone());
        metrics.register("identity_expiry_seconds", "When our certificate expires, Unix time", self.expiry.clone());
        let help = "Connections of clients that proved their key";
        metrics.register("identity_handshakes_full", help, self.full_handshakes.clone());
        let help = "Connections of clients that came back with a ticket";
        metrics.register("identity_handshakes_resumed", help, self.resumed_handshakes.clone());
    }

    pub fn id(&self) -> SpiffeId {
        self.id.clone()
    }

    /// Counts from 1 and rises with each accepted change.
    pub fn generation(&self) -> u64 {
        self.current.load().generation
    }

    /// When our certificate is valid.
    pub fn life(&self) -> Life {
        self.current.load().origin.life
    }

    /// Whether whoever goes by this id is refused.
    pub fn revokes(&self, id: &SpiffeId) -> bool {
        self.current.load().trust.revoked().ids.contains(id)
    }

    pub(super) fn key(&self) -> Arc<CertifiedKey> {
        self.current.load().key.clone()
    }

    /// For a server that speaks h2 and HTTP/1.1 and gives no tickets. Ask for it per connection: it is replaced on a reload.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.current.load().server.clone()
    }

    /// For a client of the expected server alone, over h2.
    pub fn client_config(&self, expected: impl Into<ExpectedPeer>) -> Arc<ClientConfig> {
        self.client(expected.into()).0
    }

    /// The client config and the generation that it comes from.
    pub(crate) fn client(&self, expected: ExpectedPeer) -> (Arc<ClientConfig>, u64) {
        let identity = self.current.load();
        let verifier = ExpectedServer { trust: identity.trust.clone(), expected };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider speaks TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.key.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session asks the verifier nothing. The connections that we open are few and stay for long, so that there is
        // nothing to gain from judging servers elsewhere.
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        (Arc::new(config), identity.generation)
    }

    /// The key of our certificate of now.
    pub(crate) fn signing_key(&self) -> Arc<dyn SigningKey> {
        self.current.load().key.key.clone()
    }

    /// For one handshake of a server, with tickets. Whoever comes by one has not been verified: ask [`Self::peer`].
    pub(super) fn handshake_config(&self, offer: Offer) -> Arc<ServerConfig> {
        let identity = self.current.load();
        let shared = match offer {
            Offer::H2 => &identity.h2_server,
            Offer::H2AndHttp1 => &identity.server,
        };
        // A copy, of 0.1 µs, is how rustls lets one handshake's tickets know of each other.
        let mut config = ServerConfig::clone(shared);
        config.ticketer = identity.tickets.for_handshake();
        config.send_tls13_tickets = TICKETS;
        Arc::new(config)
    }

    pub(super) fn count_handshake(&self, resumed: bool) {
        let counter = if resumed { &self.resumed_handshakes } else { &self.full_handshakes };
        counter.inc();
    }

    /// The client that presented this chain, leaf first. Verifies the chain against the bundle of now.
    pub fn peer(&self, chain: &[CertificateDer<'_>]) -> Result<Peer, PeerError> {
        let identity = self.current.load();
        let leaf = identity.trust.verify(chain, Side::Client, SystemTime::now())?;
        Ok(peer(leaf, chain, Side::Client, identity.generation))
    }

    /// Whether a peer of an open connection may go on: its certificate has not expired, and its chain
    /// leads to a root of the bundle of now. Cheap while our generation stays the same; a new one is
    /// verified against once per peer.
    pub fn still_trusted(&self, peer: &Peer, now: SystemTime) -> Result<(), PeerError> {
        if now > peer.not_after {
            return Err(PeerError::Expired);
        }
        let identity = self.current.load();
        if peer.verified_in.load(Ordering::Relaxed) == identity.generation {
            return Ok(());
        }
        identity.trust.verify(&peer.chain, peer.side, now)?;
        peer.verified_in.store(identity.generation, Ordering::Relaxed);
        Ok(())
    }

    /// Refuses these from now on, on open connections too. Whether that is a change.
    pub fn revoke(&self, revoked: &Arc<Revoked>) -> bool {
        // Held so that no reload comes between.
        let _files = self.files.lock();
        let current = self.current.load();
        if current.trust.revoked() == revoked {
            return false;
        }
        let trust = (*current.trust).clone().revoking(revoked.clone());
        let identity = Identity::new(current.generation + 1, current.key.clone(), trust, current.origin.clone());
        self.current.store(Arc::new(identity));
        true
    }

    /// Follows the revocations of the Snapshot until stopped.
    pub async fn follow(self: Arc<Self>, snapshots: Arc<Subscription>, audit: Audit, drain: Drain) {
        let mut changed = snapshots.changed();
        loop {
            let revoked = snapshots.load().revoked.clone();
            if self.revoke(&revoked) {
                let (generation, serials, ids) = (self.generation(), revoked.serials.len(), revoked.ids.len());
                tracing::info!(generation, serials, ids, "revocations changed");
                audit.record(Event::RevocationsChanged { generation, serials, ids });
            }
            tokio::select! {
                Ok(()) = changed.changed() => {}
                () = drain.stopped() => return,
            }
        }
    }

    /// Follows the files until stopped.
    pub async fn watch(self: Arc<Self>, audit: Audit, drain: Drain) {
        let mut refused: Option<String> = None;
        audit.record(self.certificate());
        loop {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = drain.stopped() => return,
            }
            match self.look().await {
                Ok(false) => {}
                Ok(true) => {
                    refused = None;
                    tracing::info!(generation = self.generation(), "identity reloaded");
                    audit.record(self.certificate());
                }
                Err(error) => {
                    let problem = Chain(&error).to_string();
                    // Files that stay unreadable are told once, not at each look.
                    if matches!(error, IdentityError::Unreadable(_)) && refused.as_ref() == Some(&problem) {
                        continue;
                    }
                    self.reloads.get_or_create(&Outcome { outcome: "refused" }).inc();
                    tracing::error!(problem, "identity refused, the last good one stays");
                    audit.record(Event::CertificateRefused { problem: clipped(&problem) });
                    refused = Some(problem);
                }
            }
        }
    }

    fn certificate(&self) -> Event {
        let identity = self.current.load();
        let Origin { serial, life, trust_bundle } = &identity.origin;
        Event::CertificateChanged {
            generation: identity.generation,
            serial: serial.to_string(),
            not_after: life.not_after.into(),
            trust_bundle_sha256: *trust_bundle,
        }
    }

    /// [`Self::reload`], with second looks before a refusal is believed.
    async fn look(self: &Arc<Self>) -> Result<bool, IdentityError> {
        let mut outcome = self.clone().reload_aside().await;
        for _ in 0..SECOND_LOOKS {
            if outcome.is_ok() {
                break;
            }
            tokio::time::sleep(SECOND_LOOK_AFTER).await;
            match self.clone().reload_aside().await {
                Ok(false) => {}
                changed => outcome = changed,
            }
        }
        outcome
    }

    async fn reload_aside(self: Arc<Self>) -> Result<bool, IdentityError> {
        let reload = tokio::task::spawn_blocking(move || self.reload());
        reload.await.unwrap_or_else(|lost| Err(IdentityError::Unreadable(std::io::Error::other(lost))))
    }

    /// Reads the files again if they changed, or if the leaf in them was refused as early and is not early
    /// any more, and says whether a new identity is in use. Blocks on the file system.
    pub fn reload(&self) -> Result<bool, IdentityError> {
        self.reload_at(SystemTime::now())
    }

    pub(super) fn reload_at(&self, now: SystemTime) -> Result<bool, IdentityError> {
        let mut files = self.files.lock();
        if files.usable_from.is_some_and(|from| from <= now) {
            files.watched.forget();
        }
        let Some(contents) = files.watched.changed()? else { return Ok(false) };
        files.usable_from = None;
        let current = self.current.load();
        let revoked = current.trust.revoked().clone();
        let (identity, leaf) = Identity::read(current.generation + 1, &contents, revoked)?;
        if leaf.id != self.id {
            return Err(IdentityError::OtherId { found: Box::new(leaf.id), running: Box::new(self.id.clone()) });
        }
        // An old leaf beside a new bundle is taken even when it has expired: a root that was removed
        // must not stay trusted because of it.
        if identity.key.cert != current.key.cert {
            leaf.check_time(now).inspect_err(|error| {
                // The issuer's clock is ahead of ours: refused and said once, and taken when its time comes.
                files.usable_from = (*error == PeerError::NotYetValid).then_some(leaf.not_before);
            })?;
        }
        if let Err(error) = identity.trust.verify(&identity.key.cert, Side::Server, now) {
            tracing::warn!(error = %Chain(&error), "our own certificate does not lead to our own trust bundle");
        }
        self.current.store(Arc::new(identity));
        self.expiry.set(seconds(leaf.not_after));
        self.reloads.get_or_create(&Outcome { outcome: "accepted" }).inc();
        Ok(true)
    }
}

/// What three PEM texts (certificate, key, trust bundle) make before they are anybody's files: usable now, and trusted by
/// who has the same bundle.
pub fn examine(contents: &[Vec<u8>; 3], now: SystemTime) -> Result<(SpiffeId, Life), IdentityError> {
    let (identity, leaf) = Identity::read(0, contents, Arc::default())?;
    leaf.check_time(now)?;
    for side in [Side::Client, Side::Server] {
        identity.trust.verify(&identity.key.cert, side, now)?;
    }
    Ok((leaf.id, identity.origin.life))
}

impl Identity {
    fn read(generation: u64, contents: &[Vec<u8>], revoked: Arc<Revoked>) -> Result<(Self, Leaf), IdentityError> {
        let [certificate, key, bundle] = contents else { return Err(IdentityError::NoCertificate) };
        let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|_| IdentityError::NoCertificate)?;
        let leaf = Leaf::read(chain.first().ok_or(IdentityError::NoCertificate)?)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| IdentityError::Key)?;
        let key = provider().key_provider.load_private_key(key).map_err(|_| IdentityError::Key)?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|_| IdentityError::Mismatch)?;
        let key = Arc::new(key);
        let trust = Trust::read(leaf.id.trust_domain.clone(), bundle)?.revoking(revoked);
        let life = Life { not_before: leaf.not_before, not_after: leaf.not_after };
        let origin = Origin { serial: leaf.serial.clone(), life, trust_bundle: Hash::of(bundle) };
        Ok((Self::new(generation, key, trust, origin), leaf))
    }

    fn new(generation: u64, key: Arc<CertifiedKey>, trust: Trust, origin: Origin) -> Self {
        let trust = Arc::new(trust);
        let server = server_config(&key, &trust, &[b"h2", b"http/1.1"]);
        let h2_server = server_config(&key, &trust, &[b"h2"]);
        let tickets = Tickets::new(origin.life.not_after);
        Self { generation, key, trust, origin, tickets, server, h2_server }
    }
}

fn server_config(key: &Arc<CertifiedKey>, trust: &Arc<Trust>, protocols: &[&[u8]]) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_client_cert_verifier(Arc::new(Clients(trust.clone())))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key.clone())));
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    // Our order of cipher suites, for the reason that the provider says.
    config.ignore_client_order = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Arc::new(config)
}

fn peer(leaf: Leaf, chain: &[CertificateDer<'_>], side: Side, generation: u64) -> Peer {
    Peer {
        id: leaf.id,
        serial: leaf.serial,
        not_after: leaf.not_after,
        chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
        side,
        verified_in: AtomicU64::new(generation),
    }
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
