//! `spillway dev`: three regions on this machine, with real processes, real certificates and a real model.
//!
//! * [`fleet`]: what they have in common: resources, a control node, a DNS node.
//! * [`certificates`]: first certificates, and those of who runs no process.
//! * [`region`]: what one region is made of.
//! * [`processes`]: the children, ended with us, started again when they die.
//! * [`servers`]: Redis, Cassandra and Triton, when asked for; Redis behind a link for each region.
//! * [`injector`]: what breaks things for drills.

mod certificates;
mod fleet;
pub mod injector;
mod processes;
mod region;
mod servers;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::future::try_join_all;
use serde_json::{Map, Value, json};
use spillway_core::identity::SpiffeId;
use spillway_runtime::tls::IdentitySettings;

use crate::commands::apply;
use crate::commands::features::Load;
use crate::commands::sidecar::Connection;
use crate::control::Target;
use crate::injector::Injector;
use crate::injector::relay::Links;
use certificates::{Pace, of_caller, shared_bundle};
use fleet::{CONTROL, ENDPOINTS, EXAMPLE_ENTITY, Fleet, MODEL, Member, SERVICE, TENANTS};
use processes::Processes;
use region::{Backends, Region};
use servers::Servers;

/// Run three regions on this machine until Ctrl-C: a gateway and two sidecars each, a control node, DNS, a model, its features
#[derive(clap::Args)]
pub struct Arguments {
    /// Where everything is kept. Settings, leaf certificates and the resources that come along are written anew at each
    /// start; all else stays: the authority (pki), versions, overrides and audit (control.sqlite), features
    /// (features.sqlite), last snapshots, logs, reports of drills
    #[arg(long, value_name = "FOLDER", default_value = ".dev")]
    dir: PathBuf,
    /// The gateways' port, on 127.0.0.1, .2 and .3; 0 takes a free one
    #[arg(long, default_value_t = 8443)]
    port: u16,
    /// Use real servers instead of the embedded defaults: Redis, Cassandra and Triton, by tests/servers of this repository
    #[arg(long)]
    with_servers: bool,
    /// How long certificates of processes live, 20s to 24h; renewed by the control node at half of it
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = Pace::parse)]
    life: Pace,
    /// Where traces go, by OTLP over gRPC
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
}

const LED_WITHIN: Duration = Duration::from_secs(30);

const SITE: &[u8] = include_bytes!("../../dev/model/site.csv");
const PAGE: &[u8] = include_bytes!("../../dev/model/page.csv");

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(arguments)).map(|()| ExitCode::SUCCESS)
}

async fn serve(arguments: &Arguments) -> Result<()> {
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let lock = lock(&arguments.dir)?;
    let mut processes = Processes::default();
    let mut servers = None;
    let outcome = tokio::select! {
        outcome = start_and_watch(arguments, &lock, &mut processes, &mut servers) => outcome,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    eprintln!("\nstopping");
    processes.stop().await;
    drop(servers);
    outcome
}

/// Held while something runs out of the folder, also by who stops servers after our death.
fn lock(dir: &Path) -> Result<File> {
    fleet::make(dir)?;
    let file = dir.join("lock");
    let cannot = || format!("cannot lock {}", file.display());
    let lock = File::options().create(true).append(true).open(&file).with_context(cannot)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => bail!("another `spillway dev` runs in {}, or is just ending", dir.display()),
        Err(TryLockError::Error(problem)) => Err(problem).with_context(cannot),
    }
}

