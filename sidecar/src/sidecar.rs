//! Load, bind, run: one sidecar from its settings to its end.
//!
//! The rule: nothing listens before settings, identity, snapshot and stores are accepted; nothing runs
//! after the drain is over. Readiness, health and metrics follow what the models say.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::Role;
use spillway_core::inference::Limits;
use spillway_core::units::Name;
use spillway_proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use spillway_runtime::access_log::AccessLog;
use spillway_runtime::admin::{Admin, Pages, Readiness};
use spillway_runtime::audit::Audit;
use spillway_runtime::drain::Drain;
use spillway_runtime::link::{Feed, Source};
use spillway_runtime::renewal::{Renewal, RenewalError, prepare};
use spillway_runtime::snapshot::{Refused, Subscription};
use spillway_runtime::telemetry::{Metrics, Traces, TracesError};
use spillway_runtime::tls::{IdentityError, Workload};
use spillway_runtime::upstream::UpstreamMetrics;
use tokio::task::JoinSet;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};

use crate::fallback::Fallbacks;
use crate::feature_service::FeatureService;
use crate::features::{Features, InvalidSettings};
use crate::inference::Inference;
use crate::load::Load;
use crate::metrics::{ByModel, SidecarMetrics};
use crate::model::onnx::Compute;
use crate::model::served::{Models, Part};
use crate::model::start::Backends;
use crate::model::triton::{self, InvalidEndpoint};
use crate::record::Recorder;
use crate::server::{Guard, Server};
use crate::service::Service;
use crate::settings::SidecarSettings;

/// How long feature stores that do not answer may keep a sidecar from starting without them.
const FIRST_ATTEMPT: Duration = Duration::from_secs(5);
/// How long the last lines and spans may take to be written.
const FLUSH: Duration = Duration::from_secs(2);

