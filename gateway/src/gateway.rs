//! The process: load, bind, run, drain.
//!
//! ```text
//! control runtime (the caller's): admin, snapshot, control plane, certificate files, members, health checks, drain
//! worker threads, one runtime each: accept, serve, own connections to the pods
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderValue;
use spillway_core::health::{Gateway as VantageGateway, Vantage};
use spillway_core::identity::Role;
use spillway_core::units::Name;
use spillway_runtime::access_log::AccessLog;
use spillway_runtime::admin::{Admin, Pages, Readiness};
use spillway_runtime::audit::Audit;
use spillway_runtime::drain::Drain;
use spillway_runtime::link::Source;
use spillway_runtime::renewal::{Renewal, RenewalError, prepare};
use spillway_runtime::snapshot::{Refused, Subscription};
use spillway_runtime::store::{InvalidStore, Redis};
use spillway_runtime::telemetry::{Metrics as Registry, Traces, TracesError};
use spillway_runtime::tls::{IdentityError, Workload};
use spillway_runtime::upstream::UpstreamMetrics;
use spillway_runtime::vantage::{Post, Sources};
use tokio::net::TcpListener;

use crate::admission::Admission;
use crate::clock::Clock;
use crate::degrade::{self, Degradation};
use crate::downstream::listener::{Door, Places, bind};
use crate::edge::Edge;
use crate::explain;
use crate::members::{Members, Membership};
use crate::metrics::Metrics;
use crate::peers::links;
use crate::peers::metrics::PeerMetrics;
use crate::peers::places;
use crate::peers::rests::Rests;
use crate::peers::shed::{self, PlanMetrics};
use crate::peers::spill::MOST_SPILLING;
use crate::pods::book::Book;
use crate::pods::fleet::Fleet;
use crate::pods::health;
use crate::pods::metrics::PodMetrics;
use crate::request::memory::Memory;
use crate::results::{self, Results, purge_log};
use crate::settings::GatewaySettings;
use crate::shared::Shared;
use crate::traffic::Tally;

/// How long the last lines of each log may take to be written.
const FLUSH: Duration = Duration::from_secs(2);

