//! `spillway injector`: the injector of a deployment, one on each machine whose processes drills may break.
//!
//! The rule: it is a role of its own. It runs only where somebody starts it, reaches only what its settings name, and
//! obeys only the operators that they name, by their certificates; those that may change intent may not for that reason
//! break things, nor the reverse. What it is asked for is in its audit log.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use spillway_control::intent::Operators;
use spillway_control::metrics::ControlMetrics;
use spillway_control::server::{Door, Guard, Server};
use spillway_core::identity::{Role, SpiffeId};
use spillway_proto::drill::injector_server::InjectorServer;
use spillway_runtime::audit::{Audit, Denial};
use spillway_runtime::drain::Drain;
use spillway_runtime::renewal::{Renewal, RenewalError, prepare};
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::{IdentityError, Peer, Workload};
use tokio::task::JoinSet;
use tonic::service::Routes;
use tonic::{Request, Status};

use super::host::Host;
use super::relay::Links;
use super::service::Asked;
use super::settings::InjectorSettings;
use super::{Injector, LOOK_EVERY, Processes};

const FLUSH: Duration = Duration::from_secs(2);
/// How long what is broken may take to be mended when the injector ends.
const MENDED_WITHIN: Duration = Duration::from_secs(15);

/// Why an injector does not start. The operator's fault, except for ports that somebody else holds.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("identity")]
    Identity(#[from] IdentityError),
    #[error("identity.renew")]
    Renewal(#[from] RenewalError),
    #[error("the certificate is that of '{found}'; the settings make it {expected}")]
    NotOurs { found: String, expected: String },
    #[error("audit")]
    Audit(#[source] io::Error),
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: io::Error },
}

/// One that has bound its ports and answers nothing yet. Its links pass already.
pub struct InjectorNode {
    address: SocketAddr,
    server: Server,
    injector: Arc<Injector>,
    workload: Arc<Workload>,
    audit: Audit,
    metrics: Metrics,
    settings: InjectorSettings,
    drain: Drain,
}

/// Loads, binds, prints the one line that says where it listens, and serves until drained.
pub async fn run(settings: InjectorSettings, drain: Drain) -> Result<(), StartError> {
    let node = InjectorNode::bind(settings, drain).await?;
    let line = serde_json::json!({"listening": {"grpc": node.address().to_string()}});
    // Nobody may be listening; that is no reason not to serve.
    let _ = writeln!(io::stdout(), "{line}");
    node.serve().await;
    Ok(())
}

impl InjectorNode {
    pub async fn bind(settings: InjectorSettings, drain: Drain) -> Result<Self, StartError> {
        let metrics = Metrics::new("injector");
        let role = Role::Injector { region: settings.region.clone(), name: settings.name.clone() };
        prepare(&settings.identity, settings.renew.as_ref(), &role).await?;
        let workload = Workload::load(&settings.identity)?;
        if workload.id().role != role {
            let expected = SpiffeId { role, ..workload.id() }.to_string();
            return Err(StartError::NotOurs { found: workload.id().to_string(), expected });
        }
        let audit = Audit::start(settings.audit.as_ref(), "injector", &workload.id(), &metrics);
        let audit = audit.map_err(StartError::Audit)?;
        let host = Arc::new(Host::new(settings.processes.clone(), settings.callers.clone()));
        // What an injector before us left paused.
        for name in host.names() {
            if let Err(problem) = host.resume(&name) {
                eprintln!("{name}: {problem:#}");
            }
        }
        let links = Links::new(host.clone());
        for (name, link) in &settings.links {
            let bound = links.add(name, link.listen, link.to).await;
            bound.map_err(|source| StartError::Bind { address: link.listen, source })?;
        }
        let bound = |source| StartError::Bind { address: settings.listen, source };
        let server = Server::bind(settings.listen).await.map_err(bound)?;
        let address = server.address().map_err(bound)?;
        let injector = Injector::new(host, links);
        Ok(Self { address, server, injector, workload, audit, metrics, settings, drain })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the drain has begun and its work has ended; then what is broken is mended.
    pub async fn serve(self) {
        let Self { server, injector, workload, audit, metrics, settings, drain, .. } = self;
        // Dropped at the end of this function, and with it every task of ours.
        let mut tasks = JoinSet::new();
        tasks.spawn(injector.clone().tend());
        tasks.spawn(workload.clone().watch(audit.clone(), drain.clone()));
        if let Some(renew) = settings.renew {
            tasks.spawn(Renewal::new(settings.identity, renew, workload.clone(), &metrics).run(drain.clone()));
        }
        let asked = Asked::new(injector.clone(), audit.clone());
        let service = InjectorServer::with_interceptor(asked, permit(settings.operators, audit.clone()));
        let door = Door { service: "/spillway.drill.v1.Injector/", action: "inject", may_call };
        let guard = Guard {
            workload,
            doors: [door].into(),
            metrics: ControlMetrics::register(&metrics),
            audit: audit.clone(),
            drain: drain.clone(),
        };
        server.serve(Routes::new(service), guard).await;
        drain.finish().await;
        let mended = async {
            while !injector.end() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        if tokio::time::timeout(MENDED_WITHIN, mended).await.is_err() {
            eprintln!("something that a drill broke could not be mended");
        }
        tasks.shutdown().await;
        // Bounded; a panic there has nothing left to harm.
        let _ = tokio::task::spawn_blocking(move || audit.stop(FLUSH)).await;
    }
}

fn may_call(own: &SpiffeId, peer: &SpiffeId) -> bool {
    matches!(peer.role, Role::Operator { .. }) && own.trust_domain == peer.trust_domain
}

/// Lets the operators in that are named.
fn permit(operators: Operators, audit: Audit) -> impl FnMut(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |request| {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let Some(peer) = peer else { return Err(Status::unauthenticated("there is no certificate")) };
        let named = match (&peer.id.role, &operators) {
            (Role::Operator { name }, Operators::Listed(listed)) => listed.contains(name),
            _ => false,
        };
        if named {
            return Ok(request);
        }
        audit.denied(|| Denial {
            id: Some(peer.id.to_string()),
            action: Some("inject"),
            code: "not-an-operator".into(),
            ..Denial::default()
        });
        Err(Status::permission_denied(format!("the settings of this injector do not name '{}'", peer.id)))
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