/// Why a sidecar does not start. The operator's fault, except for ports that somebody else holds.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("identity")]
    Identity(#[from] IdentityError),
    #[error("identity.renew")]
    Renewal(#[from] RenewalError),
    #[error("the certificate is that of '{found}'; the settings say region {region}, pool {pool}, pod {pod}")]
    NotOurs { found: String, region: Name, pool: Name, pod: Name },
    #[error("snapshot")]
    Snapshot(#[from] Refused),
    #[error("features")]
    Features(#[from] InvalidSettings),
    #[error("triton")]
    Triton(#[from] InvalidEndpoint),
    #[error("accessLog")]
    AccessLog(#[source] io::Error),
    #[error("audit")]
    Audit(#[source] io::Error),
    #[error("otlp")]
    Traces(#[from] TracesError),
    #[error("{setting}: cannot listen on {address}")]
    Bind { setting: &'static str, address: SocketAddr, source: io::Error },
}

/// Where a sidecar listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
}

/// A sidecar that has bound its ports and answers nothing yet.
pub struct Sidecar {
    addresses: Addresses,
    server: Server,
    admin: Admin,
    inference: Arc<Inference>,
    load: Arc<Load>,
    triton: Option<triton::Server>,
    workload: Arc<Workload>,
    snapshots: Arc<Subscription>,
    feed: Feed,
    audit: Audit,
    metrics: Metrics,
    settings: SidecarSettings,
    drain: Drain,
}

/// Loads, binds, prints the one line that says where it listens, and serves until drained.
/// Signals are the caller's: see [`Drain::on_signals`].
pub async fn run(settings: SidecarSettings, drain: Drain) -> Result<(), StartError> {
    let sidecar = Sidecar::bind(settings, drain).await?;
    let Addresses { grpc, admin } = sidecar.addresses();
    let line = serde_json::json!({"listening": {"grpc": grpc.to_string(), "admin": admin.to_string()}});
    // Nobody may be listening; that is no reason not to serve.
    let _ = writeln!(io::stdout(), "{line}");
    sidecar.serve().await;
    Ok(())
}

impl Sidecar {
    pub async fn bind(settings: SidecarSettings, drain: Drain) -> Result<Self, StartError> {
        let metrics = Metrics::new("sidecar");
        let own = SidecarMetrics::register(&metrics);
        prepare(&settings.common.identity, settings.common.renew.as_ref(), &role(&settings)).await?;
        let workload = Workload::load(&settings.common.identity)?;
        workload.register(&metrics);
        check_identity(&workload, &settings)?;
        let audit = Audit::start(settings.common.audit.as_ref(), "sidecar", &workload.id(), &metrics);
        let audit = audit.map_err(StartError::Audit)?;
        let source = Source::open(&settings.common, &metrics, &audit)?;
        let snapshots = Arc::clone(&source.snapshots);
        if !snapshots.is_empty() && !snapshots.load().pools.contains_key(&settings.pool) {
            tracing::warn!(pool = %settings.pool, "the snapshot has no such pool; no model is served");
        }
        workload.revoke(&snapshots.load().revoked);
        let features = match &settings.features {
            Some(features) => Some(Features::open(features, &settings.region, &mut metrics.registry())?),
            None => None,
        };
        if let Some(features) = &features {
            features.first_attempt(FIRST_ATTEMPT).await;
        }
        let log = match &settings.common.access_log {
            Some(log) => AccessLog::open(log, &metrics).map_err(StartError::AccessLog)?,
            None => AccessLog::off(),
        };
        let traces = match &settings.common.otlp {
            Some(otlp) => Traces::start(otlp, "sidecar", &metrics)?,
            None => Traces::off(),
        };
        let connects = UpstreamMetrics::register(&metrics);
        let triton = settings.triton.as_deref().map(|at| triton::Server::at(at, &connects)).transpose()?;
        let compute = Compute::for_this_machine(own.compute_waiting.clone());
        let load = Load::new(Arc::clone(&compute), &own);
        let models = |part, triton, compute| {
            let backends = Backends { models: settings.models.clone(), triton, compute };
            Models::new(settings.pool.clone(), part, backends, own.clone())
        };
        let fallbacks = models(Part::Fallbacks, None, Compute::for_fallbacks(own.fallback_waiting.clone()));
        let inference = Arc::new(Inference {
            region: settings.region.clone(),
            models: models(Part::Served, triton.clone(), compute),
            fallbacks: Fallbacks::new(fallbacks, own.clone()),
            features,
            metrics: own.clone(),
            recorder: Recorder { log, traces, metrics: own },
            limits: Limits::LARGEST_REQUEST,
        });
        let bound = |setting, address| move |source| StartError::Bind { setting, address, source };
        let server = Server::bind(settings.listen).await.map_err(bound("listen", settings.listen))?;
        let admin = settings.common.admin;
        let admin_port = Admin::bind(&admin).await.map_err(bound("admin", admin.listen))?;
        let addresses = Addresses {
            grpc: server.address().map_err(bound("listen", settings.listen))?,
            admin: admin_port.address().map_err(bound("admin", admin.listen))?,
        };
        let feed = source.feed(Arc::clone(&workload), None, &metrics);
        Ok(Self {
            addresses,
            server,
            admin: admin_port,
            inference,
            load,
            triton,
            workload,
            snapshots,
            feed,
            audit,
            metrics,
            settings,
            drain,
        })
    }

    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until the drain has begun and its work has ended or its time is over.
    pub async fn serve(self) {
        let Self {
            server,
            admin,
            inference,
            load,
            triton,
            workload,
            snapshots,
            feed,
            audit,
            metrics,
            settings,
            drain,
            ..
        } = self;
        let (models, fallbacks) = (Arc::clone(&inference.models), Arc::clone(inference.fallbacks.models()));
        let (reporter, health) = health_reporter();
        reporter.set_service_status("", ServingStatus::NotServing).await;
        let guard = Guard {
            workload: Arc::clone(&workload),
            load: Arc::clone(&load),
            metrics: inference.metrics.clone(),
            audit: audit.clone(),
            drain: drain.clone(),
        };
        let service = Service::new(Arc::clone(&inference), Arc::clone(&workload), audit.clone());
        let service = GrpcInferenceServiceServer::new(service)
            .max_decoding_message_size(Limits::LARGEST_REQUEST.message())
            .max_encoding_message_size(usize::MAX);
        let mut routes = Routes::new(service).add_service(health);
        if let Some(features) = &inference.features {
            let current = Arc::clone(&snapshots);
            let service = FeatureService::new(Arc::clone(features), workload.id(), Arc::new(move || current.current()));
            routes = routes.add_service(service.into_server());
        }
        let renewal = settings
            .common
            .renew
            .clone()
            .map(|renew| Renewal::new(settings.common.identity.clone(), renew, Arc::clone(&workload), &metrics));
        let pages = Pages {
            actions: Vec::new(),
            readiness: readiness(&models, &snapshots, &drain),
            config: config(&settings, &snapshots, &inference),
            metrics,
            drain: drain.clone(),
        };
        // Dropped at the end of this function, and with it every task of ours.
        let mut tasks = JoinSet::new();
        tasks.spawn(admin.serve(pages));
        tasks.spawn(Arc::clone(&workload).watch(audit.clone(), drain.clone()));
        if let Some(renewal) = renewal {
            tasks.spawn(renewal.run(drain.clone()));
        }
        tasks.spawn(Arc::clone(&workload).follow(Arc::clone(&snapshots), audit.clone(), drain.clone()));
        tasks.spawn(feed.follow(drain.clone()));
        tasks.spawn(report_health(Arc::clone(&inference), Arc::clone(&snapshots), reporter, drain.clone()));
        tasks.spawn(report_fallbacks(Arc::clone(&inference)));
        if let Some(triton) = triton {
            tasks.spawn(load.follow(triton));
        }
        let current = Arc::clone(&snapshots);
        tasks.spawn(async move { fallbacks.follow(&current).await });
        tasks.spawn(async move { models.follow(&snapshots).await });
        server.serve(routes, guard).await;
        drain.finish().await;
        if let Some(features) = &inference.features {
            features.end().await;
        }
        tasks.shutdown().await;
        let Recorder { log, traces, .. } = inference.recorder.clone();
        let flushed = tokio::task::spawn_blocking(move || {
            log.flush(FLUSH);
            audit.stop(FLUSH);
            traces.stop();
        });
        // Bounded by both of them; a panic there has nothing left to harm.
        let _ = flushed.await;
    }
}

fn role(settings: &SidecarSettings) -> Role {
    let SidecarSettings { region, pool, pod, .. } = settings;
    Role::Sidecar { region: region.clone(), pool: pool.clone(), pod: pod.clone() }
}

fn check_identity(workload: &Workload, settings: &SidecarSettings) -> Result<(), StartError> {
    let SidecarSettings { region, pool, pod, .. } = settings;
    let id = workload.id();
    if id.role == role(settings) {
        return Ok(());
    }
    let (region, pool, pod) = (region.clone(), pool.clone(), pod.clone());
    Err(StartError::NotOurs { found: id.to_string(), region, pool, pod })
}

fn readiness(models: &Arc<Models>, snapshots: &Arc<Subscription>, drain: &Drain) -> Readiness {
    let readiness = Readiness::default();
    let (models, snapshots, drain) = (Arc::clone(models), Arc::clone(snapshots), drain.clone());
    readiness.check("snapshot", move || {
        if snapshots.is_empty() { Err("the first push of the control plane is waited for".into()) } else { Ok(()) }
    });
    readiness.check("models", move || if models.ready() { Ok(()) } else { Err(models.waiting_for()) });
    readiness.check("serving", move || if drain.is_serving() { Ok(()) } else { Err("draining".into()) });
    readiness
}

type Config = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

fn config(settings: &SidecarSettings, snapshots: &Arc<Subscription>, inference: &Arc<Inference>) -> Config {
    let (settings, snapshots, inference) = (settings.clone(), Arc::clone(snapshots), Arc::clone(inference));
    let states = |models: &Models| -> serde_json::Map<String, serde_json::Value> {
        let state = |(name, ready): (Name, bool)| {
            let served = models.served(name.as_str());
            let versions =
                served.as_ref().map(|served| served.manifest.versions.iter().map(Name::as_str).collect::<Vec<_>>());
            let snapshot = served.as_ref().map(|served| served.snapshot.version);
            (name.to_string(), serde_json::json!({"ready": ready, "versions": versions, "snapshot": snapshot}))
        };
        models.states().into_iter().map(state).collect()
    };
    Arc::new(move || {
        serde_json::json!({
            "region": settings.region.to_string(),
            "pool": settings.pool.to_string(),
            "pod": settings.pod.to_string(),
            "snapshot": {"version": snapshots.load().version},
            "triton": settings.triton,
            "models": states(&inference.models),
            "fallbacks": states(inference.fallbacks.models()),
        })
    })
}

/// Tells gRPC health what the models say: the empty name for the pod, each model by its name.
async fn report_health(
    inference: Arc<Inference>,
    snapshots: Arc<Subscription>,
    mut reporter: HealthReporter,
    drain: Drain,
) {
    let status = |ready: bool| if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    let mut changes = inference.models.changes();
    let mut known: Vec<Name> = Vec::new();
    loop {
        changes.mark_unchanged();
        let serving = drain.is_serving();
        let states = inference.models.states();
        for gone in known.iter().filter(|name| !states.iter().any(|(state, _)| state == *name)) {
            reporter.clear_service_status(gone.as_str()).await;
            inference.metrics.model_ready.remove(&ByModel { model: gone.to_string() });
        }
        for (name, ready) in &states {
            reporter.set_service_status(name.as_str(), status(serving && *ready)).await;
            inference.metrics.model_ready.get_or_create(&ByModel { model: name.to_string() }).set(i64::from(*ready));
        }
        let ready = !snapshots.is_empty() && inference.models.ready();
        reporter.set_service_status("", status(serving && ready)).await;
        known = states.into_iter().map(|(name, _)| name).collect();
        tokio::select! {
            // Never fails: the models, which we hold, are the sender.
            _ = changes.changed() => {}
            () = drain.draining(), if serving => {}
        }
    }
}

/// Shows which fallbacks can answer. They do not make the pod ready: models are served without them.
async fn report_fallbacks(inference: Arc<Inference>) {
    let models = inference.fallbacks.models();
    let gauge = &inference.metrics.fallback_ready;
    let mut changes = models.changes();
    let mut known: Vec<(Name, bool)> = Vec::new();
    loop {
        changes.mark_unchanged();
        let states = models.states();
        for (gone, _) in known.iter().filter(|(name, _)| !states.iter().any(|(state, _)| state == name)) {
            gauge.remove(&ByModel { model: gone.to_string() });
        }
        for (name, ready) in &states {
            gauge.get_or_create(&ByModel { model: name.to_string() }).set(i64::from(*ready));
        }
        known = states;
        // Never fails: the models, which we hold, are the sender.
        let _ = changes.changed().await;
    }
}
