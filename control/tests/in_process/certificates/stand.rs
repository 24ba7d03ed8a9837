//! A trust domain with one control node, and nodes that get their certificates from it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use spillway_control::authority::{Authority, AuthoritySettings, Newcomers};
use spillway_control::intent::Operators;
use spillway_control::store::{Fence, Leadership, Store, StoreSettings};
use spillway_core::identity::{ExpectedPeer, SpiffeId, TrustDomain};
use spillway_core::units::Name;
use spillway_proto::control::authority_client::AuthorityClient;
use spillway_runtime::audit::Audit;
use spillway_runtime::authority::{Authority as Signer, LeafRequest};
use spillway_runtime::dial::dial;
use spillway_runtime::drain::Drain;
use spillway_runtime::renewal::{BootstrapSettings, Renewal, RenewalSettings};
use spillway_runtime::settings::parse;
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::{Arrival, Arrivals, Handshakes, IdentitySettings, Offer, Workload};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::service::Routes;
use tonic::transport::Channel;

pub const HOUR: Duration = Duration::from_secs(3_600);
pub const SECOND: Duration = Duration::from_secs(1);
pub const GATEWAY: &str = "spiffe://spillway.test/region/eu/gateway/gw-0";
pub const SIDECAR: &str = "spiffe://spillway.test/region/eu/sidecar/scorers/pod-0";
pub const OPERATOR: &str = "spiffe://spillway.test/operator/ada";
const CONTROL: &str = "spiffe://spillway.test/region/eu/control/c-0";

pub fn id(uri: &str) -> SpiffeId {
    SpiffeId::parse(uri).unwrap()
}

pub struct Stand {
    pub folder: TempDir,
    pub signer: Signer,
    pub authority: Arc<Authority>,
    pub workload: Arc<Workload>,
    pub metrics: Metrics,
    /// The control node's port, and the one for newcomers.
    pub port: Port,
    pub newcomers: SocketAddr,
    pub drain: Drain,
    audit: Audit,
    audit_file: PathBuf,
    settings: AuthoritySettings,
    store: Store,
    pub leading: watch::Sender<Option<Fence>>,
    _leadership: Leadership,
}

impl Stand {
    pub async fn start(life: Duration, notice: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        let signer = Signer::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        signer.save(at("authority")).unwrap();
        // The root's key is elsewhere.
        std::fs::remove_file(at("authority/root.key")).unwrap();
        let identity = issue(&signer, CONTROL, life.max(4 * SECOND), &at("c-0"));
        let workload = Workload::load(&identity).unwrap();
        let (metrics, drain) = (Metrics::new("control"), Drain::new(SECOND));
        let store = Store::open(&StoreSettings::Sqlite(at("control.db"))).await.unwrap();
        let leadership = store.campaign(&Name::parse("c-0").unwrap(), "127.0.0.1:1").await.unwrap();
        let (leading_now, leading) = watch::channel(Some(leadership.fence.clone()));
        let settings = AuthoritySettings { folder: at("authority"), life, notice, bootstrap: None };
        let audit_settings = parse(&at("audit.log").display().to_string()).unwrap();
        let audit = Audit::start(Some(&audit_settings), "control", &workload.id(), &metrics).unwrap();
        let opened = Authority::open(
            settings.clone(),
            Operators::Any,
            workload.clone(),
            store.clone(),
            leading,
            audit.clone(),
            &metrics,
        );
        let authority = opened.await.unwrap();
        tokio::spawn(authority.clone().watch(drain.clone()));
        tokio::spawn(workload.clone().watch(audit.clone(), drain.clone()));
        let port = Port::open(&authority, &workload, "127.0.0.1:0".parse().unwrap()).await;
        let newcomers = Newcomers::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let newcomers_at = newcomers.address().unwrap();
        tokio::spawn(newcomers.serve(authority.clone(), drain.clone()));
        let own = RenewalSettings { servers: vec![port.address.to_string()], bootstrap: None, every: SECOND / 4 };
        let renewal = Renewal::new(identity, own, workload.clone(), &Metrics::new("own"));
        tokio::spawn(renewal.run(drain.clone()));
        Self {
            audit,
            audit_file: at("audit.log"),
            folder,
            signer,
            authority,
            workload,
            metrics,
            port,
            newcomers: newcomers_at,
            drain,
            settings,
            store,
            leading: leading_now,
            _leadership: leadership,
        }
    }

    /// A node that starts anew with the same folder, and with the store or while it does not answer.
    pub async fn open_again(&self, store_answers: bool) -> Arc<Authority> {
        let (settings, mut store) = (self.settings.clone(), self.store.clone());
        if !store_answers {
            let IdentitySettings { certificate, key, trust_bundle } = self.issued(GATEWAY);
            let [certificate, key, bundle] = [certificate, key, trust_bundle].map(|path| path.display().to_string());
            let identity = format!("{{certificate: '{certificate}', key: '{key}', trustBundle: '{bundle}'}}");
            let away = format!("etcd: {{endpoints: ['https://127.0.0.1:1'], identity: {identity}}}");
            store = Store::open(&parse(&away).unwrap()).await.unwrap();
        }
        let (_, leading) = watch::channel(None);
        let metrics = Metrics::new("control");
        let opened =
            Authority::open(settings, Operators::Any, self.workload.clone(), store, leading, Audit::off(), &metrics);
        opened.await.unwrap()
    }

    /// Files of an identity that the folder's authority made, for an hour.
    pub fn issued(&self, uri: &str) -> IdentitySettings {
        issue(&self.signer, uri, HOUR, &self.folder.path().join(format!("by-hand-{}", uri.rsplit('/').next().unwrap())))
    }