/// The operator's fault: the gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("identity")]
    Identity(#[from] IdentityError),
    #[error("identity.renew")]
    Renewal(#[from] RenewalError),
    #[error("identity: the certificate is '{found}', but the settings say gateway '{name}' of region '{region}'")]
    NotThisGateway { found: String, region: Name, name: Name },
    #[error("snapshot")]
    Snapshot(#[from] Refused),
    #[error("snapshot: it has no Region '{0}'")]
    UnknownRegion(Name),
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        problem: std::io::Error,
    },
    #[error("otlp")]
    Traces(#[from] TracesError),
    #[error(transparent)]
    Redis(#[from] InvalidStore),
}

/// A gateway that serves.
pub struct Gateway {
    /// Where clients connect.
    pub https: SocketAddr,
    pub admin: SocketAddr,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Gateway {
    /// Loads everything, binds, and serves in threads of its own until `drain` is over. To be called
    /// within a tokio runtime, which is used for what is not traffic.
    pub async fn start(settings: GatewaySettings, drain: Drain) -> Result<Self, StartError> {
        let registry = Registry::new("gateway");
        prepare(&settings.common.identity, settings.common.renew.as_ref(), &role(&settings)).await?;
        let workload = Workload::load(&settings.common.identity)?;
        workload.register(&registry);
        check_identity(&settings, &workload)?;
        let failed = |what| move |problem| StartError::Io { what, problem };
        let audit = Audit::start(settings.common.audit.as_ref(), "gateway", &workload.id(), &registry);
        let audit = audit.map_err(failed("audit"))?;
        let source = Source::open(&settings.common, &registry, &audit)?;
        let subscription = source.snapshots.clone();
        if !subscription.load().regions.contains_key(&settings.region) {
            // What the control plane pushes may have it.
            if settings.common.control.is_none() {
                return Err(StartError::UnknownRegion(settings.region));
            }
            tracing::warn!(region = %settings.region, "there is no such Region yet");
        }
        workload.revoke(&subscription.load().revoked);
        let traces = match &settings.common.otlp {
            Some(otlp) => Traces::start(otlp, "gateway", &registry)?,
            None => Traces::off(),
        };
        let access_log = match &settings.common.access_log {
            Some(log) => AccessLog::open(log, &registry).map_err(failed("accessLog"))?,
            None => AccessLog::off(),
        };
        let clock = Clock::start();
        let (mut redis, mut of_results) = (None, None);
        if let Some(settings) = &settings.redis {
            let (connection, subscriber) = Redis::open(settings)?;
            let connection = redis.insert(Arc::new(connection)).clone();
            of_results = Some(results::SharedRedis { settings, connection, subscriber });
        }
        let answers = settings.limits.of_answers();
        let (results, channels) = Results::open(&settings.results, of_results, &settings.region, answers, &registry);
        let (traffic, plans) = (Arc::<Tally>::default(), source.plans.clone());
        let feed = source.feed(workload.clone(), Some(traffic.clone()), &registry);
        let sources = Sources {
            us: Vantage::Gateway(VantageGateway { region: settings.region.clone(), node: settings.name.clone() }),
            region: &settings.region,
            snapshots: &subscription,
            plans: &plans,
            sightings: feed.sightings(),
            pulses: feed.pulses(),
        };
        let post = Post::new(sources, workload.clone(), &registry);
        let shared = Arc::new(Shared {
            clock,
            // A name is always a header value.
            region_header: HeaderValue::from_str(settings.region.as_str()).unwrap_or(HeaderValue::from_static("-")),
            region: settings.region.clone(),
            name: settings.name.clone(),
            limits: settings.limits,
            metrics: Metrics::new(&registry),
            access_log,
            traffic,
            audit: audit.clone(),
            traces,
            workload: workload.clone(),
            plans,
            membership: Membership::new(subscription.current(), &settings.region, &settings.dns, &registry),
            book: Book::new(clock, PodMetrics::new(&registry)),
            degradation: Degradation::new(&registry, clock, &subscription.load()),
            admission: Admission::new(
                clock,
                settings.region.clone(),
                settings.name.clone(),
                settings.quota,
                redis,
                &registry,
            ),
            results: results.clone(),
            memory: Arc::new(Memory::new(settings.limits.memory)),
            drain: drain.clone(),
            upstream_metrics: UpstreamMetrics::register(&registry),
            spilling: places::Places::new(MOST_SPILLING),
            streams_spilling: places::Places::new(MOST_SPILLING),
            nudges: post.nudges(),
            peers_reached: AtomicBool::new(false),
            rests: Rests::default(),
            peer_metrics: PeerMetrics::new(&registry),
            plan_metrics: PlanMetrics::new(&registry),
        });
        let sockets = bind(settings.listen, settings.threads.get()).map_err(failed("listen"))?;
        let admin = Admin::bind(&settings.common.admin).await.map_err(failed("admin"))?;
        let https = sockets.first().map_or(Ok(settings.listen), |socket| socket.local_addr());
        let (https, admin_address) = (https.map_err(failed("listen"))?, admin.address().map_err(failed("admin"))?);
        let places = Places::default();
        let mut workers = Vec::with_capacity(sockets.len());
        for (index, socket) in sockets.into_iter().enumerate() {
            let worker = Worker { shared: shared.clone(), places: places.clone() };
            workers.push(worker.spawn(index, socket).map_err(failed("threads"))?);
        }
        tokio::spawn(workload.clone().watch(audit.clone(), drain.clone()));
        tokio::spawn(workload.clone().follow(subscription.clone(), audit, drain.clone()));
        tokio::spawn(post.run(drain.clone()));
        tokio::spawn(feed.follow(drain.clone()));
        if let Some(renew) = &settings.common.renew {
            let identity = settings.common.identity.clone();
            tokio::spawn(Renewal::new(identity, renew.clone(), workload.clone(), &registry).run(drain.clone()));
        }
        tokio::spawn(degrade::follow(shared.clone(), subscription.clone()));
        let snapshots = subscription.clone();
        tokio::spawn(shared.membership.clone().follow(subscription, drain.clone()));
        tokio::spawn(health::watch(shared.clone()));
        tokio::spawn(health::sweep(shared.clone()));
        tokio::spawn(shed::follow(shared.clone()));
        let looked_after = shared.clone();
        tokio::spawn(async move { looked_after.admission.watch(looked_after.drain.clone()).await });
        if let Some(channels) = channels {
            tokio::spawn(channels.follow(results, registry.clone(), drain));
        }
        tokio::spawn(admin.serve(pages(&settings, &shared, snapshots, registry)));
        tracing::info!(%https, admin = %admin_address, region = %settings.region, name = %settings.name, "serving");
        Ok(Self { https, admin: admin_address, shared, workers })
    }

    /// Waits until the drain is over and everything is written.
    pub async fn finish(self) {
        self.shared.drain.finish().await;
        let shared = self.shared;
        let workers = self.workers;
        let ended = tokio::task::spawn_blocking(move || {
            for worker in workers {
                if worker.join().is_err() {
                    tracing::error!("a worker thread panicked");
                }
            }
            shared.access_log.flush(FLUSH);
            shared.audit.stop(FLUSH);
            shared.traces.stop();
        });
        // Fails only if the closure panicked, and it does not.
        let _ = ended.await;
    }
}

fn role(settings: &GatewaySettings) -> Role {
    Role::Gateway { region: settings.region.clone(), name: settings.name.clone() }
}

fn check_identity(settings: &GatewaySettings, workload: &Workload) -> Result<(), StartError> {
    let id = workload.id();
    if id.role == role(settings) {
        return Ok(());
    }
    let (region, name) = (settings.region.clone(), settings.name.clone());
    Err(StartError::NotThisGateway { found: id.to_string(), region, name })
}

fn pages(settings: &GatewaySettings, shared: &Arc<Shared>, snapshots: Arc<Subscription>, registry: Registry) -> Pages {
    let readiness = Readiness::default();
    readiness.check("snapshot", move || {
        if snapshots.is_empty() { Err("the first push of the control plane is waited for".into()) } else { Ok(()) }
    });
    let pods = shared.clone();
    readiness.check("pods", move || {
        let reason = "no pod of this region answers its health check, and no other region can be asked";
        if pods.has_answers() { Ok(()) } else { Err(reason.into()) }
    });
    let config = serde_json::json!({
        "region": settings.region.as_str(),
        "name": settings.name.as_str(),
        "listen": settings.listen.to_string(),
        "threads": settings.threads,
        "snapshot": settings.common.snapshot,
        "drainTimeoutMs": settings.common.drain_timeout.as_millis() as u64,
        "limits": {
            "connections": settings.limits.connections,
            "bodyBytes": settings.limits.request.body,
            "tensors": settings.limits.request.tensors,
            "answerBytes": settings.limits.answer,
            "bodiesInMemoryBytes": settings.limits.memory,
        },
        "dns": {
            "servers": settings.dns.servers.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "timeoutMs": settings.dns.timeout.as_millis() as u64,
        },
    });
    let live = shared.clone();
    let config = move || {
        let mut config = config.clone();
        if let Some(fleet) = live.book.newest() {
            config["snapshotVersion"] = fleet.snapshot.version.into();
            config["planVersion"] = live.plans.version().into();
            config["pods"] = serde_json::to_value(fleet.view(live.clock.now())).unwrap_or_default();
        }
        config["admission"] = serde_json::to_value(live.admission.view()).unwrap_or_default();
        config["degradation"] = live.degradation.view();
        config["results"] = serde_json::to_value(live.results.view()).unwrap_or_default();
        config
    };
    Pages {
        metrics: registry,
        readiness,
        config: Arc::new(config),
        actions: vec![purge_log::action(shared.results.clone()), explain::action(shared.clone())],
        drain: shared.drain.clone(),
    }
}

/// One thread: a runtime, a socket, a fleet.
struct Worker {
    shared: Arc<Shared>,
    places: Places,
}

impl Worker {
    fn spawn(self, index: usize, socket: std::net::TcpListener) -> std::io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(format!("gateway-{index}")).spawn(move || {
            runtime.block_on(async {
                match TcpListener::from_std(socket) {
                    Ok(listener) => self.serve(listener).await,
                    Err(error) => tracing::error!(%error, "a worker cannot listen"),
                }
            });
        })
    }

    async fn serve(self, listener: TcpListener) {
        let Self { shared, places } = self;
        let mut changed = shared.membership.subscribe();
        let fleet = |members: Arc<Members>, before: Option<&Fleet>| {
            let Shared { region, workload, book, upstream_metrics, .. } = &*shared;
            shared.admission.follow(&members.snapshot);
            Fleet::new(members, region, workload, book, upstream_metrics, before)
        };
        let members = changed.borrow_and_update().clone();
        let current = Arc::new(ArcSwap::from_pointee(fleet(members, None)));
        let follow = async {
            while changed.changed().await.is_ok() {
                let members = changed.borrow_and_update().clone();
                let next = fleet(members, Some(&current.load()));
                current.store(Arc::new(next));
            }
        };
        let drain = shared.drain.clone();
        let door = Door {
            workload: shared.workload.clone(),
            shared: shared.clone(),
            edge: Arc::new(Edge { shared: shared.clone(), fleet: current.clone() }),
            drain: drain.clone(),
            places,
        };
        let mut first = shared.membership.subscribe();
        let accept = async {
            // Until there is something to go by, clients wait in the backlog rather than be taken for strangers.
            let serves = tokio::select! {
                found = first.wait_for(|members| !members.snapshot.regions.is_empty()) => found.is_ok(),
                () = drain.draining() => false,
            };
            if serves {
                Arc::new(door).serve(listener).await;
            }
            drain.stopped().await;
        };
        tokio::select! {
            () = accept => {}
            // These end only with the process: the membership outlives the workers.
            () = follow => {}
            () = links::keep_open(&shared, &current) => {}
        }
    }
}
