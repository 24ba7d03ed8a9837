//! Load, bind, run: one control node from its settings to its end.
//!
//! The rule: nothing listens before settings, identity and store are accepted; nothing runs after the drain is over. A
//! store that does not answer is waited for: what was pushed stays in service, and what is known is given meanwhile.

use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use spillway_core::identity::Role;
use spillway_core::units::Name;
use spillway_runtime::admin::{Admin, Pages, Readiness};
use spillway_runtime::audit::{Audit, Event};
use spillway_runtime::drain::Drain;
use spillway_runtime::renewal::{Renewal, RenewalError, RenewalSettings, prepare};
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::{IdentityError, Workload};
use tokio::task::JoinSet;
use tonic::service::Routes;

use crate::authority::{Authority, Newcomers, OpenError as NoAuthority, may_call as may_call_authority};
use crate::distribution;
#[cfg(feature = "route53")]
use crate::dns::route53::{keeping::Sources, writer::Writer};
use crate::evidence;
use crate::fleet::Fleet;
use crate::intent::service::may_call as may_call_intent;
use crate::intent::{Desk, Drills, Events, IntentService, Overrides, StatusSource, Versions};
use crate::leading::Leading;
use crate::metrics::ControlMetrics;
use crate::server::{Door, Guard, Server};
use crate::settings::ControlSettings;
use crate::store::{OpenError, Store};
use crate::trail::{self, Trail};

/// How long the last records may take to be written.
const FLUSH: Duration = Duration::from_secs(2);