    /// A client of the control node's port with these files.
    pub async fn client(&self, identity: &IdentitySettings) -> AuthorityClient<Channel> {
        let workload = Workload::load(identity).unwrap();
        let control = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
        AuthorityClient::new(dial(&workload, control, &self.port.address.to_string(), 5 * SECOND).await.unwrap())
    }

    pub fn renewal(&self, token: Option<PathBuf>) -> RenewalSettings {
        let bootstrap = token.map(|token| BootstrapSettings { servers: vec![self.newcomers.to_string()], token });
        RenewalSettings { servers: vec![self.port.address.to_string()], bootstrap, every: SECOND / 4 }
    }

    /// A node whose first leaf lives as long as all that follow.
    pub fn node(&self, uri: &str, life: Duration) -> Node {
        let identity = issue(&self.signer, uri, life, &self.folder.path().join(uri.rsplit('/').next().unwrap()));
        Node::start(identity, self.renewal(None))
    }

    pub fn counted(&self, line: &str) -> bool {
        self.metrics.encode().unwrap().contains(line)
    }

    /// The audit log has so many lines that hold all of these.
    pub async fn audited(&self, parts: &[&str]) -> usize {
        self.audit.flush(10 * SECOND);
        let log = std::fs::read_to_string(&self.audit_file).unwrap();
        log.lines().filter(|line| parts.iter().all(|part| line.contains(part))).count()
    }
}

pub fn issue(signer: &Signer, uri: &str, life: Duration, folder: &std::path::Path) -> IdentitySettings {
    let leaf = signer.issue(&LeafRequest::new(id(uri), life)).unwrap();
    leaf.save_workload(folder, signer.trust_bundle()).unwrap()
}

/// A process, as far as its certificate goes.
pub struct Node {
    pub workload: Arc<Workload>,
    pub identity: IdentitySettings,
    pub metrics: Metrics,
    pub drain: Drain,
}

impl Node {
    pub fn start(identity: IdentitySettings, renewal: RenewalSettings) -> Self {
        let (workload, metrics, drain) = (Workload::load(&identity).unwrap(), Metrics::new("node"), Drain::new(SECOND));
        workload.register(&metrics);
        let renewal = Renewal::new(identity.clone(), renewal, workload.clone(), &metrics);
        tokio::spawn(renewal.run(drain.clone()));
        tokio::spawn(workload.clone().watch(Audit::off(), drain.clone()));
        Self { workload, identity, metrics, drain }
    }

    /// The number behind a counter's line, 0 if it is not there.
    pub fn count(&self, counter: &str) -> u64 {
        let text = self.metrics.encode().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(counter)?.strip_prefix(' '));
        line.map_or(0, |count| count.parse().unwrap())
    }

    pub fn renewed(&self) -> u64 {
        self.count("spillway_identity_renewals_total{outcome=\"renewed\"}")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.drain.stop();
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.drain.stop();
    }
}

/// A control node's port: mTLS, and the peer beside each request.
pub struct Port {
    pub address: SocketAddr,
    drain: Drain,
}

impl Port {
    pub async fn open(authority: &Arc<Authority>, workload: &Arc<Workload>, address: SocketAddr) -> Self {
        let routes = Routes::new(authority.service()).prepare();
        Self::serve(workload, address, move |request| {
            let mut routes = routes.clone();
            async move { routes.call(request).await }
        })
        .await
    }

    /// A server that says `ok` to whom it trusts at that moment.
    pub async fn of_server(workload: &Arc<Workload>, served: &Arc<AtomicU64>) -> Self {
        let (judge, served) = (workload.clone(), served.clone());
        Self::serve(workload, "127.0.0.1:0".parse().unwrap(), move |request| {
            let peer = request.extensions().get::<Arc<spillway_runtime::tls::Peer>>().unwrap().clone();
            let trusted = judge.still_trusted(&peer, SystemTime::now()).is_ok();
            served.fetch_add(u64::from(trusted), Ordering::Relaxed);
            let status = if trusted { StatusCode::OK } else { StatusCode::FORBIDDEN };
            std::future::ready(Ok(Response::builder().status(status).body(Body::empty()).unwrap()))
        })
        .await
    }

    async fn serve<F, A>(workload: &Arc<Workload>, address: SocketAddr, answer: A) -> Self
    where
        F: Future<Output = Result<Response<Body>, Infallible>> + Send + 'static,
        A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    {
        let drain = Drain::new(SECOND);
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let arrivals = Arrivals::new(listener, Handshakes::default(), drain.clone());
        let (workload, ended) = (workload.clone(), drain.clone());
        tokio::spawn(arrivals.serve(
            move |arrival| {
                tokio::spawn(connection(arrival, workload.clone(), answer.clone(), ended.clone()));
            },
            |reason| panic!("{reason}"),
        ));
        Self { address, drain }
    }

    /// Closes the port and all of its connections.
    pub async fn close(&self) {
        self.drain.stop();
        while tokio::net::TcpStream::connect(self.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn connection<F, A>(arrival: Arrival, workload: Arc<Workload>, answer: A, drain: Drain)
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Send + 'static,
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
{
    let address = arrival.address;
    let Ok((accepted, _work)) = arrival.greet(&workload, Offer::H2).await else { return };
    let peer = accepted.peer;
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        request.extensions_mut().insert(address);
        answer(request)
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(accepted.stream), service);
    tokio::select! {
        _ = connection => {}
        () = drain.stopped() => {}
    }
}

/// Waits for a condition.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + 30 * SECOND;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not in 30 seconds: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