async fn start_and_watch(
    arguments: &Arguments,
    lock: &File,
    processes: &mut Processes,
    servers: &mut Option<Servers>,
) -> Result<()> {
    let backends = if arguments.with_servers {
        let started = servers.insert(Servers::start(&arguments.dir, lock)?);
        Backends::Servers(started.addresses())
    } else {
        Backends::Embedded
    };
    let fleet = Fleet::lay_out(&arguments.dir, arguments.port, arguments.life, arguments.otlp.as_deref(), &backends)?;
    let links = Links::new(processes.handles());
    if let Backends::Servers(at) = &backends {
        for region in &fleet.regions {
            links.add(&format!("{}/redis", region.name), region.redis, at.redis).await?;
        }
    }
    processes.spawn(&fleet.control.path, "control", &fleet.control.config).await?;
    let target = Target::at(fleet.control.address.to_string(), operator(&fleet.dir));
    apply_when_led(&target, &fleet.dir.join("resources")).await?;
    let pods = fleet.regions.iter().flat_map(|region| &region.sidecars);
    let mut nodes: Vec<_> = pods.map(|pod| (pod.path.clone(), "sidecar", pod.config.clone())).collect();
    nodes.push((fleet.dns.path.clone(), "dns", fleet.dns.config.clone()));
    processes.spawn_all(nodes).await?;
    // What is served is pushed to them.
    try_join_all(fleet.regions.iter().flat_map(|region| &region.sidecars).map(Member::wait_until_ready)).await?;
    // All regions share them.
    load_features(&fleet.dir, &fleet.regions[0]).await?;
    let gateways = fleet.regions.iter().map(|region| &region.gateway);
    let gateways = gateways.map(|gateway| (gateway.path.clone(), "gateway", gateway.config.clone())).collect();
    processes.spawn_all(gateways).await?;
    for region in &fleet.regions {
        links.add(&region.gateway.path, region.service, region.gateway.address).await?;
    }
    let _injector = injector::serve(Injector::new(processes.handles(), links), &fleet.dir).await?;
    try_join_all(fleet.regions.iter().map(|region| region.gateway.wait_until_ready())).await?;
    let _announced = announce(&fleet)?;
    fleet.certificates.keep(fleet.control.address).await;
    Ok(())
}

/// A control node leads as soon as it has stood for election.
async fn apply_when_led(target: &Target, folder: &Path) -> Result<()> {
    let end = Instant::now() + LED_WITHIN;
    loop {
        match apply::folder(target, folder, "spillway dev").await {
            Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(50)).await,
            outcome => return outcome.map(drop),
        }
    }
}

/// Through the same door as `spillway features load`.
async fn load_features(dir: &Path, region: &Region) -> Result<()> {
    let pod = &region.sidecars[0];
    let connection = Connection {
        address: pod.address.to_string(),
        expected: SpiffeId::parse(&pod.id)?,
        identity: of_caller(dir, &region.loader()),
    };
    for (group, content) in [("site", SITE), ("page", PAGE)] {
        let file = region.dir.join(format!("{group}.csv"));
        std::fs::write(&file, content)?;
        let load = Load { group: group.into(), file, tenant: String::new(), batch: 500, restart: true };
        let outcome = load.run(&connection).await?;
        anyhow::ensure!(outcome.refused == 0, "{} rows of the group {group} were refused", outcome.refused);
        eprintln!("features: {} rows of {group}", outcome.written);
    }
    Ok(())
}

/// How commands reach the first sidecar of a region, by default the first one, of what runs out of a folder.
pub fn loader(folder: &Path, region: Option<&str>) -> Result<Connection> {
    let region = region_of(folder, region)?;
    let (pod, name) = (&region["sidecars"][0], &region["name"]);
    let (Some(id), Some(address), Some(name)) = (pod["id"].as_str(), pod["grpc"].as_str(), name.as_str()) else {
        bail!("{}/{ENDPOINTS} names no sidecar", folder.display());
    };
    let identity = of_caller(folder, &region::loader(name));
    Ok(Connection { address: address.into(), expected: SpiffeId::parse(id)?, identity })
}

/// The admin port of the gateway of a region, by default the first one, of what runs out of a folder.
pub fn admin(folder: &Path, region: Option<&str>) -> Result<String> {
    let region = region_of(folder, region)?;
    let admin = region["gateway"]["admin"].as_str();
    Ok(admin.with_context(|| format!("{}/{ENDPOINTS} names no gateway", folder.display()))?.to_owned())
}

/// The control nodes of what runs out of a folder.
pub fn control(folder: &Path) -> Result<Vec<String>> {
    let endpoints = endpoints(folder)?;
    let nodes = endpoints["control"].as_array().into_iter().flatten();
    Ok(nodes.filter_map(|node| node["grpc"].as_str().map(str::to_owned)).collect())
}

/// Who gives orders to what runs out of a folder.
pub fn operator(folder: &Path) -> IdentitySettings {
    of_caller(folder, fleet::OPERATOR)
}

fn region_of(folder: &Path, name: Option<&str>) -> Result<Value> {
    let mut endpoints = endpoints(folder)?;
    let regions = endpoints["regions"].as_array_mut().context("there are no regions")?;
    let found = regions.iter_mut().find(|region| name.is_none_or(|name| region["name"] == name));
    Ok(found.with_context(|| format!("there is no region '{}'", name.unwrap_or_default()))?.take())
}

