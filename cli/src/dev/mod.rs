//! `spillway dev`: one region on this machine, with real processes, real certificates and a real model.
//!
//! * [`region`]: what the region is made of: folders, ports, settings files, snapshot.
//! * [`processes`]: the children, ended with us, started again when they die.
//! * [`servers`]: Redis, Cassandra and Triton, when asked for.
//! * [`injector`]: what breaks things for drills.

// Started with the regions.
#[allow(dead_code)]
pub mod injector;
mod processes;
mod region;
mod servers;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use spillway_core::identity::SpiffeId;

use crate::commands::features::Load;
use crate::commands::sidecar::Connection;
use processes::Processes;
use region::{Backends, Region};
use servers::Servers;

/// Run a region on this machine until Ctrl-C: certificates, a gateway, two sidecars, a model, its features
#[derive(clap::Args)]
pub struct Arguments {
    /// Where everything is kept; made anew at each start, but for the certificates of the authority
    #[arg(long, value_name = "FOLDER", default_value = ".dev")]
    dir: PathBuf,
    /// The gateway's port on 127.0.0.1; 0 takes a free one
    #[arg(long, default_value_t = 8443)]
    port: u16,
    /// Use real servers instead of the embedded defaults: Redis, Cassandra and Triton, by tests/servers of this repository
    #[arg(long)]
    with_servers: bool,
    /// Where traces go, by OTLP over gRPC
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
}

/// Certificates are renewed long before half of their life, 1 h in dev, is over.
const RENEW_EVERY: Duration = Duration::from_secs(20 * 60);

const ENDPOINTS: &str = "endpoints.json";
const SITE: &[u8] = include_bytes!("../../dev/model/site.csv");
const PAGE: &[u8] = include_bytes!("../../dev/model/page.csv");

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(arguments)).map(|()| ExitCode::SUCCESS)
}

async fn serve(arguments: &Arguments) -> Result<()> {
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut processes = Processes::default();
    let mut servers = None;
    let outcome = tokio::select! {
        outcome = start_and_watch(arguments, &mut processes, &mut servers) => outcome,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    eprintln!("\nstopping");
    processes.stop().await;
    drop(servers);
    outcome
}

async fn start_and_watch(
    arguments: &Arguments,
    processes: &mut Processes,
    servers: &mut Option<Servers>,
) -> Result<()> {
    let backends = if arguments.with_servers {
        let started = servers.insert(Servers::start(&arguments.dir)?);
        Backends::Servers(started.addresses())
    } else {
        Backends::Embedded
    };
    let region = Region::lay_out(&arguments.dir, arguments.port, arguments.otlp.as_deref(), &backends)?;
    for pod in &region.sidecars {
        processes.spawn(&pod.name, &["sidecar", "--config"], &pod.config).await?;
    }
    load_features(&region).await?;
    processes.spawn(&region.gateway.name, &["gateway", "--config"], &region.gateway.config).await?;
    region.wait_until_ready().await?;
    announce(&region)?;
    loop {
        tokio::select! {
            restarted = processes.tend() => restarted?,
            () = tokio::time::sleep(RENEW_EVERY) => region.renew_certificates()?,
        }
    }
}

/// Through the same door as `spillway features load`.
async fn load_features(region: &Region) -> Result<()> {
    let pod = &region.sidecars[0];
    let connection = Connection {
        address: pod.address.to_string(),
        expected: SpiffeId::parse(&pod.id)?,
        identity: region::identity(&region.dir, region::LOADER),
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

/// How commands reach the first sidecar of the region that runs out of a folder.
pub fn loader(folder: &Path) -> Result<Connection> {
    let region = endpoints(folder)?;
    let pod = &region["sidecars"][0];
    let (Some(name), Some(address)) = (pod["name"].as_str(), pod["grpc"].as_str()) else {
        anyhow::bail!("{}/{ENDPOINTS} names no sidecar", folder.display());
    };
    let expected = SpiffeId::parse(&region::sidecar_id(name))?;
    Ok(Connection { address: address.into(), expected, identity: region::identity(folder, region::LOADER) })
}

/// The admin port of the gateway of the region that runs out of a folder.
pub fn admin(folder: &Path) -> Result<String> {
    let region = endpoints(folder)?;
    let admin = region["gateway"]["admin"].as_str();
    Ok(admin.with_context(|| format!("{}/{ENDPOINTS} names no gateway", folder.display()))?.to_owned())
}

fn endpoints(folder: &Path) -> Result<serde_json::Value> {
    let file = folder.join(ENDPOINTS);
    let read = std::fs::read(&file)
        .with_context(|| format!("{}: `spillway dev` writes it when the region is up", file.display()))?;
    let mut endpoints: serde_json::Value = serde_json::from_slice(&read)?;
    Ok(endpoints["regions"][0].take())
}

/// Writes `endpoints.json` and prints how to call the region.
fn announce(region: &Region) -> Result<()> {
    let shown = |path: &Path| path.display().to_string();
    let pki = region.dir.join("pki");
    let client = |tenant: &str| json!({ "cert": shown(&pki.join(format!("{tenant}.pem"))), "key": shown(&pki.join(format!("{tenant}.key"))) });
    let endpoints = json!({
        "regions": [{
            "name": region::REGION,
            "gateway": {
                "https": format!("https://{}", region.gateway.address),
                "admin": format!("http://{}", region.gateway.admin),
            },
            "sidecars": region.sidecars.iter().map(|pod| json!({
                "name": pod.name,
                "grpc": pod.address.to_string(),
                "admin": format!("http://{}", pod.admin),
            })).collect::<Vec<_>>(),
        }],
        "trust_bundle": shown(&pki.join("trust-bundle.pem")),
        "pki_dir": shown(&pki),
        "clients": region::TENANTS.map(|tenant| (tenant.to_owned(), client(tenant))).into_iter().collect::<serde_json::Map<_, _>>(),
        "model": region::MODEL,
        "example_entity": region::EXAMPLE_ENTITY,
    });
    let file = region.dir.join(ENDPOINTS);
    std::fs::write(&file, serde_json::to_vec_pretty(&endpoints)?)
        .with_context(|| format!("cannot write {}", file.display()))?;

    let pki = shown(&pki);
    let url = format!("https://{}", region.gateway.address);
    // As it can be pasted: what was built is on nobody's path.
    let spillway = std::env::current_exe()?;
    let here = std::env::current_dir()?;
    let spillway = spillway.strip_prefix(&here).unwrap_or(&spillway);
    println!(
        "
The region {name} is up. A prediction:

  curl --cacert {pki}/trust-bundle.pem --cert {pki}/acme.pem --key {pki}/acme.key \\
    {url}/v2/models/{model}/infer \\
    -d '{{\"parameters\":{{\"entity_id\":\"{entity}\"}},\"inputs\":[]}}'

  endpoints   {endpoints}
  resources   {dir}/resources    change them, then: {spillway} check -f {dir}/resources -o {dir}/snapshot
  status      {spillway} status --dev {dir}
  metrics     curl http://{admin}/metrics
  logs        {dir}/*.log

Ctrl-C stops all of it.",
        name = region::REGION,
        model = region::MODEL,
        entity = region::EXAMPLE_ENTITY,
        endpoints = file.display(),
        dir = region.dir.display(),
        spillway = spillway.display(),
        admin = region.gateway.admin,
    );
    Ok(())
}