/// Why a control node does not start. The operator's fault, except for ports that somebody else holds.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("identity")]
    Identity(#[from] IdentityError),
    #[error("identity.renew")]
    Renewal(#[from] RenewalError),
    #[error("the certificate is that of '{found}'; the settings say region {region}, name {name}")]
    NotOurs { found: String, region: Name, name: Name },
    #[error("store")]
    Store(#[from] OpenError),
    #[error("authority")]
    Authority(#[from] NoAuthority),
    #[error("audit")]
    Audit(#[source] io::Error),
    #[error("{setting}: cannot listen on {address}")]
    Bind { setting: &'static str, address: SocketAddr, source: io::Error },
}

/// Where a control node listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
    /// Where those connect who have no certificate yet.
    pub bootstrap: Option<SocketAddr>,
}

/// What the parts of a control node share.
#[derive(Clone)]
pub struct Parts {
    pub workload: Arc<Workload>,
    pub store: Store,
    pub leading: Arc<Leading>,
    pub versions: Arc<Versions>,
    pub overrides: Arc<Overrides>,
    pub events: Events,
    pub drills: Drills,
    pub audit: Audit,
    pub metrics: Metrics,
    pub drain: Drain,
}

/// A control node that has bound its ports and answers nothing yet.
pub struct Control {
    addresses: Addresses,
    server: Server,
    admin: Admin,
    authority: Option<Arc<Authority>>,
    newcomers: Option<Newcomers>,
    trail: Trail,
    parts: Parts,
    settings: ControlSettings,
}

/// Loads, binds, prints the one line that says where it listens, and serves until drained.
/// Signals are the caller's: see [`Drain::on_signals`].
pub async fn run(settings: ControlSettings, drain: Drain) -> Result<(), StartError> {
    let control = Control::bind(settings, drain).await?;
    let Addresses { grpc, admin, bootstrap } = control.addresses();
    let mut listening = serde_json::json!({"grpc": grpc.to_string(), "admin": admin.to_string()});
    if let Some(bootstrap) = bootstrap {
        listening["bootstrap"] = bootstrap.to_string().into();
    }
    let line = serde_json::json!({"listening": listening});
    // Nobody may be listening; that is no reason not to serve.
    let _ = writeln!(io::stdout(), "{line}");
    control.serve().await;
    Ok(())
}

impl Control {
    pub async fn bind(settings: ControlSettings, drain: Drain) -> Result<Self, StartError> {
        let metrics = Metrics::new("control");
        let role = Role::Control { region: settings.region.clone(), name: settings.name.clone() };
        prepare(&settings.identity, settings.renew.as_ref(), &role).await?;
        let workload = Workload::load(&settings.identity)?;
        workload.register(&metrics);
        check_identity(&workload, &settings)?;
        let audit = Audit::start(settings.audit.as_ref(), "control", &workload.id(), &metrics);
        let (audit, tap) = trail::tapped(audit.map_err(StartError::Audit)?, &metrics);
        let bound = |setting, address| move |source| StartError::Bind { setting, address, source };
        let server = Server::bind(settings.listen).await.map_err(bound("listen", settings.listen))?;
        let admin = Admin::bind(&settings.admin).await.map_err(bound("admin", settings.admin.listen))?;
        let newcomers = match settings.authority.as_ref().and_then(|authority| authority.bootstrap) {
            Some(address) => Some(Newcomers::bind(address).await.map_err(bound("authority.bootstrap", address))?),
            None => None,
        };
        let addresses = Addresses {
            bootstrap: newcomers.as_ref().and_then(|newcomers| newcomers.address().ok()),
            grpc: server.address().map_err(bound("listen", settings.listen))?,
            admin: admin.address().map_err(bound("admin", settings.admin.listen))?,
        };
        // The last thing that can fail: a SQLite file is taken over from whoever had it.
        let store = Store::open(&settings.store).await?;
        let address = settings.advertise.clone().unwrap_or_else(|| addresses.grpc.to_string());
        let leading = Leading::new(store.clone(), settings.name.clone(), address, audit.clone(), &metrics);
        let trail = Trail::new(tap, store.clone(), &leading);
        let authority = match &settings.authority {
            Some(own) => {
                let operators = settings.operators.clone();
                let (store, leading) = (store.clone(), leading.fences());
                let opened =
                    Authority::open(own.clone(), operators, workload.clone(), store, leading, audit.clone(), &metrics);
                Some(opened.await?)
            }
            None => None,
        };
        let parts = Parts {
            workload,
            versions: Versions::new(store.clone(), &metrics),
            overrides: Overrides::new(store.clone()),
            store,
            leading,
            events: Events::default(),
            drills: Drills::default(),
            audit,
            metrics,
            drain,
        };
        Ok(Self { addresses, server, admin, authority, newcomers, trail, parts, settings })
    }

    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Serves until the drain has begun and its work has ended or its time is over.
    pub async fn serve(self) {
        let Self { addresses, server, admin, authority, newcomers, trail, parts, settings } = self;
        let fleet = Fleet::new(&settings, &parts);
        let Parts { workload, store, leading, versions, overrides, events, drills, audit, metrics, drain } = parts;
        // Each part that has something to say of how it stands.
        let status: Vec<Arc<dyn StatusSource>> =
            [vec![Arc::new(events.clone()) as Arc<dyn StatusSource>, Arc::new(drills.clone())], fleet.status()]
                .concat();
        let (heard, kept) = (events.clone(), drills.clone());
        let desk = Desk::new(versions.clone(), overrides.clone(), leading.clone(), audit.clone(), heard, kept);
        let operators = settings.operators.clone();
        let intent = IntentService::new(Arc::new(desk), store, operators, workload.clone(), status, &metrics);
        let mut routes = Routes::new(intent.into_server()).add_service(fleet.service()).add_service(fleet.evidence());
        if let Some(authority) = &authority {
            routes = routes.add_service(authority.service());
        }
        let guard = Guard {
            workload: workload.clone(),
            doors: doors(authority.is_some()),
            metrics: ControlMetrics::register(&metrics),
            audit: audit.clone(),
            drain: drain.clone(),
        };
        let renewal = renew(&settings, addresses.grpc)
            .map(|renew| Renewal::new(settings.identity.clone(), renew, workload.clone(), &metrics));
        let pages = Pages {
            actions: Vec::new(),
            readiness: readiness(&leading, &drain),
            config: config(&settings, &leading, &versions),
            metrics: metrics.clone(),
            drain: drain.clone(),
        };
        // Dropped at the end of this function, and with it every task of ours.
        let mut tasks = JoinSet::new();
        tasks.spawn(admin.serve(pages));
        tasks.spawn(workload.clone().watch(audit.clone(), drain.clone()));
        if let Some(renewal) = renewal {
            tasks.spawn(renewal.run(drain.clone()));
        }
        if let Some(authority) = authority {
            tasks.spawn(authority.clone().watch(drain.clone()));
            if let Some(newcomers) = newcomers {
                tasks.spawn(newcomers.serve(authority, drain.clone()));
            }
        }
        #[cfg(feature = "route53")]
        if let Some(route53) = settings.route53 {
            let sources = Sources { leading: leading.fences(), plan: fleet.plan(), served: fleet.served() };
            tasks.spawn(sources.keep(Writer::new(route53, &metrics), drain.clone()));
        }
        tasks.spawn(follow_revocations(workload, versions.clone(), audit.clone()));
        tasks.spawn(versions.follow(drain.clone()));
        fleet.start(&mut tasks, &drain);
        tasks.spawn(overrides.follow(leading.clone(), audit.clone(), drain.clone()));
        tasks.spawn(trail.run(drain.clone()));
        tasks.spawn(drills.tend(leading.clone(), audit.clone(), events, drain.clone()));
        // Counted as work, so that another node may lead before this one has ended.
        let election = drain.work();
        tasks.spawn({
            let drain = drain.clone();
            async move {
                leading.run(drain).await;
                drop(election);
            }
        });
        server.serve(routes, guard).await;
        drain.finish().await;
        tasks.shutdown().await;
        let flushed = tokio::task::spawn_blocking(move || audit.stop(FLUSH));
        // Bounded; a panic there has nothing left to harm.
        let _ = flushed.await;
    }
}

/// Each service has a door.
fn doors(issues: bool) -> Arc<[Door]> {
    let mut doors = vec![
        Door { service: "/spillway.control.v1.Intent/", action: "intent", may_call: may_call_intent },
        Door { service: distribution::SERVICE, action: "follow", may_call: distribution::may_call },
        Door { service: evidence::SERVICE, action: "share", may_call: evidence::may_call },
    ];
    if issues {
        let service = "/spillway.control.v1.Authority/";
        doors.push(Door { service, action: "certificate", may_call: may_call_authority });
    }
    doors.into()
}

fn check_identity(workload: &Workload, settings: &ControlSettings) -> Result<(), StartError> {
    let ControlSettings { region, name, .. } = settings;
    let id = workload.id();
    match &id.role {
        Role::Control { region: r, name: n } if r == region && n == name => Ok(()),
        _ => Err(StartError::NotOurs { found: id.to_string(), region: region.clone(), name: name.clone() }),
    }
}

/// Who makes our own certificate anew: as the settings say, else this node's own authority, which is asked as by any other
/// node. It needs neither leader nor store.
fn renew(settings: &ControlSettings, own: SocketAddr) -> Option<RenewalSettings> {
    let to_itself = || {
        let ip = match own.ip() {
            ip if !ip.is_unspecified() => ip,
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        settings.authority.is_some().then(|| RenewalSettings::by(vec![SocketAddr::new(ip, own.port()).to_string()]))
    };
    settings.renew.clone().or_else(to_itself)
}

fn readiness(leading: &Arc<Leading>, drain: &Drain) -> Readiness {
    let readiness = Readiness::default();
    let (leading, drain) = (leading.clone(), drain.clone());
    readiness.check("leader", move || match leading.leader() {
        Some(_) => Ok(()),
        None => Err("no leader is known".into()),
    });
    readiness.check("serving", move || if drain.is_serving() { Ok(()) } else { Err("draining".into()) });
    readiness
}

type Config = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

fn config(settings: &ControlSettings, leading: &Arc<Leading>, versions: &Arc<Versions>) -> Config {
    let (settings, leading, versions) = (settings.clone(), leading.clone(), versions.clone());
    Arc::new(move || {
        let leader = leading.leader();
        serde_json::json!({
            "region": settings.region.to_string(),
            "name": settings.name.to_string(),
            "leads": leading.fence().is_some(),
            "leader": leader.as_ref().map(|leader| leader.node.to_string()),
            "epoch": leader.map(|leader| leader.epoch),
            "intent": versions.current().map(|current| current.number),
        })
    })
}

/// Revocations of the newest version hold here at once, whatever nodes serve.
async fn follow_revocations(workload: Arc<Workload>, versions: Arc<Versions>, audit: Audit) {
    let mut changed = versions.changed();
    loop {
        if let Some(current) = versions.current() {
            let revoked = current.snapshot.revoked.clone();
            if workload.revoke(&revoked) {
                let (generation, serials, ids) = (workload.generation(), revoked.serials.len(), revoked.ids.len());
                tracing::info!(generation, serials, ids, "revocations changed");
                audit.record(Event::RevocationsChanged { generation, serials, ids });
            }
        }
        // Never fails: the versions, which we hold, are the sender.
        let _ = changed.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use spillway_core::identity::SpiffeId;
    use spillway_runtime::settings::parse;

    use super::*;

    #[test]
    fn each_role_has_the_doors_of_its_work_and_no_other() {
        let (own, all) = (SpiffeId::parse("spiffe://td/region/eu/control/c-0").unwrap(), doors(true));
        for (path, expected) in [
            ("region/eu/gateway/g", &["follow", "certificate"][..]),
            ("region/eu/sidecar/scorers/p", &["follow", "certificate"]),
            ("region/us/control/c", &["intent", "follow", "share", "certificate"]),
            ("region/us/dns/d", &["follow", "certificate"]),
            ("region/us/injector/i", &["certificate"]),
            ("region/us/loader/l", &["certificate"]),
            ("tenant/acme/client/web", &[]),
            ("operator/alice", &["intent", "certificate"]),
        ] {
            let open_to = |id: &SpiffeId| {
                let open = |door: &&Door| (door.may_call)(&own, id);
                all.iter().filter(open).map(|door| door.action).collect::<Vec<_>>()
            };
            assert_eq!(open_to(&SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap()), expected, "{path}");
            assert_eq!(open_to(&SpiffeId::parse(&format!("spiffe://other/{path}")).unwrap()), [""; 0], "{path}");
        }
        assert!(doors(false).iter().all(|door| door.action != "certificate"));
    }

    #[test]
    fn a_node_with_an_authority_renews_at_itself_unless_the_settings_say_where() {
        let servers = |identity: &str, authority: &str, own: &str| {
            let text = format!(
                "region: eu\nname: c-0\nlisten: 127.0.0.1:0\noperators: any\nstore: {{sqlite: a.db}}\n{authority}\
                 identity: {{certificate: c.pem, key: k.pem, trustBundle: b.pem{identity}}}\n"
            );
            let settings: ControlSettings = parse(&text).unwrap();
            renew(&settings, own.parse().unwrap()).map(|renew| renew.servers)
        };
        let authority = "authority: {folder: ca}\n";
        for (own, asked) in
            [("10.0.0.1:7443", "10.0.0.1:7443"), ("0.0.0.0:7443", "127.0.0.1:7443"), ("[::]:7443", "[::1]:7443")]
        {
            assert_eq!(servers("", authority, own), Some(vec![asked.to_owned()]));
        }
        assert_eq!(servers("", "", "10.0.0.1:7443"), None);
        let elsewhere = ", renew: {servers: ['c-1:7443']}";
        assert_eq!(servers(elsewhere, authority, "10.0.0.1:7443"), Some(vec!["c-1:7443".to_owned()]));
    }
}
