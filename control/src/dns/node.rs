//! Load, bind, run: one DNS node from its settings to its end.
//!
//! The rule: nothing listens before settings, identity and snapshot are accepted; nothing runs after the drain is over.
//! It answers from the plan that it has and from what its own probes say, and goes on without the control plane.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::failover::Standing;
use spillway_core::identity::Role;
use spillway_core::limit::InvalidLimit;
use spillway_core::units::Name;
use spillway_runtime::admin::{Admin, Pages, Readiness};
use spillway_runtime::audit::Audit;
use spillway_runtime::drain::Drain;
use spillway_runtime::renewal::{Renewal, RenewalError, prepare};
use spillway_runtime::snapshot::Refused;
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::{IdentityError, Workload};
use tokio::task::JoinSet;

use super::inputs::{Feeds, Inputs, take};
use super::metrics::DnsMetrics;
use super::server::{Server, Sockets};
use super::settings::DnsSettings;
use super::shares::{STEP, Shares};
use super::view::Place;

/// How long the last lines may take to be written.
const FLUSH: Duration = Duration::from_secs(2);

/// Why a DNS node does not start. The operator's fault, except for ports that somebody else holds.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("identity")]
    Identity(#[from] IdentityError),
    #[error("identity.renew")]
    Renewal(#[from] RenewalError),
    #[error("the certificate is that of '{found}'; the settings say region {region}, DNS node {node}")]
    NotOurs { found: String, region: Name, node: Name },
    #[error("snapshot")]
    Snapshot(#[from] Refused),
    #[error("audit")]
    Audit(#[source] io::Error),
    #[error("rateLimit")]
    RateLimit(#[from] InvalidLimit),
    #[error("{setting}: cannot listen on {address}")]
    Bind { setting: &'static str, address: SocketAddr, source: io::Error },
}

/// Where a DNS node listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// UDP and TCP, in the order of the settings.
    pub dns: Vec<SocketAddr>,
    pub admin: SocketAddr,
}

/// A DNS node that has bound its ports and answers nothing yet.
pub struct DnsNode {
    addresses: Addresses,
    sockets: Sockets,
    admin: Admin,
    server: Arc<Server>,
    workload: Arc<Workload>,
    inputs: Inputs,
    feeds: Feeds,
    audit: Audit,
    metrics: Metrics,
    settings: DnsSettings,
    drain: Drain,
}

/// Loads, binds, prints the one line that says where it listens, and serves until drained.
/// Signals are the caller's: see [`Drain::on_signals`].
pub async fn run(settings: DnsSettings, drain: Drain) -> Result<(), StartError> {
    let node = DnsNode::bind(settings, drain).await?;
    let Addresses { dns, admin } = node.addresses();
    let dns: Vec<String> = dns.iter().map(ToString::to_string).collect();
    let line = serde_json::json!({"listening": {"dns": dns, "admin": admin.to_string()}});
    // Nobody may be listening; that is no reason not to serve.
    let _ = writeln!(io::stdout(), "{line}");
    node.serve().await;
    Ok(())
}

impl DnsNode {
    pub async fn bind(settings: DnsSettings, drain: Drain) -> Result<Self, StartError> {
        let metrics = Metrics::new("dns");
        prepare(&settings.common.identity, settings.common.renew.as_ref(), &role(&settings)).await?;
        let workload = Workload::load(&settings.common.identity)?;
        workload.register(&metrics);
        check_identity(&workload, &settings)?;
        let audit = Audit::start(settings.common.audit.as_ref(), "dns", &workload.id(), &metrics);
        let audit = audit.map_err(StartError::Audit)?;
        let (inputs, feeds) = Inputs::load(&settings, &workload, &metrics, &audit)?;
        workload.revoke(&inputs.snapshots.load().revoked);
        let server = Server::new(settings.zone.clone(), &settings.rate_limit, DnsMetrics::register(&metrics))?;
        take(&server, &inputs.view());
        let bound = |setting, address| move |source| StartError::Bind { setting, address, source };
        let readers = std::thread::available_parallelism().map_or(1, usize::from);
        let sockets = Sockets::bind(&settings.listen, readers).map_err(|(address, source)| StartError::Bind {
            setting: "listen",
            address,
            source,
        })?;
        let admin = settings.common.admin;
        let admin_port = Admin::bind(&admin).await.map_err(bound("admin", admin.listen))?;
        let addresses = Addresses {
            dns: sockets.addresses().to_vec(),
            admin: admin_port.address().map_err(bound("admin", admin.listen))?,
        };
        Ok(Self {
            addresses,
            sockets,
            admin: admin_port,
            server: Arc::new(server),
            workload,
            inputs,
            feeds,
            audit,
            metrics,
            settings,
            drain,
        })
    }

    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until the drain has begun and its work has ended or its time is over.
    pub async fn serve(self) {
        let Self { sockets, admin, server, workload, inputs, feeds, audit, metrics, settings, drain, .. } = self;
        let shares = Arc::new(Mutex::new(Shares::default()));
        let common = settings.common.clone();
        let renewal = common.renew.map(|renew| Renewal::new(common.identity, renew, Arc::clone(&workload), &metrics));
        let pages = Pages {
            actions: Vec::new(),
            readiness: readiness(&server, &drain),
            config: config(&settings, &inputs, &server, &shares),
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
        tasks.spawn(workload.follow(Arc::clone(&inputs.snapshots), audit.clone(), drain.clone()));
        feeds.tell_answers(&server).start(&mut tasks, &inputs, &drain);
        tasks.spawn(inputs.follow(Arc::clone(&server)));
        tasks.spawn(keep_shares(Arc::clone(&server), shares));
        sockets.serve(server, settings.tcp, drain.clone()).await;
        drain.finish().await;
        tasks.shutdown().await;
        // Bounded; a panic there has nothing left to harm.
        let _ = tokio::task::spawn_blocking(move || audit.stop(FLUSH)).await;
    }
}

async fn keep_shares(server: Arc<Server>, shares: Arc<Mutex<Shares>>) {
    loop {
        shares.lock().keep(server.metrics.answers());
        tokio::time::sleep(STEP).await;
    }
}

fn role(settings: &DnsSettings) -> Role {
    Role::Dns { region: settings.region.clone(), name: settings.node.clone() }
}

fn check_identity(workload: &Workload, settings: &DnsSettings) -> Result<(), StartError> {
    let id = workload.id();
    if id.role == role(settings) {
        return Ok(());
    }
    let (region, node) = (settings.region.clone(), settings.node.clone());
    Err(StartError::NotOurs { found: id.to_string(), region, node })
}

fn readiness(server: &Arc<Server>, drain: &Drain) -> Readiness {
    let readiness = Readiness::default();
    let (server, drain) = (Arc::clone(server), drain.clone());
    readiness.check("view", move || match server.served() {
        Some(_) => Ok(()),
        None => Err("no region has an address".into()),
    });
    readiness.check("serving", move || if drain.is_serving() { Ok(()) } else { Err("draining".into()) });
    readiness
}

type Config = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

fn config(settings: &DnsSettings, inputs: &Inputs, server: &Arc<Server>, shares: &Arc<Mutex<Shares>>) -> Config {
    let (settings, inputs, server, shares) = (settings.clone(), inputs.clone(), Arc::clone(server), Arc::clone(shares));
    Arc::new(move || {
        let served = server.served();
        let counts = server.metrics.answers();
        let answered = shares.lock().until(&counts);
        let view = served.as_ref().map(|served| &served.view);
        let total: f64 = view.iter().flat_map(|view| view.regions.values()).map(|place| place.weight).sum();
        let region = |(name, place): (&Name, &Place)| {
            let value = serde_json::json!({
                "planned": if total > 0.0 { place.weight / total } else { 0.0 },
                "answered": answered.get(name),
                "answers": counts.get(name),
                "standing": standing_name(place.standing),
                "addresses": place.v4.iter().chain(&place.v6).map(ToString::to_string).collect::<Vec<_>>(),
            });
            (name.to_string(), value)
        };
        let regions: serde_json::Map<_, _> = view.iter().flat_map(|view| &view.regions).map(region).collect();
        serde_json::json!({
            "region": settings.region.to_string(),
            "node": settings.node.to_string(),
            "zone": settings.zone.zone.to_string(),
            "name": settings.zone.name.to_string(),
            "snapshot": {"version": inputs.snapshots.load().version},
            "plan": {"version": inputs.plans.version()},
            "serial": view.map(|view| view.serial),
            "down": inputs.down.borrow().iter().map(ToString::to_string).collect::<Vec<_>>(),
            "regions": regions,
        })
    })
}

fn standing_name(standing: Standing) -> &'static str {
    match standing {
        Standing::Steady => "steady",
        Standing::Unsteady => "unsteady",
        Standing::Out => "out",
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