/// What `spillway dev` says of what runs out of a folder.
pub fn endpoints(folder: &Path) -> Result<Value> {
    let file = folder.join(ENDPOINTS);
    let read = std::fs::read(&file)
        .with_context(|| format!("{}: `spillway dev` writes it when its regions are up", file.display()))?;
    Ok(serde_json::from_slice(&read)?)
}

/// `endpoints.json`: removed when dropped.
struct Announced(PathBuf);

impl Drop for Announced {
    fn drop(&mut self) {
        // The next run removes it.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Writes `endpoints.json` and prints how to call what runs.
fn announce(fleet: &Fleet) -> Result<Announced> {
    let shown = |path: &Path| path.display().to_string();
    let pki = fleet.dir.join("pki");
    let files = |name: &str| json!({ "cert": shown(&pki.join(format!("{name}.pem"))), "key": shown(&pki.join(format!("{name}.key"))) });
    let region = |region: &Region| {
        json!({
            "name": region.name,
            "loader": files(&region.loader().replace('/', ".")),
            "gateway": {
                "id": region.gateway.id,
                "https": format!("https://{}", region.service),
                "admin": format!("http://{}", region.gateway.admin),
            },
            "sidecars": region.sidecars.iter().map(|pod| json!({
                "name": pod.path.rsplit('/').next(),
                "id": pod.id,
                "grpc": pod.address.to_string(),
                "admin": format!("http://{}", pod.admin),
            })).collect::<Vec<_>>(),
        })
    };
    let endpoints = json!({
        "regions": fleet.regions.iter().map(region).collect::<Vec<_>>(),
        "service": { "name": SERVICE, "port": fleet.regions[0].service.port() },
        "control": [{
            "name": CONTROL,
            "id": fleet.control.id,
            "grpc": fleet.control.address.to_string(),
            "bootstrap": fleet.bootstrap.to_string(),
            "admin": format!("http://{}", fleet.control.admin),
        }],
        "dns": [fleet.dns.address.to_string()],
        "injector": shown(&fleet.dir.join(injector::FILE)),
        "trust_bundle": shown(&shared_bundle(&fleet.dir)),
        "pki_dir": shown(&pki),
        "operator": files(fleet::OPERATOR),
        "clients": TENANTS.map(|tenant| (tenant.to_owned(), files(tenant))).into_iter().collect::<Map<_, _>>(),
        "model": MODEL,
        "example_entity": EXAMPLE_ENTITY,
    });
    let file = fleet.dir.join(ENDPOINTS);
    std::fs::write(&file, serde_json::to_vec_pretty(&endpoints)?)
        .with_context(|| format!("cannot write {}", file.display()))?;

    // As it can be pasted: what was built is on nobody's path.
    let spillway = std::env::current_exe()?;
    let here = std::env::current_dir()?;
    let spillway = spillway.strip_prefix(&here).unwrap_or(&spillway);
    let first = &fleet.regions[0];
    let names: Vec<&str> = fleet.regions.iter().map(|region| region.name.as_str()).collect();
    println!(
        "
The regions {names} are up. A prediction:

  curl --cacert {pki}/trust-bundle.pem --cert {pki}/acme.pem --key {pki}/acme.key \\
    https://{gateway}/v2/models/{MODEL}/infer \\
    -d '{{\"parameters\":{{\"entity_id\":\"{EXAMPLE_ENTITY}\"}},\"inputs\":[]}}'

  endpoints   {endpoints}
  regions     {spillway} status --dev={dir}     a gateway: status --dev={dir} --region {region}
  DNS         dig @{dns_ip} -p {dns_port} {SERVICE}
  resources   {dir}/resources    change them, then: {spillway} apply --dev={dir} -f {dir}/resources
  lose one    {spillway} drill run region-loss --dev={dir} --target {region}
  metrics     curl http://{admin}/metrics
  logs        {dir}/*.log, {dir}/*/*.log

Ctrl-C stops all of it.",
        names = names.join(", "),
        pki = shown(&pki),
        gateway = first.service,
        region = first.name,
        endpoints = file.display(),
        dir = fleet.dir.display(),
        spillway = spillway.display(),
        dns_ip = fleet.dns.address.ip(),
        dns_port = fleet.dns.address.port(),
        admin = first.gateway.admin,
    );
    Ok(Announced(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_runs_out_of_a_folder_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("new");
        let first = lock(&dir).unwrap();
        let refused = lock(&dir).unwrap_err().to_string();
        assert!(refused.starts_with("another `spillway dev` runs in"), "{refused}");
        drop(first);
        lock(&dir).unwrap();
    }
}
